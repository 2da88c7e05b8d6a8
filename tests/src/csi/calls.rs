//! The calls of an orchestrator to one driver.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ashlar_csi::csi;
use ashlar_csi::csi::controller_client::ControllerClient;
use ashlar_csi::csi::identity_client::IdentityClient;
use ashlar_csi::csi::node_client::NodeClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::claim::{strings, text};

/// Longest call: as long as the kubelet waits.
const CALL_LIMIT: Duration = Duration::from_secs(120);

/// What a call was answered: the message, or the code and its words.
pub type Answer<T> = Result<T, (Code, String)>;

/// A driver as an orchestrator sees it; cheap to clone, and good for as long as the driver's place is.
#[derive(Clone)]
pub struct Calls {
    socket: PathBuf,
    root: PathBuf,
    node_id: String,
    limit: Duration,
    runtime: Arc<tokio::runtime::Runtime>,
}

impl Calls {
    pub(super) fn new(socket: PathBuf, root: PathBuf, node_id: &str) -> Calls {
        Calls {
            socket,
            root,
            node_id: node_id.to_owned(),
            limit: CALL_LIMIT,
            runtime: Arc::new(
                tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(2)
                    .enable_all()
                    .build()
                    .expect("a runtime"),
            ),
        }
    }

    /// The same for a caller who gives up sooner.
    pub fn within(&self, limit: Duration) -> Calls {
        Calls {
            limit,
            ..self.clone()
        }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Below which the orchestrator's paths lie.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A connection, made when it is first used.
    pub fn channel(&self) -> Channel {
        let _inside = self.runtime.enter();
        Endpoint::from_shared(format!("unix:{}", self.socket.display()))
            .expect("an address")
            .timeout(self.limit)
            .connect_lazy()
    }

    /// Runs many calls at once.
    pub fn together<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    pub fn node_id(&self) -> &str {
        &self.node_id
    }

    /// Runs a call, whatever thread it comes from.
    pub fn call<T, F>(&self, work: impl FnOnce(Channel) -> F) -> Answer<T>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let channel = self.channel();
        match self.runtime.block_on(work(channel)) {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => {
                assert!(status.details().is_empty(), "details must be empty");
                assert!(
                    !status.message().is_empty(),
                    "{:?} without words",
                    status.code()
                );
                Err((status.code(), status.message().to_owned()))
            }
        }
    }

    pub fn plugin_info(&self) -> Answer<csi::GetPluginInfoResponse> {
        self.call(|channel| async move {
            IdentityClient::new(channel)
                .get_plugin_info(csi::GetPluginInfoRequest {})
                .await
        })
    }

    pub fn probe(&self) -> Answer<Option<bool>> {
        let answer = self.call(|channel| async move {
            IdentityClient::new(channel)
                .probe(csi::ProbeRequest {})
                .await
        })?;
        Ok(answer.ready)
    }

    pub fn node_info(&self) -> Answer<csi::NodeGetInfoResponse> {
        self.call(|channel| async move {
            NodeClient::new(channel)
                .node_get_info(csi::NodeGetInfoRequest {})
                .await
        })
    }

    /// GetCapacity for a class with these parameters.
    pub fn space(&self, parameters: &[(&str, &str)]) -> Answer<i64> {
        let parameters = parameters
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let request = csi::GetCapacityRequest {
            parameters: parameters.collect(),
            ..Default::default()
        };
        let answer = self.call(|channel| async move {
            ControllerClient::new(channel).get_capacity(request).await
        })?;
        Ok(answer.available_capacity)
    }

    /// ValidateVolumeCapabilities: what is confirmed, or why nothing is.
    pub fn validate(
        &self,
        id: &str,
        capability: csi::VolumeCapability,
        parameters: &[(&str, &str)],
        mutable: &[(&str, &str)],
    ) -> Answer<Result<csi::validate_volume_capabilities_response::Confirmed, String>> {
        let request = csi::ValidateVolumeCapabilitiesRequest {
            volume_id: id.to_owned(),
            volume_capabilities: vec![capability],
            parameters: strings(parameters),
            mutable_parameters: strings(mutable),
            ..Default::default()
        };
        let answer = self.call(|channel| async move {
            ControllerClient::new(channel)
                .validate_volume_capabilities(request)
                .await
        })?;
        Ok(answer.confirmed.ok_or(answer.message))
    }

    pub fn expand(&self, id: &str, size: i64) -> Answer<csi::ControllerExpandVolumeResponse> {
        let request = csi::ControllerExpandVolumeRequest {
            volume_id: id.to_owned(),
            capacity_range: Some(csi::CapacityRange {
                required_bytes: size,
                limit_bytes: 0,
            }),
            ..Default::default()
        };
        self.call(|channel| async move {
            ControllerClient::new(channel)
                .controller_expand_volume(request)
                .await
        })
    }

    pub fn modify(
        &self,
        id: &str,
        parameters: &[(&str, &str)],
    ) -> Answer<csi::ControllerModifyVolumeResponse> {
        let request = csi::ControllerModifyVolumeRequest {
            volume_id: id.to_owned(),
            mutable_parameters: strings(parameters),
            ..Default::default()
        };
        self.call(|channel| async move {
            ControllerClient::new(channel)
                .controller_modify_volume(request)
                .await
        })
    }

    /// For which reasons the node says that something is wrong with a volume.
    pub fn node_health(&self, id: &str) -> Answer<Vec<String>> {
        let request = csi::NodeGetVolumeHealthRequest {
            volume_id: id.to_owned(),
            ..Default::default()
        };
        let asked = |channel| async move {
            NodeClient::new(channel)
                .node_get_volume_health(request)
                .await
        };
        let health = self.call(asked)?.volume_health.expect("a volume's health");
        let entries = health.health_statuses.into_iter();
        Ok(entries.map(|entry| entry.reason).collect())
    }

    /// What the controller says is wrong with a volume.
    pub fn health(&self, id: &str) -> Answer<Vec<String>> {
        let request = csi::ControllerGetVolumeHealthRequest {
            volume_id: id.to_owned(),
            ..Default::default()
        };
        let answer = self.call(|channel| async move {
            ControllerClient::new(channel)
                .controller_get_volume_health(request)
                .await
        })?;
        let health = answer.volume_health.expect("a volume's health");
        let entries = health.health_statuses.into_iter();
        Ok(entries.map(|entry| entry.message).collect())
    }

    pub fn create(&self, request: csi::CreateVolumeRequest) -> Answer<csi::Volume> {
        let answer = self.call(|channel| async move {
            ControllerClient::new(channel).create_volume(request).await
        })?;
        Ok(answer.volume.expect("an answer has its volume"))
    }

    pub fn delete(&self, id: &str) -> Answer<csi::DeleteVolumeResponse> {
        let request = csi::DeleteVolumeRequest {
            volume_id: id.to_owned(),
            ..Default::default()
        };
        self.call(
            |channel| async move { ControllerClient::new(channel).delete_volume(request).await },
        )
    }

    pub fn controller_publish(
        &self,
        request: csi::ControllerPublishVolumeRequest,
    ) -> Answer<HashMap<String, String>> {
        let answer = self.call(|channel| async move {
            ControllerClient::new(channel)
                .controller_publish_volume(request)
                .await
        })?;
        Ok(answer.publish_context)
    }

    pub fn controller_unpublish(
        &self,
        id: &str,
        node: &str,
    ) -> Answer<csi::ControllerUnpublishVolumeResponse> {
        let request = csi::ControllerUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            node_id: node.to_owned(),
            ..Default::default()
        };
        self.call(|channel| async move {
            ControllerClient::new(channel)
                .controller_unpublish_volume(request)
                .await
        })
    }

    pub fn stage(
        &self,
        request: csi::NodeStageVolumeRequest,
    ) -> Answer<csi::NodeStageVolumeResponse> {
        self.call(
            |channel| async move { NodeClient::new(channel).node_stage_volume(request).await },
        )
    }

    pub fn unstage(&self, id: &str, staging: &Path) -> Answer<csi::NodeUnstageVolumeResponse> {
        let request = csi::NodeUnstageVolumeRequest {
            volume_id: id.to_owned(),
            staging_target_path: text(staging),
        };
        self.call(
            |channel| async move { NodeClient::new(channel).node_unstage_volume(request).await },
        )
    }

    pub fn publish(
        &self,
        request: csi::NodePublishVolumeRequest,
    ) -> Answer<csi::NodePublishVolumeResponse> {
        self.call(
            |channel| async move { NodeClient::new(channel).node_publish_volume(request).await },
        )
    }

    pub fn unpublish(&self, id: &str, target: &Path) -> Answer<csi::NodeUnpublishVolumeResponse> {
        let request = csi::NodeUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            target_path: text(target),
        };
        self.call(|channel| async move {
            NodeClient::new(channel)
                .node_unpublish_volume(request)
                .await
        })
    }
}
