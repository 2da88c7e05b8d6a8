//! Between the words of the daemon and the messages of `ashlar.diagnosis.v1`.

use ashlar_core::diagnosis::doctor::{
    Ailment, Holdings, LayerHolding, LeafDigest, SealHolding, StoreHolding, Weight,
};
use ashlar_core::diagnosis::events::{Event, Severity};
use ashlar_core::diagnosis::{
    Condition, CopyFact, Explanation, Facts, Filling, Finding, HeadFact, NodeReport, StoreFact,
    StoreTrouble, VolumeFact,
};
use ashlar_core::replication::wire::Status;
use ashlar_core::replication::{PhaseName, Seal};
use ashlar_core::store::{BlockContent, BlockState, BlockSum, LeafSums};
use ashlar_core::units::{
    ChunkIndex, Epoch, LEAF_BLOCKS, LayerId, NodeId, StoreId, Version, VolumeId,
};
use ashlar_proto::diagnosis as proto;
use uuid::Uuid;

use super::doctor::Findings;
use super::peers::DigestPage;

fn condition(condition: Condition) -> proto::Condition {
    match condition {
        Condition::Healthy => proto::Condition::Healthy,
        Condition::Degraded => proto::Condition::Degraded,
        Condition::Waiting => proto::Condition::Waiting,
        Condition::Stuck => proto::Condition::Stuck,
        Condition::Unserved => proto::Condition::Unserved,
        Condition::Deleting => proto::Condition::Deleting,
    }
}

/// The answer to who asks for an explanation.
pub(crate) fn explanation(facts: &Facts, explanation: &Explanation) -> proto::ExplainResponse {
    let record = &facts.record;
    let cause = |finding: &Finding| proto::Cause {
        code: finding.cause.code().to_owned(),
        condition: condition(finding.cause.condition()).into(),
        text: finding.cause.to_string(),
        since_unix_ms: finding.since_unix_ms.unwrap_or(0) as i64,
        remedies: finding.cause.remedies(record.name.as_str()),
    };
    let silent = facts.nodes.iter().filter(|node| node.report.is_err());
    proto::ExplainResponse {
        volume_id: record.id.0.to_string(),
        volume_name: record.name.to_string(),
        condition: condition(explanation.condition).into(),
        summary: explanation.summary.clone(),
        causes: explanation.findings.iter().map(cause).collect(),
        head_node_id: record
            .head
            .map_or_else(String::new, |head| head.node.0.to_string()),
        silent_node_ids: silent.map(|node| node.id.0.to_string()).collect(),
    }
}

/// An event as it is sent.
pub(crate) fn event(event: &Event) -> proto::Event {
    let subject = &event.subject;
    let text = |id: Option<Uuid>| id.map_or_else(String::new, |id| id.to_string());
    proto::Event {
        sequence: event.sequence,
        at_unix_ms: event.at_unix_ms as i64,
        last_at_unix_ms: event.last_at_unix_ms as i64,
        count: event.count,
        severity: match event.what.severity() {
            Severity::Info => proto::Severity::Info,
            Severity::Warning => proto::Severity::Warning,
            Severity::Error => proto::Severity::Error,
        }
        .into(),
        code: event.what.code().to_owned(),
        text: event.what.to_string(),
        volume_id: text(subject.volume.map(|id| id.0)),
        volume_name: subject.volume_name.clone(),
        node_id: text(subject.node.map(|id| id.0)),
        store_id: text(subject.store.map(|id| id.0)),
    }
}

/// A report as it is sent.
pub(crate) fn report_message(report: &NodeReport) -> proto::ReportResponse {
    let store = |store: &StoreFact| proto::StoreReport {
        store_id: store.id.0.to_string(),
        path: store.path.clone(),
        poison_reason: match &store.trouble {
            Some(StoreTrouble::Poisoned { reason }) => reason.clone(),
            Some(StoreTrouble::Full) | None => String::new(),
        },
        is_full: store.trouble == Some(StoreTrouble::Full),
    };
    let volume = &report.volume;
    proto::ReportResponse {
        stores: report.stores.iter().map(store).collect(),
        is_served: volume.is_served,
        unserved_reason: volume.unserved_reason.clone(),
        head: volume.head.as_ref().map(head_message),
        connections: volume.connections,
        requests: volume.requests,
    }
}

fn head_message(head: &HeadFact) -> proto::HeadReport {
    let copy = |copy: &CopyFact| proto::CopyReport {
        node_id: copy.node.0.to_string(),
        store_id: copy.store.0.to_string(),
        is_linked: copy.is_linked,
        away_ms: copy.away_ms,
        failure: copy.failure.map_or(0, |status| u32::from(status as u16)),
        is_lost: copy.is_lost,
        filling: copy.filling.map(|filling| proto::FillingReport {
            copied_blocks: filling.copied_blocks,
            leaves_left: filling.leaves_left,
            is_finishing: filling.is_finishing,
        }),
    };
    proto::HeadReport {
        phase: match head.phase {
            PhaseName::Claiming => proto::HeadPhase::Claiming,
            PhaseName::Sealing => proto::HeadPhase::Sealing,
            PhaseName::Reconciling => proto::HeadPhase::Reconciling,
            PhaseName::Serving => proto::HeadPhase::Serving,
            PhaseName::Closing => proto::HeadPhase::Closing,
            PhaseName::Stopped => proto::HeadPhase::Stopped,
        }
        .into(),
        epoch: head.epoch.0,
        writes_in_flight: head.writes_in_flight,
        oldest_write_ms: head.oldest_write_ms,
        swapping_ms: head.swapping_ms,
        copies: head.copies.iter().map(copy).collect(),
    }
}

fn uuid(text: &str) -> Result<Uuid, String> {
    Uuid::try_parse(text).map_err(|_| format!("its answer names {text:?}, which is no id"))
}

/// A report as another daemon sent it; what cannot be understood is an error.
pub(super) fn report(message: proto::ReportResponse) -> Result<NodeReport, String> {
    let store = |store: proto::StoreReport| {
        let trouble = match (store.poison_reason, store.is_full) {
            (reason, _) if !reason.is_empty() => Some(StoreTrouble::Poisoned { reason }),
            (_, true) => Some(StoreTrouble::Full),
            (_, false) => None,
        };
        Ok::<_, String>(StoreFact {
            id: StoreId(uuid(&store.store_id)?),
            path: store.path,
            trouble,
        })
    };
    let stores: Result<Vec<_>, _> = message.stores.into_iter().map(store).collect();
    Ok(NodeReport {
        stores: stores?,
        volume: VolumeFact {
            is_served: message.is_served,
            unserved_reason: message.unserved_reason,
            head: message.head.map(head).transpose()?,
            connections: message.connections,
            requests: message.requests,
        },
    })
}

fn head(head: proto::HeadReport) -> Result<HeadFact, String> {
    let phase = match head.phase() {
        proto::HeadPhase::Claiming => PhaseName::Claiming,
        proto::HeadPhase::Sealing => PhaseName::Sealing,
        proto::HeadPhase::Reconciling => PhaseName::Reconciling,
        proto::HeadPhase::Serving => PhaseName::Serving,
        proto::HeadPhase::Closing => PhaseName::Closing,
        proto::HeadPhase::Stopped => PhaseName::Stopped,
        proto::HeadPhase::Unspecified => {
            return Err("its answer is of another version".to_owned());
        }
    };
    let copy = |copy: proto::CopyReport| {
        Ok::<_, String>(CopyFact {
            node: NodeId(uuid(&copy.node_id)?),
            store: StoreId(uuid(&copy.store_id)?),
            is_linked: copy.is_linked,
            away_ms: copy.away_ms,
            failure: u16::try_from(copy.failure)
                .ok()
                .and_then(Status::from_wire)
                .filter(|status| *status != Status::Ok),
            is_lost: copy.is_lost,
            filling: copy.filling.map(|filling| Filling {
                copied_blocks: filling.copied_blocks,
                leaves_left: filling.leaves_left,
                is_finishing: filling.is_finishing,
            }),
        })
    };
    let copies: Result<Vec<_>, _> = head.copies.into_iter().map(copy).collect();
    Ok(HeadFact {
        phase,
        epoch: Epoch(head.epoch),
        writes_in_flight: head.writes_in_flight,
        oldest_write_ms: head.oldest_write_ms,
        swapping_ms: head.swapping_ms,
        copies: copies?,
    })
}

/// What was found, as it is sent.
pub(crate) fn findings_message(findings: &Findings) -> proto::ExamineResponse {
    let ailment = |ailment: &Ailment| proto::Ailment {
        code: ailment.code().to_owned(),
        weight: match ailment.weight() {
            Weight::Unknown => proto::Weight::Unknown,
            Weight::Untidy => proto::Weight::Untidy,
            Weight::Wrong => proto::Weight::Wrong,
        }
        .into(),
        text: ailment.to_string(),
        remedy: ailment.remedy(),
    };
    proto::ExamineResponse {
        volume_name: findings.volume.clone(),
        ailments: findings.ailments.iter().map(ailment).collect(),
        repairs: findings.repairs.clone(),
        compared_leaves: findings.compared_leaves,
    }
}

/// What a daemon holds, as it is sent.
pub(crate) fn holdings_message(holdings: &Holdings) -> proto::HoldingsResponse {
    let layer = |held: &LayerHolding| proto::LayerHolding {
        layer: held.layer.0,
        chunks: held.chunks,
        newest_version: held.newest.0,
    };
    let store = |held: &StoreHolding| proto::StoreHolding {
        store_id: held.store.0.to_string(),
        layers: held.layers.iter().map(layer).collect(),
    };
    let seal = |held: &SealHolding| proto::SealHolding {
        volume_id: held.volume.0.to_string(),
        store_id: held.store.0.to_string(),
        epoch: held.seal.epoch.0,
        is_lost: held.seal.lost,
    };
    proto::HoldingsResponse {
        stores: holdings.stores.iter().map(store).collect(),
        seals: holdings.seals.iter().map(seal).collect(),
    }
}

/// What another daemon holds.
pub(super) fn holdings(message: proto::HoldingsResponse) -> Result<Holdings, String> {
    let layer = |held: &proto::LayerHolding| LayerHolding {
        layer: LayerId(held.layer),
        chunks: held.chunks,
        newest: Version(held.newest_version),
    };
    let store = |held: &proto::StoreHolding| {
        Ok::<_, String>(StoreHolding {
            store: StoreId(uuid(&held.store_id)?),
            layers: held.layers.iter().map(layer).collect(),
        })
    };
    let seal = |held: &proto::SealHolding| {
        Ok::<_, String>(SealHolding {
            volume: VolumeId(uuid(&held.volume_id)?),
            store: StoreId(uuid(&held.store_id)?),
            seal: Seal {
                epoch: Epoch(held.epoch),
                lost: held.is_lost,
                ..Seal::default()
            },
        })
    };
    let stores: Result<Vec<_>, _> = message.stores.iter().map(store).collect();
    let seals: Result<Vec<_>, _> = message.seals.iter().map(seal).collect();
    Ok(Holdings {
        stores: stores?,
        seals: seals?,
    })
}

/// A page of digests, as it is sent.
pub(crate) fn digest_message(page: &DigestPage) -> proto::DigestsResponse {
    let leaves = page.leaves.iter();
    let leaf = |(chunk, leaf, digest): &(ChunkIndex, u32, LeafDigest)| proto::LeafDigest {
        chunk: chunk.0,
        leaf: *leaf,
        content: digest.content,
    };
    proto::DigestsResponse {
        leaves: leaves.map(leaf).collect(),
        more_after_chunk: page.more_after.map(|chunk| chunk.0),
    }
}

/// A page of digests of another daemon.
pub(super) fn digest_page(message: proto::DigestsResponse) -> DigestPage {
    let leaf = |leaf: proto::LeafDigest| {
        let content = leaf.content;
        (ChunkIndex(leaf.chunk), leaf.leaf, LeafDigest { content })
    };
    DigestPage {
        leaves: message.leaves.into_iter().map(leaf).collect(),
        more_after: message.more_after_chunk.map(ChunkIndex),
    }
}

/// The blocks of a leaf, as they are sent.
pub(crate) fn sums_message(sums: &LeafSums) -> proto::LeafSumsResponse {
    let content = |sum: &BlockSum| match sum.state.content {
        BlockContent::Hole => 0u8,
        BlockContent::Zeros => 1,
        BlockContent::Data => 2,
        BlockContent::Lost => 3,
    };
    proto::LeafSumsResponse {
        versions: sums.iter().map(|sum| sum.state.version.0).collect(),
        contents: sums.iter().map(content).collect(),
        crcs: sums.iter().map(|sum| sum.crc).collect(),
    }
}

/// The blocks of a leaf of another daemon.
pub(super) fn leaf_sums(message: &proto::LeafSumsResponse) -> Result<LeafSums, String> {
    let blocks = LEAF_BLOCKS as usize;
    if [
        message.versions.len(),
        message.contents.len(),
        message.crcs.len(),
    ] != [blocks; 3]
    {
        return Err("its answer is of another version".to_owned());
    }
    let all = message.versions.iter().zip(&message.contents);
    let all = all.zip(&message.crcs).map(|((version, content), crc)| {
        let content = match content {
            0 => BlockContent::Hole,
            1 => BlockContent::Zeros,
            2 => BlockContent::Data,
            _ => BlockContent::Lost,
        };
        let state = BlockState {
            version: Version(*version),
            content,
        };
        BlockSum { state, crc: *crc }
    });
    Ok(all.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_survives_the_way() {
        let store = StoreId(Uuid::from_u128(2));
        let copy = CopyFact {
            node: NodeId(Uuid::from_u128(1)),
            store,
            is_linked: true,
            away_ms: Some(7),
            failure: Some(Status::Poisoned),
            is_lost: true,
            filling: Some(Filling {
                copied_blocks: 1,
                leaves_left: 2,
                is_finishing: true,
            }),
        };
        let sent = NodeReport {
            stores: vec![StoreFact {
                id: store,
                path: "/s".to_owned(),
                trouble: Some(StoreTrouble::Full),
            }],
            volume: VolumeFact {
                is_served: true,
                unserved_reason: String::new(),
                head: Some(HeadFact {
                    phase: PhaseName::Serving,
                    epoch: Epoch(4),
                    writes_in_flight: 5,
                    oldest_write_ms: 6,
                    swapping_ms: Some(8),
                    copies: vec![copy],
                }),
                connections: 1,
                requests: 2,
            },
        };
        assert_eq!(report(report_message(&sent)), Ok(sent));
        let nonsense = proto::ReportResponse {
            stores: vec![proto::StoreReport::default()],
            ..proto::ReportResponse::default()
        };
        assert!(report(nonsense).is_err());
    }
}
