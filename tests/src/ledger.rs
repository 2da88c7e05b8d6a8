//! What one careful client may find on its volume, when every operation may fail.
//!
//! One client, one operation at a time, so that no ordering is in question: an answered write is there, a failed one may
//! be or not, and what a read has shown stays.

use std::collections::HashMap;

use crate::nbd::{Failure, Request, Transmission, wire};
use crate::pattern::{self, BLOCK, Content};
use crate::seed::Rng;

/// The versions each block may have.
#[derive(Clone)]
pub struct Ledger {
    volume: u64,
    next_version: u64,
    possible: HashMap<u64, Vec<u64>>,
    blocks: u64,
    /// Every write: first block, count, version.
    written: Vec<(u64, u64, u64)>,
    /// Every trim and zeroing: first block, count, and the version that the next write would have had.
    cleared: Vec<(u64, u64, u64)>,
}

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    Well,
    /// The server answered with this errno.
    Refused(u32),
    /// The connection is gone.
    Lost,
}

impl Ledger {
    /// For a volume of `blocks` blocks of which none was written.
    pub fn new(volume: u64, blocks: u64) -> Ledger {
        Ledger {
            volume,
            next_version: 1,
            possible: HashMap::new(),
            blocks,
            written: Vec::new(),
            cleared: Vec::new(),
        }
    }

    /// For a volume whose blocks hold the versions of `known`.
    pub fn known(volume: u64, blocks: u64, known: &[(u64, u64)]) -> Ledger {
        let next_version = known
            .iter()
            .map(|(_, version)| version + 1)
            .max()
            .unwrap_or(1);
        let possible = known
            .iter()
            .map(|(block, version)| (*block, vec![*version]))
            .collect();
        Ledger {
            volume,
            next_version,
            possible,
            blocks,
            written: Vec::new(),
            cleared: Vec::new(),
        }
    }

    /// Blocks that are known to hold data.
    pub fn written(&self) -> Vec<u64> {
        let mut blocks: Vec<u64> = self
            .possible
            .iter()
            .filter(|(_, versions)| !versions.contains(&0))
            .map(|(block, _)| *block)
            .collect();
        blocks.sort_unstable();
        blocks
    }

    /// What block `block` holds, when there is no doubt.
    pub fn certain(&self, block: u64) -> Option<u64> {
        match self.possible.get(&block).map(Vec::as_slice) {
            None => Some(0),
            Some([version]) => Some(*version),
            Some(_) => None,
        }
    }

    /// The bytes of a version of a block.
    pub fn bytes(&self, block: u64, version: u64) -> Vec<u8> {
        if version == 0 {
            vec![0; BLOCK]
        } else {
            pattern::blocks(self.volume, block, 1, version)
        }
    }

    /// What may be found when everything since this ledger was taken may be lost, block by block: `later` is the same
    /// ledger after more work, of which every write since counts as one that may have happened.
    pub fn or_later(&self, later: &Ledger) -> Ledger {
        let mut both = self.clone();
        both.next_version = later.next_version;
        for block in 0..self.blocks {
            let mut versions = self
                .possible
                .get(&block)
                .cloned()
                .unwrap_or_else(|| vec![0]);
            for (first, count, version) in &later.written {
                if *version >= self.next_version && (*first..first + count).contains(&block) {
                    versions.push(*version);
                }
            }
            for (first, count, at) in &later.cleared {
                if *at >= self.next_version && (*first..first + count).contains(&block) {
                    versions.push(0);
                }
            }
            both.possible.insert(block, versions);
        }
        both
    }

    fn settle(&mut self, first: u64, count: u64, version: u64, ended: &Ended) {
        for block in first..first + count {
            let versions = self.possible.entry(block).or_insert_with(|| vec![0]);
            if *ended == Ended::Well {
                versions.clear();
            }
            if !versions.contains(&version) {
                versions.push(version);
            }
        }
    }

    /// Writes the next version to `count` blocks.
    pub fn write(
        &mut self,
        client: &mut Transmission,
        first: u64,
        count: u64,
        flags: u16,
    ) -> Ended {
        let version = self.next_version;
        self.next_version += 1;
        self.written.push((first, count, version));
        let payload = pattern::blocks(self.volume, first, count, version);
        let request = Request {
            flags,
            command: wire::CMD_WRITE,
            offset: first * BLOCK as u64,
            length: payload.len() as u64,
            payload: &payload,
        };
        let ended = ended(client.ask(&request)).0;
        self.settle(first, count, version, &ended);
        ended
    }

    /// Trims or zeroes `count` blocks.
    pub fn clear(
        &mut self,
        client: &mut Transmission,
        first: u64,
        count: u64,
        command: u16,
    ) -> Ended {
        self.cleared.push((first, count, self.next_version));
        let (offset, length) = (first * BLOCK as u64, count * BLOCK as u64);
        let ended = ended(client.ask(&Request {
            command,
            offset,
            length,
            ..Request::default()
        }))
        .0;
        self.settle(first, count, 0, &ended);
        ended
    }

    /// Reads `count` blocks; data that comes must be right.
    pub fn read(
        &mut self,
        client: &mut Transmission,
        first: u64,
        count: u64,
    ) -> Result<Ended, String> {
        let (offset, length) = (first * BLOCK as u64, count * BLOCK as u64);
        let request = Request {
            command: wire::CMD_READ,
            offset,
            length,
            ..Request::default()
        };
        let (ended, data) = ended(client.ask(&request));
        if ended == Ended::Well {
            for (at, bytes) in data.chunks_exact(BLOCK).enumerate() {
                let block = first + at as u64;
                let seen = match pattern::identify(bytes, self.volume, block)? {
                    Content::Zeros => 0,
                    Content::Version(version) => version,
                };
                let versions = self.possible.entry(block).or_insert_with(|| vec![0]);
                if !versions.contains(&seen) {
                    return Err(format!(
                        "block {block} is version {seen}; it can only be one of {versions:?}"
                    ));
                }
                *versions = vec![seen];
            }
        }
        Ok(ended)
    }

    /// One operation drawn at random; the error is a broken promise.
    pub fn anything(&mut self, client: &mut Transmission, rng: &mut Rng) -> Result<Ended, String> {
        let count = rng.logarithmic(32).min(self.blocks);
        let first = rng.below(self.blocks - count + 1);
        let fua = if rng.chance(20) {
            wire::CMD_FLAG_FUA
        } else {
            0
        };
        match rng.below(20) {
            0..9 => Ok(self.write(client, first, count, fua)),
            9 => Ok(self.clear(client, first, count, wire::CMD_TRIM)),
            10 => Ok(self.clear(client, first, count, wire::CMD_WRITE_ZEROES)),
            11..14 => Ok(ended(client.ask(&Request {
                command: wire::CMD_FLUSH,
                ..Request::default()
            }))
            .0),
            _ => self.read(client, first, count),
        }
    }

    /// Reads the whole volume; nothing may fail.
    pub fn verify(&mut self, client: &mut Transmission) -> Result<(), String> {
        let mut first = 0;
        while first < self.blocks {
            let count = (self.blocks - first).min(256);
            match self.read(client, first, count)? {
                Ended::Well => {}
                other => return Err(format!("reading blocks {first}+{count}: {other:?}")),
            }
            first += count;
        }
        Ok(())
    }

    /// Reads block by block what may be damaged; returns how many blocks came as errors. Wrong data is an error here.
    pub fn verify_damaged(&mut self, client: &mut Transmission) -> Result<u64, String> {
        let mut damaged = 0;
        for block in 0..self.blocks {
            match self.read(client, block, 1)? {
                Ended::Well => {}
                Ended::Refused(wire::EIO) => damaged += 1,
                other => return Err(format!("reading block {block}: {other:?}")),
            }
        }
        Ok(damaged)
    }
}

fn ended(result: Result<crate::nbd::Answer, Failure>) -> (Ended, Vec<u8>) {
    match result {
        Ok(answer) if answer.errno == 0 => (Ended::Well, answer.data),
        Ok(answer) => (Ended::Refused(answer.errno), Vec::new()),
        Err(Failure::Io(error)) if error.kind() != std::io::ErrorKind::WouldBlock => {
            (Ended::Lost, Vec::new())
        }
        Err(other) => panic!("{other}"),
    }
}
