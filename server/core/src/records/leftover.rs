//! What a store is left with of a replica set that it does not belong to any more.
//!
//! The note is written by the very transaction that takes the replica out of its set, and goes when the store has given
//! the blocks back. While it is there, the store is not made a replica of that set again: otherwise what is filled could
//! be given back with what was left.

use serde::{Deserialize, Serialize};

use super::{Record, SetIndex, VolumeRecord, keys};
use crate::units::{ChunkIndex, LayerId, NodeId, StoreId, VolumeId};

/// See the module text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeftoverRecord {
    /// Of which volume. It may be gone by now.
    pub volume: VolumeId,
    /// Which of its sets.
    pub set: u16,
    /// How many it has: chunk `c` is of set `c mod sets`.
    pub sets: u16,
    /// Its layers.
    pub layers: Vec<LayerId>,
    /// On which daemon.
    pub node: NodeId,
    /// In which store.
    pub store: StoreId,
}

impl Record for LeftoverRecord {}

impl LeftoverRecord {
    /// What is left in a store of one set of a volume.
    pub fn of(
        volume: &VolumeRecord,
        set: SetIndex,
        node: NodeId,
        store: StoreId,
    ) -> LeftoverRecord {
        LeftoverRecord {
            volume: volume.id,
            set: set.0,
            // A placement has far fewer entries.
            sets: volume.placement.sets.len() as u16,
            layers: volume.layers.clone(),
            node,
            store,
        }
    }

    /// Its key.
    pub fn key(&self) -> String {
        keys::leftover(self.volume, SetIndex(self.set), self.store)
    }

    /// Whether a chunk of the volume is part of it.
    pub fn has(&self, chunk: ChunkIndex) -> bool {
        chunk.0 % u32::from(self.sets.max(1)) == u32::from(self.set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn the_stored_form_and_its_chunks() {
        let id = Uuid::from_u128(1);
        let left = LeftoverRecord {
            volume: VolumeId(id),
            set: 2,
            sets: 3,
            layers: vec![LayerId(7)],
            node: NodeId(id),
            store: StoreId(id),
        };
        let text = String::from_utf8(left.encode()).expect("JSON");
        let one = "00000000-0000-0000-0000-000000000001";
        assert_eq!(
            text,
            format!(
                r#"{{"volume":"{one}","set":2,"sets":3,"layers":[7],"node":"{one}","store":"{one}"}}"#
            )
        );
        assert_eq!(left.key(), format!("leftovers/{one}/2/{one}"));
        let of: Vec<u32> = (0..9).filter(|c| left.has(ChunkIndex(*c))).collect();
        assert_eq!(of, [2, 5, 8]);
    }
}
