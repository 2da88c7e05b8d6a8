//! What the kernel tells about processes and the machine, read from /proc.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde::Serialize;

/// Processor time of a process and of all it has started, in microseconds.
///
/// `/proc/PID/stat` holds the whole process: threads that have ended, and the kernel's io_uring workers, which
/// are threads of the process that owns the ring. Children that were waited for are in the parent's own sums, the
/// living and the not yet waited for are added one by one, so nothing is lost or counted twice between two readings
/// as long as no child detaches itself.
pub(crate) fn tree_cpu_us(pid: u32) -> Result<u64> {
    let mut ticks = 0;
    let mut pending = vec![pid];
    while let Some(pid) = pending.pop() {
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
            // A child that was waited for since its parent listed it: the parent's sums were read too early by
            // at most this child's time.
            continue;
        };
        ticks += cpu_ticks(&stat).with_context(|| format!("/proc/{pid}/stat"))?;
        pending.extend(children(pid));
    }
    Ok(ticks * 1_000_000 / TICKS_PER_SECOND)
}

/// The kernel's USER_HZ, in which proc(5) counts processor time: 100 on every architecture but Alpha and Itanium.
const TICKS_PER_SECOND: u64 = 100;

/// utime + stime + cutime + cstime: fields 14 to 17 of proc(5), counted from the one after the command's name,
/// which may itself hold spaces and brackets.
fn cpu_ticks(stat: &str) -> Result<u64> {
    let (_, fields) = stat
        .rsplit_once(')')
        .ok_or_else(|| anyhow!("no command name"))?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let times = fields
        .get(11..15)
        .ok_or_else(|| anyhow!("only {} fields", fields.len()))?;
    times
        .iter()
        .map(|ticks| ticks.parse::<u64>().map_err(Into::into))
        .sum()
}

/// Whether a process is there and has not ended.
pub(crate) fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, fields)| fields);
    state.is_some_and(|fields| !fields.starts_with(['Z', 'X']))
}

fn children(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return found;
    };
    for task in tasks.flatten() {
        let list = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(
            list.split_whitespace()
                .filter_map(|child| child.parse::<u32>().ok()),
        );
    }
    found
}

/// Bytes that a process has caused to be sent to storage so far.
pub(crate) fn storage_write_bytes(pid: u32) -> Option<u64> {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    io.lines()
        .find_map(|line| line.strip_prefix("write_bytes: ")?.trim().parse().ok())
}

/// Processor time that the whole machine has spent on anything but waiting, in microseconds, interrupts included.
pub(crate) fn machine_busy_us() -> Result<u64> {
    let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|ticks| ticks.parse().ok())
        .collect();
    // user nice system idle iowait irq softirq; steal is another guest's time and not ours.
    let busy: u64 = fields.iter().take(7).sum::<u64>() - fields.iter().skip(3).take(2).sum::<u64>();
    Ok(busy * 1_000_000 / TICKS_PER_SECOND)
}

/// An open file of a process.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OpenFile {
    pub(crate) target: PathBuf,
    /// The open(2) flags.
    pub(crate) flags: u32,
}

/// Every open file of a process.
pub(crate) fn open_files(pid: u32) -> Result<Vec<OpenFile>> {
    let mut files = Vec::new();
    let dir = PathBuf::from(format!("/proc/{pid}/fd"));
    for entry in fs::read_dir(&dir)
        .with_context(|| dir.display().to_string())?
        .flatten()
    {
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let info = Path::new("/proc")
            .join(pid.to_string())
            .join("fdinfo")
            .join(entry.file_name());
        let info = fs::read_to_string(info).unwrap_or_default();
        let flags = info
            .lines()
            .find_map(|line| u32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok())
            .unwrap_or(0);
        files.push(OpenFile { target, flags });
    }
    Ok(files)
}

/// Every process of the tree below and with `pid`.
pub(crate) fn tree(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        found.extend(children(pid));
        next += 1;
    }
    found
}

/// The machine and the versions that a result was measured with.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) memory_mib: u64,
    pub(crate) kernel: String,
    pub(crate) system: String,
    pub(crate) file_system: String,
    pub(crate) device: String,
    /// Load over the last minute when the run began; anything near 1 or above means that others were at work.
    pub(crate) load_before: String,
}

impl Machine {
    /// Reads what is known of this machine, and of the file system that holds `scratch`.
    pub(crate) fn read(scratch: &Path) -> Machine {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            cpuinfo
                .lines()
                .find(|line| line.starts_with(name))
                .and_then(|line| line.split_once(':'))
                .map_or_else(
                    || "unknown".to_owned(),
                    |(_, value)| value.trim().to_owned(),
                )
        };
        let memory_kib = fs::read_to_string("/proc/meminfo")
            .unwrap_or_default()
            .lines()
            .find_map(|line| {
                line.strip_prefix("MemTotal:")?
                    .split_whitespace()
                    .next()?
                    .parse::<u64>()
                    .ok()
            })
            .unwrap_or(0);
        let (file_system, device) = mount_of(scratch);
        Machine {
            processor: field("model name"),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: memory_kib / 1024,
            kernel: trimmed("/proc/sys/kernel/osrelease"),
            system: fs::read_to_string("/etc/os-release")
                .unwrap_or_default()
                .lines()
                .find_map(|line| {
                    Some(
                        line.strip_prefix("PRETTY_NAME=")?
                            .trim_matches('"')
                            .to_owned(),
                    )
                })
                .unwrap_or_default(),
            file_system,
            device,
            load_before: trimmed("/proc/loadavg")
                .split(' ')
                .next()
                .unwrap_or_default()
                .to_owned(),
        }
    }
}

fn trimmed(path: &str) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// The type and options of the file system that holds `path`, and what is known of its device's queue.
fn mount_of(path: &Path) -> (String, String) {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let best = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .filter(|fields| fields.len() > 3 && path.starts_with(fields[1]))
        .max_by_key(|fields| fields[1].len());
    let Some(fields) = best else {
        return ("unknown".to_owned(), "unknown".to_owned());
    };
    let name = fields[0].rsplit('/').next().unwrap_or_default();
    let queue = |file: &str| trimmed(&format!("/sys/block/{name}/queue/{file}"));
    let scheduler = queue("scheduler");
    let device = if scheduler.is_empty() {
        name.to_owned()
    } else {
        format!(
            "{name}, scheduler {scheduler}, {} cache",
            queue("write_cache")
        )
    };
    (format!("{} ({})", fields[2], fields[3]), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_with_brackets_does_not_shift_the_fields() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194304 100 0 0 0 11 22 33 44 20 0 1 0 5 6 7";
        assert_eq!(cpu_ticks(stat).unwrap(), 11 + 22 + 33 + 44);
    }

    #[test]
    fn this_process_runs_and_none_has_the_largest_number() {
        assert!(is_running(std::process::id()));
        assert!(!is_running(u32::MAX));
    }

    #[test]
    fn a_short_line_is_an_error() {
        assert!(cpu_ticks("7 (a) S 1 2").is_err());
        assert!(cpu_ticks("").is_err());
    }

    #[test]
    fn a_child_that_has_ended_still_counts() {
        let before = tree_cpu_us(std::process::id()).unwrap();
        let busy = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done";
        assert!(
            std::process::Command::new("sh")
                .args(["-c", busy])
                .status()
                .unwrap()
                .success()
        );
        assert!(tree_cpu_us(std::process::id()).unwrap() > before);
    }
}
