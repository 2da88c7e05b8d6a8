use uuid::Uuid;

use super::*;
use crate::records::sample::read_volume;
use crate::records::{Placement, Record, Replica, ReplicaSet, Revision, begin_delete, configure};
use crate::units::{NodeId, StoreId};

fn head() -> HeadClaim {
    HeadClaim {
        node: NodeId(Uuid::from_u128(5)),
        incarnation: Uuid::from_u128(6),
    }
}

fn node(id: &str) -> Versioned<ClientNodeRecord> {
    Versioned {
        record: ClientNodeRecord {
            id: ClientNodeId::parse(id).expect("id"),
            topology: Default::default(),
            registered_at_unix_ms: 0,
        },
        changed_at: Revision(9),
    }
}

fn ask(
    volume: &mut Versioned<VolumeRecord>,
    to: &str,
    mode: AccessMode,
    read_only: bool,
) -> Result<bool, PublishError> {
    let node = node(to);
    let new = NewPublication {
        node: node.record.id.clone(),
        mode,
        read_only,
        token: token(to),
        published_at_unix_ms: 4,
    };
    let decided = publish(volume, &node, &new)?;
    let changed = decided.is_some();
    if let Some((record, transaction)) = decided {
        assert_eq!(record.check_invariants(), Ok(()));
        assert_eq!(transaction.conditions.len(), 2, "the volume and the node");
        let stored = VolumeRecord::decode("k", &record.encode()).expect("decodes");
        assert_eq!(stored, record);
        volume.record = record;
    }
    Ok(changed)
}

#[test]
fn one_writer_or_many_readers() {
    use AccessMode::*;
    let all = [
        SingleNodeWriter,
        SingleNodeReader,
        MultiNodeReader,
        SingleNodeSingleWriter,
        SingleNodeMultiWriter,
    ];
    for first in all {
        for second in all {
            let mut volume = read_volume();
            assert_eq!(ask(&mut volume, "a", first, false), Ok(true));
            assert_eq!(
                ask(&mut volume, "a", first, false),
                Ok(false),
                "asked again"
            );
            if first != second {
                assert!(matches!(
                    ask(&mut volume, "a", second, false),
                    Err(PublishError::OtherTerms { .. })
                ));
            }
            let elsewhere = ask(&mut volume, "b", second, false);
            if (first, second) == (MultiNodeReader, MultiNodeReader) {
                assert_eq!(elsewhere, Ok(true));
                assert!(volume.record.publications.iter().all(|p| p.read_only));
            } else {
                let refusal = elsewhere.expect_err("elsewhere").to_string();
                assert!(refusal.contains("published to node a"), "{refusal}");
            }
        }
    }
}

#[test]
fn a_mode_that_only_reads_is_read_only_whatever_is_asked() {
    let mut volume = read_volume();
    assert_eq!(
        ask(&mut volume, "a", AccessMode::MultiNodeReader, false),
        Ok(true)
    );
    assert_eq!(
        ask(&mut volume, "a", AccessMode::MultiNodeReader, true),
        Ok(false)
    );
    volume.record.publications.clear();
    volume.record.read_only = true;
    assert!(matches!(
        ask(&mut volume, "a", AccessMode::SingleNodeWriter, false),
        Err(PublishError::ReadOnly { .. })
    ));
    assert_eq!(
        ask(&mut volume, "a", AccessMode::SingleNodeWriter, true),
        Ok(true)
    );
}

#[test]
fn taking_a_volume_back_raises_its_epoch_and_leaves_the_others() {
    let mut volume = read_volume();
    for to in ["a", "b", "c"] {
        ask(&mut volume, to, AccessMode::MultiNodeReader, false).expect("published");
    }
    let b = ClientNodeId::parse("b").expect("id");
    let token = volume.record.publication_of(&b).expect("b has it").token;
    let (after, _) = unpublish(&volume, Some(&b), head(), Epoch(0))
        .expect("claimed")
        .expect("was published");
    assert_eq!((after.epoch, after.publications.len()), (Epoch(3), 2));
    assert!(!after.admitted().admits(Some(token)) && !after.admitted().admits(None));
    volume.record = after;
    assert_eq!(
        unpublish(&volume, Some(&b), head(), Epoch(0)),
        Ok(None),
        "done already"
    );
    let (after, _) = unpublish(&volume, None, head(), Epoch(8))
        .expect("claimed")
        .expect("was published");
    assert_eq!(
        (after.epoch, after.admitted()),
        (Epoch(9), Admitted::Anyone)
    );
}

/// With one copy.
fn read_replicated() -> Versioned<VolumeRecord> {
    let mut volume = read_volume();
    let replica = Replica::in_sync(head().node, StoreId(Uuid::from_u128(7)));
    volume.record.placement = Placement {
        stores: Vec::new(),
        sets: vec![ReplicaSet {
            replicas: vec![replica],
        }],
    };
    volume
}

/// A head elsewhere would go on letting in whom this takes away, until it heard of it.
#[test]
fn a_volume_with_copies_is_taken_back_by_the_node_of_its_head_alone() {
    let mut volume = read_replicated();
    for to in ["a", "b"] {
        ask(&mut volume, to, AccessMode::MultiNodeReader, false).expect("published");
    }
    let [b, c] = ["b", "c"].map(|id| ClientNodeId::parse(id).expect("id"));
    let other = HeadClaim {
        node: NodeId(Uuid::from_u128(99)),
        ..head()
    };
    for (serving, is_decided) in [(None, true), (Some(head()), true), (Some(other), false)] {
        volume.record.head = serving;
        let ended = unpublish(&volume, Some(&b), head(), Epoch(0));
        match ended {
            Ok(Some((after, _))) if is_decided => {
                assert_eq!(
                    (after.publications.len(), after.epoch),
                    (1, volume.record.epoch)
                );
            }
            Err(UnpublishError::Elsewhere(ServedElsewhere { node, .. })) if !is_decided => {
                assert_eq!(node, other.node);
            }
            ended => panic!("{serving:?}: {ended:?}"),
        }
        // Nothing is to be ended: whoever serves it.
        assert_eq!(unpublish(&volume, Some(&c), head(), Epoch(0)), Ok(None));
    }
}

#[test]
fn a_published_volume_is_neither_deleted_nor_reconfigured() {
    let mut volume = read_volume();
    ask(&mut volume, "a", AccessMode::SingleNodeWriter, false).expect("published");
    let refusal = begin_delete(&volume, head().node, 0)
        .expect_err("published")
        .to_string();
    assert!(refusal.contains("node a"), "{refusal}");
    assert!(configure(&volume, head().node, Some(true), None, 0).is_err());
    assert_eq!(
        configure(&volume, head().node, Some(false), None, 0),
        Ok(None)
    );
}

#[test]
fn whoever_is_not_the_head_neither_deletes_nor_reconfigures() {
    let mut volume = read_replicated();
    let node = head().node;
    let other = NodeId(Uuid::from_u128(99));
    for (serving, asked, is_decided) in [
        (None, node, true),
        (Some(head()), node, true),
        (Some(head()), other, false),
    ] {
        volume.record.head = serving;
        let elsewhere = ServedElsewhere {
            name: volume.record.name.clone(),
            node,
        };
        let deleted = begin_delete(&volume, asked, 0).map(|change| change.is_some());
        let configured = configure(&volume, asked, Some(true), None, 0).map(|c| c.is_some());
        if is_decided {
            assert_eq!((deleted, configured), (Ok(true), Ok(true)));
        } else {
            assert_eq!(deleted, Err(elsewhere.clone().into()));
            assert_eq!(configured, Err(elsewhere.into()));
        }
        // Nothing is to be changed: whoever serves it.
        assert_eq!(configure(&volume, asked, Some(false), None, 0), Ok(None));
    }
}

#[test]
fn the_number_of_readers_is_bounded() {
    let mut volume = read_volume();
    for number in 0..PUBLICATIONS_MAX {
        assert_eq!(
            ask(
                &mut volume,
                &format!("n{number}"),
                AccessMode::MultiNodeReader,
                true
            ),
            Ok(true)
        );
    }
    assert!(matches!(
        ask(&mut volume, "more", AccessMode::MultiNodeReader, true),
        Err(PublishError::TooMany { .. })
    ));
}

#[test]
fn an_export_name_leads_back_and_its_secret_is_not_printed() {
    let mut volume = read_volume();
    ask(&mut volume, "a", AccessMode::SingleNodeWriter, false).expect("published");
    let publication = &volume.record.publications[0];
    let name = publication.export_name(volume.record.id);
    assert_eq!(
        parse_export_name(&name),
        Some((volume.record.id, publication.token))
    );
    for other in [
        "db",
        "",
        "@",
        "db@x",
        &volume.record.id.0.to_string(),
        &name[1..],
        &name[..name.len() - 1],
    ] {
        assert_eq!(parse_export_name(other), None, "{other:?}");
    }
    let secret = publication.token.0.simple().to_string();
    let printed = format!("{:?} {:?}", volume, volume.record.admitted());
    assert!(!printed.contains(&secret[..8]), "{printed}");
}

#[test]
fn impossible_publications_are_seen() {
    let mut two = read_volume();
    ask(&mut two, "a", AccessMode::MultiNodeReader, true).expect("published");
    ask(&mut two, "b", AccessMode::MultiNodeReader, true).expect("published");
    let broken = |change: &dyn Fn(&mut VolumeRecord)| {
        let mut record = two.record.clone();
        change(&mut record);
        record.check_invariants()
    };
    assert_eq!(broken(&|_| {}), Ok(()));
    assert!(broken(&|r| r.publications[1].mode = AccessMode::SingleNodeWriter).is_err());
    assert!(broken(&|r| r.publications[1].read_only = false).is_err());
    assert!(broken(&|r| r.publications[1].token = r.publications[0].token).is_err());
    assert!(broken(&|r| r.publications[1].node = r.publications[0].node.clone()).is_err());
    assert!(broken(&|r| r.state = VolumeState::Deleting).is_err());
}

/// One of its own for each node.
fn token(of: &str) -> ExportToken {
    let mut number = 0x5eed_0000_0000_4000u128;
    for byte in of.bytes() {
        number = number
            .wrapping_mul(0x0100_0000_01b3)
            .wrapping_add(u128::from(byte));
    }
    ExportToken(Uuid::from_u128(number))
}
