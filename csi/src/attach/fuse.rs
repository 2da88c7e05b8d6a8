//! Attaching where the kernel has no NBD driver: nbdfuse shows the export as a file, a loop device makes a block device
//! of the file.
//!
//! Each volume has a process of nbdfuse's, which this program starts in a session of its own and never needs again, so a
//! restart of this program is not noticed. A restart of the *daemon* is: nbdfuse does not connect again, and the device
//! answers errors until the volume is staged anew. Nor can a device grow while it is used, because nbdfuse learns a size
//! once. Both work with the kernel's driver.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::process::Command;
use uuid::Uuid;

use super::{
    Attach, AttachError, Attached, BLOCK_BYTES, Device, DeviceKind, Export, look, until, verify,
};
use crate::address::Address;
use crate::child::Child;
use crate::failpoint;
use crate::mountinfo::Mounts;
use crate::{stored, sysfs};

/// The file nbdfuse shows.
const FILE: &str = "nbd";
/// How long nbdfuse gets to show its file, and a loop device to be let go.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);
/// losetup, umount.
const CHILD_LIMIT: Duration = Duration::from_secs(20);

/// See the module.
#[derive(Debug)]
pub struct FuseLoop {
    /// Where the files are shown, a directory a volume.
    directory: PathBuf,
    connections: u32,
}

/// Which loop device a volume has, because the kernel forgets the way to a file whose mount is gone, as after the end of
/// the container that the mount was in: it says `/nbd` then, of every volume.
#[derive(Debug, Serialize, Deserialize)]
struct Remembered {
    name: String,
    /// The kernel's number of this use of the device (Linux 5.15).
    sequence: String,
}

impl FuseLoop {
    /// With mount points below `directory`, which is made when it is not there.
    pub fn new(directory: PathBuf, connections: u32) -> FuseLoop {
        FuseLoop {
            directory,
            connections,
        }
    }

    fn mount_point(&self, volume: Uuid) -> PathBuf {
        self.directory.join(volume.to_string())
    }

    fn file(&self, volume: Uuid) -> PathBuf {
        self.mount_point(volume).join(FILE)
    }

    async fn start(&self, export: &Export, uri: &str) -> Result<(), AttachError> {
        let point = self.mount_point(export.volume);
        fs::create_dir_all(&point)
            .map_err(|error| AttachError::system(format!("making {}", point.display()), error))?;
        let log_path = self.directory.join(format!("{}.log", export.volume));
        let log = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&log_path)
            .map_err(|error| {
                AttachError::system(format!("opening {}", log_path.display()), error)
            })?;
        let mut command = Command::new("setsid");
        command.arg("nbdfuse");
        command.arg("-C").arg(self.connections.to_string());
        if export.read_only {
            command.arg("-r");
        }
        command.arg(&point).arg(uri);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::from(log));
        let mut child = command
            .spawn()
            .map_err(|error| AttachError::system("starting nbdfuse", error))?;
        let file = self.file(export.volume);
        let mut ended = None;
        until("nbdfuse shows its file", SETTLE_LIMIT, || {
            ended = child.try_wait().ok().flatten();
            ended.is_some() || (is_mounted(&point) && file.exists())
        })
        .await?;
        if let Some(status) = ended {
            let said = fs::read_to_string(&log_path).unwrap_or_default();
            return Err(AttachError::Failed(format!(
                "nbdfuse ended with {status}: {}",
                without_secret(said.trim(), &export.name)
            )));
        }
        Ok(())
    }

    /// Takes away what there is of a volume, device first.
    async fn clear(&self, volume: Uuid) -> Result<(), AttachError> {
        for name in self.loops_of(volume)? {
            let finished = Child::new("losetup")
                .arg("-d")
                .arg(sysfs::node(&name))
                .run(CHILD_LIMIT)
                .await?;
            // A device that went by itself meanwhile is what was wanted.
            if !finished.succeeded() && self.loops_of(volume)?.contains(&name) {
                return Err(AttachError::Failed(finished.to_string()));
            }
            // The kernel lets it go when the last user closes it.
            until(
                &format!("{name} is let go (somebody has it open)"),
                SETTLE_LIMIT,
                || {
                    self.loops_of(volume)
                        .is_ok_and(|left| !left.contains(&name))
                },
            )
            .await?;
        }
        failpoint::reach("detach-half");
        let point = self.mount_point(volume);
        while is_mounted(&point) {
            let finished = Child::new("umount").arg(&point).run(CHILD_LIMIT).await?;
            if !finished.succeeded() && is_mounted(&point) {
                // Its process may be stuck; without it the kernel ends the connection and lets the mount go.
                kill_servers(&point);
                let finished = Child::new("umount")
                    .arg("-l")
                    .arg(&point)
                    .run(CHILD_LIMIT)
                    .await?;
                if !finished.succeeded() && is_mounted(&point) {
                    return Err(AttachError::Failed(finished.to_string()));
                }
            }
        }
        // One that was started by an attempt that was killed may not have come as far as its mount.
        kill_servers(&point);
        until("nbdfuse is gone", SETTLE_LIMIT, || {
            servers(&point).is_empty()
        })
        .await?;
        let log = self.directory.join(format!("{volume}.log"));
        for leftover in [point, log, self.memory(volume)] {
            let _ = crate::paths::remove(&leftover);
        }
        Ok(())
    }

    fn memory(&self, volume: Uuid) -> PathBuf {
        self.directory.join(format!("{volume}.loop"))
    }

    fn remember(&self, volume: Uuid, name: &str) -> Result<(), AttachError> {
        let Some(sequence) = sysfs::attribute(name, "diskseq") else {
            return Ok(());
        };
        let path = self.memory(volume);
        let remembered = Remembered {
            name: name.to_owned(),
            sequence,
        };
        stored::replace(&path, &remembered)
            .map_err(|error| AttachError::system(format!("writing {}", path.display()), error))
    }

    /// Loop devices over the file of a volume.
    fn loops_of(&self, volume: Uuid) -> Result<Vec<String>, AttachError> {
        let file = self.file(volume);
        let detached = Path::new("/").join(FILE);
        let remembered: Option<Remembered> = fs::read(self.memory(volume))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let is_remembered = |name: &str| {
            remembered.as_ref().is_some_and(|known| {
                known.name == name
                    && sysfs::attribute(name, "diskseq").as_ref() == Some(&known.sequence)
            })
        };
        let mut all = sysfs::devices("loop")
            .map_err(|error| AttachError::system("reading /sys/block", error))?;
        all.retain(|name| {
            let backing = sysfs::attribute(name, "loop/backing_file");
            backing.is_some_and(|backing| {
                let backing = Path::new(backing.strip_suffix(" (deleted)").unwrap_or(&backing));
                backing == file || (backing == detached && is_remembered(name))
            })
        });
        Ok(all)
    }
}

fn without_secret(text: &str, secret: &str) -> String {
    text.replace(secret, "...").replace(&encode(secret), "...")
}

/// Percent-encodes what may not stand in a URI as it is (RFC 3986, section 2.3).
fn encode(text: &str) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// The URI of an export (NetworkBlockDevice/nbd doc/uri.md).
fn uri(server: &Address, name: &str) -> String {
    match server {
        Address::Unix(path) => format!(
            "nbd+unix:///{}?socket={}",
            encode(name),
            encode(&path.to_string_lossy())
        ),
        Address::Tcp(host) => format!("nbd://{host}/{}", encode(name)),
    }
}

fn is_mounted(point: &Path) -> bool {
    Mounts::read().is_ok_and(|mounts| mounts.at(point).is_some())
}

/// Processes of nbdfuse that serve `point`.
fn servers(point: &Path) -> Vec<Pid> {
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut arguments = line.split(|byte| *byte == 0);
            let program = arguments.next().unwrap_or_default();
            program.ends_with(b"nbdfuse")
                && arguments.any(|argument| argument == point.as_os_str().as_encoded_bytes())
        })
        .filter_map(Pid::from_raw)
        .collect()
}

/// Whether the one process of nbdfuse that serves `point` was given this export.
fn is_served(point: &Path, name: &str) -> bool {
    let name = encode(name);
    let is_given = |pid: &Pid| {
        let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&name)
    };
    let all = servers(point);
    all.len() == 1 && all.iter().all(is_given)
}

fn kill_servers(point: &Path) {
    for pid in servers(point) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

#[async_trait]
impl Attach for FuseLoop {
    fn kind(&self) -> DeviceKind {
        DeviceKind::FuseLoop
    }

    fn reconnects(&self) -> bool {
        false
    }

    fn connections(&self) -> u32 {
        self.connections
    }

    async fn find(&self, volume: Uuid) -> Result<Option<Device>, AttachError> {
        let found = self.loops_of(volume)?.into_iter().next();
        Ok(found.map(|name| Device {
            kind: DeviceKind::FuseLoop,
            name,
        }))
    }

    async fn attach(&self, export: &Export) -> Result<Attached, AttachError> {
        self.clear(export.volume).await?;
        let (server, info) = look(export).await?;
        verify(export, &info)?;
        self.start(export, &uri(&server, &export.name)).await?;
        failpoint::reach("attach-half");
        let file = self.file(export.volume);
        let shown = fs::metadata(&file).map_err(|error| {
            AttachError::system(format!("looking at {}", file.display()), error)
        })?;
        if shown.len() != info.size_bytes {
            return Err(AttachError::Mismatch(format!(
                "nbdfuse shows {} bytes where the server said {}",
                shown.len(),
                info.size_bytes
            )));
        }
        let mut losetup = Child::new("losetup").args(["--find", "--show"]);
        losetup = losetup.arg("--sector-size").arg(BLOCK_BYTES.to_string());
        // Past the cache of the file below: what was read once must not hide that the server is gone, and nothing is
        // kept in memory twice.
        losetup = losetup.arg("--direct-io=on");
        if export.read_only {
            losetup = losetup.arg("--read-only");
        }
        let finished = losetup.arg(&file).run(CHILD_LIMIT).await?;
        if !finished.succeeded() {
            return Err(AttachError::Failed(finished.to_string()));
        }
        let name = finished.stdout.trim().strip_prefix("/dev/");
        let name = name.ok_or_else(|| AttachError::Failed(finished.to_string()))?;
        let device = Device {
            kind: DeviceKind::FuseLoop,
            name: name.to_owned(),
        };
        self.remember(export.volume, &device.name)?;
        until(
            &format!("{} has its size", device.name),
            SETTLE_LIMIT,
            || device.size_bytes() == info.size_bytes,
        )
        .await?;
        Ok(Attached {
            device,
            connections: self.connections,
        })
    }

    async fn reconnect(
        &self,
        _device: &Device,
        _export: &Export,
        _missing: u32,
        _may: super::Check<'_>,
    ) -> Result<u32, AttachError> {
        Err(AttachError::NotWhileInUse(
            "nbdfuse does not connect again; the volume has to be unstaged and staged".into(),
        ))
    }

    async fn grow(&self, device: &Device, export: &Export) -> Result<u64, AttachError> {
        let (_, info) = look(export).await?;
        let present = device.size_bytes();
        if info.size_bytes <= present {
            return Ok(present);
        }
        Err(AttachError::NotWhileInUse(format!(
            "{} cannot grow while it is used, because it is not of the kernel's nbd driver; the file system grows when the \
             volume is staged again",
            device.name
        )))
    }

    async fn carries(&self, _device: &Device, export: &Export) -> Result<bool, AttachError> {
        let point = self.mount_point(export.volume);
        let mounts = Mounts::read()
            .map_err(|error| AttachError::system("reading the table of mounts", error))?;
        let is_shown = mounts
            .at(&point)
            .is_some_and(|mount| mount.kind.starts_with("fuse"));
        Ok(is_shown && is_served(&point, &export.name))
    }

    async fn fail(&self, _device: &Device, volume: Uuid) -> Result<(), AttachError> {
        kill_servers(&self.mount_point(volume));
        Ok(())
    }

    async fn detach(&self, volume: Uuid) -> Result<(), AttachError> {
        self.clear(volume).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sockets_are_written_as_a_uri_wants_them() {
        let unix = Address::Unix("/run/a b/nbd.sock".into());
        assert_eq!(
            uri(&unix, "0e-1@s/é"),
            "nbd+unix:///0e-1%40s%2F%C3%A9?socket=%2Frun%2Fa%20b%2Fnbd.sock"
        );
        let tcp = Address::Tcp("[::1]:10809".into());
        assert_eq!(uri(&tcp, "a@b"), "nbd://[::1]:10809/a%40b");
        assert_eq!(without_secret("no a%40b, no a@b", "a@b"), "no ..., no ...");
    }
}
