//! The world of a run: nodes, connections, the metadata store, one clock. Everything that happens is an event of one
//! queue, so a seed replays exactly.

mod event;
mod nodes;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use ashlar_core::records::{
    HeadClaim, Placement, Replica, ReplicaSet, Revision, Versioned, VolumeName, VolumeRecord, Zones,
};
use ashlar_core::replication::{
    Acceptor, BootId, Event as HeadEvent, Rules, Seal, StartedWith, SwapOutcome,
};
use ashlar_core::units::{LayerId, NodeId, StoreId, VolumeId};
pub(crate) use event::Ev;
use event::Queued;
use uuid::Uuid;

use crate::check::Violation;
use crate::client::Client;
use crate::disk::Disk;
use crate::driver::Driver;
use crate::faults::Faults;
use crate::rng::Rng;
use crate::steering::ZONE;

pub(crate) const LEASE_US: u64 = 200_000;
pub(crate) const WRITE_TIMEOUT_US: u64 = 80_000;
pub(crate) const HEARTBEAT_US: u64 = LEASE_US / 8;

pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) store: StoreId,
    pub(crate) disk: Disk,
    /// What is durable of the acceptor.
    pub(crate) seal: Option<Seal>,
    /// When the last one that was to be made durable is: one after the other.
    pub(crate) seals_until_us: u64,
    pub(crate) boot: u64,
    /// Of the process; what belongs to an earlier run of it is void.
    pub(crate) run: u64,
    pub(crate) is_up: bool,
    pub(crate) frozen: bool,
    pub(crate) deferred: Vec<Ev>,
    pub(crate) acceptor: Option<Acceptor>,
    pub(crate) store_failed: bool,
    pub(crate) head: Option<Box<Driver>>,
}

/// A connection from a head's node to a store's. Number zero is never one: it is the head's own node.
#[derive(Clone, Debug)]
pub(crate) struct Conn {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) head_open: bool,
    pub(crate) replica_open: bool,
    last_ask_us: u64,
    last_answer_us: u64,
    /// What was sent to the replica does not arrive before then, as when a lost packet waits for its timer.
    pub(crate) asks_from_us: u64,
}

/// The store of a node.
pub(crate) fn store_of(node: usize) -> StoreId {
    StoreId(Uuid::from_u128(200 + node as u128))
}

pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) rules: Rules,
    pub(crate) faults: Faults,
    /// The pace of fills, as in the parameters of heads.
    pub(crate) fill_bytes_per_second: u64,
    pub(crate) now_us: u64,
    serial: u64,
    queue: BinaryHeap<Reverse<Queued>>,
    pub(crate) events: u64,
    pub(crate) nodes: Vec<Node>,
    pub(crate) conns: BTreeMap<u64, Conn>,
    next_conn: u64,
    /// From one node to another nothing arrives now.
    pub(crate) cuts: BTreeMap<(usize, usize), u32>,
    /// What waits for a cut to end.
    held: Vec<(usize, usize, Ev)>,
    pub(crate) meta: crate::meta::Meta,
    pub(crate) steering: crate::steering::Steering,
    /// Swaps and reads that wait for the metadata store.
    pub(crate) meta_held: Vec<Ev>,
    pub(crate) client: Client,
    pub(crate) next_head: u64,
    pub(crate) violation: Option<Violation>,
    /// No new faults; what there is heals.
    pub(crate) healing: bool,
    /// The client does nothing new.
    pub(crate) quiet: bool,
    pub(crate) next_op: u64,
    pub(crate) trace: bool,
    /// Contents of the reads of the end, by block.
    pub(crate) last_reads: BTreeMap<usize, Vec<u64>>,
}

impl World {
    pub(crate) fn new(seed: u64, rules: Rules, trace: bool) -> World {
        let mut rng = Rng::new(seed);
        let faults = Faults::draw(&mut rng);
        let replicas = 2 + rng.below(2) as usize;
        let nodes_count = replicas + 1 + rng.below(2) as usize;
        let sets = 1 + rng.below(2) as usize;
        let nodes: Vec<Node> = (0..nodes_count)
            .map(|n| Node {
                id: NodeId(Uuid::from_u128(100 + n as u128)),
                store: store_of(n),
                disk: Disk::new(rules != Rules::default()),
                seal: None,
                seals_until_us: 0,
                boot: 1,
                run: 1,
                is_up: true,
                frozen: false,
                deferred: Vec::new(),
                acceptor: None,
                store_failed: false,
                head: None,
            })
            .collect();
        let placement = Placement {
            stores: Vec::new(),
            sets: (0..sets)
                .map(|set| ReplicaSet {
                    replicas: (0..replicas)
                        .map(|r| {
                            let n = &nodes[(set + r) % nodes_count];
                            Replica::in_sync(n.id, n.store)
                        })
                        .collect(),
                })
                .collect(),
        };
        let mut record = VolumeRecord {
            never_written: false,
            zones: Zones::check([ZONE.to_owned()]).expect("a zone"),
            ..VolumeRecord::new(
                VolumeId(Uuid::from_u128(1)),
                VolumeName::parse("sim").expect("a name"),
                4 * (64 << 20),
                LayerId(1),
                placement,
            )
        };
        if !rng.chance(70) {
            record.min_in_sync = 1;
        }
        assert_eq!(record.check_invariants(), Ok(()));
        // Blocks on both sides of the border of two leaves, and one far from them, in chunks of different sets.
        let mut blocks = Vec::new();
        for chunk in 0..3 {
            for block in [300, 510, 511, 512] {
                blocks.push((chunk, block));
            }
        }
        blocks.truncate(4 + rng.below(9) as usize);
        let mut world = World {
            rng,
            rules,
            faults,
            // None, one that makes every window wait for the one before, and one in between.
            fill_bytes_per_second: [0, 0, 64 << 10, 0, 0, 1 << 20][(seed % 6) as usize],
            now_us: 1_000_000,
            serial: 0,
            queue: BinaryHeap::new(),
            events: 0,
            nodes,
            conns: BTreeMap::new(),
            next_conn: 1,
            cuts: BTreeMap::new(),
            held: Vec::new(),
            meta: crate::meta::Meta {
                record: Versioned {
                    record,
                    changed_at: Revision(1),
                },
                leftovers: BTreeMap::new(),
                is_away: false,
            },
            steering: crate::steering::Steering::default(),
            meta_held: Vec::new(),
            client: Client::new(&blocks),
            next_head: 1,
            violation: None,
            healing: false,
            quiet: false,
            next_op: 1,
            trace,
            last_reads: BTreeMap::new(),
        };
        for node in 0..nodes_count {
            world.start_acceptor(node);
        }
        let first = world.rng.below(nodes_count as u64) as usize;
        world.after(0, Ev::StartHead { node: first });
        world.after(10_000, Ev::Client);
        world.after(30_000, Ev::Fault);
        world.after(20_000, Ev::Steer);
        world
    }

    pub(crate) fn say(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>9} {}", self.now_us, what());
        }
    }

    pub(crate) fn after(&mut self, delay_us: u64, ev: Ev) {
        self.at(self.now_us + delay_us, ev);
    }

    pub(crate) fn at(&mut self, at_us: u64, ev: Ev) {
        self.serial += 1;
        self.queue.push(Reverse(Queued(at_us, self.serial, ev)));
    }

    pub(crate) fn start_acceptor(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        let started = StartedWith {
            seal: n.seal,
            store_epoch: n.disk.highest_epoch(),
            boot: BootId(Uuid::from_u128(u128::from(n.boot))),
            store_failed: n.store_failed,
        };
        n.acceptor = Some(Acceptor::new(self.rules, started));
    }

    /// A claim nobody had before.
    pub(crate) fn new_claim(&mut self, node: usize) -> (u64, HeadClaim) {
        let head = self.next_head;
        self.next_head += 1;
        let claim = HeadClaim {
            node: self.nodes[node].id,
            incarnation: Uuid::from_u128(u128::from(head)),
        };
        (head, claim)
    }

    // -- running

    /// Takes the next event; false when there is none.
    pub(crate) fn step(&mut self) -> bool {
        let Some(Reverse(Queued(at_us, _, ev))) = self.queue.pop() else {
            return false;
        };
        self.now_us = self.now_us.max(at_us);
        if let Some(node) = ev.node() {
            let n = &mut self.nodes[node];
            if n.frozen {
                n.deferred.push(ev);
                return true;
            }
        }
        if self.held_back(&ev) {
            return true;
        }
        self.events += 1;
        self.handle(ev);
        true
    }

    fn is_running(&self, node: usize, run: u64) -> bool {
        self.nodes[node].is_up && self.nodes[node].run == run
    }

    fn handle(&mut self, ev: Ev) {
        match ev {
            Ev::Ask {
                conn,
                node,
                run,
                ask,
            } => {
                let open = conn == 0 || self.conns.get(&conn).is_some_and(|c| c.replica_open);
                if self.is_running(node, run) && open {
                    self.on_ask(node, conn, ask);
                }
            }
            Ev::Answer {
                conn,
                node,
                run,
                head,
                answer,
            } => {
                let open = conn == 0 || self.conns.get(&conn).is_some_and(|c| c.head_open);
                if self.is_running(node, run) && open {
                    self.with_head(node, head, |world, driver| {
                        driver.on_answer(world, node, conn, answer);
                    });
                }
            }
            Ev::ClosedAtHead { conn } => {
                let Some(c) = self.conns.get_mut(&conn).filter(|c| c.head_open) else {
                    return;
                };
                c.head_open = false;
                let from = c.from;
                if self.nodes[from].frozen {
                    // It learns of it when it runs again.
                    c.head_open = true;
                    self.after(5_000, Ev::ClosedAtHead { conn });
                    return;
                }
                if let Some(head) = self.nodes[from].head.as_ref().map(|head| head.id) {
                    self.with_head(from, head, |world, driver| {
                        driver.on_link_down(world, from, conn);
                    });
                }
            }
            Ev::ClosedAtReplica { conn } => {
                let Some(c) = self.conns.get_mut(&conn).filter(|c| c.replica_open) else {
                    return;
                };
                let to = c.to;
                if self.nodes[to].frozen {
                    self.after(5_000, Ev::ClosedAtReplica { conn });
                    return;
                }
                c.replica_open = false;
                self.on_conn_closed(to, conn);
            }
            Ev::Connect {
                node,
                run,
                head,
                member,
            } => {
                if self.is_running(node, run) {
                    self.with_head(node, head, |world, driver| {
                        driver.try_connect(world, node, member);
                    });
                }
            }
            Ev::Persisted {
                node,
                run,
                serial,
                seal,
            } => {
                if self.is_running(node, run) {
                    self.nodes[node].seal = Some(seal);
                    self.on_persisted(node, serial);
                }
            }
            Ev::Executed {
                node,
                run,
                session,
                op,
                result,
                synced,
            } => {
                if self.is_running(node, run) {
                    self.on_executed(node, session, op, *result, synced);
                }
            }
            Ev::Tick { node, run, head } => {
                if self.is_running(node, run) {
                    self.with_head(node, head, |world, driver| driver.on_tick(world, node));
                }
            }
            Ev::FillDue { node, run, head } => {
                if self.is_running(node, run) {
                    self.with_head(node, head, |world, driver| {
                        driver.go_on_filling(world, node);
                    });
                }
            }
            Ev::SwapArrives {
                node,
                run,
                head,
                serial,
                transaction,
                is_known,
            } => {
                if self.meta.is_away {
                    self.meta_held.push(Ev::SwapArrives {
                        node,
                        run,
                        head,
                        serial,
                        transaction,
                        is_known,
                    });
                    return;
                }
                let outcome = match self.meta.commit(&transaction) {
                    Some(revision) => SwapOutcome::Done(revision),
                    None => SwapOutcome::Conflict,
                };
                self.say(|| format!("swap {serial} of head {head}: {outcome:?}"));
                if is_known {
                    // Sometimes the answer takes long to reach the head, while everybody else knows.
                    let delay_us = if !self.healing && self.rng.chance(5) {
                        self.rng.between(50_000, 1_500_000)
                    } else {
                        self.rng.between(200, 3_000)
                    };
                    self.after(
                        delay_us,
                        Ev::Swapped {
                            node,
                            run,
                            head,
                            serial,
                            outcome,
                        },
                    );
                }
                self.tell_watchers();
            }
            Ev::Swapped {
                node,
                run,
                head,
                serial,
                outcome,
            } => {
                if self.is_running(node, run) {
                    self.with_head(node, head, |world, driver| {
                        driver.event(world, node, HeadEvent::Swapped { serial, outcome });
                    });
                }
            }
            Ev::ReadRecord { node, run, head } => {
                if self.meta.is_away {
                    self.meta_held.push(Ev::ReadRecord { node, run, head });
                } else if self.is_running(node, run) {
                    let record = Some(Box::new(self.meta.record.clone()));
                    self.with_head(node, head, |world, driver| {
                        driver.event(
                            world,
                            node,
                            HeadEvent::Record {
                                asked: true,
                                record,
                            },
                        );
                    });
                }
            }
            Ev::Watch { node, run, head } => {
                if self.is_running(node, run) && !self.meta.is_away {
                    let record = Some(Box::new(self.meta.record.clone()));
                    self.with_head(node, head, |world, driver| {
                        driver.event(
                            world,
                            node,
                            HeadEvent::Record {
                                asked: false,
                                record,
                            },
                        );
                    });
                }
            }
            Ev::Submit {
                node,
                run,
                head,
                op,
                what,
            } => {
                if self.is_running(node, run) {
                    self.with_head(node, head, |world, driver| {
                        driver.submit(world, node, op, what);
                    });
                }
            }
            Ev::StartHead { node } => self.start_head(node),
            Ev::StartNode { node } => self.start_node(node),
            Ev::StopNode { node, run } => {
                if self.is_running(node, run) {
                    self.stop_node(node);
                }
            }
            Ev::Thaw { node } => self.thaw(node),
            Ev::EndCut { from, to } => {
                if let Some(count) = self.cuts.get_mut(&(from, to)) {
                    *count = count.saturating_sub(1);
                }
                if !self.is_cut(from, to) {
                    let (now, still): (Vec<_>, Vec<_>) = std::mem::take(&mut self.held)
                        .into_iter()
                        .partition(|(f, t, _)| (*f, *t) == (from, to));
                    self.held = still;
                    // Each connection finds out by its own timer.
                    for conn in self.conns.keys().copied().collect::<Vec<_>>() {
                        let stalls = !self.healing && self.rng.chance(40);
                        let stall_us = self.rng.between(1_000, 300_000);
                        if let Some(c) = self.conns.get_mut(&conn)
                            && (c.from, c.to) == (from, to)
                            && stalls
                        {
                            c.asks_from_us = self.now_us + stall_us;
                        }
                    }
                    for (_, _, ev) in now {
                        self.after(0, ev);
                    }
                }
            }
            Ev::MetaBack => {
                self.meta.is_away = false;
                for ev in std::mem::take(&mut self.meta_held) {
                    self.after(0, ev);
                }
            }
            Ev::Roomy { node } => self.nodes[node].disk.full = false,
            Ev::ReadsBack { node } => self.nodes[node].disk.failing_reads = false,
            Ev::Scrubbed { node, at } => self.scrubbed(node, at),
            Ev::Client => self.client_step(),
            Ev::Fault => self.fault_step(),
            Ev::Steer => self.steer_step(),
        }
    }

    pub(crate) fn tell_watchers(&mut self) {
        for node in 0..self.nodes.len() {
            let Some(head) = self.nodes[node].head.as_ref().map(|head| head.id) else {
                continue;
            };
            if self.rng.chance(50) {
                let run = self.nodes[node].run;
                let delay_us = self.rng.between(500, 100_000);
                self.after(delay_us, Ev::Watch { node, run, head });
            }
        }
    }

    pub(crate) fn with_head(
        &mut self,
        node: usize,
        head: u64,
        act: impl FnOnce(&mut World, &mut Driver),
    ) {
        let Some(mut driver) = self.nodes[node].head.take() else {
            return;
        };
        if driver.id != head {
            self.nodes[node].head = Some(driver);
            return;
        }
        act(self, &mut driver);
        let due_us = driver.head.fill_due_us();
        if let Some(due_us) = due_us.filter(|due_us| *due_us != driver.fill_due_us) {
            driver.fill_due_us = due_us;
            let run = self.nodes[node].run;
            self.at(due_us.max(self.now_us), Ev::FillDue { node, run, head });
        }
        if !driver.is_stopped() {
            driver.head.check_invariants();
            self.nodes[node].head = Some(driver);
        } else {
            self.say(|| {
                format!(
                    "head {head} on node {node} stops: {:?}",
                    driver.head.stopped()
                )
            });
            driver.close_links(self);
        }
    }
}
