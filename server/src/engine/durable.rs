//! How a durable write is asked of the kernel: the way that lately took less time.
//!
//! A write that carries RWF_DSYNC ends in a kernel worker bound to the processor that took the disk's interrupt: the
//! fewest wake-ups on an idle machine, and a long wait behind whatever keeps that processor busy on another. A data
//! sync linked behind the write runs on a worker that goes where there is room. Which is faster depends on what else
//! the machine does, so both are measured as they are used.

use std::time::Duration;

/// Weight of one measurement: an average over about the last eight.
const AVERAGE_SHIFT: u32 = 3;
/// One write in so many goes the other way, to see whether it has become the faster one.
const TRY_OTHER: u32 = 64;
/// The same while the other way takes more than twice as long.
const TRY_MUCH_SLOWER: u32 = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// One write with RWF_DSYNC.
    Flagged,
    /// A write and a data sync linked behind it.
    Linked,
}

/// See the module text.
#[derive(Debug, Default)]
pub(super) struct Durable {
    /// Average time of each way in nanoseconds; 0 before the first.
    average: [u64; 2],
    since_other: u32,
    /// The kernel or the file system does not take the flag.
    only_linked: bool,
}

impl Durable {
    /// The way for the next write.
    pub(super) fn choose(&mut self) -> Way {
        if self.only_linked {
            return Way::Linked;
        }
        let [flagged, linked] = self.average;
        let (best, other, times) = if flagged <= linked {
            (Way::Flagged, Way::Linked, linked / flagged.max(1))
        } else {
            (Way::Linked, Way::Flagged, flagged / linked.max(1))
        };
        self.since_other += 1;
        let every = if times >= 2 {
            TRY_MUCH_SLOWER
        } else {
            TRY_OTHER
        };
        // A way not measured yet counts as the best.
        if self.since_other < every || flagged.min(linked) == 0 {
            return best;
        }
        self.since_other = 0;
        other
    }

    /// A write that went this way took so long.
    pub(super) fn learn(&mut self, way: Way, took: Duration) {
        let average = &mut self.average[way as usize];
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1);
        *average = match *average {
            0 => took,
            old => old - (old >> AVERAGE_SHIFT) + (took >> AVERAGE_SHIFT),
        };
    }

    /// The flag was refused: it is not tried again.
    pub(super) fn refuse_flag(&mut self) {
        self.only_linked = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share_of_flagged(durable: &mut Durable, flagged_us: u64, linked_us: u64) -> u32 {
        (0..2000)
            .filter(|_| {
                let way = durable.choose();
                durable.learn(
                    way,
                    Duration::from_micros(match way {
                        Way::Flagged => flagged_us,
                        Way::Linked => linked_us,
                    }),
                );
                way == Way::Flagged
            })
            .count() as u32
    }

    #[test]
    fn the_faster_way_is_taken_and_a_change_is_noticed() {
        let mut durable = Durable::default();
        assert!(share_of_flagged(&mut durable, 100, 150) > 1900);
        // The machine gets busy: the same way is ten times slower.
        assert!(share_of_flagged(&mut durable, 1000, 150) < 100);
        assert!(share_of_flagged(&mut durable, 1000, 150) < 10);
        // And idle again.
        share_of_flagged(&mut durable, 100, 150);
        share_of_flagged(&mut durable, 100, 150);
        share_of_flagged(&mut durable, 100, 150);
        assert!(share_of_flagged(&mut durable, 100, 150) > 1500);
    }

    #[test]
    fn a_refused_flag_is_not_tried_again() {
        let mut durable = Durable::default();
        assert_eq!(durable.choose(), Way::Flagged);
        durable.refuse_flag();
        assert_eq!(share_of_flagged(&mut durable, 1, 1000), 0);
    }
}
