//! The heads of replicated volumes: their sessions with members, and what they want done.

use std::collections::HashMap;

use ashlar_core::records::{HeadClaim, SetIndex};
use ashlar_core::replication::wire::{MAX_MESSAGE_BLOCKS, OpenBody, RowsQuery, Status};
use ashlar_core::replication::{
    AcceptorEvent, Action, CopyId, Event, LinkId, MemberId, Outcome, QueryId, ReplicatedHead,
    SessionRef, StopReason,
};
use ashlar_core::store::ExtentKey;
use ashlar_core::units::{ChunkIndex, Epoch, NodeId, StoreId, Version};
use smallvec::SmallVec;

use super::super::operation::Operation;
use super::super::thread::{DataThread, VolumeHead};
use super::copies::Held;
use super::replica::ReplicaWork;
use super::tells::{ClusterTell, LinkWish, ReplicaStatus, ReplicationStatus};
use super::{Answer, Asked, Origin, VolumeRef, now_us};

/// How a member is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// A replica of this thread.
    Here(usize),
    /// A link.
    Link(usize),
}

/// A session with a member.
#[derive(Clone, Copy, Debug)]
pub(super) struct MemberSession {
    pub(super) way: Way,
    pub(super) tag: u32,
    pub(super) epoch: Epoch,
    opening: u64,
    sent_at_us: u64,
}

/// A replicated volume that is served, or about to be, by this thread.
pub(in super::super) struct Replication {
    pub(in super::super) head: ReplicatedHead,
    pub(super) claim: HeadClaim,
    pub(super) serial: u64,
    sessions: Vec<Option<MemberSession>>,
    /// Members whose link was asked for.
    connected: Vec<MemberId>,
    /// Pieces of requests, and flushes, that were told to wait.
    pub(super) waiting: Vec<(usize, u64, u32)>,
    pub(super) copies: HashMap<CopyId, Held>,
    /// It was told to end in order.
    pub(super) is_closing: bool,
    /// Connections of a smaller generation are at their end.
    pub(in super::super) client_generation: u64,
}

impl Replication {
    pub(in super::super) fn new(
        head: ReplicatedHead,
        claim: HeadClaim,
        serial: u64,
    ) -> Replication {
        Replication {
            head,
            claim,
            serial,
            sessions: Vec::new(),
            connected: Vec::new(),
            waiting: Vec::new(),
            copies: HashMap::new(),
            is_closing: false,
            client_generation: 0,
        }
    }

    #[inline]
    pub(super) fn session(&self, member: MemberId) -> Option<MemberSession> {
        self.sessions.get(usize::from(member.0)).copied().flatten()
    }

    /// Whether a session with this tag is under way.
    pub(super) fn has_session(&self, tag: u32) -> bool {
        let mut sessions = self.sessions.iter().flatten();
        sessions.any(|session| session.tag == tag)
    }

    fn set_session(
        &mut self,
        member: MemberId,
        session: Option<MemberSession>,
    ) -> Option<MemberSession> {
        let at = usize::from(member.0);
        if self.sessions.len() <= at {
            self.sessions.resize(at + 1, None);
        }
        std::mem::replace(&mut self.sessions[at], session)
    }

    fn member_at(&self, node: NodeId, store: StoreId) -> Option<MemberId> {
        let mut connected = self.connected.iter().copied();
        connected.find(|member| {
            let place = self.head.member(*member);
            place.node == node && place.store == store
        })
    }
}

impl DataThread {
    pub(super) fn replication(&mut self, volume: VolumeRef) -> Option<&mut Replication> {
        match &mut self.volumes.get_mut(volume.key)?.head {
            VolumeHead::Replicated(replication) if replication.serial == volume.serial => {
                Some(replication)
            }
            _ => None,
        }
    }

    fn replicated_volumes(&self) -> SmallVec<[VolumeRef; 8]> {
        self.volumes
            .iter()
            .filter_map(|(key, volume)| match &volume.head {
                VolumeHead::Replicated(replication) => Some(VolumeRef {
                    key,
                    serial: replication.serial,
                }),
                VolumeHead::Single(_) => None,
            })
            .collect()
    }

    /// Tells a head what happened; what it wants done is carried out by [`DataThread::settle`].
    pub(super) fn head_event(&mut self, volume: VolumeRef, event: Event) {
        tracing::trace!(volume = volume.key, ?event, "a head is told");
        self.with_head(volume, |head, now_us, actions| {
            head.on_event(now_us, event, actions)
        });
    }

    /// Calls a head with the time and room for actions.
    pub(in super::super) fn with_head<T>(
        &mut self,
        volume: VolumeRef,
        call: impl FnOnce(&mut ReplicatedHead, u64, &mut Vec<Action>) -> T,
    ) -> Option<T> {
        let mut actions = std::mem::take(&mut self.cluster.scratch);
        let result = self
            .replication(volume)
            .map(|replication| call(&mut replication.head, now_us(), &mut actions));
        let named = actions.drain(..).map(|action| (volume, action));
        self.cluster.actions.extend(named);
        self.cluster.scratch = actions;
        result
    }

    /// Carries out what heads want done, until they want no more.
    /// True: there was something.
    pub(in super::super) fn settle(&mut self) -> bool {
        let any = !self.cluster.actions.is_empty();
        while let Some((volume, action)) = self.cluster.actions.pop_front() {
            if self.replication(volume).is_some() {
                self.carry_out_action(volume, action);
            }
        }
        any
    }

    /// Time passes for heads and links.
    pub(in super::super) fn look_at_cluster(&mut self) {
        let now_us = now_us();
        if self.cluster.next_look_us.is_none_or(|at| at > now_us) {
            return;
        }
        self.cluster.next_look_us = None;
        let mut again = self.look_at_links(now_us);
        for volume in self.replicated_volumes() {
            again = true;
            self.with_head(volume, |head, now_us, actions| {
                head.on_tick(now_us, actions)
            });
        }
        if again {
            self.cluster.look_soon(now_us);
        }
    }

    fn carry_out_action(&mut self, volume: VolumeRef, action: Action) {
        tracing::trace!(volume = volume.key, ?action, "a head wants");
        match action {
            Action::ReadRecord => {
                let volume = self.volumes[volume.key].spec.id;
                self.cluster.tell(ClusterTell::ReadRecord { volume });
            }
            Action::Swap {
                serial,
                transaction,
            } => {
                let volume = self.volumes[volume.key].spec.id;
                self.cluster.tell(ClusterTell::Swap {
                    volume,
                    serial,
                    transaction,
                });
            }
            Action::Connect { member } => self.connect(volume, member),
            Action::Disconnect { member } => self.disconnect(volume, member),
            Action::Open {
                member,
                epoch,
                opening,
                resync,
            } => self.open_session(volume, member, epoch, opening, resync),
            Action::CloseSession { member, query } => self.close_session(volume, member, query),
            Action::ReadRows {
                query,
                member,
                set,
                from,
                floor,
            } => self.ask_rows(volume, query, member, (set, from, floor)),
            Action::ReadLeaf {
                query,
                member,
                extent,
                leaf,
            } => {
                let work = ReplicaWork::Leaf { extent, leaf };
                self.ask(volume, member, Asked::Leaf(query), work);
            }
            Action::Flush { query, member } => {
                self.ask(volume, member, Asked::Query(query), ReplicaWork::Flush);
            }
            Action::Whole { query, member } => self.tell_whole(volume, query, member),
            Action::CopyRead {
                copy,
                member,
                extent,
                first_block,
                count,
            } => {
                debug_assert!(count <= MAX_MESSAGE_BLOCKS);
                let work = ReplicaWork::Read {
                    extent,
                    first_block,
                    count,
                };
                self.ask(volume, member, Asked::CopyRead(copy), work);
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
                let place = (extent, first_block, count);
                self.copy_write(volume, (copy, member), place, version, zeros);
            }
            Action::CopyEnd { copy } => self.copy_end(volume, copy),
            Action::Retry => self.retry_waiting(volume),
            Action::Acknowledge { tag } => self.piece_acknowledged(tag),
            Action::Redo { tag, version } => self.piece_again(tag, version),
            Action::Fail { tag, status } => self.piece_failed(tag, status),
            Action::Flushed { tag } => self.piece_acknowledged(tag),
            Action::FlushAgain { tag } => self.piece_waits(volume, tag),
            Action::Started(started) => self.start_waiting(started),
            Action::Serving { client_generation } => {
                if let Some(replication) = self.replication(volume) {
                    replication.client_generation = client_generation;
                }
                let volume = self.volumes[volume.key].spec.id;
                self.cluster.tell(ClusterTell::Serving { volume });
            }
            Action::EndSessions { client_generation } => {
                if let Some(replication) = self.replication(volume) {
                    replication.client_generation = client_generation;
                }
                for connection in self.volumes[volume.key].connections.clone() {
                    self.kill(connection);
                }
                let volume = self.volumes[volume.key].spec.id;
                self.cluster.tell(ClusterTell::SessionsEnded {
                    volume,
                    client_generation,
                });
            }
            Action::Stopped(reason) => self.head_stopped(volume, reason),
            Action::News(news) => {
                use ashlar_core::replication::News;
                let member = match news {
                    News::Failed { member, .. }
                    | News::Dropped { member, .. }
                    | News::ResyncStarted { member, .. }
                    | News::ResyncFailed { member, .. }
                    | News::Rejoined { member, .. }
                    | News::Removed { member, .. }
                    | News::LostPower { member } => Some(member),
                    News::Repaired { .. } => None,
                };
                if let News::Rejoined { copied_blocks, .. } = news {
                    let metrics = &self.volumes[volume.key].metrics;
                    metrics.resynced_blocks.add(copied_blocks);
                }
                let replication = self.replication(volume);
                let node = member.zip(replication).map(|(m, r)| r.head.member(m).node);
                let volume = self.volumes[volume.key].spec.id;
                self.cluster.tell(ClusterTell::News { volume, node, news });
            }
        }
    }

    // -- members

    fn connect(&mut self, volume: VolumeRef, member: MemberId) {
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

    fn disconnect(&mut self, volume: VolumeRef, member: MemberId) {
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
    fn release_link(&mut self, node: NodeId, store: StoreId) {
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

    pub(super) fn store_here(&self, store: StoreId) -> Option<usize> {
        self.stores.iter().position(|driver| driver.id == store)
    }

    pub(super) fn link_is_up(&mut self, node: NodeId, store: StoreId) {
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
    pub(super) fn link_is_down(&mut self, node: NodeId, store: StoreId) {
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

    fn open_session(
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

    fn close_session(&mut self, volume: VolumeRef, member: MemberId, query: Option<QueryId>) {
        let Some(query) = query else {
            return self.end_session(volume, member, None);
        };
        self.end_session(volume, member, Some(query));
    }

    /// Ends a session. With `query`, in order: the member answers that.
    fn end_session(&mut self, volume: VolumeRef, member: MemberId, query: Option<QueryId>) {
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
    pub(super) fn session_ended(&mut self, volume: VolumeRef, member: MemberId) {
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

    pub(super) fn local_opened(&mut self, tag: u32, lost_power: bool) {
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

    pub(super) fn local_open_refused(&mut self, tag: u32, status: Status, epoch: Epoch) {
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

    pub(super) fn local_fenced(&mut self, tag: u32, epoch: Epoch) {
        if let Some((volume, member, _)) = self.member_with_tag(tag) {
            self.head_event(volume, Event::Fenced { member, epoch });
            self.session_ended(volume, member);
        }
    }

    pub(super) fn local_query_done(&mut self, tag: u32, op: u64, status: Status) {
        if let Some((volume, ..)) = self.member_with_tag(tag) {
            let query = QueryId(op);
            self.head_event(volume, Event::Done { query, status });
        }
    }

    // -- asking members

    /// Hands a piece of work to a member. Without a session nothing is sent: the head has been, or will be, told that it
    /// ended.
    pub(super) fn ask(
        &mut self,
        volume: VolumeRef,
        member: MemberId,
        asked: Asked,
        work: ReplicaWork<'_>,
    ) {
        let Some(session) = self.replication(volume).and_then(|r| r.session(member)) else {
            return;
        };
        match session.way {
            Way::Link(link) => self.ask_remote(link, session.tag, session.epoch, asked, work),
            Way::Here(replica) => {
                let from = SessionRef {
                    link: LinkId::LOCAL,
                    tag: session.tag,
                };
                let origin = Origin::Head {
                    volume,
                    tag: session.tag,
                    asked,
                };
                // What the head computed has not left this memory.
                let work = match work {
                    ReplicaWork::Write {
                        extent,
                        first_block,
                        version,
                        data,
                        durable,
                        ..
                    } => ReplicaWork::Write {
                        extent,
                        first_block,
                        version,
                        crcs: None,
                        data,
                        durable,
                    },
                    other => other,
                };
                self.replica_work(replica, from, session.epoch, origin, work);
            }
        }
    }

    fn ask_rows(
        &mut self,
        volume: VolumeRef,
        query: QueryId,
        member: MemberId,
        (set, from, floor): (SetIndex, ChunkIndex, Version),
    ) {
        let Some(replication) = self.replication(volume) else {
            return;
        };
        let rows = RowsQuery {
            sets: replication.head.record().placement.sets.len() as u32,
            set: u32::from(set.0),
            floor,
        };
        let work = ReplicaWork::Rows { from, query: rows };
        self.ask(volume, member, Asked::Rows(query), work);
    }

    fn tell_whole(&mut self, volume: VolumeRef, query: QueryId, member: MemberId) {
        let Some(session) = self.replication(volume).and_then(|r| r.session(member)) else {
            return;
        };
        match session.way {
            Way::Link(link) => {
                self.whole_remote(link, session.tag, session.epoch, Asked::Query(query));
            }
            Way::Here(replica) => {
                let event = AcceptorEvent::Whole {
                    session: SessionRef {
                        link: LinkId::LOCAL,
                        tag: session.tag,
                    },
                    op: query.0,
                };
                self.acceptor_event(replica, event);
            }
        }
    }

    /// A member answered on the session with this tag.
    pub(super) fn answered(&mut self, volume: VolumeRef, tag: u32, asked: Asked, answer: Answer) {
        let is_current = self
            .replication(volume)
            .is_some_and(|replication| replication.has_session(tag));
        if let Asked::Read { key, serial, piece } = asked {
            return self.piece_read(key, serial, piece, is_current, answer);
        }
        if !is_current {
            return self.forget_answer(answer);
        }
        let status = match &answer {
            Answer::Status(status) => *status,
            Answer::Data { .. } | Answer::Rows(_) | Answer::Leaf(_) => Status::Ok,
        };
        match asked {
            Asked::Change { op, place } => {
                let outcome = self.with_head(volume, |head, now_us, actions| {
                    head.answered(op, place, status, now_us, actions)
                });
                self.outcome(outcome);
            }
            Asked::Flush { op, member } => {
                let outcome = self.with_head(volume, |head, now_us, actions| {
                    head.flush_answered(op, member, status, now_us, actions)
                });
                self.outcome(outcome);
            }
            Asked::Query(query) => self.head_event(volume, Event::Done { query, status }),
            Asked::Rows(query) => {
                let result = match answer {
                    Answer::Rows(rows) => Ok(rows),
                    other => Err(self.unexpected(other)),
                };
                self.head_event(volume, Event::Rows { query, result });
            }
            Asked::Leaf(query) => {
                let result = match answer {
                    Answer::Leaf(states) => Ok(states),
                    other => Err(self.unexpected(other)),
                };
                self.head_event(volume, Event::Leaf { query, result });
            }
            Asked::CopyRead(copy) => self.copy_was_read(volume, copy, answer),
            Asked::CopyWrite { copy, member } => {
                let event = Event::CopyWritten {
                    copy,
                    member,
                    status,
                };
                self.head_event(volume, event);
            }
            Asked::Read { .. } => {}
        }
    }

    fn outcome(&mut self, outcome: Option<Outcome>) {
        match outcome {
            None | Some(Outcome::Pending) => {}
            Some(Outcome::Acknowledge(tag)) => self.piece_acknowledged(tag),
            Some(Outcome::Fail(tag, status)) => self.piece_failed(tag, status),
        }
    }

    /// The status of an answer that is none of those expected.
    pub(super) fn unexpected(&mut self, answer: Answer) -> Status {
        let status = match &answer {
            Answer::Status(status) if *status != Status::Ok => *status,
            _ => Status::Refused,
        };
        self.forget_answer(answer);
        status
    }

    pub(super) fn forget_answer(&mut self, answer: Answer) {
        if let Answer::Data {
            buffer: Some(buffer),
            ..
        } = answer
        {
            self.pool.give(buffer);
        }
    }

    // -- the end

    /// The head will answer nothing more: what is under way fails, its clients go.
    pub(super) fn head_stopped(&mut self, volume: VolumeRef, reason: StopReason) {
        let id = self.volumes[volume.key].spec.id;
        // A write that was not answered may have happened all the same: an error would say that it had not. The clients of
        // a head that was fenced see their connections end.
        let is_orderly = reason == StopReason::Closed;
        for connection in self.volumes[volume.key].connections.clone() {
            if is_orderly {
                self.leave(connection);
            } else {
                self.kill(connection);
            }
        }
        self.fail_requests(volume, reason);
        self.forget_volume(volume);
        self.volumes[volume.key].head_ended = true;
        if self.volume_keys.get(&id) == Some(&volume.key) {
            self.volume_keys.remove(&id);
        }
        self.cluster
            .tell(ClusterTell::Stopped { volume: id, reason });
        self.volume_may_close(volume.key);
    }

    /// Ends every session of a volume and gives its links up.
    fn forget_volume(&mut self, volume: VolumeRef) {
        let Some(replication) = self.replication(volume) else {
            return;
        };
        let members: SmallVec<[MemberId; 8]> = replication.connected.drain(..).collect();
        let copies: Vec<CopyId> = replication.copies.keys().copied().collect();
        for copy in copies {
            self.copy_end(volume, copy);
        }
        for member in members {
            self.end_session(volume, member, None);
            if let Some(replication) = self.replication(volume) {
                let place = replication.head.member(member);
                self.release_link(place.node, place.store);
            }
        }
    }

    /// How a replicated volume is doing.
    pub(in super::super) fn replication_status(&self, key: usize) -> Option<ReplicationStatus> {
        let VolumeHead::Replicated(replication) = &self.volumes.get(key)?.head else {
            return None;
        };
        let record = replication.head.record();
        let sets = record.placement.sets.iter().enumerate();
        let replicas = sets.flat_map(|(set, replicas)| {
            replicas.replicas.iter().map(move |replica| ReplicaStatus {
                set: SetIndex(set as u16),
                node: replica.node,
                store: replica.store,
                is_in_sync: replica.is_in_sync(),
                is_linked: self.store_here(replica.store).is_some()
                    || self.is_linked(replica.node, replica.store),
            })
        });
        Some(ReplicationStatus {
            epoch: record.epoch,
            is_serving: replication.head.is_serving(),
            replicas: replicas.collect(),
        })
    }

    /// The store of this thread that holds a current copy of a chunk of a replicated volume.
    pub(in super::super) fn copy_here(&self, key: usize, extent: ExtentKey) -> Option<usize> {
        let VolumeHead::Replicated(replication) = &self.volumes.get(key)?.head else {
            return None;
        };
        let set = replication.head.set_of(extent.chunk);
        let replicas = &replication.head.record().placement.sets[usize::from(set.0)];
        replicas
            .in_sync()
            .find_map(|replica| self.store_here(replica.store))
    }

    /// Requests of a replicated volume in the table.
    pub(super) fn requests_of(&self, volume: VolumeRef) -> Vec<usize> {
        self.operations
            .iter()
            .filter_map(|(key, operation)| match operation {
                Operation::Replicated(request) if request.volume == volume => Some(key),
                _ => None,
            })
            .collect()
    }
}
