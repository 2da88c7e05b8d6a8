//! What the metadata store holds: one JSON object a key.
//!
//! JSON because records are few, changed seldom, read by people in a bad hour, and gain fields over the years: a field
//! added later has a default, and an unknown field is refused, so that an older daemon never drops what a newer one
//! wrote by writing the record back without it.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

use super::publication::{self, Publication};
use super::{
    Filesystem, Replica, ReplicaSet, SetIndex, VolumeLimits, VolumeName, Zones, default_min_in_sync,
};
use crate::placement::{StoreSpace, deal};
use crate::units::{ChunkIndex, Epoch, LayerId, NodeId, StoreId, Version, VolumeId};

/// Something kept in the metadata store.
pub trait Record: Serialize + DeserializeOwned {
    /// The bytes to store.
    fn encode(&self) -> Vec<u8> {
        // A record is made of numbers, strings, lists and options: serialising it into memory has no way to fail.
        serde_json::to_vec(self).expect("records serialise")
    }

    /// Reads stored bytes; never panics on any of them.
    fn decode(key: &str, bytes: &[u8]) -> Result<Self, DecodeError> {
        serde_json::from_slice(bytes).map_err(|error| DecodeError {
            key: key.to_owned(),
            reason: error.to_string(),
        })
    }
}

/// A record that this version cannot read: damaged, or written by a newer version.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "the metadata record {key:?} cannot be read by this version ({reason}); it is damaged or was written by a newer version"
)]
pub struct DecodeError {
    /// Whose record.
    pub key: String,
    /// What the decoder met.
    pub reason: String,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRecord {
    /// Its identity, for ever.
    pub id: VolumeId,
    /// Its name; the record `names/<name>` holds the name for it.
    pub name: VolumeName,
    /// Bytes, a multiple of a block.
    pub size_bytes: u64,
    /// The live layer first, then its parents. Never empty.
    pub layers: Vec<LayerId>,
    /// Copies of each chunk that there should be.
    pub replicas: u32,
    /// Copies that must be in sync for a write to be answered; see [`default_min_in_sync`].
    /// Absent in records of unreplicated volumes, where it is 1.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub min_in_sync: u32,
    /// Where its copies may lie.
    #[serde(default, skip_serializing_if = "Zones::are_all")]
    pub zones: Zones,
    /// Raised whenever acknowledged writes may be gone because the store, or every copy, lost power: clients that were
    /// connected under a smaller number must not go on as if nothing had happened.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub client_generation: u64,
    /// Every block whose newest version is below this is the same on all replicas in sync. Only what is at or above it
    /// has to be compared when a head takes over. Zero: nothing is known.
    #[serde(default, skip_serializing_if = "is_none_yet")]
    pub settled: Version,
    /// Served read-only.
    pub read_only: bool,
    /// Every acknowledgement waits for durability.
    pub write_through: bool,
    /// The last claimed epoch; zero before the first claim.
    pub epoch: Epoch,
    /// Who claimed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<HeadClaim>,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_at_unix_ms: u64,
    /// Whether it is being deleted.
    pub state: VolumeState,
    /// Where its chunks lie.
    pub placement: Placement,
    /// No change of any block was ever let through to a store. False when that is not known: records of older versions
    /// do not say.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub never_written: bool,
    /// The filesystem that was made on it, or begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<Filesystem>,
    /// Bounds on what its clients may ask of it.
    #[serde(default, skip_serializing_if = "VolumeLimits::is_none")]
    pub limits: VolumeLimits,
    /// Whom it was given to, in the order it was. While there is one, nobody else can open it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub publications: Vec<Publication>,
}

impl Record for VolumeRecord {}

fn one() -> u32 {
    1
}

fn is_one(number: &u32) -> bool {
    *number == 1
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn is_none_yet(version: &Version) -> bool {
    *version == Version::NONE
}

impl VolumeRecord {
    /// A volume as it begins: never claimed, never written, given to nobody and without limits. It has as many copies as
    /// its placement has, and as many of them must be in sync as [`default_min_in_sync`] says.
    pub fn new(
        id: VolumeId,
        name: VolumeName,
        size_bytes: u64,
        layer: LayerId,
        placement: Placement,
    ) -> VolumeRecord {
        let replicas = placement.sets.first().map_or(1, |set| set.replicas.len());
        let replicas = replicas as u32;
        VolumeRecord {
            id,
            name,
            size_bytes,
            layers: vec![layer],
            replicas,
            min_in_sync: default_min_in_sync(replicas),
            zones: Zones::default(),
            client_generation: 0,
            settled: Version::NONE,
            read_only: false,
            write_through: false,
            epoch: Epoch(0),
            head: None,
            created_at_unix_ms: 0,
            state: VolumeState::Active,
            placement,
            never_written: true,
            filesystem: None,
            limits: VolumeLimits::default(),
            publications: Vec::new(),
        }
    }

    /// The layer that writes go to.
    pub fn live_layer(&self) -> LayerId {
        self.layers[0]
    }

    /// What must hold for every record that was ever written; `Err` names what does not.
    pub fn check_invariants(&self) -> Result<(), &'static str> {
        if self.size_bytes == 0
            || !self
                .size_bytes
                .is_multiple_of(crate::units::BLOCK_BYTES as u64)
        {
            return Err("size is not a positive multiple of a block");
        }
        if self.layers.is_empty() {
            return Err("no layer");
        }
        if self
            .layers
            .iter()
            .enumerate()
            .any(|(index, layer)| self.layers[..index].contains(layer))
        {
            return Err("a layer twice");
        }
        if self.replicas == 0 {
            return Err("no replica");
        }
        if self.epoch > Epoch::MAX {
            return Err("epoch past its largest value");
        }
        if self.min_in_sync == 0 || self.min_in_sync > self.replicas {
            return Err("min_in_sync is not between one and the number of replicas");
        }
        if !self.zones.are_all() && !self.placement.is_replicated() {
            return Err("confined to zones and without copies to place");
        }
        if self.state == VolumeState::Deleting && !self.publications.is_empty() {
            return Err("published and being deleted");
        }
        publication::check(&self.publications)?;
        self.placement.check_invariants()
    }
}

/// Which daemon claimed a volume. The incarnation tells this run of the daemon from its earlier ones, so that a claim
/// whose outcome was unknown can be recognised when the record is read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadClaim {
    /// The daemon.
    pub node: NodeId,
    /// Drawn afresh at each start of the daemon.
    pub incarnation: Uuid,
}

/// A volume's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeState {
    /// Served.
    Active,
    /// No longer served; its layers are being dropped, then the record goes. Never becomes active again.
    Deleting,
}

/// Where the chunks of a volume lie: chunk `c` on entry number `c mod n` of a list, whose length never changes in a
/// volume's life, so a chunk is always found where it was written. The entries are stores of the one node that serves
/// an unreplicated volume, in which a store may come more than once, or the replica sets of a replicated one; never
/// both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Placement {
    /// Of an unreplicated volume, in the order chunks are dealt out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stores: Vec<StoreId>,
    /// Of a replicated volume, in the order chunks are dealt out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sets: Vec<ReplicaSet>,
}

/// Most entries of a placement: a head counts per entry in small numbers.
pub const PLACEMENT_ENTRIES_MAX: usize = 256;

impl Placement {
    /// Chooses stores for a new volume: of the groups whose stores may hold a volume together, the one with the least
    /// volume per store, and in it a [`deal`] by free room. Sizes are what volumes may come to hold, so that volumes
    /// created one after another spread before any of them is written. Empty when there is no store.
    pub fn choose<'a>(
        groups: &[Vec<StoreSpace>],
        volumes: impl Iterator<Item = &'a VolumeRecord>,
        turn: u64,
    ) -> Placement {
        let mut promised_bytes = vec![0u128; groups.len()];
        for volume in volumes {
            let entries = volume.placement.stores.len() as u128;
            for entry in &volume.placement.stores {
                let holds = |group: &Vec<StoreSpace>| group.iter().any(|store| store.id == *entry);
                if let Some(group) = groups.iter().position(holds) {
                    promised_bytes[group] += u128::from(volume.size_bytes) / entries;
                }
            }
        }
        let usable = groups
            .iter()
            .zip(promised_bytes)
            .filter(|(stores, _)| !stores.is_empty());
        let emptiest = usable.min_by_key(|(stores, bytes)| bytes / stores.len() as u128);
        Placement {
            stores: emptiest
                .map(|(stores, _)| deal(stores, turn))
                .unwrap_or_default(),
            sets: Vec::new(),
        }
    }

    /// The placement has replica sets.
    pub fn is_replicated(&self) -> bool {
        !self.sets.is_empty()
    }

    /// The replica set of a chunk of a replicated volume.
    pub fn set_of(&self, chunk: ChunkIndex) -> SetIndex {
        SetIndex((chunk.0 as usize % self.sets.len()) as u16)
    }

    /// The same chunks on the same stores, as replica sets of one replica each, all on `node`: what the volume of a
    /// single node becomes when the node joins a cluster.
    pub fn into_sets(self, node: NodeId) -> Placement {
        let sole = |store| ReplicaSet {
            replicas: vec![Replica::in_sync(node, store)],
        };
        Placement {
            sets: self.stores.into_iter().map(sole).chain(self.sets).collect(),
            stores: Vec::new(),
        }
    }

    fn check_invariants(&self) -> Result<(), &'static str> {
        if self.stores.is_empty() && self.sets.is_empty() {
            return Err("no store");
        }
        if !self.stores.is_empty() && !self.sets.is_empty() {
            return Err("both stores and replica sets");
        }
        if self.stores.len().max(self.sets.len()) > PLACEMENT_ENTRIES_MAX {
            return Err("more than 256 entries of placement");
        }
        self.sets.iter().try_for_each(ReplicaSet::check_invariants)
    }

    /// The store that holds a chunk.
    pub fn store_of(&self, chunk: ChunkIndex) -> StoreId {
        self.stores[chunk.0 as usize % self.stores.len()]
    }
}

/// Holds a name for a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NameRecord {
    /// The volume with this name.
    pub volume: VolumeId,
}

impl Record for NameRecord {}

/// The next layer id to give out. Only ever grows, so that a layer id is never used twice: blocks of a dropped layer
/// that a store still holds can never be mistaken for a new volume's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerCounter {
    /// Smaller ids have been given out.
    pub next: LayerId,
}

impl LayerCounter {
    /// Before any layer was given out; zero is no layer.
    pub const FIRST: LayerCounter = LayerCounter { next: LayerId(1) };
}

impl Record for LayerCounter {}

/// The daemon that owns this metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRecord {
    /// Its identity; its stores carry it in their superblocks.
    pub id: NodeId,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_at_unix_ms: u64,
}

impl Record for NodeRecord {}

/// A store that was opened at least once; tells a store that is missing from one that never was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreRecord {
    /// As in its superblock.
    pub id: StoreId,
    /// Where it was last opened.
    pub path: String,
    /// Whose it is; in a cluster only. A single node's are its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// Milliseconds since 1970-01-01 UTC.
    pub first_seen_unix_ms: u64,
    /// The run of the machine's kernel in which volumes on it were last served; see
    /// [`answers_may_be_gone`](super::answers_may_be_gone). Absent: not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<Uuid>,
}

impl Record for StoreRecord {}

/// The last scrub of a store that came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScrubRecord {
    /// The store.
    pub store: StoreId,
    /// Milliseconds since 1970-01-01 UTC.
    pub finished_at_unix_ms: u64,
    /// Data read and compared.
    pub verified_bytes: u64,
    /// Of its blocks, how many were not what was written.
    pub damaged_blocks: u64,
}

impl Record for ScrubRecord {}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::super::sample::volume;
    use super::*;

    fn sample() -> VolumeRecord {
        VolumeRecord {
            created_at_unix_ms: 1_700_000_000_000,
            never_written: false,
            ..volume()
        }
    }

    // The form that is on disk in released daemons: changing it needs a new schema version.
    #[test]
    fn the_stored_form_is_fixed() {
        let stored = concat!(
            r#"{"id":"00000000-0000-0000-0000-000000000001","name":"db","size_bytes":8192,"layers":[3],"replicas":1,"#,
            r#""read_only":false,"write_through":false,"epoch":2,"created_at_unix_ms":1700000000000,"state":"active","#,
            r#""placement":{"stores":["00000000-0000-0000-0000-000000000007"]}}"#
        );
        assert_eq!(String::from_utf8(sample().encode()).expect("text"), stored);
        assert_eq!(VolumeRecord::decode("k", stored.as_bytes()), Ok(sample()));
    }

    #[test]
    fn a_newer_field_is_refused_and_not_dropped() {
        let mut stored = String::from_utf8(sample().encode()).expect("text");
        stored.insert_str(1, r#""from_the_future":1,"#);
        let error =
            VolumeRecord::decode("volumes/x", stored.as_bytes()).expect_err("unknown field");
        assert!(
            error.to_string().contains("volumes/x") && error.reason.contains("from_the_future"),
            "{error}"
        );
    }

    #[test]
    fn invariants_are_seen() {
        assert_eq!(sample().check_invariants(), Ok(()));
        assert!(
            VolumeRecord {
                size_bytes: 1,
                ..sample()
            }
            .check_invariants()
            .is_err()
        );
        assert!(
            VolumeRecord {
                layers: vec![],
                ..sample()
            }
            .check_invariants()
            .is_err()
        );
        assert!(
            VolumeRecord {
                layers: vec![LayerId(1), LayerId(1)],
                ..sample()
            }
            .check_invariants()
            .is_err()
        );
        assert!(
            VolumeRecord {
                placement: Placement::default(),
                ..sample()
            }
            .check_invariants()
            .is_err()
        );
    }

    #[test]
    fn chunks_are_dealt_out_in_order() {
        let stores: Vec<_> = (1..=3).map(|n| StoreId(Uuid::from_u128(n))).collect();
        let placement = Placement {
            stores: stores.clone(),
            sets: Vec::new(),
        };
        for chunk in 0..9 {
            assert_eq!(
                placement.store_of(ChunkIndex(chunk)),
                stores[chunk as usize % 3]
            );
        }
    }

    #[test]
    fn volumes_spread_over_groups_of_stores() {
        let store = |n| StoreSpace {
            id: StoreId(Uuid::from_u128(n)),
            free_blocks: 100,
        };
        let groups = [vec![], vec![store(1), store(2)], vec![store(3)]];
        let mut volumes: Vec<VolumeRecord> = Vec::new();
        let mut chosen = Vec::new();
        for size_bytes in [16384, 4096, 4096, 8192, 8192] {
            let placement = Placement::choose(&groups, volumes.iter(), 0);
            chosen.push(placement.stores.len());
            volumes.push(VolumeRecord {
                size_bytes,
                placement,
                ..sample()
            });
        }
        // Per store: 8192 and 0, then 4096, then 8192 each.
        assert_eq!(chosen, [2, 1, 1, 2, 1]);
        assert!(Placement::choose(&[], volumes.iter(), 0).stores.is_empty());
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in any::<Vec<u8>>()) {
            let _ = VolumeRecord::decode("k", &bytes);
            let _ = NameRecord::decode("k", &bytes);
            let _ = LayerCounter::decode("k", &bytes);
            let _ = ScrubRecord::decode("k", &bytes);
        }
    }
}
