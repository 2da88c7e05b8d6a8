//! Asks every node what it holds and has it compared with the records; compares copies; makes the repairs that were
//! asked for.

use std::collections::BTreeMap;
use std::time::Duration;

use ashlar_core::diagnosis::doctor::{
    Ailment, LeafDigest, LeftOut, NodeHoldings, Survey, compare, examine, worst_copy,
};
use ashlar_core::diagnosis::{HeadFact, NodeName};
use ashlar_core::records::{MemberState, ReplicaState, VolumeRecord, VolumeState};
use ashlar_core::replication::PhaseName;
use ashlar_core::store::{ExtentKey, LeafSums};
use ashlar_core::units::{ChunkIndex, NodeId, StoreId, VolumeId};

use super::DiagnosisError;
use super::peers::Peer;
use crate::daemon::{Services, State};
use crate::volumes::VolumeError;

/// Leaves of one volume that are compared unasked: 64 GiB.
const LEAVES_MAX: u64 = 32 << 10;
/// Leaves whose digests differ that are looked at block by block; with more, something is wrong with all of them.
const SUSPECTS_MAX: usize = 256;
/// Between two looks at a leaf: longer than a head waits for a copy before it records it as out of sync.
const BETWEEN_LOOKS: Duration = Duration::from_secs(5);
/// Looks at leaves that keep changing.
const LOOKS: usize = 4;

/// What a visit of the doctor is to do.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Orders {
    /// Drop layers that no record names.
    pub(crate) repairs_orphans: bool,
    /// Put copies that are wrong out of sync.
    pub(crate) repairs_differing: bool,
    /// Compare everything.
    pub(crate) is_whole: bool,
    /// Do not compare copies.
    pub(crate) is_records_only: bool,
}

/// What was found, in one step.
#[derive(Clone, Debug, Default)]
pub(crate) struct Findings {
    /// The volume whose copies were compared.
    pub(crate) volume: String,
    pub(crate) ailments: Vec<Ailment>,
    pub(crate) repairs: Vec<String>,
    pub(crate) compared_leaves: u64,
}

/// A visit under way.
pub(crate) struct Doctor {
    services: Services,
    peers: BTreeMap<NodeId, Peer>,
    names: BTreeMap<NodeId, NodeName>,
    /// Nodes that could not even be connected to.
    silent: BTreeMap<NodeId, String>,
    orders: Orders,
    only: Option<VolumeId>,
}

impl Doctor {
    /// Connects to every node of the cluster.
    pub(crate) async fn visit(
        state: &State,
        services: &Services,
        volume: Option<&str>,
        orders: Orders,
    ) -> Result<Doctor, DiagnosisError> {
        let only = match volume {
            Some(reference) => Some(services.volumes.find(reference).await?.record.id),
            None => None,
        };
        let own = state.node().ok_or(DiagnosisError::Starting)?;
        let mut doctor = Doctor {
            services: services.clone(),
            peers: BTreeMap::from([(own, Peer::Here(services.clone()))]),
            names: BTreeMap::new(),
            silent: BTreeMap::new(),
            orders,
            only,
        };
        let mut connecting = tokio::task::JoinSet::new();
        if let Some(cluster) = state.cluster() {
            for member in cluster.identity.trust().members() {
                if member.state == MemberState::Removed {
                    continue;
                }
                doctor.names.insert(
                    member.id,
                    NodeName {
                        id: member.id,
                        address: member.address.clone(),
                    },
                );
                if member.id == own {
                    continue;
                }
                let cluster = cluster.clone();
                connecting.spawn(async move {
                    let peer = match member.address {
                        Some(address) => Peer::there(&cluster, member.id, &address).await,
                        None => Err("it has told no address of its admin interface".to_owned()),
                    };
                    (member.id, peer)
                });
            }
        }
        doctor.names.entry(own).or_insert(NodeName {
            id: own,
            address: None,
        });
        while let Some(connected) = connecting.join_next().await {
            match connected {
                Ok((node, Ok(peer))) => drop(doctor.peers.insert(node, peer)),
                Ok((node, Err(error))) => drop(doctor.silent.insert(node, error)),
                Err(_) => {}
            }
        }
        Ok(doctor)
    }

    fn name(&self, id: NodeId) -> NodeName {
        let known = self.names.get(&id).cloned();
        known.unwrap_or(NodeName { id, address: None })
    }

    /// Everything but the copies. Also the volumes whose copies are to be compared.
    pub(crate) async fn examine(&self) -> Result<(Findings, Vec<VolumeId>), VolumeError> {
        let mut survey = self.survey().await?;
        let mut ailments = examine(&survey);
        if !ailments.is_empty() {
            // Volumes are created, renamed and deleted between the looks at stores, records and names. What is wrong
            // stays so.
            survey = self.survey().await?;
            let again = examine(&survey);
            ailments.retain(|ailment| again.contains(ailment));
        }
        let mut findings = Findings::default();
        if self.orders.repairs_orphans {
            for ailment in &ailments {
                let Ailment::Orphan {
                    node,
                    store,
                    holding,
                } = ailment
                else {
                    continue;
                };
                let what = format!("layer {} in store {} of {node}", holding.layer.0, store.0);
                let done = match self.peers.get(&node.id) {
                    Some(peer) => peer.drop_orphan(*store, holding.layer).await,
                    None => Err("the node does not answer".to_owned()),
                };
                findings.repairs.push(match done {
                    Ok(()) => format!("dropped {what}"),
                    Err(error) => format!("did not drop {what}: {error}"),
                });
            }
        }
        findings.ailments = ailments;
        let replicated = survey.volumes.iter().filter(|record| {
            record.placement.is_replicated()
                && record.state == VolumeState::Active
                && self.only.is_none_or(|only| only == record.id)
        });
        let volumes = if self.orders.is_records_only {
            Vec::new()
        } else {
            replicated.map(|record| record.id).collect()
        };
        Ok((findings, volumes))
    }

    /// First the nodes, then the records: what a node has, a record named before.
    async fn survey(&self) -> Result<Survey, VolumeError> {
        let mut asked = tokio::task::JoinSet::new();
        for (node, peer) in &self.peers {
            let (node, peer) = (*node, peer.clone());
            asked.spawn(async move { (node, peer.holdings().await) });
        }
        let mut nodes: Vec<NodeHoldings> = self
            .silent
            .iter()
            .map(|(node, error)| NodeHoldings {
                node: self.name(*node),
                holdings: Err(error.clone()),
            })
            .collect();
        while let Some(answered) = asked.join_next().await {
            if let Ok((node, holdings)) = answered {
                let node = self.name(node);
                nodes.push(NodeHoldings { node, holdings });
            }
        }
        nodes.sort_by(|one, other| one.node.cmp(&other.node));
        let volumes = self.services.volumes.read_records().await?;
        let names = self.services.volumes.read_names().await?;
        Ok(Survey {
            volumes,
            names,
            nodes,
            only: self.only,
        })
    }

    /// The copies of one volume, and their repair.
    pub(crate) async fn compare(&self, id: VolumeId) -> Findings {
        let mut findings = Findings::default();
        let record = match self.services.volumes.read_record(id).await {
            Ok(record) => record.record,
            // It was deleted meanwhile.
            Err(VolumeError::NotFound { .. }) => return findings,
            Err(error) => {
                findings.ailments.push(Ailment::NotCompared {
                    volume: id.0.to_string(),
                    reason: error.to_string(),
                });
                return findings;
            }
        };
        findings.volume = record.name.to_string();
        if let Err(reason) = self.compare_copies(&record, &mut findings).await {
            let volume = record.name.to_string();
            findings
                .ailments
                .push(Ailment::NotCompared { volume, reason });
        }
        if self.orders.repairs_differing
            && let Some((node, store)) = worst_copy(&findings.ailments, record.name.as_str())
        {
            let what = format!("the copy of {} in store {} of {node}", record.name, store.0);
            let head = record.head.and_then(|head| self.peers.get(&head.node));
            let done = match head {
                Some(peer) => peer.distrust(id, store).await,
                None => Err("the node that serves it does not answer".to_owned()),
            };
            findings.repairs.push(match done {
                Ok(()) => {
                    format!("put {what} out of sync; it is being compared and filled as a whole")
                }
                Err(error) => format!("did not put {what} out of sync: {error}"),
            });
        }
        findings
    }

    /// The head that serves a volume; copies are the same only while one makes them so.
    async fn serving_head(&self, record: &VolumeRecord) -> Result<HeadFact, String> {
        let node = record.head.ok_or("no node has served it yet")?.node;
        let peer = self.peers.get(&node);
        let peer = peer.ok_or("the node that serves it does not answer")?;
        let head = peer.head(record.id).await?;
        let head = head
            .ok_or("it is not served, so writes that were not answered may be on one copy alone")?;
        if head.phase != PhaseName::Serving {
            return Err("it is being opened, and its copies are being made alike".to_owned());
        }
        Ok(head)
    }

    /// Stores with a copy in sync, by set, that can be asked.
    fn copies(&self, record: &VolumeRecord) -> Result<Vec<Vec<(NodeId, StoreId)>>, String> {
        let mut sets = Vec::new();
        for set in &record.placement.sets {
            let copies: Vec<_> = set.in_sync().map(|r| (r.node, r.store)).collect();
            if let Some((node, _)) = copies
                .iter()
                .find(|(node, _)| !self.peers.contains_key(node))
            {
                return Err(format!("{} does not answer", self.name(*node)));
            }
            sets.push(copies);
        }
        if sets.iter().all(|copies| copies.len() < 2) {
            return Err("one copy is in sync, and there is nothing to compare it with".to_owned());
        }
        Ok(sets)
    }

    async fn compare_copies(
        &self,
        record: &VolumeRecord,
        findings: &mut Findings,
    ) -> Result<(), String> {
        self.serving_head(record).await?;
        let sets = self.copies(record)?;
        let (suspects, left) = self.suspects(record, &sets, findings).await?;
        let volume = record.name.to_string();
        let mut ailments = Vec::new();
        let mut before = self.look(record, &sets, &suspects).await?;
        let mut open = suspects;
        for _ in 1..LOOKS {
            if open.is_empty() {
                break;
            }
            tokio::time::sleep(BETWEEN_LOOKS).await;
            let now = self.look(record, &sets, &open).await?;
            let mut changing = Vec::new();
            let mut kept = Vec::new();
            for ((place, first), second) in open.iter().zip(&before).zip(now) {
                let (chunk, leaf) = *place;
                let verdict = compare(first, &second);
                if verdict.blocks > 0 {
                    let copies = &sets[usize::from(record.placement.set_of(chunk).0)];
                    let wrong = verdict.wrong.iter().map(|at| copies[*at]);
                    ailments.push(Ailment::Differs {
                        volume: volume.clone(),
                        chunk,
                        leaf,
                        blocks: verdict.blocks,
                        wrong: wrong
                            .map(|(node, store)| (self.name(node), store))
                            .collect(),
                        is_mendable: verdict.is_mendable,
                    });
                } else if verdict.changing > 0 {
                    changing.push(*place);
                    kept.push(second);
                }
            }
            (open, before) = (changing, kept);
        }
        self.is_unchanged(record).await?;
        findings.ailments.append(&mut ailments);
        if !open.is_empty() || left.is_some() {
            findings.ailments.push(Ailment::PartlyCompared {
                volume,
                changing: open.len() as u64,
                left,
            });
        }
        Ok(())
    }

    /// Leaves whose digests differ, and why some were left out, if any were.
    async fn suspects(
        &self,
        record: &VolumeRecord,
        sets: &[Vec<(NodeId, StoreId)>],
        findings: &mut Findings,
    ) -> Result<(Vec<(ChunkIndex, u32)>, Option<LeftOut>), String> {
        let mut stores: Vec<(NodeId, StoreId)> = sets.iter().flatten().copied().collect();
        stores.sort();
        stores.dedup();
        let (layer, mut from) = (record.live_layer(), ChunkIndex(0));
        let mut suspects = Vec::new();
        loop {
            let mut end: Option<ChunkIndex> = None;
            let mut pages = BTreeMap::new();
            for (node, store) in &stores {
                let peer = &self.peers[node];
                let page = peer.digests(*store, layer, from).await;
                let page = page.map_err(|error| format!("{}: {error}", self.name(*node)))?;
                let more = page.more_after.into_iter().chain(end);
                end = more.min();
                let leaves: BTreeMap<(ChunkIndex, u32), LeafDigest> = page
                    .leaves
                    .into_iter()
                    .map(|(chunk, leaf, digest)| ((chunk, leaf), digest))
                    .collect();
                pages.insert(*store, leaves);
            }
            let mut places: Vec<(ChunkIndex, u32)> =
                pages.values().flatten().map(|(p, _)| *p).collect();
            places.sort();
            places.dedup();
            for place in places {
                if end.is_some_and(|end| place.0 > end) {
                    break;
                }
                let copies = &sets[usize::from(record.placement.set_of(place.0).0)];
                let mut digests = copies
                    .iter()
                    .map(|(_, store)| pages[store].get(&place).copied().unwrap_or_default());
                let first = digests.next();
                if digests.any(|digest| Some(digest) != first) {
                    suspects.push(place);
                }
                findings.compared_leaves += 1;
            }
            let is_all_asked = !self.orders.is_whole && findings.compared_leaves >= LEAVES_MAX;
            let left = match suspects.len() >= SUSPECTS_MAX {
                true => Some(LeftOut::Enough),
                false => is_all_asked.then_some(LeftOut::Unasked),
            };
            match end.and_then(|end| end.0.checked_add(1)) {
                None => return Ok((suspects, None)),
                Some(_) if left.is_some() => return Ok((suspects, left)),
                Some(next) => from = ChunkIndex(next),
            }
        }
    }

    /// What every copy in sync says of each of these leaves, in the order of its set.
    async fn look(
        &self,
        record: &VolumeRecord,
        sets: &[Vec<(NodeId, StoreId)>],
        places: &[(ChunkIndex, u32)],
    ) -> Result<Vec<Vec<LeafSums>>, String> {
        let mut all = Vec::with_capacity(places.len());
        for (chunk, leaf) in places {
            let extent = ExtentKey {
                layer: record.live_layer(),
                chunk: *chunk,
            };
            let mut copies = Vec::new();
            for (node, store) in &sets[usize::from(record.placement.set_of(*chunk).0)] {
                let sums = self.peers[node].leaf(*store, extent, *leaf).await;
                copies.push(sums.map_err(|error| format!("{}: {error}", self.name(*node)))?);
            }
            all.push(copies);
        }
        Ok(all)
    }

    /// What was compared counted as in sync all the time, and the same head served it.
    async fn is_unchanged(&self, record: &VolumeRecord) -> Result<(), String> {
        let now = self.services.volumes.read_record(record.id).await;
        let now = now.map_err(|error| error.to_string())?.record;
        let head = self.serving_head(&now).await?;
        let mut stayed = record.placement.sets.iter().zip(&now.placement.sets);
        let is_same = stayed.all(|(before, now)| {
            before.in_sync().all(|copy| {
                let recorded = now.replicas.iter().find(|r| r.store == copy.store);
                recorded.is_some_and(|r| r.state == ReplicaState::InSync)
                    && head.copy(copy.store).is_some_and(|c| c.away_ms.is_none())
            })
        });
        if is_same && now.head == record.head {
            Ok(())
        } else {
            Err(
                "a copy went out of sync, or the volume to another node, while they were compared"
                    .to_owned(),
            )
        }
    }
}
