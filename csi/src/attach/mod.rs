//! Making a block device of a volume's NBD export.
//!
//! [`kernel`] is the kernel's own NBD driver, told by netlink; it is what users get. [`fuse`] serves kernels without that
//! driver: nbdfuse and a loop device. Whatever a restart of this program may forget, both find again in the kernel's own
//! tables, by the volume's id.

pub mod asks;
pub mod fuse;
pub mod handshake;
pub mod kernel;
pub mod netlink;

use std::fmt;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::address::Address;
use crate::child::ChildError;
use crate::refusal::{Class, Refusal};
use crate::sysfs;
use handshake::HandshakeError;

/// Logical block of a device. The store's own block, and the same with both ways of attaching: an xfs made on smaller
/// sectors could not be mounted on a device with these.
pub const BLOCK_BYTES: u32 = 4096;

/// What a publication gives a node to open.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// Whose it is.
    pub volume: Uuid,
    /// The NBD name; has a secret in it.
    pub name: String,
    /// Where it is served.
    pub servers: Vec<Address>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// The volume's epoch when it was published.
    pub epoch: u32,
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export")
            .field("volume", &self.volume)
            .field("servers", &self.servers)
            .field("read_only", &self.read_only)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

/// Which way of attaching a device is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// `/dev/nbdN`.
    KernelNbd,
    /// `/dev/loopN` over a file of nbdfuse's.
    FuseLoop,
}

/// An attached device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// How it was attached.
    pub kind: DeviceKind,
    /// The kernel's name, like `nbd0`. Names are used again for other volumes: never by itself a proof of identity.
    pub name: String,
}

impl Device {
    /// Its node.
    pub fn node(&self) -> PathBuf {
        sysfs::node(&self.name)
    }

    /// Its size now.
    pub fn size_bytes(&self) -> u64 {
        sysfs::size_bytes(&self.name).unwrap_or(0)
    }

    /// Its number; `None` when it is gone.
    pub fn number(&self) -> Option<(u32, u32)> {
        sysfs::number(&self.name)
    }
}

/// A device that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Which.
    pub device: Device,
    /// Its connections: as many as it has places for, ever after.
    pub connections: u32,
}

/// Why a device could not be attached, grown, failed or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The server did not let us in.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// A program of the system failed.
    #[error(transparent)]
    Child(#[from] ChildError),
    /// The publication names no server.
    #[error("the publication names no address of an NBD server")]
    NoServer,
    /// The server says otherwise than the publication.
    #[error("the export is not what was published: {0}")]
    Mismatch(String),
    /// The kernel refused.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// An earlier ask of the kernel was not answered yet.
    #[error(
        "{what}: the kernel's nbd driver has not answered an earlier ask, and nothing more is asked of it until it does; it may \
         wait for a device whose server is away"
    )]
    KernelStuck {
        /// What was to be done.
        what: &'static str,
    },
    /// Something that has to appear or go did not.
    #[error("{what} within {} s", limit.as_secs())]
    TooSlow {
        /// What was waited for.
        what: String,
        /// How long.
        limit: Duration,
    },
    /// A program of the system ended badly.
    #[error("{0}")]
    Failed(String),
    /// This way of attaching cannot do it while the device is in use.
    #[error("{0}")]
    NotWhileInUse(String),
    /// Writes that the kernel takes for done may be gone from the volume.
    #[error("answered writes may be gone: the volume's nodes lost power")]
    AnswersLost,
}

impl AttachError {
    /// What was being done when the system refused.
    pub fn system(what: impl Into<String>, source: impl Into<std::io::Error>) -> AttachError {
        AttachError::System {
            what: what.into(),
            source: source.into(),
        }
    }
}

impl From<AttachError> for Refusal {
    fn from(error: AttachError) -> Refusal {
        let class = match &error {
            // The server may be starting, or the head moving: asking again is right.
            AttachError::Handshake(HandshakeError::Unreachable { .. })
            | AttachError::KernelStuck { .. } => Class::Unavailable,
            AttachError::Handshake(
                HandshakeError::Refused { .. } | HandshakeError::WantsTls { .. },
            )
            | AttachError::NotWhileInUse(_)
            | AttachError::AnswersLost
            | AttachError::Mismatch(_) => Class::FailedPrecondition,
            AttachError::Handshake(HandshakeError::Protocol { .. })
            | AttachError::System { .. }
            | AttachError::Failed(_) => Class::Internal,
            AttachError::NoServer => Class::InvalidArgument,
            AttachError::TooSlow { .. } | AttachError::Child(ChildError::TimedOut { .. }) => {
                Class::DeadlineExceeded
            }
            AttachError::Child(_) => Class::Internal,
        };
        Refusal::new(class, error.to_string())
    }
}

/// Something to be asked between two steps.
pub type Check<'a> = Pin<Box<dyn Future<Output = Result<(), AttachError>> + Send + 'a>>;

/// A way of attaching.
#[async_trait]
pub trait Attach: Send + Sync {
    /// Which.
    fn kind(&self) -> DeviceKind;

    /// Whether a device whose server went away can be used again once the server is back.
    fn reconnects(&self) -> bool;

    /// Connections that a device of an export gets from now on; one that is attached already may have another number.
    fn connections(&self) -> u32;

    /// The device that carries `volume`, from the kernel's tables.
    async fn find(&self, volume: Uuid) -> Result<Option<Device>, AttachError>;

    /// Makes a device of an export, after checking that it is served as published. What an earlier, broken-off attempt
    /// left is cleared away first. To be called only when [`Attach::find`] finds none.
    async fn attach(&self, export: &Export) -> Result<Attached, AttachError>;

    /// Gives a device whose server went away `missing` new connections. Returns how many were made. `may`: asked when they
    /// are made and the kernel does not have them yet, whether the device may go on with them.
    async fn reconnect(
        &self,
        device: &Device,
        export: &Export,
        missing: u32,
        may: Check<'_>,
    ) -> Result<u32, AttachError>;

    /// Makes the device as large as its export is now, and returns that size in bytes. To be called only while all connections
    /// of the device are there ([`netlink::Nbd::resize`]).
    async fn grow(&self, device: &Device, export: &Export) -> Result<u64, AttachError>;

    /// Whether a device that was found, and was attached by an earlier run of this program, is of this very export.
    async fn carries(&self, device: &Device, export: &Export) -> Result<bool, AttachError>;

    /// Makes every request in flight and to come end with an error, so that an unmount cannot wait for a server that
    /// is gone. The device stays until it is detached.
    async fn fail(&self, device: &Device, volume: Uuid) -> Result<(), AttachError>;

    /// Takes the device away, and everything that was made for it. One that is gone is fine.
    async fn detach(&self, volume: Uuid) -> Result<(), AttachError>;
}

/// Tries the servers of an export in turn, those in this machine's file system first.
pub(crate) fn in_order(export: &Export) -> Result<Vec<&Address>, AttachError> {
    let mut servers: Vec<&Address> = export.servers.iter().collect();
    servers.sort_by_key(|server| match server {
        Address::Unix(path) if path.exists() => 0,
        Address::Tcp(_) => 1,
        Address::Unix(_) => 2,
    });
    if servers.is_empty() {
        return Err(AttachError::NoServer);
    }
    Ok(servers)
}

/// The server to use, and what it says of the export.
pub(crate) async fn look(export: &Export) -> Result<(Address, handshake::ExportInfo), AttachError> {
    let mut last = AttachError::NoServer;
    for server in in_order(export)? {
        match handshake::look(server, &export.name).await {
            Ok(info) => return Ok((server.clone(), info)),
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

/// Checks what a server says of an export against what was published. That it knows the name proves nothing: there are
/// servers that serve one disk under every name.
pub(crate) fn verify(export: &Export, info: &handshake::ExportInfo) -> Result<(), AttachError> {
    let wanted = format!("Ashlar volume {}", export.volume);
    if !info.description.starts_with(&wanted) {
        return Err(AttachError::Mismatch(format!(
            "the server calls it {:?} and not {wanted:?}",
            info.description.chars().take(100).collect::<String>()
        )));
    }
    let read_only = info.flags & handshake::READ_ONLY != 0;
    if read_only != export.read_only {
        return Err(AttachError::Mismatch(format!(
            "it is {} and was published {}",
            mode(read_only),
            mode(export.read_only)
        )));
    }
    if info.size_bytes == 0 || !info.size_bytes.is_multiple_of(u64::from(BLOCK_BYTES)) {
        return Err(AttachError::Mismatch(format!(
            "its size of {} bytes is not a number of blocks",
            info.size_bytes
        )));
    }
    Ok(())
}

fn mode(read_only: bool) -> &'static str {
    if read_only { "read-only" } else { "writable" }
}

/// Waits until `condition` holds, looking at it again and again, for at most `limit`.
pub(crate) async fn until(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> bool,
) -> Result<(), AttachError> {
    /// Often enough not to be felt, seldom enough to cost nothing.
    const LOOK: Duration = Duration::from_millis(20);
    let begun = tokio::time::Instant::now();
    while !condition() {
        if begun.elapsed() >= limit {
            return Err(AttachError::TooSlow {
                what: what.to_owned(),
                limit,
            });
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export(servers: &[&str]) -> Export {
        Export {
            volume: Uuid::nil(),
            name: "00@secret".into(),
            servers: servers.iter().map(|s| s.parse().expect(s)).collect(),
            read_only: false,
            epoch: 3,
        }
    }

    #[test]
    fn the_secret_is_not_shown() {
        assert!(!format!("{:?}", export(&[])).contains("secret"));
    }

    #[test]
    fn sockets_that_are_there_come_first() {
        let export = export(&["unix:/no/such.sock", "tcp:h:1", "unix:/dev/null"]);
        let order: Vec<String> = in_order(&export)
            .expect("some")
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(order, ["unix:/dev/null", "tcp:h:1", "unix:/no/such.sock"]);
    }

    #[test]
    fn an_export_that_is_not_what_was_published_is_refused() {
        let export = export(&["tcp:h:1"]);
        let described = |size_bytes, flags, description: &str| handshake::ExportInfo {
            size_bytes,
            flags,
            description: description.to_owned(),
        };
        let own = format!("Ashlar volume {}, published", export.volume);
        let info = |size_bytes, flags| described(size_bytes, flags, &own);
        assert!(verify(&export, &info(8192, 1)).is_ok());
        let other = format!("Ashlar volume {}", Uuid::from_u128(1));
        for wrong in [
            info(8192, 3),
            info(0, 1),
            info(4095, 1),
            described(8192, 1, ""),
            described(8192, 1, &other),
        ] {
            assert!(matches!(
                verify(&export, &wrong),
                Err(AttachError::Mismatch(_))
            ));
        }
    }
}
