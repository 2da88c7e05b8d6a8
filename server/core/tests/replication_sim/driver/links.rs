//! The links of a head to its members, the sessions on them, and what is answered there.

use ashlar_core::replication::wire::Status;
use ashlar_core::replication::{Event, MemberId, ReplicatedHead};

use super::{Driver, For};
use crate::message::{Answer, Ask, Found, What};
use crate::world::{Ev, World};

impl Driver {
    pub(super) fn node_of(world: &World, head: &ReplicatedHead, member: MemberId) -> usize {
        let store = head.member(member).store;
        world
            .nodes
            .iter()
            .position(|node| node.store == store)
            .expect("a store of some node")
    }

    pub(crate) fn try_connect(&mut self, world: &mut World, node: usize, member: u8) {
        let member = MemberId(member);
        if !self.wanted.contains(&member) || self.links.contains_key(&member) {
            return;
        }
        let to = Driver::node_of(world, &self.head, member);
        let conn = if to == node {
            if world.nodes[node].disk.poisoned {
                None
            } else {
                Some(0)
            }
        } else {
            let reachable = world.nodes[to].is_up
                && !world.nodes[to].frozen
                && world.cuts.get(&(node, to)).is_none_or(|count| *count == 0)
                && world.cuts.get(&(to, node)).is_none_or(|count| *count == 0);
            reachable.then(|| world.connect(node, to))
        };
        match conn {
            Some(conn) => {
                self.links.insert(member, conn);
                self.event(world, node, Event::LinkUp { member });
            }
            None => self.connect_later(world, node, member),
        }
    }

    pub(super) fn connect_later(&mut self, world: &mut World, node: usize, member: MemberId) {
        let delay_us = world.rng.between(500, 20_000);
        let run = world.nodes[node].run;
        world.after(
            delay_us,
            Ev::Connect {
                node,
                run,
                head: self.id,
                member: member.0,
            },
        );
    }

    pub(crate) fn on_link_down(&mut self, world: &mut World, node: usize, conn: u64) {
        let Some(member) = self
            .links
            .iter()
            .find(|(_, link)| **link == conn)
            .map(|(member, _)| *member)
        else {
            return;
        };
        self.links.remove(&member);
        self.end_session(member);
        self.event(world, node, Event::LinkDown { member });
        self.connect_later(world, node, member);
    }

    /// What a member had been asked on the session of before is not answered any more; reads are asked again.
    pub(super) fn end_session(&mut self, member: MemberId) {
        self.sessions.remove(&member);
        let gone: Vec<u64> = self
            .pending
            .iter()
            .filter(|(_, (at, _))| *at == member)
            .map(|(op, _)| *op)
            .collect();
        for op in gone {
            if let Some((_, For::Read { request, .. })) = self.pending.remove(&op) {
                self.parked.push(request);
            }
        }
    }

    pub(super) fn send(
        &mut self,
        world: &mut World,
        node: usize,
        member: MemberId,
        purpose: For,
        what: What,
    ) {
        let op = world.next_op;
        world.next_op += 1;
        self.pending.insert(op, (member, purpose));
        if let Some(session) = self.sessions.get(&member) {
            let ask = Ask::Op {
                tag: session.tag,
                epoch: session.epoch,
                op,
                what,
            };
            let conn = session.conn;
            world.ask(node, conn, ask);
        }
    }

    pub(crate) fn on_answer(&mut self, world: &mut World, node: usize, conn: u64, answer: Answer) {
        let tag = match &answer {
            Answer::Alive { sent_us } => {
                let open = self
                    .sessions
                    .iter()
                    .find(|(_, session)| session.conn == conn && session.is_open);
                if let Some(member) = open.map(|(member, _)| *member) {
                    let sent_at_us = *sent_us;
                    self.event(world, node, Event::Alive { member, sent_at_us });
                    self.reads_again(world, node);
                }
                return;
            }
            Answer::Opened { tag, .. }
            | Answer::Refused { tag, .. }
            | Answer::Fenced { tag, .. }
            | Answer::Done { tag, .. } => *tag,
        };
        let known = self
            .sessions
            .iter_mut()
            .find(|(_, session)| session.conn == conn && session.tag == tag);
        let Some((member, session)) = known else {
            // Of the end of a session, or of one that has ended.
            if let Answer::Done { op, result, .. } = answer
                && let Some((_, For::Query(query))) = self.pending.remove(&op)
            {
                let status = result.err().unwrap_or(Status::Ok);
                self.event(world, node, Event::Done { query, status });
            }
            return;
        };
        let (member, opening, sent_at_us) = (*member, session.opening, session.sent_us);
        match answer {
            Answer::Opened { lost_power, .. } => {
                session.is_open = true;
                self.event(
                    world,
                    node,
                    Event::Opened {
                        member,
                        opening,
                        sent_at_us,
                        lost_power,
                    },
                );
            }
            Answer::Refused { status, epoch, .. } => {
                self.sessions.remove(&member);
                self.event(
                    world,
                    node,
                    Event::OpenRefused {
                        member,
                        opening,
                        status,
                        epoch,
                    },
                );
            }
            Answer::Fenced { epoch, .. } => {
                self.event(world, node, Event::Fenced { member, epoch });
            }
            Answer::Done { op, result, .. } => self.on_op_done(world, node, op, result),
            Answer::Alive { .. } => {}
        }
        self.reads_again(world, node);
    }

    fn on_op_done(
        &mut self,
        world: &mut World,
        node: usize,
        op: u64,
        result: Result<Found, Status>,
    ) {
        let Some((member, purpose)) = self.pending.remove(&op) else {
            return;
        };
        let status = result.as_ref().err().copied().unwrap_or(Status::Ok);
        match purpose {
            For::Write { op, place } => {
                let mut actions = Vec::new();
                let outcome = self
                    .head
                    .answered(op, place, status, world.now_us, &mut actions);
                self.outcome(world, node, outcome);
                self.carry_out(world, node, actions);
            }
            For::Flush { op } => {
                let mut actions = Vec::new();
                let outcome =
                    self.head
                        .flush_answered(op, member, status, world.now_us, &mut actions);
                self.outcome(world, node, outcome);
                self.carry_out(world, node, actions);
            }
            For::Read { request, place } => self.on_read(world, node, request, place, result),
            For::Query(query) => {
                let event = match result {
                    Ok(Found::Rows(rows)) => Event::Rows {
                        query,
                        result: Ok(rows),
                    },
                    Ok(Found::Leaf(states)) => Event::Leaf {
                        query,
                        result: Ok(states),
                    },
                    _ => Event::Done { query, status },
                };
                self.event(world, node, event);
            }
            For::CopyRead(copy) => {
                if let Ok(Found::Data(contents)) = result {
                    self.copies.insert(copy, contents);
                }
                self.event(world, node, Event::CopyRead { copy, status });
                assert!(
                    !(self.copies.contains_key(&copy) && self.ended_copies.contains(&copy)),
                    "what was read for a copy that had ended is kept for ever"
                );
            }
            For::CopyWrite(copy) => self.event(
                world,
                node,
                Event::CopyWritten {
                    copy,
                    member,
                    status,
                },
            ),
        }
    }
}
