//! Side-by-side benchmarks of Ashlar and the NBD servers people use today. `bench/README.md` has the method.

mod ashlar;
mod chart;
mod fio;
mod measure;
mod procfs;
mod report;
mod rows;
mod servers;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;

use crate::ashlar::Ashlar;
use crate::measure::{Effort, Field};
use crate::procfs::Machine;
use crate::report::{Report, RowReport};
use crate::rows::{Contender, ROWS, Row};
use crate::servers::Places;

/// Compare Ashlar with other NBD servers on this machine.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
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
    /// Size of each contender's data.
    #[arg(long, default_value_t = 1024)]
    size_mib: u64,
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

fn main() -> ExitCode {
    match compare(&Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ashlar-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn compare(arguments: &Arguments) -> Result<ExitCode> {
    let rows = chosen_rows(&arguments.rows)?;
    if arguments.list {
        for row in &rows {
            let who: Vec<&str> = row
                .contenders()
                .iter()
                .map(|contender| contender.title())
                .collect();
            println!("{:<20} {}: {}", row.name, row.title, who.join(", "));
        }
        return Ok(ExitCode::SUCCESS);
    }
    fio::require_nbd_engine()?;
    let effort = Effort {
        rounds: arguments
            .rounds
            .unwrap_or(if arguments.quick { 1 } else { 3 }),
        run_seconds: arguments
            .seconds
            .unwrap_or(if arguments.quick { 3 } else { 10 }),
        warm_up_seconds: if arguments.quick { 1 } else { 3 },
        size_bytes: arguments.size_mib << 20,
    };
    ensure!(
        effort.rounds > 0 && effort.run_seconds > 0 && effort.size_bytes > 0,
        "nothing to measure"
    );
    let chosen = if arguments.contenders.is_empty() {
        Contender::ALL.to_vec()
    } else {
        arguments.contenders.clone()
    };
    let contenders: Vec<Contender> = Contender::ALL
        .into_iter()
        .filter(|contender| {
            chosen.contains(contender)
                && rows.iter().any(|row| row.contenders().contains(contender))
        })
        .collect();

    let scratch = Scratch::make(arguments)?;
    let mut machine = Machine::read(&scratch.data);
    machine.versions = versions(&contenders);
    let mut field = enter(&contenders, arguments, &effort, &scratch)?;

    let mut report = Report::new(machine, effort, arguments.ashlard_flags.clone());
    for row in rows {
        eprintln!("\n{}", row.title);
        let (samples, failures) = field.run_row(row, &effort, &scratch.data, |sample| {
            eprintln!("  {}", report::line(sample));
        });
        for failure in &failures {
            eprintln!("  FAILED {failure}");
        }
        report.rows.push(RowReport::new(row, samples));
        report.failures.extend(failures);
    }
    drop(field);
    println!("{}", report.table());
    let written = report.write(&arguments.results)?;
    println!("results: {}", written.display());
    Ok(if report.failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn chosen_rows(wanted: &[String]) -> Result<Vec<&'static Row>> {
    for name in wanted {
        if !ROWS.iter().any(|row| row.name.contains(name.as_str())) {
            bail!("no row is named like '{name}'; --list shows them");
        }
    }
    static ALL: [Row; ROWS.len()] = ROWS;
    let is_wanted = |row: &&Row| {
        wanted.is_empty() || wanted.iter().any(|name| row.name.contains(name.as_str()))
    };
    Ok(ALL.iter().filter(is_wanted).collect())
}

/// Writes everyone's data and starts everyone.
fn enter(
    contenders: &[Contender],
    arguments: &Arguments,
    effort: &Effort,
    scratch: &Scratch,
) -> Result<Field> {
    let places = Places {
        sockets: &scratch.sockets,
        data: &scratch.data,
    };
    let mut field = Field {
        running: BTreeMap::new(),
        ashlar: None,
    };
    for &contender in contenders {
        eprintln!(
            "writing {} MiB for {}",
            effort.size_bytes >> 20,
            contender.title()
        );
        let file = scratch.data.join(format!("{}.raw", contender.slug()));
        fio::write_data_file(&file, effort.size_bytes)?;
        let running = if contender == Contender::Ashlar {
            let flags = arguments.ashlard_flags.clone();
            let ashlar = Ashlar::new(programs(arguments)?, &scratch.data, &scratch.sockets, flags)?;
            let first = ashlar.start()?;
            ashlar.create_volume(effort.size_bytes)?;
            ashlar.fill(&first, &file)?;
            fs::remove_file(&file)?;
            // Started anew, it holds nothing of what was written in memory.
            drop(first);
            let running = ashlar.start()?;
            field.ashlar = Some(ashlar);
            running
        } else {
            servers::start_peer(contender, &file, places)?
        };
        field.running.insert(contender, running);
    }
    Ok(field)
}

fn programs(arguments: &Arguments) -> Result<PathBuf> {
    match &arguments.programs {
        Some(folder) => Ok(folder.clone()),
        None => {
            let this = std::env::current_exe()?;
            Ok(this
                .parent()
                .context("this program has no folder")?
                .to_owned())
        }
    }
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
            Contender::Ashlar | Contender::Bare => {}
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

/// The directories of a run, removed at its end.
#[derive(Debug)]
struct Scratch {
    data: PathBuf,
    sockets: PathBuf,
    keep: bool,
}

impl Scratch {
    fn make(arguments: &Arguments) -> Result<Scratch> {
        let base = match &arguments.scratch {
            Some(base) => base.clone(),
            // Beside the build, which is on a disk; the system's temporary directory often is memory.
            None => programs(arguments)?.join("bench-scratch"),
        };
        let name = format!("ashlar-bench-{}", std::process::id());
        let data = base.join(&name);
        fs::create_dir_all(&data).with_context(|| data.display().to_string())?;
        let data = data.canonicalize()?;
        // On a tmpfs where there is one: Ashlar's tail goes there too, as it does by default.
        let shared_memory = Path::new("/dev/shm");
        let volatile = if shared_memory.is_dir() {
            shared_memory.to_owned()
        } else {
            std::env::temp_dir()
        };
        let sockets = volatile.join(&name);
        fs::create_dir(&sockets).with_context(|| sockets.display().to_string())?;
        Ok(Scratch {
            data,
            sockets,
            keep: arguments.keep,
        })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove(&self.sockets);
        if self.keep {
            eprintln!("kept {}", self.data.display());
        } else {
            remove(&self.data);
        }
    }
}

fn remove(directory: &Path) {
    if let Err(error) = fs::remove_dir_all(directory) {
        eprintln!("could not remove {}: {error}", directory.display());
    }
}
