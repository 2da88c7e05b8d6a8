//! Ways of using a volume.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::mount_options;

/// A file system this driver makes, checks and grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filesystem {
    /// The default.
    Ext4,
    /// Needs volumes of at least [`Filesystem::minimum_bytes`].
    Xfs,
}

impl Filesystem {
    /// The name mount(8) and blkid(8) know it by.
    pub fn name(self) -> &'static str {
        match self {
            Filesystem::Ext4 => "ext4",
            Filesystem::Xfs => "xfs",
        }
    }

    /// The smallest volume it fits on. mkfs.xfs refuses less than 300 MiB since xfsprogs 5.19; an ext4 with a journal
    /// wants 2048 blocks of 1 KiB for it, and has room left for data in 8 MiB.
    pub fn minimum_bytes(self) -> u64 {
        match self {
            Filesystem::Ext4 => 8 << 20,
            Filesystem::Xfs => 300 << 20,
        }
    }
}

impl fmt::Display for Filesystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Filesystem {
    type Err = String;

    fn from_str(text: &str) -> Result<Filesystem, String> {
        match text {
            "ext4" => Ok(Filesystem::Ext4),
            "xfs" => Ok(Filesystem::Xfs),
            other => Err(format!(
                "file system {other:?} is not supported; ext4 and xfs are"
            )),
        }
    }
}

/// Who may use a volume at the same time, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccessMode {
    /// One node reads and writes.
    SingleNodeWriter,
    /// One node reads.
    SingleNodeReaderOnly,
    /// Many nodes read.
    MultiNodeReaderOnly,
    /// One workload on one node reads and writes.
    SingleNodeSingleWriter,
    /// Many workloads on one node read and write.
    SingleNodeMultiWriter,
}

impl AccessMode {
    /// True when nobody may write.
    pub fn is_reader_only(self) -> bool {
        matches!(
            self,
            AccessMode::SingleNodeReaderOnly | AccessMode::MultiNodeReaderOnly
        )
    }

    /// True when more than one node may use it.
    pub fn is_multi_node(self) -> bool {
        matches!(self, AccessMode::MultiNodeReaderOnly)
    }

    /// True when a volume may be published at more than one target path of a node.
    pub fn allows_several_targets(self) -> bool {
        matches!(
            self,
            AccessMode::MultiNodeReaderOnly | AccessMode::SingleNodeMultiWriter
        )
    }

    /// The interface's name.
    pub fn name(self) -> &'static str {
        match self {
            AccessMode::SingleNodeWriter => "SINGLE_NODE_WRITER",
            AccessMode::SingleNodeReaderOnly => "SINGLE_NODE_READER_ONLY",
            AccessMode::MultiNodeReaderOnly => "MULTI_NODE_READER_ONLY",
            AccessMode::SingleNodeSingleWriter => "SINGLE_NODE_SINGLE_WRITER",
            AccessMode::SingleNodeMultiWriter => "SINGLE_NODE_MULTI_WRITER",
        }
    }
}

/// How the volume appears to a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// As a block device.
    Block,
    /// As a directory.
    Mount {
        /// The file system asked for; `None` leaves it to the volume.
        filesystem: Option<Filesystem>,
        /// For mount(8), in the order given. May be sensitive: never logged.
        options: Vec<String>,
    },
}

/// One way of using a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capability {
    /// How it appears.
    pub access: Access,
    /// Who may use it.
    pub mode: AccessMode,
}

impl Capability {
    /// Whether what is staged takes no writes, for its mode or for its mount options.
    pub fn is_mounted_read_only(&self) -> bool {
        let by_option = match &self.access {
            Access::Block => false,
            Access::Mount { options, .. } => mount_options::is_read_only(options),
        };
        by_option || self.mode.is_reader_only()
    }
}
