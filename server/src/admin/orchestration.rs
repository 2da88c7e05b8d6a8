//! What orchestrators ask for: publications, client nodes, formats, annotations, capacity.

use std::collections::{BTreeMap, HashMap};

use ashlar_core::records::{
    AccessMode, Annotations, ClientNodeId, ClientNodeRecord, ConfigureError, FilesystemState,
    FilesystemType, MinInSyncError, Publication, VOLUME_MAX_BYTES, VolumeLimits, VolumeRecord,
    VolumeState, Zones, ZonesError,
};
use ashlar_core::units::{BLOCK_BYTES, ExportToken, VolumeId};
use ashlar_proto::admin;
use ashlar_proto::request::FieldError;
use tonic::Status;
use uuid::Uuid;

use super::convert;
use super::service::{Service, refused};
use crate::daemon::Services;
use crate::volumes::{ClusterRoom, VolumeError, VolumeSettings, VolumeView};

/// How a volume is to be created, from what was asked.
pub(super) fn settings(asked: &mut admin::CreateVolumeRequest) -> Result<VolumeSettings, Status> {
    let limits = asked.limits.unwrap_or_default();
    let limits = VolumeLimits::check(limits.iops, limits.bytes_per_second);
    Ok(VolumeSettings {
        read_only: asked.read_only,
        write_through: asked.write_through,
        limits: limits.map_err(|error| refused(error.into()))?,
        annotations: annotations(std::mem::take(&mut asked.annotations))?,
        replicas: asked.replicas,
        min_in_sync: asked.min_in_sync,
        zones: zones(std::mem::take(&mut asked.zones))?,
    })
}

fn zones(names: Vec<String>) -> Result<Zones, Status> {
    Zones::check(names).map_err(|error| FieldError::new("zones", error).into())
}

fn annotations(entries: HashMap<String, String>) -> Result<Annotations, Status> {
    Annotations::check(entries.into_iter().collect()).map_err(|error| refused(error.into()))
}

pub(super) fn node_id(text: &str) -> Result<ClientNodeId, Status> {
    ClientNodeId::parse(text).map_err(|error| FieldError::new("node_id", error).into())
}

fn uuid(text: &str) -> Result<Uuid, Status> {
    let wrong = |_| FieldError::new("uuid", format_args!("{text:?} is not a UUID"));
    Ok(Uuid::try_parse(text).map_err(wrong)?)
}

fn access_mode(mode: i32) -> Result<AccessMode, Status> {
    use admin::AccessMode as Asked;
    match Asked::try_from(mode) {
        Ok(Asked::SingleNodeWriter) => Ok(AccessMode::SingleNodeWriter),
        Ok(Asked::SingleNodeReaderOnly) => Ok(AccessMode::SingleNodeReader),
        Ok(Asked::MultiNodeReaderOnly) => Ok(AccessMode::MultiNodeReader),
        Ok(Asked::SingleNodeSingleWriter) => Ok(AccessMode::SingleNodeSingleWriter),
        Ok(Asked::SingleNodeMultiWriter) => Ok(AccessMode::SingleNodeMultiWriter),
        Ok(Asked::Unspecified) | Err(_) => Err(FieldError::new(
            "access_mode",
            "give one of the modes of the interface; several nodes that write are not among them",
        )
        .into()),
    }
}

fn access_mode_of(mode: AccessMode) -> admin::AccessMode {
    match mode {
        AccessMode::SingleNodeWriter => admin::AccessMode::SingleNodeWriter,
        AccessMode::SingleNodeReader => admin::AccessMode::SingleNodeReaderOnly,
        AccessMode::MultiNodeReader => admin::AccessMode::MultiNodeReaderOnly,
        AccessMode::SingleNodeSingleWriter => admin::AccessMode::SingleNodeSingleWriter,
        AccessMode::SingleNodeMultiWriter => admin::AccessMode::SingleNodeMultiWriter,
    }
}

/// Without its export name, and without its connections, which are counted elsewhere.
pub(super) fn publication(publication: &Publication) -> admin::Publication {
    admin::Publication {
        node_id: publication.node.to_string(),
        access_mode: access_mode_of(publication.mode).into(),
        read_only: publication.read_only,
        epoch: publication.epoch.0,
        published_at_unix_ms: publication.published_at_unix_ms as i64,
        connections: 0,
    }
}

pub(super) fn filesystem(record: &VolumeRecord) -> Option<admin::Filesystem> {
    let filesystem = record.filesystem.as_ref()?;
    Some(admin::Filesystem {
        r#type: filesystem.kind.to_string(),
        uuid: filesystem.uuid.to_string(),
        state: match filesystem.state {
            FilesystemState::Formatting => admin::FilesystemState::Formatting,
            FilesystemState::Formatted => admin::FilesystemState::Formatted,
        }
        .into(),
    })
}

pub(super) fn limits(limits: VolumeLimits) -> admin::VolumeLimits {
    admin::VolumeLimits {
        iops: limits.iops.unwrap_or(0),
        bytes_per_second: limits.bytes_per_second.unwrap_or(0),
    }
}

/// The client node that opened a connection; empty for one that came by the volume's name.
pub(super) fn node_of(record: &VolumeRecord, token: Option<ExportToken>) -> String {
    token
        .and_then(|token| record.publication_with(token))
        .map(|publication| publication.node.to_string())
        .unwrap_or_default()
}

fn ids(volumes: Option<&Vec<VolumeId>>) -> Vec<String> {
    let volumes = volumes.map_or(&[][..], |volumes| volumes);
    volumes.iter().map(|id| id.0.to_string()).collect()
}

fn client_node(
    record: &ClientNodeRecord,
    published: &BTreeMap<ClientNodeId, Vec<VolumeId>>,
) -> admin::ClientNode {
    admin::ClientNode {
        node_id: record.id.to_string(),
        topology: record.topology.clone().into_iter().collect(),
        registered_at_unix_ms: record.registered_at_unix_ms as i64,
        volume_ids: ids(published.get(&record.id)),
    }
}

/// Where the page after this volume begins.
fn page_token(record: &VolumeRecord) -> String {
    format!("{}/{}", record.name, record.id.0)
}

/// The views of one page, and the token of the next.
pub(super) fn page(
    views: Vec<VolumeView>,
    asked: &admin::ListVolumesRequest,
) -> Result<(Vec<VolumeView>, String), Status> {
    let mut views = views;
    // Volumes of one name (a tombstone and its successor) differ by their id.
    views.sort_by(|a, b| {
        let key = |view: &VolumeView| (view.record.name.to_string(), view.record.id);
        key(a).cmp(&key(b))
    });
    if !asked.page_token.is_empty() {
        let wrong = || FieldError::new("page_token", "it is not the token of a page");
        let (name, id) = asked.page_token.split_once('/').ok_or_else(wrong)?;
        let id = VolumeId(Uuid::try_parse(id).map_err(|_| wrong())?);
        views.retain(|view| (view.record.name.as_str(), view.record.id) > (name, id));
    }
    let most = match asked.max_volumes {
        0 => usize::MAX,
        most => most as usize,
    };
    if views.len() <= most {
        return Ok((views, String::new()));
    }
    views.truncate(most);
    let next = views.last().map(|view| page_token(&view.record));
    Ok((views, next.unwrap_or_default()))
}

impl Service {
    /// A volume with the connections of each of its publications.
    pub(super) async fn volume(services: &Services, view: &VolumeView) -> admin::Volume {
        let mut volume = convert::volume(view);
        if view.record.placement.is_replicated()
            && let Some(status) = services.volumes.replication(view.record.id).await
        {
            convert::mark_linked(&mut volume, &status);
        }
        let connections = view.runtime.map_or(0, |runtime| runtime.connections);
        if view.record.publications.is_empty() || connections == 0 {
            return volume;
        }
        for connection in services.plane.connections(view.record.id).await {
            let node = node_of(&view.record, connection.token);
            let publication = volume
                .publications
                .iter_mut()
                .find(|publication| publication.node_id == node);
            if let Some(publication) = publication {
                publication.connections += 1;
            }
        }
        volume
    }

    pub(super) async fn publish(
        &self,
        asked: admin::PublishVolumeRequest,
    ) -> Result<admin::PublishVolumeResponse, Status> {
        let reference = Service::reference(&asked.volume)?;
        let node = node_id(&asked.node_id)?;
        let mode = access_mode(asked.access_mode)?;
        let volumes = &self.services()?.volumes;
        let published = volumes.publish(&reference, node, mode, asked.read_only);
        let (view, publication) = published.await.map_err(refused)?;
        Ok(admin::PublishVolumeResponse {
            volume_id: view.record.id.0.to_string(),
            epoch: publication.epoch.0,
            export_name: publication.export_name(view.record.id),
            nbd_listeners: self.nbd_listeners(),
            size_bytes: view.record.size_bytes,
            read_only: publication.read_only,
        })
    }

    pub(super) async fn unpublish(
        &self,
        asked: admin::UnpublishVolumeRequest,
    ) -> Result<admin::UnpublishVolumeResponse, Status> {
        let reference = Service::reference(&asked.volume)?;
        let node = match &asked.node_id[..] {
            "" => None,
            id => Some(node_id(id)?),
        };
        let volumes = &self.services()?.volumes;
        let ended = volumes.unpublish(&reference, node).await.map_err(refused)?;
        Ok(admin::UnpublishVolumeResponse {
            node_ids: ended.nodes.iter().map(ToString::to_string).collect(),
            epoch: ended.epoch.0,
            closed_connections: ended.closed_connections,
        })
    }

    pub(super) async fn begin(
        &self,
        asked: admin::BeginFormatRequest,
    ) -> Result<admin::BeginFormatResponse, Status> {
        let reference = Service::reference(&asked.volume)?;
        let kind = FilesystemType::parse(&asked.filesystem);
        let kind = kind.map_err(|error| FieldError::new("filesystem", error))?;
        let uuid = uuid(&asked.uuid)?;
        let services = self.services()?;
        let begun = services.volumes.begin_format(&reference, kind, uuid).await;
        Ok(admin::BeginFormatResponse {
            volume: Some(Service::volume(services, &begun.map_err(refused)?).await),
        })
    }

    pub(super) async fn end(
        &self,
        asked: admin::EndFormatRequest,
    ) -> Result<admin::EndFormatResponse, Status> {
        let reference = Service::reference(&asked.volume)?;
        let uuid = uuid(&asked.uuid)?;
        let services = self.services()?;
        let ended = services.volumes.end_format(&reference, uuid).await;
        Ok(admin::EndFormatResponse {
            volume: Some(Service::volume(services, &ended.map_err(refused)?).await),
        })
    }

    pub(super) async fn annotate(
        &self,
        asked: admin::SetAnnotationsRequest,
    ) -> Result<admin::SetAnnotationsResponse, Status> {
        let reference = Service::reference(&asked.volume)?;
        let annotations = annotations(asked.annotations)?;
        let services = self.services()?;
        let annotated = services
            .volumes
            .annotate(&reference, asked.expected_revision, annotations)
            .await;
        Ok(admin::SetAnnotationsResponse {
            volume: Some(Service::volume(services, &annotated.map_err(refused)?).await),
        })
    }

    pub(super) async fn capacity(
        &self,
        asked: admin::GetCapacityRequest,
    ) -> Result<admin::GetCapacityResponse, Status> {
        let zones = zones(asked.zones)?;
        let services = self.services()?;
        let percent = self.overcommit_percent();
        let room = services.volumes.cluster_room(asked.replicas, &zones).await;
        if let Some(room) = room.map_err(refused)? {
            return Ok(of_cluster(&room, percent));
        }
        if !zones.are_all() {
            return Err(refused(VolumeError::Zones(ZonesError::NoCluster)));
        }
        let (mut capacity_bytes, mut available_bytes) = (0, 0);
        for view in services.plane.store_views().await {
            let status = &view.status;
            if status.poisoned.is_some() {
                continue;
            }
            let available = status.capacity_blocks.saturating_sub(status.used_blocks);
            available_bytes += available * BLOCK_BYTES as u64;
            capacity_bytes += (available + status.mapped_blocks) * BLOCK_BYTES as u64;
        }
        // What is being deleted is promised to nobody any more.
        let promised_bytes = services
            .volumes
            .list()
            .iter()
            .filter(|view| view.record.state == VolumeState::Active)
            .fold(0u64, |sum, view| sum.saturating_add(view.record.size_bytes));
        Ok(admin::GetCapacityResponse {
            capacity_bytes,
            available_bytes,
            promised_bytes,
            overcommit_percent: percent,
            provisionable_bytes: provisionable(
                capacity_bytes,
                available_bytes,
                promised_bytes,
                percent,
            ),
            volume_max_bytes: VOLUME_MAX_BYTES,
            replicas: 1,
        })
    }

    pub(super) async fn register(
        &self,
        asked: admin::RegisterNodeRequest,
    ) -> Result<admin::RegisterNodeResponse, Status> {
        let id = node_id(&asked.node_id)?;
        let volumes = &self.services()?.volumes;
        let registered = volumes.register_node(id, asked.topology.into_iter().collect());
        let record = registered.await.map_err(refused)?;
        Ok(admin::RegisterNodeResponse {
            node: Some(client_node(&record, &volumes.published_to())),
        })
    }

    pub(super) async fn unregister(
        &self,
        asked: admin::UnregisterNodeRequest,
    ) -> Result<admin::UnregisterNodeResponse, Status> {
        let id = node_id(&asked.node_id)?;
        let volumes = &self.services()?.volumes;
        let was_registered = volumes.unregister_node(id.clone()).await;
        Ok(admin::UnregisterNodeResponse {
            was_registered: was_registered.map_err(refused)?,
            volume_ids: ids(volumes.published_to().get(&id)),
        })
    }

    pub(super) async fn nodes(&self) -> Result<admin::ListNodesResponse, Status> {
        let volumes = &self.services()?.volumes;
        let published = volumes.published_to();
        let nodes = volumes.nodes().await.map_err(refused)?;
        let nodes = nodes.iter().map(|node| client_node(node, &published));
        Ok(admin::ListNodesResponse {
            nodes: nodes.collect(),
        })
    }

    /// Changes settings and limits; what concerns connected clients first, for it is what may be refused.
    pub(super) async fn set(
        services: &Services,
        asked: &ashlar_proto::request::SetVolume,
    ) -> Result<VolumeView, VolumeError> {
        let reference = asked.volume.to_string();
        let (read_only, write_through) = (asked.read_only, asked.write_through);
        let volumes = &services.volumes;
        let (iops, bytes_per_second) = (asked.iops, asked.bytes_per_second);
        // Nothing is applied when a part cannot be.
        VolumeLimits::check(iops.unwrap_or(0), bytes_per_second.unwrap_or(0))?;
        let zones = asked.zones.clone().map(Zones::check).transpose()?;
        let mut view = volumes.find(&reference).await?;
        if let Some(zones) = &zones {
            volumes.check_zones(zones, &view.record).await?;
        }
        if let Some(wanted) = asked.min_in_sync {
            MinInSyncError::check(wanted, view.record.replicas).map_err(ConfigureError::from)?;
        }
        if read_only.is_some() || write_through.is_some() {
            view = volumes
                .configure(&reference, read_only, write_through)
                .await?;
        }
        if let Some(min_in_sync) = asked.min_in_sync {
            view = volumes.require_in_sync(&reference, min_in_sync).await?;
        }
        if let Some(zones) = zones {
            view = volumes.confine(&reference, zones).await?;
        }
        if iops.is_some() || bytes_per_second.is_some() {
            view = volumes.limit(&reference, iops, bytes_per_second).await?;
        }
        Ok(view)
    }
}

/// What a cluster has: of what may be promised, each byte of a new volume takes as many as it has copies.
fn of_cluster(room: &ClusterRoom, percent: u32) -> admin::GetCapacityResponse {
    let bytes = |blocks: u64| blocks.saturating_mul(BLOCK_BYTES as u64);
    let unpromised = provisionable(
        bytes(room.capacity_blocks),
        u64::MAX,
        room.promised_bytes,
        percent,
    );
    let fitting = bytes(room.fitting_blocks);
    admin::GetCapacityResponse {
        capacity_bytes: bytes(room.capacity_blocks),
        available_bytes: bytes(room.free_blocks),
        promised_bytes: room.promised_bytes,
        overcommit_percent: percent,
        provisionable_bytes: (unpromised / u64::from(room.copies.max(1)))
            .min(provisionable(fitting, fitting, 0, percent)),
        volume_max_bytes: VOLUME_MAX_BYTES,
        replicas: room.copies,
    }
}

/// See `GetCapacityResponse.provisionable_bytes`.
fn provisionable(capacity: u64, available: u64, promised: u64, percent: u32) -> u64 {
    let scaled = |bytes: u64| u128::from(bytes) * u128::from(percent) / 100;
    let left = scaled(capacity).saturating_sub(u128::from(promised));
    u64::try_from(left.min(scaled(available))).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_new_volumes_may_take() {
        let gib = 1 << 30;
        // Nothing promised twice.
        assert_eq!(provisionable(100 * gib, 100 * gib, 30 * gib, 100), 70 * gib);
        // Promised beyond what there is.
        assert_eq!(provisionable(100 * gib, 90 * gib, 130 * gib, 100), 0);
        // Over-commitment allowed, and space left.
        assert_eq!(provisionable(100 * gib, 90 * gib, 130 * gib, 200), 70 * gib);
        // Full stores take nothing, whatever may be promised.
        assert_eq!(provisionable(100 * gib, 0, 10 * gib, 500), 0);
        assert_eq!(provisionable(u64::MAX, u64::MAX, 0, 100_000), u64::MAX);
    }

    #[test]
    fn what_new_volumes_may_take_of_a_cluster() {
        let blocks = |bytes: u64| bytes / BLOCK_BYTES as u64;
        let gib = 1 << 30;
        let with = |copies: u32, promised: u64, fitting: u64, percent: u32| {
            let room = ClusterRoom {
                copies,
                capacity_blocks: blocks(3 * gib),
                free_blocks: blocks(3 * gib),
                fitting_blocks: blocks(fitting),
                promised_bytes: promised,
            };
            of_cluster(&room, percent).provisionable_bytes
        };
        // Beyond one node's size, as long as the cluster has room.
        assert_eq!(with(1, 2 * gib, 3 * gib, 100), gib);
        // Each copy takes its part.
        assert_eq!(with(3, 0, gib, 100), gib);
        assert_eq!(with(2, 2 * gib, 3 * gib / 2, 100), gib / 2);
        assert_eq!(with(3, 3 * gib, gib, 100), 0);
        // Over-commitment is of the whole, and stops where blocks do not fit.
        assert_eq!(with(3, 3 * gib, gib, 200), gib);
        assert_eq!(with(3, 0, 0, 500), 0);
    }

    #[test]
    fn modes_go_both_ways_and_no_other_comes_in() {
        for number in 0..10 {
            if let Ok(mode) = access_mode(number) {
                assert_eq!(i32::from(access_mode_of(mode)), number);
            } else {
                assert!([0, 4, 5, 8, 9].contains(&number), "{number}");
            }
        }
    }
}
