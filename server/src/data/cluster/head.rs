//! The heads of replicated volumes, and what they want done.

mod asking;
mod ending;
mod sessions;

use std::collections::HashMap;

use ashlar_core::records::HeadClaim;
use ashlar_core::replication::wire::MAX_MESSAGE_BLOCKS;
use ashlar_core::replication::{Action, CopyId, Event, MemberId, ReplicatedHead};
use ashlar_core::units::{Epoch, NodeId, StoreId};
use smallvec::SmallVec;

use super::super::thread::{DataThread, VolumeHead};
use super::copies::Held;
use super::replica::ReplicaWork;
use super::tells::ClusterTell;
use super::{Asked, VolumeRef, now_us};

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
    /// It has served: from then on the control plane says whom it lets in.
    pub(super) has_served: bool,
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
            has_served: false,
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
        let result = self.replication(volume).map(|replication| {
            let result = call(&mut replication.head, now_us(), &mut actions);
            (result, replication.head.fill_due_us())
        });
        let named = actions.drain(..).map(|action| (volume, action));
        self.cluster.actions.extend(named);
        self.cluster.scratch = actions;
        let (result, fill_due_us) = result?;
        if let Some(at_us) = fill_due_us {
            self.cluster.fill_at(at_us);
        }
        Some(result)
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
        if self.cluster.deadline_us().is_none() {
            return;
        }
        let now_us = now_us();
        self.go_on_filling(now_us);
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

    /// Time passes for the heads that wait with a fill, hundreds of times a second: nobody else is looked at.
    fn go_on_filling(&mut self, now_us: u64) {
        if self.cluster.fills_due_us.is_none_or(|at| at > now_us) {
            return;
        }
        self.cluster.fills_due_us = None;
        for volume in self.replicated_volumes() {
            let replication = self.replication(volume);
            match replication.and_then(|replication| replication.head.fill_due_us()) {
                Some(due_us) if due_us <= now_us => {
                    self.with_head(volume, |head, now_us, actions| {
                        head.on_tick(now_us, actions)
                    });
                }
                Some(due_us) => self.cluster.fill_at(due_us),
                None => {}
            }
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
            Action::CloseSession { member, query } => self.end_session(volume, member, query),
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
                let id = self.volumes[volume.key].spec.id;
                if let Some(replication) = self.replication(volume) {
                    replication.client_generation = client_generation;
                    replication.has_served = true;
                    let incarnation = replication.claim.incarnation;
                    self.cluster.tell(ClusterTell::Serving {
                        volume: id,
                        incarnation,
                        client_generation,
                    });
                }
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
}
