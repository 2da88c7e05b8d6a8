//! What a head asks of its members, and their answers.

use ashlar_core::records::SetIndex;
use ashlar_core::replication::wire::{RowsQuery, Status};
use ashlar_core::replication::{
    AcceptorEvent, Event, LinkId, MemberId, Outcome, QueryId, SessionRef,
};
use ashlar_core::units::{ChunkIndex, Version};

use super::super::super::thread::DataThread;
use super::super::replica::ReplicaWork;
use super::super::{Answer, Asked, Origin, VolumeRef};
use super::Way;

impl DataThread {
    /// Hands a piece of work to a member. Without a session nothing is sent: the head has been, or will be, told that it
    /// ended.
    pub(in super::super) fn ask(
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

    pub(super) fn ask_rows(
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

    pub(super) fn tell_whole(&mut self, volume: VolumeRef, query: QueryId, member: MemberId) {
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
    pub(in super::super) fn answered(
        &mut self,
        volume: VolumeRef,
        tag: u32,
        asked: Asked,
        answer: Answer,
    ) {
        let is_current = self
            .replication(volume)
            .is_some_and(|replication| replication.has_session(tag));
        if let Asked::Read { key, serial, piece } = asked {
            return self.piece_read(key, serial, piece, is_current, answer);
        }
        if !is_current {
            return self.forget_answer(answer);
        }
        match asked {
            Asked::Change { op, place } => {
                let status = self.plain(answer);
                let outcome = self.with_head(volume, |head, now_us, actions| {
                    head.answered(op, place, status, now_us, actions)
                });
                self.outcome(outcome);
            }
            Asked::Flush { op, member } => {
                let status = self.plain(answer);
                let outcome = self.with_head(volume, |head, now_us, actions| {
                    head.flush_answered(op, member, status, now_us, actions)
                });
                self.outcome(outcome);
            }
            Asked::Query(query) => {
                let status = self.plain(answer);
                self.head_event(volume, Event::Done { query, status });
            }
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
                let status = self.plain(answer);
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

    /// The status of an answer to what nothing but a status answers: anything else says nothing of what was done.
    fn plain(&mut self, answer: Answer) -> Status {
        match answer {
            Answer::Status(status) => status,
            other => self.unexpected(other),
        }
    }

    /// The status of an answer that is none of those expected.
    pub(in super::super) fn unexpected(&mut self, answer: Answer) -> Status {
        let status = match &answer {
            Answer::Status(status) if *status != Status::Ok => *status,
            _ => Status::Refused,
        };
        self.forget_answer(answer);
        status
    }

    pub(in super::super) fn forget_answer(&mut self, answer: Answer) {
        if let Answer::Data {
            buffer: Some(buffer),
            ..
        } = answer
        {
            self.pool.give(buffer);
        }
    }
}
