//! Replication: one head a volume, its replicas, and the set of them that is in sync.
//!
//! Two machines decide. [`ReplicatedHead`] runs where the volume is served; it owns who has what. [`Acceptor`] runs
//! beside each store; it owns whose operations are taken. Both are synchronous and closed: events and calls go in,
//! actions come out, and the shell carries them over links, stores and the metadata store. docs/replication.md has the
//! promises and the nine rules; [`Rules`] has their switches.
//!
//! What each file is about:
//! - `wire`: the bytes of a link
//! - `acceptor`: the seal of one volume at one store
//! - `head`: the head, a file a concern
//! - `rules`: the switches

mod acceptor;
mod head;
mod rules;
pub mod wire;

pub use acceptor::{
    Acceptor, AcceptorAction, AcceptorEvent, BootId, LinkId, Seal, SessionRef, StartedWith,
};
pub use head::{
    Action, CopyId, Event, FlushAdmission, HeadParams, HeadStatus, MemberId, MemberPlace, News,
    OpKey, Outcome, PhaseName, QueryId, ReadAdmission, ReplicaMask, ReplicatedHead, ResyncProgress,
    StopReason, SwapOutcome, WriteAdmission,
};
pub use rules::Rules;

use crate::units::Version;

/// What a replica has of one block of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockState {
    /// Of the write that put it there.
    pub version: Version,
    /// What is there.
    pub content: BlockContent,
}

/// The kinds of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockContent {
    /// Nothing was ever written.
    Hole,
    /// Written as zeros, or trimmed.
    Zeros,
    /// Bytes.
    Data,
    /// The index of the block was damaged: it must be copied from elsewhere, whatever its version.
    Lost,
}

impl BlockState {
    /// Never written.
    pub const HOLE: BlockState = BlockState {
        version: Version::NONE,
        content: BlockContent::Hole,
    };

    /// Reads as zeros, as long as the layer has no parent. A store forgets the version of zeros that change nothing,
    /// so two blocks that read as zeros are alike whatever their versions.
    pub fn reads_as_zeros(self) -> bool {
        matches!(self.content, BlockContent::Hole | BlockContent::Zeros)
    }

    /// Whether both have the same content for certain.
    pub fn is_like(self, other: BlockState) -> bool {
        if self.reads_as_zeros() && other.reads_as_zeros() {
            return true;
        }
        self.content == BlockContent::Data && self == other
    }
}
