//! Side-by-side benchmarks of Ashlar and the NBD servers people use today, and of a cluster and Ceph.
//! `bench/README.md` has the method.

mod ashlar;
mod ceph;
mod chart;
mod cluster;
mod command;
mod entry;
mod fio;
mod http;
mod joining;
mod least;
mod measure;
mod procfs;
mod reference;
mod report;
mod rows;
mod scratch;
mod servers;
mod standing;
mod tables;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};

use crate::least::LeastServer;
use crate::measure::Effort;
use crate::procfs::Machine;
use crate::report::{Report, RowReport};
use crate::rows::{Comparison, Contender, Medium, ROWS, Row};
use crate::scratch::Scratch;

/// Compare Ashlar with other servers on this machine.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    subject: Option<Subject>,
    #[command(flatten)]
    choices: Choices,
}

#[derive(Debug, Subcommand)]
enum Subject {
    /// Compare a cluster of three nodes on this machine with Ceph.
    Cluster {
        /// Where the stores lie, one after the other.
        #[arg(long, value_enum, value_delimiter = ',', default_value = "tmpfs,disk")]
        media: Vec<Medium>,
        #[command(flatten)]
        choices: Choices,
    },
    /// What the comparison starts as a yardstick: an NBD server that keeps nothing.
    #[command(hide = true)]
    LeastServer(LeastServer),
}

#[derive(Debug, Args)]
struct Choices {
    /// One round of 3 s runs: a look, not a result.
    #[arg(long)]
    quick: bool,
    /// Only these rows (see --list); a part of a name is enough.
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// Only these contenders.
    #[arg(long, value_enum, value_delimiter = ',')]
    contenders: Vec<Contender>,
    /// Rounds of each row; the median counts.
    #[arg(long)]
    rounds: Option<u32>,
    /// Length of one run.
    #[arg(long)]
    seconds: Option<u64>,
    /// Size of each contender's data [default: 1024, of a cluster 512].
    #[arg(long)]
    size_mib: Option<u64>,
    /// Scratch directory, on the device to measure; it needs room for each contender's data, and more for Ashlar's.
    #[arg(long)]
    scratch: Option<PathBuf>,
    /// Where the results go.
    #[arg(long, default_value = "bench/results")]
    results: PathBuf,
    /// Folder with ashlard and ashlar; by default that of this program.
    #[arg(long)]
    programs: Option<PathBuf>,
    /// One more flag for ashlard; may be repeated.
    #[arg(long = "ashlard-flag", allow_hyphen_values = true)]
    ashlard_flags: Vec<String>,
    /// Keep the scratch directory.
    #[arg(long)]
    keep: bool,
    /// Print the rows and who runs in each, and end.
    #[arg(long)]
    list: bool,
}

impl Choices {
    fn effort(&self, comparison: Comparison) -> Effort {
        let usual_mib = match comparison {
            Comparison::Servers => 1024,
            // There are three copies of it, twice over in Ceph, and all of them may lie in memory.
            Comparison::Cluster => 512,
        };
        Effort {
            rounds: self.rounds.unwrap_or(if self.quick { 1 } else { 3 }),
            run_seconds: self.seconds.unwrap_or(if self.quick { 3 } else { 10 }),
            warm_up_seconds: if self.quick { 1 } else { 3 },
            size_bytes: self.size_mib.unwrap_or(usual_mib) << 20,
        }
    }

    fn programs(&self) -> Result<PathBuf> {
        if let Some(folder) = &self.programs {
            return Ok(folder.clone());
        }
        let this = std::env::current_exe()?;
        let folder = this.parent().context("this program has no folder")?;
        Ok(folder.to_owned())
    }

    fn rows(&self) -> Result<Vec<&'static Row>> {
        let is_like = |row: &Row, name: &String| row.name.contains(name.as_str());
        for name in &self.rows {
            if !ROWS.iter().any(|row| is_like(row, name)) {
                bail!("no row is named like '{name}'; --list shows them");
            }
        }
        static ALL: [Row; ROWS.len()] = ROWS;
        let is_wanted =
            |row: &&Row| self.rows.is_empty() || self.rows.iter().any(|name| is_like(row, name));
        Ok(ALL.iter().filter(is_wanted).collect())
    }

    /// Those who take part in one of the rows.
    fn contenders(&self, comparison: Comparison, rows: &[&'static Row]) -> Result<Vec<Contender>> {
        let everyone = comparison.everyone();
        for contender in &self.contenders {
            ensure!(
                everyone.contains(contender),
                "{} is not in this comparison",
                contender.title()
            );
        }
        let takes_part = |contender: &Contender| {
            (self.contenders.is_empty() || self.contenders.contains(contender))
                && rows
                    .iter()
                    .any(|row| comparison.contenders(row).contains(contender))
        };
        Ok(everyone.iter().copied().filter(takes_part).collect())
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let compared = match &arguments.subject {
        None => compare(&arguments.choices, Comparison::Servers, &[Medium::Disk]),
        Some(Subject::Cluster { media, choices }) => compare(choices, Comparison::Cluster, media),
        Some(Subject::LeastServer(server)) => server.run().map(|()| ExitCode::SUCCESS),
    };
    match compared {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ashlar-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn compare(choices: &Choices, comparison: Comparison, media: &[Medium]) -> Result<ExitCode> {
    let rows = choices.rows()?;
    let contenders = choices.contenders(comparison, &rows)?;
    if choices.list {
        for row in &rows {
            let who: Vec<&str> = comparison
                .contenders(row)
                .iter()
                .map(|contender| contender.title())
                .collect();
            println!("{:<20} {}: {}", row.name, row.title, who.join(", "));
        }
        return Ok(ExitCode::SUCCESS);
    }
    fio::require_engines(&["nbd", "io_uring"])?;
    let effort = choices.effort(comparison);
    ensure!(
        effort.rounds > 0 && effort.run_seconds > 0 && effort.size_bytes > 0,
        "nothing to measure"
    );
    let programs = choices.programs()?;
    let mut report = Report::new(comparison, effort, choices.ashlard_flags.clone());
    for &medium in media {
        let base = match (medium, &choices.scratch) {
            (Medium::Tmpfs, _) => scratch::memory()?,
            (Medium::Disk, Some(base)) => base.clone(),
            // Beside the build, which is on a disk; the system's temporary directory often is memory.
            (Medium::Disk, None) => programs.join("bench-scratch"),
        };
        let scratch = Scratch::make(&base, choices.keep)?;
        report.machines.push(Machine::read(&scratch.data));
        if comparison == Comparison::Cluster {
            eprintln!("\nstores on {}", medium.title());
        }
        let entry = entry::Entry {
            programs: &programs,
            scratch: &scratch,
            flags: &choices.ashlard_flags,
            size_bytes: effort.size_bytes,
        };
        let (mut field, failures) = match comparison {
            Comparison::Servers => entry.servers(&contenders),
            Comparison::Cluster => entry.cluster(&contenders),
        };
        let mut failed = |failure: String| {
            eprintln!("  FAILED {failure}");
            report.failures.push(failure);
        };
        failures.into_iter().for_each(&mut failed);
        if !measure::await_quiet()? {
            eprintln!("the machine is busy with something else");
        }
        for &row in &rows {
            eprintln!("\n{}", row.title);
            let (samples, failures) =
                field.run_row(row, comparison, &effort, &scratch.data, |sample| {
                    eprintln!("  {}", tables::line(sample));
                });
            failures.into_iter().for_each(&mut failed);
            report
                .rows
                .push(RowReport::new(comparison, medium, row, samples));
        }
        // The last of all: from then on there are four nodes.
        if field.cluster.is_some() {
            eprintln!("\n{}", tables::JOINING);
            let calm = Duration::from_secs(effort.run_seconds);
            let data = &scratch.data;
            match joining::measure(&mut field, medium, effort.size_bytes, calm, data) {
                Ok(joining) => report.joinings.push(joining),
                Err(error) => failed(format!("{}: {error:#}", tables::JOINING)),
            }
        }
    }
    report.versions = versions(&contenders);
    println!("{}", report.table());
    let written = report.write(&choices.results)?;
    println!("results: {}", written.display());
    Ok(if report.failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What each program that takes part says its version is.
fn versions(contenders: &[Contender]) -> BTreeMap<String, String> {
    let mut wanted = vec![("fio", "--version")];
    for contender in contenders {
        match contender {
            Contender::QemuNone | Contender::QemuWriteback => {
                wanted.push(("qemu-nbd", "--version"))
            }
            Contender::Nbdkit => wanted.push(("nbdkit", "--version")),
            Contender::NbdServer => wanted.push(("nbd-server", "-V")),
            Contender::Cluster => wanted.push(("etcd", "--version")),
            Contender::CephRbd => wanted.push(("ceph-osd", "--version")),
            Contender::CephNbd => {
                wanted.extend([("ceph-osd", "--version"), ("qemu-nbd", "--version")])
            }
            Contender::Ashlar
            | Contender::Single
            | Contender::Bare
            | Contender::Least
            | Contender::LeastLooking => {}
        }
    }
    let mut versions = BTreeMap::new();
    for (program, flag) in wanted {
        let Ok(output) = Command::new(program).arg(flag).output() else {
            continue;
        };
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        let line = text
            .lines()
            .find(|line| line.bytes().any(|byte| byte.is_ascii_digit()))
            .unwrap_or_default();
        versions.insert(program.to_owned(), line.trim().to_owned());
    }
    versions
}
