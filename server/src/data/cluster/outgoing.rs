//! The end of a link where the heads are: their sessions on it, what they asked, what the store answers.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use ashlar_core::replication::wire::{Header, Kind, LeafStates, OpenBody, Rows, Status, flags};
use ashlar_core::replication::{Event, MemberId};
use ashlar_core::store::ExtentKey;
use ashlar_core::units::{BLOCK_BYTES, Epoch, LayerId, Version};
use slab::Slab;

use super::super::thread::DataThread;
use super::link::LinkError;
use super::links::{CRC_BYTES, Role};
use super::replica::{ReplicaWork, arrived_whole};
use super::{Answer, Asked, VolumeRef, now_us};

#[derive(Default)]
pub(super) struct ToStore {
    sessions: HashMap<u32, HeadSession>,
    /// What was asked; the place is half of the number on the wire.
    asked: Slab<AskedOfPeer>,
    serial: u32,
    /// Signs of life asked for and not yet given: number and time.
    pub(super) beats: VecDeque<(u64, u64)>,
    pub(super) beat: u64,
}

struct HeadSession {
    volume: VolumeRef,
    member: MemberId,
    opening: u64,
    sent_at_us: u64,
    is_open: bool,
}

#[derive(Clone, Copy)]
struct AskedOfPeer {
    serial: u32,
    tag: u32,
    asked: Asked,
}

impl DataThread {
    pub(super) fn take_from_store(
        &mut self,
        key: usize,
        header: &Header,
        body: Range<usize>,
    ) -> Result<(), LinkError> {
        let link = &mut self.cluster.links[key];
        let Role::ToStore(to) = &mut link.role else {
            return Ok(());
        };
        match header.kind {
            Kind::Opened => {
                let Some(session) = to.sessions.get_mut(&header.session) else {
                    return Ok(());
                };
                let (volume, member, opening) = (session.volume, session.member, session.opening);
                let event = if header.status == Status::Ok {
                    session.is_open = true;
                    Event::Opened {
                        member,
                        opening,
                        sent_at_us: session.sent_at_us,
                        lost_power: header.flags & flags::LOST_POWER != 0,
                    }
                } else {
                    to.sessions.remove(&header.session);
                    Event::OpenRefused {
                        member,
                        opening,
                        status: header.status,
                        epoch: header.epoch,
                    }
                };
                self.head_event(volume, event);
            }
            Kind::Fenced => {
                if let Some(session) = to.sessions.remove(&header.session) {
                    let event = Event::Fenced {
                        member: session.member,
                        epoch: header.epoch,
                    };
                    to.forget(header.session);
                    self.head_event(session.volume, event);
                    self.session_ended(session.volume, session.member);
                }
            }
            Kind::Damaged => {
                if let Some(session) = to.sessions.get(&header.session) {
                    let (volume, member) = (session.volume, session.member);
                    let (extent, first_block) = (header.extent, header.first_block);
                    self.with_head(volume, |head, _, actions| {
                        head.repair(Some(member), extent, first_block, header.count, actions);
                    });
                }
            }
            Kind::Alive => {
                let mut sent_at_us = None;
                while let Some((beat, at)) = to.beats.front().copied() {
                    if beat > header.op {
                        break;
                    }
                    if beat == header.op {
                        sent_at_us = Some(at);
                    }
                    to.beats.pop_front();
                }
                if let Some(sent_at_us) = sent_at_us {
                    let open: Vec<(VolumeRef, MemberId)> = to
                        .sessions
                        .values()
                        .filter(|session| session.is_open)
                        .map(|session| (session.volume, session.member))
                        .collect();
                    for (volume, member) in open {
                        self.head_event(volume, Event::Alive { member, sent_at_us });
                    }
                }
            }
            Kind::Credit => {
                link.wire.granted(header.op);
                self.make_link_busy(key);
            }
            Kind::Done | Kind::Data | Kind::Rows | Kind::Leaf => {
                let Some(asked) = to.take(header.op) else {
                    return Ok(());
                };
                let Some(session) = to.sessions.get(&asked.tag) else {
                    return Ok(());
                };
                let volume = session.volume;
                let answer = match header.kind {
                    Kind::Rows => Answer::Rows(Rows::decode(header, link.wire.body(body))?),
                    Kind::Leaf => Answer::Leaf(LeafStates::decode(header, link.wire.body(body))?),
                    Kind::Data if header.flags & flags::ZEROS != 0 => Answer::Data {
                        count: header.count,
                        buffer: None,
                    },
                    Kind::Data => {
                        let bytes = link.wire.body(body);
                        let (crcs, data) = bytes.split_at(header.count as usize * CRC_BYTES);
                        if arrived_whole(crcs, data) {
                            let mut buffer = self.pool.take(data.len());
                            buffer.put(0, data);
                            Answer::Data {
                                count: header.count,
                                buffer: Some(buffer),
                            }
                        } else {
                            Answer::Status(Status::Garbled)
                        }
                    }
                    _ => Answer::Status(header.status),
                };
                self.answered(volume, asked.tag, asked.asked, answer);
            }
            Kind::Hello
            | Kind::Welcome
            | Kind::Open
            | Kind::Close
            | Kind::Heartbeat
            | Kind::Whole
            | Kind::Write
            | Kind::Zero
            | Kind::Read
            | Kind::Flush
            | Kind::ReadRows
            | Kind::ReadLeaf => return Err(LinkError::Unexpected(header.kind)),
        }
        Ok(())
    }

    /// Opens a session over the link `key`; its tag.
    pub(super) fn open_remote(
        &mut self,
        key: usize,
        (volume, member): (VolumeRef, MemberId),
        body: &OpenBody,
        epoch: Epoch,
        layer: LayerId,
        resync: bool,
    ) -> u32 {
        let tag = self.cluster.tag();
        let link = &mut self.cluster.links[key];
        let mut header = Header::new(Kind::Open);
        header.session = tag;
        header.epoch = epoch;
        header.extent.layer = layer;
        if resync {
            header.flags |= flags::RESYNC;
        }
        let bytes = body.encode();
        link.wire.push(&header.with_body(&bytes), &[&bytes]);
        if let Role::ToStore(to) = &mut link.role {
            let session = HeadSession {
                volume,
                member,
                opening: body.opening,
                sent_at_us: now_us(),
                is_open: false,
            };
            to.sessions.insert(tag, session);
        }
        self.make_link_busy(key);
        self.cluster.look_soon(now_us());
        tag
    }

    /// Ends a session of a head of this thread. `asked`: in order, to be answered.
    pub(super) fn close_remote(&mut self, key: usize, tag: u32, asked: Option<Asked>) {
        let Some(link) = self.cluster.links.get_mut(key) else {
            return;
        };
        let Role::ToStore(to) = &mut link.role else {
            return;
        };
        let mut header = Header::new(Kind::Close);
        header.session = tag;
        match asked {
            Some(asked) => {
                header.flags |= flags::CLEAN;
                header.op = to.note(tag, asked);
            }
            None => {
                to.sessions.remove(&tag);
                to.forget(tag);
            }
        }
        link.wire.push(&header, &[]);
        self.make_link_busy(key);
    }

    /// Sends a piece of work to a peer's store.
    pub(super) fn ask_remote(
        &mut self,
        key: usize,
        tag: u32,
        epoch: Epoch,
        asked: Asked,
        work: ReplicaWork<'_>,
    ) {
        let Some(link) = self.cluster.links.get_mut(key) else {
            return;
        };
        let Role::ToStore(to) = &mut link.role else {
            return;
        };
        let op = to.note(tag, asked);
        let mut header = header_of(&work);
        header.session = tag;
        header.epoch = epoch;
        header.op = op;
        match work {
            ReplicaWork::Write { crcs, data, .. } => {
                header.body_bytes = Header::data_body_bytes((data.len() / BLOCK_BYTES) as u32);
                match crcs {
                    Some(crcs) => link.wire.push(&header, &[crcs, data]),
                    None => link.wire.push(&header, &[&checksums(data), data]),
                }
            }
            ReplicaWork::Rows { query, .. } => {
                let body = query.encode();
                link.wire.push(&header.with_body(&body), &[&body]);
            }
            ReplicaWork::Zero { .. }
            | ReplicaWork::Read { .. }
            | ReplicaWork::Flush
            | ReplicaWork::Leaf { .. } => link.wire.push(&header, &[]),
        }
        self.make_link_busy(key);
    }

    /// Tells a peer that its copy is whole.
    pub(super) fn whole_remote(&mut self, key: usize, tag: u32, epoch: Epoch, asked: Asked) {
        let Some(link) = self.cluster.links.get_mut(key) else {
            return;
        };
        let Role::ToStore(to) = &mut link.role else {
            return;
        };
        let mut header = Header::new(Kind::Whole);
        header.session = tag;
        header.epoch = epoch;
        header.op = to.note(tag, asked);
        link.wire.push(&header, &[]);
        self.make_link_busy(key);
    }
}

impl ToStore {
    /// The number on the wire of something asked.
    fn note(&mut self, tag: u32, asked: Asked) -> u64 {
        self.serial = self.serial.wrapping_add(1);
        let serial = self.serial;
        let place = self.asked.insert(AskedOfPeer { serial, tag, asked });
        place as u64 | u64::from(serial) << 32
    }

    /// What was asked under this number, once.
    fn take(&mut self, op: u64) -> Option<AskedOfPeer> {
        let (place, serial) = (op as u32 as usize, (op >> 32) as u32);
        let found = self.asked.get(place)?.serial == serial;
        found.then(|| self.asked.remove(place))
    }

    /// Nothing that was asked on a session is answered any more.
    fn forget(&mut self, tag: u32) {
        self.asked.retain(|_, asked| asked.tag != tag);
    }
}

/// The checksum of each block, as they stand in a body.
pub(super) fn checksums(data: &[u8]) -> smallvec::SmallVec<[u8; 64]> {
    let mut crcs = smallvec::SmallVec::with_capacity(data.len() / BLOCK_BYTES * CRC_BYTES);
    for block in data.chunks_exact(BLOCK_BYTES) {
        crcs.extend_from_slice(&crc32fast::hash(block).to_le_bytes());
    }
    crcs
}

fn header_of(work: &ReplicaWork<'_>) -> Header {
    let at = |kind: Kind, extent: ExtentKey, first_block: u32, count: u32| Header {
        extent,
        first_block,
        count,
        ..Header::new(kind)
    };
    let changed = |header: Header, version: Version, durable: bool| Header {
        version,
        flags: if durable { flags::DURABLE } else { 0 },
        ..header
    };
    match *work {
        ReplicaWork::Write {
            extent,
            first_block,
            version,
            data,
            durable,
            ..
        } => {
            let count = (data.len() / BLOCK_BYTES) as u32;
            changed(
                at(Kind::Write, extent, first_block, count),
                version,
                durable,
            )
        }
        ReplicaWork::Zero {
            extent,
            first_block,
            count,
            version,
            durable,
        } => changed(at(Kind::Zero, extent, first_block, count), version, durable),
        ReplicaWork::Read {
            extent,
            first_block,
            count,
        } => at(Kind::Read, extent, first_block, count),
        ReplicaWork::Flush => Header::new(Kind::Flush),
        ReplicaWork::Rows { from, .. } => {
            let mut header = Header::new(Kind::ReadRows);
            header.extent.chunk = from;
            header
        }
        ReplicaWork::Leaf { extent, leaf } => at(Kind::ReadLeaf, extent, leaf, 0),
    }
}
