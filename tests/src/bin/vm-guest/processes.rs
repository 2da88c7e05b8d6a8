//! What runs in the machine, from /proc.

use ashlar_tests::vm::wire::Process;

/// PF_KTHREAD of the kernel's include/linux/sched.h, as /proc/PID/stat shows it.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// Every process that is there while the list is read.
pub(super) fn list() -> std::io::Result<Vec<Process>> {
    let mut processes = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        if let Some(pid) = name.to_str().and_then(|name| name.parse().ok())
            && let Some(process) = look(pid)
        {
            processes.push(process);
        }
    }
    Ok(processes)
}

fn look(pid: u32) -> Option<Process> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may hold anything.
    let (_, rest) = stat.split_once('(')?;
    let (name, rest) = rest.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    // State is field 3, flags are field 9.
    let flags: u64 = fields.nth(5)?.parse().ok()?;
    Some(Process {
        pid,
        name: name.to_owned(),
        state,
        kernel: flags & KERNEL_THREAD != 0,
        waits_in: std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default(),
    })
}
