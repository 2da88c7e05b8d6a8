//! Disks of a machine.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::process::Group;
use crate::wait;

/// A disk that outlives the machines it is in: a sparse file behind nbdkit, which holds what was written since the last flush in
/// its own memory alone. When that is killed, everything a real disk with a volatile cache may lose in a power cut is lost.
pub struct Disk {
    file: PathBuf,
    socket: PathBuf,
    server: Option<Group>,
}

/// Longest wait for nbdkit to listen.
const START_LIMIT: Duration = Duration::from_secs(30);

impl Disk {
    /// An empty disk, its file in `folder`.
    pub fn new(folder: &Path, name: &str, size_bytes: u64) -> Disk {
        let file = folder.join(format!("{name}.img"));
        File::create(&file)
            .and_then(|file| file.set_len(size_bytes))
            .expect("a sparse file");
        Disk {
            file,
            socket: folder.join(format!("{name}.sock")),
            server: None,
        }
    }

    /// Its server is started when it is not running; returns what qemu's -drive wants to know.
    pub(super) fn plug_in(&mut self) -> String {
        if self.server.is_none() {
            // nbdkit writes it when it listens.
            let ready = self.socket.with_extension("pid");
            for old in [&self.socket, &ready] {
                let _ = std::fs::remove_file(old);
            }
            let mut command = Command::new("nbdkit");
            command
                .args(["--foreground", "--unix"])
                .arg(&self.socket)
                .arg("--pidfile")
                .arg(&ready)
                .args(["--filter=cache", "file"])
                .arg(&self.file)
                .arg("cache=writeback")
                .stdin(Stdio::null())
                .stdout(Stdio::null());
            self.server = Some(Group::spawn(&mut command).expect("nbdkit starts"));
            wait::until(START_LIMIT, "nbdkit listens", || {
                if ready.exists() {
                    Ok(())
                } else {
                    Err(format!("no {}", ready.display()))
                }
            });
        }
        format!(
            "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},file.export=",
            self.socket.display()
        )
    }

    /// What was not flushed is gone.
    pub(super) fn cut_power(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill();
        }
    }
}
