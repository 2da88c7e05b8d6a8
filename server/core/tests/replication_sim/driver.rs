//! What the shell does for a head: carries its actions out, sends client requests where it says, and reports.

mod actions;
mod links;
mod requests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ashlar_core::records::{HeadClaim, Versioned, VolumeRecord};
use ashlar_core::replication::{
    CopyId, Event, HeadParams, MemberId, OpKey, QueryId, ReplicaMask, ReplicatedHead,
};
use ashlar_core::store::ExtentKey;
use ashlar_core::units::{ChunkIndex, Epoch, LayerId, Version};
use ashlar_core::volume::{Started, Ticket};

use crate::client::ClientOp;
use crate::disk::{At, Content};
use crate::message::Ask;
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
    /// When it is called for a fill that waits.
    pub(crate) fill_due_us: u64,
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
            fill_bytes_per_second: world.fill_bytes_per_second,
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
            fill_due_us: 0,
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

    /// A scrub found blocks of a copy that cannot be read.
    pub(crate) fn repair(
        &mut self,
        world: &mut World,
        node: usize,
        copy: usize,
        block: At,
        count: u32,
    ) {
        let mut sessions = self.sessions.keys().copied();
        let member = sessions.find(|member| Self::node_of(world, &self.head, *member) == copy);
        let Some(member) = member else { return };
        let extent = ExtentKey {
            layer: LayerId(1),
            chunk: ChunkIndex(block.0),
        };
        let mut actions = Vec::new();
        self.head
            .repair(Some(member), extent, block.1, count, &mut actions);
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

    pub(crate) fn go_on_filling(&mut self, world: &mut World, node: usize) {
        self.fill_due_us = 0;
        let mut actions = Vec::new();
        self.head.on_tick(world.now_us, &mut actions);
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
}
