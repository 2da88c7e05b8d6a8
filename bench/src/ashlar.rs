//! Starts ashlard as it was built, makes its volume, and reads its metrics.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::fio::{self, Target};
use crate::servers::{EXPORT, Running, ServerProcess, uri, wait_for};

/// The counter of everything that stores write: frames, leaves, checkpoints, what the cleaner moves.
const STORED_BYTES: &str = "ashlar_store_written_bytes_total";
/// What the stores' tails hold at most.
const TAIL_BYTES: &str = "ashlar_store_tail_bytes";
const START_LIMIT: Duration = Duration::from_secs(120);
const HTTP_LIMIT: Duration = Duration::from_secs(10);

/// The programs under measurement and where they run.
#[derive(Clone, Debug)]
pub(crate) struct Ashlar {
    /// The folder with `ashlard` and `ashlar`.
    pub(crate) programs: PathBuf,
    /// A short path, for the sockets in it.
    pub(crate) data_dir: PathBuf,
    pub(crate) log: PathBuf,
    /// On a tmpfs where there is one, as by default, but one that goes with the scratch directories.
    pub(crate) tail_dir: PathBuf,
    pub(crate) more_flags: Vec<String>,
    pub(crate) http: SocketAddr,
}

impl Ashlar {
    /// Keeps the daemon's data in `scratch` and reaches it by a link in `sockets`, where its tail is too.
    pub(crate) fn new(
        programs: PathBuf,
        scratch: &Path,
        sockets: &Path,
        more_flags: Vec<String>,
    ) -> Result<Ashlar> {
        for program in ["ashlard", "ashlar"] {
            ensure!(
                programs.join(program).exists(),
                "{} is not built",
                programs.join(program).display()
            );
        }
        // A port that was free a moment ago; ashlard says so when it no longer is.
        let http = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let real = scratch.join("ashlar");
        fs::create_dir_all(&real)?;
        let data_dir = sockets.join("ashlar");
        std::os::unix::fs::symlink(&real, &data_dir)?;
        Ok(Ashlar {
            programs,
            data_dir,
            log: scratch.join("ashlar.log"),
            tail_dir: sockets.to_owned(),
            more_flags,
            http,
        })
    }

    /// Starts the daemon and waits until it says that it is ready.
    pub(crate) fn start(&self) -> Result<Running> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let child = Command::new(self.programs.join("ashlard"))
            .arg("--data-dir")
            .arg(&self.data_dir)
            .arg(format!("--listen-http={}", self.http))
            .arg("--tail-dir")
            .arg(&self.tail_dir)
            .args(&self.more_flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("ashlard could not be started")?;
        let mut process = ServerProcess::of_child(child)?;
        let ready = wait_for(START_LIMIT, || {
            !process.is_alive() || self.get("/readyz").is_ok_and(|(status, _)| status == 200)
        });
        if !ready || !process.is_alive() {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            let end = log.lines().rev().take(5).collect::<Vec<_>>().join("\n  ");
            return Err(anyhow!(
                "ashlard was not ready in time; the end of its log:\n  {end}"
            ));
        }
        Ok(Running {
            target: Target::Nbd(uri(&self.data_dir.join("nbd.sock"))),
            process: Some(process),
        })
    }

    pub(crate) fn create_volume(&self, size_bytes: u64) -> Result<()> {
        let mut command = Command::new(self.programs.join("ashlar"));
        command.arg("--admin").arg(format!(
            "unix:{}",
            self.data_dir.join("admin.sock").display()
        ));
        command
            .args(["volume", "create", EXPORT, "--size"])
            .arg(format!("{}MiB", size_bytes >> 20));
        fio::run_to_end(command, HTTP_LIMIT).context("creating the volume")
    }

    /// Fills the volume with the bytes of `file`.
    pub(crate) fn fill(&self, running: &Running, file: &Path) -> Result<()> {
        let Target::Nbd(uri) = &running.target else {
            return Ok(());
        };
        let mut command = Command::new("nbdcopy");
        command.arg("--flush").arg(file).arg(uri);
        fio::run_to_end(command, Duration::from_secs(300)).context("filling the volume")
    }

    /// Bytes that the daemon's stores have written to their files so far, as it counts them itself; None while it
    /// does not say.
    pub(crate) fn stored_bytes(&self) -> Result<Option<f64>> {
        Ok(self.metrics()?.sum(STORED_BYTES, ""))
    }

    /// Bytes that the stores' tails hold at most; None while the daemon does not say.
    pub(crate) fn tail_bytes(&self) -> Result<Option<f64>> {
        Ok(self.metrics()?.sum(TAIL_BYTES, ""))
    }

    fn metrics(&self) -> Result<Metrics> {
        let (status, body) = self.get("/metrics")?;
        ensure!(status == 200, "/metrics answered {status}");
        Ok(Metrics { body })
    }

    fn get(&self, path: &str) -> Result<(u16, String)> {
        let mut stream = TcpStream::connect_timeout(&self.http, HTTP_LIMIT)?;
        stream.set_read_timeout(Some(HTTP_LIMIT))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer);
        let status = answer
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .ok_or_else(|| anyhow!("not an HTTP answer"))?;
        let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        Ok((status, body.to_owned()))
    }
}

/// One reading of `/metrics`.
#[derive(Debug)]
struct Metrics {
    body: String,
}

impl Metrics {
    /// The sum of a metric over its labels, as far as they contain `label`; None when there is no such metric.
    fn sum(&self, name: &str, label: &str) -> Option<f64> {
        let mut found = None;
        for line in self.body.lines() {
            let Some(rest) = line.strip_prefix(name) else {
                continue;
            };
            let (labels, value) = match rest.as_bytes().first() {
                Some(b'{') => rest.split_once('}').unwrap_or_default(),
                Some(b' ') => ("", rest),
                _ => continue,
            };
            let value = value
                .split_whitespace()
                .next()
                .and_then(|value| value.parse::<f64>().ok());
            if let Some(value) = value.filter(|_| labels.contains(label)) {
                *found.get_or_insert(0.0) += value;
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_over_matching_labels_only() {
        let body = "# HELP a_total x\na_total{command=\"write\",volume=\"a\"} 5\na_total{command=\"write\",volume=\"b\"} 2\n\
                    a_total{command=\"read\"} 9\na_total_more 100\nplain 3 1700000000\n";
        let metrics = Metrics {
            body: body.to_owned(),
        };
        assert_eq!(metrics.sum("a_total", "command=\"write\""), Some(7.0));
        assert_eq!(metrics.sum("a_total", ""), Some(16.0));
        assert_eq!(metrics.sum("plain", ""), Some(3.0));
        assert_eq!(metrics.sum("none", ""), None);
    }
}
