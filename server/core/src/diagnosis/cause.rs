//! The causes an explanation can name, with their words and what frees the volume of each.

use std::fmt;

use super::facts::Filling;
use crate::replication::wire::Status;
use crate::units::{BLOCK_BYTES, NodeId, StoreId};

/// How a volume is, from well to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// As it should be.
    Healthy,
    /// Served, and the loss of more nodes would be felt sooner than it should.
    Degraded,
    /// Something waits, and goes on by itself.
    Waiting,
    /// Something waits for a person.
    Stuck,
    /// Clients cannot reach it.
    Unserved,
    /// Being deleted.
    Deleting,
}

impl Condition {
    /// One word for it.
    pub fn word(self) -> &'static str {
        match self {
            Condition::Healthy => "healthy",
            Condition::Degraded => "degraded",
            Condition::Waiting => "waiting",
            Condition::Stuck => "stuck",
            Condition::Unserved => "unserved",
            Condition::Deleting => "deleting",
        }
    }
}

/// A node, as people find it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeName {
    /// Which.
    pub id: NodeId,
    /// Where its admin interface is.
    pub address: Option<String>,
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Some(address) => write!(f, "node {} ({address})", self.id.0),
            None => write!(f, "node {}", self.id.0),
        }
    }
}

/// One reason why a volume is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It is being deleted; these nodes have yet to drop their copies.
    Deleting {
        /// Those that answer, and those that do not.
        waiting_for: Vec<(NodeName, bool)>,
    },
    /// The record cannot be read or changed.
    MetadataAway {
        /// What the metadata store said.
        error: String,
    },
    /// No node ever served it.
    NeverServed,
    /// The node that serves it does not answer.
    ServingNodeAway {
        /// Which.
        node: NodeName,
        /// What was met instead of an answer.
        error: String,
    },
    /// The node that should serve it answers, and does not serve it.
    NotServed {
        /// Which.
        node: NodeName,
        /// Why, in its words.
        reason: String,
    },
    /// Its head is claiming it.
    Claiming {
        /// For how long.
        for_ms: u64,
    },
    /// No sound copy in sync can be reached: what is away may hold writes that were answered.
    LastCopiesAway {
        /// Where they are.
        nodes: Vec<NodeName>,
    },
    /// A head that opens the volume waits until reads of an old one have ended for certain.
    LeaseWait {
        /// Who has not been reached.
        nodes: Vec<NodeName>,
    },
    /// Copies are being made alike.
    Reconciling,
    /// Writes wait for more copies in sync.
    WritesWait {
        /// In sync in the worst set.
        in_sync: usize,
        /// Copies there should be.
        copies: u32,
        /// How many are needed.
        needed: u32,
        /// Writes that wait now.
        waiting: u64,
        /// Something is being brought up to date, so that it goes on by itself.
        is_coming: bool,
        /// Nodes whose copies would do.
        missing: Vec<NodeName>,
    },
    /// A change of the record is awaited.
    RecordWaits {
        /// For how long.
        for_ms: u64,
    },
    /// A copy is not in sync.
    CopyOut {
        /// Where.
        node: NodeName,
        /// Which store.
        store: StoreId,
        /// Why it stays out.
        why: OutBecause,
    },
    /// A copy in sync failed just now; the record is to say so.
    CopyFailing {
        /// Where.
        node: NodeName,
        /// Which store.
        store: StoreId,
    },
    /// Sets have fewer copies than they should, in sync or not.
    FewerCopies {
        /// Copies of the worst set.
        copies: usize,
        /// Copies there should be.
        wanted: u32,
    },
    /// A copy is to leave its node once others suffice.
    Leaving {
        /// Which node.
        node: NodeName,
    },
    /// A store of the volume is not open in its daemon.
    StoreMissing {
        /// Whose.
        node: NodeName,
        /// Which.
        store: StoreId,
    },
    /// A store of the volume is poisoned.
    StorePoisoned {
        /// Whose.
        node: NodeName,
        /// Where it is.
        path: String,
        /// What its device said.
        reason: String,
    },
    /// A store of the volume has no room.
    StoreFull {
        /// Whose.
        node: NodeName,
        /// Where it is.
        path: String,
    },
    /// A node with a copy in sync does not answer to the node that was asked, while the head still reaches it.
    NodeSilent {
        /// Which.
        node: NodeName,
        /// What was met instead of an answer.
        error: String,
    },
    /// Only the nodes it is published to can open it.
    Published {
        /// To whom.
        to: Vec<String>,
    },
    /// Writes are refused.
    ReadOnly,
    /// What is above its limits waits.
    Limited,
}

/// Why a copy stays out of sync.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutBecause {
    /// Its node is not of the cluster any more.
    NodeGone,
    /// Its node does not answer.
    NodeAway {
        /// What was met instead of an answer.
        error: String,
    },
    /// Its store is not open in its daemon.
    StoreMissing,
    /// Its store is poisoned.
    StorePoisoned,
    /// It said why.
    Failed(Status),
    /// Its node answers and its link does not.
    NoLink,
    /// It is being brought up to date.
    Filling(Filling),
    /// Nobody serves the volume, so nobody brings it up to date.
    NoHead,
    /// It can be reached and is about to be brought up to date.
    Returning,
}

/// A cause with what is known beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub cause: Cause,
    /// Since when, milliseconds since 1970-01-01 UTC.
    pub since_unix_ms: Option<u64>,
}

impl Cause {
    /// How a volume is with this cause and no other.
    pub fn condition(&self) -> Condition {
        match self {
            Cause::Deleting { .. } => Condition::Deleting,
            Cause::NeverServed
            | Cause::ServingNodeAway { .. }
            | Cause::NotServed { .. }
            | Cause::LastCopiesAway { .. } => Condition::Unserved,
            Cause::WritesWait {
                is_coming: false, ..
            } => Condition::Stuck,
            Cause::Claiming { .. }
            | Cause::LeaseWait { .. }
            | Cause::Reconciling
            | Cause::WritesWait { .. }
            | Cause::RecordWaits { .. }
            | Cause::CopyFailing { .. } => Condition::Waiting,
            Cause::MetadataAway { .. }
            | Cause::CopyOut { .. }
            | Cause::FewerCopies { .. }
            | Cause::StoreMissing { .. }
            | Cause::StorePoisoned { .. }
            | Cause::StoreFull { .. }
            | Cause::NodeSilent { .. } => Condition::Degraded,
            Cause::Leaving { .. } | Cause::Published { .. } | Cause::ReadOnly | Cause::Limited => {
                Condition::Healthy
            }
        }
    }

    /// A fixed word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Cause::Deleting { .. } => "deleting",
            Cause::MetadataAway { .. } => "metadata-away",
            Cause::NeverServed => "never-served",
            Cause::ServingNodeAway { .. } => "serving-node-away",
            Cause::NotServed { .. } => "not-served",
            Cause::Claiming { .. } => "claiming",
            Cause::LastCopiesAway { .. } => "last-copies-away",
            Cause::LeaseWait { .. } => "lease-wait",
            Cause::Reconciling => "reconciling",
            Cause::WritesWait { .. } => "writes-wait",
            Cause::RecordWaits { .. } => "record-waits",
            Cause::CopyOut { .. } => "copy-out",
            Cause::CopyFailing { .. } => "copy-failing",
            Cause::FewerCopies { .. } => "fewer-copies",
            Cause::Leaving { .. } => "copy-leaving",
            Cause::StoreMissing { .. } => "store-missing",
            Cause::StorePoisoned { .. } => "store-poisoned",
            Cause::StoreFull { .. } => "store-full",
            Cause::NodeSilent { .. } => "node-silent",
            Cause::Published { .. } => "published",
            Cause::ReadOnly => "read-only",
            Cause::Limited => "limited",
        }
    }

    /// What frees the volume of it, one sentence each; none where it goes on by itself. `volume`: its name.
    pub fn remedies(&self, volume: &str) -> Vec<String> {
        let one = |text: String| vec![text];
        match self {
            Cause::Deleting { waiting_for } => waiting_for
                .iter()
                .filter(|(_, answers)| !answers)
                .map(|(node, _)| format!("start {node}: it drops its copy then, and the record goes; or, if it is lost for good, `ashlar node remove {}`", node.id.0))
                .collect(),
            Cause::MetadataAway { .. } => one(
                "bring the metadata store back; of etcd a majority of its members is enough".to_owned(),
            ),
            Cause::NeverServed => one(format!(
                "ask the node that shall serve it: `ashlar volume open {volume}`"
            )),
            Cause::ServingNodeAway { node, .. } => vec![
                format!("start ashlard on {node}, or mend its network: it serves the volume again by itself"),
                format!("or ask another node to serve it: `ashlar volume open {volume}`, and attach it there"),
            ],
            Cause::NotServed { node, .. } => one(format!(
                "see to the reason; then restart ashlard on {node}, or `ashlar volume open {volume}` on the node that shall serve it"
            )),
            Cause::LastCopiesAway { nodes } => nodes
                .iter()
                .map(|node| {
                    format!("start ashlard on {node}, or mend its network: the copies that are there may lack answered writes")
                })
                .collect(),
            Cause::WritesWait {
                missing, is_coming, ..
            } => {
                if *is_coming {
                    Vec::new()
                } else if missing.is_empty() {
                    one("add copies: no node is left that has one out of sync".to_owned())
                } else {
                    let names: Vec<_> = missing.iter().map(NodeName::to_string).collect();
                    one(format!(
                        "bring copies back into sync; those on {} would do",
                        names.join(", ")
                    ))
                }
            }
            Cause::RecordWaits { .. } => one(
                "see that the metadata store can be reached from the node that serves the volume".to_owned(),
            ),
            Cause::CopyOut { node, why, .. } => why.remedies(node),
            Cause::FewerCopies { .. } => one(format!(
                "nodes have left the volume; `ashlar volume show {volume}` tells which copies there are"
            )),
            Cause::StoreMissing { node, store } => one(format!(
                "start ashlard on {node} with the --store that holds {}",
                store.0
            )),
            Cause::StorePoisoned { node, path, .. } => one(format!(
                "deal with the device of {path}, then restart ashlard on {node}"
            )),
            Cause::StoreFull { node, path } => one(format!(
                "make room in {path} on {node}: delete volumes, or discard what is not needed (fstrim)"
            )),
            Cause::NodeSilent { node, .. } => one(format!(
                "see that the admin address of {node} can be reached from the node you ask; I/O does not need it"
            )),
            Cause::Published { .. } => one(format!(
                "to attach it by hand, take it back first: `ashlar volume unpublish {volume}`"
            )),
            Cause::Claiming { .. }
            | Cause::LeaseWait { .. }
            | Cause::Reconciling
            | Cause::CopyFailing { .. }
            | Cause::Leaving { .. }
            | Cause::ReadOnly
            | Cause::Limited => Vec::new(),
        }
    }
}

impl OutBecause {
    fn remedies(&self, node: &NodeName) -> Vec<String> {
        let text = match self {
            OutBecause::NodeGone => {
                "its node does not come back; a copy has to be made elsewhere".to_owned()
            }
            OutBecause::NodeAway { .. } => {
                format!("start ashlard on {node}, or mend its network")
            }
            OutBecause::StoreMissing => {
                format!("start ashlard on {node} with the --store that holds it")
            }
            OutBecause::StorePoisoned | OutBecause::Failed(Status::Poisoned) => {
                format!("deal with the store's device, then restart ashlard on {node}")
            }
            OutBecause::Failed(Status::NoSpace) => {
                format!(
                    "make room in the store of {node}: delete volumes, or discard what is not needed (fstrim)"
                )
            }
            OutBecause::Failed(Status::Device | Status::Corrupt) => {
                format!(
                    "look after the device of {node}; `ashlar store scrub` there lists damaged places"
                )
            }
            OutBecause::NoLink => format!(
                "see that the link address of {node} (--listen-link) can be reached from the node that serves the volume"
            ),
            OutBecause::Failed(_)
            | OutBecause::Filling(_)
            | OutBecause::NoHead
            | OutBecause::Returning => return Vec::new(),
        };
        vec![text]
    }

    /// It comes back by itself.
    pub(super) fn is_coming(&self) -> bool {
        matches!(self, OutBecause::Filling(_) | OutBecause::Returning)
    }
}

impl fmt::Display for OutBecause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OutBecause::NodeGone => f.write_str("its node was removed from the cluster"),
            OutBecause::NodeAway { error } => write!(f, "its node does not answer ({error})"),
            OutBecause::StoreMissing => f.write_str("its store is not open in its daemon"),
            OutBecause::StorePoisoned => f.write_str("its store is poisoned"),
            OutBecause::Failed(status) => write!(f, "it failed: {status}"),
            OutBecause::NoLink => {
                f.write_str("its node answers, but the serving node has no link to it")
            }
            OutBecause::Filling(filling) if filling.is_finishing => write!(
                f,
                "it is being brought up to date: {} copied, its flush and the record are awaited",
                Bytes(filling.copied_blocks * BLOCK_BYTES as u64)
            ),
            OutBecause::Filling(filling) => write!(
                f,
                "it is being brought up to date: {} copied, {} leaf(s) of 2 MiB known to be left",
                Bytes(filling.copied_blocks * BLOCK_BYTES as u64),
                filling.leaves_left
            ),
            OutBecause::NoHead => {
                f.write_str("nobody serves the volume, so nobody brings it up to date")
            }
            OutBecause::Returning => f.write_str("it can be reached and is next to be filled"),
        }
    }
}

/// Bytes for people.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            few if few < 10 << 20 => write!(f, "{} KiB", few >> 10),
            some if some < 10 << 30 => write!(f, "{} MiB", some >> 20),
            many => write!(f, "{} GiB", many >> 30),
        }
    }
}

fn names<'a>(nodes: impl IntoIterator<Item = &'a NodeName>) -> String {
    let names: Vec<_> = nodes.into_iter().map(NodeName::to_string).collect();
    names.join(", ")
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Deleting { waiting_for } if waiting_for.is_empty() => {
                f.write_str("it is being deleted")
            }
            Cause::Deleting { waiting_for } => write!(
                f,
                "it is being deleted; its record stays until these have dropped their copies: {}",
                names(waiting_for.iter().map(|(node, _)| node))
            ),
            Cause::MetadataAway { error } => write!(
                f,
                "the metadata store does not answer ({error}); what stands here is as it was last seen, and a copy that fails now cannot be recorded as out of sync"
            ),
            Cause::NeverServed => f.write_str("no node has served it yet"),
            Cause::ServingNodeAway { node, error } => {
                write!(f, "{node} serves it and does not answer ({error})")
            }
            Cause::NotServed { node, reason } => {
                write!(f, "{node} should serve it and does not: {reason}")
            }
            Cause::Claiming { for_ms } => write!(
                f,
                "its head is claiming it in the metadata store, for {} so far",
                Seconds(*for_ms)
            ),
            Cause::LastCopiesAway { nodes } => write!(
                f,
                "no sound copy in sync can be reached; those that count are on {}",
                names(nodes)
            ),
            Cause::LeaseWait { nodes } => write!(
                f,
                "it is being opened; {} cannot be reached, so reads of an old head are waited out (seconds)",
                names(nodes)
            ),
            Cause::Reconciling => {
                f.write_str("its copies are being made alike before it is served")
            }
            Cause::WritesWait {
                in_sync,
                copies,
                needed,
                waiting,
                ..
            } => write!(
                f,
                "{in_sync} of {copies} copies are in sync and min_in_sync is {needed}, so writes wait ({waiting} now); reads go on"
            ),
            Cause::RecordWaits { for_ms } => write!(
                f,
                "a change of its record has been awaited for {}; until it is there, some answers are held",
                Seconds(*for_ms)
            ),
            Cause::CopyOut { node, store, why } => {
                write!(
                    f,
                    "the copy on {node}, store {}, is out of sync: {why}",
                    store.0
                )
            }
            Cause::CopyFailing { node, store } => write!(
                f,
                "the copy on {node}, store {}, does not answer; it is being recorded as out of sync, and answers are held until then",
                store.0
            ),
            Cause::FewerCopies { copies, wanted } => write!(
                f,
                "the record names {copies} copies of some chunks where there should be {wanted}"
            ),
            Cause::Leaving { node } => write!(
                f,
                "the copy on {node} is to leave as soon as others suffice without it"
            ),
            Cause::StoreMissing { node, store } => write!(
                f,
                "store {} of {node} has a copy and is not open there",
                store.0
            ),
            Cause::StorePoisoned { node, path, reason } => write!(
                f,
                "store {path} of {node} is poisoned ({reason}): it changes nothing more"
            ),
            Cause::StoreFull { node, path } => write!(
                f,
                "store {path} of {node} is full: new blocks are refused, overwrites and discards are taken"
            ),
            Cause::NodeSilent { node, error } => write!(
                f,
                "{node} has a copy in sync, and its admin interface does not answer ({error})"
            ),
            Cause::Published { to } => write!(
                f,
                "it is published to {}, and is opened by the export name given there alone",
                to.join(", ")
            ),
            Cause::ReadOnly => f.write_str("it is read-only: writes are refused"),
            Cause::Limited => f.write_str("it has limits: what is asked above them waits its turn"),
        }
    }
}

/// Durations for people.
struct Seconds(u64);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            short if short < 10_000 => write!(f, "{}.{} s", short / 1000, short % 1000 / 100),
            long if long < 120_000 => write!(f, "{} s", long / 1000),
            longer => write!(f, "{} min", longer / 60_000),
        }
    }
}
