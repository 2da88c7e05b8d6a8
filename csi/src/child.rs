//! Programs of the system, each with a deadline.
//!
//! What touches a device runs in a child, never in this process: a thread that waits for a device whose server is gone
//! cannot be interrupted, a child can at least be left behind.

use std::ffi::OsStr;
use std::fmt;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

/// Most output that is kept of each stream, bytes.
const OUTPUT_MAX: u64 = 64 << 10;
/// How long a killed child gets to be gone. One that waits for a device in the kernel goes when the device answers.
const KILL_GRACE: Duration = Duration::from_secs(2);

/// How a child ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The program and what it was told, without secrets.
    pub line: String,
    /// Its exit code, or 128 and the signal that ended it.
    pub code: i32,
    /// At most 64 KiB of it.
    pub stdout: String,
    /// At most 64 KiB of it.
    pub stderr: String,
}

impl Finished {
    /// True for exit code 0.
    pub fn succeeded(&self) -> bool {
        self.code == 0
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = if self.stderr.trim().is_empty() {
            &self.stdout
        } else {
            &self.stderr
        };
        // The end of it is where programs say what was wrong.
        let said: Vec<&str> = said.trim().lines().rev().take(6).collect();
        let said: Vec<&str> = said.into_iter().rev().collect();
        write!(
            f,
            "{} ended with {}: {}",
            self.line,
            self.code,
            said.join("; ")
        )
    }
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// Not installed, or not to be run.
    #[error("{program} cannot be run: {source}")]
    Start {
        /// Which.
        program: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It did not end in time. It was killed, and may still sit in the kernel waiting for its device.
    #[error("{line} did not end, or get on, within {} s and was killed", limit.as_secs())]
    TimedOut {
        /// The program and its arguments.
        line: String,
        /// What it was given.
        limit: Duration,
    },
    /// Its output could not be read.
    #[error("{line}: {source}")]
    Output {
        /// The program and its arguments.
        line: String,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// A program to run.
#[derive(Debug)]
pub struct Child {
    program: &'static str,
    command: Command,
    line: String,
}

impl Child {
    /// `program` from the PATH, with an empty standard input and messages in English.
    pub fn new(program: &'static str) -> Child {
        let mut command = Command::new(program);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .env("LC_ALL", "C")
            .env_remove("NOTIFY_SOCKET")
            .process_group(0);
        if std::env::var_os("PATH").is_none_or(|path| !path.to_string_lossy().contains("/sbin")) {
            let path = std::env::var("PATH").unwrap_or_default();
            command.env("PATH", format!("{path}:/usr/sbin:/sbin:/usr/bin:/bin"));
        }
        Child {
            program,
            command,
            line: program.to_owned(),
        }
    }

    /// An argument that may be shown.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Child {
        let argument = argument.as_ref();
        self.line.push(' ');
        self.line.push_str(&argument.to_string_lossy());
        self.command.arg(argument);
        self
    }

    /// Arguments that may be shown.
    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(self, arguments: I) -> Child {
        arguments.into_iter().fold(self, Child::arg)
    }

    /// An argument that stands as `...` in messages.
    #[must_use]
    pub fn secret_arg(mut self, argument: impl AsRef<OsStr>) -> Child {
        self.line.push_str(" ...");
        self.command.arg(argument);
        self
    }

    /// Runs it to its end, or kills it after `limit`.
    pub async fn run(self, limit: Duration) -> Result<Finished, ChildError> {
        self.run_unless(limit, |_| tokio::time::sleep(limit)).await
    }

    /// Runs it to its end, however long that takes, or kills it when for `limit` it has neither computed, read nor written.
    pub async fn run_while_busy(self, limit: Duration) -> Result<Finished, ChildError> {
        self.run_unless(limit, |pid| stands_still(pid, limit)).await
    }

    async fn run_unless<F: Future<Output = ()>>(
        mut self,
        limit: Duration,
        given_up: impl FnOnce(Option<u32>) -> F,
    ) -> Result<Finished, ChildError> {
        let mut child = self.command.spawn().map_err(|source| ChildError::Start {
            program: self.program.to_owned(),
            source,
        })?;
        let pid = child.id();
        let stdout = child.stdout.take();
        let stderr = child.stderr.take();
        let ending = async {
            let (stdout, stderr, status) =
                tokio::join!(collect(stdout), collect(stderr), child.wait());
            Ok::<_, std::io::Error>((stdout?, stderr?, status?))
        };
        let ended = tokio::select! {
            ended = ending => Some(ended),
            () = given_up(pid) => None,
        };
        match ended {
            Some(Ok((stdout, stderr, status))) => Ok(Finished {
                line: self.line,
                code: code_of(status),
                stdout,
                stderr,
            }),
            Some(Err(source)) => Err(ChildError::Output {
                line: self.line,
                source,
            }),
            None => {
                if let Some(pid) = pid.and_then(|pid| rustix::process::Pid::from_raw(pid as i32)) {
                    let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
                }
                let _ = tokio::time::timeout(KILL_GRACE, child.wait()).await;
                Err(ChildError::TimedOut {
                    line: self.line,
                    limit,
                })
            }
        }
    }
}

/// Ends when a process has got on with nothing for `limit`.
async fn stands_still(pid: Option<u32>, limit: Duration) {
    const LOOKS: u32 = 10;
    let mut before = pid.and_then(progress);
    let mut still = 0;
    while still < LOOKS {
        tokio::time::sleep(limit / LOOKS).await;
        let now = pid.and_then(progress);
        still = if now.is_none() || now == before {
            still + 1
        } else {
            0
        };
        before = now;
    }
}

/// What a process has done so far: clock ticks it computed (proc_pid_stat(5): utime and stime), and bytes it read and wrote
/// (proc_pid_io(5)). `None` once it is gone.
fn progress(pid: u32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let io = std::fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    // The name before it may have blanks.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks = fields.split_ascii_whitespace().skip(11).take(2);
    let bytes = io.lines().filter(|line| {
        let is_of = |name: &&str| line.starts_with(name);
        ["rchar", "wchar"].iter().any(is_of)
    });
    Some(ticks.chain(bytes).map(str::to_owned).collect())
}

fn code_of(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

async fn collect<R: AsyncRead + Unpin>(stream: Option<R>) -> std::io::Result<String> {
    let Some(mut stream) = stream else {
        return Ok(String::new());
    };
    let mut kept = Vec::new();
    (&mut stream)
        .take(OUTPUT_MAX)
        .read_to_end(&mut kept)
        .await?;
    // The rest is read, so that the child does not wait for room, and dropped.
    tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
    Ok(String::from_utf8_lossy(&kept).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENOUGH: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_child_is_reported_with_its_code_and_words() {
        let finished = Child::new("sh")
            .args(["-c", "echo out; echo why >&2; exit 3"])
            .run(ENOUGH)
            .await
            .expect("runs");
        assert_eq!((finished.code, finished.stdout.as_str()), (3, "out\n"));
        assert!(
            finished.to_string().ends_with("ended with 3: why"),
            "{finished}"
        );
        let killed = Child::new("sh")
            .args(["-c", "kill -9 $$"])
            .run(ENOUGH)
            .await;
        assert_eq!(killed.expect("runs").code, 137);
    }

    #[tokio::test]
    async fn a_child_that_hangs_is_killed_with_all_it_started() {
        let error = Child::new("sh")
            .args(["-c", "tail -f /dev/null & tail -f /dev/null"])
            .run(Duration::from_millis(200))
            .await
            .expect_err("it hangs");
        assert!(matches!(error, ChildError::TimedOut { .. }), "{error}");
    }

    #[tokio::test]
    async fn one_that_gets_on_is_waited_for_and_one_that_stands_still_is_killed() {
        let limit = Duration::from_secs(2);
        // Three times as long as the limit, and reading all the time.
        let script = "until=$(($(date +%s) + 6)); while [ $(date +%s) -lt $until ]; do :; done";
        let busy = Child::new("sh").args(["-c", script]).run_while_busy(limit);
        assert_eq!(busy.await.expect("it gets on").code, 0);
        let still = Child::new("sh").args(["-c", "exec sleep infinity"]);
        let error = still
            .run_while_busy(limit)
            .await
            .expect_err("it stands still");
        assert!(matches!(error, ChildError::TimedOut { .. }), "{error}");
    }

    #[tokio::test]
    async fn output_is_bounded_and_secrets_are_not_shown() {
        let finished = Child::new("sh")
            .args(["-c", "yes | head -c 300000; exit 1"])
            .secret_arg("hunter2")
            .run(ENOUGH)
            .await
            .expect("runs");
        assert_eq!(finished.stdout.len(), OUTPUT_MAX as usize);
        assert!(!finished.to_string().contains("hunter2"));
        assert!(
            Child::new("no-such-program-here")
                .run(ENOUGH)
                .await
                .is_err()
        );
    }
}
