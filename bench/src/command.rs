//! Runs other programs to their end, under a time limit and with what they say bounded.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// How much of a program's standard error is kept. The rest is read and dropped: fio's can be gigabytes.
const KEPT_STDERR_BYTES: usize = 4096;
/// How much of what it prints is kept, where somebody asked for it.
const KEPT_STDOUT_BYTES: usize = 64 << 10;

/// Runs a command to its end; one that outlives `limit` is killed and is an error, as is one that fails.
pub(crate) fn run_to_end(mut command: Command, limit: Duration) -> Result<()> {
    command.stdout(Stdio::null());
    finish(command, limit).map(drop)
}

/// The same, for what the command prints, of which the first 64 KiB are kept.
pub(crate) fn capture(mut command: Command, limit: Duration) -> Result<String> {
    command.stdout(Stdio::piped());
    finish(command, limit)
}

fn finish(mut command: Command, limit: Duration) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{name} could not be started"))?;
    let stderr = child
        .stderr
        .take()
        .ok_or_else(|| anyhow!("no standard error"))?;
    let complaints = thread::spawn(move || read_bounded(stderr, KEPT_STDERR_BYTES));
    let said = child
        .stdout
        .take()
        .map(|stdout| thread::spawn(move || read_bounded(stdout, KEPT_STDOUT_BYTES)));
    let status = wait_until(&mut child, Instant::now() + limit)?;
    let complaint = complaints.join().unwrap_or_default();
    let said = said
        .and_then(|reader| reader.join().ok())
        .unwrap_or_default();
    match status {
        None => bail!("{name} was killed after {} s: {complaint}", limit.as_secs()),
        Some(status) if !status.success() => bail!("{name} ended with {status}: {complaint}"),
        Some(_) => Ok(said),
    }
}

fn read_bounded(mut from: impl Read, most: usize) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; 8192];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let room = most - kept.len();
        kept.extend_from_slice(&buffer[..count.min(room)]);
    }
    String::from_utf8_lossy(&kept).trim().to_owned()
}

fn wait_until(child: &mut Child, deadline: Instant) -> Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_command_prints_is_kept() {
        let mut command = Command::new("echo");
        command.arg("a token");
        assert_eq!(
            capture(command, Duration::from_secs(30)).unwrap(),
            "a token"
        );
    }

    #[test]
    fn a_command_that_hangs_is_killed() {
        let mut command = Command::new("sleep");
        command.arg("60");
        let began = Instant::now();
        assert!(run_to_end(command, Duration::from_millis(100)).is_err());
        assert!(began.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_flood_on_standard_error_is_bounded() {
        let mut command = Command::new("sh");
        command.args(["-c", "yes | head -c 1000000 >&2; exit 3"]);
        let error = run_to_end(command, Duration::from_secs(30))
            .unwrap_err()
            .to_string();
        assert!(error.len() < 2 * KEPT_STDERR_BYTES, "{}", error.len());
    }
}
