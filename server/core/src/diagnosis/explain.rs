//! From facts to causes.

use std::collections::BTreeMap;

use super::cause::{Cause, Condition, Finding, NodeName, OutBecause};
use super::facts::{Facts, HeadFact, NodeFact, NodeReport, Standing, StoreTrouble};
use crate::records::{Replica, ReplicaState, VolumeState};
use crate::replication::PhaseName;
use crate::units::{NodeId, StoreId};

/// A change of the record that takes longer than this is worth a word, milliseconds.
const SLOW_RECORD_MS: u64 = 1_500;

/// Why a volume is as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// How it is: the worst that any cause makes of it.
    pub condition: Condition,
    /// One sentence.
    pub summary: String,
    /// The worst first. Empty when all is well and there is nothing to note.
    pub findings: Vec<Finding>,
}

/// Explains a volume. The same facts give the same explanation.
pub fn explain(facts: &Facts) -> Explanation {
    let mut explaining = Explaining {
        facts,
        findings: Vec::new(),
    };
    if facts.record.state == VolumeState::Deleting {
        explaining.deleting();
    } else if facts.record.placement.is_replicated() {
        explaining.replicated();
    } else {
        explaining.single();
    }
    if let Some(error) = &facts.metadata_error {
        let error = error.clone();
        explaining.add(Cause::MetadataAway { error });
    }
    if facts.record.state == VolumeState::Active {
        explaining.notes();
    }
    let mut findings = explaining.findings;
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.cause.condition()));
    let condition = findings
        .iter()
        .map(|finding| finding.cause.condition())
        .max()
        .unwrap_or(Condition::Healthy);
    Explanation {
        condition,
        summary: summary(facts, condition, findings.first()),
        findings,
    }
}

fn summary(facts: &Facts, condition: Condition, worst: Option<&Finding>) -> String {
    let record = &facts.record;
    let sets = &record.placement.sets;
    let fewest = sets.iter().map(|set| set.in_sync().count()).min();
    match (condition, fewest, worst) {
        (Condition::Healthy, Some(fewest), _) => format!(
            "served, with {fewest} of {} copies in sync; a write needs {}",
            record.replicas, record.min_in_sync
        ),
        (Condition::Healthy, None, _) => "served from the stores of its node".to_owned(),
        (Condition::Degraded, Some(fewest), _) => {
            let spare = fewest.saturating_sub(record.min_in_sync as usize);
            let then = match spare {
                0 => "writes wait if one more fails".to_owned(),
                spare => format!("writes go on if {spare} more fail(s)"),
            };
            format!(
                "served, with {fewest} of {} copies in sync where {} are needed: {then}",
                record.replicas, record.min_in_sync
            )
        }
        (_, _, Some(worst)) => worst.cause.to_string(),
        (_, _, None) => condition.word().to_owned(),
    }
}

struct Explaining<'a> {
    facts: &'a Facts,
    findings: Vec<Finding>,
}

impl<'a> Explaining<'a> {
    fn add(&mut self, cause: Cause) {
        self.add_since(cause, None);
    }

    /// `for_ms`: how long it has been so.
    fn add_since(&mut self, cause: Cause, for_ms: Option<u64>) {
        let since_unix_ms = for_ms.map(|ms| self.facts.now_unix_ms.saturating_sub(ms));
        self.findings.push(Finding {
            cause,
            since_unix_ms,
        });
    }

    fn name(&self, id: NodeId) -> NodeName {
        NodeName {
            id,
            address: self.facts.node(id).and_then(|node| node.address.clone()),
        }
    }

    /// What a node answered, or why it did not.
    fn report(&self, id: NodeId) -> Result<&'a NodeReport, String> {
        match self.facts.node(id) {
            Some(node) => node.report.as_ref().map_err(Clone::clone),
            None => Err("nothing is known of it".to_owned()),
        }
    }

    /// Since when a node that does not answer has been silent, as far as its own words tell.
    fn told_at(&self, id: NodeId) -> Option<u64> {
        self.facts.node(id).and_then(|node| node.told_at_unix_ms)
    }

    fn deleting(&mut self) {
        let record = &self.facts.record;
        let mut nodes: Vec<NodeId> = record
            .placement
            .sets
            .iter()
            .flat_map(|set| &set.replicas)
            .map(|replica| replica.node)
            .filter(|node| !self.facts.dropped.contains(node))
            .collect();
        nodes.sort();
        nodes.dedup();
        let waiting_for = nodes
            .into_iter()
            .map(|node| (self.name(node), self.report(node).is_ok()))
            .collect();
        self.add(Cause::Deleting { waiting_for });
    }

    /// A volume whose chunks lie on the stores of one node.
    fn single(&mut self) {
        let Some(node) = self.facts.nodes.first() else {
            return self.add(Cause::NeverServed);
        };
        let name = self.name(node.id);
        match &node.report {
            Err(error) => {
                let error = error.clone();
                self.silent_server(name, node, error);
            }
            Ok(report) => {
                if !report.volume.is_served {
                    let reason = report.volume.unserved_reason.clone();
                    self.add(Cause::NotServed { node: name, reason });
                }
                let mut stores = self.facts.record.placement.stores.clone();
                stores.sort();
                stores.dedup();
                for store in stores {
                    self.store(node.id, store, report);
                }
            }
        }
    }

    fn silent_server(&mut self, name: NodeName, node: &NodeFact, error: String) {
        self.findings.push(Finding {
            cause: Cause::ServingNodeAway { node: name, error },
            since_unix_ms: node.told_at_unix_ms,
        });
    }

    fn replicated(&mut self) {
        let head = self.head();
        let is_serving = head.is_some_and(|head| head.phase == PhaseName::Serving);
        let out = self.copies(head);
        if is_serving {
            self.writes(head, &out);
        }
        let record = &self.facts.record;
        let sizes = record.placement.sets.iter().map(|set| set.replicas.len());
        let copies = sizes.min().unwrap_or(0);
        if copies < record.replicas as usize {
            self.add(Cause::FewerCopies {
                copies,
                wanted: record.replicas,
            });
        }
    }

    /// Who serves the volume, or why nobody does. The head, if there is one.
    fn head(&mut self) -> Option<&'a HeadFact> {
        let Some(claim) = self.facts.record.head else {
            self.add(Cause::NeverServed);
            return None;
        };
        let node = self.name(claim.node);
        let report = match self.report(claim.node) {
            Ok(report) => report,
            Err(error) => {
                self.findings.push(Finding {
                    cause: Cause::ServingNodeAway { node, error },
                    since_unix_ms: self.told_at(claim.node),
                });
                return None;
            }
        };
        let Some(head) = &report.volume.head else {
            let reason = match report.volume.unserved_reason.as_str() {
                "" => "it has no head there".to_owned(),
                reason => reason.to_owned(),
            };
            self.add(Cause::NotServed { node, reason });
            return None;
        };
        match head.phase {
            PhaseName::Claiming => {
                let for_ms = head.swapping_ms.unwrap_or(0);
                self.add_since(Cause::Claiming { for_ms }, head.swapping_ms);
            }
            PhaseName::Sealing => self.sealing(head),
            PhaseName::Reconciling => self.add(Cause::Reconciling),
            PhaseName::Serving => {
                if let Some(for_ms) = head.swapping_ms.filter(|ms| *ms >= SLOW_RECORD_MS) {
                    self.add_since(Cause::RecordWaits { for_ms }, Some(for_ms));
                }
            }
            PhaseName::Closing | PhaseName::Stopped => {
                let reason = "it is being closed".to_owned();
                self.add(Cause::NotServed { node, reason });
            }
        }
        Some(head)
    }

    /// A head that seals waits for what the verdict of each set waits for.
    fn sealing(&mut self, head: &HeadFact) {
        let (mut last, mut lease): (Vec<NodeId>, Vec<NodeId>) = (Vec::new(), Vec::new());
        for set in &self.facts.record.placement.sets {
            let is_open = |replica: &&Replica| {
                head.copy(replica.store)
                    .is_some_and(|copy| copy.away_ms.is_none())
            };
            let is_lost =
                |replica: &Replica| head.copy(replica.store).is_some_and(|copy| copy.is_lost);
            let away: Vec<NodeId> = set
                .in_sync()
                .filter(|replica| !is_open(replica))
                .map(|replica| replica.node)
                .collect();
            let is_sound = set
                .in_sync()
                .filter(is_open)
                .any(|replica| !is_lost(replica));
            if is_sound {
                lease.extend(away);
            } else {
                last.extend(away);
            }
        }
        let names = |nodes: &mut Vec<NodeId>| {
            nodes.sort();
            nodes.dedup();
            nodes
                .iter()
                .map(|node| self.name(*node))
                .collect::<Vec<_>>()
        };
        let (last, lease) = (names(&mut last), names(&mut lease));
        if !last.is_empty() {
            self.add(Cause::LastCopiesAway { nodes: last });
        }
        if !lease.is_empty() {
            self.add(Cause::LeaseWait { nodes: lease });
        }
        if self.findings.is_empty() {
            self.add(Cause::Reconciling);
        }
    }

    /// Every copy and its store, each store once. Those out of sync, and whether they come back by themselves.
    fn copies(&mut self, head: Option<&HeadFact>) -> Vec<(NodeName, bool)> {
        // A store may be in several sets: out in one of them is what counts.
        let mut copies: BTreeMap<(NodeId, StoreId), (bool, bool)> = BTreeMap::new();
        for replica in self
            .facts
            .record
            .placement
            .sets
            .iter()
            .flat_map(|set| &set.replicas)
        {
            let (is_in, leaves) = copies
                .entry((replica.node, replica.store))
                .or_insert((true, false));
            *is_in &= replica.state == ReplicaState::InSync;
            *leaves |= replica.leaving;
        }
        let is_serving = head.is_some_and(|head| head.phase == PhaseName::Serving);
        let mut out = Vec::new();
        for ((node, store), (is_in, leaves)) in copies {
            let copy = head.and_then(|head| head.copy(store));
            let name = self.name(node);
            if !is_in {
                let why = self.out_because(node, store, head);
                out.push((name.clone(), why.is_coming()));
                let away_ms = copy.and_then(|copy| copy.away_ms);
                let cause = Cause::CopyOut {
                    node: name.clone(),
                    store,
                    why,
                };
                self.add_since(cause, away_ms);
            } else if is_serving && let Some(away_ms) = copy.and_then(|copy| copy.away_ms) {
                let node = name.clone();
                self.add_since(Cause::CopyFailing { node, store }, Some(away_ms));
            }
            if leaves {
                self.add(Cause::Leaving { node: name.clone() });
            }
            match self.report(node) {
                Ok(report) => self.store(node, store, report),
                Err(error)
                    if is_in && self.facts.record.head.map(|head| head.node) != Some(node) =>
                {
                    self.add(Cause::NodeSilent { node: name, error });
                }
                Err(_) => {}
            }
        }
        out
    }

    fn out_because(&self, node: NodeId, store: StoreId, head: Option<&HeadFact>) -> OutBecause {
        let standing = self.facts.node(node).map(|node| node.standing);
        if matches!(standing, Some(Standing::Removed | Standing::Unknown)) {
            return OutBecause::NodeGone;
        }
        let copy = head.and_then(|head| head.copy(store));
        if let Some(filling) = copy.and_then(|copy| copy.filling) {
            return OutBecause::Filling(filling);
        }
        let report = match self.report(node) {
            // A node that stands still has open links; what tells is that it takes no work either.
            Err(error) if copy.is_none_or(|copy| copy.away_ms.is_some()) => {
                return OutBecause::NodeAway { error };
            }
            Err(_) => None,
            Ok(report) => Some(report),
        };
        if let Some(report) = report {
            match report.stores.iter().find(|open| open.id == store) {
                None => return OutBecause::StoreMissing,
                Some(open) => {
                    if let Some(StoreTrouble::Poisoned { .. }) = open.trouble {
                        return OutBecause::StorePoisoned;
                    }
                }
            }
        }
        match (head.map(|head| head.phase), copy) {
            (Some(PhaseName::Serving), Some(copy)) => match copy.failure {
                Some(failure) => OutBecause::Failed(failure),
                None if copy.is_linked => OutBecause::Returning,
                None => OutBecause::NoLink,
            },
            _ => OutBecause::NoHead,
        }
    }

    /// What is wrong with a store that the record names.
    fn store(&mut self, node: NodeId, store: StoreId, report: &NodeReport) {
        let name = self.name(node);
        match report.stores.iter().find(|open| open.id == store) {
            None => self.add(Cause::StoreMissing { node: name, store }),
            Some(open) => {
                let path = open.path.clone();
                match &open.trouble {
                    None => {}
                    Some(StoreTrouble::Full) => self.add(Cause::StoreFull { node: name, path }),
                    Some(StoreTrouble::Poisoned { reason }) => {
                        let reason = reason.clone();
                        let node = name;
                        self.add(Cause::StorePoisoned { node, path, reason });
                    }
                }
            }
        }
    }

    /// Whether writes wait for more copies.
    fn writes(&mut self, head: Option<&HeadFact>, out: &[(NodeName, bool)]) {
        let record = &self.facts.record;
        let answers = |replica: &&Replica| {
            head.and_then(|head| head.copy(replica.store))
                .is_none_or(|copy| copy.away_ms.is_none())
        };
        let sets = record.placement.sets.iter();
        let in_sync = sets.map(|set| set.in_sync().filter(answers).count()).min();
        let in_sync = in_sync.unwrap_or(0);
        if in_sync >= record.min_in_sync as usize {
            return;
        }
        let lacking = record.min_in_sync as usize - in_sync;
        let coming = out.iter().filter(|(_, is_coming)| *is_coming).count();
        let mut missing: Vec<NodeName> = out.iter().map(|(node, _)| node.clone()).collect();
        missing.dedup();
        self.add_since(
            Cause::WritesWait {
                in_sync,
                copies: record.replicas,
                needed: record.min_in_sync,
                waiting: head.map_or(0, |head| head.writes_in_flight),
                is_coming: coming >= lacking,
                missing,
            },
            head.map(|head| head.oldest_write_ms).filter(|ms| *ms > 0),
        );
    }

    /// What is as somebody wanted it, and may surprise somebody else.
    fn notes(&mut self) {
        let record = &self.facts.record;
        if !record.publications.is_empty() {
            let to = record.publications.iter();
            let to = to.map(|publication| publication.node.to_string()).collect();
            self.add(Cause::Published { to });
        }
        if record.read_only {
            self.add(Cause::ReadOnly);
        }
        if record.limits.iops.is_some() || record.limits.bytes_per_second.is_some() {
            self.add(Cause::Limited);
        }
    }
}

#[cfg(test)]
mod tests;
