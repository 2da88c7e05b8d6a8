//! The end of a link where the store is: sessions of a peer's heads, their work, and what they are answered.

use std::collections::HashMap;
use std::ops::Range;

use ashlar_core::replication::wire::{
    Header, Kind, MAX_MESSAGE_BLOCKS, OpenBody, RowsQuery, Status, flags,
};
use ashlar_core::replication::{AcceptorEvent, LinkId, SessionRef};
use ashlar_core::store::ExtentKey;
use ashlar_core::units::{BLOCK_BYTES, Epoch, Version};

use super::super::thread::DataThread;
use super::link::LinkError;
use super::links::{CRC_BYTES, LinkRef, Role};
use super::outgoing::checksums;
use super::replica::ReplicaWork;
use super::{Answer, Origin, now_us};

pub(super) struct FromHead {
    pub(super) store: usize,
    pub(super) sessions: HashMap<u32, usize>,
    pub(super) heard_at_us: u64,
}

impl DataThread {
    pub(super) fn take_from_head(
        &mut self,
        key: usize,
        header: &Header,
        body: Range<usize>,
    ) -> Result<(), LinkError> {
        let link = &mut self.cluster.links[key];
        let Role::FromHead(from) = &mut link.role else {
            return Ok(());
        };
        from.heard_at_us = now_us();
        let store = from.store;
        let (id, tag) = (link.id, header.session);
        let session = SessionRef { link: id, tag };
        let origin = Origin::Peer {
            link: LinkRef { key, id },
            tag,
            op: header.op,
            credit_bytes: if header.kind == Kind::Write {
                header.body_bytes
            } else {
                0
            },
        };
        let replica = from.sessions.get(&tag).copied();
        match header.kind {
            Kind::Open => {
                let open = OpenBody::decode(header, link.wire.body(body))?;
                // A node may open a volume in its own name only.
                if open.claim.node != link.peer.node {
                    self.open_refused(session, Status::Refused, header.epoch);
                    return Ok(());
                }
                let layer = header.extent.layer;
                if !self.may_be_replica_of(open.volume, store, layer) {
                    tracing::warn!(node = %open.claim.node.0, volume = %open.volume.0, layer = layer.0, "a peer opens a volume with a layer of another one");
                    self.open_refused(session, Status::Refused, header.epoch);
                    return Ok(());
                }
                let replica = self.replica_of(open.volume, store, layer);
                if let Role::FromHead(from) = &mut self.cluster.links[key].role {
                    from.sessions.insert(tag, replica);
                }
                self.acceptor_event(
                    replica,
                    AcceptorEvent::Open {
                        session,
                        claim: open.claim,
                        epoch: header.epoch,
                        opening: open.opening,
                        resync: header.flags & flags::RESYNC != 0,
                    },
                );
            }
            Kind::Close => {
                from.sessions.remove(&tag);
                if let Some(replica) = replica {
                    let clean = header.flags & flags::CLEAN != 0;
                    let op = header.op;
                    self.acceptor_event(replica, AcceptorEvent::Close { session, clean, op });
                }
            }
            Kind::Whole => match replica {
                Some(replica) => {
                    let op = header.op;
                    self.acceptor_event(replica, AcceptorEvent::Whole { session, op });
                }
                None => self.answer(origin, Answer::Status(Status::Fenced)),
            },
            Kind::Heartbeat => {
                let mut alive = Header::new(Kind::Alive);
                alive.op = header.op;
                let status = self.stores[store].store.status();
                alive.version = Version(status.capacity_blocks.saturating_sub(status.used_blocks));
                self.cluster.links[key].wire.push(&alive, &[]);
                self.make_link_busy(key);
            }
            Kind::Write
            | Kind::Zero
            | Kind::Read
            | Kind::Flush
            | Kind::ReadRows
            | Kind::ReadLeaf => {
                let Some(replica) = replica else {
                    self.answer(origin, Answer::Status(Status::Fenced));
                    return Ok(());
                };
                let bytes: *const [u8] = link.wire.body(body);
                // SAFETY: the inbox is neither moved nor written to before the next `receive` on this link, and the
                // link is not removed while a message of it is served: `end_link` is called between messages only.
                let bytes = unsafe { &*bytes };
                let work = work_of(header, bytes)?;
                self.replica_work(replica, session, header.epoch, origin, work);
            }
            Kind::Hello
            | Kind::Welcome
            | Kind::Opened
            | Kind::Fenced
            | Kind::Alive
            | Kind::Credit
            | Kind::Damaged
            | Kind::Done
            | Kind::Data
            | Kind::Rows
            | Kind::Leaf => return Err(LinkError::Unexpected(header.kind)),
        }
        Ok(())
    }

    fn push_to(&mut self, link: LinkRef, header: &Header, parts: &[&[u8]]) {
        if let Some(found) = self.cluster.links.get_mut(link.key)
            && found.id == link.id
        {
            found.wire.push(header, parts);
            self.make_link_busy(link.key);
        }
    }

    fn key_of(&self, id: LinkId) -> Option<LinkRef> {
        let found = self.cluster.links.iter().find(|(_, link)| link.id == id);
        found.map(|(key, _)| LinkRef { key, id })
    }

    pub(super) fn opened(&mut self, session: SessionRef, epoch: Epoch, lost_power: bool) {
        if session.link == LinkId::LOCAL {
            return self.local_opened(session.tag, lost_power);
        }
        let Some(link) = self.key_of(session.link) else {
            return;
        };
        let mut header = Header::new(Kind::Opened);
        header.session = session.tag;
        header.epoch = epoch;
        if lost_power {
            header.flags |= flags::LOST_POWER;
        }
        self.push_to(link, &header, &[]);
    }

    pub(super) fn open_refused(&mut self, session: SessionRef, status: Status, epoch: Epoch) {
        if session.link == LinkId::LOCAL {
            return self.local_open_refused(session.tag, status, epoch);
        }
        let Some(link) = self.key_of(session.link) else {
            return;
        };
        let mut header = Header::new(Kind::Opened);
        header.session = session.tag;
        header.status = status;
        header.epoch = epoch;
        self.push_to(link, &header, &[]);
    }

    pub(super) fn fenced(&mut self, session: SessionRef, epoch: Epoch) {
        if session.link == LinkId::LOCAL {
            return self.local_fenced(session.tag, epoch);
        }
        let Some(link) = self.key_of(session.link) else {
            return;
        };
        let mut header = Header::new(Kind::Fenced);
        header.session = session.tag;
        header.epoch = epoch;
        self.push_to(link, &header, &[]);
    }

    /// A scrub found blocks of a replica that cannot be read: its head is told, which has good ones. Without a head, or when
    /// it is busy with others, the next scrub finds them again.
    pub(in super::super) fn replica_is_damaged(
        &mut self,
        store: usize,
        extent: ExtentKey,
        first_block: u32,
        count: u32,
    ) {
        let mut replicas = self.cluster.replicas.iter().map(|(_, replica)| replica);
        let session = replicas
            .find(|replica| replica.store == store && replica.layer == extent.layer)
            .and_then(|replica| replica.acceptor.session());
        let Some(session) = session else { return };
        let link = self.key_of(session.link);
        let end = first_block + count;
        for first_block in (first_block..end).step_by(MAX_MESSAGE_BLOCKS as usize) {
            let count = (end - first_block).min(MAX_MESSAGE_BLOCKS);
            if session.link == LinkId::LOCAL {
                self.local_damaged(session.tag, extent, first_block, count);
            } else if let Some(link) = link {
                let mut header = Header::new(Kind::Damaged);
                header.session = session.tag;
                header.extent = extent;
                header.first_block = first_block;
                header.count = count;
                self.push_to(link, &header, &[]);
            }
        }
    }

    pub(super) fn acceptor_done(&mut self, session: SessionRef, op: u64, status: Status) {
        if session.link == LinkId::LOCAL {
            return self.local_query_done(session.tag, op, status);
        }
        let Some(link) = self.key_of(session.link) else {
            return;
        };
        let mut header = Header::new(Kind::Done);
        header.session = session.tag;
        header.op = op;
        header.status = status;
        self.push_to(link, &header, &[]);
    }

    /// Gives an answer to whoever asked.
    pub(in super::super) fn answer(&mut self, origin: Origin, answer: Answer) {
        let (link, tag, op, credit_bytes) = match origin {
            Origin::Head { volume, tag, asked } => {
                return self.answered(volume, tag, asked, answer);
            }
            Origin::Peer {
                link,
                tag,
                op,
                credit_bytes,
            } => (link, tag, op, credit_bytes),
        };
        let mut header = Header::new(Kind::Done);
        header.session = tag;
        header.op = op;
        match answer {
            Answer::Status(status) => {
                header.status = status;
                self.push_to(link, &header, &[]);
            }
            Answer::Data { count, buffer } => {
                header.kind = Kind::Data;
                header.count = count;
                match buffer {
                    None => {
                        header.flags |= flags::ZEROS;
                        self.push_to(link, &header, &[]);
                    }
                    Some(buffer) => {
                        header.body_bytes = Header::data_body_bytes(count);
                        let bytes = count as usize * BLOCK_BYTES;
                        // SAFETY: the store filled it.
                        let data = unsafe { buffer.bytes(0, bytes) };
                        let crcs = checksums(data);
                        self.push_to(link, &header, &[&crcs, data]);
                        self.pool.give(buffer);
                    }
                }
            }
            Answer::Rows(rows) => {
                let body = rows.encode();
                header.kind = Kind::Rows;
                if rows.more {
                    header.flags |= flags::MORE;
                }
                self.push_to(link, &header.with_body(&body), &[&body]);
            }
            Answer::Leaf(states) => {
                let body = states.encode();
                header.kind = Kind::Leaf;
                self.push_to(link, &header.with_body(&body), &[&body]);
            }
        }
        if credit_bytes > 0
            && let Some(found) = self.cluster.links.get_mut(link.key)
            && found.id == link.id
        {
            found.wire.owe(u64::from(credit_bytes));
        }
    }
}

fn work_of<'a>(header: &Header, body: &'a [u8]) -> Result<ReplicaWork<'a>, LinkError> {
    let (extent, first_block, count) = (header.extent, header.first_block, header.count);
    let durable = header.flags & flags::DURABLE != 0;
    Ok(match header.kind {
        Kind::Write => {
            let (crcs, data) = body.split_at(count as usize * CRC_BYTES);
            ReplicaWork::Write {
                extent,
                first_block,
                version: header.version,
                crcs: Some(crcs),
                data,
                durable,
            }
        }
        Kind::Zero => ReplicaWork::Zero {
            extent,
            first_block,
            count,
            version: header.version,
            durable,
        },
        Kind::Read => ReplicaWork::Read {
            extent,
            first_block,
            count,
        },
        Kind::Flush => ReplicaWork::Flush,
        Kind::ReadRows => ReplicaWork::Rows {
            from: extent.chunk,
            query: RowsQuery::decode(header, body)?,
        },
        Kind::ReadLeaf => ReplicaWork::Leaf {
            extent,
            leaf: first_block,
        },
        other => return Err(LinkError::Unexpected(other)),
    })
}
