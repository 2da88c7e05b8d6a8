//! The client: it writes values that it can tell apart and knows what it may read.

use std::collections::BTreeMap;

use crate::disk::{At, Content};
use crate::rng::Rng;

/// What the client knows of one block. Values are numbered in the order in which it wrote them.
#[derive(Clone, Debug)]
pub(crate) struct History {
    pub(crate) at: At,
    pub(crate) contents: Vec<Content>,
    /// The newest value whose write was answered.
    pub(crate) answered: usize,
    /// The newest value that was read.
    pub(crate) read: usize,
    /// The newest value that was answered before a flush that was answered.
    pub(crate) flushed: usize,
}

impl History {
    /// The oldest value with this content that is not before `floor`; otherwise the newest one that has it.
    pub(crate) fn number_of(&self, content: Content, floor: usize) -> Option<usize> {
        let has = |number: &usize| self.contents[*number] == content;
        (floor..self.contents.len())
            .find(has)
            .or_else(|| (0..floor.min(self.contents.len())).rev().find(has))
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    Write {
        contents: Vec<Content>,
        zeros: bool,
        durable: bool,
        numbers: Vec<usize>,
    },
    Read {
        floors: Vec<Floor>,
    },
    Flush {
        answered: Vec<usize>,
    },
}

/// What a block had to have when a read of it was sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Floor {
    pub(crate) answered: usize,
    pub(crate) read: usize,
    pub(crate) flushed: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct ClientOp {
    pub(crate) generation: u64,
    /// Places in `histories`, neighbours.
    pub(crate) blocks: std::ops::Range<usize>,
    pub(crate) kind: Kind,
    pub(crate) since_us: u64,
}

pub(crate) struct Client {
    pub(crate) histories: Vec<History>,
    pub(crate) ops: BTreeMap<u64, ClientOp>,
    pub(crate) next_op: u64,
    /// What it was told when it connected.
    pub(crate) generation: u64,
    pub(crate) answered_writes: u64,
    pub(crate) answered_reads: u64,
    pub(crate) answered_flushes: u64,
    pub(crate) sessions_ended: u64,
}

impl Client {
    pub(crate) fn new(blocks: &[At]) -> Client {
        Client {
            histories: blocks
                .iter()
                .map(|at| History {
                    at: *at,
                    contents: vec![0],
                    answered: 0,
                    read: 0,
                    flushed: 0,
                })
                .collect(),
            ops: BTreeMap::new(),
            next_op: 1,
            generation: 0,
            answered_writes: 0,
            answered_reads: 0,
            answered_flushes: 0,
            sessions_ended: 0,
        }
    }

    /// Neighbouring blocks of one chunk, or of two chunks that follow each other.
    fn some_blocks(&self, rng: &mut Rng) -> std::ops::Range<usize> {
        let first = rng.below(self.histories.len() as u64) as usize;
        let want = 1 + rng.below(3) as usize;
        let mut end = first + 1;
        while end < self.histories.len() && end - first < want {
            let (a, b) = (self.histories[end - 1].at, self.histories[end].at);
            let follows = b.0 == a.0 && b.1 == a.1 + 1;
            if !follows {
                break;
            }
            end += 1;
        }
        first..end
    }

    /// The next thing to do; `None` when the blocks it drew are being written and it waits for that.
    pub(crate) fn draw(&mut self, rng: &mut Rng, now_us: u64) -> Option<(u64, ClientOp)> {
        let blocks = self.some_blocks(rng);
        let what = rng.below(100);
        let kind = if what < 45 {
            let busy = self.ops.values().any(|op| {
                matches!(op.kind, Kind::Write { .. })
                    && op.blocks.start < blocks.end
                    && blocks.start < op.blocks.end
            });
            if busy {
                return None;
            }
            let zeros = rng.chance(15);
            let mut numbers = Vec::new();
            let mut contents = Vec::new();
            for history in &mut self.histories[blocks.clone()] {
                let number = history.contents.len();
                let (chunk, block) = history.at;
                let content = if zeros {
                    0
                } else {
                    u64::from(chunk) << 48 | u64::from(block) << 32 | number as u64
                };
                history.contents.push(content);
                numbers.push(number);
                contents.push(content);
            }
            Kind::Write {
                contents,
                zeros,
                durable: rng.chance(10),
                numbers,
            }
        } else if what < 90 {
            let floors = self.histories[blocks.clone()]
                .iter()
                .map(|history| Floor {
                    answered: history.answered,
                    read: history.read,
                    flushed: history.flushed,
                })
                .collect();
            Kind::Read { floors }
        } else {
            Kind::Flush {
                answered: self
                    .histories
                    .iter()
                    .map(|history| history.answered)
                    .collect(),
            }
        };
        let id = self.next_op;
        self.next_op += 1;
        let op = ClientOp {
            generation: self.generation,
            blocks,
            kind,
            since_us: now_us,
        };
        self.ops.insert(id, op.clone());
        Some((id, op))
    }

    /// The client's connection was ended because acknowledged writes may be gone: it knows only what was flushed.
    pub(crate) fn end_session(&mut self, generation: u64) {
        if generation <= self.generation {
            return;
        }
        self.generation = generation;
        self.sessions_ended += 1;
        self.ops.clear();
        for history in &mut self.histories {
            history.answered = history.flushed;
            history.read = history.flushed;
        }
    }

    /// Gives up what has been waiting for long: whether it happened is not known.
    pub(crate) fn give_up(&mut self, rng: &mut Rng, now_us: u64, after_us: u64) {
        let late: Vec<u64> = self
            .ops
            .iter()
            .filter(|(_, op)| now_us > op.since_us + after_us)
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            if rng.chance(50) {
                self.ops.remove(&id);
            }
        }
    }
}
