//! `csi.v1.Node`.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::convert::bytes;
use super::{Spec, carry_out, convert, patience, status};
use crate::attach::Export;
use crate::capability::Capability;
use crate::controller::parameters;
use crate::csi;
use crate::csi::node_service_capability::rpc::Type as Can;
use crate::node::{Health, Node as Operations, PublishRequest, Severity, StageRequest, Usage};
use crate::refusal::{Class, Refusal};

/// Who and where this node is.
#[derive(Clone, Debug)]
pub struct Placement {
    /// What the orchestrator is to call it.
    pub node_id: String,
    /// Where it is.
    pub topology: BTreeMap<String, String>,
    /// How many volumes it takes; 0 is unknown.
    pub max_volumes: u32,
}

/// The service.
pub struct Node {
    operations: Arc<Operations>,
    placement: Placement,
    spec: Spec,
}

type Answer<T> = Result<Response<T>, Status>;

impl Node {
    /// Over the node's operations.
    pub fn new(operations: Arc<Operations>, placement: Placement, spec: Spec) -> Node {
        Node {
            operations,
            placement,
            spec,
        }
    }

    /// Carries out an operation to its end, under the turn of its volume.
    async fn change<T, F, W>(
        &self,
        volume: &str,
        waits: Option<Duration>,
        work: W,
    ) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Refusal>> + Send + 'static,
        W: FnOnce(Arc<Operations>) -> F,
    {
        let work = work(Arc::clone(&self.operations));
        carry_out(self.operations.turns(), volume, waits, work).await
    }

    fn path(&self, what: &str, path: &str) -> Result<PathBuf, Status> {
        self.operations.roots().check(what, path).map_err(status)
    }

    /// A path that is only compared.
    fn real(&self, path: &str) -> PathBuf {
        self.operations.roots().real(Path::new(path))
    }
}

/// A path that has to be given; whether it is a good one is looked at after the volume.
fn given(what: &str, path: &str) -> Result<(), Status> {
    if path.is_empty() {
        Err(status(Refusal::invalid(format!("{what} is missing"))))
    } else {
        Ok(())
    }
}

fn stage_request(
    id: Uuid,
    export: Export,
    staging: PathBuf,
    capability: Capability,
    context: HashMap<String, String>,
) -> Result<StageRequest, Refusal> {
    debug_assert_eq!(export.volume, id);
    let context = convert::map("volume_context", context)?;
    let (default_filesystem, mkfs_options) = parameters::of_context(&context)?;
    Ok(StageRequest {
        export,
        staging,
        capability,
        default_filesystem,
        mkfs_options,
    })
}

#[tonic::async_trait]
impl csi::node_server::Node for Node {
    async fn node_stage_volume(
        &self,
        request: Request<csi::NodeStageVolumeRequest>,
    ) -> Answer<csi::NodeStageVolumeResponse> {
        let waits = patience(request.metadata());
        let message = request.into_inner();
        convert::volume_id(&message.volume_id).map_err(status)?;
        given("staging_target_path", &message.staging_target_path)?;
        let capability = convert::capability(message.volume_capability).map_err(status)?;
        let id = convert::known_id(&message.volume_id).map_err(status)?;
        let staging = self.path("staging_target_path", &message.staging_target_path)?;
        let export = convert::export(id, message.publish_context)
            .map_err(status)?
            .ok_or_else(|| status(Refusal::invalid("publish_context is missing")))?;
        let wanted = stage_request(id, export, staging, capability, message.volume_context)
            .map_err(status)?;
        self.change(&message.volume_id, waits, |operations| async move {
            operations.stage(&wanted).await
        })
        .await?;
        Ok(Response::new(csi::NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Answer<csi::NodeUnstageVolumeResponse> {
        let waits = patience(request.metadata());
        let message = request.into_inner();
        let id = convert::volume_id(&message.volume_id).map_err(status)?;
        let staging = self.path("staging_target_path", &message.staging_target_path)?;
        if let Some(id) = id {
            self.change(&message.volume_id, waits, |operations| async move {
                operations.unstage(id, &staging).await
            })
            .await?;
        }
        Ok(Response::new(csi::NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Answer<csi::NodePublishVolumeResponse> {
        let waits = patience(request.metadata());
        let message = request.into_inner();
        convert::volume_id(&message.volume_id).map_err(status)?;
        given("target_path", &message.target_path)?;
        let capability = convert::capability(message.volume_capability).map_err(status)?;
        let id = convert::known_id(&message.volume_id).map_err(status)?;
        let target = self.path("target_path", &message.target_path)?;
        if message.staging_target_path.is_empty() {
            return Err(status(Refusal::precondition(
                "staging_target_path is missing",
            )));
        }
        let staging = self.path("staging_target_path", &message.staging_target_path)?;
        let stage = convert::export(id, message.publish_context)
            .map_err(status)?
            .map(|export| {
                stage_request(
                    id,
                    export,
                    staging,
                    capability.clone(),
                    message.volume_context,
                )
            })
            .transpose()
            .map_err(status)?;
        let wanted = PublishRequest {
            volume: id,
            target,
            capability,
            read_only: message.readonly,
            stage,
        };
        self.change(&message.volume_id, waits, |operations| async move {
            operations.publish(&wanted).await
        })
        .await?;
        Ok(Response::new(csi::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Answer<csi::NodeUnpublishVolumeResponse> {
        let waits = patience(request.metadata());
        let message = request.into_inner();
        let id = convert::volume_id(&message.volume_id).map_err(status)?;
        let target = self.path("target_path", &message.target_path)?;
        if let Some(id) = id {
            self.change(&message.volume_id, waits, |operations| async move {
                operations.unpublish(id, &target).await
            })
            .await?;
        }
        Ok(Response::new(csi::NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Answer<csi::NodeGetVolumeStatsResponse> {
        let message = request.into_inner();
        convert::volume_id(&message.volume_id).map_err(status)?;
        given("volume_path", &message.volume_path)?;
        let id = convert::known_id(&message.volume_id).map_err(status)?;
        let path = self.real(&message.volume_path);
        let usage = self.operations.usage(id, &path).await.map_err(status)?;
        Ok(Response::new(csi::NodeGetVolumeStatsResponse {
            usage: volume_usage(usage),
        }))
    }

    async fn node_get_volume_health(
        &self,
        request: Request<csi::NodeGetVolumeHealthRequest>,
    ) -> Answer<csi::NodeGetVolumeHealthResponse> {
        let message = request.into_inner();
        let id = convert::known_id(&message.volume_id).map_err(status)?;
        let path = [message.volume_publish_path, message.staging_target_path]
            .into_iter()
            .find(|path| !path.is_empty())
            .map(|path| self.real(&path));
        let health = self
            .operations
            .health(id, path.as_deref())
            .await
            .map_err(status)?;
        Ok(Response::new(csi::NodeGetVolumeHealthResponse {
            volume_health: Some(csi::VolumeHealth {
                volume_id: message.volume_id,
                health_statuses: health_statuses(health),
            }),
        }))
    }

    async fn node_get_storage_health(
        &self,
        _request: Request<csi::NodeGetStorageHealthRequest>,
    ) -> Answer<csi::NodeGetStorageHealthResponse> {
        use csi::StorageHealthErrorType as Wrong;
        use csi::node_get_storage_health_response::StorageBackendHealth;
        let entry = |wrong: Wrong, reason: &str, message: String| StorageBackendHealth {
            status: wrong.into(),
            reason: reason.to_owned(),
            message,
            volume_capability: None,
        };
        let backend_health = match self.operations.daemon().status().await {
            Err(refusal) => vec![entry(
                Wrong::StorageUnreachable,
                "DaemonUnreachable",
                refusal.message,
            )],
            Ok(summary) if !summary.is_ready => vec![entry(
                Wrong::StorageUnreachable,
                "DaemonNotServing",
                "the daemon is starting or stopping".to_owned(),
            )],
            Ok(summary) if summary.warnings.is_empty() => Vec::new(),
            Ok(summary) => vec![entry(
                Wrong::StorageDegraded,
                "StorageWarning",
                summary.warnings.join(" "),
            )],
        };
        Ok(Response::new(csi::NodeGetStorageHealthResponse {
            backend_health,
        }))
    }

    async fn node_expand_volume(
        &self,
        request: Request<csi::NodeExpandVolumeRequest>,
    ) -> Answer<csi::NodeExpandVolumeResponse> {
        let waits = patience(request.metadata());
        let message = request.into_inner();
        convert::volume_id(&message.volume_id).map_err(status)?;
        given("volume_path", &message.volume_path)?;
        let id = convert::known_id(&message.volume_id).map_err(status)?;
        if message.volume_capability.is_some() {
            convert::capability(message.volume_capability).map_err(status)?;
        }
        let required = match message.capacity_range {
            None => 0,
            Some(range) => {
                crate::controller::sizing::Range::parse(range.required_bytes, range.limit_bytes)
                    .map_err(status)?
                    .required_bytes
            }
        };
        let path = self.real(&message.volume_path);
        let size = self
            .change(&message.volume_id, waits, |operations| async move {
                operations.expand(id, &path, required).await
            })
            .await?;
        Ok(Response::new(csi::NodeExpandVolumeResponse {
            capacity_bytes: bytes(size),
        }))
    }

    async fn node_get_capabilities(
        &self,
        _request: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Answer<csi::NodeGetCapabilitiesResponse> {
        let mut can = vec![
            Can::StageUnstageVolume,
            Can::GetVolumeStats,
            Can::ExpandVolume,
            Can::SingleNodeMultiWriter,
        ];
        if self.spec == Spec::V1_13 {
            can.extend([Can::GetVolumeHealth, Can::GetStorageHealth]);
        }
        let capabilities = can
            .into_iter()
            .map(|kind| csi::NodeServiceCapability {
                r#type: Some(csi::node_service_capability::Type::Rpc(
                    csi::node_service_capability::Rpc {
                        r#type: kind.into(),
                    },
                )),
            })
            .collect();
        Ok(Response::new(csi::NodeGetCapabilitiesResponse {
            capabilities,
        }))
    }

    async fn node_get_info(
        &self,
        _request: Request<csi::NodeGetInfoRequest>,
    ) -> Answer<csi::NodeGetInfoResponse> {
        // The orchestrator may publish to this node as soon as it knows it, so the daemon should know it before. A daemon that
        // is away is told as soon as it is there (`keep_registered`); until then publishing is answered NOT_FOUND, and repeated.
        // An error here would have the kubelet refuse the driver, which is tried again minutes later.
        let known = self
            .operations
            .daemon()
            .register(&self.placement.node_id, &self.placement.topology)
            .await;
        match known {
            Err(refusal) if refusal.class != Class::Unavailable => return Err(status(refusal)),
            Err(refusal) => tracing::info!(%refusal, "the daemon is told of this node later"),
            Ok(()) => {}
        }
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id: self.placement.node_id.clone(),
            max_volumes_per_node: i64::from(self.placement.max_volumes),
            accessible_topology: Some(csi::Topology {
                segments: self.placement.topology.clone().into_iter().collect(),
            }),
        }))
    }
}

fn volume_usage(usage: Usage) -> Vec<csi::VolumeUsage> {
    use csi::volume_usage::Unit;
    let entry = |unit: Unit, total: u64, used: u64, available: u64| csi::VolumeUsage {
        available: bytes(available),
        total: bytes(total),
        used: bytes(used),
        unit: unit.into(),
    };
    match usage {
        Usage::Block { total_bytes } => vec![entry(Unit::Bytes, total_bytes, 0, 0)],
        Usage::Mount {
            total_bytes,
            available_bytes,
            used_bytes,
            total_inodes,
            available_inodes,
            used_inodes,
        } => vec![
            entry(Unit::Bytes, total_bytes, used_bytes, available_bytes),
            entry(Unit::Inodes, total_inodes, used_inodes, available_inodes),
        ],
    }
}

fn health_statuses(health: Health) -> Vec<csi::volume_health::VolumeHealthEntry> {
    health
        .into_iter()
        .map(|entry| csi::volume_health::VolumeHealthEntry {
            status: match entry.severity {
                Severity::Degraded => csi::VolumeHealthErrorType::Degraded,
                Severity::Inaccessible => csi::VolumeHealthErrorType::Inaccessible,
                Severity::DataLoss => csi::VolumeHealthErrorType::DataLoss,
            }
            .into(),
            reason: entry.reason.to_owned(),
            message: entry.message,
        })
        .collect()
}
