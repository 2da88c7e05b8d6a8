//! What a head says of itself.

use super::super::wire::Status;
use super::resync::Stage;
use super::{MemberId, MemberPlace, Phase, ReplicatedHead};
use crate::records::SetIndex;
use crate::units::Epoch;

/// Where a head is, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PhaseName {
    /// Its claim is being recorded.
    Claiming,
    /// Replicas are being sealed.
    Sealing,
    /// Copies are being made alike.
    Reconciling,
    /// Served.
    Serving,
    /// Being closed.
    Closing,
    /// At its end.
    Stopped,
}

/// A replica being brought up to date.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResyncProgress {
    /// Which.
    pub member: MemberId,
    /// Of which set.
    pub set: SetIndex,
    /// Blocks copied so far.
    pub copied_blocks: u64,
    /// Leaves known to differ that are yet to be looked at; more may be found.
    pub leaves_left: u64,
    /// Only its flush and the record are awaited.
    pub is_finishing: bool,
}

/// A store that has replicas of the volume, as the head finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// Where.
    pub place: MemberPlace,
    /// A link to it is up.
    pub is_linked: bool,
    /// For how long it has had no session, microseconds; `None`: it has one.
    pub away_us: Option<u64>,
    /// How it failed last, when it said so itself.
    pub failure: Option<Status>,
    /// It lacks writes that it had answered, and has yet to be made whole.
    pub is_lost: bool,
}

/// What a head says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadStatus {
    /// Where it is.
    pub phase: PhaseName,
    /// The record's epoch.
    pub epoch: Epoch,
    /// Smallest number of replicas in sync and sound, over all sets.
    pub in_sync_least: u32,
    /// How many must be in sync for a write to be answered.
    pub min_in_sync: u32,
    /// Sets whose writes wait for more replicas.
    pub sets_waiting: u32,
    /// Changes sent and not answered.
    pub writes_in_flight: usize,
    /// For how long the oldest of them has waited, microseconds.
    pub oldest_write_us: u64,
    /// A swap of the record is awaited.
    pub is_swapping: bool,
    /// For how long, microseconds.
    pub swapping_us: u64,
    /// Every store that the record names, or named.
    pub members: Vec<MemberStatus>,
    /// Members without a session.
    pub away: Vec<MemberId>,
    /// Replicas being brought up to date.
    pub resyncs: Vec<ResyncProgress>,
}

impl ReplicatedHead {
    /// What the head says of itself.
    pub fn status(&self) -> HeadStatus {
        let sound = |set: &super::Set| set.usable().count_ones();
        HeadStatus {
            phase: match self.phase {
                Phase::Claiming => PhaseName::Claiming,
                Phase::Sealing | Phase::Recording => PhaseName::Sealing,
                Phase::Reconciling | Phase::Mending => PhaseName::Reconciling,
                Phase::Serving => PhaseName::Serving,
                Phase::Closing => PhaseName::Closing,
                Phase::Stopped => PhaseName::Stopped,
            },
            epoch: self.record.record.epoch,
            in_sync_least: self.sets.iter().map(sound).min().unwrap_or(0),
            min_in_sync: self.min_in_sync(),
            sets_waiting: self
                .sets
                .iter()
                .filter(|set| sound(set) < self.min_in_sync())
                .count() as u32,
            writes_in_flight: self.ops.len(),
            oldest_write_us: self
                .ops
                .iter()
                .map(|(_, op)| self.now_us.saturating_sub(op.since_us))
                .max()
                .unwrap_or(0),
            is_swapping: self.swap.is_some(),
            swapping_us: self
                .swap
                .as_ref()
                .map_or(0, |swap| self.now_us.saturating_sub(swap.since_us)),
            members: self
                .members
                .iter()
                .map(|member| MemberStatus {
                    place: member.place,
                    is_linked: member.link,
                    away_us: (!member.is_open())
                        .then(|| self.now_us.saturating_sub(member.away_since_us)),
                    failure: member.failure,
                    is_lost: member.lost,
                })
                .collect(),
            away: self
                .members()
                .map(|(member, _)| member)
                .filter(|member| self.is_wanted(*member) && !self.at(*member).is_open())
                .collect(),
            resyncs: self
                .resyncs
                .iter()
                .map(|resync| ResyncProgress {
                    member: resync.member,
                    set: resync.set,
                    copied_blocks: resync.copied_blocks,
                    leaves_left: resync
                        .walk
                        .as_ref()
                        .map_or(0, |walk| walk.found.len() as u64),
                    is_finishing: !matches!(resync.stage, Stage::Barrier { .. } | Stage::Copying),
                })
                .collect(),
        }
    }
}
