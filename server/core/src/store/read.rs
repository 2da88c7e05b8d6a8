//! Reads: from the tail, from zeros, or from disk with every block's checksum verified.

use smallvec::SmallVec;

use super::format::{Addr, ExtentKey};
use super::index::{Lookup, RowId, leaf_of};
use super::machine::Io;
use super::{Action, Errno, OpId, ReadInfo, ReadOutcome, Store, StoreError};
use crate::units::{BLOCK_BYTES, CHUNK_BLOCKS, LEAF_BLOCKS};

/// Most blocks one disk read fetches (1 MiB).
const RUN_BLOCKS: u32 = 256;

/// Who a read is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reader {
    Client(OpId),
    Scrub,
}

/// A read that could not be answered at once.
pub(super) struct ReadOp {
    pub(super) reader: Reader,
    row: RowId,
    first: u32,
    count: u32,
    /// Blocks looked up so far.
    resolved: u32,
    buf: *mut u8,
    runs: u32,
    info: ReadInfo,
    error: Option<StoreError>,
}

// SAFETY: `buf` names memory that the caller of `read` leaves alone until the operation ends.
unsafe impl Send for ReadOp {}

impl ReadOp {
    pub(super) fn is_of(&self, row: RowId) -> bool {
        self.row == row
    }
}

/// One disk read of adjacent blocks.
pub(super) struct Run {
    op: u32,
    addr: Addr,
    /// First block, relative to the operation.
    at: u32,
    crcs: SmallVec<[u32; 8]>,
}

impl Store {
    /// Reads `buf.len()` bytes, whole blocks inside one chunk.
    ///
    /// # Safety
    /// When this returns [`ReadOutcome::Pending`], the memory must stay valid and untouched until the `Done` of `op`.
    pub unsafe fn read(
        &mut self,
        op: OpId,
        key: ExtentKey,
        first_block: u32,
        buf: &mut [u8],
    ) -> Result<ReadOutcome, StoreError> {
        self.healthy()?;
        let count = (buf.len() / BLOCK_BYTES) as u32;
        assert!(
            buf.len().is_multiple_of(BLOCK_BYTES)
                && count > 0
                && first_block + count <= CHUNK_BLOCKS
        );
        let Some(row) = self.index.row_of(key) else {
            buf.fill(0);
            let mut info = ReadInfo::default();
            info.holes.push((0, count));
            return Ok(ReadOutcome::Done(info));
        };
        let id = self.start_read(
            Reader::Client(op),
            row,
            first_block,
            count,
            buf.as_mut_ptr(),
        );
        if self.is_over(id) {
            let read = self.take_read(id);
            return match read.error {
                Some(e) => Err(e),
                None => Ok(ReadOutcome::Done(read.info)),
            };
        }
        Ok(ReadOutcome::Pending)
    }

    pub(super) fn start_read(
        &mut self,
        reader: Reader,
        row: RowId,
        first: u32,
        count: u32,
        buf: *mut u8,
    ) -> u32 {
        let id = self.reads.insert(ReadOp {
            reader,
            row,
            first,
            count,
            resolved: 0,
            buf,
            runs: 0,
            info: ReadInfo::default(),
            error: None,
        }) as u32;
        self.resolve(id);
        id
    }

    /// Looks up as many blocks as the leaves in memory allow and starts their disk reads.
    pub(super) fn resolve(&mut self, id: u32) {
        let (row, first, count) = {
            let r = &self.reads[id as usize];
            (r.row, r.first, r.count)
        };
        let mut run: Option<(Addr, u32, SmallVec<[u32; 8]>)> = None;
        let mut last_leaf = u32::MAX;
        loop {
            let at = self.reads[id as usize].resolved;
            if at == count {
                break;
            }
            let block = first + at;
            let leaf = leaf_of(block);
            if leaf != last_leaf {
                if let Some(slot) = self.index.slot_of(row, leaf) {
                    self.doubts_damage(slot);
                }
                self.index.touch(row, leaf);
                last_leaf = leaf;
            }
            let found = self.index.lookup(row, block);
            if let Lookup::NeedLeaf = found {
                if let Some(error) = self.leaf_error(row, leaf) {
                    self.leaf_is_unreadable(id, error);
                    break;
                }
                // The leaves behind it will be wanted too: fetch them side by side.
                for l in leaf..=leaf_of(first + count - 1) {
                    if self.index.slot_of(row, l).is_none()
                        && self.index.row(row).leaves[l as usize].addr().is_stored()
                    {
                        let load = self.load_leaf(row, l);
                        if l == leaf {
                            load.reads.push(id);
                        }
                    }
                }
                break;
            }
            let next = &mut self.reads[id as usize];
            next.resolved += 1;
            // SAFETY: `at < count`, and the buffer holds `count` blocks that nobody else touches.
            let out = unsafe {
                std::slice::from_raw_parts_mut(next.buf.add(at as usize * BLOCK_BYTES), BLOCK_BYTES)
            };
            match found {
                Lookup::Hole | Lookup::Zero => {
                    out.fill(0);
                    match next.info.holes.last_mut() {
                        Some((f, n)) if *f + *n == at => *n += 1,
                        _ => next.info.holes.push((at, 1)),
                    }
                }
                Lookup::Lost => {
                    let key = self.index.row(row).key;
                    if next.reader == Reader::Scrub {
                        self.scrub.found_damaged(block, 1);
                    }
                    next.error.get_or_insert(StoreError::Lost {
                        layer: key.layer,
                        chunk: key.chunk,
                        block,
                    });
                }
                Lookup::Stored { addr, crc, seq } => {
                    if let Some(bytes) = self.in_tail(addr, seq) {
                        out.copy_from_slice(bytes);
                        if crc32fast::hash(out) != crc {
                            let key = self.index.row(row).key;
                            let error = StoreError::Corrupt {
                                layer: key.layer,
                                chunk: key.chunk,
                                block,
                            };
                            let read = &mut self.reads[id as usize];
                            read.error.get_or_insert(error.clone());
                            if read.reader == Reader::Scrub {
                                self.scrub.found_damaged(block, 1);
                            }
                            self.checksum_error(error);
                        }
                        continue;
                    }
                    match &mut run {
                        Some((start, from, crcs))
                            if start.0 + crcs.len() as u32 == addr.0
                                && *from + crcs.len() as u32 == at
                                && (crcs.len() as u32) < RUN_BLOCKS =>
                        {
                            crcs.push(crc);
                        }
                        _ => {
                            if let Some((start, from, crcs)) = run.take() {
                                self.start_run(id, start, from, crcs);
                            }
                            run = Some((addr, at, SmallVec::from_slice(&[crc])));
                        }
                    }
                }
                Lookup::NeedLeaf => unreachable!("handled above"),
            }
        }
        if let Some((start, from, crcs)) = run {
            self.start_run(id, start, from, crcs);
        }
    }

    /// The block's bytes, if its frame is still in the tail.
    fn in_tail(&self, addr: Addr, seq: u64) -> Option<&[u8]> {
        if seq == 0 {
            return None;
        }
        let (frame_addr, at) = match &self.hot.open {
            Some(open) if open.seq == seq => (open.addr, open.tail_at),
            _ => {
                let frame = self.hot.frame(seq)?;
                (frame.addr, frame.tail_at?)
            }
        };
        Some(self.tail.slice(at + (addr.0 - frame_addr.0), 1))
    }

    fn start_run(&mut self, op: u32, addr: Addr, at: u32, crcs: SmallVec<[u32; 8]>) {
        let len = crcs.len() * BLOCK_BYTES;
        let read = &mut self.reads[op as usize];
        read.runs += 1;
        // SAFETY: the run lies inside the operation's buffer.
        let ptr = unsafe { read.buf.add(at as usize * BLOCK_BYTES) };
        // A run may reach into the next segment when two are adjacent; pin each.
        self.pin(addr, crcs.len() as u32, true);
        let io = self.start_io(Io::Run(Run { op, addr, at, crcs }));
        self.actions.push(Action::Read {
            io,
            offset: addr.offset(),
            ptr,
            len,
        });
    }

    pub(super) fn pin(&mut self, addr: Addr, blocks: u32, on: bool) {
        let first = self.segments.geometry.segment_of(addr);
        let last = self.segments.geometry.segment_of(Addr(addr.0 + blocks - 1));
        for s in first..=last {
            if on {
                self.segments.all[s as usize].reads += 1;
            } else {
                self.unpin(self.segments.geometry.segment_start(s));
            }
        }
    }

    pub(super) fn on_run(&mut self, run: Run, result: Result<(), Errno>) {
        self.pin(run.addr, run.crcs.len() as u32, false);
        let read = &mut self.reads[run.op as usize];
        read.runs -= 1;
        let key = self.index.row(read.row).key;
        match result {
            Err(e) => {
                self.counters.read_errors += 1;
                read.error.get_or_insert(StoreError::Device(e));
                if read.reader == Reader::Scrub {
                    self.scrub
                        .found_damaged(read.first + run.at, run.crcs.len() as u32);
                }
            }
            Ok(()) => {
                let mut bad = SmallVec::<[StoreError; 1]>::new();
                for (i, crc) in run.crcs.iter().enumerate() {
                    let at = run.at + i as u32;
                    // SAFETY: inside the operation's buffer; the device is done with it.
                    let bytes = unsafe {
                        std::slice::from_raw_parts(
                            read.buf.add(at as usize * BLOCK_BYTES),
                            BLOCK_BYTES,
                        )
                    };
                    if crc32fast::hash(bytes) != *crc {
                        if read.reader == Reader::Scrub {
                            self.scrub.found_damaged(read.first + at, 1);
                        }
                        bad.push(StoreError::Corrupt {
                            layer: key.layer,
                            chunk: key.chunk,
                            block: read.first + at,
                        });
                    }
                }
                if let Some(first) = bad.first() {
                    read.error.get_or_insert(first.clone());
                }
                for error in bad {
                    self.checksum_error(error);
                }
            }
        }
        self.finish_read(run.op);
    }

    /// Ends a read that needed nothing from disk.
    pub(super) fn end_read_if_done(&mut self, id: u32) {
        self.finish_read(id);
    }

    /// A read that failed need not look up the rest, but its buffer is in use until its runs end.
    fn is_over(&self, id: u32) -> bool {
        let read = &self.reads[id as usize];
        read.runs == 0 && (read.resolved == read.count || read.error.is_some())
    }

    fn take_read(&mut self, id: u32) -> ReadOp {
        let read = self.reads.remove(id as usize);
        if read.resolved < read.count {
            self.forget_waiting(id);
        }
        read
    }

    pub(super) fn finish_read(&mut self, id: u32) {
        if !self.is_over(id) {
            return;
        }
        let read = self.take_read(id);
        match read.reader {
            Reader::Client(op) => {
                let result = match read.error {
                    Some(e) => Err(e),
                    None => Ok(read.info),
                };
                self.actions.push(Action::Done { op, result });
            }
            Reader::Scrub => {
                // Blocks that are not mapped were not read.
                let holes: u32 = read.info.holes.iter().map(|hole| hole.1).sum();
                let extent = self.index.row(read.row).key;
                self.on_scrub_read(extent, read.count - holes);
            }
        }
    }

    /// A read needs a leaf that the device cannot read.
    pub(super) fn leaf_is_unreadable(&mut self, id: u32, error: Errno) {
        let read = &mut self.reads[id as usize];
        read.error.get_or_insert(StoreError::Device(error));
        if read.reader == Reader::Scrub {
            let (first, count) = (read.first + read.resolved, read.count - read.resolved);
            self.scrub.found_damaged(first, count);
        }
    }

    fn forget_waiting(&mut self, id: u32) {
        for load in self.loads.values_mut() {
            load.reads.retain(|&r| r != id);
        }
    }

    /// Fails every read that waits for a leaf; those the device works on end when it does.
    pub(super) fn fail_waiting_reads(&mut self, error: &StoreError) {
        let ids: Vec<u32> = self.reads.iter().map(|(id, _)| id as u32).collect();
        for id in ids {
            self.reads[id as usize].error.get_or_insert(error.clone());
            self.finish_read(id);
        }
    }

    /// Runs of blocks as mapped (true) or reading as zeros (false), in order, `(mapped, count)`. `None` when a leaf
    /// must be loaded first: then a read of the range tells the same. What cannot be known, because the leaf cannot be
    /// read, counts as mapped.
    pub fn extents(
        &self,
        key: ExtentKey,
        first_block: u32,
        count: u32,
    ) -> Option<SmallVec<[(bool, u32); 4]>> {
        let mut runs: SmallVec<[(bool, u32); 4]> = SmallVec::new();
        let mut push = |mapped: bool, n: u32| match runs.last_mut() {
            Some((m, c)) if *m == mapped => *c += n,
            _ => runs.push((mapped, n)),
        };
        let Some(row) = self.index.row_of(key) else {
            push(false, count);
            return Some(runs);
        };
        let end = first_block + count;
        let mut block = first_block;
        while block < end {
            let leaf = leaf_of(block);
            let leaf_end = ((leaf + 1) * LEAF_BLOCKS).min(end);
            if !self.index.leaf_has_pending(row, leaf)
                && self.index.slot_of(row, leaf).is_none()
                && !self.index.row(row).leaves[leaf as usize].addr().is_stored()
            {
                push(false, leaf_end - block);
                block = leaf_end;
                continue;
            }
            match self.index.lookup(row, block) {
                Lookup::Stored { .. } | Lookup::Lost => push(true, 1),
                Lookup::Hole | Lookup::Zero => push(false, 1),
                Lookup::NeedLeaf if self.leaf_error(row, leaf).is_some() => push(true, 1),
                Lookup::NeedLeaf => return None,
            }
            block += 1;
        }
        Some(runs)
    }

    /// Fetches the leaves that [`Store::extents`] of the range needs; [`Action::Ready`] tells when to ask again.
    pub fn load_extents(&mut self, key: ExtentKey, first_block: u32, count: u32) {
        let Some(row) = self.index.row_of(key) else {
            return;
        };
        for leaf in leaf_of(first_block)..=leaf_of(first_block + count - 1) {
            if self.index.slot_of(row, leaf).is_none()
                && self.index.row(row).leaves[leaf as usize].addr().is_stored()
                && self.leaf_error(row, leaf).is_none()
            {
                self.load_leaf(row, leaf).awaited = true;
            }
        }
        self.want_ready = true;
    }
}
