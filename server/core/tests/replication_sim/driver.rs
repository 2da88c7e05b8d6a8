//! What the shell does for a head: carries its actions out, sends client requests where it says, and reports.

mod actions;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ashlar_core::records::{HeadClaim, SetIndex, Versioned, VolumeRecord};
use ashlar_core::replication::wire::Status;
use ashlar_core::replication::{
    CopyId, Event, FlushAdmission, HeadParams, MemberId, OpKey, Outcome, QueryId, ReadAdmission,
    ReplicaMask, ReplicatedHead, WriteAdmission,
};
use ashlar_core::store::ExtentKey;
use ashlar_core::units::{CHUNK_BLOCKS, ChunkIndex, Epoch, LayerId, Version};
use ashlar_core::volume::{Access, Began, BlockRange, Started, Ticket};
use smallvec::SmallVec;

use crate::client::{ClientOp, Kind};
use crate::disk::{At, Content};
use crate::message::{Answer, Ask, Found, What};
use crate::world::{Ev, HEARTBEAT_US, LEASE_US, WRITE_TIMEOUT_US, World};

struct Session {
    conn: u64,
    tag: u32,
    epoch: Epoch,
    opening: u64,
    sent_us: u64,
    is_open: bool,
}

#[derive(Clone, Copy, Debug)]
enum For {
    Write { op: OpKey, place: u8 },
    Read { request: u64, place: u8 },
    Flush { op: OpKey },
    Query(QueryId),
    CopyRead(CopyId),
    CopyWrite(CopyId),
}

/// A client's request. It touches one chunk.
struct Request {
    what: ClientOp,
    chunk: u32,
    first: u32,
    count: u32,
    ticket: Option<Ticket>,
    version: Version,
    tried: ReplicaMask,
}

pub(crate) struct Driver {
    pub(crate) id: u64,
    pub(crate) head: ReplicatedHead,
    pub(crate) is_serving: bool,
    pub(crate) generation: u64,
    wanted: Vec<MemberId>,
    links: BTreeMap<MemberId, u64>,
    sessions: BTreeMap<MemberId, Session>,
    next_tag: u32,
    pending: BTreeMap<u64, (MemberId, For)>,
    requests: BTreeMap<u64, Request>,
    parked: Vec<u64>,
    copies: BTreeMap<CopyId, Vec<Content>>,
    ended_copies: BTreeSet<CopyId>,
    started: VecDeque<Started>,
}

impl Driver {
    pub(crate) fn start(
        world: &mut World,
        node: usize,
        id: u64,
        claim: HeadClaim,
        record: Versioned<VolumeRecord>,
    ) {
        let mut actions = Vec::new();
        let params = HeadParams {
            rules: world.rules,
            lease_us: LEASE_US,
            write_timeout_us: WRITE_TIMEOUT_US,
            resync_backoff_us: 20_000,
            resync_leaves: 2,
            ..HeadParams::new(world.nodes[node].id, claim)
        };
        let head = ReplicatedHead::new(params, record, world.now_us, &mut actions);
        let mut driver = Box::new(Driver {
            id,
            head,
            is_serving: false,
            generation: 0,
            wanted: Vec::new(),
            links: BTreeMap::new(),
            sessions: BTreeMap::new(),
            // Tags of earlier heads of the node mean their sessions.
            next_tag: (id as u32) << 12,
            pending: BTreeMap::new(),
            requests: BTreeMap::new(),
            parked: Vec::new(),
            copies: BTreeMap::new(),
            ended_copies: BTreeSet::new(),
            started: VecDeque::new(),
        });
        driver.carry_out(world, node, actions);
        let run = world.nodes[node].run;
        world.nodes[node].head = Some(driver);
        world.after(
            HEARTBEAT_US,
            Ev::Tick {
                node,
                run,
                head: id,
            },
        );
    }

    /// Somebody has the copy of a node put out of sync.
    pub(crate) fn distrust(&mut self, world: &mut World, node: usize, copy: usize) {
        let store = crate::world::store_of(copy);
        let mut actions = Vec::new();
        self.head.distrust(store, world.now_us, &mut actions);
        self.carry_out(world, node, actions);
    }

    /// A scrub found a block of a copy that cannot be read.
    pub(crate) fn repair(&mut self, world: &mut World, node: usize, copy: usize, block: At) {
        let mut sessions = self.sessions.keys().copied();
        let member = sessions.find(|member| Self::node_of(world, &self.head, *member) == copy);
        let Some(member) = member else { return };
        let extent = ExtentKey {
            layer: LayerId(1),
            chunk: ChunkIndex(block.0),
        };
        let mut actions = Vec::new();
        self.head
            .repair(Some(member), extent, block.1, 1, &mut actions);
        self.carry_out(world, node, actions);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.head.stopped().is_some()
    }

    /// No request is waiting or under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.requests.is_empty()
    }

    pub(crate) fn close_links(&mut self, world: &mut World) {
        for conn in self.links.values().copied().filter(|conn| *conn != 0) {
            world.break_connection(conn);
        }
    }

    pub(crate) fn event(&mut self, world: &mut World, node: usize, event: Event) {
        let mut actions = Vec::new();
        self.head.on_event(world.now_us, event, &mut actions);
        self.carry_out(world, node, actions);
    }

    pub(crate) fn on_tick(&mut self, world: &mut World, node: usize) {
        let sent_us = world.now_us;
        let conns: Vec<u64> = self
            .sessions
            .iter()
            .filter(|(_, session)| session.is_open && session.conn != 0)
            .map(|(_, session)| session.conn)
            .collect();
        for conn in conns {
            world.ask(node, conn, Ask::Heartbeat { sent_us });
        }
        let mut actions = Vec::new();
        self.head.on_tick(world.now_us, &mut actions);
        self.carry_out(world, node, actions);
        let run = world.nodes[node].run;
        world.after(
            HEARTBEAT_US,
            Ev::Tick {
                node,
                run,
                head: self.id,
            },
        );
    }

    // -- links

    fn node_of(world: &World, head: &ReplicatedHead, member: MemberId) -> usize {
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

    fn connect_later(&mut self, world: &mut World, node: usize, member: MemberId) {
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
    fn end_session(&mut self, member: MemberId) {
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

    fn send(&mut self, world: &mut World, node: usize, member: MemberId, purpose: For, what: What) {
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

    // -- requests

    pub(crate) fn submit(&mut self, world: &mut World, node: usize, id: u64, what: ClientOp) {
        if !self.is_serving || what.generation != self.generation {
            return;
        }
        let (chunk, first) = world.client.histories[what.blocks.start].at;
        let count = what.blocks.len() as u32;
        let access = match what.kind {
            Kind::Write { .. } => Access::Exclusive,
            Kind::Read { .. } => Access::Shared,
            Kind::Flush { .. } => {
                self.requests.insert(
                    id,
                    Request {
                        what,
                        chunk,
                        first,
                        count,
                        ticket: None,
                        version: Version::NONE,
                        tried: ReplicaMask(0),
                    },
                );
                self.go_on(world, node, id);
                return;
            }
        };
        let start = u64::from(chunk) * u64::from(CHUNK_BLOCKS) + u64::from(first);
        let range = BlockRange::new(start, start + u64::from(count)).expect("not empty");
        let began = match self.head.begin(access, range, id) {
            Ok(began) => began,
            Err(refusal) => panic!("a request was refused: {refusal}"),
        };
        let mut request = Request {
            what,
            chunk,
            first,
            count,
            ticket: None,
            version: Version::NONE,
            tried: ReplicaMask(0),
        };
        match began {
            Began::Now(started) => {
                request.ticket = Some(started.ticket);
                request.version = started.version;
                self.requests.insert(id, request);
                self.go_on(world, node, id);
            }
            Began::Waiting(ticket) => {
                request.ticket = Some(ticket);
                self.requests.insert(id, request);
            }
        }
    }

    /// Sends a request that holds its range.
    fn go_on(&mut self, world: &mut World, node: usize, id: u64) {
        let Some(request) = self.requests.get(&id) else {
            return;
        };
        let (chunk, first, count, version, tried) = (
            request.chunk,
            request.first,
            request.count,
            request.version,
            request.tried,
        );
        let set = self.head.set_of(ChunkIndex(chunk));
        match request.what.kind.clone() {
            Kind::Write {
                contents,
                zeros,
                durable,
                ..
            } => {
                let extent = ExtentKey {
                    layer: LayerId(1),
                    chunk: ChunkIndex(chunk),
                };
                match self
                    .head
                    .admit_write(set, extent, first, count, id, version, world.now_us)
                {
                    WriteAdmission::Send {
                        op,
                        version,
                        targets,
                    } => {
                        for place in targets.places() {
                            let member = self.head.replica(set, place as u8);
                            self.send(
                                world,
                                node,
                                member,
                                For::Write {
                                    op,
                                    place: place as u8,
                                },
                                What::Write {
                                    chunk,
                                    first,
                                    contents: contents.clone(),
                                    version,
                                    zeros,
                                    durable,
                                },
                            );
                        }
                    }
                    WriteAdmission::Wait => self.parked.push(id),
                    WriteAdmission::Stopped => {}
                }
            }
            Kind::Read { .. } => self.read(world, node, id, set, tried),
            Kind::Flush { .. } => match self.head.begin_flush(id, world.now_us) {
                FlushAdmission::Send { op, members } => {
                    for member in members {
                        self.send(world, node, member, For::Flush { op }, What::Flush);
                    }
                }
                FlushAdmission::Wait => self.parked.push(id),
                FlushAdmission::Stopped => {}
            },
        }
    }

    fn read(&mut self, world: &mut World, node: usize, id: u64, set: SetIndex, tried: ReplicaMask) {
        let Some(request) = self.requests.get(&id) else {
            return;
        };
        let (chunk, first, count) = (request.chunk, request.first, request.count);
        match self.head.admit_read(set, tried, world.now_us) {
            ReadAdmission::From { member, place } => self.send(
                world,
                node,
                member,
                For::Read { request: id, place },
                What::Read {
                    chunk,
                    first,
                    count,
                },
            ),
            ReadAdmission::Wait => self.parked.push(id),
            ReadAdmission::Exhausted => self.finish(world, node, id, Err(Status::Corrupt)),
            ReadAdmission::Stopped => {}
        }
    }

    fn on_read(
        &mut self,
        world: &mut World,
        node: usize,
        id: u64,
        place: u8,
        result: Result<Found, Status>,
    ) {
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        match result {
            Ok(Found::Data(contents)) => {
                let repair =
                    (request.tried.0 != 0).then_some((request.chunk, request.first, request.count));
                self.finish(world, node, id, Ok(contents));
                if let Some((chunk, first, count)) = repair {
                    let extent = ExtentKey {
                        layer: LayerId(1),
                        chunk: ChunkIndex(chunk),
                    };
                    let mut actions = Vec::new();
                    self.head.repair(None, extent, first, count, &mut actions);
                    self.carry_out(world, node, actions);
                }
            }
            Err(Status::Corrupt | Status::Device) => {
                request.tried.0 |= 1 << place;
                let (chunk, tried) = (request.chunk, request.tried);
                let set = self.head.set_of(ChunkIndex(chunk));
                self.read(world, node, id, set, tried);
            }
            _ => self.parked.push(id),
        }
    }

    /// Reads whose member was lost ask again. What else is parked waits for `Retry`.
    fn reads_again(&mut self, world: &mut World, node: usize) {
        let reads: Vec<u64> = self
            .parked
            .iter()
            .copied()
            .filter(|id| {
                self.requests
                    .get(id)
                    .is_some_and(|r| matches!(r.what.kind, Kind::Read { .. }))
            })
            .collect();
        if reads.is_empty() {
            return;
        }
        self.parked.retain(|id| !reads.contains(id));
        for id in reads {
            self.go_on(world, node, id);
        }
    }

    fn outcome(&mut self, world: &mut World, node: usize, outcome: Outcome) {
        match outcome {
            Outcome::Pending => {}
            Outcome::Acknowledge(id) => self.finish(world, node, id, Ok(Vec::new())),
            Outcome::Fail(id, status) => self.finish(world, node, id, Err(status)),
        }
    }

    /// Answers the client and gives the range back.
    fn finish(
        &mut self,
        world: &mut World,
        node: usize,
        id: u64,
        result: Result<Vec<Content>, Status>,
    ) {
        let Some(request) = self.requests.remove(&id) else {
            return;
        };
        world.client_answered(id, result);
        if let Some(ticket) = request.ticket {
            let mut started = SmallVec::new();
            let mut actions = Vec::new();
            self.head.finish(ticket, &mut started, &mut actions);
            self.started.extend(started);
            self.carry_out(world, node, actions);
            self.go_on_started(world, node);
        }
    }

    fn go_on_started(&mut self, world: &mut World, node: usize) {
        while let Some(started) = self.started.pop_front() {
            if let Some(request) = self.requests.get_mut(&started.tag) {
                request.version = started.version;
                request.ticket = Some(started.ticket);
                self.go_on(world, node, started.tag);
            }
        }
    }
}
