//! Volumes on their way from creation to a workload and back, and the ways of using them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use ashlar_csi::csi;
use ashlar_csi::csi::volume_capability::access_mode::Mode;
use ashlar_csi::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};

use super::{Answer, Calls};

pub fn text(path: &Path) -> String {
    path.to_str().expect("a UTF-8 path").to_owned()
}

pub fn strings(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    let pairs = pairs.iter();
    pairs
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

/// A capability to mount, with the file system asked for.
pub fn mounted(fs_type: &str, mode: Mode) -> csi::VolumeCapability {
    csi::VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Mount(MountVolume {
            fs_type: fs_type.to_owned(),
            ..Default::default()
        })),
    }
}

/// A capability to use the raw device.
pub fn raw(mode: Mode) -> csi::VolumeCapability {
    csi::VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Block(BlockVolume {})),
    }
}

/// One volume on its way from creation to a workload and back.
pub struct Claim {
    pub id: String,
    pub capability: csi::VolumeCapability,
    pub publish_context: HashMap<String, String>,
    pub volume_context: HashMap<String, String>,
    pub staging: PathBuf,
    pub target: PathBuf,
}

impl Claim {
    /// Created and published to the node.
    pub fn new(driver: &Calls, name: &str, size: i64, capability: csi::VolumeCapability) -> Claim {
        let mut claim = Claim::unpublished(driver, name, size, capability);
        claim.publish_context = claim.controller_publish(driver, false).expect("published");
        claim
    }

    /// Created.
    pub fn unpublished(
        driver: &Calls,
        name: &str,
        size: i64,
        capability: csi::VolumeCapability,
    ) -> Claim {
        Claim::of_class(driver, name, size, capability, &[]).expect("created")
    }

    /// Created with the parameters of a class, or why not.
    pub fn of_class(
        driver: &Calls,
        name: &str,
        size: i64,
        capability: csi::VolumeCapability,
        parameters: &[(&str, &str)],
    ) -> Answer<Claim> {
        let volume = driver.create(csi::CreateVolumeRequest {
            name: name.to_owned(),
            capacity_range: Some(csi::CapacityRange {
                required_bytes: size,
                limit_bytes: 0,
            }),
            volume_capabilities: vec![capability.clone()],
            parameters: strings(parameters),
            ..Default::default()
        })?;
        let claim = Claim {
            id: volume.volume_id,
            capability,
            publish_context: HashMap::new(),
            volume_context: volume.volume_context,
            staging: driver.root().join(format!("staging-{name}")),
            target: driver.root().join(format!("target-{name}")),
        };
        fs::create_dir_all(&claim.staging).expect("a staging directory");
        Ok(claim)
    }

    /// The same volume where another node has it, published to nobody there yet.
    pub fn on(&self, driver: &Calls) -> Claim {
        let moved = |path: &Path| driver.root().join(path.file_name().expect("a name"));
        let claim = Claim {
            id: self.id.clone(),
            capability: self.capability.clone(),
            publish_context: self.publish_context.clone(),
            volume_context: self.volume_context.clone(),
            staging: moved(&self.staging),
            target: moved(&self.target),
        };
        fs::create_dir_all(&claim.staging).expect("a staging directory");
        claim
    }

    /// Published to a node by the driver of another.
    pub fn publish_to(&self, driver: &Calls, node: &str) -> Answer<HashMap<String, String>> {
        driver.controller_publish(csi::ControllerPublishVolumeRequest {
            volume_id: self.id.clone(),
            node_id: node.to_owned(),
            volume_capability: Some(self.capability.clone()),
            ..Default::default()
        })
    }

    pub fn controller_publish(
        &self,
        driver: &Calls,
        readonly: bool,
    ) -> Answer<HashMap<String, String>> {
        driver.controller_publish(csi::ControllerPublishVolumeRequest {
            volume_id: self.id.clone(),
            node_id: driver.node_id().to_owned(),
            volume_capability: Some(self.capability.clone()),
            readonly,
            ..Default::default()
        })
    }

    pub fn stage(&self, driver: &Calls) -> Answer<()> {
        let request = csi::NodeStageVolumeRequest {
            volume_id: self.id.clone(),
            publish_context: self.publish_context.clone(),
            staging_target_path: text(&self.staging),
            volume_capability: Some(self.capability.clone()),
            volume_context: self.volume_context.clone(),
            ..Default::default()
        };
        driver.stage(request).map(drop)
    }

    pub fn publish_at(&self, driver: &Calls, target: &Path, readonly: bool) -> Answer<()> {
        let request = csi::NodePublishVolumeRequest {
            volume_id: self.id.clone(),
            publish_context: self.publish_context.clone(),
            staging_target_path: text(&self.staging),
            target_path: text(target),
            volume_capability: Some(self.capability.clone()),
            readonly,
            volume_context: self.volume_context.clone(),
            ..Default::default()
        };
        driver.publish(request).map(drop)
    }

    pub fn publish(&self, driver: &Calls) -> Answer<()> {
        self.publish_at(driver, &self.target, false)
    }

    pub fn unpublish(&self, driver: &Calls) -> Answer<()> {
        driver.unpublish(&self.id, &self.target).map(drop)
    }

    pub fn unstage(&self, driver: &Calls) -> Answer<()> {
        driver.unstage(&self.id, &self.staging).map(drop)
    }

    pub fn controller_unpublish(&self, driver: &Calls) -> Answer<()> {
        driver
            .controller_unpublish(&self.id, driver.node_id())
            .map(drop)
    }

    /// All the way to a workload.
    pub fn bring_up(&self, driver: &Calls) {
        self.stage(driver).expect("staged");
        self.publish(driver).expect("published");
    }

    /// All the way back, and deleted.
    pub fn take_away(&self, driver: &Calls) {
        self.unpublish(driver).expect("unpublished");
        self.unstage(driver).expect("unstaged");
        self.controller_unpublish(driver)
            .expect("taken from the node");
        driver.delete(&self.id).expect("deleted");
    }
}
