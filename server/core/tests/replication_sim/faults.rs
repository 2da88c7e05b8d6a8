//! Which faults a run has. Each run draws its own mix, so that rare combinations meet often enough.

use crate::rng::Rng;

/// How often each happens, of a hundred faults; zero: never in this run.
#[derive(Clone, Debug)]
pub(crate) struct Faults {
    pub(crate) crash: u64,
    pub(crate) power_loss: u64,
    pub(crate) power_loss_of_all: u64,
    pub(crate) freeze: u64,
    pub(crate) cut: u64,
    pub(crate) reset: u64,
    pub(crate) slow: u64,
    pub(crate) takeover: u64,
    pub(crate) split: u64,
    pub(crate) meta_away: u64,
    pub(crate) poison: u64,
    pub(crate) full: u64,
    pub(crate) rot: u64,
    pub(crate) failing_reads: u64,
    pub(crate) distrust: u64,
    pub(crate) drain: u64,
    pub(crate) straggler: u64,
    /// Of a hundred swaps, how many end with an unknown outcome.
    pub(crate) unknown_swaps: u64,
    /// Between one fault and the next, on average, microseconds.
    pub(crate) every_us: u64,
}

impl Faults {
    pub(crate) fn draw(rng: &mut Rng) -> Faults {
        let mut some = |most: u64| {
            if rng.chance(50) {
                0
            } else {
                1 + rng.below(most)
            }
        };
        let mut faults = Faults {
            crash: some(20),
            power_loss: some(20),
            power_loss_of_all: some(10),
            freeze: some(20),
            cut: some(30),
            reset: some(30),
            slow: some(20),
            takeover: some(30),
            split: some(20),
            meta_away: some(10),
            poison: some(5),
            full: some(5),
            rot: some(10),
            failing_reads: some(5),
            distrust: some(10),
            drain: some(90),
            unknown_swaps: some(50),
            straggler: some(30),
            every_us: 0,
        };
        faults.every_us = [20_000, 60_000, 150_000][rng.below(3) as usize];
        // Two faults of one block at once (its last good copy rots) are beyond what is promised.
        if faults.power_loss + faults.power_loss_of_all + faults.poison > 0 {
            faults.rot = 0;
        }
        // The same: what rots is on the copies that are left.
        if faults.rot > 0 {
            faults.distrust = 0;
        }
        faults
    }

    /// Picks one.
    pub(crate) fn next(&self, rng: &mut Rng) -> Option<Fault> {
        let all = [
            (self.crash, Fault::Crash),
            (self.power_loss, Fault::PowerLoss),
            (self.power_loss_of_all, Fault::PowerLossOfAll),
            (self.freeze, Fault::Freeze),
            (self.cut, Fault::Cut),
            (self.reset, Fault::Reset),
            (self.slow, Fault::Slow),
            (self.takeover, Fault::Takeover),
            (self.split, Fault::Split),
            (self.meta_away, Fault::MetaAway),
            (self.poison, Fault::Poison),
            (self.full, Fault::Full),
            (self.rot, Fault::Rot),
            (self.failing_reads, Fault::FailingReads),
            (self.distrust, Fault::Distrust),
            (self.drain, Fault::Drain),
            (self.straggler, Fault::Straggler),
        ];
        let total: u64 = all.iter().map(|(weight, _)| weight).sum();
        if total == 0 {
            return None;
        }
        let mut at = rng.below(total);
        for (weight, fault) in all {
            if at < weight {
                return Some(fault);
            }
            at -= weight;
        }
        None
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Crash,
    PowerLoss,
    PowerLossOfAll,
    Freeze,
    /// Messages from one node to another stay on the way; perhaps both ways.
    Cut,
    /// A connection breaks; its two ends notice at different times, and what is on the way may still arrive.
    Reset,
    /// A message takes long.
    Slow,
    /// The volume is opened on another node, or on the same again.
    Takeover,
    /// A node that serves is cut off, and the volume is opened elsewhere.
    Split,
    MetaAway,
    /// A write of a store fails.
    Poison,
    Full,
    Rot,
    FailingReads,
    /// Somebody has a copy put out of sync, to be filled as a whole.
    Distrust,
    /// A node is to be emptied, or the one that was is not any more.
    Drain,
    /// A node that serves dies. What it sent last reaches those that are being filled, and late, and no other node.
    Straggler,
}
