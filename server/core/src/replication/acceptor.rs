//! The acceptor: whose operations a store takes for a volume.
//!
//! One for each volume and store, the local head's included. A head opens a *session*; opening is sealing: the epoch is
//! durable before the answer, and every session of before is at its end. An operation is taken from the session that
//! was opened last and from no other. What a store holds is not the acceptor's concern; whether it may be believed is:
//! a replica that lost power while it was open for writing says so until a head has made it whole.

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use uuid::Uuid;

use super::Rules;
use crate::records::HeadClaim;
use crate::units::Epoch;

/// One boot of a machine; another id means that its memory is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BootId(pub Uuid);

/// A connection, as the shell numbers them; never used twice while the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId(pub u64);

impl LinkId {
    /// The head on this very thread.
    pub const LOCAL: LinkId = LinkId(0);
}

/// A session as the replica names it: the connection it came on, and the head's number for it there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionRef {
    /// The connection.
    pub link: LinkId,
    /// The head's number on it.
    pub tag: u32,
}

/// What an acceptor keeps durably, in the node's own database: never in the cluster's metadata store, which may be
/// away when a seal is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seal {
    /// Sessions of a smaller epoch are refused.
    pub epoch: Epoch,
    /// Who sealed it. Absent when only the store's blocks tell the epoch.
    pub claim: Option<HeadClaim>,
    /// Open for writing since this boot. Absent after an orderly close: all that was answered is on stable storage.
    pub opened_under: Option<BootId>,
    /// Lacks writes that it answered; stays until a head has made it whole.
    pub lost: bool,
}

/// What the shell found when it started.
#[derive(Clone, Copy, Debug)]
pub struct StartedWith {
    /// The durable seal, if there is one.
    pub seal: Option<Seal>,
    /// The highest epoch that the store holds blocks of the volume's layers under.
    pub store_epoch: Option<Epoch>,
    /// This boot.
    pub boot: BootId,
    /// The store was reopened after an I/O error stopped it, or recovery found less than was answered.
    pub store_failed: bool,
}

/// What happens to an acceptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcceptorEvent {
    /// A head opens the volume.
    Open {
        /// The session it wants.
        session: SessionRef,
        /// Its claim.
        claim: HeadClaim,
        /// Its epoch.
        epoch: Epoch,
        /// Rises with each opening by this claim.
        opening: u64,
        /// To be brought up to date.
        resync: bool,
    },
    /// [`AcceptorAction::Persist`] of this serial is durable.
    Persisted {
        /// Which.
        serial: u64,
    },
    /// The session ends. With `clean` everything was flushed before.
    Close {
        /// Which.
        session: SessionRef,
        /// In order.
        clean: bool,
        /// To be answered with, when `clean`.
        op: u64,
    },
    /// The head has made this replica whole and flushed it.
    Whole {
        /// By whom.
        session: SessionRef,
        /// To be answered with.
        op: u64,
    },
    /// A connection ended.
    LinkClosed {
        /// Which.
        link: LinkId,
    },
    /// The store stopped after an I/O error: what it answered may be lost.
    StoreFailed,
}

/// What the shell must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcceptorAction {
    /// Make the seal durable, then report [`AcceptorEvent::Persisted`]. Later ones replace earlier ones.
    Persist {
        /// Comes back.
        serial: u64,
        /// What to keep.
        seal: Seal,
    },
    /// Answer an opening: it is sealed. Add the highest version that the store holds of the volume.
    Opened {
        /// Whom.
        session: SessionRef,
        /// At which epoch.
        epoch: Epoch,
        /// It lacks writes that it had answered.
        lost_power: bool,
    },
    /// Refuse an opening.
    Refused {
        /// Whom.
        session: SessionRef,
        /// Why.
        status: super::wire::Status,
        /// What it is sealed at.
        epoch: Epoch,
    },
    /// Tell a session that it is at its end. It must be on its link before any answer that is given there later,
    /// signs of life included.
    Fenced {
        /// Whom.
        session: SessionRef,
        /// By which epoch.
        epoch: Epoch,
    },
    /// Answer a `Close` or `Whole`.
    Done {
        /// Whom.
        session: SessionRef,
        /// Its number.
        op: u64,
        /// The outcome.
        status: super::wire::Status,
    },
}

#[derive(Clone, Copy, Debug)]
struct Session {
    session: SessionRef,
    epoch: Epoch,
}

/// An answer that waits for a seal to be durable.
#[derive(Clone, Copy, Debug)]
enum Waiting {
    Open { session: SessionRef, epoch: Epoch },
    Done { session: SessionRef, op: u64 },
}

/// Whose operations one store takes for one volume.
#[derive(Debug)]
pub struct Acceptor {
    rules: Rules,
    boot: BootId,
    seal: Seal,
    /// The last opening by the claim of the seal.
    opening: u64,
    /// Whose operations are taken; none until an opening was answered.
    current: Option<Session>,
    /// Earlier sessions that are still listened to: only with a rule switched off.
    unsealed: SmallVec<[Session; 2]>,
    /// Operations taken that the store has not finished.
    executing: u32,
    /// The last `Persist` given out, and the last that is durable.
    persist: u64,
    persisted: u64,
    waiting: SmallVec<[(u64, Waiting); 2]>,
    failed: bool,
}

impl Acceptor {
    /// An acceptor nobody has a session with. With [`Acceptor::lost`] true, the seal should be persisted soon; it will
    /// be with the next opening at the latest.
    pub fn new(rules: Rules, started: StartedWith) -> Acceptor {
        let mut seal = started.seal.unwrap_or_default();
        let other_boot = seal
            .opened_under
            .is_some_and(|opened| opened != started.boot);
        // Blocks without a seal: the node's database is gone, and with it the word that they were flushed.
        let unknown = started.seal.is_none() && started.store_epoch.is_some();
        if rules.power_loss_is_out {
            seal.lost |= other_boot || unknown || started.store_failed;
        }
        if let Some(epoch) = started.store_epoch.filter(|epoch| *epoch > seal.epoch) {
            // The head that it was sealed for has renewed its epoch since, or the database is an older one. Whose epoch it
            // is is not known; the record gives each to one head.
            seal.epoch = epoch;
            seal.claim = None;
        }
        Acceptor {
            rules,
            boot: started.boot,
            seal,
            opening: 0,
            current: None,
            unsealed: SmallVec::new(),
            executing: 0,
            persist: 0,
            persisted: 0,
            waiting: SmallVec::new(),
            failed: false,
        }
    }

    /// Takes an event.
    pub fn on_event(&mut self, event: AcceptorEvent, actions: &mut Vec<AcceptorAction>) {
        match event {
            AcceptorEvent::Open {
                session,
                claim,
                epoch,
                opening,
                resync,
            } => self.open(session, claim, epoch, opening, resync, actions),
            AcceptorEvent::Persisted { serial } => {
                self.persisted = self.persisted.max(serial);
                self.answer(actions);
            }
            AcceptorEvent::Close { session, clean, op } => self.close(session, clean, op, actions),
            AcceptorEvent::Whole { session, op } => {
                if !self.takes(session) {
                    actions.push(AcceptorAction::Done {
                        session,
                        op,
                        status: super::wire::Status::Fenced,
                    });
                    return;
                }
                self.seal.lost = false;
                self.persist(Waiting::Done { session, op }, actions);
            }
            AcceptorEvent::LinkClosed { link } => {
                self.current = self.current.filter(|current| current.session.link != link);
                self.unsealed.retain(|session| session.session.link != link);
                self.waiting.retain(|(_, waiting)| match waiting {
                    Waiting::Open { session, .. } | Waiting::Done { session, .. } => {
                        session.link != link
                    }
                });
            }
            AcceptorEvent::StoreFailed => {
                self.failed = true;
                if self.rules.power_loss_is_out {
                    self.seal.lost = true;
                }
                self.persist += 1;
                actions.push(AcceptorAction::Persist {
                    serial: self.persist,
                    seal: self.seal,
                });
            }
        }
    }

    fn open(
        &mut self,
        session: SessionRef,
        claim: HeadClaim,
        epoch: Epoch,
        opening: u64,
        resync: bool,
        actions: &mut Vec<AcceptorAction>,
    ) {
        let may_be_its = self.seal.claim.is_none_or(|known| known == claim);
        let again = epoch == self.seal.epoch && may_be_its && opening > self.opening;
        let status = if self.failed {
            super::wire::Status::Poisoned
        } else if epoch > self.seal.epoch || again {
            super::wire::Status::Ok
        } else {
            super::wire::Status::Fenced
        };
        if status != super::wire::Status::Ok {
            actions.push(AcceptorAction::Refused {
                session,
                status,
                epoch: self.seal.epoch,
            });
            return;
        }
        // From here on nothing of an earlier session is taken, durable or not.
        let before = self.current.take();
        if resync && !self.rules.seal_before_resync {
            self.unsealed.extend(before);
        } else if self.rules.epoch_check {
            let pending = self
                .waiting
                .iter()
                .filter_map(|(_, waiting)| match waiting {
                    Waiting::Open { session, .. } => Some(*session),
                    Waiting::Done { .. } => None,
                });
            for fenced in before.map(|b| b.session).into_iter().chain(pending) {
                if fenced != session {
                    actions.push(AcceptorAction::Fenced {
                        session: fenced,
                        epoch,
                    });
                }
            }
            self.unsealed.clear();
        } else {
            self.unsealed.extend(before);
        }
        self.waiting.clear();
        self.seal = Seal {
            epoch,
            claim: Some(claim),
            opened_under: Some(self.boot),
            lost: self.seal.lost,
        };
        self.opening = opening;
        self.persist(Waiting::Open { session, epoch }, actions);
    }

    fn close(
        &mut self,
        session: SessionRef,
        clean: bool,
        op: u64,
        actions: &mut Vec<AcceptorAction>,
    ) {
        let is_current = self.takes(session);
        if is_current {
            self.current = None;
        }
        self.unsealed.retain(|unsealed| unsealed.session != session);
        if !clean {
            return;
        }
        if is_current && self.executing == 0 && !self.failed {
            self.seal.opened_under = None;
            self.persist(Waiting::Done { session, op }, actions);
        } else {
            actions.push(AcceptorAction::Done {
                session,
                op,
                status: super::wire::Status::Fenced,
            });
        }
    }

    fn persist(&mut self, waiting: Waiting, actions: &mut Vec<AcceptorAction>) {
        self.persist += 1;
        self.waiting.push((self.persist, waiting));
        actions.push(AcceptorAction::Persist {
            serial: self.persist,
            seal: self.seal,
        });
    }

    /// Answers what is durable, and openings only when the operations of before have ended.
    fn answer(&mut self, actions: &mut Vec<AcceptorAction>) {
        let persisted = self.persisted;
        let drained = self.executing == 0 || !self.rules.epoch_check;
        let due = |(serial, waiting): &(u64, Waiting)| {
            *serial <= persisted && (drained || matches!(waiting, Waiting::Done { .. }))
        };
        while let Some(at) = self.waiting.iter().position(due) {
            match self.waiting.remove(at).1 {
                Waiting::Open { session, epoch } => {
                    self.current = Some(Session { session, epoch });
                    actions.push(AcceptorAction::Opened {
                        session,
                        epoch,
                        lost_power: self.seal.lost,
                    });
                }
                Waiting::Done { session, op } => actions.push(AcceptorAction::Done {
                    session,
                    op,
                    status: super::wire::Status::Ok,
                }),
            }
        }
    }

    /// Whether an operation of this session and epoch may go to the store. Every `true` is followed by exactly one
    /// [`Acceptor::finished`].
    #[inline]
    pub fn admit(&mut self, session: SessionRef, epoch: Epoch) -> bool {
        let same = |known: &Session| known.session == session && known.epoch == epoch;
        let taken = !self.failed
            && (self.current.as_ref().is_some_and(same) || self.unsealed.iter().any(same));
        self.executing += u32::from(taken);
        taken
    }

    /// The store has ended an operation.
    #[inline]
    pub fn finished(&mut self, actions: &mut Vec<AcceptorAction>) {
        self.executing -= 1;
        if self.executing == 0 && !self.waiting.is_empty() {
            self.answer(actions);
        }
    }

    fn takes(&self, session: SessionRef) -> bool {
        self.current
            .is_some_and(|current| current.session == session)
    }

    /// Whose work is taken.
    pub fn session(&self) -> Option<SessionRef> {
        self.current.map(|current| current.session)
    }

    /// What is durable, or will be when the last `Persist` is.
    pub fn seal(&self) -> Seal {
        self.seal
    }

    /// It lacks writes that it answered.
    pub fn lost(&self) -> bool {
        self.seal.lost
    }

    /// Some head has a session.
    pub fn is_open(&self) -> bool {
        self.current.is_some()
    }

    /// Panics when something that must always hold does not.
    pub fn check_invariants(&self) {
        assert!(self.persisted <= self.persist);
        if let Some(current) = self.current {
            assert_eq!(
                current.epoch, self.seal.epoch,
                "the session that operates is the one it is sealed for"
            );
            assert_eq!(self.seal.opened_under, Some(self.boot));
        }
        if self.rules.epoch_check && self.rules.seal_before_resync {
            assert!(self.unsealed.is_empty());
        }
        let opens = |(_, waiting): &&(u64, Waiting)| matches!(waiting, Waiting::Open { .. });
        assert!(
            self.waiting.iter().filter(opens).count() <= 1,
            "only the last opening is answered"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::NodeId;

    const BOOT: BootId = BootId(Uuid::from_u128(1));

    fn claim(n: u128) -> HeadClaim {
        HeadClaim {
            node: NodeId(Uuid::from_u128(n)),
            incarnation: Uuid::from_u128(n),
        }
    }

    /// What a head hears that opens the volume at an acceptor that found these.
    fn opened(seal: Option<Seal>, store_epoch: u32, by: HeadClaim, epoch: u32) -> AcceptorAction {
        let mut acceptor = Acceptor::new(
            Rules::default(),
            StartedWith {
                seal,
                store_epoch: Some(Epoch(store_epoch)),
                boot: BOOT,
                store_failed: false,
            },
        );
        let session = SessionRef {
            link: LinkId(1),
            tag: 1,
        };
        let mut actions = Vec::new();
        let open = AcceptorEvent::Open {
            session,
            claim: by,
            epoch: Epoch(epoch),
            opening: 1,
            resync: true,
        };
        acceptor.on_event(open, &mut actions);
        if let Some(AcceptorAction::Persist { serial, .. }) = actions.last().copied() {
            acceptor.on_event(AcceptorEvent::Persisted { serial }, &mut actions);
        }
        acceptor.check_invariants();
        actions.pop().expect("an answer")
    }

    fn is_refused(answer: &AcceptorAction) -> bool {
        matches!(answer, AcceptorAction::Refused { .. })
    }

    #[test]
    fn an_epoch_that_only_the_blocks_know_is_opened_by_whoever_has_it() {
        let old = Seal {
            epoch: Epoch(4),
            claim: Some(claim(4)),
            opened_under: Some(BOOT),
            lost: false,
        };
        // Without any seal there is no word that they were flushed either.
        for (seal, is_lost) in [(None, true), (Some(old), false)] {
            let answer = opened(seal, 5, claim(5), 5);
            let is_believed = matches!(
                answer,
                AcceptorAction::Opened { lost_power, .. } if lost_power == is_lost
            );
            assert!(is_believed, "{answer:?}");
            let answer = opened(seal, 5, claim(4), 4);
            assert!(is_refused(&answer), "an older head: {answer:?}");
        }
    }

    #[test]
    fn an_epoch_that_is_sealed_is_opened_again_by_its_head_alone() {
        let seal = Seal {
            epoch: Epoch(5),
            claim: Some(claim(5)),
            opened_under: Some(BOOT),
            lost: false,
        };
        let answer = opened(Some(seal), 5, claim(5), 5);
        let is_sound = matches!(
            answer,
            AcceptorAction::Opened {
                lost_power: false,
                ..
            }
        );
        assert!(is_sound, "{answer:?}");
        assert!(is_refused(&opened(Some(seal), 5, claim(6), 5)));
        assert!(is_refused(&opened(Some(seal), 5, claim(4), 4)));
    }
}
