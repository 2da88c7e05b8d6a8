//! Attaching with the kernel's NBD driver.
//!
//! The kernel keeps the sockets, so neither a restart of this program nor its end touches a device. When a server goes
//! away the kernel parks the device's requests until it is handed a new socket or the dead-connection time is over.

use std::os::fd::OwnedFd;
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use super::asks::Asks;
use super::handshake::{self, Connection};
use super::netlink::{Nbd, Setup};
use super::{
    Attach, AttachError, Attached, BLOCK_BYTES, Device, DeviceKind, Export, in_order, look, until,
    verify,
};
use crate::child::Child;
use crate::failpoint;
use crate::sysfs;

/// How long the kernel gets to show a new device, or to let one go that nobody has open.
const SETTLE_LIMIT: Duration = Duration::from_secs(15);
/// How long the kernel gets for what it is asked: it answers at once, but a change of size waits for requests in flight.
const ASK_LIMIT: Duration = Duration::from_secs(20);
/// The kernel since which devices can be told apart by an identifier.
const IDENTIFIER_SINCE: (u32, u32) = (5, 14);

/// How devices are set up.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Sockets of a device, 1 to 16. Each is a queue of 128 requests. Two to four spread the load; more only make
    /// attaching slower.
    pub connections: u32,
    /// Not zero: requests that were in flight when a server died are sent again only when this is over. Longer than the
    /// longest the cluster takes to fail over.
    pub request_timeout: Duration,
    /// How long requests wait for the server to come back before they fail.
    pub dead_connection_timeout: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct KernelNbd {
    settings: Settings,
    asks: Asks,
}

impl KernelNbd {
    /// With the kernel as it is; see [`KernelNbd::is_there`].
    pub fn new(settings: Settings) -> KernelNbd {
        KernelNbd {
            settings,
            asks: Asks::default(),
        }
    }

    /// Whether the kernel has the driver, loading its module when it is not yet, and can tell its devices apart: a name
    /// like nbd0 may have gone to another volume.
    pub async fn is_there() -> bool {
        if kernel_version().is_some_and(|version| version < IDENTIFIER_SINCE) {
            return false;
        }
        if Nbd::open().is_ok() {
            return true;
        }
        // Devices are added on demand by netlink; 16 partitions each, as nbd-client users expect.
        let loaded = Child::new("modprobe")
            .arg("nbd")
            .run(Duration::from_secs(20))
            .await;
        loaded.is_ok_and(|finished| finished.succeeded()) && Nbd::open().is_ok()
    }

    /// Tells the driver something where it may wait.
    async fn tell<T, F>(&self, what: &'static str, work: F) -> Result<T, AttachError>
    where
        T: Send + 'static,
        F: FnOnce(&Nbd) -> std::io::Result<T> + Send + 'static,
    {
        let work = move || Nbd::open().and_then(|nbd| work(&nbd));
        self.asks.ask(what, ASK_LIMIT, work).await
    }

    /// `count` connections to the first server that serves the export as published.
    async fn connections(
        &self,
        export: &Export,
        count: u32,
    ) -> Result<Vec<Connection>, AttachError> {
        let mut last = AttachError::NoServer;
        for server in in_order(export)? {
            let first = match handshake::connect(server, &export.name).await {
                Ok(first) => first,
                Err(error) => {
                    last = error.into();
                    continue;
                }
            };
            verify(export, &first.info)?;
            let several = first.info.flags & handshake::CAN_MULTI_CONN != 0;
            let info = first.info.clone();
            let mut all = vec![first];
            while several && (all.len() as u32) < count {
                let next = handshake::connect(server, &export.name).await?;
                if next.info != info {
                    return Err(AttachError::Mismatch(
                        "two connections were told different sizes or flags".into(),
                    ));
                }
                all.push(next);
            }
            return Ok(all);
        }
        Err(last)
    }
}

fn kernel_version() -> Option<(u32, u32)> {
    let name = rustix::system::uname();
    let release = name.release().to_str().ok()?;
    let mut parts = release.split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn index(device: &Device) -> Result<u32, AttachError> {
    device
        .name
        .strip_prefix("nbd")
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| AttachError::Failed(format!("{} is no nbd device", device.name)))
}

fn is_connected(device: &str) -> bool {
    sysfs::attribute(device, "pid").is_some()
}

#[async_trait]
impl Attach for KernelNbd {
    fn kind(&self) -> DeviceKind {
        DeviceKind::KernelNbd
    }

    fn reconnects(&self) -> bool {
        true
    }

    fn connections(&self) -> u32 {
        self.settings.connections
    }

    async fn find(&self, volume: Uuid) -> Result<Option<Device>, AttachError> {
        let identifier = volume.to_string();
        let all = sysfs::devices("nbd")
            .map_err(|error| AttachError::system("reading /sys/block", error))?;
        Ok(all
            .into_iter()
            .find(|name| {
                is_connected(name)
                    && sysfs::attribute(name, "backend").as_deref() == Some(&identifier)
            })
            .map(|name| Device {
                kind: DeviceKind::KernelNbd,
                name,
            }))
    }

    async fn attach(&self, export: &Export) -> Result<Attached, AttachError> {
        let connections = self.connections(export, self.settings.connections).await?;
        let (size_bytes, flags) = (connections[0].info.size_bytes, connections[0].info.flags);
        let count = connections.len() as u32;
        let sockets: Vec<OwnedFd> = connections.into_iter().map(|each| each.socket).collect();
        let (settings, volume) = (self.settings, export.volume);
        let index = self
            .tell("setting an nbd device up", move |nbd| {
                nbd.connect(&Setup {
                    index: None,
                    size_bytes,
                    block_bytes: BLOCK_BYTES,
                    request_timeout: settings.request_timeout,
                    dead_connection_timeout: settings.dead_connection_timeout,
                    flags,
                    identifier: &volume.to_string(),
                    sockets: &sockets,
                })
            })
            .await?;
        failpoint::reach("attach-half");
        let device = Device {
            kind: DeviceKind::KernelNbd,
            name: format!("nbd{index}"),
        };
        let what = format!("{} has its size", device.name);
        let shown = until(&what, SETTLE_LIMIT, || {
            device.size_bytes() == size_bytes && device.node().exists()
        });
        if let Err(error) = shown.await {
            let _ = self
                .tell("letting an nbd device go", move |nbd| nbd.disconnect(index))
                .await;
            return Err(error);
        }
        Ok(Attached {
            device,
            connections: count,
        })
    }

    async fn reconnect(
        &self,
        device: &Device,
        export: &Export,
        missing: u32,
        may: super::Check<'_>,
    ) -> Result<u32, AttachError> {
        let index = index(device)?;
        let identifier = export.volume.to_string();
        let connections = self.connections(export, missing.max(1)).await?;
        let size = device.size_bytes();
        if connections[0].info.size_bytes < size {
            return Err(AttachError::Mismatch(format!(
                "it has {} bytes and the device {size}",
                connections[0].info.size_bytes
            )));
        }
        may.await?;
        let sockets: Vec<OwnedFd> = connections.into_iter().map(|each| each.socket).collect();
        let mut given = 0;
        // One by one: the kernel fills dead places in turn and drops what is too much without a word.
        for socket in sockets {
            let identifier = identifier.clone();
            self.tell("giving an nbd device a new connection", move |nbd| {
                nbd.replace_sockets(index, &identifier, &[socket])
            })
            .await?;
            given += 1;
        }
        Ok(given)
    }

    async fn grow(&self, device: &Device, export: &Export) -> Result<u64, AttachError> {
        let index = index(device)?;
        let (_, info) = look(export).await?;
        verify(export, &info)?;
        let size_bytes = info.size_bytes;
        // A device in use never becomes smaller, whatever a server says.
        if size_bytes <= device.size_bytes() {
            return Ok(device.size_bytes());
        }
        let identifier = export.volume.to_string();
        self.tell("growing an nbd device", move |nbd| {
            nbd.resize(index, &identifier, size_bytes)
        })
        .await?;
        until(
            &format!("{} has its new size", device.name),
            SETTLE_LIMIT,
            || device.size_bytes() >= size_bytes,
        )
        .await?;
        Ok(size_bytes)
    }

    async fn carries(&self, device: &Device, export: &Export) -> Result<bool, AttachError> {
        let found = self.find(export.volume).await?;
        Ok(found.is_some_and(|found| found.name == device.name))
    }

    async fn fail(&self, device: &Device, _volume: Uuid) -> Result<(), AttachError> {
        let index = index(device)?;
        self.tell("failing an nbd device", move |nbd| nbd.disconnect(index))
            .await
    }

    async fn detach(&self, volume: Uuid) -> Result<(), AttachError> {
        let Some(device) = self.find(volume).await? else {
            return Ok(());
        };
        let index = index(&device)?;
        self.tell("letting an nbd device go", move |nbd| nbd.disconnect(index))
            .await?;
        failpoint::reach("detach-half");
        until(
            &format!("{} is let go (somebody has it open)", device.name),
            SETTLE_LIMIT,
            || !is_connected(&device.name),
        )
        .await
    }
}
