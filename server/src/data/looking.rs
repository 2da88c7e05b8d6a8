//! Looking again before sleep: when a data thread does, and what it makes of it. What it has learnt is in [`super::spin`].

use std::io;
use std::time::{Duration, Instant};

use super::halves;
use super::spin::{CLIENTS_SHARE, OTHERS_SHARE, Sent, Spin, give_way};
use super::thread::DataThread;
use crate::engine::Event;

/// Times a look asks whether there is something before it reads the clock.
const ASKS: u32 = 16;

/// A look before sleep.
#[derive(Debug)]
pub(super) struct Look {
    begun: Instant,
    until: Instant,
    /// What others had the processor for.
    others: Duration,
    /// Until it found something, or what might have been something.
    took: Duration,
}

/// What had gone through a thread by some moment.
pub(super) struct Traffic {
    sends: u64,
    received_bytes: u64,
    requests: u64,
    link_sends: u64,
    link_receives: u64,
}

impl DataThread {
    pub(super) fn traffic(&self) -> Traffic {
        Traffic {
            sends: self.metrics.sends.get(),
            received_bytes: self.metrics.received_bytes.get(),
            requests: self.metrics.requests.get(),
            link_sends: self.cluster.link_sends,
            link_receives: self.cluster.link_receives,
        }
    }

    /// Whether there was anything to do.
    pub(super) fn came_since(&self, before: &Traffic) -> bool {
        self.disk_answered
            || self.cluster.link_receives != before.link_receives
            || self.metrics.received_bytes.get() != before.received_bytes
    }

    /// Learns from the look that ended in this turn.
    pub(super) fn end_look(&mut self, came: bool) {
        match self.found.take() {
            // What it found had been taken already: it goes on.
            Some(look) if !came => self.look = Some(look),
            Some(look) => self.spin().learn(Some(look.took)),
            None => {}
        }
    }

    /// What the answers to what came are.
    pub(super) fn kind_of_answers(&mut self, before: &Traffic) -> Sent {
        let reads_ended = std::mem::take(&mut self.reads_ended);
        let disk_answered = std::mem::take(&mut self.disk_answered);
        match self.metrics.requests.get() - before.requests {
            _ if reads_ended >= halves::LEAST && self.reads_under_way == 0 => Sent::DiskBatch,
            _ if disk_answered => Sent::FromDisk,
            _ if self.cluster.link_receives != before.link_receives => Sent::ThroughLinks,
            0 | 1 => Sent::Alone,
            _ => Sent::Several,
        }
    }

    /// At the end of a turn: whether a look comes before sleep.
    pub(super) fn begin_look(&mut self, before: &Traffic) {
        let answered = self.metrics.sends.get() != before.sends;
        let asked = self.cluster.link_sends != before.link_sends;
        let gathers = self.cluster.link_receives != before.link_receives;
        if !(answered || asked || gathers) {
            return;
        }
        self.look = None;
        let has_more = !self.ready.is_empty()
            || !self.resumable.is_empty()
            || !self.halves.is_empty()
            || self.links_want_a_turn();
        if has_more {
            return;
        }
        if !answered {
            self.sent = if asked {
                Sent::OnLinks
            } else {
                Sent::PartOfLinks
            };
            self.hot = None;
        } else if self.sent == Sent::DiskBatch && self.reads_under_way > 0 {
            // More was asked for meanwhile.
            self.sent = Sent::FromDisk;
        }
        let now = Instant::now();
        let requests = self.metrics.requests.get();
        let until = self.spins.look_until(self.sent, now, requests);
        self.look = until.map(|until| Look {
            begun: now,
            until,
            others: Duration::ZERO,
            took: Duration::ZERO,
        });
    }

    /// Looks for events until its time is over, not counting what others had the processor for, or something has to be
    /// done. True: there may be some.
    pub(super) fn look(
        &mut self,
        mut look: Look,
        deadline: Option<Instant>,
        events: &mut Vec<Event>,
    ) -> io::Result<bool> {
        let mut now = Instant::now();
        let passed = Some(now);
        if deadline.is_some_and(|at| at <= now) {
            return Ok(false);
        }
        // A deadline that has passed: looks and does not block.
        self.engine.wait(passed, events)?;
        while events.is_empty() && now < look.until {
            if deadline.is_some_and(|at| at <= now) {
                return Ok(false);
            }
            if self.sent.yields() {
                let away = give_way();
                look.others += away;
                look.until += away;
                if look.others > OTHERS_SHARE {
                    break;
                }
            }
            if (0..ASKS).any(|_| {
                std::hint::spin_loop();
                self.engine.may_have_events()
            }) {
                // It is almost always the one just answered: look there without asking the engine first.
                match self.hot {
                    Some(token) => events.push(Event::Readable {
                        token,
                        hang_up: false,
                    }),
                    None => self.engine.wait(passed, events)?,
                }
            }
            now = Instant::now();
        }
        if !events.is_empty() {
            look.took = (now - look.begun).saturating_sub(look.others);
            self.found = Some(look);
            return Ok(true);
        }
        // Who takes the processor now, and gives it back soon, is the client that was to be driven off.
        let keeps_client = self.sent.drives_off() && {
            let away = give_way();
            !away.is_zero() && away < CLIENTS_SHARE
        };
        if keeps_client {
            self.spin().kept_client();
        } else {
            self.spin().learn(None);
        }
        Ok(false)
    }

    /// The habit that what was sent last has taught.
    fn spin(&mut self) -> &mut Spin {
        self.spins.after(self.sent)
    }
}
