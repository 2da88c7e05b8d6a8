use uuid::Uuid;

use super::*;
use crate::records::{Placement, Replica, ReplicaSet, VolumeLimits, VolumeName};
use crate::store::BlockState;

fn node(n: u8) -> NodeId {
    NodeId(Uuid::from_u128(u128::from(n)))
}

fn store(n: u8) -> StoreId {
    StoreId(Uuid::from_u128(0x100 + u128::from(n)))
}

fn volume(n: u8) -> VolumeId {
    VolumeId(Uuid::from_u128(0x200 + u128::from(n)))
}

/// Volume `n` with layer `n` and copies on nodes 0 to 2.
fn record(n: u8) -> VolumeRecord {
    let replicas = (0..3).map(|at| Replica::in_sync(node(at), store(at)));
    VolumeRecord {
        id: volume(n),
        name: VolumeName::parse(&format!("v{n}")).expect("a name"),
        size_bytes: 4096,
        layers: vec![LayerId(u64::from(n))],
        replicas: 3,
        min_in_sync: 2,
        client_generation: 0,
        settled: Version::NONE,
        read_only: false,
        write_through: false,
        epoch: Epoch(5),
        head: None,
        created_at_unix_ms: 0,
        state: VolumeState::Active,
        placement: Placement {
            stores: Vec::new(),
            sets: vec![ReplicaSet {
                replicas: replicas.collect(),
            }],
        },
        never_written: false,
        filesystem: None,
        limits: VolumeLimits::default(),
        publications: Vec::new(),
    }
}

fn holding(layer: u64, epoch: u32) -> LayerHolding {
    LayerHolding {
        layer: LayerId(layer),
        chunks: 2,
        newest: Version::new(Epoch(epoch), 1),
    }
}

/// Two volumes that are whole on three nodes.
fn survey() -> Survey {
    let volumes = vec![record(1), record(2)];
    let names = volumes.iter().map(|r| (r.name.to_string(), r.id));
    let nodes = (0..3).map(|at| NodeHoldings {
        node: NodeName {
            id: node(at),
            address: None,
        },
        holdings: Ok(Holdings {
            stores: vec![StoreHolding {
                store: store(at),
                layers: vec![holding(1, 5), holding(2, 4)],
            }],
            seals: vec![SealHolding {
                volume: volume(1),
                store: store(at),
                seal: Seal {
                    epoch: Epoch(5),
                    ..Seal::default()
                },
            }],
        }),
    });
    Survey {
        names: names.collect(),
        volumes,
        nodes: nodes.collect(),
        only: None,
    }
}

fn held(survey: &mut Survey, at: usize) -> &mut Holdings {
    survey.nodes[at].holdings.as_mut().expect("it answers")
}

fn codes(survey: &Survey) -> Vec<&'static str> {
    examine(survey).iter().map(Ailment::code).collect()
}

#[test]
fn what_is_as_recorded_is_no_ailment() {
    assert_eq!(examine(&survey()), []);
}

#[test]
fn layers_that_no_record_names_are_orphans_and_those_of_others_strays() {
    let mut survey = survey();
    held(&mut survey, 1).stores[0].layers.push(holding(9, 1));
    assert_eq!(codes(&survey), ["orphan"]);
    survey.volumes[0].placement.sets[0].replicas.remove(2);
    assert_eq!(codes(&survey), ["orphan", "stray"]);
    // Somebody who asks about one volume is not told of what is nobody's.
    survey.only = Some(volume(1));
    assert_eq!(codes(&survey), ["stray"]);
    survey.only = Some(volume(2));
    assert!(codes(&survey).is_empty());
}

#[test]
fn a_store_that_is_not_open_and_a_node_that_is_silent_are_told_apart() {
    let mut survey = survey();
    held(&mut survey, 1).stores.clear();
    assert_eq!(codes(&survey), ["store-not-open", "store-not-open"]);
    survey.nodes[1].holdings = Err("refused".to_owned());
    assert_eq!(codes(&survey), ["node-silent"]);
}

#[test]
fn metadata_of_an_old_backup_show() {
    let mut survey = survey();
    held(&mut survey, 0).stores[0].layers[1] = holding(2, 6);
    held(&mut survey, 1).seals[0].seal.epoch = Epoch(7);
    let found = examine(&survey);
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(
        found.iter().all(|one| one.code() == "epoch-beyond"),
        "{found:?}"
    );
    assert!(
        found[0].remedy().contains("ashlar volume open"),
        "{found:?}"
    );
}

#[test]
fn records_are_looked_at_themselves() {
    let mut survey = survey();
    survey.names.insert("v1".to_owned(), volume(2));
    survey.volumes[1].layers = vec![LayerId(1)];
    let codes = codes(&survey);
    assert!(
        codes.contains(&"name-astray") && codes.contains(&"layer-shared"),
        "{codes:?}"
    );
}

fn data(version: u64, crc: u32) -> BlockSum {
    BlockSum {
        state: BlockState {
            version: Version(version),
            content: BlockContent::Data,
        },
        crc,
    }
}

fn zeros(version: u64) -> BlockSum {
    BlockSum {
        state: BlockState {
            version: Version(version),
            content: BlockContent::Zeros,
        },
        crc: 0,
    }
}

fn lost() -> BlockSum {
    BlockSum {
        state: BlockState {
            version: Version(9),
            content: BlockContent::Lost,
        },
        crc: 0,
    }
}

const HOLE: BlockSum = BlockSum {
    state: BlockState::HOLE,
    crc: 0,
};

/// One block of each copy, the same at both looks.
fn settled(copies: &[BlockSum]) -> LeafVerdict {
    let leaves: Vec<LeafSums> = copies.iter().map(|sum| vec![*sum]).collect();
    compare(&leaves, &leaves)
}

#[test]
fn copies_that_read_the_same_are_alike() {
    for alike in [
        [data(3, 1), data(3, 1), data(3, 1)],
        [HOLE, zeros(3), zeros(4)],
        // One that is known to be damaged is read elsewhere and mended then.
        [data(3, 1), lost(), data(3, 1)],
        // The same bytes twice.
        [data(3, 1), data(2, 1), data(3, 1)],
    ] {
        let verdict = settled(&alike);
        assert_eq!((verdict.blocks, verdict.changing), (0, 0), "{alike:?}");
        assert!(!verdict.is_mendable);
    }
}

#[test]
fn the_older_version_is_wrong() {
    let verdict = settled(&[data(3, 1), data(2, 7), data(3, 1)]);
    assert_eq!((verdict.blocks, verdict.wrong), (1, vec![1]));
    assert!(verdict.is_mendable);
    let verdict = settled(&[HOLE, data(3, 1)]);
    assert_eq!((verdict.wrong, verdict.is_mendable), (vec![0], true));
}

#[test]
fn one_version_with_two_contents_has_no_right_copy() {
    let verdict = settled(&[data(3, 1), data(3, 2)]);
    assert_eq!((verdict.blocks, verdict.is_mendable), (1, false));
    assert!(verdict.wrong.is_empty());
    // Damage on the first does not hide that the others differ.
    let verdict = settled(&[lost(), data(3, 1), data(3, 2)]);
    assert_eq!(verdict.blocks, 1);
}

#[test]
fn copies_that_are_each_wrong_somewhere_are_not_mended() {
    let copies = [vec![data(3, 1), data(2, 1)], vec![data(2, 2), data(3, 2)]];
    let verdict = compare(&copies, &copies);
    assert_eq!((verdict.blocks, verdict.is_mendable), (2, false));
    assert!(verdict.wrong.is_empty(), "{verdict:?}");
}

#[test]
fn what_changes_between_the_looks_is_on_its_way() {
    let before = [vec![data(3, 1)], vec![data(3, 1)]];
    let after = [vec![data(4, 2)], vec![data(3, 1)]];
    let verdict = compare(&before, &after);
    assert_eq!((verdict.blocks, verdict.changing), (0, 1));
    // But one version never has two contents.
    let after = [vec![data(4, 2)], vec![data(4, 1)]];
    assert_eq!(compare(&before, &after).blocks, 1);
}

#[test]
fn a_digest_is_of_content_alone() {
    let of = |sums: &[BlockSum]| digest(&sums.to_vec());
    assert_eq!(of(&[HOLE, zeros(3)]), LeafDigest::default());
    assert_eq!(of(&[data(3, 1), HOLE]), of(&[data(4, 1), zeros(9)]));
    assert_ne!(of(&[data(3, 1), HOLE]), of(&[HOLE, data(3, 1)]));
    assert_ne!(of(&[data(3, 1)]), of(&[data(3, 2)]));
    assert_ne!(of(&[data(3, 0)]), of(&[HOLE]));
}

#[test]
fn the_copy_that_is_wrong_most_often_is_mended_first() {
    let name = |n| NodeName {
        id: node(n),
        address: None,
    };
    let differs = |wrong: &[u8], blocks, is_mendable| Ailment::Differs {
        volume: "v1".to_owned(),
        chunk: ChunkIndex(0),
        leaf: 0,
        blocks,
        wrong: wrong.iter().map(|n| (name(*n), store(*n))).collect(),
        is_mendable,
    };
    let found = [
        differs(&[1], 2, true),
        differs(&[2], 5, true),
        differs(&[1], 4, true),
        differs(&[0], 100, false),
    ];
    assert_eq!(worst_copy(&found, "v1"), Some((name(1), store(1))));
    assert_eq!(worst_copy(&found, "v2"), None);
    assert_eq!(worst_copy(&found[3..], "v1"), None);
}
