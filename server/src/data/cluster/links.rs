//! The links of a data thread: what comes on them goes to heads and replicas, what those say leaves on them.

use ashlar_core::replication::wire::{Header, Hello, Kind};
use ashlar_core::replication::{AcceptorEvent, LinkId};
use ashlar_core::units::{NodeId, StoreId};

use super::super::thread::DataThread;
use super::incoming::FromHead;
use super::link::{LinkError, LinkPeer, Wire};
use super::outgoing::ToStore;
use super::{LINK_TOKEN, LinkEnds, now_us};
use crate::engine::WatchId;

/// Messages taken from one link in a turn before the others have theirs.
const TURN_MESSAGES: usize = 256;
/// One change of a volume with three copies, to those that are elsewhere...
const LITTLE_MESSAGES: u32 = 2;
/// ...of a block each.
const LITTLE_BYTES: usize = 16 << 10;
/// Body of `Write` and `Data`: a checksum for each block stands before the blocks.
pub(super) const CRC_BYTES: usize = 4;

/// A link, named so that what outlives it finds it or nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct LinkRef {
    pub(in super::super) key: usize,
    pub(in super::super) id: LinkId,
}

pub(in super::super) struct Link {
    pub(super) id: LinkId,
    pub(super) wire: Wire,
    watch: WatchId,
    pub(super) peer: LinkPeer,
    pub(super) role: Role,
    is_busy: bool,
    /// Ends the connection when the peer is shut out of the cluster.
    _session: Option<crate::identity::Session>,
}

/// Which end this is.
pub(super) enum Role {
    /// Heads of this thread reach a store of the peer.
    ToStore(ToStore),
    /// Heads of the peer reach a store of this thread.
    FromHead(FromHead),
}

impl DataThread {
    // -- beginning and end

    /// A link to a peer's store is up.
    pub(in super::super) fn add_outgoing_link(&mut self, ends: LinkEnds) {
        let (node, store) = (ends.peer.node, ends.peer.store);
        // Two volumes may have wished for it. Should the older one be dead, its silence will tell.
        if self.is_linked(node, store) {
            return;
        }
        if self.add_link(ends, Role::ToStore(ToStore::default())) {
            self.link_is_up(node, store);
        }
    }

    /// A head of a peer reaches for a store of this thread.
    pub(in super::super) fn add_incoming_link(&mut self, store: usize, ends: LinkEnds) {
        if self.stores_are_closing() {
            return;
        }
        let role = Role::FromHead(FromHead {
            store,
            sessions: Default::default(),
            heard_at_us: now_us(),
        });
        self.add_link(ends, role);
    }

    fn add_link(&mut self, ends: LinkEnds, role: Role) -> bool {
        let LinkEnds {
            peer,
            stream,
            leftover,
            session,
        } = ends;
        let entry = self.cluster.links.vacant_entry();
        let key = entry.key();
        let watch = match self.engine.watch(stream.fd(), LINK_TOKEN | key as u32) {
            Ok(watch) => watch,
            Err(error) => {
                tracing::warn!(peer = peer.address, %error, "cannot watch a link");
                return false;
            }
        };
        let id = LinkId(self.cluster.next_link);
        self.cluster.next_link += 1;
        tracing::info!(node = %peer.node.0, store = %peer.store.0, address = peer.address, "link up");
        entry.insert(Link {
            id,
            wire: Wire::new(stream, &leftover),
            _session: session,
            watch,
            peer,
            role,
            is_busy: false,
        });
        self.make_link_busy(key);
        self.cluster.look_soon(now_us());
        // Others than one client wait for this thread now.
        self.engine.may_sleep_at_work(false);
        true
    }

    pub(super) fn link_to(&self, node: NodeId, store: StoreId) -> Option<usize> {
        self.cluster
            .links
            .iter()
            .find(|(_, link)| {
                matches!(link.role, Role::ToStore(_))
                    && link.peer.node == node
                    && link.peer.store == store
            })
            .map(|(key, _)| key)
    }

    /// Whether a link to this store of a peer is up.
    pub(super) fn is_linked(&self, node: NodeId, store: StoreId) -> bool {
        self.link_to(node, store).is_some()
    }

    /// No head of this thread wants a store of a peer any more.
    pub(super) fn drop_link_to(&mut self, node: NodeId, store: StoreId) {
        if let Some(key) = self.link_to(node, store) {
            self.end_link(key, &LinkError::Closed);
        }
    }

    /// Heads of peers reach the stores of this thread no more: to them the node is gone.
    pub(in super::super) fn end_incoming_links(&mut self) {
        for key in 0..self.cluster.links.capacity() {
            let link = self.cluster.links.get(key);
            if link.is_some_and(|link| matches!(link.role, Role::FromHead(_))) {
                self.end_link(key, &LinkError::Closed);
            }
        }
    }

    fn end_link(&mut self, key: usize, error: &LinkError) {
        let Some(link) = self.cluster.links.try_remove(key) else {
            return;
        };
        self.cluster.busy_links.retain(|busy| *busy != key);
        self.engine.unwatch(link.watch);
        self.engine.may_sleep_at_work(self.cluster.links.is_empty());
        match error {
            LinkError::Closed | LinkError::Io(_) | LinkError::Silent(_) => {
                tracing::info!(node = %link.peer.node.0, store = %link.peer.store.0, %error, "link down");
            }
            LinkError::Wire(_) | LinkError::Unexpected(_) => {
                tracing::warn!(node = %link.peer.node.0, store = %link.peer.store.0, address = link.peer.address, %error, "closing a link");
            }
        }
        match link.role {
            Role::ToStore(_) => self.link_is_down(link.peer.node, link.peer.store),
            Role::FromHead(from) => {
                let mut replicas: Vec<usize> = from.sessions.into_values().collect();
                replicas.sort_unstable();
                replicas.dedup();
                for replica in replicas {
                    self.acceptor_event(replica, AcceptorEvent::LinkClosed { link: link.id });
                }
            }
        }
    }

    // -- the turn

    pub(in super::super) fn on_link_readable(&mut self, token: u32, hang_up: bool) {
        let key = (token & !LINK_TOKEN) as usize;
        if let Some(link) = self.cluster.links.get_mut(key) {
            link.wire.readable = true;
            link.wire.hang_up |= hang_up;
            if hang_up {
                link.wire.stream.hung_up();
            }
            self.make_link_busy(key);
        }
    }

    pub(in super::super) fn on_link_writable(&mut self, token: u32) {
        let key = (token & !LINK_TOKEN) as usize;
        if let Some(link) = self.cluster.links.get_mut(key) {
            link.wire.is_blocked = false;
            self.make_link_busy(key);
        }
    }

    pub(super) fn make_link_busy(&mut self, key: usize) {
        if let Some(link) = self.cluster.links.get_mut(key)
            && !link.is_busy
        {
            link.is_busy = true;
            self.cluster.busy_links.push(key);
        }
    }

    /// Takes what came on the links.
    pub(in super::super) fn serve_links(&mut self) {
        for at in 0..self.cluster.busy_links.len() {
            let Some(&key) = self.cluster.busy_links.get(at) else {
                return;
            };
            if let Err(error) = self.serve_link(key) {
                self.end_link(key, &error);
            }
        }
    }

    /// Whether what the links have to send is the messages of one operation, and costs little.
    pub(in super::super) fn links_have_little(&self) -> bool {
        let busy = self.cluster.busy_links.iter();
        let wires = busy.filter_map(|&key| Some(&self.cluster.links.get(key)?.wire));
        let (messages, bytes) = wires
            .filter(|wire| wire.wants_to_send())
            .map(Wire::to_send)
            .fold((0u32, 0), |(messages, bytes), (more, long)| {
                (messages.saturating_add(more), bytes + long)
            });
        messages <= LITTLE_MESSAGES && bytes <= LITTLE_BYTES
    }

    /// Sends what is to be sent. Links that still have something to take stay in the list.
    pub(in super::super) fn send_links(&mut self) {
        for key in std::mem::take(&mut self.cluster.busy_links) {
            let Some(link) = self.cluster.links.get_mut(key) else {
                continue;
            };
            link.is_busy = false;
            if link.wire.wants_to_send() {
                let watch = link.watch;
                self.cluster.link_sends += 1;
                match link.wire.send() {
                    Ok(true) => self.engine.watch_writable(watch),
                    Ok(false) => {}
                    Err(error) => {
                        self.end_link(key, &error);
                        continue;
                    }
                }
            }
            if self.cluster.links[key].wire.readable {
                self.make_link_busy(key);
            }
        }
    }

    /// Whether the loop must turn again at once.
    pub(in super::super) fn links_want_a_turn(&self) -> bool {
        !self.cluster.busy_links.is_empty() || !self.cluster.actions.is_empty()
    }

    fn serve_link(&mut self, key: usize) -> Result<(), LinkError> {
        let mut left = TURN_MESSAGES;
        loop {
            while left > 0 {
                let Some(link) = self.cluster.links.get_mut(key) else {
                    return Ok(());
                };
                let Some((header, body)) = link.wire.next()? else {
                    break;
                };
                left -= 1;
                match &link.role {
                    Role::ToStore(_) => self.take_from_store(key, &header, body)?,
                    Role::FromHead(_) => self.take_from_head(key, &header, body)?,
                }
            }
            let Some(link) = self.cluster.links.get_mut(key) else {
                return Ok(());
            };
            if left == 0 {
                // There may be more in the inbox: it keeps its place in the line.
                link.wire.readable = true;
                return Ok(());
            }
            if !link.wire.readable {
                return Ok(());
            }
            self.cluster.link_receives += u64::from(link.wire.receive()?);
        }
    }

    // -- time

    /// Asks for signs of life and ends links that give none. True: there are links to be looked at again.
    pub(super) fn look_at_links(&mut self, now_us: u64) -> bool {
        let lease_us = self.cluster.lease_us;
        for key in 0..self.cluster.links.capacity() {
            let Some(link) = self.cluster.links.get_mut(key) else {
                continue;
            };
            let silent = match &mut link.role {
                Role::ToStore(to) => {
                    let silent = to
                        .beats
                        .front()
                        .is_some_and(|(_, at)| now_us.saturating_sub(*at) > lease_us);
                    if !silent {
                        to.beat += 1;
                        to.beats.push_back((to.beat, now_us));
                        let mut header = Header::new(Kind::Heartbeat);
                        header.op = to.beat;
                        link.wire.push(&header, &[]);
                    }
                    silent
                }
                // A head that is frozen may come back; its socket is kept for as long as two leases.
                Role::FromHead(from) => now_us.saturating_sub(from.heard_at_us) > 2 * lease_us,
            };
            link.wire.rest();
            if silent {
                self.end_link(key, &LinkError::Silent(lease_us / 1000));
            } else {
                self.make_link_busy(key);
            }
        }
        !self.cluster.links.is_empty()
    }
}

/// The first message of either end, for the control plane that greets.
pub fn greeting(kind: Kind, hello: &Hello) -> Vec<u8> {
    let body = hello.encode();
    let mut bytes = Header::new(kind).with_body(&body).encode().to_vec();
    bytes.extend_from_slice(&body);
    bytes
}
