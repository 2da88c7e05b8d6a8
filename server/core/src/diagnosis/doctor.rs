//! Where the records and what the stores really hold disagree, and which of two copies that differ is wrong.
//!
//! Copies are compared by what the stores' indexes say of each block: its version and its checksum. That costs a page of
//! the index for 2 MiB; that the bytes on the disk are what the checksum says is a scrub's to find out.

mod ailment;
mod leaf;

use std::collections::BTreeMap;

pub use ailment::{Ailment, LeftOut, Weight};
pub use leaf::{LeafDigest, LeafVerdict, compare, digest};

use super::cause::NodeName;
use crate::records::{VolumeRecord, VolumeState};
use crate::replication::Seal;
use crate::units::{LayerId, NodeId, StoreId, Version, VolumeId};

/// What a store holds of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerHolding {
    /// Which.
    pub layer: LayerId,
    /// Chunks of it that were ever written.
    pub chunks: u32,
    /// The newest version of it.
    pub newest: Version,
}

/// What a store holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreHolding {
    /// Which.
    pub store: StoreId,
    /// Its layers.
    pub layers: Vec<LayerHolding>,
}

/// The seal of a copy, as the node keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealHolding {
    /// Of which volume.
    pub volume: VolumeId,
    /// At which store.
    pub store: StoreId,
    /// What is kept.
    pub seal: Seal,
}

/// What a node holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// In each of its open stores.
    pub stores: Vec<StoreHolding>,
    /// Whom its copies follow.
    pub seals: Vec<SealHolding>,
}

/// One node that was asked.
#[derive(Clone, Debug)]
pub struct NodeHoldings {
    /// Which.
    pub node: NodeName,
    /// What it holds, or why it did not say.
    pub holdings: Result<Holdings, String>,
}

/// Everything that is compared.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Every volume's record, read after the nodes were asked: what a node has, a record named before.
    pub volumes: Vec<VolumeRecord>,
    /// Which volume each name leads to.
    pub names: BTreeMap<String, VolumeId>,
    /// Every node of the cluster, or this one.
    pub nodes: Vec<NodeHoldings>,
    /// Only this volume is looked at.
    pub only: Option<VolumeId>,
}

/// Compares records with what the nodes hold.
pub fn examine(survey: &Survey) -> Vec<Ailment> {
    let mut ailments = Vec::new();
    let mut owners: BTreeMap<LayerId, &VolumeRecord> = BTreeMap::new();
    for record in &survey.volumes {
        for layer in &record.layers {
            if let Some(other) = owners.insert(*layer, record)
                && (wanted(survey, record) || wanted(survey, other))
            {
                ailments.push(Ailment::LayerShared {
                    volumes: [other.name.to_string(), record.name.to_string()],
                    layer: *layer,
                });
            }
        }
    }
    for record in survey.volumes.iter().filter(|r| wanted(survey, r)) {
        record_itself(survey, record, &mut ailments);
    }
    for node in &survey.nodes {
        match &node.holdings {
            Err(error) => ailments.push(Ailment::NodeSilent {
                node: node.node.clone(),
                error: error.clone(),
            }),
            Ok(holdings) => at_node(survey, &owners, &node.node, holdings, &mut ailments),
        }
    }
    ailments.sort_by_key(|ailment| std::cmp::Reverse(ailment.weight()));
    ailments
}

fn wanted(survey: &Survey, record: &VolumeRecord) -> bool {
    survey.only.is_none_or(|only| only == record.id)
}

fn record_itself(survey: &Survey, record: &VolumeRecord, ailments: &mut Vec<Ailment>) {
    let volume = record.name.to_string();
    if let Err(problem) = record.check_invariants() {
        ailments.push(Ailment::BadRecord {
            volume: volume.clone(),
            problem,
        });
    }
    // The name of a tombstone is free.
    let leads_to = survey.names.get(record.name.as_str()).copied();
    if record.state == VolumeState::Active && leads_to != Some(record.id) {
        ailments.push(Ailment::NameAstray { volume, leads_to });
    }
}

fn at_node(
    survey: &Survey,
    owners: &BTreeMap<LayerId, &VolumeRecord>,
    node: &NodeName,
    holdings: &Holdings,
    ailments: &mut Vec<Ailment>,
) {
    let is_open = |store: StoreId| holdings.stores.iter().any(|open| open.store == store);
    // Of a volume without replica sets no node is named; it is that of a daemon on its own.
    let is_alone = survey.nodes.len() == 1;
    let here = survey
        .volumes
        .iter()
        .filter(|record| wanted(survey, record) && (is_alone || record.placement.is_replicated()));
    for record in here {
        let mut missing: Vec<StoreId> = stores_of(record, Some(node.id))
            .filter(|store| !is_open(*store))
            .collect();
        missing.sort();
        missing.dedup();
        for store in missing {
            ailments.push(Ailment::StoreNotOpen {
                volume: record.name.to_string(),
                node: node.clone(),
                store,
            });
        }
    }
    for open in &holdings.stores {
        let (node, store) = (node.clone(), open.store);
        for holding in &open.layers {
            let (node, holding) = (node.clone(), *holding);
            match owners.get(&holding.layer) {
                None if survey.only.is_none() => ailments.push(Ailment::Orphan {
                    node,
                    store,
                    holding,
                }),
                None => {}
                Some(record) if !wanted(survey, record) => {}
                Some(record) => {
                    let volume = record.name.to_string();
                    let recorded = record.epoch;
                    if !stores_of(record, None).any(|named| named == store) {
                        ailments.push(Ailment::Stray {
                            volume,
                            node,
                            store,
                            holding,
                        });
                    } else if holding.newest.epoch() > recorded {
                        ailments.push(Ailment::EpochBeyond {
                            volume,
                            node,
                            store,
                            found: holding.newest.epoch(),
                            recorded,
                        });
                    }
                }
            }
        }
    }
    for sealed in &holdings.seals {
        let record = survey.volumes.iter().find(|r| r.id == sealed.volume);
        let Some(record) = record.filter(|record| wanted(survey, record)) else {
            continue;
        };
        let (found, recorded) = (sealed.seal.epoch, record.epoch);
        let is_told = ailments.iter().any(|told| {
            matches!(told, Ailment::EpochBeyond { volume, store, .. }
                if *store == sealed.store && volume.as_str() == record.name.as_str())
        });
        if found > recorded && !is_told {
            ailments.push(Ailment::EpochBeyond {
                volume: record.name.to_string(),
                node: node.clone(),
                store: sealed.store,
                found,
                recorded,
            });
        }
    }
}

/// The stores that a record names, all or those of one node. Of an unreplicated volume they are the serving node's, and
/// no node is named.
fn stores_of(record: &VolumeRecord, node: Option<NodeId>) -> impl Iterator<Item = StoreId> + '_ {
    let replicas = record.placement.sets.iter().flat_map(|set| &set.replicas);
    let replicas = replicas.filter(move |replica| node.is_none_or(|node| replica.node == node));
    replicas
        .map(|replica| replica.store)
        .chain(record.placement.stores.iter().copied())
}

/// The copy of a volume that is wrong most often, of those that filling mends. One at a time: the others are needed to
/// fill it.
pub fn worst_copy(ailments: &[Ailment], name: &str) -> Option<(NodeName, StoreId)> {
    let mut often: BTreeMap<(NodeName, StoreId), u64> = BTreeMap::new();
    for ailment in ailments {
        if let Ailment::Differs {
            volume,
            wrong,
            is_mendable: true,
            blocks,
            ..
        } = ailment
            && volume == name
        {
            for copy in wrong {
                *often.entry(copy.clone()).or_default() += u64::from(*blocks);
            }
        }
    }
    let worst = often.into_iter().max_by_key(|(_, blocks)| *blocks);
    worst.map(|(copy, _)| copy)
}

#[cfg(test)]
mod tests;
