//! What drives a run, and the client's next request.

use ashlar_core::records::HeadClaim;
use ashlar_core::replication::Rules;
use ashlar_core::replication::wire::Status;
use uuid::Uuid;

use crate::check::{self, Violation};
use crate::client::{ClientOp, Kind};
use crate::disk::Content;
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

    pub(crate) fn violated(&mut self, result: Result<(), Violation>) {
        if let Err(violation) = result {
            self.violation.get_or_insert(violation);
        }
    }

    pub(crate) fn client_step(&mut self) {
        let next_us = self.rng.between(500, 12_000);
        self.after(next_us, Ev::Client);
        let mut rng = self.rng.clone();
        let now_us = self.now_us;
        if !self.quiet {
            self.client.give_up(&mut rng, now_us, 150_000);
        }
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
        if self.quiet {
            return;
        }
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
}
