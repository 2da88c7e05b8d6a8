//! The volume that tests of records begin with.

use uuid::Uuid;

use super::{Placement, Revision, Versioned, VolumeName, VolumeRecord};
use crate::units::{Epoch, LayerId, StoreId, VolumeId};

/// Two blocks on one store, opened twice.
pub(super) fn volume() -> VolumeRecord {
    VolumeRecord {
        epoch: Epoch(2),
        ..VolumeRecord::new(
            VolumeId(Uuid::from_u128(1)),
            VolumeName::parse("db").expect("name"),
            8192,
            LayerId(3),
            Placement {
                stores: vec![StoreId(Uuid::from_u128(7))],
                sets: Vec::new(),
            },
        )
    }
}

/// The same as it was read.
pub(super) fn read_volume() -> Versioned<VolumeRecord> {
    Versioned {
        record: volume(),
        changed_at: Revision(1),
    }
}
