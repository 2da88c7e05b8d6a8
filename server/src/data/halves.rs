//! Which ended reads are answered now.
//!
//! A disk that is asked for much at once often ends it at once, virtual disks above all. Were such a batch answered
//! whole, its client would take in all of it before it asked for more, and the disk would stand still meanwhile; then
//! the disk would work and the client stand still. So with nothing else under way half of the batch is answered, and
//! the rest when the client has come back for more: from then on one half is with the disk while the other is with the
//! client. A client that does not come back before it has everything is soon known by that, and gets all at once.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::habit::Habit;
use crate::engine::Tag;

/// A smaller batch is answered whole.
pub(super) const LEAST: usize = 8;
/// Longest that the other half is held back: clients take 10 us and more for each answer.
const HOLD: Duration = Duration::from_micros(600);

pub(super) type Ended = (Tag, Result<u32, Errno>);

/// See the module text.
#[derive(Debug, Default)]
pub(super) struct Halves {
    ended: VecDeque<Ended>,
    /// So many of them may be answered.
    released: usize,
    held_until: Option<Instant>,
    habit: Habit,
}

impl Halves {
    pub(super) fn push(&mut self, ended: Ended) {
        self.ended.push_back(ended);
    }

    /// Decides how many more may be answered. `under_way`: reads that the disk still has; `came`: a client has asked
    /// for something, which goes first.
    pub(super) fn release(&mut self, now: Instant, under_way: usize, came: bool) {
        let waiting = self.ended.len() - self.released;
        if let Some(until) = self.held_until {
            if came || now >= until {
                self.habit.learn(came);
                self.held_until = None;
            }
            if !came && now >= until {
                self.released += waiting;
            }
            return;
        }
        let halve = waiting >= LEAST && under_way == 0 && !came && self.released == 0;
        if halve && self.habit.tries() {
            self.held_until = Some(now + HOLD);
            self.released += waiting / 2;
        } else {
            self.released += waiting;
        }
    }

    /// The next to answer.
    pub(super) fn next(&mut self) -> Option<Ended> {
        self.released = self.released.checked_sub(1)?;
        self.ended.pop_front()
    }

    /// Whether all that ended has been answered.
    pub(super) fn is_empty(&self) -> bool {
        self.ended.is_empty()
    }

    /// Until when the thread may wait because of what is left; `None` when nothing is.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        if self.ended.is_empty() {
            return None;
        }
        Some(
            self.held_until
                .filter(|_| self.released == 0)
                .unwrap_or(now),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(halves: &mut Halves, count: usize) {
        (0..count).for_each(|tag| halves.push((tag as Tag, Ok(4096))));
    }

    /// How many are answered.
    fn answered(halves: &mut Halves, now: Instant, under_way: usize, came: bool) -> usize {
        halves.release(now, under_way, came);
        std::iter::from_fn(|| halves.next()).count()
    }

    #[test]
    fn the_other_half_follows_when_the_client_comes_back_or_has_had_its_time() {
        let mut halves = Halves::default();
        let now = Instant::now();
        assert_eq!(answered(&mut halves, now, 0, false), 0);
        assert_eq!(halves.deadline(now), None);
        batch(&mut halves, 7);
        assert_eq!(answered(&mut halves, now, 0, false), 7);
        batch(&mut halves, 32);
        assert_eq!(
            answered(&mut halves, now, 1, false),
            32,
            "the disk has more"
        );
        batch(&mut halves, 32);
        assert_eq!(answered(&mut halves, now, 0, true), 32, "nobody waits");

        batch(&mut halves, 32);
        halves.release(now, 0, false);
        assert!(halves.next().is_some());
        assert_eq!(halves.deadline(now), Some(now), "there is more to answer");
        assert_eq!(answered(&mut halves, now, 0, false), 15);
        assert_eq!(halves.deadline(now), Some(now + HOLD));
        assert_eq!(answered(&mut halves, now + HOLD / 2, 0, false), 0);
        assert_eq!(
            answered(&mut halves, now + HOLD / 2, 3, true),
            0,
            "its request first"
        );
        assert_eq!(halves.deadline(now), Some(now));
        assert_eq!(answered(&mut halves, now + HOLD / 2, 3, false), 16);

        batch(&mut halves, 9);
        assert_eq!(answered(&mut halves, now, 0, false), 4);
        assert_eq!(answered(&mut halves, now + HOLD, 0, false), 5);
        assert_eq!(halves.deadline(now), None);
    }

    #[test]
    fn a_client_that_waits_for_everything_is_seldom_kept_waiting() {
        let mut halves = Halves::default();
        let now = Instant::now();
        let mut held = 0;
        for _ in 0..6400 {
            batch(&mut halves, 16);
            if answered(&mut halves, now, 0, false) == 8 {
                held += 1;
                assert_eq!(answered(&mut halves, now + HOLD, 0, false), 8);
            }
        }
        assert!((100..130).contains(&held), "{held}");
    }
}
