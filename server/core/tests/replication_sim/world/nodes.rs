//! Connections between nodes, and nodes that end and begin.

use super::{Conn, Ev, World};
use crate::driver::Driver;
use crate::message::{Answer, Ask};

impl World {
    pub(crate) fn connect(&mut self, from: usize, to: usize) -> u64 {
        let conn = self.next_conn;
        self.next_conn += 1;
        self.conns.insert(
            conn,
            Conn {
                from,
                to,
                head_open: true,
                replica_open: true,
                last_ask_us: 0,
                last_answer_us: 0,
                asks_from_us: 0,
            },
        );
        conn
    }

    fn delay_us(&mut self) -> u64 {
        match self.rng.below(20) {
            0 => self.rng.between(1_000, 10_000),
            _ => self.rng.between(50, 800),
        }
    }

    /// Towards the replica. Connection zero: the head's own node.
    pub(crate) fn ask(&mut self, from: usize, conn: u64, ask: Ask) {
        let delay_us = if conn == 0 {
            self.rng.below(30)
        } else {
            self.delay_us()
        };
        let (node, at_us) = if conn == 0 {
            // In order, as calls are.
            let at_us = self.local_order(from, self.now_us + delay_us);
            (from, at_us)
        } else {
            let Some(c) = self.conns.get_mut(&conn).filter(|c| c.head_open) else {
                return;
            };
            c.last_ask_us = c.last_ask_us.max(self.now_us + delay_us) + 1;
            (c.to, c.last_ask_us)
        };
        let run = self.nodes[node].run;
        self.at(
            at_us,
            Ev::Ask {
                conn,
                node,
                run,
                ask,
            },
        );
    }

    fn local_order(&mut self, node: usize, at_us: u64) -> u64 {
        let key = u64::MAX - node as u64;
        let c = self.conns.entry(key).or_insert(Conn {
            from: node,
            to: node,
            head_open: false,
            replica_open: false,
            last_ask_us: 0,
            last_answer_us: 0,
            asks_from_us: 0,
        });
        c.last_ask_us = c.last_ask_us.max(at_us) + 1;
        c.last_ask_us
    }

    /// Towards the head.
    pub(crate) fn answer(&mut self, from: usize, conn: u64, answer: Answer) {
        let delay_us = self.delay_us();
        let (node, at_us) = if conn == 0 {
            (from, self.now_us)
        } else {
            let Some(c) = self.conns.get_mut(&conn).filter(|c| c.replica_open) else {
                return;
            };
            c.last_answer_us = c.last_answer_us.max(self.now_us + delay_us) + 1;
            (c.from, c.last_answer_us)
        };
        let Some(head) = self.nodes[node].head.as_ref().map(|head| head.id) else {
            return;
        };
        let run = self.nodes[node].run;
        self.at(
            at_us,
            Ev::Answer {
                conn,
                node,
                run,
                head,
                answer,
            },
        );
    }

    /// Both ends of a connection, now.
    pub(crate) fn break_connection(&mut self, conn: u64) {
        self.after(0, Ev::ClosedAtHead { conn });
        self.after(0, Ev::ClosedAtReplica { conn });
    }

    pub(super) fn is_cut(&self, from: usize, to: usize) -> bool {
        self.cuts.get(&(from, to)).is_some_and(|count| *count > 0)
    }

    /// Whether it has to wait for a cut to end; then it does.
    pub(super) fn held_back(&mut self, ev: &Ev) -> bool {
        let way = match ev {
            Ev::Ask { conn, .. } if *conn != 0 => self.conns.get(conn).map(|c| (c.from, c.to)),
            Ev::Answer { conn, .. } if *conn != 0 => self.conns.get(conn).map(|c| (c.to, c.from)),
            _ => None,
        };
        let Some((from, to)) = way.filter(|(from, to)| self.is_cut(*from, *to)) else {
            if let Ev::Ask { conn, .. } = ev {
                let from_us = self.conns.get(conn).map_or(0, |c| c.asks_from_us);
                if from_us > self.now_us {
                    self.at(from_us, ev.clone());
                    return true;
                }
            }
            return false;
        };
        self.held.push((from, to, ev.clone()));
        true
    }

    /// The process ends: what it had in memory is gone, what its store has is not.
    pub(crate) fn stop_node(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        if !n.is_up {
            return;
        }
        n.is_up = false;
        n.frozen = false;
        n.deferred.clear();
        n.acceptor = None;
        n.head = None;
        n.run += 1;
        let conns: Vec<u64> = self
            .conns
            .iter()
            .filter(|(_, c)| c.from == node || c.to == node)
            .map(|(id, _)| *id)
            .collect();
        for conn in conns {
            let Some(c) = self.conns.get_mut(&conn) else {
                continue;
            };
            if c.from == node {
                c.head_open = false;
            }
            if c.to == node {
                c.replica_open = false;
            }
            let delay_us = self.rng.between(100, 20_000);
            self.after(delay_us, Ev::ClosedAtHead { conn });
            // What the dead process had sent may still arrive, and long after.
            let delay_us = match self.rng.below(3) {
                0 => self.rng.between(100, 400_000),
                _ => self.rng.between(100, 20_000),
            };
            // Behind what is on the way, as it was sent.
            let stalled_us = self.conns.get(&conn).map_or(0, |c| c.asks_from_us);
            let closed_us = (self.now_us + delay_us).max(stalled_us + 1_000);
            self.at(closed_us, Ev::ClosedAtReplica { conn });
        }
        let delay_us = self.rng.between(1_000, 400_000);
        self.after(delay_us, Ev::StartNode { node });
    }

    pub(crate) fn start_node(&mut self, node: usize) {
        if self.nodes[node].is_up {
            return;
        }
        self.say(|| format!("node {node} starts"));
        self.nodes[node].is_up = true;
        if self.nodes[node].disk.poisoned {
            // What was not synced may be gone, as after a power cut, but the boot is the same.
            let mut rng = self.rng.clone();
            self.nodes[node].disk.lose_power(&mut rng);
            self.rng = rng;
            self.nodes[node].store_failed = true;
        }
        self.start_acceptor(node);
        self.nodes[node].store_failed = false;
        // The mark is durable from here on.
        let n = &mut self.nodes[node];
        if let Some(acceptor) = &n.acceptor
            && (acceptor.lost() || n.seal.is_some())
        {
            n.seal = Some(acceptor.seal());
        }
    }

    pub(super) fn thaw(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        if !n.frozen {
            return;
        }
        n.frozen = false;
        let deferred = std::mem::take(&mut n.deferred);
        self.say(|| format!("node {node} thaws"));
        for ev in deferred {
            self.after(0, ev);
        }
    }

    pub(super) fn start_head(&mut self, node: usize) {
        let n = &self.nodes[node];
        if !n.is_up || n.frozen || n.head.is_some() || self.meta.is_away {
            return;
        }
        let record = self.meta.record.clone();
        let (head, claim) = self.new_claim(node);
        self.say(|| format!("head {head} starts on node {node}"));
        Driver::start(self, node, head, claim, record);
    }
}
