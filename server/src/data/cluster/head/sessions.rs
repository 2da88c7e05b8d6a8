//! The sessions of a head with its members, over links and within the thread.

use ashlar_core::replication::wire::{OpenBody, Status};
use ashlar_core::replication::{AcceptorEvent, Event, LinkId, MemberId, QueryId, SessionRef};
use ashlar_core::store::ExtentKey;
use ashlar_core::units::{Epoch, NodeId, StoreId};

use super::super::super::thread::DataThread;
use super::super::tells::{ClusterTell, LinkWish};
use super::super::{Asked, VolumeRef, now_us};
use super::{MemberSession, Way};

impl DataThread {
    pub(super) fn connect(&mut self, volume: VolumeRef, member: MemberId) {
        let Some(replication) = self.replication(volume) else {
            return;
        };
        let place = replication.head.member(member);
        if !replication.connected.contains(&member) {
            replication.connected.push(member);
        }
        if self.store_here(place.store).is_some() {
            self.head_event(volume, Event::LinkUp { member });
            return;
        }
        if place.is_local {
            tracing::error!(store = %place.store.0, "a volume has a replica on a store that this data thread does not have");
            return;
        }
        // Other volumes may have it already.
        if self.is_linked(place.node, place.store) {
            self.head_event(volume, Event::LinkUp { member });
            return;
        }
        self.cluster.tell(ClusterTell::Link(LinkWish {
            thread: self.index,
            node: place.node,
            store: place.store,
            is_wanted: true,
        }));
    }

    pub(super) fn disconnect(&mut self, volume: VolumeRef, member: MemberId) {
        self.end_session(volume, member, None);
        let Some(replication) = self.replication(volume) else {
            return;
        };
        replication
            .connected
            .retain(|connected| *connected != member);
        let place = replication.head.member(member);
        self.release_link(place.node, place.store);
    }

    /// Gives a link up that no volume wants any more.
    pub(super) fn release_link(&mut self, node: NodeId, store: StoreId) {
        let wanted = self.replicated_volumes().into_iter().any(|volume| {
            self.replication(volume)
                .is_some_and(|replication| replication.member_at(node, store).is_some())
        });
        if wanted || self.store_here(store).is_some() {
            return;
        }
        self.cluster.tell(ClusterTell::Link(LinkWish {
            thread: self.index,
            node,
            store,
            is_wanted: false,
        }));
        self.drop_link_to(node, store);
    }

    pub(in super::super) fn store_here(&self, store: StoreId) -> Option<usize> {
        self.stores.iter().position(|driver| driver.id == store)
    }

    pub(in super::super) fn link_is_up(&mut self, node: NodeId, store: StoreId) {
        for volume in self.replicated_volumes() {
            let member = self
                .replication(volume)
                .and_then(|r| r.member_at(node, store));
            if let Some(member) = member {
                self.head_event(volume, Event::LinkUp { member });
            }
        }
    }

    /// Every session on the link is gone with it.
    pub(in super::super) fn link_is_down(&mut self, node: NodeId, store: StoreId) {
        let mut is_wanted = false;
        for volume in self.replicated_volumes() {
            let member = self
                .replication(volume)
                .and_then(|r| r.member_at(node, store));
            if let Some(member) = member {
                let session = self
                    .replication(volume)
                    .and_then(|r| r.set_session(member, None));
                self.head_event(volume, Event::LinkDown { member });
                is_wanted = true;
                if let Some(session) = session {
                    self.reads_again(volume, session.tag);
                }
            }
        }
        if is_wanted {
            self.cluster.tell(ClusterTell::Link(LinkWish {
                thread: self.index,
                node,
                store,
                is_wanted: true,
            }));
        }
    }

    pub(super) fn open_session(
        &mut self,
        volume: VolumeRef,
        member: MemberId,
        epoch: Epoch,
        opening: u64,
        resync: bool,
    ) {
        self.end_session(volume, member, None);
        let (id, layer) = {
            let spec = &self.volumes[volume.key].spec;
            (spec.id, spec.layer)
        };
        let Some(replication) = self.replication(volume) else {
            return;
        };
        let (claim, place) = (replication.claim, replication.head.member(member));
        let sent_at_us = now_us();
        let body = OpenBody {
            volume: id,
            claim,
            opening,
        };
        if let Some(store) = self.store_here(place.store) {
            let replica = self.replica_of(id, store, layer);
            let tag = self.cluster.tag();
            let session = MemberSession {
                way: Way::Here(replica),
                tag,
                epoch,
                opening,
                sent_at_us,
            };
            if let Some(replication) = self.replication(volume) {
                replication.set_session(member, Some(session));
            }
            let session = SessionRef {
                link: LinkId::LOCAL,
                tag,
            };
            let event = AcceptorEvent::Open {
                session,
                claim,
                epoch,
                opening,
                resync,
            };
            self.acceptor_event(replica, event);
            return;
        }
        // Without a link the head hears of its end, and asks again when there is one.
        let Some(link) = self.link_to(place.node, place.store) else {
            return;
        };
        let tag = self.open_remote(link, (volume, member), &body, epoch, layer, resync);
        let session = MemberSession {
            way: Way::Link(link),
            tag,
            epoch,
            opening,
            sent_at_us,
        };
        if let Some(replication) = self.replication(volume) {
            replication.set_session(member, Some(session));
        }
    }

    /// Ends a session. With `query`, in order: the member answers that.
    pub(super) fn end_session(
        &mut self,
        volume: VolumeRef,
        member: MemberId,
        query: Option<QueryId>,
    ) {
        let Some(replication) = self.replication(volume) else {
            return;
        };
        let session = match query {
            None => replication.set_session(member, None),
            Some(_) => replication.session(member),
        };
        let Some(session) = session else { return };
        match session.way {
            Way::Link(link) => self.close_remote(link, session.tag, query.map(Asked::Query)),
            Way::Here(replica) => {
                let event = AcceptorEvent::Close {
                    session: SessionRef {
                        link: LinkId::LOCAL,
                        tag: session.tag,
                    },
                    clean: query.is_some(),
                    op: query.map_or(0, |query| query.0),
                };
                self.acceptor_event(replica, event);
            }
        }
        if query.is_none() {
            self.reads_again(volume, session.tag);
        }
    }

    /// A peer ended a session; nothing is to be said to it.
    pub(in super::super) fn session_ended(&mut self, volume: VolumeRef, member: MemberId) {
        let session = self
            .replication(volume)
            .and_then(|r| r.set_session(member, None));
        if let Some(session) = session {
            self.reads_again(volume, session.tag);
        }
    }

    fn member_with_tag(&mut self, tag: u32) -> Option<(VolumeRef, MemberId, MemberSession)> {
        for volume in self.replicated_volumes() {
            let replication = self.replication(volume)?;
            let found = replication
                .sessions
                .iter()
                .enumerate()
                .find_map(|(at, session)| {
                    let session = (*session)?;
                    (session.tag == tag).then_some((MemberId(at as u8), session))
                });
            if let Some((member, session)) = found {
                return Some((volume, member, session));
            }
        }
        None
    }

    pub(in super::super) fn local_opened(&mut self, tag: u32, lost_power: bool) {
        if let Some((volume, member, session)) = self.member_with_tag(tag) {
            let event = Event::Opened {
                member,
                opening: session.opening,
                sent_at_us: session.sent_at_us,
                lost_power,
            };
            self.head_event(volume, event);
        }
    }

    pub(in super::super) fn local_open_refused(&mut self, tag: u32, status: Status, epoch: Epoch) {
        if let Some((volume, member, session)) = self.member_with_tag(tag) {
            let event = Event::OpenRefused {
                member,
                opening: session.opening,
                status,
                epoch,
            };
            self.session_ended(volume, member);
            self.head_event(volume, event);
        }
    }

    pub(in super::super) fn local_fenced(&mut self, tag: u32, epoch: Epoch) {
        if let Some((volume, member, _)) = self.member_with_tag(tag) {
            self.head_event(volume, Event::Fenced { member, epoch });
            self.session_ended(volume, member);
        }
    }

    pub(in super::super) fn local_damaged(
        &mut self,
        tag: u32,
        extent: ExtentKey,
        first_block: u32,
        count: u32,
    ) {
        if let Some((volume, member, _)) = self.member_with_tag(tag) {
            self.with_head(volume, |head, _, actions| {
                head.repair(Some(member), extent, first_block, count, actions);
            });
        }
    }

    pub(in super::super) fn local_query_done(&mut self, tag: u32, op: u64, status: Status) {
        if let Some((volume, ..)) = self.member_with_tag(tag) {
            let query = QueryId(op);
            self.head_event(volume, Event::Done { query, status });
        }
    }
}
