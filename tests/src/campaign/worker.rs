//! One connection of a round.

use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::mpsc;

use super::{Campaign, Event, Round, versions_of};
use crate::history::{Tick, ZEROS};
use crate::nbd::{self, Failure, Request, Transmission, wire};
use crate::pattern::{self, BLOCK};
use crate::seed::Rng;

pub(super) struct Worker<'a> {
    pub(super) campaign: &'a Campaign,
    pub(super) state: &'a Round,
    pub(super) transmission: Transmission,
    pub(super) owned: Range<u64>,
    pub(super) depth: usize,
    pub(super) version: u64,
    pub(super) rng: Rng,
    pub(super) moment: mpsc::Sender<()>,
    pub(super) in_flight: HashMap<u64, Operation>,
    /// A request could not be sent.
    pub(super) broken: bool,
    /// Owned blocks with a write in flight.
    pub(super) busy: HashSet<u64>,
    /// Blocks of reads in flight. Bounded so that the answers always fit the socket's buffer: this client does not read
    /// while it sends.
    pub(super) read_blocks: u64,
    pub(super) events: Vec<Event>,
}

pub(super) struct Operation {
    command: u16,
    first: u64,
    count: u64,
    version: u64,
    start: Tick,
}

const READ_BLOCKS_MAX: u64 = 24;

impl Worker<'_> {
    /// Works until the connection breaks, which is how a round ends. An answer that is an error, or that is wrong in
    /// itself, fails the campaign.
    pub(super) fn work(mut self) -> Result<Vec<Event>, String> {
        loop {
            // An operation that does not fit what is in flight is drawn again, a few times.
            for _ in 0..2 * self.depth {
                if self.in_flight.len() < self.depth && !self.broken {
                    self.submit();
                }
            }
            if self.in_flight.is_empty() {
                continue;
            }
            match self.transmission.complete() {
                Ok(answer) => self.finish(answer)?,
                Err(Failure::Io(error)) if error.kind() != ErrorKind::WouldBlock => break,
                Err(other) => return Err(format!("{} in flight: {other}", self.in_flight.len())),
            }
        }
        for operation in self
            .in_flight
            .into_values()
            .filter(|operation| changes(operation.command))
        {
            let Operation {
                first,
                count,
                version,
                start,
                ..
            } = operation;
            self.events.push(Event::Write {
                first,
                count,
                version,
                start,
                finish: None,
            });
        }
        Ok(self.events)
    }

    /// Sends one more operation, unless the one that was drawn does not fit what is in flight.
    fn submit(&mut self) {
        let kind = self.rng.below(100);
        let mine = self.rng.chance(80);
        let most = if self.rng.chance(3) { 200 } else { 12 };
        let (first, count) = if mine {
            self.somewhere(self.owned.clone(), most)
        } else {
            self.somewhere(self.campaign.shared.clone(), 4)
        };
        let blocks = first..first + count;
        let fua = if self.rng.chance(8) {
            wire::CMD_FLAG_FUA
        } else {
            0
        };
        let command = match kind {
            0..60 => wire::CMD_WRITE,
            60..68 if mine => wire::CMD_TRIM,
            68..76 if mine => wire::CMD_WRITE_ZEROES,
            76..80 => wire::CMD_FLUSH,
            _ => wire::CMD_READ,
        };
        let taken =
            changes(command) && mine && blocks.clone().any(|block| self.busy.contains(&block));
        if taken || (command == wire::CMD_READ && self.read_blocks + count > READ_BLOCKS_MAX) {
            return;
        }
        let mut operation = Operation {
            command,
            first,
            count,
            version: ZEROS,
            start: 0,
        };
        let mut payload = Vec::new();
        if command == wire::CMD_WRITE {
            operation.version = self.version;
            self.version += 1;
            payload = pattern::blocks(self.state.volume, first, count, operation.version);
        }
        if changes(command) && mine {
            self.busy.extend(blocks);
        }
        if command == wire::CMD_READ {
            self.read_blocks += count;
        }
        let (offset, length) = match command {
            wire::CMD_FLUSH => (0, 0),
            _ => (first * BLOCK as u64, count * BLOCK as u64),
        };
        let flags = if changes(command) { fua } else { 0 };
        operation.start = self.state.tick();
        match self.transmission.submit(&Request {
            flags,
            command,
            offset,
            length,
            payload: &payload,
        }) {
            Ok(cookie) => {
                self.in_flight.insert(cookie, operation);
            }
            Err(_) => {
                // Some of it may have been sent; the connection is dead and the next read will say so.
                self.broken = true;
                self.in_flight.insert(u64::MAX, operation);
            }
        }
    }

    fn somewhere(&mut self, blocks: Range<u64>, most: u64) -> (u64, u64) {
        let count = self.rng.logarithmic(most);
        (self.rng.within(blocks.start..blocks.end - count + 1), count)
    }

    fn finish(&mut self, answer: nbd::Answer) -> Result<(), String> {
        let finish = self.state.tick();
        let Operation {
            command,
            first,
            count,
            version,
            start,
        } = self
            .in_flight
            .remove(&answer.cookie)
            .ok_or("an answer nobody waits for")?;
        if answer.errno != 0 {
            return Err(format!(
                "command {command} at block {first}+{count} got errno {}: {}",
                answer.errno, answer.text
            ));
        }
        if command == wire::CMD_READ {
            self.read_blocks -= count;
            let versions = versions_of(&answer.data, self.state.volume, first)?;
            self.events.push(Event::Read {
                first,
                versions,
                start,
                finish,
            });
        } else if changes(command) {
            for block in first..first + count {
                self.busy.remove(&block);
            }
            self.events.push(Event::Write {
                first,
                count,
                version,
                start,
                finish: Some(finish),
            });
        }
        if self.state.answered.fetch_add(1, Ordering::Relaxed) + 1 == self.state.end_after {
            let _ = self.moment.send(());
        }
        Ok(())
    }
}

fn changes(command: u16) -> bool {
    matches!(
        command,
        wire::CMD_WRITE | wire::CMD_TRIM | wire::CMD_WRITE_ZEROES
    )
}
