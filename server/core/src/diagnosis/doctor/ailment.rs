//! What can be wrong with a volume or a store, how bad it is, and what to do about it.

use std::fmt;

use super::LayerHolding;
use crate::diagnosis::cause::NodeName;
use crate::units::{ChunkIndex, Epoch, LayerId, StoreId, VolumeId};

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
        /// Why leaves were not looked at, where some were not.
        left: Option<LeftOut>,
    },
}

/// Why not everything was compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// There is more than is looked at unasked.
    Unasked,
    /// So much differs that more would say nothing new.
    Enough,
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
            Ailment::PartlyCompared {
                left: Some(LeftOut::Unasked),
                ..
            } => "ask again with --all to look at everything".to_owned(),
            Ailment::PartlyCompared {
                left: Some(LeftOut::Enough),
                ..
            } => "ask again when what was found is put right".to_owned(),
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
                match left {
                    Some(LeftOut::Unasked) => {
                        f.write_str(" there is more than is looked at unasked")
                    }
                    Some(LeftOut::Enough) => {
                        f.write_str(" so much differs that no more was looked at")
                    }
                    None => Ok(()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_is_asked_for_only_where_it_helps() {
        let partly = |left| Ailment::PartlyCompared {
            volume: "db".to_owned(),
            changing: 0,
            left: Some(left),
        };
        assert!(partly(LeftOut::Unasked).remedy().contains("--all"));
        let enough = partly(LeftOut::Enough);
        assert!(!enough.remedy().contains("--all"), "{}", enough.remedy());
        assert!(enough.to_string().contains("so much differs"), "{enough}");
    }
}
