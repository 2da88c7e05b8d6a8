use uuid::Uuid;

use super::*;
use crate::records::{Placement, Replica, ReplicaSet, VolumeName};
use crate::units::{ChunkIndex, Epoch};

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
        epoch: Epoch(5),
        never_written: false,
        ..VolumeRecord::new(
            volume(n),
            VolumeName::parse(&format!("v{n}")).expect("a name"),
            4096,
            LayerId(u64::from(n)),
            Placement {
                stores: Vec::new(),
                sets: vec![ReplicaSet {
                    replicas: replicas.collect(),
                }],
            },
        )
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
