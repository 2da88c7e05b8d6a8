//! Ashlar's CSI driver.
//!
//! * [`node`]: attaching, formatting, mounting and undoing it, without any orchestrator's protocol
//! * [`attach`]: making a block device of an NBD export
//! * [`controller`]: what a volume of an orchestrator's is in the daemon's terms
//! * [`service`]: the Container Storage Interface over both
//! * [`frontend`]: FlexVolume and Docker's volume plugins over both
//! * [`daemon`]: the daemon as the driver asks it things

pub mod address;
pub mod attach;
pub mod capability;
pub mod child;
pub mod controller;
pub mod daemon;
pub mod failpoint;
pub mod frontend;
pub mod mount_options;
pub mod mountinfo;
pub mod node;
pub mod operations;
pub mod paths;
pub mod refusal;
pub mod run;
pub mod service;
pub mod stored;
pub mod sysfs;

/// `csi.v1`: messages and server traits of the Container Storage Interface.
pub mod csi {
    #![allow(clippy::all, unreachable_pub)]
    tonic::include_proto!("csi.v1");
}
