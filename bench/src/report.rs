//! Turns figures into a table for the terminal, Markdown, JSON and a chart.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::chart;
use crate::measure::{Effort, Figures, Sample, Standing, standing, summarise};
use crate::procfs::Machine;
use crate::rows::{Contender, Row};

/// Everything that a run has to say.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// When it began, UTC.
    pub(crate) date: String,
    /// The commit of the working directory; `+` when files differ from it.
    pub(crate) commit: String,
    pub(crate) effort: Effort,
    pub(crate) ashlard_flags: Vec<String>,
    pub(crate) machine: Machine,
    pub(crate) rows: Vec<RowReport>,
    pub(crate) failures: Vec<String>,
}

/// One row, summed up and in full.
#[derive(Debug, Serialize)]
pub(crate) struct RowReport {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) must_beat_bare: bool,
    pub(crate) medians: BTreeMap<Contender, Figures>,
    pub(crate) standing: Option<Standing>,
    pub(crate) samples: Vec<Sample>,
}

impl RowReport {
    pub(crate) fn new(row: &Row, samples: Vec<Sample>) -> RowReport {
        let medians = summarise(&samples);
        let standing = standing(row, &medians);
        RowReport {
            name: row.name,
            title: row.title,
            must_beat_bare: row.must_beat_bare,
            medians,
            standing,
            samples,
        }
    }
}

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

impl Report {
    pub(crate) fn new(machine: Machine, effort: Effort, ashlard_flags: Vec<String>) -> Report {
        Report {
            date: jiff::Timestamp::now()
                .strftime("%Y-%m-%dT%H:%MZ")
                .to_string(),
            commit: commit(),
            effort,
            ashlard_flags,
            machine,
            rows: Vec::new(),
            failures: Vec::new(),
        }
    }

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
            text += &format!("\n{}\n{table}\n", row.title);
            if let Some(standing) = &row.standing {
                text += &format!("{}\n", verdict(row, standing));
            }
        }
        for failure in &self.failures {
            text += &format!("FAILED {failure}\n");
        }
        text
    }

    fn markdown(&self, chart_name: &str) -> String {
        let machine = &self.machine;
        let effort = &self.effort;
        let mut text = format!("# Ashlar beside other NBD servers, {}\n\n", self.date);
        text += &format!(
            "Median of {} interleaved rounds of {} s. How it is measured: [bench/README.md](../README.md).\n\n",
            effort.rounds, effort.run_seconds
        );
        text +=
            &format!("![Operations a second and processor time an operation]({chart_name})\n\n");
        text += "## Against the targets\n\n";
        text += "| row | best peer | × best peer | × bare file | CPU × leanest peer | speed | CPU |\n|---|---|--:|--:|--:|---|---|\n";
        for row in &self.rows {
            let Some(standing) = &row.standing else {
                continue;
            };
            text += &format!(
                "| {} | {} | {:.2} | {} | {} | {} | {} |\n",
                row.title,
                standing.best_peer.title(),
                standing.ratio,
                optional(standing.bare_ratio, 2),
                optional(standing.cpu_ratio, 2),
                met(standing.meets_speed),
                met(standing.meets_cpu),
            );
        }
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
        }
        text += "\n## Machine\n\n";
        text += &format!(
            "* {}, {} cores, {} MiB of memory\n",
            machine.processor, machine.cores, machine.memory_mib
        );
        text += &format!("* {}, Linux {}\n", machine.system, machine.kernel);
        text += &format!("* {} on {}\n", machine.file_system, machine.device);
        text += &format!("* load when it began: {}\n", machine.load_before);
        text += &format!(
            "* {} MiB of data for each contender\n",
            effort.size_bytes >> 20
        );
        text += &format!("* ashlard of commit {}", self.commit);
        text += &if self.ashlard_flags.is_empty() {
            ", with its defaults\n".to_owned()
        } else {
            format!(", with `{}`\n", self.ashlard_flags.join(" "))
        };
        for version in machine.versions.values() {
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

    /// Writes the results in all three forms into `folder` and returns the Markdown's path.
    pub(crate) fn write(&self, folder: &Path) -> Result<PathBuf> {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let name = self
            .date
            .replace([':', 'T', 'Z'], "-")
            .trim_end_matches('-')
            .to_owned();
        let path = |extension: &str| folder.join(format!("{name}.{extension}"));
        let put = |extension: &str, text: &str| {
            fs::write(path(extension), text).with_context(|| path(extension).display().to_string())
        };
        put("json", &(serde_json::to_string_pretty(self)? + "\n"))?;
        put("svg", &chart::draw(self))?;
        put("md", &self.markdown(&format!("{name}.svg")))?;
        Ok(path("md"))
    }
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .args(arguments)
            .output()
            .ok()
            .filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(head) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".to_owned();
    };
    let clean = git(&["status", "--porcelain", "--untracked-files=no"])
        .is_some_and(|changes| changes.is_empty());
    if clean { head } else { format!("{head}+") }
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
    let mut text = format!(
        "ashlar: {:.2} × {}",
        standing.ratio,
        standing.best_peer.title()
    );
    if let Some(ratio) = standing.bare_ratio {
        text += &format!(", {ratio:.2} × the bare file");
        if row.must_beat_bare {
            text += " (must be above 1)";
        }
    }
    text += &format!(": speed {}", met(standing.meets_speed));
    if let Some(ratio) = standing.cpu_ratio {
        text += &format!(
            "; processor time {ratio:.2} × the leanest peer's: {}",
            met(standing.meets_cpu)
        );
    }
    text
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
