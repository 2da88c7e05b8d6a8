use super::*;
use proptest::prelude::*;
use uuid::Uuid;

const BLOCKS: u64 = 4096;

fn head() -> Head {
    Head::new(HeadSpec {
        volume: VolumeId(Uuid::nil()),
        size_bytes: BLOCKS * BLOCK_BYTES as u64,
        live_layer: LayerId(1),
        epoch: Epoch(7),
        read_only: false,
        stores: 2,
    })
}

fn range(first: u64, end: u64) -> BlockRange {
    BlockRange::new(first, end).unwrap()
}

fn now(began: Result<Began, Refusal>) -> Started {
    match began {
        Ok(Began::Now(started)) => started,
        other => panic!("expected to start at once: {other:?}"),
    }
}

fn finish(head: &mut Head, ticket: Ticket) -> Vec<Started> {
    let mut started = SmallVec::new();
    head.finish(ticket, &mut started);
    head.check_invariants();
    started.into_vec()
}

#[test]
fn a_write_waits_for_reads_and_holds_back_later_reads() {
    let mut head = head();
    let first = now(head.begin(Access::Shared, range(0, 4), 1));
    let second = now(head.begin(Access::Shared, range(2, 6), 2));
    assert!(matches!(
        head.begin(Access::Exclusive, range(3, 5), 3),
        Ok(Began::Waiting(_))
    ));
    // A stream of reads must not starve the write.
    assert!(matches!(
        head.begin(Access::Shared, range(4, 5), 4),
        Ok(Began::Waiting(_))
    ));
    let beside = now(head.begin(Access::Shared, range(0, 3), 5));
    assert_eq!(head.in_flight(), (5, 2));
    assert!(finish(&mut head, first.ticket).is_empty());
    let write = finish(&mut head, second.ticket);
    assert_eq!(write.len(), 1);
    assert_eq!(
        (write[0].tag, write[0].version),
        (3, Version::new(Epoch(7), 1))
    );
    let read = finish(&mut head, write[0].ticket);
    assert_eq!((read[0].tag, read[0].version), (4, Version::NONE));
    finish(&mut head, beside.ticket);
    finish(&mut head, read[0].ticket);
    assert!(head.is_idle());
}

#[test]
fn versions_rise_in_the_order_of_starting() {
    let mut head = head();
    let first = now(head.begin(Access::Exclusive, range(0, 1), 1));
    assert!(matches!(
        head.begin(Access::Exclusive, range(0, 1), 2),
        Ok(Began::Waiting(_))
    ));
    let other = now(head.begin(Access::Exclusive, range(9, 10), 3));
    let later = finish(&mut head, first.ticket);
    assert!(first.version < other.version && other.version < later[0].version);
}

#[test]
fn a_given_up_request_lets_those_behind_it_pass() {
    let mut head = head();
    let read = now(head.begin(Access::Shared, range(0, 1), 1));
    let Ok(Began::Waiting(write)) = head.begin(Access::Exclusive, range(0, 1), 2) else {
        panic!("the write must wait");
    };
    assert!(matches!(
        head.begin(Access::Shared, range(0, 1), 3),
        Ok(Began::Waiting(_))
    ));
    let started = finish(&mut head, write);
    assert_eq!(started.iter().map(|s| s.tag).collect::<Vec<_>>(), [3]);
    finish(&mut head, read.ticket);
}

#[test]
#[should_panic(expected = "exactly once")]
fn a_second_finish_is_caught() {
    let mut head = head();
    let read = now(head.begin(Access::Shared, range(0, 1), 1));
    finish(&mut head, read.ticket);
    now(head.begin(Access::Shared, range(0, 1), 2));
    finish(&mut head, read.ticket);
}

#[test]
fn an_exhausted_epoch_refuses_changes_until_it_is_renewed() {
    let mut head = head();
    head.set_counter(Version::COUNTER_MAX - 2);
    let first = now(head.begin(Access::Exclusive, range(0, 1), 1));
    assert!(matches!(
        head.begin(Access::Exclusive, range(0, 1), 2),
        Ok(Began::Waiting(_))
    ));
    // The waiting one has the last version.
    assert_eq!(
        head.begin(Access::Exclusive, range(5, 6), 3),
        Err(Refusal::VersionsExhausted)
    );
    now(head.begin(Access::Shared, range(5, 6), 4));
    let last = finish(&mut head, first.ticket);
    assert_eq!(
        last[0].version,
        Version::new(Epoch(7), Version::COUNTER_MAX)
    );
    head.renew_epoch(Epoch(8));
    let renewed = now(head.begin(Access::Exclusive, range(8, 9), 5));
    assert!(renewed.version > last[0].version);
}

#[test]
fn a_new_epoch_is_asked_for_once_while_versions_are_left() {
    let mut head = head();
    let write = |head: &mut Head| {
        let started = now(head.begin(Access::Exclusive, range(0, 1), 1));
        finish(head, started.ticket);
        started.version
    };
    head.set_counter(Version::COUNTER_MAX - EPOCH_RESERVE - 2);
    write(&mut head);
    assert!(!head.asks_for_epoch());
    let before = write(&mut head);
    assert!(head.asks_for_epoch());
    assert!(!head.asks_for_epoch(), "once");
    head.renew_epoch(Epoch(9));
    assert!(write(&mut head) > before && !head.asks_for_epoch());
    head.set_counter(Version::COUNTER_MAX);
    assert!(head.asks_for_epoch(), "and again for the next");
}

#[test]
fn read_only_draining_and_bounds_refuse() {
    let mut head = head();
    assert_eq!(
        head.begin(Access::Shared, range(BLOCKS, BLOCKS + 1), 1),
        Err(Refusal::PastEnd)
    );
    assert_eq!(
        head.grow(BLOCKS * 4096 - 4096, 2),
        Err(ResizeRefusal::Shrink {
            from_bytes: BLOCKS * 4096,
            to_bytes: BLOCKS * 4096 - 4096
        })
    );
    assert_eq!(
        head.grow(BLOCKS * 4096 + 1, 2),
        Err(ResizeRefusal::NotBlocks(BLOCKS * 4096 + 1))
    );
    head.grow((BLOCKS + 1) * 4096, 3).unwrap();
    let read = now(head.begin(Access::Shared, range(BLOCKS, BLOCKS + 1), 1));
    head.set_read_only(true);
    assert_eq!(
        head.begin(Access::Exclusive, range(0, 1), 2),
        Err(Refusal::ReadOnly)
    );
    head.drain();
    assert_eq!(
        head.begin(Access::Shared, range(0, 1), 3),
        Err(Refusal::Draining)
    );
    assert!(!head.is_idle());
    finish(&mut head, read.ticket);
    assert!(head.is_idle());
}

#[test]
fn a_flush_asks_only_stores_with_something_new() {
    let mut head = head();
    let all = head.flush();
    assert_eq!(
        all.stores().collect::<Vec<_>>(),
        [StoreSlot(0), StoreSlot(1)],
        "after opening, everything may be in a cache"
    );
    head.flushed(&all);
    assert_eq!(head.flush().stores().count(), 0);
    head.taken(StoreSlot(1));
    let plan = head.flush();
    assert_eq!(plan.stores().collect::<Vec<_>>(), [StoreSlot(1)]);
    // Taken after the flush began: not covered by it.
    head.taken(StoreSlot(1));
    head.flushed(&plan);
    assert_eq!(head.flush().stores().collect::<Vec<_>>(), [StoreSlot(1)]);
    // A failed sync is dropped, and asked for again.
    drop(head.flush());
    assert_eq!(head.flush().stores().count(), 1);
    head.check_invariants();
}

#[derive(Clone, Debug)]
enum Step {
    Begin(Access, u64, u64),
    /// Finish the n-th in flight, started or waiting.
    Finish(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let access = prop_oneof![Just(Access::Shared), Just(Access::Exclusive)];
    // Narrow ranges that collide, and wide ones that pass the filter's bound.
    let bounds = prop_oneof![
        6 => (0..40u64, 1..6u64),
        1 => (0..2000u64, 1..2000u64),
    ];
    prop_oneof![
        3 => (access, bounds).prop_map(|(access, (first, len))| Step::Begin(access, first, len)),
        2 => (0..64usize).prop_map(Step::Finish),
    ]
}

/// What the lock must do, said the slow way: an ordered list; a request runs when nothing before it conflicts.
#[derive(Default)]
struct Model {
    entries: Vec<(u64, Access, BlockRange, bool, Ticket)>,
}

impl Model {
    fn conflicts(a: (Access, BlockRange), b: (Access, BlockRange)) -> bool {
        let overlap = a.1.first() < b.1.end() && b.1.first() < a.1.end();
        overlap && (a.0 == Access::Exclusive || b.0 == Access::Exclusive)
    }

    fn free_to_run(&self, index: usize) -> bool {
        let (_, access, range, ..) = self.entries[index];
        self.entries[..index]
            .iter()
            .all(|&(_, other, other_range, ..)| {
                !Model::conflicts((access, range), (other, other_range))
            })
    }

    fn newly_running(&mut self) -> Vec<u64> {
        let mut tags = Vec::new();
        for index in 0..self.entries.len() {
            if !self.entries[index].3 && self.free_to_run(index) {
                self.entries[index].3 = true;
                tags.push(self.entries[index].0);
            }
        }
        tags
    }
}

proptest! {
    #[test]
    fn the_lock_does_what_the_naive_list_does(steps in prop::collection::vec(step(), 1..300)) {
        let mut head = head();
        let mut model = Model::default();
        let mut last_version = Version::NONE;
        for (index, step) in steps.into_iter().enumerate() {
            let tag = index as u64 + 1;
            match step {
                Step::Begin(access, first, len) => {
                    let range = range(first, first + len);
                    let (ticket, runs) = match head.begin(access, range, tag).unwrap() {
                        Began::Now(started) => {
                            if access == Access::Exclusive {
                                prop_assert!(started.version > last_version);
                                last_version = started.version;
                            }
                            (started.ticket, true)
                        }
                        Began::Waiting(ticket) => (ticket, false),
                    };
                    model.entries.push((tag, access, range, false, ticket));
                    let expected = model.newly_running();
                    prop_assert_eq!(expected.contains(&tag), runs);
                }
                Step::Finish(nth) => {
                    if model.entries.is_empty() {
                        continue;
                    }
                    let nth = nth % model.entries.len();
                    let gone = model.entries.remove(nth);
                    let mut started = SmallVec::new();
                    head.finish(gone.4, &mut started);
                    let tags: Vec<u64> = started.iter().map(|s| s.tag).collect();
                    prop_assert_eq!(tags, model.newly_running());
                    for request in started {
                        if request.version != Version::NONE {
                            prop_assert!(request.version > last_version);
                            last_version = request.version;
                        }
                    }
                }
            }
            head.check_invariants();
        }
        // Nothing starves: finishing what runs, oldest first, ends everything.
        while let Some(position) = model.entries.iter().position(|entry| entry.3) {
            let gone = model.entries.remove(position);
            let mut started = SmallVec::new();
            head.finish(gone.4, &mut started);
            model.newly_running();
        }
        prop_assert!(head.is_idle() && model.entries.is_empty());
    }
}
