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
        replicas: 1,
        min_in_sync: None,
        zones: Zones::default(),
        placement: Placement {
            stores: vec![StoreId(Uuid::from_u128(1))],
            sets: Vec::new(),
        },
        limits: VolumeLimits::default(),
        annotations: Annotations::default(),
    }
}

#[test]
fn at_least_one_and_at_most_all_copies_have_to_be_in_sync() {
    for (wanted, expected) in [(None, Ok(2)), (Some(1), Ok(1)), (Some(3), Ok(3))]
        .into_iter()
        .chain([0, 4].map(|wanted| {
            let replicas = 3;
            (Some(wanted), Err(MinInSyncError { wanted, replicas }))
        }))
    {
        let new = NewVolume {
            replicas: 3,
            min_in_sync: wanted,
            ..new_volume(1, "a")
        };
        let made = create(new, None, None).map(|made| made.record.min_in_sync);
        assert_eq!(made, expected.map_err(CreateError::from), "{wanted:?}");
    }
    let mut memory = Memory::default();
    let mut current = created(&mut memory, 1, "a");
    current.record.replicas = 3;
    current.record.min_in_sync = 2;
    let least = |wanted| {
        set_min_in_sync(&current, wanted)
            .map(|changed| changed.map(|(record, _)| record.min_in_sync))
    };
    assert_eq!(
        (least(1), least(2), least(3)),
        (Ok(Some(1)), Ok(None), Ok(Some(3)))
    );
    assert!(least(0).is_err() && least(4).is_err());
    let (changed, transaction) = set_min_in_sync(&current, 3).expect("allowed").expect("new");
    assert!(transaction.effects.len() == 1 && transaction.conditions.len() == 1);
    assert_eq!(changed.epoch, current.record.epoch, "clients stay");
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
    let (_, tombstone) = begin_delete(&volume, head(1).node, 0)
        .expect("idle")
        .expect("active");
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
        placement: Placement::default(),
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
    let skip =
        pass_over_layers(memory.read(keys::NEXT_LAYER), LayerId(9)).expect("beyond the counter");
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
    assert_eq!(
        configure(&volume, head(1).node, None, Some(false), 5),
        Ok(None)
    );
    let in_use = ConfigureError::InUse {
        name: name("a"),
        connections: 1,
    };
    assert_eq!(
        configure(&volume, head(1).node, Some(true), None, 1),
        Err(in_use)
    );
    let (record, transaction) = configure(&volume, head(1).node, Some(true), Some(true), 0)
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
        begin_delete(&volume, head(1).node, 3),
        Err(DeleteError::InUse {
            name: name("a"),
            connections: 3
        })
    );
    let (_, transaction) = begin_delete(&volume, head(1).node, 0)
        .expect("idle")
        .expect("active");
    assert!(memory.commit(&transaction));
    assert_eq!(
        memory.name_holder(&name("a")),
        None,
        "the name is free at once"
    );
    let tombstone = memory.volumes().remove(0);
    assert_eq!(begin_delete(&tombstone, head(1).node, 0), Ok(None));
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
                    .and_then(|v| begin_delete(&v, head(1).node, 0).ok().flatten())
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
