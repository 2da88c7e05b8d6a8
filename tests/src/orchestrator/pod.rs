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
            Data::Mounted(filesystem, _) => mounted(filesystem, Mode::SingleNodeMultiWriter),
            Data::Raw(_) => raw(Mode::SingleNodeMultiWriter),
        }
    }

    /// Panics when something of an earlier pod is missing or wrong; an error is the device's.
    pub(super) fn check(&mut self, target: &Path) -> io::Result<()> {
        match self {
            Data::Mounted(_, files) => files.check(target),
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
