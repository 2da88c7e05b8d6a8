//! What is worth remembering, and the bounded memory of it.
//!
//! An [`Occurrence`] is something that happened, with its words and its weight; a [`Memory`] keeps the last so many of
//! them. It forgets the oldest first, and says to whoever reads late how many he missed.

use std::collections::VecDeque;
use std::fmt;

use crate::replication::wire::Status;
use crate::store::{Errno, StoreError};
use crate::units::{Epoch, NodeId, StoreId, VolumeId};

/// How much somebody should care.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// As it should be.
    Info,
    /// Worth a look; what was promised holds.
    Warning,
    /// Something was lost, or needs a person.
    Error,
}

/// What something happened to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// A volume.
    pub volume: Option<VolumeId>,
    /// Its name then.
    pub volume_name: String,
    /// A node.
    pub node: Option<NodeId>,
    /// A store.
    pub store: Option<StoreId>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Occurrence {
    /// The daemon is ready.
    DaemonReady,
    /// The daemon is being stopped.
    DaemonStopping,
    /// A volume was created.
    VolumeCreated {
        /// Bytes.
        size_bytes: u64,
    },
    /// A volume was deleted.
    VolumeDeleted,
    /// A volume has another name.
    VolumeRenamed {
        /// The one before.
        before: String,
    },
    /// A volume was made larger.
    VolumeGrown {
        /// Bytes it has now.
        size_bytes: u64,
    },
    /// A head here begins to claim a volume and to seal its copies.
    VolumeClaimed {
        /// The epoch before.
        epoch: Epoch,
    },
    /// Clients are let in.
    VolumeServed,
    /// Another head took the volume over.
    VolumeFenced {
        /// Its epoch, or the smallest it can be.
        epoch: Epoch,
    },
    /// A volume is no longer served here.
    VolumeClosed {
        /// Why.
        reason: String,
    },
    /// A volume could not be served.
    VolumeNotServed {
        /// Why.
        reason: String,
    },
    /// Every copy lost power: clients were disconnected.
    SessionsEnded,
    /// A volume goes to a client node.
    VolumePublished {
        /// Which.
        client: String,
    },
    /// A volume was taken back from client nodes.
    VolumeUnpublished {
        /// Connections that were ended.
        connections: u32,
    },
    /// A copy failed, or its lease ran out; reads and acknowledgements wait until it is recorded as out of sync.
    CopyFailed {
        /// What it said; `None`: it did not answer in time, or its link broke.
        status: Option<Status>,
    },
    /// A copy is recorded as out of sync.
    CopyDropped {
        /// Of which set.
        set: u16,
    },
    /// A copy is being brought up to date.
    CopyFilling {
        /// Of which set.
        set: u16,
    },
    /// That was cut off.
    CopyFillingFailed {
        /// Of which set.
        set: u16,
    },
    /// A copy is in sync again.
    CopyInSync {
        /// Of which set.
        set: u16,
        /// What had to be copied.
        copied_bytes: u64,
    },
    /// A copy is not part of the volume any more.
    CopyRemoved {
        /// Of which set.
        set: u16,
    },
    /// A copy lost power while it was open for writing.
    CopyLostPower,
    /// Damaged blocks were written again from a good copy.
    BlocksRepaired {
        /// Of which chunk.
        chunk: u32,
        /// How many.
        count: u32,
    },
    /// A write or a sync failed: the store changes nothing more.
    StorePoisoned(Errno),
    /// What was read is not what was written.
    ChecksumError(StoreError),
    /// A store's file could not be made larger.
    StoreNotGrown(Errno),
    /// A store was verified.
    StoreScrubbed {
        /// What was read.
        bytes: u64,
        /// Blocks that were not what was written.
        damaged_blocks: u64,
    },
    /// The records of the cluster cannot be followed.
    RecordsAway {
        /// What the metadata store said.
        reason: String,
    },
    /// A node is new in the cluster.
    NodeJoined,
    /// A node was shut out of the cluster.
    NodeRemoved,
    /// Somebody had a repair made.
    Repaired {
        /// What was done.
        what: String,
    },
}

impl Occurrence {
    /// How much somebody should care.
    pub fn severity(&self) -> Severity {
        match self {
            Occurrence::DaemonReady
            | Occurrence::DaemonStopping
            | Occurrence::VolumeCreated { .. }
            | Occurrence::VolumeDeleted
            | Occurrence::VolumeRenamed { .. }
            | Occurrence::VolumeGrown { .. }
            | Occurrence::VolumeClaimed { .. }
            | Occurrence::VolumeServed
            | Occurrence::VolumeClosed { .. }
            | Occurrence::VolumePublished { .. }
            | Occurrence::VolumeUnpublished { .. }
            | Occurrence::CopyFilling { .. }
            | Occurrence::CopyInSync { .. }
            | Occurrence::CopyRemoved { .. }
            | Occurrence::StoreScrubbed {
                damaged_blocks: 0, ..
            }
            | Occurrence::NodeJoined => Severity::Info,
            Occurrence::VolumeFenced { .. }
            | Occurrence::CopyFailed { .. }
            | Occurrence::CopyDropped { .. }
            | Occurrence::CopyFillingFailed { .. }
            | Occurrence::CopyLostPower
            | Occurrence::BlocksRepaired { .. }
            | Occurrence::StoreNotGrown(_)
            | Occurrence::RecordsAway { .. }
            | Occurrence::NodeRemoved
            | Occurrence::Repaired { .. } => Severity::Warning,
            Occurrence::VolumeNotServed { .. }
            | Occurrence::SessionsEnded
            | Occurrence::StorePoisoned(_)
            | Occurrence::ChecksumError(_)
            | Occurrence::StoreScrubbed { .. } => Severity::Error,
        }
    }

    /// A fixed word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Occurrence::DaemonReady => "daemon-ready",
            Occurrence::DaemonStopping => "daemon-stopping",
            Occurrence::VolumeCreated { .. } => "volume-created",
            Occurrence::VolumeDeleted => "volume-deleted",
            Occurrence::VolumeRenamed { .. } => "volume-renamed",
            Occurrence::VolumeGrown { .. } => "volume-grown",
            Occurrence::VolumeClaimed { .. } => "volume-claimed",
            Occurrence::VolumeServed => "volume-served",
            Occurrence::VolumeFenced { .. } => "volume-fenced",
            Occurrence::VolumeClosed { .. } => "volume-closed",
            Occurrence::VolumeNotServed { .. } => "volume-not-served",
            Occurrence::SessionsEnded => "sessions-ended",
            Occurrence::VolumePublished { .. } => "volume-published",
            Occurrence::VolumeUnpublished { .. } => "volume-unpublished",
            Occurrence::CopyFailed { .. } => "copy-failed",
            Occurrence::CopyDropped { .. } => "copy-dropped",
            Occurrence::CopyFilling { .. } => "copy-filling",
            Occurrence::CopyFillingFailed { .. } => "copy-filling-failed",
            Occurrence::CopyInSync { .. } => "copy-in-sync",
            Occurrence::CopyRemoved { .. } => "copy-removed",
            Occurrence::CopyLostPower => "copy-lost-power",
            Occurrence::BlocksRepaired { .. } => "blocks-repaired",
            Occurrence::StorePoisoned(_) => "store-poisoned",
            Occurrence::ChecksumError(_) => "checksum-error",
            Occurrence::StoreNotGrown(_) => "store-not-grown",
            Occurrence::StoreScrubbed { .. } => "store-scrubbed",
            Occurrence::RecordsAway { .. } => "records-away",
            Occurrence::NodeJoined => "node-joined",
            Occurrence::NodeRemoved => "node-removed",
            Occurrence::Repaired { .. } => "repaired",
        }
    }

    /// Comes in numbers when it comes: those of one subject in a row are kept as one, so that they push nothing out.
    fn comes_in_numbers(&self) -> bool {
        matches!(
            self,
            Occurrence::ChecksumError(_)
                | Occurrence::BlocksRepaired { .. }
                | Occurrence::CopyFillingFailed { .. }
                | Occurrence::RecordsAway { .. }
        )
    }
}

impl fmt::Display for Occurrence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Occurrence::DaemonReady => f.write_str("the daemon is ready"),
            Occurrence::DaemonStopping => f.write_str("the daemon is being stopped"),
            Occurrence::VolumeCreated { size_bytes } => {
                write!(f, "created, {size_bytes} bytes")
            }
            Occurrence::VolumeDeleted => f.write_str("deleted"),
            Occurrence::VolumeRenamed { before } => write!(f, "renamed; it was {before}"),
            Occurrence::VolumeGrown { size_bytes } => write!(f, "grown to {size_bytes} bytes"),
            Occurrence::VolumeClaimed { epoch } => {
                write!(f, "a head here claims it; its epoch was {}", epoch.0)
            }
            Occurrence::VolumeServed => f.write_str("served here"),
            Occurrence::VolumeFenced { epoch } => write!(
                f,
                "another node took it over, at epoch {}; it is not served here any more",
                epoch.0
            ),
            Occurrence::VolumeClosed { reason } => write!(f, "no longer served here: {reason}"),
            Occurrence::VolumeNotServed { reason } => write!(f, "not served: {reason}"),
            Occurrence::SessionsEnded => f.write_str(
                "every copy lost power: answered writes that were not flushed may be gone; its clients were disconnected",
            ),
            Occurrence::VolumePublished { client } => write!(f, "published to {client}"),
            Occurrence::VolumeUnpublished { connections } => {
                write!(f, "taken back; {connections} connection(s) ended")
            }
            Occurrence::CopyFailed {
                status: Some(status),
            } => write!(
                f,
                "a copy failed ({status}); answers are held until it is recorded as out of sync"
            ),
            Occurrence::CopyFailed { status: None } => f.write_str(
                "a copy does not answer (its link ended, or its lease); answers are held until it is recorded as out of sync",
            ),
            Occurrence::CopyDropped { set } => write!(f, "a copy of set {set} is out of sync"),
            Occurrence::CopyFilling { set } => {
                write!(f, "a copy of set {set} is being brought up to date")
            }
            Occurrence::CopyFillingFailed { set } => write!(
                f,
                "bringing a copy of set {set} up to date was cut off; it is tried again"
            ),
            Occurrence::CopyInSync { set, copied_bytes } => write!(
                f,
                "a copy of set {set} is in sync again, {copied_bytes} bytes copied"
            ),
            Occurrence::CopyRemoved { set } => write!(f, "a copy of set {set} was removed"),
            Occurrence::CopyLostPower => {
                f.write_str("a copy lost power while it was open for writing")
            }
            Occurrence::BlocksRepaired { chunk, count } => write!(
                f,
                "{count} damaged block(s) of chunk {chunk} were written again from a good copy"
            ),
            Occurrence::StorePoisoned(errno) => write!(
                f,
                "poisoned: a write or a sync of its device failed ({errno})"
            ),
            Occurrence::ChecksumError(error) => write!(f, "{error}"),
            Occurrence::StoreNotGrown(errno) => {
                write!(f, "its file could not be made larger ({errno})")
            }
            Occurrence::StoreScrubbed {
                bytes,
                damaged_blocks: 0,
            } => write!(f, "verified, {bytes} bytes, all sound"),
            Occurrence::StoreScrubbed {
                bytes,
                damaged_blocks,
            } => write!(f, "verified, {bytes} bytes, {damaged_blocks} damaged block(s)"),
            Occurrence::RecordsAway { reason } => {
                write!(f, "the records of the cluster cannot be followed: {reason}")
            }
            Occurrence::NodeJoined => f.write_str("in the cluster"),
            Occurrence::NodeRemoved => f.write_str("removed from the cluster"),
            Occurrence::Repaired { what } => write!(f, "repaired on request: {what}"),
        }
    }
}

/// Something that is remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Rises with each; the numbers of one memory have no gaps but those of events that were counted as one.
    pub sequence: u64,
    /// When it happened (first), milliseconds since 1970-01-01 UTC.
    pub at_unix_ms: u64,
    /// When it happened last.
    pub last_at_unix_ms: u64,
    /// How often, in a row.
    pub count: u64,
    /// To what.
    pub subject: Subject,
    /// What.
    pub what: Occurrence,
}

/// What somebody reads of a memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// Oldest first.
    pub events: Vec<Event>,
    /// How many events, of whatever subject, came after those he had seen and are forgotten.
    pub missed: u64,
    /// Where to go on.
    pub seen: u64,
}

/// The last so many events.
#[derive(Debug)]
pub struct Memory {
    events: VecDeque<Event>,
    most: usize,
    sequence: u64,
    forgotten: u64,
}

impl Memory {
    /// Remembers `most` events, at least one.
    pub fn new(most: usize) -> Memory {
        Memory {
            events: VecDeque::new(),
            most: most.max(1),
            sequence: 0,
            forgotten: 0,
        }
    }

    /// Remembers one more.
    pub fn push(&mut self, now_unix_ms: u64, subject: Subject, what: Occurrence) {
        self.sequence += 1;
        let mut event = Event {
            sequence: self.sequence,
            at_unix_ms: now_unix_ms,
            last_at_unix_ms: now_unix_ms,
            count: 1,
            subject,
            what,
        };
        let is_one_more = self.events.back().is_some_and(|last| {
            event.what.comes_in_numbers()
                && last.what.code() == event.what.code()
                && last.subject == event.subject
        });
        if is_one_more && let Some(last) = self.events.pop_back() {
            event.at_unix_ms = last.at_unix_ms;
            event.count = last.count + 1;
        }
        self.events.push_back(event);
        if self.events.len() > self.most
            && let Some(oldest) = self.events.pop_front()
        {
            self.forgotten = oldest.sequence;
        }
    }

    /// The number of the newest event; 0: there was none.
    pub fn newest(&self) -> u64 {
        self.sequence
    }

    /// What came after event `seen` (0: everything), of one volume or of all.
    pub fn after(&self, seen: u64, volume: Option<VolumeId>) -> Page {
        let wanted = |event: &&Event| {
            event.sequence > seen
                && volume.is_none_or(|volume| event.subject.volume == Some(volume))
        };
        Page {
            events: self.events.iter().filter(wanted).cloned().collect(),
            missed: if seen == 0 {
                0
            } else {
                self.forgotten.saturating_sub(seen)
            },
            seen: self.sequence,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{ChunkIndex, LayerId};
    use uuid::Uuid;

    fn volume(n: u128) -> Subject {
        Subject {
            volume: Some(VolumeId(Uuid::from_u128(n))),
            volume_name: format!("v{n}"),
            ..Subject::default()
        }
    }

    fn rot(block: u32) -> Occurrence {
        Occurrence::ChecksumError(StoreError::Corrupt {
            layer: LayerId(1),
            chunk: ChunkIndex(0),
            block,
        })
    }

    #[test]
    fn the_oldest_is_forgotten_and_whoever_reads_late_is_told() {
        let mut memory = Memory::new(3);
        for n in 1..=5 {
            memory.push(n, volume(n.into()), Occurrence::VolumeServed);
        }
        let all = memory.after(0, None);
        let at: Vec<u64> = all.events.iter().map(|event| event.sequence).collect();
        assert_eq!((at, all.missed, all.seen), (vec![3, 4, 5], 0, 5));
        assert_eq!(memory.after(1, None).missed, 1);
        assert_eq!(memory.after(2, None).missed, 0);
        assert_eq!(memory.after(4, None).events.len(), 1);
        assert!(memory.after(5, None).events.is_empty());
    }

    #[test]
    fn one_volume_is_picked_out() {
        let mut memory = Memory::new(10);
        memory.push(1, volume(1), Occurrence::VolumeServed);
        memory.push(2, volume(2), Occurrence::VolumeServed);
        memory.push(3, Subject::default(), Occurrence::DaemonReady);
        let of_two = memory.after(0, volume(2).volume);
        assert_eq!(of_two.events.len(), 1);
        assert_eq!(of_two.events[0].subject, volume(2));
        assert_eq!(of_two.seen, 3);
    }

    #[test]
    fn a_flood_of_one_kind_pushes_nothing_out() {
        let mut memory = Memory::new(2);
        memory.push(1, volume(1), Occurrence::VolumeServed);
        for n in 0..1000 {
            memory.push(2 + u64::from(n), volume(1), rot(n));
        }
        let page = memory.after(0, None);
        assert_eq!(page.events[0].what, Occurrence::VolumeServed);
        let flood = &page.events[1];
        assert_eq!((flood.count, flood.at_unix_ms), (1000, 2));
        assert_eq!((flood.last_at_unix_ms, &flood.what), (1001, &rot(999)));
        // Who follows is told of the last of them though he has seen the first.
        assert_eq!(memory.after(2, None).events.len(), 1);
        // Of another subject it is an event of its own.
        memory.push(2000, volume(2), rot(1));
        assert_eq!(memory.after(flood.sequence, None).events[0].count, 1);
    }

    #[test]
    fn what_needs_a_person_is_an_error() {
        assert_eq!(
            Occurrence::StorePoisoned(Errno::EIO).severity(),
            Severity::Error
        );
        let scrubbed = |damaged_blocks| Occurrence::StoreScrubbed {
            bytes: 1,
            damaged_blocks,
        };
        assert_eq!(scrubbed(0).severity(), Severity::Info);
        assert_eq!(scrubbed(1).severity(), Severity::Error);
        assert_eq!(
            Occurrence::CopyDropped { set: 0 }.severity(),
            Severity::Warning
        );
    }
}
