//! What a head answers while a newer one may serve that it has not heard of: single steps that the simulator meets too
//! rarely to be relied on.

mod filling;

use super::super::wire::{LeafStates, RowVersions, Rows, Status};
use super::super::{BlockContent, BlockState};
use super::*;
use crate::records::{
    HeadClaim, Placement, Replica, ReplicaSet, ReplicaState, Revision, VolumeName,
};
use crate::store::ExtentKey;
use crate::units::{CHUNK_LEAVES, LayerId, StoreId, Version, VolumeId};
use uuid::Uuid;

/// A head and members that do what they are asked at once, as long as they can be reached. What is asked of the metadata
/// store waits for the test.
struct Bench {
    head: ReplicatedHead,
    now_us: u64,
    revision: u64,
    away: Vec<MemberId>,
    swap: Option<u64>,
    opened: Vec<MemberId>,
    /// Whose rows were asked for.
    compared: Vec<MemberId>,
    flushed: Vec<u64>,
    /// Changes to be sent again.
    redone: Vec<u64>,
    /// What members have of a leaf, where it is something.
    leaves: Vec<(MemberId, LeafStates)>,
    /// Some leaf of the first chunk may differ.
    differs: bool,
    /// Answers to copies that were written wait for the test.
    holds_copies: bool,
    held: Vec<(MemberId, Event)>,
    /// Whose index cannot be read.
    unreadable: Vec<MemberId>,
    /// Who has no room for what it has not.
    full: Vec<MemberId>,
    /// Whom copies were read from.
    read_from: Vec<MemberId>,
    /// Copies that were written: to whom, from which block on, how many, and whether as zeros.
    copied: Vec<(MemberId, u32, u32, bool)>,
    stopped: bool,
}

fn node(n: u8) -> NodeId {
    NodeId(Uuid::from_u128(u128::from(n)))
}

fn store(n: u8) -> StoreId {
    StoreId(Uuid::from_u128(100 + u128::from(n)))
}

impl Bench {
    /// A volume with these sets of replicas, some of them out; the head is on the node of the first.
    fn new(sets: &[&[u8]], out: &[u8]) -> Bench {
        Bench::with_min_in_sync(1, sets, out)
    }

    fn with_min_in_sync(min_in_sync: u32, sets: &[&[u8]], out: &[u8]) -> Bench {
        let replica = |n: &u8| {
            let mut replica = Replica::in_sync(node(*n), store(*n));
            if out.contains(n) {
                replica.state = ReplicaState::Out;
            }
            replica
        };
        let set = |of: &&[u8]| ReplicaSet {
            replicas: of.iter().map(replica).collect(),
        };
        let record = VolumeRecord {
            min_in_sync,
            epoch: Epoch(1),
            never_written: false,
            ..VolumeRecord::new(
                VolumeId(Uuid::from_u128(1)),
                VolumeName::parse("v").expect("a name"),
                4 * (64 << 20),
                LayerId(1),
                Placement {
                    stores: vec![],
                    sets: sets.iter().map(set).collect(),
                },
            )
        };
        let claim = HeadClaim {
            node: node(sets[0][0]),
            incarnation: Uuid::from_u128(5),
        };
        let params = HeadParams::new(claim.node, claim);
        let read = Versioned {
            record,
            changed_at: Revision(1),
        };
        let mut actions = Vec::new();
        let head = ReplicatedHead::new(params, read, 0, &mut actions);
        let mut bench = Bench {
            head,
            now_us: 0,
            revision: 1,
            away: Vec::new(),
            swap: None,
            opened: Vec::new(),
            compared: Vec::new(),
            flushed: Vec::new(),
            redone: Vec::new(),
            leaves: Vec::new(),
            differs: false,
            holds_copies: false,
            held: Vec::new(),
            unreadable: Vec::new(),
            full: Vec::new(),
            read_from: Vec::new(),
            copied: Vec::new(),
            stopped: false,
        };
        bench.carry_out(actions);
        bench.swapped();
        assert!(bench.head.is_serving());
        bench
    }

    fn member(&self, n: u8) -> MemberId {
        let found = self.head.members().find(|(_, at)| at.store == store(n));
        found.expect("a member").0
    }

    fn event(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.head.on_event(self.now_us, event, &mut actions);
        self.carry_out(actions);
    }

    fn tick(&mut self) {
        let mut actions = Vec::new();
        self.head.on_tick(self.now_us, &mut actions);
        self.carry_out(actions);
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            let mut row = RowVersions {
                chunk: ChunkIndex(match action {
                    Action::ReadRows { set, .. } => u32::from(set.0),
                    _ => 0,
                }),
                leaves: [Version::NONE; CHUNK_LEAVES as usize],
            };
            row.leaves[0] = Version(9);
            let rows = Rows {
                rows: self.differs.then_some(row).into_iter().collect(),
                more: false,
            };
            let done = match action {
                Action::Connect { member } => (member, Event::LinkUp { member }),
                Action::Open {
                    member, opening, ..
                } => {
                    self.opened.push(member);
                    let event = Event::Opened {
                        member,
                        opening,
                        sent_at_us: self.now_us,
                        lost_power: false,
                    };
                    (member, event)
                }
                Action::ReadRows { query, member, .. } => {
                    self.compared.push(member);
                    let result = Ok(rows);
                    (member, Event::Rows { query, result })
                }
                Action::ReadLeaf { query, member, .. } => {
                    let known = self.leaves.iter().find(|(of, _)| *of == member);
                    let states = known.map_or_else(LeafStates::holes, |(_, states)| states.clone());
                    let result = if self.unreadable.contains(&member) {
                        Err(Status::Device)
                    } else {
                        Ok(states)
                    };
                    (member, Event::Leaf { query, result })
                }
                Action::CopyRead { copy, member, .. } => {
                    self.read_from.push(member);
                    let status = Status::Ok;
                    (member, Event::CopyRead { copy, status })
                }
                Action::CopyWrite {
                    copy,
                    member,
                    first_block,
                    count,
                    zeros,
                    ..
                } => {
                    self.copied.push((member, first_block, count, zeros));
                    let status = if self.full.contains(&member) && !zeros {
                        Status::NoSpace
                    } else {
                        Status::Ok
                    };
                    let event = Event::CopyWritten {
                        copy,
                        member,
                        status,
                    };
                    if self.holds_copies {
                        self.held.push((member, event));
                        continue;
                    }
                    (member, event)
                }
                Action::Redo { tag, .. } => {
                    self.redone.push(tag);
                    continue;
                }
                Action::Flush { query, member } | Action::Whole { query, member } => {
                    let status = Status::Ok;
                    (member, Event::Done { query, status })
                }
                Action::Swap { serial, .. } => {
                    self.swap = Some(serial);
                    continue;
                }
                Action::Flushed { tag } => {
                    self.flushed.push(tag);
                    continue;
                }
                Action::Stopped(_) => {
                    self.stopped = true;
                    continue;
                }
                _ => continue,
            };
            if !self.away.contains(&done.0) {
                self.event(done.1);
            }
        }
        self.head.check_invariants();
    }

    /// The swap under way is heard to have happened.
    fn swapped(&mut self) {
        let serial = self.swap.take().expect("a swap under way");
        self.revision += 1;
        let outcome = SwapOutcome::Done(Revision(self.revision));
        self.event(Event::Swapped { serial, outcome });
    }

    /// The swap under way met this record.
    fn conflict(&mut self, record: VolumeRecord) {
        let serial = self.swap.take().expect("a swap under way");
        let outcome = SwapOutcome::Conflict;
        self.event(Event::Swapped { serial, outcome });
        self.revision += 10;
        let changed_at = Revision(self.revision);
        let record = Some(Box::new(Versioned { record, changed_at }));
        self.event(Event::Record {
            asked: true,
            record,
        });
    }

    fn lose(&mut self, n: u8) {
        let member = self.member(n);
        self.away.push(member);
        self.event(Event::LinkDown { member });
    }

    /// Begins a flush: what names it, and the nodes of those it goes to.
    fn begin_flush(&mut self, tag: u64) -> (OpKey, Vec<u8>) {
        match self.head.begin_flush(tag, self.now_us) {
            FlushAdmission::Send { op, members } => {
                let is_asked = |n: &u8| {
                    let mut asked = members.iter().map(|member| self.head.member(*member).store);
                    asked.any(|at| at == store(*n))
                };
                (op, (1..=9).filter(is_asked).collect())
            }
            other => panic!("a flush was answered without asking anybody: {other:?}"),
        }
    }

    fn answer_flush(&mut self, op: OpKey, n: u8, status: Status) -> Outcome {
        let mut actions = Vec::new();
        let member = self.member(n);
        let outcome = self
            .head
            .flush_answered(op, member, status, self.now_us, &mut actions);
        self.carry_out(actions);
        outcome
    }

    /// One that is answered.
    fn flush(&mut self, tag: u64) -> Vec<u8> {
        let (op, asked) = self.begin_flush(tag);
        for (n, left) in asked.iter().zip((0..asked.len()).rev()) {
            let expected = if left == 0 {
                Outcome::Acknowledge(tag)
            } else {
                Outcome::Pending
            };
            assert_eq!(self.answer_flush(op, *n, Status::Ok), expected);
        }
        asked
    }

    /// A change of a block of a set, taken by everybody.
    fn write(&mut self, set: u16) {
        let (op, targets) = self.begin_write(set);
        self.answer_write(op, targets);
    }

    fn begin_write(&mut self, set: u16) -> (OpKey, ReplicaMask) {
        let chunk = ChunkIndex(u32::from(set));
        let extent = ExtentKey {
            layer: LayerId(1),
            chunk,
        };
        let version = self.head.admission.next_version().expect("a version");
        let admission =
            self.head
                .admit_write(SetIndex(set), extent, 0, 1, 77, version, self.now_us);
        let WriteAdmission::Send { op, targets, .. } = admission else {
            panic!("not sent: {admission:?}");
        };
        (op, targets)
    }

    fn answer_write(&mut self, op: OpKey, targets: ReplicaMask) {
        for place in targets.places() {
            let mut actions = Vec::new();
            self.head
                .answered(op, place as u8, Status::Ok, self.now_us, &mut actions);
            self.carry_out(actions);
        }
    }

    fn read(&mut self, set: u16) -> ReadAdmission {
        self.head
            .admit_read(SetIndex(set), ReplicaMask(0), self.now_us)
    }
}

#[test]
fn a_flush_asks_all_of_one_set_though_nothing_was_written() {
    let mut bench = Bench::new(&[&[1, 2], &[3, 4]], &[]);
    // What the head before wrote may be durable nowhere.
    assert_eq!(bench.flush(1), [1, 2, 3, 4]);
    // Nothing is to be made durable; that nobody else serves is to be shown.
    assert_eq!(bench.flush(2), [1, 2]);
    // Those that a change went to are a whole set already.
    bench.write(1);
    assert_eq!(bench.flush(3), [3, 4]);
    assert_eq!(bench.flush(4), [1, 2]);
}

#[test]
fn a_flush_through_an_old_head_is_not_answered() {
    let mut bench = Bench::new(&[&[1, 2, 3]], &[]);
    bench.flush(1);
    // A newer head sealed only the second: the word of it has not come here, and the others answer.
    let (op, asked) = bench.begin_flush(2);
    assert_eq!(asked, [1, 2, 3]);
    assert_eq!(bench.answer_flush(op, 1, Status::Ok), Outcome::Pending);
    assert_eq!(bench.answer_flush(op, 3, Status::Ok), Outcome::Pending);
    assert_eq!(bench.answer_flush(op, 2, Status::Fenced), Outcome::Pending);
    assert!(bench.flushed.is_empty());
    // What would drop it meets the newer claim.
    let mut record = bench.head.record().clone();
    record.epoch = Epoch(record.epoch.0 + 1);
    record.head = Some(HeadClaim {
        node: node(2),
        incarnation: Uuid::from_u128(6),
    });
    bench.conflict(record);
    assert!(bench.stopped);
    assert!(bench.flushed.is_empty());
}

#[test]
fn a_flush_begun_after_a_slow_swap_had_happened_waits_for_another() {
    let mut bench = Bench::new(&[&[1, 2, 3]], &[]);
    bench.flush(1);
    bench.lose(3);
    // The record says that the third is out, which the head has not heard; a newer head may have claimed since.
    let (op, asked) = bench.begin_flush(2);
    assert_eq!(asked, [1, 2], "those it may have begun with");
    assert_eq!(bench.answer_flush(op, 1, Status::Ok), Outcome::Pending);
    bench.lose(2);
    bench.swapped();
    assert!(
        bench.flushed.is_empty(),
        "the second is yet to be recorded as out"
    );
    bench.swapped();
    assert_eq!(bench.flushed, [2]);
}

#[test]
fn nothing_is_read_while_one_that_may_be_in_sync_is_silent() {
    let mut bench = Bench::new(&[&[1, 2]], &[2]);
    assert!(matches!(bench.read(0), ReadAdmission::From { .. }));
    // Filled at once, for there is nothing; the swap that has it in sync is under way.
    assert!(bench.swap.is_some() && bench.opened.len() == 2);
    assert!(matches!(bench.read(0), ReadAdmission::From { .. }));
    // It may have happened, and a newer head may have begun with the second alone.
    bench.lose(2);
    assert_eq!(bench.read(0), ReadAdmission::Wait);
    let (op, _) = bench.begin_flush(1);
    assert_eq!(bench.answer_flush(op, 1, Status::Ok), Outcome::Pending);
    bench.swapped();
    assert_eq!(
        bench.read(0),
        ReadAdmission::Wait,
        "in sync, and yet to be recorded as out"
    );
    bench.swapped();
    assert!(matches!(bench.read(0), ReadAdmission::From { .. }));
    assert_eq!(bench.flushed, [1]);
}

/// The reconcile may have written the same block meanwhile, with a version of the new epoch: a store would drop the older one.
#[test]
fn what_waited_for_its_head_to_serve_again_is_written_with_a_new_version() {
    let mut bench = Bench::new(&[&[1, 2]], &[]);
    let epoch = bench.head.record().epoch;
    bench.lose(2);
    bench.swapped();
    bench.lose(1);
    assert!(!bench.head.is_serving());
    let begun = bench.head.admission.next_version().expect("a version");
    let extent = ExtentKey {
        layer: LayerId(1),
        chunk: ChunkIndex(0),
    };
    let admit = |bench: &mut Bench| {
        bench
            .head
            .admit_write(SetIndex(0), extent, 0, 1, 77, begun, bench.now_us)
    };
    assert_eq!(admit(&mut bench), WriteAdmission::Wait);
    bench.away.clear();
    bench.swapped();
    let member = bench.member(1);
    bench.event(Event::LinkUp { member });
    bench.now_us += 60_000_000;
    bench.tick();
    assert!(bench.head.is_serving());
    let WriteAdmission::Send { version, .. } = admit(&mut bench) else {
        panic!("not sent");
    };
    assert!(bench.head.record().epoch > epoch);
    assert_eq!(version.epoch(), bench.head.record().epoch, "{begun:?}");
}

#[test]
fn what_was_forgotten_and_added_again_is_filled_before_it_is_in_sync() {
    let mut bench = Bench::new(&[&[1, 2, 3]], &[3]);
    let third = bench.member(3);
    let times = |bench: &Bench| bench.compared.iter().filter(|m| **m == third).count();
    assert_eq!(times(&bench), 1);
    assert!(bench.swap.is_some(), "filled, and being added");
    let (op, targets) = bench.begin_write(0);
    assert_eq!(targets, ReplicaMask(0b111));
    bench.lose(2);
    // While the answer of the swap is on its way, others forget the replica, its store gives its blocks back, and it is
    // added again.
    let mut record = bench.head.record().clone();
    for replica in &mut record.placement.sets[0].replicas {
        if replica.store == store(3) {
            *replica = Replica::joining(node(3), store(3), Revision(7));
        }
    }
    bench.conflict(record);
    // Now the second is recorded as out. The third has yet to be compared, behind the change that is under way.
    bench.swapped();
    assert_eq!((bench.swap, times(&bench)), (None, 1));
    bench.answer_write(op, targets);
    bench.tick();
    assert_eq!(times(&bench), 2);
    assert!(bench.swap.is_some(), "filled anew, and being added");
}

#[test]
fn what_is_held_for_a_replica_that_gave_back_its_blocks_is_sent_to_it_again() {
    let mut bench = Bench::with_min_in_sync(2, &[&[1, 2, 3]], &[3]);
    assert!(bench.swap.is_some(), "filled, and being added");
    let (op, targets) = bench.begin_write(0);
    assert_eq!(targets, ReplicaMask(0b111));
    bench.lose(2);
    bench.answer_write(op, ReplicaMask(0b101));
    // Held for the third, which has it and is about to be in sync. But others forget it, and add it again.
    let mut record = bench.head.record().clone();
    for replica in &mut record.placement.sets[0].replicas {
        if replica.store == store(3) {
            *replica = Replica::joining(node(3), store(3), Revision(7));
        }
    }
    bench.conflict(record);
    bench.swapped();
    bench.tick();
    assert_eq!(bench.redone, [77]);
}
