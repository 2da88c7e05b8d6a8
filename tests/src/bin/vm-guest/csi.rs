//! An orchestrator's calls to the CSI driver, one a run. What a call needs of earlier ones is kept in a file per claim.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use ashlar_csi::csi::controller_client::ControllerClient;
use ashlar_csi::csi::node_client::NodeClient;
use ashlar_csi::csi::volume_capability::access_mode::Mode;
use ashlar_csi::csi::{
    CapacityRange, ControllerExpandVolumeRequest, ControllerPublishVolumeRequest,
    ControllerUnpublishVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest,
    NodeExpandVolumeRequest, NodePublishVolumeRequest, NodeStageVolumeRequest,
    NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest, VolumeCapability,
};
use ashlar_tests::csi::{mounted, raw};
use serde::{Deserialize, Serialize};
use tonic::transport::Endpoint;

use crate::{option, wanted};

/// As long as the kubelet waits for an answer.
const CALL_LIMIT: Duration = Duration::from_secs(120);
const CLAIMS: &str = "/run/claims";
const KUBELET: &str = "/var/lib/kubelet";

/// What an orchestrator remembers of a volume.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Claim {
    name: String,
    /// A file system, or `block`.
    kind: String,
    id: String,
    volume_context: HashMap<String, String>,
    publish_context: HashMap<String, String>,
}

impl Claim {
    fn file(name: &str) -> PathBuf {
        PathBuf::from(CLAIMS).join(name)
    }

    fn load(name: &str) -> anyhow::Result<Claim> {
        let text = std::fs::read_to_string(Claim::file(name)).context("no such claim")?;
        Ok(serde_json::from_str(&text)?)
    }

    fn save(&self) -> anyhow::Result<()> {
        std::fs::create_dir_all(CLAIMS)?;
        Ok(std::fs::write(
            Claim::file(&self.name),
            serde_json::to_vec(self)?,
        )?)
    }

    fn capability(&self) -> VolumeCapability {
        match self.kind.as_str() {
            "block" => raw(Mode::SingleNodeWriter),
            filesystem => mounted(filesystem, Mode::SingleNodeWriter),
        }
    }

    fn staging(&self) -> String {
        format!("{KUBELET}/staging/{}", self.name)
    }

    fn target(&self) -> String {
        format!("{KUBELET}/pods/{}", self.name)
    }
}

/// `CALL --name NAME --endpoint SOCKET --node NODE …`
pub(super) fn run(words: &[&str]) -> anyhow::Result<()> {
    let (call, rest) = words.split_first().context("which call?")?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(answer(call, rest))
}

async fn answer(call: &str, words: &[&str]) -> anyhow::Result<()> {
    let socket: String = wanted(words, "endpoint")?;
    let name: String = wanted(words, "name")?;
    let node_id: String = wanted(words, "node")?;
    let channel = Endpoint::from_shared(format!("unix:{socket}"))?
        .timeout(CALL_LIMIT)
        .connect()
        .await?;
    let mut controller = ControllerClient::new(channel.clone());
    let mut node = NodeClient::new(channel);
    if call == "create" {
        let mut claim = Claim {
            name,
            kind: wanted(words, "kind")?,
            ..Claim::default()
        };
        let request = CreateVolumeRequest {
            name: claim.name.clone(),
            capacity_range: range(words)?,
            volume_capabilities: vec![claim.capability()],
            ..Default::default()
        };
        let volume = controller.create_volume(request).await?.into_inner().volume;
        let volume = volume.context("an answer without a volume")?;
        println!("{}", volume.volume_id);
        claim.id = volume.volume_id;
        claim.volume_context = volume.volume_context;
        return claim.save();
    }
    let mut claim = Claim::load(&name)?;
    let volume_id = claim.id.clone();
    match call {
        "controller-publish" => {
            let request = ControllerPublishVolumeRequest {
                volume_id,
                node_id,
                volume_capability: Some(claim.capability()),
                ..Default::default()
            };
            let answer = controller.controller_publish_volume(request).await?;
            claim.publish_context = answer.into_inner().publish_context;
            claim.save()?;
        }
        "stage" => {
            // The orchestrator makes the directory.
            std::fs::create_dir_all(claim.staging())?;
            let request = NodeStageVolumeRequest {
                volume_id,
                publish_context: claim.publish_context.clone(),
                staging_target_path: claim.staging(),
                volume_capability: Some(claim.capability()),
                volume_context: claim.volume_context.clone(),
                ..Default::default()
            };
            node.node_stage_volume(request).await?;
        }
        "publish" => {
            std::fs::create_dir_all(format!("{KUBELET}/pods"))?;
            let request = NodePublishVolumeRequest {
                volume_id,
                publish_context: claim.publish_context.clone(),
                staging_target_path: claim.staging(),
                target_path: claim.target(),
                volume_capability: Some(claim.capability()),
                volume_context: claim.volume_context.clone(),
                ..Default::default()
            };
            node.node_publish_volume(request).await?;
        }
        "expand" => {
            let request = ControllerExpandVolumeRequest {
                volume_id: volume_id.clone(),
                capacity_range: range(words)?,
                volume_capability: Some(claim.capability()),
                ..Default::default()
            };
            let answer = controller
                .controller_expand_volume(request)
                .await?
                .into_inner();
            println!("{}", answer.capacity_bytes);
            if answer.node_expansion_required {
                let request = NodeExpandVolumeRequest {
                    volume_id,
                    volume_path: claim.target(),
                    staging_target_path: claim.staging(),
                    capacity_range: range(words)?,
                    volume_capability: Some(claim.capability()),
                    ..Default::default()
                };
                node.node_expand_volume(request).await?;
            }
        }
        "unpublish" => {
            let request = NodeUnpublishVolumeRequest {
                volume_id,
                target_path: claim.target(),
            };
            node.node_unpublish_volume(request).await?;
        }
        "unstage" => {
            let request = NodeUnstageVolumeRequest {
                volume_id,
                staging_target_path: claim.staging(),
            };
            node.node_unstage_volume(request).await?;
        }
        "controller-unpublish" => {
            let request = ControllerUnpublishVolumeRequest {
                volume_id,
                node_id,
                ..Default::default()
            };
            controller.controller_unpublish_volume(request).await?;
        }
        "delete" => {
            let request = DeleteVolumeRequest {
                volume_id,
                ..Default::default()
            };
            controller.delete_volume(request).await?;
        }
        other => bail!("{other}: no such call"),
    }
    Ok(())
}

fn range(words: &[&str]) -> anyhow::Result<Option<CapacityRange>> {
    let required_bytes = option(words, "size")
        .context("--size is missing")?
        .parse()?;
    Ok(Some(CapacityRange {
        required_bytes,
        limit_bytes: 0,
    }))
}
