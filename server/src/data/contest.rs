//! Which of two ways of waiting serves a client sooner, as measured while it is served.
//!
//! Looking for the next request spares our wake-up. But a thread that looks keeps its processor, and the client, which
//! this answer wakes, runs on another: on a machine whose idle processors take long to wake that costs more than the look
//! saves, and a client whose next answer a disk must give loses nothing by sharing the processor with us. Where the
//! kernel puts the two cannot be known, so now and then the other way is taken for a while, and the time that each
//! request takes is compared with that of the moments before and after.

use std::time::{Duration, Instant};

/// Turns of a block that are not measured: the kernel is still moving the two.
const LEAD_IN: u32 = 16;
/// Turns that are.
const MEASURED: u32 = 64;
/// Turns between two trials while both ways are about as good...
const OFTEN: u32 = 32 * (LEAD_IN + MEASURED);
/// ...and while one is clearly better.
const SELDOM: u32 = 8 * OFTEN;
/// Looking keeps others from a processor: it has to take at most this part of the time that sleeping takes.
const LOOKING_GAINS: f64 = 0.95;
/// What one trial may tell.
const MOST: f64 = 2.0;
/// Between two turns so far apart the client paused: the trial would measure that.
const PAUSE: Duration = Duration::from_millis(20);

/// A part of a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    /// No trial is under way; one is to begin after so many turns.
    Between(u32),
    /// The better way, before the other is tried.
    Before,
    Other,
    /// The better way again.
    After,
}

/// See the module text.
#[derive(Debug)]
pub(super) struct Contest {
    /// What is better by all that is known.
    looks: bool,
    /// Time that a request takes with looking, over that with sleeping.
    ratio: f64,
    block: Block,
    /// Turns of the block.
    turns: u32,
    /// When the measured part of the block began, and the requests that had come by then.
    mark: (Instant, u64),
    /// When the last turn of a trial was.
    last: Instant,
    /// Seconds that a request took before, and with the other way.
    took: [f64; 2],
}

impl Contest {
    pub(super) fn new(now: Instant) -> Contest {
        Contest {
            looks: true,
            ratio: 0.9,
            block: Block::Between(MEASURED),
            turns: 0,
            mark: (now, 0),
            last: now,
            took: [0.0; 2],
        }
    }

    /// Whether a trial is under way that others have to wait for.
    pub(super) fn is_tried(&self, now: Instant) -> bool {
        !matches!(self.block, Block::Between(_)) && now.duration_since(self.last) < PAUSE
    }

    /// A turn ends in which looking is worth a thought: whether to. `requests`: all that ever came. `may_try`: no other
    /// trial is under way.
    #[inline]
    pub(super) fn looks(&mut self, now: Instant, requests: u64, may_try: bool) -> bool {
        match &mut self.block {
            Block::Between(0) if may_try => {
                self.block = Block::Before;
                self.turns = 0;
            }
            Block::Between(left) => {
                *left = left.saturating_sub(1);
                return self.looks;
            }
            _ if now.duration_since(self.last) >= PAUSE => {
                self.block = Block::Between(OFTEN);
                return self.looks;
            }
            _ => {}
        }
        self.last = now;
        self.turns += 1;
        if self.turns == LEAD_IN {
            self.mark = (now, requests);
        }
        if self.turns == LEAD_IN + MEASURED {
            self.end_block(now, requests);
        }
        self.looks != (self.block == Block::Other)
    }

    fn end_block(&mut self, now: Instant, requests: u64) {
        self.turns = 0;
        let (since, had) = self.mark;
        let came = requests.saturating_sub(had).max(1);
        let took = now.duration_since(since).as_secs_f64() / came as f64;
        match self.block {
            Block::Before => {
                self.took[0] = took;
                self.block = Block::Other;
            }
            Block::Other => {
                self.took[1] = took;
                self.block = Block::After;
            }
            Block::After | Block::Between(_) => self.conclude(took),
        }
    }

    fn conclude(&mut self, took_after: f64) {
        let better = f64::midpoint(self.took[0], took_after).max(f64::MIN_POSITIVE);
        let other = self.took[1].max(f64::MIN_POSITIVE);
        let ratio = if self.looks {
            better / other
        } else {
            other / better
        };
        self.ratio = f64::midpoint(self.ratio, ratio.clamp(1.0 / MOST, MOST));
        self.looks = self.ratio < LOOKING_GAINS;
        let is_clear = !(0.75..1.25).contains(&self.ratio);
        self.block = Block::Between(if is_clear { SELDOM } else { OFTEN });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A contest, its time, and the requests that came.
    struct Run {
        contest: Contest,
        now: Instant,
        requests: u64,
    }

    impl Run {
        fn new() -> Run {
            let now = Instant::now();
            Run {
                contest: Contest::new(now),
                now,
                requests: 0,
            }
        }

        /// Turns of one request each, which takes so many microseconds with either way. The turns that looked.
        fn turns(&mut self, turns: u64, looking: u64, asleep: u64) -> u64 {
            let mut looked = 0;
            for _ in 0..turns {
                let looks = self.contest.looks(self.now, self.requests, true);
                looked += u64::from(looks);
                self.requests += 1;
                self.now += Duration::from_micros(if looks { looking } else { asleep });
            }
            looked
        }
    }

    #[test]
    fn the_sooner_way_is_taken_and_a_change_is_noticed() {
        let mut run = Run::new();
        run.turns(1000, 90, 75);
        assert!(run.turns(10_000, 90, 75) < 500);
        // The client is another one.
        run.turns(10_000, 25, 50);
        assert!(run.turns(100_000, 25, 50) > 98_000);
    }

    #[test]
    fn what_gains_nothing_does_not_keep_others_from_the_processor() {
        let mut run = Run::new();
        run.turns(10_000, 100, 100);
        assert!(run.turns(10_000, 100, 100) < 500);
    }

    #[test]
    fn a_pause_of_the_client_decides_nothing() {
        for block in [Block::Before, Block::Other, Block::After] {
            let mut run = Run::new();
            run.turns(50_000, 25, 50);
            for _ in 0..4 {
                while run.contest.block != block || run.contest.turns < 2 * LEAD_IN {
                    run.turns(1, 25, 50);
                }
                run.now += PAUSE;
                run.turns(1, 25, 50);
                assert!(run.contest.looks && run.contest.ratio < 0.6, "{block:?}");
            }
        }
    }

    #[test]
    fn one_is_tried_at_a_time_and_an_abandoned_trial_holds_nobody_up() {
        let mut now = Instant::now();
        let mut contest = Contest::new(now);
        for request in 0..1000 {
            assert!(contest.looks(now, request, false));
        }
        assert!(!contest.is_tried(now));
        contest.looks(now, 1000, true);
        assert!(contest.is_tried(now));
        now += PAUSE;
        assert!(!contest.is_tried(now));
    }
}
