//! Filling copies and repairing them.

use super::super::leaf::WINDOW_BLOCKS;
use super::super::resync::CLIENTS_US;
use super::*;

/// Of a leaf: two blocks with data, the others never written; or all of it lost.
fn leaf(is_lost: bool) -> LeafStates {
    let mut states = LeafStates::holes();
    for (block, state) in states.0.iter_mut().enumerate() {
        if is_lost {
            state.content = BlockContent::Lost;
        } else if block == 1 || block == 30 {
            *state = BlockState {
                version: Version(5),
                content: BlockContent::Data,
            };
        }
    }
    states
}

/// Three copies, of which the third has lost a leaf.
fn with_a_lost_leaf() -> Bench {
    let mut bench = Bench::new(&[&[1, 2, 3]], &[]);
    for n in 1..=3 {
        let member = bench.member(n);
        bench.leaves.push((member, leaf(n == 3)));
    }
    bench
}

fn repair(bench: &mut Bench, bad: Option<MemberId>, first_block: u32, count: u32) {
    let extent = ExtentKey {
        layer: LayerId(1),
        chunk: ChunkIndex(0),
    };
    let mut actions = Vec::new();
    let head = &mut bench.head;
    head.repair(bad, extent, first_block, count, &mut actions);
    bench.carry_out(actions);
}

#[test]
fn a_repair_writes_bytes_only_where_the_good_copies_have_some() {
    let mut bench = with_a_lost_leaf();
    let third = bench.member(3);
    for bad in [None, Some(third)] {
        bench.copied.clear();
        repair(&mut bench, bad, 0, 3);
        let of_third = bench.copied.iter().filter(|(member, ..)| *member == third);
        let of_third = of_third.map(|(_, first, count, zeros)| (*first, *count, *zeros));
        assert_eq!(
            of_third.collect::<Vec<_>>(),
            [(0, 1, true), (1, 1, false), (2, 1, true)]
        );
        assert_eq!(bench.copied.len(), 9, "to all: {:?}", bench.copied);
    }
    assert_eq!(bench.head.jobs_of(leaf::JobFor::Repair), 0);
}

#[test]
fn a_repair_that_some_have_no_room_for_puts_nobody_out() {
    for full in [&[1, 2][..], &[2], &[3], &[1, 2, 3]] {
        let mut bench = with_a_lost_leaf();
        bench.full = full.iter().map(|n| bench.member(*n)).collect();
        repair(&mut bench, None, 0, 3);
        bench.tick();
        assert_eq!(bench.swap, None, "nobody is to be recorded as out");
        assert_eq!(bench.head.set(SetIndex(0)).usable(), 0b111);
        assert_eq!(bench.head.jobs_of(leaf::JobFor::Repair), 0, "given up");
        // The range is free again.
        bench.write(0);
    }
}

#[test]
fn many_repairs_take_turns() {
    let mut bench = with_a_lost_leaf();
    let third = bench.member(3);
    bench.away.push(third);
    for first_block in 0..40 {
        repair(&mut bench, Some(third), first_block, 1);
    }
    // It does not answer, and then it is lost: the others go on.
    bench.away.clear();
    bench.lose(3);
    bench.swapped();
    let of_first = |(member, ..): &&(MemberId, u32, u32, bool)| *member == bench.member(1);
    assert_eq!(bench.copied.iter().filter(of_first).count(), 2);
    assert_eq!(bench.head.jobs_of(leaf::JobFor::Repair), 0);
}

#[test]
fn a_repair_goes_on_without_a_replica_whose_index_cannot_be_read() {
    let mut bench = with_a_lost_leaf();
    bench.unreadable = vec![bench.member(1)];
    repair(&mut bench, None, 0, 3);
    bench.tick();
    assert_eq!((bench.swap, bench.copied.len()), (None, 9));
    bench.copied.clear();
    bench.unreadable.push(bench.member(2));
    repair(&mut bench, None, 0, 3);
    assert_eq!(bench.copied, [], "nobody has it");
    assert_eq!(bench.head.jobs_of(leaf::JobFor::Repair), 0);
}

/// Three replicas, of which the third is being filled and has a newer block that counts for nothing: all are sent what the
/// others have, as a new write, and have yet to answer.
fn filling_over_a_newer_block() -> Bench {
    let mut bench = Bench::new(&[&[1, 2, 3]], &[3]);
    for n in 1..=3 {
        let member = bench.member(n);
        let mut states = leaf(false);
        if n == 3 {
            states.0[1].version = Version(9);
        }
        bench.leaves.push((member, states));
    }
    (bench.differs, bench.holds_copies) = (true, true);
    let mut record = bench.head.record().clone();
    for replica in &mut record.placement.sets[0].replicas {
        if replica.store == store(3) {
            *replica = Replica::joining(node(3), store(3), Revision(7));
        }
    }
    bench.conflict(record);
    bench.tick();
    let asked: Vec<MemberId> = bench.held.iter().map(|(member, _)| *member).collect();
    assert_eq!(asked, [1, 2, 3].map(|n| bench.member(n)));
    bench
}

#[test]
fn a_fill_that_somebody_has_no_room_for_ends_without_the_one_that_is_filled() {
    let mut bench = filling_over_a_newer_block();
    for (n, (member, event)) in std::mem::take(&mut bench.held).into_iter().enumerate() {
        let Event::CopyWritten { copy, .. } = event else {
            panic!("not an answer: {event:?}")
        };
        let status = if n == 1 { Status::NoSpace } else { Status::Ok };
        bench.event(Event::CopyWritten {
            copy,
            member,
            status,
        });
    }
    assert_eq!((bench.head.ops.len(), bench.head.copies.len()), (0, 0));
    assert_eq!(bench.head.set(SetIndex(0)).usable(), 0b011);
    assert_eq!(bench.head.set(SetIndex(0)).mirrored, 0);
}

#[test]
fn what_a_fill_wrote_to_all_is_answered_though_the_fill_is_given_up() {
    let mut bench = filling_over_a_newer_block();
    let (_, first) = bench.held.remove(0);
    bench.event(first);
    bench.lose(3);
    assert_eq!(bench.head.ops.len(), 1, "the second has it to answer");
    let (_, second) = bench.held.remove(0);
    bench.event(second);
    // The third may be in sync by the swap that met the other record.
    bench.swapped();
    assert_eq!(bench.head.ops.len(), 0);
    assert_eq!(bench.head.copies.len(), 0);
    assert_eq!(bench.head.set(SetIndex(0)).usable(), 0b011);
}

#[test]
fn a_repair_takes_the_newest_and_leaves_alone_what_sound_copies_do_not_agree_on() {
    let mut bench = with_a_lost_leaf();
    // The first went back to what it had before.
    bench.leaves[0].1.0[1].version = Version(3);
    bench.leaves[0].1.0[30] = BlockState::HOLE;
    repair(&mut bench, None, 1, 1);
    let of_first = |(member, ..): &&(MemberId, u32, u32, bool)| *member == bench.member(1);
    assert_eq!(bench.copied.iter().filter(of_first).count(), 1);
    assert_eq!(bench.read_from, [bench.member(2)]);
    repair(&mut bench, None, 30, 1);
    assert_eq!(bench.copied.len(), 3, "block 30 is not written");
}

/// Windows that are copied in a second at a pace of one each quarter of a second, to each of `filled`, which lack a leaf in
/// their sets. `leaving`: one whose place somebody takes. `slow`: what is copied is not answered.
fn windows_in_a_second<const N: usize>(
    sets: &[&[u8]],
    filled: [u8; N],
    leaving: Option<u8>,
    clients: bool,
    slow: bool,
) -> [u32; N] {
    let mut bench = Bench::new(sets, &filled);
    let mut full = LeafStates::holes();
    full.0.fill(BlockState {
        version: Version(5),
        content: BlockContent::Data,
    });
    for n in (1..=9).filter(|n| !filled.contains(n)) {
        if sets.iter().any(|set| set.contains(&n)) {
            let member = bench.member(n);
            bench.leaves.push((member, full.clone()));
        }
    }
    (bench.differs, bench.holds_copies) = (true, slow);
    bench.head.params.fill_bytes_per_second = 1 << 20;
    let mut record = bench.head.record().clone();
    for set in &mut record.placement.sets {
        for replica in &mut set.replicas {
            if let Some(n) = filled.iter().find(|n| replica.store == store(**n)) {
                *replica = Replica::joining(node(*n), store(*n), Revision(7));
            }
            replica.leaving = leaving.is_some_and(|n| replica.store == store(n));
        }
    }
    record.replicas -= u32::from(leaving.is_some());
    bench.now_us += 2 * CLIENTS_US;
    bench.conflict(record);
    for _ in 0..100 {
        bench.now_us += 10_000;
        if clients {
            let (op, targets) = bench.begin_write(0);
            bench.answer_write(op, targets);
        }
        bench.tick();
    }
    filled.map(|n| {
        let member = bench.member(n);
        let copied = bench.copied.iter().filter(|(of, ..)| *of == member);
        let blocks: u32 = copied.map(|(_, _, count, _)| count).sum();
        assert_eq!(blocks % WINDOW_BLOCKS, 0, "whole windows");
        blocks / WINDOW_BLOCKS
    })
}

#[test]
fn a_fill_keeps_its_pace_and_gives_way_to_clients_when_nothing_is_missing() {
    // One at once, and then one each quarter of a second.
    let missing: &[&[u8]] = &[&[1, 2, 3]];
    assert_eq!(windows_in_a_second(missing, [3], None, false, false), [5]);
    assert_eq!(windows_in_a_second(missing, [3], None, true, false), [5]);
    let moving: &[&[u8]] = &[&[1, 2, 3, 4]];
    assert_eq!(windows_in_a_second(moving, [4], Some(3), false, false), [5]);
    // One was begun before the first client came.
    let [slowed] = windows_in_a_second(moving, [4], Some(3), true, false);
    assert!((1..=3).contains(&slowed), "{slowed}");
}

#[test]
fn fills_take_turns_and_what_is_missing_comes_first() {
    let [second, third] = windows_in_a_second(&[&[1, 2, 3]], [2, 3], None, false, false);
    assert_eq!(second + third, 5);
    assert!(second.abs_diff(third) == 1, "{second} and {third}");
    // The first set moves from one to another, the second lacks a copy.
    for clients in [false, true] {
        let sets: &[&[u8]] = &[&[1, 2, 3, 4], &[1, 2, 5]];
        let [moved, missing] = windows_in_a_second(sets, [4, 5], Some(3), clients, false);
        assert!(moved <= 1 && missing >= 4, "{moved} and {missing}");
        // And while that one is slower than the pace.
        let [moved, missing] = windows_in_a_second(sets, [4, 5], Some(3), clients, true);
        assert_eq!((moved, missing), (0, 1));
    }
}

#[test]
fn a_copy_that_waits_for_somebody_to_take_its_place_is_kept_up_to_date() {
    // The third of these is out and leaves. Nobody takes its place, or the fourth will but is being filled, or has.
    for (copies, fourth, is_filled) in [
        (4, ReplicaState::InSync, true),
        (3, ReplicaState::Joining, true),
        (3, ReplicaState::InSync, false),
    ] {
        let mut bench = Bench::new(&[&[1, 2, 3, 4]], &[]);
        let third = bench.member(3);
        bench.lose(3);
        let mut record = bench.head.record().clone();
        record.replicas = copies;
        for replica in &mut record.placement.sets[0].replicas {
            replica.leaving = replica.store == store(3);
            if replica.store == store(4) && fourth == ReplicaState::Joining {
                *replica = Replica::joining(node(4), store(4), Revision(7));
            }
        }
        bench.conflict(record);
        bench.swapped();
        bench.compared.clear();
        bench.away.clear();
        bench.event(Event::LinkUp { member: third });
        bench.tick();
        let is_compared = bench.compared.contains(&third);
        assert_eq!(is_compared, is_filled, "of {copies}, the fourth {fourth:?}");
    }
}
