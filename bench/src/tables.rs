//! A report as text: tables for a terminal, Markdown, and the lines of a run's progress.

use comfy_table::{CellAlignment, Table, presets};

use crate::joining::Joining;
use crate::measure::{Figures, Sample};
use crate::reference::{self, CRUCIBLE, VITASTOR};
use crate::report::{Report, RowReport};
use crate::rows::{Comparison, Contender};
use crate::standing::{ClusterStanding, Standing};

const COLUMNS: [&str; 9] = [
    "",
    "operations/s",
    "mean µs",
    "p99 µs",
    "flush mean µs",
    "flush p99 µs",
    "server CPU µs/op",
    "machine CPU µs/op",
    "write ampl.",
];
/// Which of them is the servers' processor time.
const SERVER_CPU_COLUMN: usize = 6;

impl Report {
    /// The table for a terminal.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        for row in &self.rows {
            let mut table = Table::new();
            table.load_style(presets::UTF8_BORDERS_ONLY);
            table.set_header(COLUMNS);
            for column in table.column_iter_mut().skip(1) {
                column.set_cell_alignment(CellAlignment::Right);
            }
            for (contender, figures) in &row.medians {
                table.add_row(cells(*contender, figures));
            }
            for cells in reference_rows(self.comparison, row.name) {
                table.add_row(cells);
            }
            text += &format!("\n{}\n{table}\n", row.title);
            if let Some(standing) = &row.standing {
                text += &format!("{}\n", verdict(row, standing));
            }
            for (who, standing) in &row.least {
                text += &format!("{}: {}\n", who.title(), ratios(standing));
            }
            if let Some(standing) = &row.cluster {
                text += &format!("{}\n", cluster_verdict(standing));
            }
        }
        for joining in &self.joinings {
            text += &format!(
                "\n{JOINING}, {}: {}\n",
                joining.medium.title(),
                told(joining)
            );
        }
        for failure in &self.failures {
            text += &format!("FAILED {failure}\n");
        }
        text
    }

    /// The same for reading later.
    pub(crate) fn markdown(&self, chart_name: &str) -> String {
        let effort = &self.effort;
        let mut text = format!("# {}, {}\n\n", self.title(), self.date);
        text += &format!(
            "Median of {} interleaved rounds of {} s. How it is measured: [bench/README.md](../README.md).\n\n",
            effort.rounds, effort.run_seconds
        );
        text +=
            &format!("![Operations a second and processor time an operation]({chart_name})\n\n");
        text += "## Against the targets\n\n";
        text += &match self.comparison {
            Comparison::Servers => self.standings(),
            Comparison::Cluster => self.cluster_standings(),
        };
        for row in &self.rows {
            text += &format!("\n## {}\n\n", row.title);
            text += &format!(
                "| contender |{}|\n|---|{}\n",
                COLUMNS[1..].join("|"),
                "--:|".repeat(COLUMNS.len() - 1)
            );
            for (contender, figures) in &row.medians {
                text += &format!("|{}|\n", cells(*contender, figures).join("|"));
            }
            for cells in reference_rows(self.comparison, row.name) {
                text += &format!("|{}|\n", cells.join("|"));
            }
        }
        if !self.joinings.is_empty() {
            text += &format!("\n## {JOINING}\n\n");
        }
        for joining in &self.joinings {
            text += &format!("* {}: {}\n", joining.medium.title(), told(joining));
        }
        if self.comparison == Comparison::Cluster {
            text += &format!("\n{REFERENCE_NOTE}\n");
        }
        text + &self.machine_and_failures()
    }

    fn standings(&self) -> String {
        let columns = "best peer | × best peer | × bare file | CPU × leanest peer |";
        let lines = "---|--:|--:|--:|";
        let mut text = format!("| row | {columns} speed | CPU |\n|---|{lines}---|---|\n");
        for row in &self.rows {
            if let Some(standing) = &row.standing {
                text += &format!(
                    "| {} | {} {} | {} |\n",
                    row.title,
                    ratio_cells(standing),
                    met(standing.meets_speed),
                    met(standing.meets_cpu),
                );
            }
        }
        if self.rows.iter().all(|row| row.least.is_empty()) {
            return text;
        }
        text += &format!("\n## {LEAST}\n\n{LEAST_NOTE}\n\n");
        text += &format!("| row | server | {columns}\n|---|---|{lines}\n");
        for row in &self.rows {
            for (who, standing) in &row.least {
                let cells = ratio_cells(standing);
                text += &format!("| {} | {} | {cells}\n", row.title, who.title());
            }
        }
        text
    }

    fn cluster_standings(&self) -> String {
        let mut text = "| row | × Ceph | asked for | CPU × Ceph's | CPU × Vitastor's | CPU × Crucible's | latency × 1 copy | speed | CPU | latency |\n|---|--:|--:|--:|--:|--:|--:|---|---|---|\n".to_owned();
        for row in &self.rows {
            let Some(standing) = &row.cluster else {
                continue;
            };
            text += &format!(
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |\n",
                row.title,
                optional(standing.ceph_ratio, 2),
                standing.ceph_wanted,
                optional(standing.ceph_cpu_ratio, 2),
                optional(standing.vitastor_cpu_ratio, 2),
                optional(standing.crucible_cpu_ratio, 2),
                optional(standing.single_latency_ratio, 2),
                maybe_met(standing.meets_speed()),
                maybe_met(standing.meets_cpu()),
                maybe_met(standing.meets_latency()),
            );
        }
        text
    }

    fn machine_and_failures(&self) -> String {
        let mut text = "\n## Machine\n\n".to_owned();
        for (index, machine) in self.machines.iter().enumerate() {
            if index == 0 {
                text += &format!(
                    "* {}, {} cores, {} MiB of memory\n",
                    machine.processor, machine.cores, machine.memory_mib
                );
                text += &format!("* {}, Linux {}\n", machine.system, machine.kernel);
            }
            text += &format!("* {} on {}\n", machine.file_system, machine.device);
            text += &format!("* load when it began: {}\n", machine.load_before);
        }
        text += &format!(
            "* {} MiB of data for each contender\n",
            self.effort.size_bytes >> 20
        );
        text += &format!("* ashlard of commit {}", self.commit);
        text += &if self.ashlard_flags.is_empty() {
            ", with its defaults\n".to_owned()
        } else {
            format!(", with `{}`\n", self.ashlard_flags.join(" "))
        };
        for version in self.versions.values() {
            text += &format!("* {version}\n");
        }
        if !self.failures.is_empty() {
            text += "\n## Failures\n\n";
            for failure in &self.failures {
                text += &format!("* {failure}\n");
            }
        }
        text
    }
}

/// What a server that keeps nothing would be told.
const LEAST: &str = "A server that keeps nothing, beside the same peers";
const LEAST_NOTE: &str = "It checks nothing, finds nothing again and keeps nothing that was written, except that a flush appends it to a file: about what \
     the socket, the client, the disk and the kernel leave for a server to gain. No bound: who orders his work with more thought may be faster. It sleeps \
     when there is nothing to do, or looks for requests for 100 µs before.";

fn ratio_cells(standing: &Standing) -> String {
    format!(
        "{} | {:.2} | {} | {} |",
        standing.best_peer.title(),
        standing.ratio,
        optional(standing.bare_ratio, 2),
        optional(standing.cpu_ratio, 2),
    )
}

/// What the cluster ends with.
pub(crate) const JOINING: &str = "A fourth node joins, 4 KiB random writes, depth 8";

fn told(joining: &Joining) -> String {
    format!(
        "even to {:.1} % after {:.1} s; p99 {:.0} µs meanwhile, {:.0} µs undisturbed: {:.2} times, {}",
        100.0 * joining.spread,
        joining.even_after_seconds,
        joining.moving_p99_us,
        joining.undisturbed_p99_us,
        joining.ratio(),
        met(joining.meets_latency()),
    )
}

const REFERENCE_NOTE: &str = "Rows \"elsewhere\" were not measured here: they were read off a like machine with stores on tmpfs, processor time \
     over three storage daemons, Vitastor and Ceph by their own clients, Crucible with its NBD server.";

/// What was read elsewhere, as lines of a row's table.
fn reference_rows(comparison: Comparison, row: &str) -> Vec<Vec<String>> {
    if comparison != Comparison::Cluster {
        return Vec::new();
    }
    let of = |system: &reference::System| {
        let figures = system.row(row)?;
        let mut cells = vec!["-".to_owned(); COLUMNS.len()];
        cells[0] = format!("{}, elsewhere", system.title);
        cells[1] = figures
            .operations_per_second
            .map_or_else(|| "-".to_owned(), thousands);
        cells[SERVER_CPU_COLUMN] = format!("{:.1}", figures.cpu_us);
        Some(cells)
    };
    reference::ALL.iter().filter_map(of).collect()
}

fn cells(contender: Contender, figures: &Figures) -> Vec<String> {
    vec![
        contender.title().to_owned(),
        thousands(figures.operations_per_second),
        format!("{:.0}", figures.mean_us),
        format!("{:.0}", figures.p99_us),
        optional(figures.flush_mean_us, 0),
        optional(figures.flush_p99_us, 0),
        optional(figures.server_cpu_us, 1),
        format!("{:.1}", figures.machine_cpu_us),
        optional(figures.write_amplification, 2),
    ]
}

fn verdict(row: &RowReport, standing: &Standing) -> String {
    let must_beat = if row.must_beat_bare {
        " (the bare file is to be beaten)"
    } else {
        ""
    };
    format!(
        "ashlar: {}: speed {}{must_beat}, processor time {}",
        ratios(standing),
        met(standing.meets_speed),
        met(standing.meets_cpu),
    )
}

fn ratios(standing: &Standing) -> String {
    let mut text = format!("{:.2} × {}", standing.ratio, standing.best_peer.title());
    if let Some(ratio) = standing.bare_ratio {
        text += &format!(", {ratio:.2} × the bare file");
    }
    if let Some(ratio) = standing.cpu_ratio {
        text += &format!(", processor time {ratio:.2} × the leanest peer's");
    }
    text
}

fn cluster_verdict(standing: &ClusterStanding) -> String {
    let mut parts = Vec::new();
    if let (Some(ceph), Some(ratio)) = (standing.best_ceph, standing.ceph_ratio) {
        parts.push(format!(
            "{ratio:.2} × {} ({} asked for): {}",
            ceph.title(),
            standing.ceph_wanted,
            maybe_met(standing.meets_speed())
        ));
    }
    if let Some(ratio) = standing.ceph_cpu_ratio {
        parts.push(format!("processor time {ratio:.2} × Ceph's"));
    }
    if let Some(ratio) = standing.vitastor_cpu_ratio {
        parts.push(format!(
            "{ratio:.2} × that of {}: {}",
            VITASTOR.title,
            maybe_met(standing.meets_cpu())
        ));
    }
    if let Some(ratio) = standing.crucible_cpu_ratio {
        parts.push(format!("{ratio:.2} × that of {}", CRUCIBLE.title));
    }
    if let Some(ratio) = standing.single_latency_ratio {
        let judged = standing
            .meets_latency()
            .map(|holds| format!(": {}", met(holds)))
            .unwrap_or_default();
        parts.push(format!("latency {ratio:.2} × that of one copy{judged}"));
    }
    format!("ashlar, 3 copies: {}", parts.join("; "))
}

fn maybe_met(holds: Option<bool>) -> &'static str {
    holds.map_or("-", met)
}

fn met(holds: bool) -> &'static str {
    if holds {
        "meets the target"
    } else {
        "MISSES the target"
    }
}

fn optional(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.decimals$}"))
}

/// A whole number with its thousands apart.
pub(crate) fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// One sample in one line, for the run's progress.
pub(crate) fn line(sample: &Sample) -> String {
    let figures = &sample.figures;
    let mut text = format!(
        "round {} {:<25} {:>9}/s  mean {:>6.0} µs  p99 {:>6.0} µs  server CPU {:>6} µs/op",
        sample.round + 1,
        sample.contender.title(),
        thousands(figures.operations_per_second),
        figures.mean_us,
        figures.p99_us,
        optional(figures.server_cpu_us, 1),
    );
    if let Some(flush) = figures.flush_mean_us {
        text += &format!("  flush {flush:.0} µs");
    }
    if let Some(amplification) = figures.write_amplification {
        text += &format!("  write amplification {amplification:.2}");
    }
    if let Some(tails) = sample.tails_written.filter(|&tails| tails < 4.0) {
        text += &format!("  TOO SHORT: {tails:.1} tails");
    }
    text += &format!("  others {:.2} cores", sample.other_cores);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_set_apart() {
        assert_eq!(thousands(0.4), "0");
        assert_eq!(thousands(999.0), "999");
        assert_eq!(thousands(1000.0), "1,000");
        assert_eq!(thousands(1_234_567.0), "1,234,567");
    }
}
