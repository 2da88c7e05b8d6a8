//! Was there one order of all reads and writes of a block that everybody could have seen?
//!
//! A history is what clients saw of one block: when each operation was sent and when its answer came, in ticks of one
//! clock. It is sound when some order of the operations respects real time and gives every read the value of the write
//! before it (linearizability of a register). That one property says all that the product promises here: an answered
//! write is never lost, a write that was not answered is decided once, a value once read never goes back.
//!
//! Two checks, both exact:
//! * blocks with several writers at a time, every version written once: Gibbons and Korach, "Testing shared memories"
//!   (SIAM J. Comput. 26, 1997), theorem 4.2 on zones;
//! * blocks with one write at a time, where a version may come again (zeros): the lowest position in the sequence of
//!   writes that each read can have.

use std::collections::HashMap;

/// A moment, counted by one clock over all clients.
pub type Tick = u64;

/// The version of a block of zeros.
pub const ZEROS: u64 = 0;

/// A write of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    pub version: u64,
    /// Before the request was sent.
    pub start: Tick,
    /// After the answer came; for a write that was not answered, after its server was gone.
    pub finish: Tick,
    pub answered: bool,
}

/// A read of one block that was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    pub version: u64,
    pub start: Tick,
    pub finish: Tick,
}

/// All that happened to one block since it was last known for certain.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// What it was at tick 0.
    pub initial: u64,
    pub writes: Vec<Write>,
    pub reads: Vec<Read>,
}

/// All operations that saw or made one version.
struct Cluster {
    version: u64,
    write_start: Tick,
    min_finish: Tick,
    max_start: Tick,
    /// An unanswered write that nobody read may never have happened.
    certain: bool,
}

impl History {
    /// Checks a block whose versions are all different.
    pub fn check_unique(&self) -> Result<(), String> {
        let mut clusters = vec![Cluster {
            version: self.initial,
            write_start: 0,
            min_finish: 0,
            max_start: 0,
            certain: true,
        }];
        let mut index = HashMap::from([(self.initial, 0)]);
        for write in &self.writes {
            if index.insert(write.version, clusters.len()).is_some() {
                return Err(format!("the test wrote version {} twice", write.version));
            }
            clusters.push(Cluster {
                version: write.version,
                write_start: write.start,
                min_finish: write.finish,
                max_start: write.start,
                certain: write.answered,
            });
        }
        for read in &self.reads {
            let Some(at) = index.get(&read.version) else {
                return Err(self.explain(&format!(
                    "read {} is of a version that is gone or never was",
                    read.version
                )));
            };
            let cluster = &mut clusters[*at];
            if read.finish < cluster.write_start {
                return Err(self.explain(&format!(
                    "version {} was read before it was written",
                    read.version
                )));
            }
            cluster.certain = true;
            cluster.min_finish = cluster.min_finish.min(read.finish);
            cluster.max_start = cluster.max_start.max(read.start);
        }
        // A forward zone is a time in which the block certainly had this version. No two may overlap, and a version that
        // lived at one moment only cannot have lived inside another's.
        let (mut forward, backward): (Vec<Cluster>, Vec<Cluster>) = clusters
            .into_iter()
            .filter(|c| c.certain)
            .partition(|c| c.min_finish < c.max_start);
        forward.sort_by_key(|cluster| cluster.min_finish);
        for pair in forward.windows(2) {
            if pair[1].min_finish < pair[0].max_start {
                let (one, other) = (pair[0].version, pair[1].version);
                return Err(self.explain(&format!(
                    "versions {one} and {other} come and go, or one of them was lost"
                )));
            }
        }
        for inner in &backward {
            let after = forward.partition_point(|outer| outer.min_finish < inner.max_start);
            if let Some(outer) = after.checked_sub(1).map(|at| &forward[at])
                && inner.min_finish < outer.max_start
            {
                return Err(self.explain(&format!(
                    "version {} was lost under version {}",
                    inner.version, outer.version
                )));
            }
        }
        Ok(())
    }

    /// Checks a block whose writes did not overlap each other.
    pub fn check_sequential(&self) -> Result<(), String> {
        let mut writes = self.writes.clone();
        writes.sort_by_key(|write| write.start);
        writes.insert(
            0,
            Write {
                version: self.initial,
                start: 0,
                finish: 0,
                answered: true,
            },
        );
        if let Some(pair) = writes
            .windows(2)
            .find(|pair| pair[1].start < pair[0].finish)
        {
            return Err(format!("the test let two writes overlap: {pair:?}"));
        }
        let mut reads = self.reads.clone();
        reads.sort_by_key(|read| read.start);
        // (finish of a read, position it showed): later reads may not be before it.
        let mut shown: Vec<(Tick, usize)> = Vec::with_capacity(reads.len());
        for read in &reads {
            let done = writes
                .iter()
                .rposition(|write| write.answered && write.finish < read.start)
                .unwrap_or(0);
            let seen = shown
                .iter()
                .filter(|(finish, _)| *finish < read.start)
                .map(|(_, at)| *at)
                .max()
                .unwrap_or(0);
            let lowest = done.max(seen);
            let highest = writes
                .iter()
                .rposition(|write| write.start < read.finish)
                .unwrap_or(0);
            let Some(at) = (lowest..=highest).find(|at| writes[*at].version == read.version) else {
                let allowed: Vec<u64> = writes[lowest.min(highest)..=highest]
                    .iter()
                    .map(|write| write.version)
                    .collect();
                let what = format!(
                    "read at {}..{} gave {}, allowed {allowed:?}",
                    read.start, read.finish, read.version
                );
                return Err(self.explain(&what));
            };
            shown.push((read.finish, at));
        }
        Ok(())
    }

    fn explain(&self, what: &str) -> String {
        let mut lines: Vec<(Tick, String)> = Vec::new();
        for write in &self.writes {
            let end = if write.answered {
                format!("answered at {}", write.finish)
            } else {
                "not answered".to_owned()
            };
            lines.push((
                write.start,
                format!("{:>8} write {} {end}", write.start, write.version),
            ));
        }
        for read in &self.reads {
            let line = format!(
                "{:>8} read  {} answered at {}",
                read.start, read.version, read.finish
            );
            lines.push((read.start, line));
        }
        lines.sort();
        let skipped = lines.len().saturating_sub(40);
        let text: Vec<String> = lines
            .into_iter()
            .skip(skipped)
            .map(|(_, line)| line)
            .collect();
        format!(
            "{what}\n  it was {} at the start; {skipped} earlier events\n  {}",
            self.initial,
            text.join("\n  ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::Rng;

    fn write(version: u64, start: Tick, finish: Tick) -> Write {
        Write {
            version,
            start,
            finish,
            answered: true,
        }
    }

    fn doubt(version: u64, start: Tick, crash: Tick) -> Write {
        Write {
            version,
            start,
            finish: crash,
            answered: false,
        }
    }

    fn read(version: u64, start: Tick, finish: Tick) -> Read {
        Read {
            version,
            start,
            finish,
        }
    }

    fn both(writes: &[Write], reads: &[Read]) -> [bool; 2] {
        let history = History {
            initial: 0,
            writes: writes.to_vec(),
            reads: reads.to_vec(),
        };
        [
            history.check_unique().is_ok(),
            history.check_sequential().is_ok(),
        ]
    }

    #[test]
    fn a_lost_write_is_found() {
        assert_eq!(both(&[write(1, 1, 2)], &[read(1, 3, 4)]), [true; 2]);
        assert_eq!(both(&[write(1, 1, 2)], &[read(0, 3, 4)]), [false; 2]);
        assert_eq!(
            both(&[write(1, 1, 2), write(2, 3, 4)], &[read(1, 5, 6)]),
            [false; 2]
        );
        // Nothing reads version 2, and yet it must not be lost.
        assert_eq!(
            both(
                &[write(1, 1, 2), write(2, 3, 4)],
                &[read(1, 3, 4), read(1, 7, 8)]
            ),
            [false; 2]
        );
    }

    #[test]
    fn a_write_in_doubt_is_decided_once() {
        let writes = [write(1, 1, 2), doubt(2, 3, 10)];
        assert_eq!(
            both(&writes, &[read(1, 11, 12), read(1, 13, 14)]),
            [true; 2]
        );
        assert_eq!(
            both(&writes, &[read(2, 11, 12), read(2, 13, 14)]),
            [true; 2]
        );
        assert_eq!(
            both(&writes, &[read(2, 4, 5), read(1, 11, 12)]),
            [false; 2],
            "seen, then gone"
        );
        assert_eq!(
            both(&writes, &[read(2, 11, 12), read(1, 13, 14)]),
            [false; 2],
            "there, then gone"
        );
        let history = History {
            initial: 0,
            writes: writes.to_vec(),
            reads: vec![read(1, 11, 12), read(2, 13, 14)],
        };
        assert!(history.check_unique().is_err(), "gone, then there");
    }

    #[test]
    fn a_read_never_goes_back() {
        let slow = [write(1, 1, 100)];
        assert_eq!(
            both(&slow, &[read(0, 2, 3), read(1, 4, 5), read(1, 6, 7)]),
            [true; 2]
        );
        assert_eq!(both(&slow, &[read(1, 2, 3), read(0, 4, 5)]), [false; 2]);
        // Reads that overlap each other may come in either order.
        assert_eq!(both(&slow, &[read(1, 2, 8), read(0, 4, 9)]), [true; 2]);
        assert_eq!(
            both(&[write(1, 10, 20)], &[read(1, 2, 3)]),
            [false; 2],
            "read before it was written"
        );
    }

    #[test]
    fn concurrent_writers_may_win_in_either_order() {
        let writes = vec![write(1, 1, 10), write(2, 2, 9)];
        for last in [1, 2] {
            let history = History {
                initial: 0,
                writes: writes.clone(),
                reads: vec![read(last, 11, 12)],
            };
            assert_eq!(history.check_unique(), Ok(()));
        }
        let reads = vec![read(1, 11, 12), read(2, 13, 14)];
        assert!(
            History {
                initial: 0,
                writes,
                reads
            }
            .check_unique()
            .is_err()
        );
    }

    #[test]
    fn zeros_may_come_again() {
        let writes = [
            write(1, 1, 2),
            write(ZEROS, 3, 4),
            write(2, 5, 6),
            write(ZEROS, 7, 8),
        ];
        let sound = |reads: &[Read]| {
            History {
                initial: 0,
                writes: writes.to_vec(),
                reads: reads.to_vec(),
            }
            .check_sequential()
            .is_ok()
        };
        assert!(sound(&[
            read(ZEROS, 4, 5),
            read(2, 6, 7),
            read(ZEROS, 9, 10)
        ]));
        assert!(!sound(&[read(2, 9, 10)]));
        // Between 4 and 7 only zeros, version 2, or zeros again; not back from 2 to the first zeros.
        assert!(!sound(&[read(2, 5, 6), read(1, 7, 8)]));
    }

    /// The checks against every order of a small history, tried one by one.
    #[test]
    fn both_checks_agree_with_brute_force() {
        let mut rng = Rng::new(20);
        let (mut sound, mut unsound) = (0, 0);
        for _ in 0..4000 {
            let mut clock = 0;
            let mut history = History::default();
            let mut points: Vec<Tick> = (1..=12).collect();
            // Overlapping operations out of random ticks.
            for at in (1..points.len()).rev() {
                points.swap(at, rng.below(at as u64 + 1) as usize);
            }
            let count = 1 + rng.below(5);
            for number in 0..count {
                let (a, b) = (points[clock], points[clock + 1]);
                clock += 2;
                let (start, finish) = (a.min(b), a.max(b));
                if rng.chance(50) {
                    history.writes.push(write(number + 1, start, finish));
                } else {
                    history
                        .reads
                        .push(read(rng.below(count + 1), start, finish));
                }
            }
            let truth = linearizable(&history);
            assert_eq!(history.check_unique().is_ok(), truth, "{history:?}");
            let mut writes = history.writes.clone();
            writes.sort_by_key(|write| write.start);
            if writes.windows(2).all(|pair| pair[0].finish < pair[1].start) {
                assert_eq!(history.check_sequential().is_ok(), truth, "{history:?}");
            }
            if truth { sound += 1 } else { unsound += 1 }
        }
        assert!(
            sound > 300 && unsound > 300,
            "{sound} sound, {unsound} not: the draw is one-sided"
        );
    }

    fn linearizable(history: &History) -> bool {
        // (start, finish, version, is it a write)
        let mut operations: Vec<(Tick, Tick, u64, bool)> = history
            .writes
            .iter()
            .map(|w| (w.start, w.finish, w.version, true))
            .collect();
        operations.extend(
            history
                .reads
                .iter()
                .map(|r| (r.start, r.finish, r.version, false)),
        );
        fn search(left: &[(Tick, Tick, u64, bool)], value: u64) -> bool {
            left.is_empty()
                || (0..left.len()).any(|at| {
                    let (start, _, version, is_write) = left[at];
                    let first = left
                        .iter()
                        .all(|other| other.1 > start || *other == left[at]);
                    let fits = is_write || version == value;
                    let mut rest = left.to_vec();
                    rest.remove(at);
                    first && fits && search(&rest, if is_write { version } else { value })
                })
        }
        search(&operations, history.initial)
    }
}
