//! Where the records and what the stores really hold disagree, and which of two copies that differ is wrong.
//!
//! Copies are compared by what the stores' indexes say of each block: its version and its checksum. That costs a page of
//! the index for 2 MiB; that the bytes on the disk are what the checksum says is a scrub's to find out.

use std::collections::BTreeMap;
use std::fmt;

use super::cause::NodeName;
use crate::records::{VolumeRecord, VolumeState};
use crate::replication::Seal;
use crate::store::{BlockContent, BlockSum, LeafSums};
use crate::units::{ChunkIndex, Epoch, LayerId, NodeId, StoreId, Version, VolumeId};

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

/// Something that is not as it should be, or could not be looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ailment {
    /// A node did not say what it holds.
    NodeSilent {
        /// Which.
        node: NodeName,
        /// What was met instead of an answer.
        error: String,
    },
    /// A record breaks its own rules.
    BadRecord {
        /// Whose.
        volume: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// The name of a volume leads elsewhere, or nowhere.
    NameAstray {
        /// Whose.
        volume: String,
        /// Where it leads.
        leads_to: Option<VolumeId>,
    },
    /// Two records name the same layer.
    LayerShared {
        /// Whose.
        volumes: [String; 2],
        /// Which.
        layer: LayerId,
    },
    /// A copy's store is not open on its node.
    StoreNotOpen {
        /// Whose copy.
        volume: String,
        /// Where.
        node: NodeName,
        /// Which store.
        store: StoreId,
    },
    /// A store holds a layer that no record names.
    Orphan {
        /// Where.
        node: NodeName,
        /// Which store.
        store: StoreId,
        /// What.
        holding: LayerHolding,
    },
    /// A store holds blocks of a volume whose record does not name the store.
    Stray {
        /// Whose.
        volume: String,
        /// Where.
        node: NodeName,
        /// Which store.
        store: StoreId,
        /// What.
        holding: LayerHolding,
    },
    /// A copy has been written or sealed at an epoch that its record does not have: the records are older than the
    /// stores.
    EpochBeyond {
        /// Whose.
        volume: String,
        /// Where.
        node: NodeName,
        /// Which store.
        store: StoreId,
        /// What is there.
        found: Epoch,
        /// What the record says.
        recorded: Epoch,
    },
    /// Copies in sync differ.
    Differs {
        /// Whose.
        volume: String,
        /// Which chunk.
        chunk: ChunkIndex,
        /// Which leaf of it.
        leaf: u32,
        /// Blocks that differ.
        blocks: u32,
        /// Copies that are wrong; empty: it cannot be told which.
        wrong: Vec<(NodeName, StoreId)>,
        /// Bringing the wrong ones up to date mends it: they have older versions of the blocks.
        is_mendable: bool,
    },
    /// Copies could not be compared.
    NotCompared {
        /// Whose.
        volume: String,
        /// Why not.
        reason: String,
    },
    /// Some of the copies could not be compared: they were written all the time, or there is more than was asked for.
    PartlyCompared {
        /// Whose.
        volume: String,
        /// Leaves that kept changing.
        changing: u64,
        /// Leaves that were not looked at.
        left: bool,
    },
}

/// How bad an ailment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weight {
    /// Something could not be looked at.
    Unknown,
    /// Space is lost, or will be; no data are.
    Untidy,
    /// What is there is not what should be.
    Wrong,
}

impl Ailment {
    /// How bad it is.
    pub fn weight(&self) -> Weight {
        match self {
            Ailment::NodeSilent { .. }
            | Ailment::NotCompared { .. }
            | Ailment::PartlyCompared { .. } => Weight::Unknown,
            Ailment::Orphan { .. } | Ailment::Stray { .. } => Weight::Untidy,
            Ailment::BadRecord { .. }
            | Ailment::NameAstray { .. }
            | Ailment::LayerShared { .. }
            | Ailment::StoreNotOpen { .. }
            | Ailment::EpochBeyond { .. }
            | Ailment::Differs { .. } => Weight::Wrong,
        }
    }

    /// A fixed word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Ailment::NodeSilent { .. } => "node-silent",
            Ailment::BadRecord { .. } => "bad-record",
            Ailment::NameAstray { .. } => "name-astray",
            Ailment::LayerShared { .. } => "layer-shared",
            Ailment::StoreNotOpen { .. } => "store-not-open",
            Ailment::Orphan { .. } => "orphan",
            Ailment::Stray { .. } => "stray",
            Ailment::EpochBeyond { .. } => "epoch-beyond",
            Ailment::Differs { .. } => "differs",
            Ailment::NotCompared { .. } => "not-compared",
            Ailment::PartlyCompared { .. } => "partly-compared",
        }
    }

    /// What is to be done, a sentence.
    pub fn remedy(&self) -> String {
        match self {
            Ailment::NodeSilent { node, .. } => {
                format!("start ashlard on {node}, or mend its network, and ask again")
            }
            Ailment::BadRecord { .. } | Ailment::NameAstray { .. } | Ailment::LayerShared { .. } => {
                "restore the metadata from a backup".to_owned()
            }
            Ailment::StoreNotOpen { node, store, .. } => format!(
                "start ashlard on {node} with the --store that holds {}",
                store.0
            ),
            Ailment::Orphan { .. } => {
                "make sure that the metadata are not those of an old backup; then `ashlar doctor --repair orphans` drops it".to_owned()
            }
            Ailment::Stray { .. } => {
                "nothing reads it; it goes when the volume is deleted".to_owned()
            }
            Ailment::EpochBeyond { volume, .. } => format!(
                "the metadata are of an old backup, it seems; `ashlar volume open {volume}` claims the volume past what the stores know"
            ),
            Ailment::Differs {
                volume,
                wrong,
                is_mendable,
                ..
            } => match (wrong.is_empty(), is_mendable) {
                (false, true) => format!(
                    "`ashlar doctor {volume} --repair differing` puts the wrong copies out of sync, so that they are brought up to date from the others"
                ),
                _ => "copy the volume to a new one (`nbdcopy`) after looking at what its user finds in it, and report this: two writes of one version must not differ".to_owned(),
            },
            Ailment::NotCompared { volume, .. } => {
                format!("`ashlar explain {volume}` tells what it waits for; ask again when it is healthy")
            }
            Ailment::PartlyCompared { left: true, .. } => {
                "ask again with --all to look at everything".to_owned()
            }
            Ailment::PartlyCompared { .. } => "ask again when less is being written".to_owned(),
        }
    }
}

impl fmt::Display for Ailment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ailment::NodeSilent { node, error } => {
                write!(f, "{node} does not say what it holds: {error}")
            }
            Ailment::BadRecord { volume, problem } => {
                write!(
                    f,
                    "the record of volume {volume} breaks its rules: {problem}"
                )
            }
            Ailment::NameAstray {
                volume,
                leads_to: Some(other),
            } => write!(f, "the name of volume {volume} leads to volume {}", other.0),
            Ailment::NameAstray { volume, .. } => {
                write!(f, "the name of volume {volume} leads nowhere")
            }
            Ailment::LayerShared { volumes, layer } => write!(
                f,
                "volumes {} and {} both have layer {}",
                volumes[0], volumes[1], layer.0
            ),
            Ailment::StoreNotOpen {
                volume,
                node,
                store,
            } => write!(
                f,
                "volume {volume} has a copy in store {} of {node}, where it is not open",
                store.0
            ),
            Ailment::Orphan {
                node,
                store,
                holding,
            } => write!(
                f,
                "store {} of {node} holds {} chunk(s) of layer {}, which no record names",
                store.0, holding.chunks, holding.layer.0
            ),
            Ailment::Stray {
                volume,
                node,
                store,
                holding,
            } => write!(
                f,
                "store {} of {node} holds {} chunk(s) of volume {volume}, whose record names no copy there",
                store.0, holding.chunks
            ),
            Ailment::EpochBeyond {
                volume,
                node,
                store,
                found,
                recorded,
            } => write!(
                f,
                "the copy of volume {volume} in store {} of {node} is of epoch {}, and the record is at {}",
                store.0, found.0, recorded.0
            ),
            Ailment::Differs {
                volume,
                chunk,
                leaf,
                blocks,
                wrong,
                ..
            } => {
                write!(
                    f,
                    "copies in sync of volume {volume} differ in {blocks} block(s) of chunk {}, leaf {leaf}; ",
                    chunk.0
                )?;
                if wrong.is_empty() {
                    return f.write_str("which of them is right cannot be told");
                }
                let wrong: Vec<_> = wrong
                    .iter()
                    .map(|(node, store)| format!("store {} of {node}", store.0))
                    .collect();
                write!(f, "wrong: {}", wrong.join(", "))
            }
            Ailment::NotCompared { volume, reason } => {
                write!(
                    f,
                    "the copies of volume {volume} were not compared: {reason}"
                )
            }
            Ailment::PartlyCompared {
                volume,
                changing,
                left,
            } => {
                write!(f, "the copies of volume {volume} were compared in part:")?;
                if *changing > 0 {
                    write!(f, " {changing} leaf(s) kept changing")?;
                }
                if *left {
                    f.write_str(" there is more than is looked at unasked")?;
                }
                Ok(())
            }
        }
    }
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

/// One copy's leaf in a few bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeafDigest {
    /// The same for the same content: versions do not count, and neither does how a block came to be zeros.
    pub content: u64,
}

/// The digest of a leaf.
pub fn digest(sums: &LeafSums) -> LeafDigest {
    // FNV-1a: what is compared comes from our own stores, not from somebody who would make two leaves meet.
    let mut content = 0xcbf2_9ce4_8422_2325_u64;
    let mut is_zeros = true;
    for (block, sum) in (0u16..).zip(sums) {
        if sum.state.reads_as_zeros() {
            continue;
        }
        is_zeros = false;
        let lost = u8::from(sum.state.content == BlockContent::Lost);
        let bytes = block.to_le_bytes().into_iter().chain([lost]);
        for byte in bytes.chain(sum.crc.to_le_bytes()) {
            content = (content ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    // A leaf that was never written is not even listed.
    LeafDigest {
        content: if is_zeros { 0 } else { content },
    }
}

/// Whether two copies read the same. A block that one of them knows to be damaged is read from the other, and mended
/// then.
fn is_same(one: &BlockSum, other: &BlockSum) -> bool {
    let lost = |sum: &BlockSum| sum.state.content == BlockContent::Lost;
    (one.state.reads_as_zeros() && other.state.reads_as_zeros())
        || lost(one)
        || lost(other)
        || (one.state.content == other.state.content && one.crc == other.crc)
}

/// What two looks at a leaf of several copies tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeafVerdict {
    /// Blocks that differ for certain.
    pub blocks: u32,
    /// Copies, by their place, that are wrong in some of them.
    pub wrong: Vec<usize>,
    /// It can be told which copies are wrong for each of them, and they have older versions.
    pub is_mendable: bool,
    /// Blocks that differ and changed between the looks: a write may be on its way.
    pub changing: u32,
}

/// Compares the leaf of several copies, each looked at twice with more time between than a write may take: what is
/// answered, or given up on, by then is the same on all that still count. So a block that differs and did not change is
/// one that will not become the same by itself. Two blocks of one version that differ are that at once: a version is
/// never used twice.
pub fn compare(first: &[LeafSums], second: &[LeafSums]) -> LeafVerdict {
    let mut verdict = LeafVerdict {
        is_mendable: true,
        ..LeafVerdict::default()
    };
    let blocks = second.iter().map(Vec::len).min().unwrap_or(0);
    for block in 0..blocks {
        let now: Vec<&BlockSum> = second.iter().map(|copy| &copy[block]).collect();
        if now.iter().all(|sum| is_same(now[0], sum)) && pairwise_same(&now) {
            continue;
        }
        let is_settled = first
            .iter()
            .zip(&now)
            .all(|(before, now)| before.get(block) == Some(*now));
        let is_twice = now.iter().enumerate().any(|(at, one)| {
            now[..at]
                .iter()
                .any(|other| one.state.version == other.state.version && !is_same(one, other))
        });
        if !is_settled && !is_twice {
            verdict.changing += 1;
            continue;
        }
        verdict.blocks += 1;
        let newest = now.iter().map(|sum| sum.state.version).max();
        let newest = newest.unwrap_or(Version::NONE);
        let have = |at: &usize| now[*at].state.version == newest;
        let right: Vec<usize> = (0..now.len()).filter(have).collect();
        let agree = right.iter().all(|at| is_same(now[right[0]], now[*at]));
        if !agree {
            verdict.is_mendable = false;
            continue;
        }
        for at in 0..now.len() {
            if !is_same(now[right[0]], now[at]) && !verdict.wrong.contains(&at) {
                verdict.wrong.push(at);
            }
        }
    }
    verdict.wrong.sort_unstable();
    if verdict.blocks == 0 || verdict.wrong.is_empty() || verdict.wrong.len() == second.len() {
        // Every copy is wrong somewhere: none of them can be filled from another as a whole.
        verdict.is_mendable = false;
    }
    if verdict.wrong.len() == second.len() {
        verdict.wrong.clear();
    }
    verdict
}

/// With damaged blocks among them, that all are like the first does not make them alike.
fn pairwise_same(sums: &[&BlockSum]) -> bool {
    sums.iter()
        .enumerate()
        .all(|(at, one)| sums[..at].iter().all(|other| is_same(one, other)))
}

#[cfg(test)]
mod tests;
