//! Between the words of the daemon and the messages of `ashlar.diagnosis.v1`.

use ashlar_core::diagnosis::events::{Event, Severity};
use ashlar_core::diagnosis::{
    Condition, CopyFact, Explanation, Facts, Filling, Finding, HeadFact, NodeReport, StoreFact,
    StoreTrouble, VolumeFact,
};
use ashlar_core::replication::PhaseName;
use ashlar_core::replication::wire::Status;
use ashlar_core::units::{Epoch, NodeId, StoreId};
use ashlar_proto::diagnosis as proto;
use uuid::Uuid;

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
