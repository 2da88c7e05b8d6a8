//! A client's requests: begun where the head has their range free, sent where it says, answered when it says so.

use ashlar_core::records::SetIndex;
use ashlar_core::replication::wire::Status;
use ashlar_core::replication::{
    FlushAdmission, Outcome, ReadAdmission, ReplicaMask, WriteAdmission,
};
use ashlar_core::store::ExtentKey;
use ashlar_core::units::{CHUNK_BLOCKS, ChunkIndex, LayerId, Version};
use ashlar_core::volume::{Access, Began, BlockRange};
use smallvec::SmallVec;

use super::{Driver, For, Request};
use crate::client::{ClientOp, Kind};
use crate::disk::Content;
use crate::message::{Found, What};
use crate::world::World;

impl Driver {
    pub(crate) fn submit(&mut self, world: &mut World, node: usize, id: u64, what: ClientOp) {
        if !self.is_serving || what.generation != self.generation {
            return;
        }
        let (chunk, first) = world.client.histories[what.blocks.start].at;
        let count = what.blocks.len() as u32;
        let mut request = Request {
            what,
            chunk,
            first,
            count,
            ticket: None,
            version: Version::NONE,
            tried: ReplicaMask(0),
        };
        let access = match request.what.kind {
            Kind::Write { .. } => Access::Exclusive,
            Kind::Read { .. } => Access::Shared,
            Kind::Flush { .. } => {
                self.requests.insert(id, request);
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
    pub(super) fn go_on(&mut self, world: &mut World, node: usize, id: u64) {
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

    pub(super) fn read(
        &mut self,
        world: &mut World,
        node: usize,
        id: u64,
        set: SetIndex,
        tried: ReplicaMask,
    ) {
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

    pub(super) fn on_read(
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
    pub(super) fn reads_again(&mut self, world: &mut World, node: usize) {
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

    pub(super) fn outcome(&mut self, world: &mut World, node: usize, outcome: Outcome) {
        match outcome {
            Outcome::Pending => {}
            Outcome::Acknowledge(id) => self.finish(world, node, id, Ok(Vec::new())),
            Outcome::Fail(id, status) => self.finish(world, node, id, Err(status)),
        }
    }

    /// Answers the client and gives the range back.
    pub(super) fn finish(
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

    pub(super) fn go_on_started(&mut self, world: &mut World, node: usize) {
        while let Some(started) = self.started.pop_front() {
            if let Some(request) = self.requests.get_mut(&started.tag) {
                request.version = started.version;
                request.ticket = Some(started.ticket);
                self.go_on(world, node, started.tag);
            }
        }
    }
}
