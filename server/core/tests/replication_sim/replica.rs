//! A node's replica: the acceptor and what it lets through to the disk.

use ashlar_core::replication::wire::Status;
use ashlar_core::replication::{AcceptorAction, AcceptorEvent, LinkId, SessionRef};
use ashlar_core::units::Epoch;

use crate::disk::{At, Cell};
use crate::message::{Answer, Ask, Found, What};
use crate::world::{Ev, World};
use std::collections::BTreeMap;

impl World {
    fn accept(&mut self, node: usize, event: AcceptorEvent) {
        let Some(mut acceptor) = self.nodes[node].acceptor.take() else {
            return;
        };
        let mut actions = Vec::new();
        acceptor.on_event(event, &mut actions);
        acceptor.check_invariants();
        self.nodes[node].acceptor = Some(acceptor);
        self.carry_out_accepted(node, actions);
    }

    fn carry_out_accepted(&mut self, node: usize, actions: Vec<AcceptorAction>) {
        for action in actions {
            match action {
                AcceptorAction::Persist { serial, seal } => {
                    let delay_us = self.rng.between(100, 2_000);
                    let n = &mut self.nodes[node];
                    let run = n.run;
                    n.seals_until_us = (self.now_us + delay_us).max(n.seals_until_us + 1);
                    let delay_us = n.seals_until_us - self.now_us;
                    self.after(
                        delay_us,
                        Ev::Persisted {
                            node,
                            run,
                            serial,
                            seal,
                        },
                    );
                }
                AcceptorAction::Opened {
                    session,
                    lost_power,
                    ..
                } => self.answer(
                    node,
                    session.link.0,
                    Answer::Opened {
                        tag: session.tag,
                        lost_power,
                    },
                ),
                AcceptorAction::Refused {
                    session,
                    status,
                    epoch,
                } => self.answer(
                    node,
                    session.link.0,
                    Answer::Refused {
                        tag: session.tag,
                        status,
                        epoch,
                    },
                ),
                AcceptorAction::Fenced { session, epoch } => self.answer(
                    node,
                    session.link.0,
                    Answer::Fenced {
                        tag: session.tag,
                        epoch,
                    },
                ),
                AcceptorAction::Done {
                    session,
                    op,
                    status,
                } => {
                    let result = if status == Status::Ok {
                        Ok(Found::Nothing)
                    } else {
                        Err(status)
                    };
                    self.answer(
                        node,
                        session.link.0,
                        Answer::Done {
                            tag: session.tag,
                            op,
                            result,
                        },
                    );
                }
            }
        }
    }

    pub(crate) fn on_persisted(&mut self, node: usize, serial: u64) {
        self.accept(node, AcceptorEvent::Persisted { serial });
    }

    pub(crate) fn on_conn_closed(&mut self, node: usize, conn: u64) {
        self.accept(node, AcceptorEvent::LinkClosed { link: LinkId(conn) });
    }

    pub(crate) fn store_failed(&mut self, node: usize) {
        self.nodes[node].disk.poisoned = true;
        self.accept(node, AcceptorEvent::StoreFailed);
    }

    pub(crate) fn on_ask(&mut self, node: usize, conn: u64, ask: Ask) {
        let session = |tag| SessionRef {
            link: LinkId(conn),
            tag,
        };
        match ask {
            Ask::Open {
                tag,
                claim,
                epoch,
                opening,
                resync,
            } => self.accept(
                node,
                AcceptorEvent::Open {
                    session: session(tag),
                    claim,
                    epoch,
                    opening,
                    resync,
                },
            ),
            Ask::Close { tag, clean, op } => self.accept(
                node,
                AcceptorEvent::Close {
                    session: session(tag),
                    clean,
                    op,
                },
            ),
            Ask::Heartbeat { sent_us } => self.answer(node, conn, Answer::Alive { sent_us }),
            Ask::Op {
                tag,
                op,
                what: What::Whole,
                ..
            } => self.accept(
                node,
                AcceptorEvent::Whole {
                    session: session(tag),
                    op,
                },
            ),
            Ask::Op {
                tag,
                epoch,
                op,
                what,
            } => self.execute(node, session(tag), epoch, op, what),
        }
    }

    fn execute(&mut self, node: usize, session: SessionRef, epoch: Epoch, op: u64, what: What) {
        let taken = self.nodes[node]
            .acceptor
            .as_mut()
            .is_some_and(|acceptor| acceptor.admit(session, epoch));
        if !taken {
            self.answer(
                node,
                session.link.0,
                Answer::Done {
                    tag: session.tag,
                    op,
                    result: Err(Status::Fenced),
                },
            );
            return;
        }
        let disk = &mut self.nodes[node].disk;
        let mut synced = None;
        let result = match what {
            What::Write {
                chunk,
                first,
                contents,
                version,
                zeros,
                durable,
            } => {
                let status = disk.write(chunk, first, &contents, version, zeros);
                if durable && status == Status::Ok {
                    synced = Some(disk.snapshot());
                }
                status_of(status)
            }
            What::Read {
                chunk,
                first,
                count,
            } => disk.read(chunk, first, count).map(Found::Data),
            What::Flush => {
                synced = Some(disk.snapshot());
                Ok(Found::Nothing)
            }
            What::Rows { query, from } => Ok(Found::Rows(disk.rows(&query, from))),
            What::Leaf { chunk, leaf } => Ok(Found::Leaf(disk.leaf(chunk, leaf))),
            What::Whole => Ok(Found::Nothing),
        };
        let delay_us = if synced.is_some() {
            self.rng.between(100, 4_000)
        } else {
            self.rng.between(1, 100)
        };
        let run = self.nodes[node].run;
        self.after(
            delay_us,
            Ev::Executed {
                node,
                run,
                session,
                op,
                result: Box::new(result),
                synced,
            },
        );
    }

    pub(crate) fn on_executed(
        &mut self,
        node: usize,
        session: SessionRef,
        op: u64,
        mut result: Result<Found, Status>,
        synced: Option<BTreeMap<At, Cell>>,
    ) {
        if let Some(snapshot) = synced {
            let status = self.nodes[node].disk.synced(snapshot);
            if status != Status::Ok {
                result = Err(status);
            }
        }
        self.answer(
            node,
            session.link.0,
            Answer::Done {
                tag: session.tag,
                op,
                result,
            },
        );
        let mut actions = Vec::new();
        if let Some(acceptor) = &mut self.nodes[node].acceptor {
            acceptor.finished(&mut actions);
        }
        self.carry_out_accepted(node, actions);
    }
}

fn status_of(status: Status) -> Result<Found, Status> {
    if status == Status::Ok {
        Ok(Found::Nothing)
    } else {
        Err(status)
    }
}
