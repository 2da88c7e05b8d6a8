//! How a durable write is asked of the kernel: the way that lately took less time.
//!
//! A write that carries RWF_DSYNC ends in a kernel worker bound to the processor that took the disk's interrupt: the
//! fewest wake-ups on an idle machine, and a long wait behind whatever keeps that processor busy on another. A data
//! sync linked behind the write runs on a worker that goes where there is room. Which is faster depends on what else
//! the machine does, and on the disk, so both are measured as they are used, for each file by itself.

use std::time::Duration;

use smallvec::SmallVec;

use super::FileId;

/// Weight of one measurement: an average over about the last eight.
const AVERAGE_SHIFT: u32 = 3;
/// One write in so many goes the other way, to see whether it has become the faster one.
const TRY_OTHER: u32 = 64;
/// The same while the other way takes more than twice as long.
const TRY_MUCH_SLOWER: u32 = 512;
/// A measurement counts as at most so many times the average: one stall of a disk says little about a way, many do. One so
/// many times better shows that the average was one of stalls, and takes its place.
const STALL: u64 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// One write with RWF_DSYNC.
    Flagged,
    /// A write and a data sync linked behind it.
    Linked,
    /// One write with RWF_DSYNC by the data thread itself, which sleeps meanwhile.
    Here,
}

/// A disk on which a write by the data thread itself takes longer is not waited for, but for one write in
/// [`TRY_MUCH_SLOWER`]: it may only have been slow for a time.
const HERE_NS: u64 = 500_000;

/// See the module text.
#[derive(Debug, Default)]
pub(super) struct Durable(Vec<OfFile>);

/// What was learned about one file.
#[derive(Clone, Debug, Default)]
struct OfFile {
    /// Average time of each way in nanoseconds; 0 before the first.
    average: [u64; 3],
    since_other: u32,
    /// Writes that went another way, to give each its turn.
    others: u32,
    /// Writes that the thread itself might have done if the disk were not too slow for that.
    too_slow: u32,
    /// The kernel or the file system does not take the flag.
    only_linked: bool,
}

impl Durable {
    /// The way for the next write to a file.
    ///
    /// `alone`: nothing else is under way and nobody else is served by this thread, so that it may wait for the disk.
    pub(super) fn choose(&mut self, file: FileId, alone: bool) -> Way {
        self.of(file).choose(alone)
    }

    /// A write to a file that went this way took so long.
    pub(super) fn learn(&mut self, file: FileId, way: Way, took: Duration) {
        self.of(file).learn(way, took);
    }

    /// The flag was refused for a file: it is not tried again there. Another file may lie on a file system that takes it.
    pub(super) fn refuse_flag(&mut self, file: FileId) {
        self.of(file).only_linked = true;
    }

    fn of(&mut self, file: FileId) -> &mut OfFile {
        let index = file.0 as usize;
        if index >= self.0.len() {
            self.0.resize(index + 1, OfFile::default());
        }
        &mut self.0[index]
    }
}

impl OfFile {
    fn choose(&mut self, alone: bool) -> Way {
        if self.only_linked {
            return Way::Linked;
        }
        let took = |way: &Way| self.average[*way as usize];
        let mut ways: SmallVec<[Way; 3]> = SmallVec::from_slice(&[Way::Flagged, Way::Linked]);
        if alone && took(&Way::Here) < HERE_NS {
            ways.push(Way::Here);
        } else if alone {
            self.too_slow += 1;
            if self.too_slow == TRY_MUCH_SLOWER {
                self.too_slow = 0;
                return Way::Here;
            }
        }
        // A way not measured yet counts as the best.
        ways.sort_by_key(took);
        let best = ways[0];
        let other = ways[1 + self.others as usize % (ways.len() - 1)];
        self.since_other += 1;
        let every = if took(&other) / took(&best).max(1) >= 2 {
            TRY_MUCH_SLOWER
        } else {
            TRY_OTHER
        };
        if self.since_other < every || took(&best) == 0 {
            return best;
        }
        self.since_other = 0;
        self.others = self.others.wrapping_add(1);
        other
    }

    fn learn(&mut self, way: Way, took: Duration) {
        let average = &mut self.average[way as usize];
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1);
        *average = match *average {
            0 => took,
            old => {
                let took = took.min(old.saturating_mul(STALL));
                if took < old / STALL {
                    took
                } else {
                    old - (old >> AVERAGE_SHIFT) + (took >> AVERAGE_SHIFT)
                }
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileId = FileId(0);
    const OTHER: FileId = FileId(3);

    fn share_of_flagged(durable: &mut Durable, flagged_us: u64, linked_us: u64) -> u32 {
        share_of(durable, FILE, flagged_us, linked_us)
    }

    fn share_of(durable: &mut Durable, file: FileId, flagged_us: u64, linked_us: u64) -> u32 {
        (0..2000)
            .filter(|_| write(durable, file, flagged_us, linked_us) == Way::Flagged)
            .count() as u32
    }

    /// One write, which takes as long as its way does.
    fn write(durable: &mut Durable, file: FileId, flagged_us: u64, linked_us: u64) -> Way {
        let way = durable.choose(file, false);
        let took_us = match way {
            Way::Flagged => flagged_us,
            Way::Linked => linked_us,
            Way::Here => unreachable!("not alone"),
        };
        durable.learn(file, way, Duration::from_micros(took_us));
        way
    }

    /// How many of so many writes the thread itself does, which take so long then and 2 ms otherwise.
    fn written_here(durable: &mut Durable, writes: usize, alone: bool, here_us: u64) -> usize {
        (0..writes)
            .filter(|_| {
                let way = durable.choose(FILE, alone);
                let took_us = if way == Way::Here { here_us } else { 2000 };
                durable.learn(FILE, way, Duration::from_micros(took_us));
                way == Way::Here
            })
            .count()
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
    fn the_thread_itself_writes_only_alone_and_to_a_fast_disk() {
        assert_eq!(written_here(&mut Durable::default(), 2000, false, 100), 0);
        assert!(written_here(&mut Durable::default(), 2000, true, 100) > 1900);
        assert!(written_here(&mut Durable::default(), 2000, true, 1000) < 10);
    }

    #[test]
    fn a_disk_that_was_slow_for_a_time_is_waited_for_again() {
        let mut durable = Durable::default();
        // The very first write of a file may be its slowest.
        assert!(written_here(&mut durable, 1000, true, 5000) < 10);
        written_here(&mut durable, 10_000, true, 100);
        assert!(written_here(&mut durable, 1000, true, 100) > 950);
        // One stall changes nothing.
        assert_eq!(written_here(&mut durable, 1, true, 50_000), 1);
        assert!(written_here(&mut durable, 1000, true, 100) > 950);
    }

    #[test]
    fn a_refused_flag_is_not_tried_again_for_that_file() {
        let mut durable = Durable::default();
        assert_eq!(durable.choose(FILE, false), Way::Flagged);
        durable.refuse_flag(FILE);
        assert_eq!(share_of_flagged(&mut durable, 1, 1000), 0);
        // Another file has another file system.
        assert_eq!(durable.choose(OTHER, false), Way::Flagged);
        assert!(share_of(&mut durable, OTHER, 100, 150) > 1900);
        assert_eq!(share_of_flagged(&mut durable, 1, 1000), 0);
    }

    #[test]
    fn what_is_fast_on_one_disk_says_nothing_about_another() {
        let mut durable = Durable::default();
        let (mut of_file, mut of_other) = (0, 0);
        for _ in 0..2000 {
            of_file += u32::from(write(&mut durable, FILE, 100, 1000) == Way::Flagged);
            of_other += u32::from(write(&mut durable, OTHER, 1000, 100) == Way::Flagged);
        }
        assert!(of_file > 1900 && of_other < 100, "{of_file} {of_other}");
    }
}
