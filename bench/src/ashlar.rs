//! Starts ashlard as it was built, makes its volume, and fills it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::command::{capture, run_to_end};
use crate::fio::Target;
use crate::http::Http;
use crate::servers::{EXPORT, Running, ServerProcess, end_of, spawn, uri, wait_for};

const START_LIMIT: Duration = Duration::from_secs(120);
/// How long the `ashlar` command may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// One daemon under measurement and where it runs.
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
    pub(crate) http: Http,
}

impl Ashlar {
    /// Keeps the daemon's data in a directory `name` in `scratch` and reaches it by a link in `sockets`, where its tail
    /// is too.
    pub(crate) fn new(
        name: &str,
        programs: &Path,
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
        let real = scratch.join(name);
        fs::create_dir_all(&real)?;
        let data_dir = sockets.join(name);
        std::os::unix::fs::symlink(&real, &data_dir)?;
        let tail_dir = sockets.join(format!("{name}-tail"));
        fs::create_dir_all(&tail_dir)?;
        Ok(Ashlar {
            programs: programs.to_owned(),
            data_dir,
            log: scratch.join(format!("{name}.log")),
            tail_dir,
            more_flags,
            http: Http::on_free_port()?,
        })
    }

    /// Starts the daemon and waits until it says that it is ready.
    pub(crate) fn start(&self) -> Result<ServerProcess> {
        let mut command = Command::new(self.programs.join("ashlard"));
        command
            .arg("--data-dir")
            .arg(&self.data_dir)
            .arg(format!("--listen-http={}", self.http.address))
            .arg("--tail-dir")
            .arg(&self.tail_dir)
            .args(&self.more_flags);
        let mut process = spawn(command, &self.log)?;
        let ready = wait_for(START_LIMIT, || !process.is_alive() || self.http.is_ready());
        if !ready || !process.is_alive() {
            bail!(
                "ashlard was not ready in time; the end of its log:\n  {}",
                end_of(&self.log)
            );
        }
        Ok(process)
    }

    /// Where clients reach its export.
    pub(crate) fn target(&self) -> Target {
        Target::Nbd(uri(&self.data_dir.join("nbd.sock")))
    }

    /// Runs the `ashlar` command with this daemon and returns what it prints.
    pub(crate) fn ask(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(self.programs.join("ashlar"));
        command.arg("--admin").arg(self.admin_address());
        command.args(arguments);
        capture(command, COMMAND_LIMIT)
    }

    /// The Unix socket of its admin interface, as a setting.
    pub(crate) fn admin_address(&self) -> String {
        format!("unix:{}", self.data_dir.join("admin.sock").display())
    }

    /// Makes the volume, with more arguments where it has copies.
    pub(crate) fn create_volume(&self, size_bytes: u64, more: &[&str]) -> Result<()> {
        let size = format!("{}MiB", size_bytes >> 20);
        let create = ["volume", "create", EXPORT, "--size", &size];
        self.ask(&[&create, more].concat())
            .map(drop)
            .context("creating the volume")
    }

    /// Fills the volume with the bytes of `file`.
    pub(crate) fn fill(&self, file: &Path) -> Result<()> {
        let mut command = Command::new("nbdcopy");
        command.arg("--flush").arg(file);
        command.arg(uri(&self.data_dir.join("nbd.sock")));
        run_to_end(command, Duration::from_secs(300)).context("filling the volume")
    }

    /// Starts the daemon, fills its volume from `file`, and starts it anew, so that it holds nothing of what was
    /// written in memory.
    pub(crate) fn prepare(&self, size_bytes: u64, file: &Path) -> Result<Running> {
        let first = self.start()?;
        self.create_volume(size_bytes, &[])?;
        self.fill(file)?;
        drop(first);
        Ok(Running::of(self.target(), self.start()?))
    }
}
