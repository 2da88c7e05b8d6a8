//! What drives a run: the client's next request, the next fault, and the end in which everything has to heal.

use ashlar_core::records::{HeadClaim, Replica};
use ashlar_core::replication::Rules;
use ashlar_core::replication::wire::Status;
use uuid::Uuid;

use crate::check::{self, Violation};
use crate::client::{ClientOp, Kind};
use crate::disk::{At, Cell, Content, Rot, leaf_of};
use crate::faults::Fault;
use crate::world::{Ev, World};

/// What a run did.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ran {
    pub(crate) events: u64,
    pub(crate) writes: u64,
    pub(crate) reads: u64,
    pub(crate) flushes: u64,
    pub(crate) heads: u64,
    pub(crate) sessions_ended: u64,
    /// Changes that the controller made.
    pub(crate) moved: u64,
}

/// Events before faults end.
const SAFETY_EVENTS: u64 = 2_500;
/// After which a scrub comes to a block that has rotted.
const SCRUB_US: u64 = 20_000;
/// How long everything may take to heal, of the world's time, microseconds: fifty leases.
const HEAL_US: u64 = 10_000_000;

/// Runs one seed.
pub(crate) fn run(seed: u64, rules: Rules, trace: bool) -> Result<Ran, Violation> {
    let mut world = World::new(seed, rules, trace);
    world.say(|| format!("seed {seed}: {:?}", world.faults));
    while world.events < SAFETY_EVENTS && world.violation.is_none() {
        if !world.step() {
            break;
        }
    }
    if world.violation.is_none() {
        world.heal();
    }
    match world.violation.take() {
        Some(violation) => Err(violation),
        None => Ok(Ran {
            events: world.events,
            writes: world.client.answered_writes,
            reads: world.client.answered_reads,
            flushes: world.client.answered_flushes,
            heads: world.next_head - 1,
            sessions_ended: world.client.sessions_ended,
            moved: world.steering.changes,
        }),
    }
}

impl World {
    pub(crate) fn meta_claim(&self, node: usize, head: u64) -> HeadClaim {
        HeadClaim {
            node: self.nodes[node].id,
            incarnation: Uuid::from_u128(u128::from(head)),
        }
    }

    fn violated(&mut self, result: Result<(), Violation>) {
        if let Err(violation) = result {
            self.violation.get_or_insert(violation);
        }
    }

    // -- the client

    pub(crate) fn client_step(&mut self) {
        let next_us = self.rng.between(500, 12_000);
        self.after(next_us, Ev::Client);
        if self.quiet {
            return;
        }
        let mut rng = self.rng.clone();
        let now_us = self.now_us;
        self.client.give_up(&mut rng, now_us, 150_000);
        // Mostly through the newest head, sometimes through an older one that may not know yet that it is one.
        let mut serving: Vec<(u64, usize, u64)> = self
            .nodes
            .iter()
            .enumerate()
            .filter_map(|(node, n)| n.head.as_ref().map(|head| (node, head)))
            .filter(|(_, head)| head.is_serving && head.generation >= self.client.generation)
            .map(|(node, head)| (head.id, node, head.generation))
            .collect();
        serving.sort_unstable();
        let chosen = if rng.chance(70) {
            serving.last().copied()
        } else {
            rng.pick(&serving).copied()
        };
        self.rng = rng;
        let Some((head, node, generation)) = chosen else {
            // Nobody serves: somebody opens the volume again, sooner or later.
            if self.rng.chance(if self.healing { 20 } else { 10 }) {
                let any_head = self
                    .nodes
                    .iter()
                    .any(|n| n.head.is_some() && n.is_up && !n.frozen);
                let node = self.rng.below(self.nodes.len() as u64) as usize;
                if !any_head || self.rng.chance(3) {
                    self.after(0, Ev::StartHead { node });
                }
            }
            return;
        };
        if generation > self.client.generation {
            self.client_session_ended(generation);
        }
        let mut rng = self.rng.clone();
        let drawn = self.client.draw(&mut rng, now_us);
        self.rng = rng;
        if let Some((op, what)) = drawn {
            let run = self.nodes[node].run;
            self.after(
                0,
                Ev::Submit {
                    node,
                    run,
                    head,
                    op,
                    what,
                },
            );
        }
    }

    pub(crate) fn client_session_ended(&mut self, generation: u64) {
        self.say(|| format!("the client's session ends, generation {generation}"));
        self.client.end_session(generation);
    }

    pub(crate) fn client_answered(&mut self, id: u64, result: Result<Vec<Content>, Status>) {
        let Some(op) = self.client.ops.remove(&id) else {
            return;
        };
        if op.generation != self.client.generation {
            return;
        }
        match (op.kind.clone(), result) {
            (
                Kind::Write {
                    numbers, durable, ..
                },
                Ok(_),
            ) => {
                self.client.answered_writes += 1;
                for (at, number) in op.blocks.clone().zip(&numbers) {
                    let history = &mut self.client.histories[at];
                    history.answered = history.answered.max(*number);
                    if durable {
                        history.flushed = history.flushed.max(*number);
                    }
                }
                self.say(|| format!("write {id} of {:?} {numbers:?} answered", op.blocks));
            }
            (Kind::Flush { answered }, Ok(_)) => {
                self.client.answered_flushes += 1;
                self.say(|| format!("flush {id} answered: {answered:?}"));
                for (history, number) in self.client.histories.iter_mut().zip(answered) {
                    history.flushed = history.flushed.max(number);
                }
            }
            (Kind::Read { floors }, Ok(contents)) => {
                self.client.answered_reads += 1;
                self.check_read(&op, &floors, &contents);
            }
            // What failed may have happened or not.
            (_, Err(_)) => {}
        }
    }

    fn check_read(&mut self, op: &ClientOp, floors: &[crate::client::Floor], contents: &[Content]) {
        for ((at, floor), content) in op.blocks.clone().zip(floors).zip(contents) {
            let history = &self.client.histories[at];
            self.say(|| {
                format!(
                    "read of {:?}: {:?} >= {floor:?}",
                    history.at,
                    history.number_of(*content, 0)
                )
            });
            let result = check::zeros_stay_zeros::check(history, *content)
                .and_then(|()| check::flushed_survives_power_loss::check(history, *floor, *content))
                .and_then(|()| check::no_answered_write_is_lost::check(history, *floor, *content))
                .and_then(|()| check::reads_never_go_back::check(history, *floor, *content));
            self.violated(result);
            let history = &mut self.client.histories[at];
            if let Some(number) = history.number_of(*content, floor.read.max(floor.answered)) {
                history.read = history.read.max(number);
            }
            if self.quiet {
                self.last_reads.entry(at).or_default().push(*content);
            }
        }
    }

    // -- faults

    pub(crate) fn fault_step(&mut self) {
        let next_us = self
            .rng
            .between(self.faults.every_us / 2, self.faults.every_us * 3 / 2);
        self.after(next_us, Ev::Fault);
        if self.healing {
            return;
        }
        let mut rng = self.rng.clone();
        let fault = self.faults.next(&mut rng);
        self.rng = rng;
        let count = self.nodes.len() as u64;
        let node = self.rng.below(count) as usize;
        let Some(fault) = fault else { return };
        self.say(|| format!("fault {fault:?} at node {node}"));
        match fault {
            Fault::Crash => self.stop_node(node),
            Fault::PowerLoss => self.cut_power(node),
            Fault::PowerLossOfAll => {
                for node in 0..self.nodes.len() {
                    // The head's machine may be another than those of the replicas, and live on.
                    let spared = self.nodes[node].head.is_some() && self.rng.chance(50);
                    if !spared {
                        self.cut_power(node);
                    }
                }
            }
            Fault::Freeze => {
                if self.nodes[node].is_up && !self.nodes[node].frozen {
                    self.nodes[node].frozen = true;
                    let delay_us = match self.rng.below(3) {
                        0 => self.rng.between(5_000, 100_000),
                        _ => self.rng.between(200_000, 800_000),
                    };
                    self.after(delay_us, Ev::Thaw { node });
                }
            }
            Fault::Cut => {
                let other = self.rng.below(count) as usize;
                if other == node {
                    return;
                }
                let delay_us = match self.rng.below(3) {
                    0 => self.rng.between(5_000, 100_000),
                    _ => self.rng.between(100_000, 900_000),
                };
                let mut ways = vec![(node, other)];
                if self.rng.chance(60) {
                    ways.push((other, node));
                }
                if self.rng.chance(30) {
                    // Away from everybody.
                    for n in 0..self.nodes.len() {
                        if n != node && n != other {
                            ways.push((node, n));
                            ways.push((n, node));
                        }
                    }
                }
                for (from, to) in ways {
                    *self.cuts.entry((from, to)).or_default() += 1;
                    self.after(delay_us, Ev::EndCut { from, to });
                }
            }
            Fault::Reset => {
                let open: Vec<u64> = self
                    .conns
                    .iter()
                    .filter(|(_, c)| c.head_open && c.replica_open)
                    .map(|(id, _)| *id)
                    .collect();
                let mut rng = self.rng.clone();
                let conn = rng.pick(&open).copied();
                self.rng = rng;
                if let Some(conn) = conn {
                    if self.rng.chance(50) {
                        let stall_us = self.rng.between(10_000, 250_000);
                        if let Some(c) = self.conns.get_mut(&conn) {
                            c.asks_from_us = self.now_us + stall_us;
                        }
                        let head_us = self.rng.below(10_000);
                        self.after(head_us, Ev::ClosedAtHead { conn });
                        self.after(stall_us + 50_000, Ev::ClosedAtReplica { conn });
                        return;
                    }
                    let (head_us, replica_us) =
                        (self.rng.below(20_000), self.rng.between(0, 300_000));
                    self.after(head_us, Ev::ClosedAtHead { conn });
                    self.after(replica_us, Ev::ClosedAtReplica { conn });
                }
            }
            Fault::Slow => {
                let other = self.rng.below(count) as usize;
                let delay_us = self.rng.between(5_000, 60_000);
                if other != node {
                    *self.cuts.entry((node, other)).or_default() += 1;
                    self.after(
                        delay_us,
                        Ev::EndCut {
                            from: node,
                            to: other,
                        },
                    );
                }
            }
            Fault::Takeover => self.after(0, Ev::StartHead { node }),
            Fault::Split => {
                let serves = |n: &crate::world::Node| n.head.as_ref().is_some_and(|h| h.is_serving);
                let Some(old) = self.nodes.iter().position(serves) else {
                    return;
                };
                let delay_us = self.rng.between(50_000, 500_000);
                let both_ways = self.rng.chance(50);
                for other in (0..self.nodes.len()).filter(|other| *other != old) {
                    *self.cuts.entry((other, old)).or_default() += 1;
                    self.after(
                        delay_us,
                        Ev::EndCut {
                            from: other,
                            to: old,
                        },
                    );
                    if both_ways {
                        *self.cuts.entry((old, other)).or_default() += 1;
                        self.after(
                            delay_us,
                            Ev::EndCut {
                                from: old,
                                to: other,
                            },
                        );
                    }
                }
                if node != old {
                    self.after(1_000, Ev::StartHead { node });
                }
            }
            Fault::MetaAway => {
                if !self.meta.is_away {
                    self.meta.is_away = true;
                    let delay_us = self.rng.between(10_000, 1_500_000);
                    self.after(delay_us, Ev::MetaBack);
                }
            }
            Fault::Poison => {
                if self.nodes[node].is_up && !self.nodes[node].disk.poisoned {
                    self.store_failed(node);
                    // The daemon runs on without its store until somebody restarts it.
                    let run_on_us = self.rng.between(1_000, 200_000);
                    let run = self.nodes[node].run;
                    self.after(run_on_us, Ev::StopNode { node, run });
                }
            }
            Fault::Drain => self.drain_step(node),
            Fault::Full => {
                self.nodes[node].disk.full = true;
                let delay_us = self.rng.between(10_000, 300_000);
                self.after(delay_us, Ev::Roomy { node });
            }
            Fault::Rot => {
                let all_in_sync = self
                    .meta
                    .record
                    .record
                    .placement
                    .sets
                    .iter()
                    .all(|set| set.replicas.iter().all(|replica| replica.is_in_sync()));
                let clean = self
                    .nodes
                    .iter()
                    .all(|n| n.disk.blocks().all(|(_, cell)| !cell.is_rotten()));
                let at = self.rng.below(self.client.histories.len() as u64) as usize;
                let at = self.client.histories[at].at;
                if all_in_sync && clean {
                    if self.rng.chance(30) {
                        let histories = self.client.histories.iter().map(|history| history.at);
                        for lost in histories.filter(|other| leaf_of(*other) == leaf_of(at)) {
                            self.nodes[node].disk.lose_mapping(lost);
                        }
                    } else {
                        self.nodes[node].disk.rot(at);
                    }
                    // Found by a scrub, if nobody reads it before.
                    self.after(SCRUB_US, Ev::Scrubbed { node, at });
                }
            }
            Fault::Distrust => {
                if let Some((at, head)) = self.serving() {
                    self.with_head(at, head, |world, driver| driver.distrust(world, at, node));
                }
            }
            Fault::FailingReads => {
                self.nodes[node].disk.failing_reads = true;
                let delay_us = self.rng.between(5_000, 100_000);
                self.after(delay_us, Ev::ReadsBack { node });
            }
        }
    }

    fn cut_power(&mut self, node: usize) {
        let mut rng = self.rng.clone();
        self.nodes[node].disk.lose_power(&mut rng);
        self.rng = rng;
        self.nodes[node].boot += 1;
        self.stop_node(node);
    }

    // -- the end

    /// Faults end; everything has to come back by itself.
    fn heal(&mut self) {
        self.say(|| "healing".to_owned());
        self.healing = true;
        for conn in self.conns.values_mut() {
            conn.asks_from_us = 0;
        }
        for node in 0..self.nodes.len() {
            self.nodes[node].disk.full = false;
            self.nodes[node].disk.failing_reads = false;
            let delay_us = self.rng.between(0, 100_000);
            self.after(delay_us, Ev::StartNode { node });
            self.after(delay_us, Ev::Thaw { node });
        }
        let ways: Vec<(usize, usize)> = self.cuts.keys().copied().collect();
        for (from, to) in ways {
            self.cuts.insert((from, to), 0);
            self.after(0, Ev::EndCut { from, to });
        }
        self.after(0, Ev::MetaBack);
        let end_us = self.now_us + HEAL_US;
        let mut next_look_us = self.now_us;
        while self.now_us < end_us && self.violation.is_none() {
            if self.now_us >= next_look_us {
                next_look_us = self.now_us + 20_000;
                if self.is_healed() {
                    break;
                }
            }
            if !self.step() {
                break;
            }
        }
        if self.violation.is_some() {
            return;
        }
        let healed = self.is_healed();
        // Two faults of one block at once are beyond what is promised; that the answer is an error and nothing older was
        // checked all along.
        if !healed && self.has_rotten_last_copy() {
            return;
        }
        let result = check::everything_heals::check(healed, || self.describe());
        self.violated(result);
        if self.violation.is_some() {
            return;
        }
        self.quiet = true;
        self.settle();
        // What had been on its way for long may have shaken it once more. And what the client has given up waiting for is
        // done nevertheless: requests that had queued behind a long outage take their time, one after another.
        let end_us = self.now_us + HEAL_US;
        let is_over = |world: &World| world.is_healed() && world.is_idle();
        while self.now_us < end_us && !is_over(self) && self.violation.is_none() && self.step() {}
        let healed = is_over(self);
        let result = check::everything_heals::check(healed, || self.describe());
        self.violated(result);
        self.last_reads.clear();
        let sets = self.meta.record.record.placement.sets.clone();
        for (index, set) in sets.iter().enumerate() {
            let disks: Vec<(usize, &crate::disk::Disk)> = self
                .nodes
                .iter()
                .enumerate()
                .filter(|(_, n)| set.replicas.iter().any(|replica| replica.store == n.store))
                .map(|(node, n)| (node, &n.disk))
                .collect();
            let result =
                check::replicas_are_identical::check(&disks, sets.len() as u32, index as u32);
            self.violated(result);
        }
        self.read_everything_twice();
    }

    fn settle(&mut self) {
        let end_us = self.now_us + 300_000;
        while self.now_us < end_us && self.violation.is_none() && self.step() {}
    }

    fn read_everything_twice(&mut self) {
        for _ in 0..2 {
            for at in 0..self.client.histories.len() {
                let history = &self.client.histories[at];
                let floor = crate::client::Floor {
                    answered: history.answered,
                    read: history.read,
                    flushed: history.flushed,
                };
                let op = self.client.next_op;
                self.client.next_op += 1;
                let what = ClientOp {
                    generation: self.client.generation,
                    blocks: at..at + 1,
                    kind: Kind::Read {
                        floors: vec![floor],
                    },
                    since_us: self.now_us,
                };
                self.client.ops.insert(op, what.clone());
                let serving = self
                    .nodes
                    .iter()
                    .enumerate()
                    .find_map(|(node, n)| n.head.as_ref().map(|head| (node, n.run, head.id)));
                if let Some((node, run, head)) = serving {
                    self.after(
                        0,
                        Ev::Submit {
                            node,
                            run,
                            head,
                            op,
                            what,
                        },
                    );
                }
            }
            self.settle();
        }
        for (at, reads) in std::mem::take(&mut self.last_reads) {
            let result = check::unanswered_writes_are_decided_once::check(
                &self.client.histories[at],
                &reads,
            );
            self.violated(result);
            let twice = check::everything_heals::check(reads.len() >= 2, || {
                format!(
                    "block {at} was read {} times of two at the end",
                    reads.len()
                )
            });
            self.violated(twice);
        }
    }

    /// Where the volume is served, by which head.
    fn serving(&self) -> Option<(usize, u64)> {
        let serves = |n: &crate::world::Node| n.head.as_ref().is_some_and(|h| h.is_serving);
        let at = self.nodes.iter().position(serves)?;
        let node = &self.nodes[at];
        let head = node.head.as_ref().map(|head| head.id)?;
        (node.is_up && !node.frozen).then_some((at, head))
    }

    /// A scrub came to a leaf: its head is told of the blocks that cannot be read.
    pub(crate) fn scrubbed(&mut self, node: usize, at: At) {
        let rotten: Vec<At> = self.nodes[node]
            .disk
            .blocks()
            .filter(|(other, cell)| leaf_of(*other) == leaf_of(at) && cell.is_rotten())
            .map(|(other, _)| other)
            .collect();
        let Some((at, head)) = self.serving() else {
            return;
        };
        for block in rotten {
            self.with_head(at, head, |world, driver| {
                driver.repair(world, at, node, block)
            });
        }
    }

    /// Whether a block rotted of which nobody else has that version: the others were put out or cut off after it did.
    fn has_rotten_last_copy(&self) -> bool {
        let sets = &self.meta.record.record.placement.sets;
        let is_in_sync = |store, chunk: u32| {
            let mut in_sync = sets[chunk as usize % sets.len()].in_sync();
            in_sync.any(|replica| replica.store == store)
        };
        let is_elsewhere = |at: At, lost: Cell| {
            self.nodes.iter().any(|n| match (n.disk.get(at), lost.rot) {
                (Some(cell), _) if cell.is_rotten() => false,
                // Which version it was went with the leaf: what somebody out of sync has may be older.
                (_, Rot::Mapping) => is_in_sync(n.store, at.0),
                (cell, _) => cell.is_some_and(|cell| cell.version == lost.version),
            })
        };
        let blocks = self.nodes.iter().flat_map(|n| n.disk.blocks());
        let mut rotten = blocks.filter(|(_, cell)| cell.is_rotten());
        rotten.any(|(at, cell)| !is_elsewhere(at, cell))
    }

    fn is_healed(&self) -> bool {
        let record = &self.meta.record.record;
        let in_sync = record.placement.sets.iter().all(|set| {
            let whole = |replica: &Replica| replica.is_in_sync() && !replica.leaving;
            set.replicas.len() == record.replicas as usize && set.replicas.iter().all(whole)
        });
        // Who runs on without its store is restarted yet.
        let restarted = self.nodes.iter().all(|n| !n.disk.poisoned);
        let heads: Vec<_> = self.nodes.iter().filter_map(|n| n.head.as_ref()).collect();
        in_sync
            && restarted
            && heads.len() == 1
            && heads[0].is_serving
            && heads[0].head.is_serving()
            && heads[0].head.record().epoch == record.epoch
            && heads[0].head.status().away.is_empty()
            && heads[0].head.status().writes_in_flight == 0
            && !heads[0].head.status().is_swapping
    }

    /// Every request has ended.
    fn is_idle(&self) -> bool {
        let mut heads = self.nodes.iter().filter_map(|n| n.head.as_ref());
        heads.all(|head| head.is_idle())
    }

    fn describe(&self) -> String {
        let heads: Vec<String> = self
            .nodes
            .iter()
            .enumerate()
            .filter_map(|(node, n)| n.head.as_ref().map(|head| (node, head)))
            .map(|(node, head)| format!("node {node} head {} {:?}", head.id, head.head.status()))
            .collect();
        format!(
            "record {:?}; heads {heads:?}",
            self.meta.record.record.placement
        )
    }
}
