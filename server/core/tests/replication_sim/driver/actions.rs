//! Carrying out what a head decides.

use ashlar_core::replication::wire::RowsQuery;
use ashlar_core::replication::{Action, ReplicaMask, SwapOutcome};

use super::{Driver, For, Session};
use crate::message::{Ask, What};
use crate::world::{Ev, World};

impl Driver {
    pub(super) fn carry_out(&mut self, world: &mut World, node: usize, actions: Vec<Action>) {
        let run = world.nodes[node].run;
        for action in actions {
            match action {
                Action::ReadRecord => {
                    let delay_us = world.rng.between(500, 5_000);
                    world.after(
                        delay_us,
                        Ev::ReadRecord {
                            node,
                            run,
                            head: self.id,
                        },
                    );
                }
                Action::Swap {
                    serial,
                    transaction,
                } => self.swap(world, node, serial, transaction),
                Action::Connect { member } => {
                    self.wanted.push(member);
                    self.connect_later(world, node, member);
                }
                Action::Disconnect { member } => {
                    self.wanted.retain(|wanted| *wanted != member);
                    if let Some(conn) = self.links.remove(&member).filter(|conn| *conn != 0) {
                        world.break_connection(conn);
                    }
                    self.end_session(member);
                }
                Action::Open {
                    member,
                    epoch,
                    opening,
                    resync,
                } => {
                    self.end_session(member);
                    let Some(conn) = self.links.get(&member).copied() else {
                        continue;
                    };
                    self.next_tag += 1;
                    let tag = self.next_tag;
                    let claim = world.meta_claim(node, self.id);
                    self.sessions.insert(
                        member,
                        Session {
                            conn,
                            tag,
                            epoch,
                            opening,
                            sent_us: world.now_us,
                            is_open: false,
                        },
                    );
                    world.ask(
                        node,
                        conn,
                        Ask::Open {
                            tag,
                            claim,
                            epoch,
                            opening,
                            resync,
                        },
                    );
                }
                Action::CloseSession { member, query } => {
                    let session = self.sessions.get(&member).map(|s| (s.conn, s.tag));
                    self.end_session(member);
                    if let Some((conn, tag)) = session {
                        let op = world.next_op;
                        world.next_op += 1;
                        if let Some(query) = query {
                            self.pending.insert(op, (member, For::Query(query)));
                        }
                        world.ask(
                            node,
                            conn,
                            Ask::Close {
                                tag,
                                clean: query.is_some(),
                                op,
                            },
                        );
                    }
                }
                Action::ReadRows {
                    query,
                    member,
                    set,
                    from,
                    floor,
                } => {
                    let sets = self.head.record().placement.sets.len() as u32;
                    let what = What::Rows {
                        query: RowsQuery {
                            sets,
                            set: u32::from(set.0),
                            floor,
                        },
                        from,
                    };
                    self.send(world, node, member, For::Query(query), what);
                }
                Action::ReadLeaf {
                    query,
                    member,
                    extent,
                    leaf,
                } => {
                    let what = What::Leaf {
                        chunk: extent.chunk.0,
                        leaf,
                    };
                    self.send(world, node, member, For::Query(query), what);
                }
                Action::Flush { query, member } => {
                    self.send(world, node, member, For::Query(query), What::Flush);
                }
                Action::Whole { query, member } => {
                    self.send(world, node, member, For::Query(query), What::Whole);
                }
                Action::CopyRead {
                    copy,
                    member,
                    extent,
                    first_block,
                    count,
                } => {
                    let what = What::Read {
                        chunk: extent.chunk.0,
                        first: first_block,
                        count,
                    };
                    self.send(world, node, member, For::CopyRead(copy), what);
                }
                Action::CopyWrite {
                    copy,
                    member,
                    extent,
                    first_block,
                    count,
                    version,
                    zeros,
                } => {
                    let contents = if zeros {
                        vec![0; count as usize]
                    } else {
                        self.copies[&copy].clone()
                    };
                    let what = What::Write {
                        chunk: extent.chunk.0,
                        first: first_block,
                        contents,
                        version,
                        zeros,
                        durable: false,
                    };
                    self.send(world, node, member, For::CopyWrite(copy), what);
                }
                Action::CopyEnd { copy } => {
                    self.copies.remove(&copy);
                    // Answers that are under way still come.
                    self.ended_copies.insert(copy);
                }
                Action::Retry => {
                    for id in std::mem::take(&mut self.parked) {
                        if let Some(request) = self.requests.get_mut(&id) {
                            request.tried = ReplicaMask(0);
                        }
                        self.go_on(world, node, id);
                    }
                }
                Action::Acknowledge { tag } | Action::Flushed { tag } => {
                    self.finish(world, node, tag, Ok(Vec::new()));
                }
                Action::Redo { tag, version } => {
                    if let Some(request) = self.requests.get_mut(&tag) {
                        request.version = version;
                        self.go_on(world, node, tag);
                    }
                }
                Action::Fail { tag, status } => self.finish(world, node, tag, Err(status)),
                Action::FlushAgain { tag } => self.parked.push(tag),
                Action::Started(started) => {
                    self.started.push_back(started);
                    self.go_on_started(world, node);
                }
                Action::Serving { client_generation } => {
                    world
                        .say(|| format!("head {} serves, generation {client_generation}", self.id));
                    self.is_serving = true;
                    self.generation = client_generation;
                }
                Action::EndSessions { client_generation } => {
                    world.client_session_ended(client_generation);
                    self.generation = client_generation;
                }
                Action::Stopped(_) => self.is_serving = false,
                Action::News(news) => world.say(|| format!("head {}: {news:?}", self.id)),
            }
        }
    }

    fn swap(
        &mut self,
        world: &mut World,
        node: usize,
        serial: u64,
        transaction: ashlar_core::records::Transaction,
    ) {
        let run = world.nodes[node].run;
        let head = self.id;
        let unknown = !world.healing && world.rng.chance(world.faults.unknown_swaps);
        let arrives_us = if unknown && world.rng.chance(30) {
            world.rng.between(1_000, 300_000)
        } else {
            world.rng.between(500, 5_000)
        };
        let never = unknown && world.rng.chance(40);
        if !never {
            world.after(
                arrives_us,
                Ev::SwapArrives {
                    node,
                    run,
                    head,
                    serial,
                    transaction,
                    is_known: !unknown,
                },
            );
        }
        if unknown {
            let delay_us = world.rng.between(1_000, 50_000);
            world.after(
                delay_us,
                Ev::Swapped {
                    node,
                    run,
                    head,
                    serial,
                    outcome: SwapOutcome::Unknown,
                },
            );
        }
    }
}
