//! The daemon, as the driver asks it things: its administrative interface in the driver's own types.

mod doors;
mod volume;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ashlar_proto::{NODE_NOT_ASKED, admin};
use tonic::{Code, Status};
use uuid::Uuid;

use crate::address::Address;
use crate::attach::Export;
use crate::capability::{AccessMode, Filesystem};
use crate::refusal::{Class, Refusal};

use doors::Doors;
pub use volume::{Limits, NewVolume, NodeInfo, Publication, Space, Summary, Volume};

/// Reads and small changes. A daemon that takes longer is as good as gone, and the caller asks again.
const CALL_LIMIT: Duration = Duration::from_secs(15);
/// Deleting waits until the blocks are durably dropped, publishing until older connections are ended.
const LONG_CALL_LIMIT: Duration = Duration::from_secs(100);

/// Asks whichever daemon is asked now. One that does not answer is left for the next.
macro_rules! ask {
    ($self:ident, $limit:expr, $method:ident, $message:expr) => {{
        let (door, mut client) = $self.doors.present();
        let answer = client.$method(asking($message, $limit)).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| $self.refusal(door, &status))
    }};
}

/// What came of a deletion.
#[derive(Debug)]
pub enum Deletion {
    /// The volume is gone.
    Done,
    /// The node that serves it cannot be asked, and the daemon says so; nothing was begun.
    NodeNotAsked(Refusal),
}

/// One daemon, or the daemons of a cluster of which one is asked; cheap to clone. Connects when it is first asked, and again
/// after every break.
#[derive(Clone, Debug)]
pub struct Daemon {
    doors: Arc<Doors>,
}

impl Daemon {
    /// The first of `addresses` that answers; none of them need be there yet. `certificates` is a directory with what a
    /// cluster's daemons want to see over TCP.
    pub fn new(addresses: &[Address], certificates: Option<&Path>) -> Result<Daemon, Refusal> {
        Ok(Daemon {
            doors: Arc::new(Doors::new(addresses, certificates)?),
        })
    }

    /// Where it is.
    pub fn address(&self) -> Address {
        self.doors.address()
    }

    /// What the daemon is and how it does.
    pub async fn status(&self) -> Result<Summary, Refusal> {
        let answer = ask!(self, CALL_LIMIT, get_status, admin::GetStatusRequest {});
        answer.map(Summary::from)
    }

    /// One volume.
    pub async fn volume(&self, id: Uuid) -> Result<Volume, Refusal> {
        one(self.get(id.to_string()).await?.volume)
    }

    async fn get(&self, reference: String) -> Result<admin::GetVolumeResponse, Refusal> {
        let request = admin::GetVolumeRequest { volume: reference };
        ask!(self, CALL_LIMIT, get_volume, request)
    }

    /// Has this daemon serve a volume with copies, wherever it is served now, and answers it and where this daemon's
    /// exports are reached. [`Class::FailedPrecondition`] when it is not published to `node` any more.
    pub async fn open(&self, id: Uuid, node: &str) -> Result<(Volume, Vec<Address>), Refusal> {
        let request = admin::OpenVolumeRequest {
            volume: id.to_string(),
            client_node_id: node.to_owned(),
        };
        ask!(self, LONG_CALL_LIMIT, open_volume, request)?;
        let answer = self.get(id.to_string()).await?;
        Ok((one(answer.volume)?, addresses(&answer.nbd_listeners)))
    }

    /// Has this daemon serve a volume with copies that nobody has.
    pub async fn take_over(&self, id: Uuid) -> Result<(), Refusal> {
        let request = admin::OpenVolumeRequest {
            volume: id.to_string(),
            client_node_id: String::new(),
        };
        ask!(self, LONG_CALL_LIMIT, open_volume, request).map(drop)
    }

    /// One volume by its name; `None` when there is none.
    pub async fn volume_named(&self, name: &str) -> Result<Option<Volume>, Refusal> {
        match self.get(name.to_owned()).await {
            Ok(answer) => one(answer.volume).map(Some),
            Err(refusal) if refusal.class == Class::NotFound => Ok(None),
            Err(refusal) => Err(refusal),
        }
    }

    /// A page of volumes and where to go on; an empty token begins, and an empty one is answered at the end.
    pub async fn volumes(&self, most: u32, token: &str) -> Result<(Vec<Volume>, String), Refusal> {
        let request = admin::ListVolumesRequest {
            max_volumes: most,
            page_token: token.to_owned(),
        };
        let answer = ask!(self, CALL_LIMIT, list_volumes, request)?;
        let volumes = answer.volumes.into_iter().map(Volume::try_from);
        Ok((volumes.collect::<Result<_, _>>()?, answer.next_page_token))
    }

    /// Creates a volume. [`Class::AlreadyExists`] when the name is taken.
    pub async fn create(&self, new: NewVolume) -> Result<Volume, Refusal> {
        // One with copies is served by the end of the call, and that has to wait for daemons that are away.
        let request = admin::CreateVolumeRequest::from(new);
        one(ask!(self, LONG_CALL_LIMIT, create_volume, request)?.volume)
    }

    /// Deletes a volume; one that is not there is fine.
    pub async fn delete(&self, id: Uuid) -> Result<Deletion, Refusal> {
        let request = admin::DeleteVolumeRequest {
            volume: id.to_string(),
        };
        let (door, mut client) = self.doors.present();
        let answer = client.delete_volume(asking(request, LONG_CALL_LIMIT)).await;
        let Err(status) = answer else {
            return Ok(Deletion::Done);
        };
        let refusal = self.refusal(door, &status);
        if status.metadata().contains_key(NODE_NOT_ASKED) {
            Ok(Deletion::NodeNotAsked(refusal))
        } else if refusal.class == Class::NotFound {
            Ok(Deletion::Done)
        } else {
            Err(refusal)
        }
    }

    /// Makes a volume larger.
    pub async fn resize(&self, id: Uuid, size_bytes: u64) -> Result<Volume, Refusal> {
        let request = admin::ResizeVolumeRequest {
            volume: id.to_string(),
            size_bytes,
        };
        one(ask!(self, CALL_LIMIT, resize_volume, request)?.volume)
    }

    /// Changes the limits of a volume; what is `None` stays.
    pub async fn set_limits(
        &self,
        id: Uuid,
        iops: Option<u64>,
        bytes_per_second: Option<u64>,
    ) -> Result<Volume, Refusal> {
        let request = admin::SetVolumeRequest {
            volume: id.to_string(),
            iops,
            bytes_per_second,
            ..admin::SetVolumeRequest::default()
        };
        one(ask!(self, CALL_LIMIT, set_volume, request)?.volume)
    }

    /// Gives a volume to a node. The same node on the same terms gets the same export again.
    pub async fn publish(
        &self,
        id: Uuid,
        node: &str,
        mode: AccessMode,
        read_only: bool,
    ) -> Result<Export, Refusal> {
        let request = admin::PublishVolumeRequest {
            volume: id.to_string(),
            node_id: node.to_owned(),
            read_only: read_only || mode.is_reader_only(),
            access_mode: volume::access_mode(mode).into(),
        };
        let answer = ask!(self, LONG_CALL_LIMIT, publish_volume, request)?;
        let servers = addresses(&answer.nbd_listeners);
        Ok(Export {
            volume: id,
            name: answer.export_name,
            servers,
            read_only: answer.read_only,
            epoch: answer.epoch,
        })
    }

    /// Takes a volume back from a node, or from all of them, and fences it. What is not published is fine.
    pub async fn unpublish(&self, id: Uuid, node: Option<&str>) -> Result<(), Refusal> {
        let request = admin::UnpublishVolumeRequest {
            volume: id.to_string(),
            node_id: node.unwrap_or_default().to_owned(),
        };
        ask!(self, LONG_CALL_LIMIT, unpublish_volume, request).map(drop)
    }

    /// Announces a filesystem. Refused unless nothing of a user's can be on the volume.
    pub async fn begin_format(
        &self,
        id: Uuid,
        filesystem: Filesystem,
        uuid: Uuid,
    ) -> Result<(), Refusal> {
        let request = admin::BeginFormatRequest {
            volume: id.to_string(),
            filesystem: filesystem.name().to_owned(),
            uuid: uuid.to_string(),
        };
        ask!(self, CALL_LIMIT, begin_format, request).map(drop)
    }

    /// Records that the announced filesystem is made and durable.
    pub async fn end_format(&self, id: Uuid, uuid: Uuid) -> Result<(), Refusal> {
        let request = admin::EndFormatRequest {
            volume: id.to_string(),
            uuid: uuid.to_string(),
        };
        ask!(self, CALL_LIMIT, end_format, request).map(drop)
    }

    /// Makes a node known, or moves it.
    pub async fn register(
        &self,
        node: &str,
        topology: &BTreeMap<String, String>,
    ) -> Result<(), Refusal> {
        let request = admin::RegisterNodeRequest {
            node_id: node.to_owned(),
            topology: topology.clone().into_iter().collect(),
        };
        ask!(self, CALL_LIMIT, register_node, request).map(drop)
    }

    /// Every node that volumes can be published to.
    pub async fn nodes(&self) -> Result<Vec<NodeInfo>, Refusal> {
        let answer = ask!(self, CALL_LIMIT, list_nodes, admin::ListNodesRequest {})?;
        Ok(answer.nodes.into_iter().map(NodeInfo::from).collect())
    }

    /// What new volumes of so many copies may take (0: of as many as they get by default), confined to zones, if any are
    /// named.
    pub async fn space(&self, replicas: u32, zones: &[String]) -> Result<Space, Refusal> {
        let request = admin::GetCapacityRequest {
            replicas,
            zones: zones.to_vec(),
        };
        let answer = ask!(self, CALL_LIMIT, get_capacity, request);
        answer.map(Space::from)
    }

    fn refusal(&self, door: usize, status: &Status) -> Refusal {
        // What has a cause did not come from the daemon but broke on the way, whatever its code: it may have been done.
        let class = match std::error::Error::source(status) {
            Some(_) => Class::Unavailable,
            None => class_of(status.code()),
        };
        let words = self.doors.words(door, status);
        if matches!(class, Class::Unavailable | Class::DeadlineExceeded) {
            self.doors.go_on(door);
        }
        Refusal::new(class, format!("the daemon: {words}"))
    }
}

fn asking<T>(message: T, limit: Duration) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(limit);
    request
}

fn addresses(listeners: &[admin::Listener]) -> Vec<Address> {
    listeners
        .iter()
        .filter_map(|listener| listener.address.parse().ok())
        .collect()
}

fn one(volume: Option<admin::Volume>) -> Result<Volume, Refusal> {
    volume
        .ok_or_else(|| Refusal::internal("the daemon answered without the volume"))?
        .try_into()
}

/// What the code of a daemon's answer means to the driver's callers.
fn class_of(code: Code) -> Class {
    match code {
        Code::InvalidArgument => Class::InvalidArgument,
        Code::NotFound => Class::NotFound,
        Code::AlreadyExists => Class::AlreadyExists,
        Code::FailedPrecondition => Class::FailedPrecondition,
        Code::ResourceExhausted => Class::ResourceExhausted,
        Code::OutOfRange => Class::OutOfRange,
        Code::Aborted => Class::Aborted,
        // A broken connection leaves open whether the daemon did it: the work may go on.
        Code::Unavailable | Code::Cancelled | Code::Unknown => Class::Unavailable,
        Code::DeadlineExceeded => Class::DeadlineExceeded,
        Code::PermissionDenied | Code::Unauthenticated => Class::PermissionDenied,
        Code::Unimplemented => Class::Unimplemented,
        Code::Ok | Code::Internal | Code::DataLoss => Class::Internal,
    }
}
