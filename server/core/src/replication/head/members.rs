//! The stores of a volume, and the sessions with them.

use super::super::wire::Status;
use super::{Action, MemberId, News, Phase, QueryId, ReplicatedHead, StopReason};
use crate::units::{Epoch, NodeId, StoreId};

/// Where a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberPlace {
    /// Its daemon.
    pub node: NodeId,
    /// Its store.
    pub store: StoreId,
    /// It is of the head's own daemon.
    pub is_local: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Session {
    None,
    Opening { opening: u64, since_us: u64 },
    Open { epoch: Epoch },
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub(super) place: MemberPlace,
    /// A link was asked for.
    pub(super) connected: bool,
    pub(super) link: bool,
    pub(super) session: Session,
    /// Reads may rely on it until then.
    pub(super) fresh_until_us: u64,
    /// It lacks writes that it had answered, and was not told that it is whole.
    pub(super) lost: bool,
    /// No session is opened before then.
    pub(super) retry_at_us: u64,
    /// Changes it answered, and how many of them are durable for certain.
    pub(super) answered: u64,
    pub(super) flushed: u64,
    /// Since when it has had no session, when it has none.
    pub(super) away_since_us: u64,
    /// How it failed last, when it said so itself.
    pub(super) failure: Option<Status>,
}

impl Member {
    pub(super) fn is_open(&self) -> bool {
        matches!(self.session, Session::Open { .. })
    }
}

/// What a question was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Rows for the reconciliation or a resync.
    Rows(super::rows::RowsOf),
    /// A leaf of a job.
    Leaf { job: super::leaf::JobKey },
    /// The flush, or the word that it is whole, of a member that had lost power, before serving.
    Mend,
    /// The flush, or the word that it is whole, at the end of a resync.
    Rejoin,
    /// The flush or the close at the end.
    Close,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Query {
    pub(super) member: MemberId,
    pub(super) purpose: Purpose,
    pub(super) since_us: u64,
}

impl ReplicatedHead {
    /// Where a member is.
    pub fn member(&self, member: MemberId) -> MemberPlace {
        self.members[usize::from(member.0)].place
    }

    /// Every member, in and out of sync.
    pub fn members(&self) -> impl Iterator<Item = (MemberId, MemberPlace)> {
        (0..=255)
            .zip(&self.members)
            .map(|(id, member)| (MemberId(id), member.place))
    }

    pub(super) fn at(&self, member: MemberId) -> &Member {
        &self.members[usize::from(member.0)]
    }

    pub(super) fn at_mut(&mut self, member: MemberId) -> &mut Member {
        &mut self.members[usize::from(member.0)]
    }

    /// The member that a store is; a new one if it was none yet. `None` past 256: so many stores are never used at
    /// once, and those gone are remembered.
    pub(super) fn member_of(&mut self, node: NodeId, store: StoreId) -> Option<MemberId> {
        let known = self.members.iter().position(|m| m.place.store == store);
        if let Some(known) = known {
            return Some(MemberId(known as u8));
        }
        let id = u8::try_from(self.members.len()).ok()?;
        self.members.push(Member {
            place: MemberPlace {
                node,
                store,
                is_local: node == self.params.node,
            },
            connected: false,
            link: false,
            session: Session::None,
            fresh_until_us: 0,
            lost: false,
            retry_at_us: 0,
            // What a head before this one wrote may not be durable yet.
            answered: 1,
            flushed: 0,
            away_since_us: self.now_us,
            failure: None,
        });
        Some(MemberId(id))
    }

    /// Opens a session with every member that has a link and none.
    pub(super) fn open_sessions(&mut self, actions: &mut Vec<Action>) {
        let claimed = !matches!(
            self.phase,
            Phase::Claiming | Phase::Closing | Phase::Stopped
        );
        if !claimed {
            return;
        }
        for id in 0..self.members.len() {
            let member = MemberId(id as u8);
            let m = self.members[id];
            if !m.link || m.session != Session::None || self.now_us < m.retry_at_us {
                continue;
            }
            // While it counts as in sync and has failed, it is first recorded as out: the epoch that is then sealed
            // must be one that it was never in sync under.
            if self.is_failed(member) || self.is_recording(member) || !self.is_wanted(member) {
                continue;
            }
            self.openings += 1;
            let epoch = self.record.record.epoch;
            self.members[id].session = Session::Opening {
                opening: self.openings,
                since_us: self.now_us,
            };
            actions.push(Action::Open {
                member,
                epoch,
                opening: self.openings,
                resync: !self.is_in_sync_anywhere(member),
            });
        }
    }

    pub(super) fn on_link_up(&mut self, member: MemberId, actions: &mut Vec<Action>) {
        let _ = actions;
        self.at_mut(member).link = true;
        self.at_mut(member).retry_at_us = 0;
    }

    pub(super) fn on_link_down(&mut self, member: MemberId, actions: &mut Vec<Action>) {
        self.at_mut(member).link = false;
        self.lose(member, None, actions);
    }

    pub(super) fn on_opened(
        &mut self,
        member: MemberId,
        opening: u64,
        sent_at_us: u64,
        lost_power: bool,
        actions: &mut Vec<Action>,
    ) {
        let Session::Opening { opening: ours, .. } = self.at(member).session else {
            return;
        };
        if ours != opening {
            return;
        }
        let epoch = self.record.record.epoch;
        let lease_us = self.params.lease_us;
        let is_lost = lost_power && self.params.rules.power_loss_is_out;
        let m = self.at_mut(member);
        m.session = Session::Open { epoch };
        m.failure = None;
        m.fresh_until_us = if m.place.is_local {
            u64::MAX
        } else {
            sent_at_us + lease_us
        };
        m.lost = is_lost;
        m.answered += 1;
        if is_lost {
            actions.push(Action::News(News::LostPower { member }));
        }
        self.note_sealed(member);
        if self.phase == Phase::Serving && self.is_in_sync_anywhere(member) {
            // A session is only opened here when the member was out of every set, or came into one while it was being
            // opened; that one has yet to be filled, and is not in sync.
            self.lose(member, None, actions);
        }
    }

    pub(super) fn on_open_refused(
        &mut self,
        member: MemberId,
        opening: u64,
        status: Status,
        epoch: Epoch,
        actions: &mut Vec<Action>,
    ) {
        let ours =
            matches!(self.at(member).session, Session::Opening { opening: o, .. } if o == opening);
        if !ours {
            return;
        }
        let retry_at_us = self.now_us + self.params.resync_backoff_us;
        let m = self.at_mut(member);
        m.session = Session::None;
        m.failure = Some(status);
        m.retry_at_us = retry_at_us;
        if status == Status::Fenced && epoch > self.record.record.epoch {
            self.sealed_beyond(epoch, actions);
        }
    }

    pub(super) fn on_fenced(&mut self, member: MemberId, epoch: Epoch, actions: &mut Vec<Action>) {
        if epoch > self.record.record.epoch {
            self.stop(StopReason::Fenced { epoch }, actions);
        } else {
            self.lose(member, Some(Status::Fenced), actions);
        }
    }

    #[inline]
    pub(super) fn on_alive(
        &mut self,
        member: MemberId,
        sent_at_us: u64,
        actions: &mut Vec<Action>,
    ) {
        let until = sent_at_us + self.params.lease_us;
        let m = self.at_mut(member);
        if m.is_open() && until > m.fresh_until_us {
            m.fresh_until_us = until;
            self.retry(actions);
        }
    }

    /// Tells those who wait to ask again.
    pub(super) fn retry(&mut self, actions: &mut Vec<Action>) {
        if self.told_to_wait && self.phase == Phase::Serving {
            self.told_to_wait = false;
            actions.push(Action::Retry);
        }
    }

    /// The session with a member is at its end, or must be: it did not do what it has to.
    pub(super) fn lose(
        &mut self,
        member: MemberId,
        status: Option<Status>,
        actions: &mut Vec<Action>,
    ) {
        let now_us = self.now_us;
        let retry_at_us = now_us + self.params.resync_backoff_us;
        let m = self.at_mut(member);
        if m.session == Session::None {
            return;
        }
        if m.is_open() {
            m.away_since_us = now_us;
            m.failure = status;
        }
        m.session = Session::None;
        m.fresh_until_us = 0;
        m.retry_at_us = retry_at_us;
        actions.push(Action::CloseSession {
            member,
            query: None,
        });
        self.queries.retain(|_, query| query.member != member);
        match self.phase {
            Phase::Serving => self.fail_replicas_of(member, status, actions),
            Phase::Closing => self.stop(StopReason::Closed, actions),
            _ => self.seal_again(actions),
        }
    }

    pub(super) fn ask(&mut self, member: MemberId, purpose: Purpose) -> QueryId {
        self.query_serial += 1;
        let query = QueryId(self.query_serial);
        self.queries.insert(
            query,
            Query {
                member,
                purpose,
                since_us: self.now_us,
            },
        );
        query
    }

    pub(super) fn on_done(&mut self, query: QueryId, status: Status, actions: &mut Vec<Action>) {
        let Some(asked) = self.queries.remove(&query) else {
            return;
        };
        if status != Status::Ok && asked.purpose != Purpose::Close {
            self.lose(asked.member, Some(status), actions);
            return;
        }
        match asked.purpose {
            Purpose::Mend => self.mended(asked.member, actions),
            Purpose::Rejoin => self.rejoin_step(asked.member, actions),
            Purpose::Close => self.closed(asked.member, status, actions),
            Purpose::Rows(_) | Purpose::Leaf { .. } => {}
        }
    }

    /// Members that are silent, or do not answer what they were sent, have failed.
    pub(super) fn expire(&mut self, actions: &mut Vec<Action>) {
        let now_us = self.now_us;
        let limit_us = self.params.write_timeout_us;
        if now_us < self.grace_until_us {
            return;
        }
        for id in 0..self.members.len() {
            let member = MemberId(id as u8);
            let m = self.members[id];
            let silent = match m.session {
                Session::None => false,
                Session::Opening { since_us, .. } => now_us >= since_us + limit_us,
                Session::Open { .. } => {
                    now_us >= m.fresh_until_us
                        || self.late_op(member, limit_us)
                        || self.late_flush(member, 4 * limit_us)
                        || self
                            .queries
                            .values()
                            .any(|q| q.member == member && now_us >= q.since_us + 4 * limit_us)
                        || self.late_copy(member, 4 * limit_us)
                }
            };
            if silent {
                self.lose(member, None, actions);
            }
        }
    }
}
