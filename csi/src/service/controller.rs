//! `csi.v1.Controller`.

use std::sync::Arc;
use std::time::Duration;

use tonic::{Request, Response, Status};

use super::convert::{self, bytes};
use super::{Spec, carry_out, patience, status};
use crate::capability::{Access, Capability, Filesystem};
use crate::controller::parameters::{self, BYTES_PER_SECOND, IOPS, Mutable, Parameters};
use crate::controller::sizing::{self, Range};
use crate::controller::{
    Controller as Operations, CreateRequest, context_of, is_within, parameter, unsupported,
};
use crate::csi;
use crate::csi::controller_service_capability::rpc::Type as Can;
use crate::daemon::{Daemon, Volume};
use crate::refusal::{Class, Refusal};

/// Volumes asked of the daemon at once, where the caller wants all.
const PAGE: u32 = 500;
/// What the keys begin with that a StorageClass has for the external provisioner itself, such as that of the filesystem.
const PROVISIONERS_OWN: &str = "csi.storage.k8s.io/";

/// The service.
pub struct Controller {
    operations: Arc<Operations>,
    spec: Spec,
}

type Answer<T> = Result<Response<T>, Status>;

impl Controller {
    /// Over one daemon. A node gets at most `max_volumes`; 0 is no bound.
    pub fn new(daemon: Daemon, max_volumes: u32, spec: Spec) -> Controller {
        Controller {
            operations: Arc::new(Operations::new(daemon, max_volumes)),
            spec,
        }
    }

    /// Carries out a change to its end, under the turn for `key`.
    async fn change<T, F, W>(
        &self,
        key: &str,
        waits: Option<Duration>,
        work: W,
    ) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Refusal>> + Send + 'static,
        W: FnOnce(Arc<Operations>) -> F,
    {
        let work = work(Arc::clone(&self.operations));
        carry_out(self.operations.turns(), key, waits, work).await
    }

    fn daemon(&self) -> &Daemon {
        self.operations.daemon()
    }

    /// A page of the volumes this caller may see, and where to go on.
    async fn page(&self, most: i32, token: &str) -> Result<(Vec<Volume>, String), Refusal> {
        let most = u32::try_from(most).map_err(|_| Refusal::invalid("max_entries is negative"))?;
        let mut token = token.to_owned();
        let mut all = Vec::new();
        loop {
            let wanted = if most == 0 { PAGE } else { most };
            let (volumes, next) = match self.daemon().volumes(wanted, &token).await {
                // The interface's code for a token that means nothing: the caller begins again.
                Err(refusal) if refusal.class == Class::InvalidArgument && !token.is_empty() => {
                    return Err(Refusal::new(Class::Aborted, "starting_token means nothing"));
                }
                page => page?,
            };
            all.extend(volumes.into_iter().filter(|volume| !volume.is_deleting));
            // A page that held only volumes being deleted is no page.
            if next.is_empty() || (most != 0 && !all.is_empty()) {
                return Ok((all, next));
            }
            token = next;
        }
    }

    /// What is wrong with a volume, as the daemon `own` knows. Of one that another daemon serves it knows nothing bad.
    fn health(volume: &Volume, own: &str) -> Vec<csi::volume_health::VolumeHealthEntry> {
        let is_elsewhere = volume.is_replicated && !volume.head.is_empty() && volume.head != own;
        volume
            .not_served
            .iter()
            .filter(|_| !is_elsewhere)
            .map(|reason| csi::volume_health::VolumeHealthEntry {
                status: csi::VolumeHealthErrorType::Inaccessible.into(),
                reason: "NotServed".to_owned(),
                message: reason.clone(),
            })
            .collect()
    }
}

fn published(volume: &Volume) -> Vec<String> {
    volume
        .publications
        .iter()
        .map(|publication| publication.node_id.clone())
        .collect()
}

fn range(given: Option<csi::CapacityRange>) -> Result<Range, Refusal> {
    given.map_or(Ok(Range::default()), |range| {
        Range::parse(range.required_bytes, range.limit_bytes)
    })
}

/// What an orchestrator asks for, often a default of its own, must not pass over what the class says.
fn one_filesystem(
    capabilities: &[Capability],
    of_class: Option<Filesystem>,
) -> Result<(), Refusal> {
    let Some(of_class) = of_class else {
        return Ok(());
    };
    let mut wanted = capabilities
        .iter()
        .filter_map(|capability| match &capability.access {
            Access::Mount { filesystem, .. } => *filesystem,
            Access::Block => None,
        });
    match wanted.find(|wanted| *wanted != of_class) {
        None => Ok(()),
        Some(wanted) => Err(Refusal::invalid(format!(
            "the class says {}: {of_class} and the capability fs_type {wanted}: leave one out, or make them the same \
             (in Kubernetes fs_type is csi.storage.k8s.io/fstype of the class, or --default-fstype of the provisioner)",
            parameters::FILESYSTEM
        ))),
    }
}

fn create_request(message: csi::CreateVolumeRequest) -> Result<CreateRequest, Refusal> {
    let name = convert::name(&message.name)?;
    let capabilities = convert::capabilities(message.volume_capabilities)?;
    let range = range(message.capacity_range)?;
    if message.volume_content_source.is_some() {
        return Err(Refusal::invalid(
            "volume_content_source: this driver makes empty volumes only",
        ));
    }
    let parameters = convert::map("parameters", message.parameters)?;
    let mutable = convert::map("mutable_parameters", message.mutable_parameters)?;
    let parsed = Parameters::parse(&parameters, &mutable)?;
    one_filesystem(&capabilities, parsed.filesystem)?;
    let mut given = parameters;
    // Kept apart: a class may name a mutable one too.
    given.extend(
        mutable
            .into_iter()
            .map(|(key, value)| (format!("mutable:{key}"), value)),
    );
    let places = message.accessibility_requirements.unwrap_or_default();
    Ok(CreateRequest {
        name,
        range,
        capabilities,
        parameters: parsed,
        given,
        requisite: convert::places(places.requisite)?,
        preferred: convert::places(places.preferred)?,
    })
}

#[tonic::async_trait]
impl csi::controller_server::Controller for Controller {
    async fn create_volume(
        &self,
        request: Request<csi::CreateVolumeRequest>,
    ) -> Answer<csi::CreateVolumeResponse> {
        let waits = patience(request.metadata());
        let wanted = create_request(request.into_inner()).map_err(status)?;
        let key = format!("name {}", wanted.name);
        let created = self
            .change(&key, waits, |operations| async move {
                operations.create(wanted).await
            })
            .await?;
        Ok(Response::new(csi::CreateVolumeResponse {
            volume: Some(convert::volume(
                &created.volume,
                created.context,
                &created.places,
            )),
        }))
    }

    async fn delete_volume(
        &self,
        request: Request<csi::DeleteVolumeRequest>,
    ) -> Answer<csi::DeleteVolumeResponse> {
        let waits = patience(request.metadata());
        let given = request.into_inner().volume_id;
        if let Some(id) = convert::volume_id(&given).map_err(status)? {
            self.change(&given, waits, |operations| async move {
                operations.delete(id).await
            })
            .await?;
        }
        Ok(Response::new(csi::DeleteVolumeResponse {}))
    }

    async fn controller_publish_volume(
        &self,
        request: Request<csi::ControllerPublishVolumeRequest>,
    ) -> Answer<csi::ControllerPublishVolumeResponse> {
        let waits = patience(request.metadata());
        let message = request.into_inner();
        convert::volume_id(&message.volume_id).map_err(status)?;
        let node = convert::node_id(&message.node_id)
            .map_err(status)?
            .to_owned();
        let capability = convert::capability(message.volume_capability).map_err(status)?;
        let id = convert::known_id(&message.volume_id).map_err(status)?;
        let read_only = message.readonly;
        let export = self
            .change(&message.volume_id, waits, |operations| async move {
                operations
                    .publish(id, &node, capability.mode, read_only)
                    .await
            })
            .await?;
        Ok(Response::new(csi::ControllerPublishVolumeResponse {
            publish_context: convert::publish_context(&export),
        }))
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<csi::ControllerUnpublishVolumeRequest>,
    ) -> Answer<csi::ControllerUnpublishVolumeResponse> {
        let waits = patience(request.metadata());
        let message = request.into_inner();
        let id = convert::volume_id(&message.volume_id).map_err(status)?;
        let node = match message.node_id.as_str() {
            "" => None,
            node => Some(convert::node_id(node).map_err(status)?.to_owned()),
        };
        if let Some(id) = id {
            self.change(&message.volume_id, waits, |operations| async move {
                operations.unpublish(id, node.as_deref()).await
            })
            .await?;
        }
        Ok(Response::new(csi::ControllerUnpublishVolumeResponse {}))
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<csi::ValidateVolumeCapabilitiesRequest>,
    ) -> Answer<csi::ValidateVolumeCapabilitiesResponse> {
        let message = request.into_inner();
        convert::volume_id(&message.volume_id).map_err(status)?;
        if message.volume_capabilities.is_empty() {
            return Err(status(Refusal::invalid("volume_capabilities are missing")));
        }
        let id = convert::known_id(&message.volume_id).map_err(status)?;
        let volume = self.operations.volume(id).await.map_err(status)?;
        let judged = judge(&volume, &message);
        Ok(Response::new(match judged {
            Err(message) => csi::ValidateVolumeCapabilitiesResponse {
                confirmed: None,
                message,
            },
            Ok(()) => csi::ValidateVolumeCapabilitiesResponse {
                confirmed: Some(csi::validate_volume_capabilities_response::Confirmed {
                    volume_context: message.volume_context,
                    volume_capabilities: message.volume_capabilities,
                    parameters: message.parameters,
                    mutable_parameters: message.mutable_parameters,
                }),
                message: String::new(),
            },
        }))
    }

    async fn list_volumes(
        &self,
        request: Request<csi::ListVolumesRequest>,
    ) -> Answer<csi::ListVolumesResponse> {
        let message = request.into_inner();
        let (volumes, next_token) = self
            .page(message.max_entries, &message.starting_token)
            .await
            .map_err(status)?;
        let places = self.operations.places().await.map_err(status)?;
        let entries = volumes
            .iter()
            .map(|volume| csi::list_volumes_response::Entry {
                volume: Some(convert::volume(volume, context_of(volume), &places)),
                status: Some(csi::list_volumes_response::VolumeStatus {
                    published_node_ids: published(volume),
                }),
            })
            .collect();
        Ok(Response::new(csi::ListVolumesResponse {
            entries,
            next_token,
        }))
    }

    async fn controller_list_volume_health(
        &self,
        request: Request<csi::ControllerListVolumeHealthRequest>,
    ) -> Answer<csi::ControllerListVolumeHealthResponse> {
        let message = request.into_inner();
        let (volumes, next_token) = self
            .page(message.max_entries, &message.starting_token)
            .await
            .map_err(status)?;
        let own = self.daemon().status().await.map_err(status)?.node;
        let entries = volumes
            .iter()
            .map(|volume| csi::VolumeHealth {
                volume_id: volume.id.to_string(),
                health_statuses: Controller::health(volume, &own),
            })
            .collect();
        Ok(Response::new(csi::ControllerListVolumeHealthResponse {
            entries,
            next_token,
        }))
    }

    async fn controller_get_volume_health(
        &self,
        request: Request<csi::ControllerGetVolumeHealthRequest>,
    ) -> Answer<csi::ControllerGetVolumeHealthResponse> {
        let id = convert::known_id(&request.into_inner().volume_id).map_err(status)?;
        let volume = self.operations.volume(id).await.map_err(status)?;
        let own = self.daemon().status().await.map_err(status)?.node;
        Ok(Response::new(csi::ControllerGetVolumeHealthResponse {
            volume_health: Some(csi::VolumeHealth {
                volume_id: id.to_string(),
                health_statuses: Controller::health(&volume, &own),
            }),
        }))
    }

    async fn get_capacity(
        &self,
        request: Request<csi::GetCapacityRequest>,
    ) -> Answer<csi::GetCapacityResponse> {
        let message = request.into_inner();
        let supported = message
            .volume_capabilities
            .into_iter()
            .try_for_each(|each| convert::capability(Some(each)).map(drop));
        let mut parameters = convert::map("parameters", message.parameters).map_err(status)?;
        // The provisioner takes its own keys out of a class before it creates a volume, but not here.
        parameters.retain(|key, _| !key.starts_with(PROVISIONERS_OWN));
        let parameters = Parameters::parse(&parameters, &std::collections::BTreeMap::new());
        let parameters = parameters.map_err(status)?;
        let is_reachable = match message.accessible_topology {
            None => true,
            Some(topology) if topology.segments.is_empty() => true,
            Some(topology) => {
                let places = self.operations.places().await.map_err(status)?;
                is_within(&places, &topology.segments.into_iter().collect())
            }
        };
        let space = self.operations.space(&parameters).await.map_err(status)?;
        // Nothing can be provisioned for uses that are not supported, or in a place where nobody could use it.
        let available = if supported.is_ok() && is_reachable {
            space.provisionable_bytes
        } else {
            0
        };
        Ok(Response::new(csi::GetCapacityResponse {
            available_capacity: bytes(available),
            maximum_volume_size: Some(bytes(space.volume_max_bytes.min(available))),
            minimum_volume_size: Some(bytes(sizing::MINIMUM_BYTES)),
        }))
    }

    async fn controller_get_capabilities(
        &self,
        _request: Request<csi::ControllerGetCapabilitiesRequest>,
    ) -> Answer<csi::ControllerGetCapabilitiesResponse> {
        let mut can = vec![
            Can::CreateDeleteVolume,
            Can::PublishUnpublishVolume,
            Can::ListVolumes,
            Can::GetCapacity,
            Can::PublishReadonly,
            Can::ExpandVolume,
            Can::ListVolumesPublishedNodes,
            Can::GetVolume,
            Can::SingleNodeMultiWriter,
            Can::ModifyVolume,
        ];
        if self.spec == Spec::V1_13 {
            can.extend([Can::GetVolumeHealth, Can::ListVolumeHealth]);
        }
        let capabilities = can
            .into_iter()
            .map(|kind| csi::ControllerServiceCapability {
                r#type: Some(csi::controller_service_capability::Type::Rpc(
                    csi::controller_service_capability::Rpc {
                        r#type: kind.into(),
                    },
                )),
            })
            .collect();
        Ok(Response::new(csi::ControllerGetCapabilitiesResponse {
            capabilities,
        }))
    }

    async fn create_snapshot(
        &self,
        _request: Request<csi::CreateSnapshotRequest>,
    ) -> Answer<csi::CreateSnapshotResponse> {
        Err(no_snapshots())
    }

    async fn delete_snapshot(
        &self,
        _request: Request<csi::DeleteSnapshotRequest>,
    ) -> Answer<csi::DeleteSnapshotResponse> {
        Err(no_snapshots())
    }

    async fn list_snapshots(
        &self,
        _request: Request<csi::ListSnapshotsRequest>,
    ) -> Answer<csi::ListSnapshotsResponse> {
        Err(no_snapshots())
    }

    async fn get_snapshot(
        &self,
        _request: Request<csi::GetSnapshotRequest>,
    ) -> Answer<csi::GetSnapshotResponse> {
        Err(no_snapshots())
    }

    async fn controller_expand_volume(
        &self,
        request: Request<csi::ControllerExpandVolumeRequest>,
    ) -> Answer<csi::ControllerExpandVolumeResponse> {
        let waits = patience(request.metadata());
        let message = request.into_inner();
        convert::volume_id(&message.volume_id).map_err(status)?;
        let given = message
            .capacity_range
            .ok_or_else(|| status(Refusal::invalid("capacity_range is missing")))?;
        let range = range(Some(given)).map_err(status)?;
        // Absent in calls of older orchestrators.
        if message.volume_capability.is_some() {
            convert::capability(message.volume_capability).map_err(status)?;
        }
        let id = convert::known_id(&message.volume_id).map_err(status)?;
        let size = self
            .change(&message.volume_id, waits, |operations| async move {
                operations.expand(id, range).await
            })
            .await?;
        Ok(Response::new(csi::ControllerExpandVolumeResponse {
            capacity_bytes: bytes(size),
            // A block volume's device has to be told on the node as well.
            node_expansion_required: true,
        }))
    }

    async fn controller_get_volume(
        &self,
        request: Request<csi::ControllerGetVolumeRequest>,
    ) -> Answer<csi::ControllerGetVolumeResponse> {
        let id = convert::known_id(&request.into_inner().volume_id).map_err(status)?;
        let volume = self.operations.volume(id).await.map_err(status)?;
        let places = self.operations.places().await.map_err(status)?;
        Ok(Response::new(csi::ControllerGetVolumeResponse {
            volume: Some(convert::volume(&volume, context_of(&volume), &places)),
            status: Some(csi::controller_get_volume_response::VolumeStatus {
                published_node_ids: published(&volume),
            }),
        }))
    }

    async fn controller_modify_volume(
        &self,
        request: Request<csi::ControllerModifyVolumeRequest>,
    ) -> Answer<csi::ControllerModifyVolumeResponse> {
        let waits = patience(request.metadata());
        let message = request.into_inner();
        let id = convert::known_id(&message.volume_id).map_err(status)?;
        let given =
            convert::map("mutable_parameters", message.mutable_parameters).map_err(status)?;
        self.change(&message.volume_id, waits, |operations| async move {
            operations.modify(id, &given).await
        })
        .await?;
        Ok(Response::new(csi::ControllerModifyVolumeResponse {}))
    }
}

fn no_snapshots() -> Status {
    Status::unimplemented("this driver makes no snapshots")
}

/// Whether a volume can be used in all the ways, with all the parameters.
fn judge(volume: &Volume, message: &csi::ValidateVolumeCapabilitiesRequest) -> Result<(), String> {
    let words = |refusal: Refusal| refusal.message;
    for given in &message.volume_capabilities {
        let capability: Capability = convert::capability(Some(given.clone())).map_err(words)?;
        if let Some(why) = unsupported(volume, &capability) {
            return Err(why);
        }
    }
    let context = context_of(volume);
    for (key, value) in &message.volume_context {
        if context.get(key) != Some(value) {
            return Err(format!("volume_context: {key} is not the volume's"));
        }
    }
    let parameters = convert::map("parameters", message.parameters.clone()).map_err(words)?;
    let mutable =
        convert::map("mutable_parameters", message.mutable_parameters.clone()).map_err(words)?;
    let parsed = Parameters::parse(&parameters, &mutable).map_err(words)?;
    for (key, value) in &parameters {
        if !parsed.metadata.contains_key(key) && parameter(volume, key) != Some(value) {
            return Err(format!(
                "parameters: the volume was not made with {key} = {value}"
            ));
        }
    }
    let wanted = Mutable::parse(&mutable).map_err(words)?;
    let has = volume.limits;
    for (key, wanted, has) in [
        (IOPS, wanted.iops, has.iops),
        (
            BYTES_PER_SECOND,
            wanted.bytes_per_second,
            has.bytes_per_second,
        ),
    ] {
        if wanted.is_some_and(|wanted| wanted != has) {
            return Err(format!("mutable_parameters: {key} of the volume is {has}"));
        }
    }
    Ok(())
}
