//! Outside programs: fio, nbdcopy, qemu-img and their like, each under a time limit, in a process group of its own, and
//! with bounded output.

use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::process::{Collector, Group, describe};

/// Most output that is kept of one stream, bytes. A program that writes more is killed.
const OUTPUT_MAX: u64 = 4 << 20;

/// One run of an outside program.
pub struct Tool {
    command: Command,
    limit: Duration,
    line: String,
}

/// How a run ended.
#[derive(Debug)]
pub struct Finished {
    pub line: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Tool {
    /// `program` with a limit of one minute. /usr/bin comes first in its PATH, because nbdsh needs the system's Python.
    pub fn new(program: &str) -> Tool {
        let mut command = Command::new(program);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("/usr/bin:/usr/sbin:/bin:/sbin:{path}"));
        // What the person who runs the tests has set must not decide their outcome.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("ASHLAR_")) {
            command.env_remove(name);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Tool {
            command,
            limit: Duration::from_secs(60),
            line: program.to_owned(),
        }
    }

    pub fn arg(mut self, argument: impl AsRef<std::ffi::OsStr>) -> Tool {
        self.line.push(' ');
        self.line.push_str(&argument.as_ref().to_string_lossy());
        self.command.arg(argument);
        self
    }

    pub fn args<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(self, arguments: I) -> Tool {
        arguments.into_iter().fold(self, Tool::arg)
    }

    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Tool {
        self.command.env(name, value);
        self
    }

    pub fn directory(mut self, path: &Path) -> Tool {
        self.command.current_dir(path);
        self
    }

    pub fn limit(mut self, limit: Duration) -> Tool {
        self.limit = limit;
        self
    }

    /// Starts it, to be waited for later.
    pub fn start(mut self) -> Running {
        let mut group = Group::spawn(&mut self.command).unwrap_or_else(|error| {
            panic!(
                "cannot run {}: {error} (`make test` installs what the tests need)",
                self.line
            )
        });
        let pid = group.pid();
        let stdout = group.child().stdout.take().expect("stdout is piped");
        let stderr = group.child().stderr.take().expect("stderr is piped");
        Running {
            stdout: Collector::start(stdout, OUTPUT_MAX, pid),
            stderr: Collector::start(stderr, OUTPUT_MAX, pid),
            group,
            limit: self.limit,
            line: self.line,
        }
    }

    /// Runs it to its end.
    pub fn run(self) -> Finished {
        self.start().finish()
    }

    /// Runs it and demands exit code 0; returns its standard output.
    pub fn succeed(self) -> String {
        self.run().success()
    }
}

/// A program that runs.
pub struct Running {
    pub group: Group,
    stdout: Collector,
    stderr: Collector,
    limit: Duration,
    line: String,
}

impl Running {
    pub fn is_running(&mut self) -> bool {
        self.group.exited().is_none()
    }

    /// Bytes that it has printed so far.
    pub fn printed(&self) -> u64 {
        self.stdout.bytes()
    }

    /// Waits for the end, at most the limit it was given.
    pub fn finish(mut self) -> Finished {
        let ended = self.group.wait(self.limit);
        // Also ends what the leader left behind and holds the pipes open.
        let status = self.group.kill();
        let ((stdout, stdout_full), (stderr, stderr_full)) =
            (self.stdout.finish(), self.stderr.finish());
        let finished = Finished {
            line: self.line,
            status,
            stdout,
            stderr,
        };
        assert!(
            !stdout_full && !stderr_full,
            "more than {OUTPUT_MAX} bytes of output\n{finished}"
        );
        assert!(ended.is_some(), "killed after {:?}\n{finished}", self.limit);
        finished
    }

    /// Kills it; how it ended does not matter.
    pub fn abandon(mut self) -> Finished {
        let status = self.group.kill();
        let ((stdout, _), (stderr, _)) = (self.stdout.finish(), self.stderr.finish());
        Finished {
            line: self.line,
            status,
            stdout,
            stderr,
        }
    }
}

impl Finished {
    /// Demands exit code 0 and returns the standard output.
    pub fn success(self) -> String {
        assert!(self.status.success(), "{self}");
        self.stdout
    }

    /// Demands a failure and returns both streams.
    pub fn failure(self) -> String {
        assert!(
            self.status.code().is_some_and(|code| code != 0),
            "expected a failure\n{self}"
        );
        format!("{}{}", self.stdout, self.stderr)
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The end of a long output says what went wrong.
        let tail = |text: &str| {
            let skipped = text.chars().count().saturating_sub(6000);
            text.chars().skip(skipped).collect::<String>()
        };
        writeln!(out, "$ {}\n{}", self.line, describe(self.status))?;
        writeln!(
            out,
            "--- stdout\n{}\n--- stderr\n{}",
            tail(&self.stdout),
            tail(&self.stderr)
        )
    }
}
