//! The end of a run: faults are over, and everything has to heal.

use ashlar_core::records::Replica;

use crate::check;
use crate::client::{ClientOp, Floor, Kind};
use crate::disk::{At, Cell, Disk, Rot};
use crate::world::{Ev, World};

/// How long everything may take to heal, of the world's time, microseconds: fifty leases.
const HEAL_US: u64 = 10_000_000;

impl World {
    /// Faults end; everything has to come back by itself.
    pub(super) fn heal(&mut self) {
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
            let disks: Vec<(usize, &Disk)> = self
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
                let floor = Floor {
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
