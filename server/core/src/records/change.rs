//! The decisions: from what was read to a compare-and-swap, or a refusal.

use thiserror::Error;

use super::{
    Condition, Effect, HeadClaim, LayerCounter, NameRecord, Placement, Record, RoundedSize,
    Transaction, Versioned, VolumeName, VolumeRecord, VolumeState, keys,
};
use crate::units::{Epoch, LayerId, VolumeId};

/// A volume to create. The id was drawn by the caller, who can therefore tell, when the outcome of the transaction is
/// unknown, whether it happened: the record of that id is there or it is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewVolume {
    /// A fresh UUID.
    pub id: VolumeId,
    /// Checked.
    pub name: VolumeName,
    /// Checked and rounded.
    pub size: RoundedSize,
    /// Served read-only.
    pub read_only: bool,
    /// Every acknowledgement waits for durability.
    pub write_through: bool,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_at_unix_ms: u64,
    /// Where its chunks will lie.
    pub placement: Placement,
}

/// A creation that was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Creation {
    /// The record that will exist.
    pub record: VolumeRecord,
    /// What makes it exist.
    pub transaction: Transaction,
}

/// Why a volume is not created.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CreateError {
    /// Another volume has the name.
    #[error("the name {name} is taken by volume {}; choose another or delete that volume first", holder.0)]
    NameTaken {
        /// The name.
        name: VolumeName,
        /// Who has it.
        holder: VolumeId,
    },
    /// There is nowhere to put it.
    #[error("there is no store to put the volume on; start ashlard with --store PATH")]
    NoStore,
    /// All 2^64 layer ids are used.
    #[error("every layer id has been given out; no volume can be created any more")]
    LayersExhausted,
}

/// Decides the creation of a volume from the holder of its name and the layer counter (absent before the first
/// volume).
pub fn create(
    new: NewVolume,
    name_holder: Option<NameRecord>,
    counter: Option<Versioned<LayerCounter>>,
) -> Result<Creation, CreateError> {
    if let Some(holder) = name_holder {
        return Err(CreateError::NameTaken {
            name: new.name,
            holder: holder.volume,
        });
    }
    if new.placement.stores.is_empty() {
        return Err(CreateError::NoStore);
    }
    let (layer, counter_condition) = match &counter {
        Some(counter) => (
            counter.record.next,
            Condition::Unchanged {
                key: keys::NEXT_LAYER.to_owned(),
                changed_at: counter.changed_at,
            },
        ),
        None => (
            LayerCounter::FIRST.next,
            Condition::Absent {
                key: keys::NEXT_LAYER.to_owned(),
            },
        ),
    };
    let next = LayerId(layer.0.checked_add(1).ok_or(CreateError::LayersExhausted)?);
    let record = VolumeRecord {
        id: new.id,
        name: new.name,
        size_bytes: new.size.bytes,
        layers: vec![layer],
        replicas: 1,
        read_only: new.read_only,
        write_through: new.write_through,
        epoch: Epoch(0),
        head: None,
        created_at_unix_ms: new.created_at_unix_ms,
        state: VolumeState::Active,
        placement: new.placement,
    };
    let transaction = Transaction {
        conditions: vec![
            Condition::Absent {
                key: keys::name(&record.name),
            },
            Condition::Absent {
                key: keys::volume(record.id),
            },
            counter_condition,
        ],
        effects: vec![
            Effect::Put {
                key: keys::NEXT_LAYER.to_owned(),
                value: LayerCounter { next }.encode(),
            },
            Effect::Put {
                key: keys::name(&record.name),
                value: NameRecord { volume: record.id }.encode(),
            },
            Effect::Put {
                key: keys::volume(record.id),
                value: record.encode(),
            },
        ],
    };
    Ok(Creation {
        record,
        transaction,
    })
}

/// Why a volume is not claimed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ClaimError {
    /// It is being deleted.
    #[error("volume {name} is being deleted")]
    Deleting {
        /// Its name.
        name: VolumeName,
    },
    /// It was claimed 2^24 - 1 times.
    #[error("volume {name} has used up its epochs; copy it to a new volume")]
    EpochsExhausted {
        /// Its name.
        name: VolumeName,
    },
}

/// Decides the claim that must precede serving a volume: a new epoch with `head` as its holder. Answers the record as
/// it will be.
///
/// `written`: the highest epoch that its stores hold blocks of. It is beyond the record's only when the metadata is
/// older than the stores (restored from a backup); the new epoch is larger than both, because a store never replaces an
/// entry by one of a smaller version, and what is written under a used epoch could vanish.
pub fn claim(
    current: &Versioned<VolumeRecord>,
    head: HeadClaim,
    written: Epoch,
) -> Result<(VolumeRecord, Transaction), ClaimError> {
    let record = &current.record;
    if record.state == VolumeState::Deleting {
        return Err(ClaimError::Deleting {
            name: record.name.clone(),
        });
    }
    let last = record.epoch.max(written);
    if last >= Epoch::MAX {
        return Err(ClaimError::EpochsExhausted {
            name: record.name.clone(),
        });
    }
    let claimed = VolumeRecord {
        epoch: Epoch(last.0 + 1),
        head: Some(head),
        ..record.clone()
    };
    let transaction = rewrite(current, &claimed);
    Ok((claimed, transaction))
}

/// Decides whether layer ids must be passed over: `used` is the highest that a store holds, and it was given out. It is
/// beyond the counter only when the metadata is older than the stores. `None`: nothing to do.
pub fn pass_over_layers(
    counter: Option<Versioned<LayerCounter>>,
    used: LayerId,
) -> Option<Transaction> {
    let next = counter
        .as_ref()
        .map_or(LayerCounter::FIRST.next, |counter| counter.record.next);
    if used < next {
        return None;
    }
    let transaction = match counter {
        Some(counter) => Transaction::new().when_unchanged(keys::NEXT_LAYER, counter.changed_at),
        None => Transaction::new().when_absent(keys::NEXT_LAYER),
    };
    // At the end of all ids the counter stays there, and creation says that there are none left.
    let next = LayerId(used.0.saturating_add(1));
    Some(transaction.put(keys::NEXT_LAYER, LayerCounter { next }.encode()))
}

/// Why a volume is not renamed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RenameError {
    /// Another volume has the name.
    #[error("the name {name} is taken by volume {}; choose another or delete that volume first", holder.0)]
    NameTaken {
        /// The wanted name.
        name: VolumeName,
        /// Who has it.
        holder: VolumeId,
    },
    /// It is being deleted.
    #[error("volume {name} is being deleted")]
    Deleting {
        /// Its name.
        name: VolumeName,
    },
}

/// Decides a change of name from the holder of the wanted one. `None`: it has that name already.
pub fn rename(
    current: &Versioned<VolumeRecord>,
    name: &VolumeName,
    name_holder: Option<NameRecord>,
) -> Result<Option<(VolumeRecord, Transaction)>, RenameError> {
    let record = &current.record;
    if record.state == VolumeState::Deleting {
        return Err(RenameError::Deleting {
            name: record.name.clone(),
        });
    }
    if record.name == *name {
        return Ok(None);
    }
    if let Some(holder) = name_holder {
        return Err(RenameError::NameTaken {
            name: name.clone(),
            holder: holder.volume,
        });
    }
    let renamed = VolumeRecord {
        name: name.clone(),
        ..record.clone()
    };
    let transaction = rewrite(current, &renamed)
        .when_absent(keys::name(name))
        .delete(keys::name(&record.name))
        .put(keys::name(name), NameRecord { volume: record.id }.encode());
    Ok(Some((renamed, transaction)))
}

/// Why a volume is not resized.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ResizeError {
    /// Shrinking would cut off data that a filesystem may still use.
    #[error(
        "volume {name} has {from_bytes} bytes and cannot shrink to {to_bytes}: volumes only grow; create a smaller volume and copy what you need"
    )]
    Shrink {
        /// Its name.
        name: VolumeName,
        /// Present size.
        from_bytes: u64,
        /// Asked size, rounded.
        to_bytes: u64,
    },
    /// It is being deleted.
    #[error("volume {name} is being deleted")]
    Deleting {
        /// Its name.
        name: VolumeName,
    },
}

/// Decides a growth. `None`: it has that size already.
pub fn resize(
    current: &Versioned<VolumeRecord>,
    size: RoundedSize,
) -> Result<Option<(VolumeRecord, Transaction)>, ResizeError> {
    let record = &current.record;
    if record.state == VolumeState::Deleting {
        return Err(ResizeError::Deleting {
            name: record.name.clone(),
        });
    }
    if size.bytes == record.size_bytes {
        return Ok(None);
    }
    if size.bytes < record.size_bytes {
        return Err(ResizeError::Shrink {
            name: record.name.clone(),
            from_bytes: record.size_bytes,
            to_bytes: size.bytes,
        });
    }
    let grown = VolumeRecord {
        size_bytes: size.bytes,
        ..record.clone()
    };
    let transaction = rewrite(current, &grown);
    Ok(Some((grown, transaction)))
}

/// Why a volume's settings are not changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigureError {
    /// Clients were told the present settings when they connected.
    #[error(
        "volume {name} is in use by {connections} connection(s), and its settings are agreed when a client connects; disconnect them first"
    )]
    InUse {
        /// Its name.
        name: VolumeName,
        /// How many.
        connections: u32,
    },
    /// It is being deleted.
    #[error("volume {name} is being deleted")]
    Deleting {
        /// Its name.
        name: VolumeName,
    },
}

/// Decides a change of settings; `None` leaves one as it is. Answers `None` when nothing would change.
pub fn configure(
    current: &Versioned<VolumeRecord>,
    read_only: Option<bool>,
    write_through: Option<bool>,
    connections: u32,
) -> Result<Option<(VolumeRecord, Transaction)>, ConfigureError> {
    let record = &current.record;
    if record.state == VolumeState::Deleting {
        return Err(ConfigureError::Deleting {
            name: record.name.clone(),
        });
    }
    let configured = VolumeRecord {
        read_only: read_only.unwrap_or(record.read_only),
        write_through: write_through.unwrap_or(record.write_through),
        ..record.clone()
    };
    if configured == *record {
        return Ok(None);
    }
    if connections > 0 {
        return Err(ConfigureError::InUse {
            name: record.name.clone(),
            connections,
        });
    }
    let transaction = rewrite(current, &configured);
    Ok(Some((configured, transaction)))
}

/// Why a volume is not deleted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DeleteError {
    /// Clients are connected to it.
    #[error(
        "volume {name} is in use by {connections} connection(s); disconnect its clients first (nbd-client -d, umount, or stop the program that has it open)"
    )]
    InUse {
        /// Its name.
        name: VolumeName,
        /// How many.
        connections: u32,
    },
}

/// Decides the first half of a deletion: the volume becomes a tombstone and its name is free. `None`: it is one
/// already. The tombstone goes ([`finish_delete`]) when the stores have dropped its layers, so a deletion that was cut
/// short is taken up again at the next start.
pub fn begin_delete(
    current: &Versioned<VolumeRecord>,
    connections: u32,
) -> Result<Option<(VolumeRecord, Transaction)>, DeleteError> {
    let record = &current.record;
    if record.state == VolumeState::Deleting {
        return Ok(None);
    }
    if connections > 0 {
        return Err(DeleteError::InUse {
            name: record.name.clone(),
            connections,
        });
    }
    let tombstone = VolumeRecord {
        state: VolumeState::Deleting,
        ..record.clone()
    };
    let transaction = rewrite(current, &tombstone).delete(keys::name(&record.name));
    Ok(Some((tombstone, transaction)))
}

/// The second half of a deletion, to be carried out once every layer of the tombstone is durably dropped.
pub fn finish_delete(tombstone: &Versioned<VolumeRecord>) -> Transaction {
    assert_eq!(
        tombstone.record.state,
        VolumeState::Deleting,
        "only a tombstone is removed"
    );
    let key = keys::volume(tombstone.record.id);
    Transaction::new()
        .when_unchanged(key.clone(), tombstone.changed_at)
        .delete(key)
}

/// Replaces a volume's record. The name record needs no condition of its own: while the volume's record is unchanged,
/// `names/<its name>` points to it, because every change of one goes through a condition on the other.
fn rewrite(current: &Versioned<VolumeRecord>, record: &VolumeRecord) -> Transaction {
    let key = keys::volume(record.id);
    Transaction::new()
        .when_unchanged(key.clone(), current.changed_at)
        .put(key, record.encode())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::{Strategy, any, prop_oneof, proptest};
    use uuid::Uuid;

    use super::*;
    use crate::records::{Revision, round_up_to_block};
    use crate::units::{NodeId, StoreId};

    /// The smallest metadata store: enough to carry transactions out one after another.
    #[derive(Default)]
    struct Memory {
        revision: u64,
        records: BTreeMap<String, (Vec<u8>, Revision)>,
    }

    impl Memory {
        fn read<R: Record>(&self, key: &str) -> Option<Versioned<R>> {
            let (bytes, changed_at) = self.records.get(key)?;
            Some(Versioned {
                record: R::decode(key, bytes).expect("own record"),
                changed_at: *changed_at,
            })
        }

        fn commit(&mut self, transaction: &Transaction) -> bool {
            assert_eq!(transaction.twice_changed_key(), None);
            let holds = transaction
                .conditions
                .iter()
                .all(|condition| match condition {
                    Condition::Absent { key } => !self.records.contains_key(key),
                    Condition::Unchanged { key, changed_at } => self
                        .records
                        .get(key)
                        .is_some_and(|(_, at)| at == changed_at),
                });
            if holds {
                self.revision += 1;
                for effect in &transaction.effects {
                    match effect {
                        Effect::Put { key, value } => {
                            self.records
                                .insert(key.clone(), (value.clone(), Revision(self.revision)));
                        }
                        Effect::Delete { key } => {
                            self.records.remove(key);
                        }
                    }
                }
            }
            holds
        }

        fn volumes(&self) -> Vec<Versioned<VolumeRecord>> {
            let keys = self
                .records
                .keys()
                .filter(|key| key.starts_with(keys::VOLUMES));
            keys.map(|key| self.read(key).expect("listed")).collect()
        }

        fn name_holder(&self, name: &VolumeName) -> Option<NameRecord> {
            self.read::<NameRecord>(&keys::name(name))
                .map(|held| held.record)
        }

        /// Every active volume holds its name, nobody else holds one, no layer belongs to two volumes.
        fn check_invariants(&self) {
            let volumes = self.volumes();
            let active: Vec<_> = volumes
                .iter()
                .filter(|v| v.record.state == VolumeState::Active)
                .collect();
            for volume in &active {
                volume.record.check_invariants().expect("record");
                assert_eq!(
                    self.name_holder(&volume.record.name),
                    Some(NameRecord {
                        volume: volume.record.id
                    })
                );
            }
            let names = self
                .records
                .keys()
                .filter(|key| key.starts_with(keys::NAMES))
                .count();
            assert_eq!(names, active.len(), "a name is held by nobody");
            let mut layers: Vec<_> = volumes
                .iter()
                .flat_map(|v| v.record.layers.clone())
                .collect();
            let count = layers.len();
            layers.sort();
            layers.dedup();
            assert_eq!(layers.len(), count, "a layer belongs to two volumes");
        }
    }

    fn name(text: &str) -> VolumeName {
        VolumeName::parse(text).expect("name")
    }

    fn new_volume(number: u128, called: &str) -> NewVolume {
        NewVolume {
            id: VolumeId(Uuid::from_u128(number)),
            name: name(called),
            size: round_up_to_block(1 << 20).expect("size"),
            read_only: false,
            write_through: false,
            created_at_unix_ms: 0,
            placement: Placement {
                stores: vec![StoreId(Uuid::from_u128(1))],
            },
        }
    }

    fn created(memory: &mut Memory, number: u128, called: &str) -> Versioned<VolumeRecord> {
        let creation = create(
            new_volume(number, called),
            None,
            memory.read(keys::NEXT_LAYER),
        )
        .expect("created");
        assert!(memory.commit(&creation.transaction));
        memory
            .read(&keys::volume(creation.record.id))
            .expect("there")
    }

    fn head(number: u128) -> HeadClaim {
        HeadClaim {
            node: NodeId(Uuid::from_u128(1)),
            incarnation: Uuid::from_u128(number),
        }
    }

    #[test]
    fn a_taken_name_is_refused_and_two_creators_cannot_both_win() {
        let mut memory = Memory::default();
        let first = create(new_volume(1, "a"), None, None).expect("free");
        let second = create(new_volume(2, "a"), None, None).expect("free when read");
        assert!(memory.commit(&first.transaction));
        assert!(
            !memory.commit(&second.transaction),
            "the name was taken meanwhile"
        );
        let holder = memory.name_holder(&name("a"));
        let error =
            create(new_volume(2, "a"), holder, memory.read(keys::NEXT_LAYER)).expect_err("taken");
        assert_eq!(
            error,
            CreateError::NameTaken {
                name: name("a"),
                holder: VolumeId(Uuid::from_u128(1))
            }
        );
    }

    #[test]
    fn two_creators_cannot_get_one_layer() {
        let mut memory = Memory::default();
        let first = create(new_volume(1, "a"), None, None).expect("free");
        let second = create(new_volume(2, "b"), None, None).expect("free");
        assert!(memory.commit(&first.transaction));
        assert!(!memory.commit(&second.transaction), "the counter moved");
    }

    #[test]
    fn layers_are_not_reused_after_a_deletion() {
        let mut memory = Memory::default();
        let volume = created(&mut memory, 1, "a");
        let (_, tombstone) = begin_delete(&volume, 0).expect("idle").expect("active");
        assert!(memory.commit(&tombstone));
        let tombstone = memory
            .read::<VolumeRecord>(&keys::volume(volume.record.id))
            .expect("tombstone");
        assert!(memory.commit(&finish_delete(&tombstone)));
        assert!(memory.volumes().is_empty());
        let again = created(&mut memory, 2, "a");
        assert!(again.record.live_layer() > volume.record.live_layer());
    }

    #[test]
    fn create_refuses_no_store_and_no_layer() {
        let nowhere = NewVolume {
            placement: Placement { stores: vec![] },
            ..new_volume(1, "a")
        };
        assert_eq!(create(nowhere, None, None), Err(CreateError::NoStore));
        let full = Versioned {
            record: LayerCounter {
                next: LayerId(u64::MAX),
            },
            changed_at: Revision(1),
        };
        assert_eq!(
            create(new_volume(1, "a"), None, Some(full)),
            Err(CreateError::LayersExhausted)
        );
    }

    #[test]
    fn a_claim_raises_the_epoch_and_only_one_of_two_wins() {
        let mut memory = Memory::default();
        let volume = created(&mut memory, 1, "a");
        let (mine, first) = claim(&volume, head(1), Epoch(0)).expect("claim");
        let (_, second) = claim(&volume, head(2), Epoch(0)).expect("claim");
        assert_eq!((mine.epoch, mine.head), (Epoch(1), Some(head(1))));
        assert!(memory.commit(&first));
        assert!(!memory.commit(&second));
        let used_up = VolumeRecord {
            epoch: Epoch::MAX,
            ..volume.record.clone()
        };
        let error = claim(
            &Versioned {
                record: used_up,
                changed_at: Revision(1),
            },
            head(1),
            Epoch(0),
        )
        .expect_err("used up");
        assert_eq!(error, ClaimError::EpochsExhausted { name: name("a") });
    }

    #[test]
    fn metadata_older_than_the_stores_gives_nothing_out_twice() {
        let mut memory = Memory::default();
        let volume = created(&mut memory, 1, "a");
        let (claimed, _) = claim(&volume, head(1), Epoch(40)).expect("claim");
        assert_eq!(claimed.epoch, Epoch(41));
        assert!(claim(&volume, head(1), Epoch::MAX).is_err());

        assert_eq!(
            pass_over_layers(memory.read(keys::NEXT_LAYER), volume.record.live_layer()),
            None
        );
        let skip = pass_over_layers(memory.read(keys::NEXT_LAYER), LayerId(9))
            .expect("beyond the counter");
        assert!(memory.commit(&skip));
        assert_eq!(
            created(&mut memory, 2, "b").record.live_layer(),
            LayerId(10)
        );
        let skip = pass_over_layers(None, LayerId(u64::MAX)).expect("beyond the counter");
        assert!(Memory::default().commit(&skip));
    }

    #[test]
    fn rename_and_resize_refuse_what_they_must() {
        let mut memory = Memory::default();
        let volume = created(&mut memory, 1, "a");
        created(&mut memory, 2, "b");
        let holder = memory.name_holder(&name("b"));
        assert!(matches!(
            rename(&volume, &name("b"), holder),
            Err(RenameError::NameTaken { .. })
        ));
        assert_eq!(
            rename(&volume, &name("a"), memory.name_holder(&name("a"))),
            Ok(None)
        );
        let smaller = round_up_to_block(4096).expect("size");
        assert!(matches!(
            resize(&volume, smaller),
            Err(ResizeError::Shrink { to_bytes: 4096, .. })
        ));
        assert_eq!(
            resize(&volume, round_up_to_block(1 << 20).expect("size")),
            Ok(None)
        );
    }

    #[test]
    fn settings_change_only_while_nobody_is_connected() {
        let mut memory = Memory::default();
        let volume = created(&mut memory, 1, "a");
        assert_eq!(configure(&volume, None, Some(false), 5), Ok(None));
        let in_use = ConfigureError::InUse {
            name: name("a"),
            connections: 1,
        };
        assert_eq!(configure(&volume, Some(true), None, 1), Err(in_use));
        let (record, transaction) = configure(&volume, Some(true), Some(true), 0)
            .expect("idle")
            .expect("a change");
        assert!(record.read_only && record.write_through);
        assert!(memory.commit(&transaction));
    }

    #[test]
    fn a_volume_in_use_is_not_deleted_and_a_tombstone_does_nothing_but_go() {
        let mut memory = Memory::default();
        let volume = created(&mut memory, 1, "a");
        assert_eq!(
            begin_delete(&volume, 3),
            Err(DeleteError::InUse {
                name: name("a"),
                connections: 3
            })
        );
        let (_, transaction) = begin_delete(&volume, 0).expect("idle").expect("active");
        assert!(memory.commit(&transaction));
        assert_eq!(
            memory.name_holder(&name("a")),
            None,
            "the name is free at once"
        );
        let tombstone = memory.volumes().remove(0);
        assert_eq!(begin_delete(&tombstone, 0), Ok(None));
        assert!(matches!(
            claim(&tombstone, head(1), Epoch(0)),
            Err(ClaimError::Deleting { .. })
        ));
        assert!(matches!(
            rename(&tombstone, &name("c"), None),
            Err(RenameError::Deleting { .. })
        ));
        let larger = round_up_to_block(1 << 30).expect("size");
        assert!(matches!(
            resize(&tombstone, larger),
            Err(ResizeError::Deleting { .. })
        ));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Create { called: u8 },
        Rename { volume: usize, called: u8 },
        Grow { volume: usize, blocks: u64 },
        Claim { volume: usize },
        Delete { volume: usize },
        Finish { volume: usize },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..6u8).prop_map(|called| Step::Create { called }),
            (any::<usize>(), 0..6u8).prop_map(|(volume, called)| Step::Rename { volume, called }),
            (any::<usize>(), 1..512u64).prop_map(|(volume, blocks)| Step::Grow { volume, blocks }),
            any::<usize>().prop_map(|volume| Step::Claim { volume }),
            any::<usize>().prop_map(|volume| Step::Delete { volume }),
            any::<usize>().prop_map(|volume| Step::Finish { volume }),
        ]
    }

    proptest! {
        // Decisions are taken on what was read a step earlier, so about half of them are stale when carried out.
        #[test]
        fn stale_decisions_never_break_the_records(steps in proptest::collection::vec((step(), any::<bool>()), 1..80)) {
            let mut memory = Memory::default();
            let mut held_back: Option<Transaction> = None;
            for (number, (step, hold_back)) in steps.into_iter().enumerate() {
                let volumes = memory.volumes();
                let pick = |index: usize| (!volumes.is_empty()).then(|| volumes[index % volumes.len()].clone());
                let called = |number: u8| name(&format!("v{number}"));
                let decided = match step {
                    Step::Create { called: n } => {
                        let new = new_volume(number as u128 + 1, called(n).as_str());
                        create(new, memory.name_holder(&called(n)), memory.read(keys::NEXT_LAYER))
                            .ok().map(|creation| creation.transaction)
                    }
                    Step::Rename { volume, called: n } => pick(volume)
                        .and_then(|v| rename(&v, &called(n), memory.name_holder(&called(n))).ok().flatten())
                        .map(|(_, transaction)| transaction),
                    Step::Grow { volume, blocks } => pick(volume)
                        .and_then(|v| resize(&v, round_up_to_block(blocks * 4096).expect("size")).ok().flatten())
                        .map(|(_, transaction)| transaction),
                    Step::Claim { volume } => pick(volume)
                        .and_then(|v| claim(&v, head(number as u128), Epoch(0)).ok())
                        .map(|(_, transaction)| transaction),
                    Step::Delete { volume } => pick(volume)
                        .and_then(|v| begin_delete(&v, 0).ok().flatten())
                        .map(|(_, transaction)| transaction),
                    Step::Finish { volume } => pick(volume)
                        .filter(|v| v.record.state == VolumeState::Deleting)
                        .map(|v| finish_delete(&v)),
                };
                let Some(decided) = decided else { continue };
                if hold_back {
                    if let Some(stale) = held_back.replace(decided) {
                        memory.commit(&stale);
                    }
                } else {
                    assert!(memory.commit(&decided), "nothing changed since the decision");
                }
                memory.check_invariants();
            }
        }
    }
}
