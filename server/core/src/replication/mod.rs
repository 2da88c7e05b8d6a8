//! Replication: one head a volume, its replicas, and the set of them that is in sync.
//!
//! Two machines decide. [`ReplicatedHead`] runs where the volume is served; it owns who has what. [`Acceptor`] runs
//! beside each store; it owns whose operations are taken. Both are synchronous and closed: events and calls go in,
//! actions come out, and the shell carries them over links, stores and the metadata store. docs/replication.md has the
//! promises and the ten rules; [`Rules`] has their switches.
//!
//! What each file is about:
//! - `wire`: the bytes of a link
//! - `acceptor`: the seal of one volume at one store
//! - `head`: the head, a file a concern
//! - `membership`, `controller`: which replicas there should be, and where; `sightings`: who was heard of
//! - `rules`: the switches

mod acceptor;
pub mod controller;
mod head;
pub mod membership;
mod rules;
pub mod sightings;
pub mod wire;

pub use acceptor::{
    Acceptor, AcceptorAction, AcceptorEvent, BootId, LinkId, Seal, SessionRef, StartedWith,
};
pub use head::{
    Action, CopyId, Event, FlushAdmission, HeadParams, HeadStatus, MemberId, MemberPlace,
    MemberStatus, News, OpKey, Outcome, PhaseName, QueryId, ReadAdmission, ReplicaMask,
    ReplicatedHead, ResyncProgress, StopReason, SwapOutcome, WriteAdmission,
};
pub use rules::Rules;

pub use crate::store::{BlockContent, BlockState};
