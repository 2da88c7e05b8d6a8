//! A pod: it finds what pods before it were answered, and adds to it.

use std::io;
use std::path::Path;

use crate::csi::csi;
use crate::csi::csi::volume_capability::access_mode::Mode;
use crate::csi::{mounted, raw};
use crate::seed::Rng;
use crate::workload::{Blocks, Files, direct};

/// Blocks of a raw volume that are used.
const BLOCKS: u64 = 64;
/// What statfs(2) calls an xfs.
const XFS: rustix::fs::FsWord = 0x5846_5342;

/// What pods know of their volume.
#[derive(Debug)]
pub(super) enum Data {
    /// A file system of this type.
    Mounted(&'static str, Files),
    /// A device.
    Raw(Blocks),
}

impl Data {
    pub(super) fn mounted(filesystem: &'static str, volume: u64) -> Data {
        Data::Mounted(filesystem, Files::new(volume))
    }

    pub(super) fn raw(volume: u64) -> Data {
        Data::Raw(Blocks::new(volume, 0, BLOCKS))
    }

    pub(super) fn is_xfs(&self) -> bool {
        matches!(self, Data::Mounted("xfs", _))
    }

    pub(super) fn capability(&self) -> csi::VolumeCapability {
        match self {
            Data::Mounted(_, _) => mounted(self.class().0, Mode::SingleNodeMultiWriter),
            Data::Raw(_) => raw(Mode::SingleNodeMultiWriter),
        }
    }

    /// The class of the volume: `csi.storage.k8s.io/fstype`, which the external provisioner takes for the file system of the
    /// capability and leaves that empty without it; and the parameters that it hands on.
    pub(super) fn class(&self) -> (&'static str, &'static [(&'static str, &'static str)]) {
        match self {
            Data::Mounted("xfs", _) => ("", &[("filesystem", "xfs")]),
            Data::Mounted(filesystem, _) => (filesystem, &[]),
            Data::Raw(_) => ("", &[]),
        }
    }

    /// Panics when something of an earlier pod is missing or wrong; an error is the device's.
    pub(super) fn check(&mut self, target: &Path) -> io::Result<()> {
        match self {
            Data::Mounted(filesystem, files) => {
                let found = rustix::fs::statfs(target)?.f_type;
                assert_eq!(found == XFS, *filesystem == "xfs", "type {found:#x}");
                files.check(target)
            }
            Data::Raw(blocks) => blocks.check(&direct(target)?).map(drop),
        }
    }

    /// Adds `count` pieces, as far as the device takes them.
    pub(super) fn add(&mut self, target: &Path, count: u64, rng: &mut Rng) -> io::Result<()> {
        match self {
            Data::Mounted(_, files) => (0..count).try_for_each(|_| files.write(target)),
            Data::Raw(blocks) => {
                let device = direct(target)?;
                (0..count).try_for_each(|_| blocks.write(&device, rng))
            }
        }
    }
}
