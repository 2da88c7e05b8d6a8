//! A store as replication sees it: what it has of each block, what of that would survive a power cut, and what is
//! damaged. The store proper has a simulation of its own (store_sim).

use std::collections::BTreeMap;

use ashlar_core::replication::wire::{LeafStates, RowVersions, Rows, RowsQuery, Status};
use ashlar_core::replication::{BlockContent, BlockState};
use ashlar_core::units::{CHUNK_LEAVES, ChunkIndex, Epoch, LEAF_BLOCKS, Version};

use crate::rng::Rng;

/// What is in a block: zero for zeros, otherwise a number that no other write has.
pub(crate) type Content = u64;
/// A chunk and a block in it.
pub(crate) type At = (u32, u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) version: Version,
    pub(crate) content: Content,
    pub(crate) rot: Rot,
}

/// How a block is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rot {
    None,
    /// What is read does not match its checksum.
    Bytes,
    /// The leaf that mapped it is lost: whether anything was there is not known.
    Mapping,
}

pub(crate) fn leaf_of(at: At) -> (u32, u32) {
    (at.0, at.1 / LEAF_BLOCKS)
}

impl Cell {
    /// What its store knows of it: with a leaf its versions are lost.
    fn known_version(&self) -> Version {
        match self.rot {
            Rot::Mapping => Version::NONE,
            Rot::None | Rot::Bytes => self.version,
        }
    }

    pub(crate) fn is_rotten(&self) -> bool {
        self.rot != Rot::None
    }
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    now: BTreeMap<At, Cell>,
    durable: BTreeMap<At, Cell>,
    /// Since the last sync: every state a block went through.
    unsynced: BTreeMap<At, Vec<Cell>>,
    /// Refuses new blocks.
    pub(crate) full: bool,
    /// Stopped after an I/O error.
    pub(crate) poisoned: bool,
    /// Reads fail for now.
    pub(crate) failing_reads: bool,
    /// With a rule switched off writes may come late. With all of them none may.
    may_be_late: bool,
}

impl Disk {
    pub(crate) fn new(may_be_late: bool) -> Disk {
        Disk {
            may_be_late,
            ..Disk::default()
        }
    }

    pub(crate) fn write(
        &mut self,
        chunk: u32,
        first: u32,
        contents: &[Content],
        version: Version,
        zeros: bool,
    ) -> Status {
        if self.poisoned {
            return Status::Poisoned;
        }
        let blocks = || (first..).take(contents.len()).map(|block| (chunk, block));
        let is_empty = |cell: &Cell| cell.content == 0 && cell.rot != Rot::Mapping;
        let is_new = |at: At| self.now.get(&at).is_none_or(is_empty);
        if self.full && !zeros && blocks().any(is_new) {
            return Status::NoSpace;
        }
        for (at, content) in blocks().zip(contents) {
            // A store takes an older write for one that came late, and drops it when it maps what it has acknowledged.
            let before = self.now.get(&at).map_or(Version::NONE, Cell::known_version);
            if before > version {
                assert!(
                    self.may_be_late,
                    "block {at:?} has {before:?} and is written with {version:?}"
                );
                continue;
            }
            let cell = Cell {
                version,
                content: *content,
                rot: Rot::None,
            };
            self.now.insert(at, cell);
            self.unsynced.entry(at).or_default().push(cell);
        }
        Status::Ok
    }

    pub(crate) fn read(&self, chunk: u32, first: u32, count: u32) -> Result<Vec<Content>, Status> {
        if self.poisoned {
            return Err(Status::Poisoned);
        }
        if self.failing_reads {
            return Err(Status::Device);
        }
        (first..first + count)
            .map(|block| match self.now.get(&(chunk, block)) {
                Some(cell) if cell.is_rotten() => Err(Status::Corrupt),
                Some(cell) => Ok(cell.content),
                None => Ok(0),
            })
            .collect()
    }

    /// What a sync that begins now will have made durable when it ends.
    pub(crate) fn snapshot(&self) -> BTreeMap<At, Cell> {
        self.now.clone()
    }

    /// A sync ended that began with `snapshot`.
    pub(crate) fn synced(&mut self, snapshot: BTreeMap<At, Cell>) -> Status {
        if self.poisoned {
            return Status::Poisoned;
        }
        for (at, cell) in snapshot {
            let newer = self
                .durable
                .get(&at)
                .is_some_and(|have| have.version > cell.version);
            if newer {
                continue;
            }
            self.durable.insert(at, cell);
            if let Some(states) = self.unsynced.get_mut(&at) {
                // States up to the one that was synced are behind it.
                if let Some(last) = states
                    .iter()
                    .rposition(|state| state.version == cell.version)
                {
                    states.drain(..=last);
                }
                if states.is_empty() {
                    self.unsynced.remove(&at);
                }
            }
        }
        Status::Ok
    }

    /// The machine lost power: of what was not synced, any state of each block may be there.
    pub(crate) fn lose_power(&mut self, rng: &mut Rng) {
        let lose_all = rng.chance(40);
        for (at, states) in std::mem::take(&mut self.unsynced) {
            let keep = if lose_all {
                0
            } else {
                rng.below(states.len() as u64 + 1) as usize
            };
            if keep > 0 {
                self.durable.insert(at, states[keep - 1]);
            }
        }
        self.now = self.durable.clone();
        self.poisoned = false;
    }

    /// Makes zeros of chunks that this store is not to hold any more, durably, as the store proper does.
    pub(crate) fn give_back(&mut self, unwanted: impl Fn(ChunkIndex) -> bool) {
        let mut newest: BTreeMap<(u32, u32), Version> = BTreeMap::new();
        for (at, cell) in &self.now {
            let version = newest.entry(leaf_of(*at)).or_default();
            *version = (*version).max(cell.version);
        }
        let left = self
            .now
            .iter_mut()
            .filter(|(at, _)| unwanted(ChunkIndex(at.0)))
            .filter(|(_, cell)| cell.content != 0 || cell.is_rotten());
        for (at, cell) in left {
            *cell = Cell {
                version: newest[&leaf_of(*at)],
                content: 0,
                rot: Rot::None,
            };
            self.durable.insert(*at, *cell);
            self.unsynced.remove(at);
        }
    }

    pub(crate) fn rot(&mut self, at: At) {
        if let Some(cell) = self.now.get_mut(&at).filter(|cell| cell.content != 0) {
            cell.rot = Rot::Bytes;
        }
    }

    /// What the store has of a block is lost with the leaf that mapped it.
    pub(crate) fn lose_mapping(&mut self, at: At) {
        let hole = Cell {
            version: Version::NONE,
            content: 0,
            rot: Rot::None,
        };
        self.now.entry(at).or_insert(hole).rot = Rot::Mapping;
    }

    pub(crate) fn blocks(&self) -> impl Iterator<Item = (At, Cell)> {
        self.now.iter().map(|(at, cell)| (*at, *cell))
    }

    pub(crate) fn get(&self, at: At) -> Option<Cell> {
        self.now.get(&at).copied()
    }

    pub(crate) fn highest_epoch(&self) -> Option<Epoch> {
        self.now.values().map(|cell| cell.version.epoch()).max()
    }

    pub(crate) fn rows(&self, query: &RowsQuery, from: ChunkIndex) -> Rows {
        let mut rows: BTreeMap<u32, [Version; CHUNK_LEAVES as usize]> = BTreeMap::new();
        for ((chunk, block), cell) in &self.now {
            if *chunk >= from.0 && query.names(ChunkIndex(*chunk)) {
                let row = rows
                    .entry(*chunk)
                    .or_insert([Version::NONE; CHUNK_LEAVES as usize]);
                let leaf = &mut row[(block / LEAF_BLOCKS) as usize];
                *leaf = (*leaf).max(cell.version);
            }
        }
        let mut rows: Vec<RowVersions> = rows
            .into_iter()
            .filter(|(_, leaves)| leaves.iter().any(|version| *version >= query.floor))
            .map(|(chunk, leaves)| RowVersions {
                chunk: ChunkIndex(chunk),
                leaves,
            })
            .collect();
        // Pages of one row, so that paging is what is exercised.
        let more = rows.len() > 1;
        rows.truncate(1);
        Rows { rows, more }
    }

    pub(crate) fn leaf(&self, chunk: u32, leaf: u32) -> LeafStates {
        let mut states = LeafStates::holes();
        let first = leaf * LEAF_BLOCKS;
        for ((_, block), cell) in self.now.range((chunk, first)..(chunk, first + LEAF_BLOCKS)) {
            states.0[(block - first) as usize] = BlockState {
                version: cell.known_version(),
                content: match cell.rot {
                    Rot::Mapping => BlockContent::Lost,
                    _ if cell.content == 0 => BlockContent::Zeros,
                    Rot::None | Rot::Bytes => BlockContent::Data,
                },
            };
        }
        states
    }
}
