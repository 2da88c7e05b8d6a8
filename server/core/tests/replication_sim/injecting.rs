//! The next fault of a run.

use crate::disk::{At, leaf_of};
use crate::faults::Fault;
use crate::world::{Ev, Node, World, store_of};
use ashlar_core::records::ReplicaState;

/// After which a scrub comes to a block that has rotted.
const SCRUB_US: u64 = 20_000;

impl World {
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
                let serves = |n: &Node| n.head.as_ref().is_some_and(|h| h.is_serving);
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
            Fault::Straggler => self.leave_stragglers(),
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

    /// Where the volume is served, by which head.
    pub(super) fn serving(&self) -> Option<(usize, u64)> {
        let serves = |n: &Node| n.head.as_ref().is_some_and(|h| h.is_serving);
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
        let mut ranges: Vec<(At, u32)> = Vec::new();
        for (chunk, block) in rotten {
            match ranges.last_mut() {
                Some(((of, first), count)) if (*of, *first + *count) == (chunk, block) => {
                    *count += 1;
                }
                _ => ranges.push(((chunk, block), 1)),
            }
        }
        for (first, count) in ranges {
            self.with_head(at, head, |world, driver| {
                driver.repair(world, at, node, first, count)
            });
        }
    }

    fn leave_stragglers(&mut self) {
        let serves = |n: &Node| n.head.as_ref().is_some_and(|h| h.is_serving);
        let Some(head) = self.nodes.iter().position(serves) else {
            return;
        };
        let record = self.meta.record.record.clone();
        let is_out = |node: usize| {
            let mut replicas = record.placement.sets.iter().flat_map(|set| &set.replicas);
            replicas.any(|r| r.store == store_of(node) && r.state != ReplicaState::InSync)
        };
        let dies_us = self.rng.between(1_000, 20_000);
        let links: Vec<(u64, usize)> = self
            .conns
            .iter()
            .filter(|(_, c)| c.from == head && c.replica_open)
            .map(|(id, c)| (*id, c.to))
            .collect();
        if !links.iter().any(|(_, to)| is_out(*to)) {
            return;
        }
        for (conn, to) in links {
            if is_out(to) {
                let arrives_us = self.now_us + dies_us + self.rng.between(1_000, 400_000);
                if let Some(c) = self.conns.get_mut(&conn) {
                    c.asks_from_us = arrives_us;
                }
            } else {
                *self.cuts.entry((head, to)).or_default() += 1;
                self.after(dies_us, Ev::ClosedAtReplica { conn });
                self.after(dies_us + 1, Ev::EndCut { from: head, to });
            }
        }
        let run = self.nodes[head].run;
        self.after(dies_us, Ev::StopNode { node: head, run });
    }
}
