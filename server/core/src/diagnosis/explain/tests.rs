use uuid::Uuid;

use super::*;
use crate::diagnosis::{CopyFact, Filling, StoreFact, VolumeFact};
use crate::records::{HeadClaim, Placement, ReplicaSet, VolumeName, VolumeRecord};
use crate::replication::wire::Status;
use crate::units::{Epoch, LayerId, VolumeId};

const NOW: u64 = 1_700_000_000_000;

fn node(n: u8) -> NodeId {
    NodeId(Uuid::from_u128(u128::from(n)))
}

fn store(n: u8) -> StoreId {
    StoreId(Uuid::from_u128(0x100 + u128::from(n)))
}

/// A volume with a copy in each of these states on nodes 0, 1, 2…, served by node 0, and all of it well.
fn facts(states: &[ReplicaState]) -> Facts {
    let replicas = states.iter().zip(0..).map(|(state, n)| Replica {
        state: *state,
        ..Replica::in_sync(node(n), store(n))
    });
    let record = VolumeRecord {
        epoch: Epoch(3),
        head: Some(HeadClaim {
            node: node(0),
            incarnation: Uuid::from_u128(1),
        }),
        never_written: false,
        ..VolumeRecord::new(
            VolumeId(Uuid::from_u128(9)),
            VolumeName::parse("db").expect("a name"),
            4096,
            LayerId(1),
            Placement {
                stores: Vec::new(),
                sets: vec![ReplicaSet {
                    replicas: replicas.collect(),
                }],
            },
        )
    };
    let nodes = (0..states.len() as u8).map(|n| NodeFact {
        id: node(n),
        address: Some(format!("10.0.0.{n}:9461")),
        standing: Standing::Member,
        told_at_unix_ms: Some(NOW - 5_000),
        report: Ok(NodeReport {
            stores: vec![StoreFact {
                id: store(n),
                path: format!("/s{n}"),
                trouble: None,
            }],
            volume: VolumeFact::default(),
        }),
    });
    let mut facts = Facts {
        now_unix_ms: NOW,
        record,
        metadata_error: None,
        nodes: nodes.collect(),
        dropped: Vec::new(),
    };
    let copies = (0..states.len() as u8).map(|n| CopyFact {
        node: node(n),
        store: store(n),
        is_linked: true,
        away_ms: None,
        failure: None,
        is_lost: false,
        filling: None,
    });
    let head = HeadFact {
        phase: PhaseName::Serving,
        epoch: Epoch(3),
        writes_in_flight: 0,
        oldest_write_ms: 0,
        swapping_ms: None,
        copies: copies.collect(),
    };
    let volume = &mut report(&mut facts, 0).volume;
    volume.is_served = true;
    volume.head = Some(head);
    facts
}

fn report(facts: &mut Facts, n: usize) -> &mut NodeReport {
    facts.nodes[n].report.as_mut().expect("it answers")
}

fn head(facts: &mut Facts) -> &mut HeadFact {
    report(facts, 0).volume.head.as_mut().expect("a head")
}

/// The head has no link to a node, which does not answer the node that was asked either.
fn away(facts: &mut Facts, n: usize, for_ms: u64) {
    facts.nodes[n].report = Err("connection refused".to_owned());
    let copy = &mut head(facts).copies[n];
    copy.is_linked = false;
    copy.away_ms = Some(for_ms);
}

fn codes(explanation: &Explanation) -> Vec<&'static str> {
    let findings = explanation.findings.iter();
    findings.map(|finding| finding.cause.code()).collect()
}

fn why(explanation: &Explanation) -> &OutBecause {
    let find = |finding: &'_ Finding| matches!(finding.cause, Cause::CopyOut { .. });
    let found = explanation.findings.iter().find(|f| find(f));
    match &found.expect("a copy that is out").cause {
        Cause::CopyOut { why, .. } => why,
        other => panic!("{other:?}"),
    }
}

use ReplicaState::{InSync, Joining, Out};

#[test]
fn what_is_well_has_no_causes() {
    let said = explain(&facts(&[InSync; 3]));
    assert_eq!(said.condition, Condition::Healthy);
    assert_eq!(said.findings, []);
    assert!(said.summary.contains("3 of 3"), "{}", said.summary);
}

#[test]
fn a_node_that_is_away_degrades_and_is_named() {
    let mut facts = facts(&[InSync, InSync, Out]);
    away(&mut facts, 2, 90_000);
    let said = explain(&facts);
    assert_eq!(said.condition, Condition::Degraded);
    assert_eq!(codes(&said), ["copy-out"]);
    assert_eq!(said.findings[0].since_unix_ms, Some(NOW - 90_000));
    let text = said.findings[0].cause.to_string();
    assert!(
        text.contains("10.0.0.2:9461") && text.contains("connection refused"),
        "{text}"
    );
    let remedies = said.findings[0].cause.remedies("db");
    assert!(
        remedies[0].contains("start ashlard on node"),
        "{remedies:?}"
    );
    assert!(
        said.summary.contains("writes wait if one more"),
        "{}",
        said.summary
    );
}

#[test]
fn writes_that_wait_say_which_nodes_would_do() {
    let mut facts = facts(&[InSync, Out, Out]);
    away(&mut facts, 1, 1_000);
    away(&mut facts, 2, 2_000);
    head(&mut facts).writes_in_flight = 7;
    let said = explain(&facts);
    assert_eq!(said.condition, Condition::Stuck);
    assert_eq!(codes(&said), ["writes-wait", "copy-out", "copy-out"]);
    assert!(
        said.summary
            .contains("1 of 3 copies are in sync and min_in_sync is 2, so writes wait (7 now)"),
        "{}",
        said.summary
    );
    let remedy = said.findings[0].cause.remedies("db").join(" ");
    assert!(
        remedy.contains("10.0.0.1:9461") && remedy.contains("10.0.0.2:9461"),
        "{remedy}"
    );
}

#[test]
fn a_copy_that_is_being_filled_frees_writes_by_itself() {
    let mut facts = facts(&[InSync, Out, Out]);
    away(&mut facts, 2, 2_000);
    head(&mut facts).copies[1].filling = Some(Filling {
        copied_blocks: 256,
        leaves_left: 3,
        is_finishing: false,
    });
    let said = explain(&facts);
    assert_eq!(said.condition, Condition::Waiting);
    assert!(matches!(why(&said), OutBecause::Filling(_)));
    let text = why(&said).to_string();
    assert!(text.contains("1024 KiB copied, 3 leaf(s)"), "{text}");
    let waits = &said.findings[0].cause;
    assert!(waits.remedies("db").is_empty(), "{waits:?}");
}

#[test]
fn each_way_of_being_out_is_told_apart() {
    let out = |change: &dyn Fn(&mut Facts)| {
        let mut facts = facts(&[InSync, InSync, Out]);
        head(&mut facts).copies[2].away_ms = Some(1_000);
        change(&mut facts);
        why(&explain(&facts)).clone()
    };
    assert_eq!(out(&|_| {}), OutBecause::Returning);
    assert_eq!(
        out(&|facts| head(facts).copies[2].is_linked = false),
        OutBecause::NoLink
    );
    assert_eq!(
        out(&|facts| head(facts).copies[2].failure = Some(Status::NoSpace)),
        OutBecause::Failed(Status::NoSpace)
    );
    assert_eq!(
        out(&|facts| report(facts, 2).stores.clear()),
        OutBecause::StoreMissing
    );
    assert_eq!(
        out(&|facts| {
            report(facts, 2).stores[0].trouble = Some(StoreTrouble::Poisoned {
                reason: "EIO".to_owned(),
            });
        }),
        OutBecause::StorePoisoned
    );
    assert_eq!(
        out(&|facts| facts.nodes[2].standing = Standing::Removed),
        OutBecause::NodeGone
    );
    assert_eq!(
        out(&|facts| head(facts).phase = PhaseName::Sealing),
        OutBecause::NoHead
    );
    // The node that was asked does not reach it, but the head does: it is not away.
    assert_eq!(
        out(&|facts| {
            facts.nodes[2].report = Err("timeout".to_owned());
            head(facts).copies[2].away_ms = None;
        }),
        OutBecause::Returning
    );
    // One that stands still has open links, and answers nobody.
    assert_eq!(
        out(&|facts| facts.nodes[2].report = Err("timeout".to_owned())),
        OutBecause::NodeAway {
            error: "timeout".to_owned()
        }
    );
}

#[test]
fn a_serving_node_that_is_away_leaves_the_volume_unserved() {
    let mut facts = facts(&[InSync; 3]);
    facts.nodes[0].report = Err("no route".to_owned());
    let said = explain(&facts);
    assert_eq!(said.condition, Condition::Unserved);
    assert_eq!(codes(&said), ["serving-node-away"]);
    assert_eq!(said.findings[0].since_unix_ms, Some(NOW - 5_000));
    let remedies = said.findings[0].cause.remedies("db");
    assert!(
        remedies.len() == 2 && remedies[1].contains("ashlar volume open db"),
        "{remedies:?}"
    );
}

#[test]
fn a_head_that_is_not_there_is_told_with_the_reason() {
    let mut facts = facts(&[InSync; 3]);
    let volume = &mut report(&mut facts, 0).volume;
    volume.head = None;
    volume.unserved_reason = "its epochs are used up".to_owned();
    let said = explain(&facts);
    assert_eq!(said.condition, Condition::Unserved);
    assert!(
        said.summary.contains("its epochs are used up"),
        "{}",
        said.summary
    );
    facts.record.head = None;
    assert_eq!(codes(&explain(&facts)), ["never-served"]);
}

#[test]
fn sealing_waits_for_the_lease_or_for_the_last_copy() {
    let mut facts = facts(&[InSync, InSync, Out]);
    head(&mut facts).phase = PhaseName::Sealing;
    away(&mut facts, 1, 500);
    let said = explain(&facts);
    assert_eq!(said.condition, Condition::Waiting);
    assert!(codes(&said).contains(&"lease-wait"), "{said:?}");
    // The copy that is here lost power: the one that is away may hold what was answered.
    head(&mut facts).copies[0].is_lost = true;
    let said = explain(&facts);
    assert_eq!(said.condition, Condition::Unserved);
    assert_eq!(codes(&said)[0], "last-copies-away");
    assert!(said.summary.contains("10.0.0.1:9461"), "{}", said.summary);
}

#[test]
fn a_copy_that_fails_now_is_being_recorded() {
    let mut facts = facts(&[InSync; 3]);
    away(&mut facts, 2, 300);
    head(&mut facts).swapping_ms = Some(9_000);
    let said = explain(&facts);
    assert_eq!(said.condition, Condition::Waiting);
    let codes = codes(&said);
    assert!(
        codes.contains(&"copy-failing") && codes.contains(&"record-waits"),
        "{codes:?}"
    );
}

#[test]
fn stores_are_looked_at() {
    let mut facts = facts(&[InSync; 3]);
    report(&mut facts, 1).stores[0].trouble = Some(StoreTrouble::Full);
    report(&mut facts, 2).stores[0].trouble = Some(StoreTrouble::Poisoned {
        reason: "EIO".to_owned(),
    });
    assert_eq!(codes(&explain(&facts)), ["store-full", "store-poisoned"]);
}

#[test]
fn a_volume_of_one_node_is_explained_too() {
    let mut facts = facts(&[InSync]);
    facts.record.placement = Placement {
        stores: vec![store(0), store(0), store(1)],
        sets: Vec::new(),
    };
    facts.nodes[0].standing = Standing::Alone;
    assert_eq!(codes(&explain(&facts)), ["store-missing"]);
    let volume = &mut report(&mut facts, 0).volume;
    volume.is_served = false;
    volume.unserved_reason = "its store is not open".to_owned();
    let said = explain(&facts);
    assert_eq!(said.condition, Condition::Unserved);
    assert_eq!(codes(&said), ["not-served", "store-missing"]);
}

#[test]
fn a_deletion_says_whom_it_waits_for() {
    let mut facts = facts(&[InSync; 3]);
    facts.record.state = VolumeState::Deleting;
    facts.dropped = vec![node(0)];
    away(&mut facts, 2, 1);
    let said = explain(&facts);
    assert_eq!(said.condition, Condition::Deleting);
    let Cause::Deleting { waiting_for } = &said.findings[0].cause else {
        panic!("{said:?}");
    };
    let answers: Vec<bool> = waiting_for.iter().map(|(_, answers)| *answers).collect();
    assert_eq!(answers, [true, false]);
    let remedies = said.findings[0].cause.remedies("db");
    assert!(
        remedies.len() == 1 && remedies[0].contains("10.0.0.2:9461"),
        "{remedies:?}"
    );
}

#[test]
fn an_outage_of_the_metadata_store_is_told_beside_the_rest() {
    let mut facts = facts(&[InSync, InSync, Joining]);
    facts.metadata_error = Some("no leader".to_owned());
    let said = explain(&facts);
    assert!(codes(&said).contains(&"metadata-away"), "{said:?}");
    assert_eq!(said.condition, Condition::Degraded);
}

#[test]
fn what_somebody_wanted_is_noted_and_no_trouble() {
    let mut facts = facts(&[InSync; 3]);
    facts.record.read_only = true;
    facts.record.limits.iops = Some(100);
    let said = explain(&facts);
    assert_eq!(said.condition, Condition::Healthy);
    assert_eq!(codes(&said), ["read-only", "limited"]);
}

#[test]
fn every_cause_that_waits_for_a_person_says_what_to_do() {
    let mut facts = facts(&[InSync, Out, Out]);
    away(&mut facts, 1, 1);
    away(&mut facts, 2, 1);
    for change in [
        |_: &mut Facts| {},
        |facts: &mut Facts| facts.record.head = None,
        |facts: &mut Facts| facts.nodes[0].report = Err("away".to_owned()),
        |facts: &mut Facts| facts.metadata_error = Some("away".to_owned()),
    ] {
        let mut facts = facts.clone();
        change(&mut facts);
        for finding in explain(&facts).findings {
            let is_hopeless = matches!(
                finding.cause,
                Cause::CopyOut {
                    why: OutBecause::NoHead,
                    ..
                }
            );
            if finding.cause.condition() > Condition::Waiting {
                let remedies = finding.cause.remedies("db");
                assert!(is_hopeless || !remedies.is_empty(), "{finding:?}");
            }
        }
    }
}
