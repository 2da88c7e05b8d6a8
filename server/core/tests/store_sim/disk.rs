//! A disk that keeps what was synced and, of everything since, whatever the seed says: any subset of writes, torn
//! at 512 bytes.

use std::cell::RefCell;
use std::rc::Rc;

use ashlar_core::store::{BlockingDisk, DiskError, Errno};
use ashlar_core::units::BLOCK_BYTES;

use crate::rng::Rng;

const SECTOR: usize = 512;
type Block = Rc<[u8; BLOCK_BYTES]>;

/// A completed or running write of one block.
#[derive(Clone, PartialEq)]
struct Volatile {
    block: u32,
    data: Block,
    /// Order of completion; a sync covers those completed before it was issued.
    stamp: u64,
}

#[derive(Clone, PartialEq)]
pub(crate) struct SimDisk {
    stable: Vec<Option<Block>>,
    volatile: Vec<Volatile>,
    stamp: u64,
}

impl SimDisk {
    pub(crate) fn new(blocks: u32) -> SimDisk {
        SimDisk {
            stable: vec![None; blocks as usize],
            volatile: Vec::new(),
            stamp: 0,
        }
    }

    fn blocks_of(offset: u64, bytes: &[u8]) -> impl Iterator<Item = (u32, Block)> {
        assert_eq!(offset % BLOCK_BYTES as u64, 0);
        assert_eq!(bytes.len() % BLOCK_BYTES, 0);
        let first = (offset / BLOCK_BYTES as u64) as u32;
        bytes
            .chunks_exact(BLOCK_BYTES)
            .enumerate()
            .map(move |(i, b)| {
                (
                    first + i as u32,
                    Rc::new(<[u8; BLOCK_BYTES]>::try_from(b).expect("a block")),
                )
            })
    }

    /// A write the device reported done.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8], durable: bool) {
        self.stamp += 1;
        for (block, data) in Self::blocks_of(offset, bytes) {
            if durable {
                self.volatile.retain(|v| v.block != block);
                self.stable[block as usize] = Some(data);
            } else {
                self.volatile.push(Volatile {
                    block,
                    data,
                    stamp: self.stamp,
                });
            }
        }
    }

    /// Where a sync issued now stands.
    pub(crate) fn stamp(&self) -> u64 {
        self.stamp
    }

    /// A sync that was issued at `stamp` is done.
    pub(crate) fn synced(&mut self, stamp: u64) {
        let volatile = std::mem::take(&mut self.volatile);
        for v in volatile {
            if v.stamp <= stamp {
                self.stable[v.block as usize] = Some(v.data);
            } else {
                self.volatile.push(v);
            }
        }
    }

    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) {
        let first = (offset / BLOCK_BYTES as u64) as u32;
        for (i, out) in out.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            let block = first + i as u32;
            match self.volatile.iter().rev().find(|v| v.block == block) {
                Some(v) => out.copy_from_slice(&v.data[..]),
                None => match &self.stable[block as usize] {
                    Some(b) => out.copy_from_slice(&b[..]),
                    None => out.fill(0),
                },
            }
        }
    }

    /// The power goes: of each sector, what is stable or any write since.
    pub(crate) fn power_cut(&mut self, rng: &mut Rng) {
        let volatile = std::mem::take(&mut self.volatile);
        // Some cuts keep nearly everything, some nearly nothing: both ends find bugs that the middle hides.
        let keep = [5, 50, 95][rng.below(3) as usize];
        for v in volatile {
            let stable = &mut self.stable[v.block as usize];
            let mut data = stable.as_ref().map_or([0; BLOCK_BYTES], |b| **b);
            let whole = rng.below(4) > 0;
            let all = rng.below(100) < keep;
            for s in 0..BLOCK_BYTES / SECTOR {
                if if whole { all } else { rng.below(100) < keep } {
                    data[s * SECTOR..][..SECTOR].copy_from_slice(&v.data[s * SECTOR..][..SECTOR]);
                }
            }
            *stable = Some(Rc::new(data));
        }
    }

    /// The process dies with a write under way: any part of it may still land.
    pub(crate) fn interrupted_write(&mut self, offset: u64, bytes: &[u8], rng: &mut Rng) {
        self.stamp += 1;
        let all = rng.below(3);
        for (block, data) in Self::blocks_of(offset, bytes) {
            let mut now = [0; BLOCK_BYTES];
            self.read(u64::from(block) * BLOCK_BYTES as u64, &mut now);
            for s in 0..BLOCK_BYTES / SECTOR {
                if all == 0 || (all == 1 && rng.below(2) == 0) {
                    now[s * SECTOR..][..SECTOR].copy_from_slice(&data[s * SECTOR..][..SECTOR]);
                }
            }
            self.volatile.push(Volatile {
                block,
                data: Rc::new(now),
                stamp: self.stamp,
            });
        }
    }
}

/// The disk while a store is opened: it may die after a number of writes and syncs.
pub(crate) struct Opening<'a> {
    pub(crate) disk: &'a RefCell<SimDisk>,
    /// Writes and syncs left before the machine dies.
    pub(crate) lives: u64,
}

impl Opening<'_> {
    fn live(&mut self) -> Result<(), DiskError> {
        if self.lives == 0 {
            return Err(DiskError(Errno::EIO));
        }
        self.lives -= 1;
        Ok(())
    }
}

impl BlockingDisk for Opening<'_> {
    fn size_bytes(&mut self) -> Result<u64, DiskError> {
        Ok((self.disk.borrow().stable.len() * BLOCK_BYTES) as u64)
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.disk.borrow().read(offset, buf);
        Ok(())
    }

    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        if let Err(e) = self.live() {
            // It dies in the middle of this one.
            self.disk.borrow_mut().write(
                offset,
                &buf[..buf.len() / 2 / BLOCK_BYTES * BLOCK_BYTES],
                false,
            );
            return Err(e);
        }
        self.disk.borrow_mut().write(offset, buf, false);
        Ok(())
    }

    fn sync(&mut self) -> Result<(), DiskError> {
        self.live()?;
        let stamp = self.disk.borrow().stamp();
        self.disk.borrow_mut().synced(stamp);
        Ok(())
    }

    fn allocate(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.live()?;
        self.disk
            .borrow_mut()
            .write(offset, &vec![0; len as usize], false);
        Ok(())
    }
}
