//! Reading the client log back: from a checkpoint to its end.

use super::format::{
    Addr, Checkpoint, Entries, FRAME_DATA_BLOCKS, FRAME_HEADER_BLOCKS, FrameHeader, Geometry,
};
use super::{AlignedBuf, BlockingDisk, DiskError};
use crate::units::{BLOCK_BYTES, StoreId};

/// Walks the client log.
pub(super) struct LogReader {
    geometry: Geometry,
    store: StoreId,
    pub(super) segment: u32,
    pub(super) next_block: u32,
    pub(super) next_segment: u32,
    pub(super) last_seq: u64,
    pub(super) last_incarnation: u64,
    /// Segments that must be there: those of the checkpoint, and up to the highest that a frame names.
    pub(super) segments: u32,
    /// A piece of the segment read ahead: its first block (store-wide) and its bytes.
    window: Option<(Addr, AlignedBuf)>,
    last_blocks: u32,
}

/// A frame found in the log.
pub(super) struct LogFrame {
    pub(super) header: FrameHeader,
    pub(super) block: AlignedBuf,
}

impl LogReader {
    pub(super) fn new(store: StoreId, geometry: Geometry, checkpoint: &Checkpoint) -> LogReader {
        LogReader {
            geometry,
            store,
            segment: checkpoint.hot_segment,
            next_block: checkpoint.hot_block,
            next_segment: checkpoint.hot_next_segment,
            last_seq: checkpoint.hot_seq,
            last_incarnation: checkpoint.hot_incarnation,
            segments: checkpoint.segments.len() as u32,
            window: None,
            last_blocks: 1,
        }
    }

    /// Where the next frame would begin.
    pub(super) fn position(&self) -> (u32, u32) {
        if self.geometry.segment_blocks - self.next_block < 2 {
            (self.next_segment, 0)
        } else {
            (self.segment, self.next_block)
        }
    }

    fn block_at(&mut self, disk: &mut impl BlockingDisk, addr: Addr) -> Result<&[u8], DiskError> {
        let inside = |w: &(Addr, AlignedBuf)| {
            addr >= w.0 && addr.0 < w.0.0 + (w.1.len() / BLOCK_BYTES) as u32
        };
        if !self.window.as_ref().is_some_and(inside) {
            // Small frames lie close together: fetch many at once. Large ones are hopped over.
            let segment_end = self
                .geometry
                .segment_start(self.geometry.segment_of(addr))
                .0
                + self.geometry.segment_blocks;
            let want = if self.last_blocks > 64 { 1 } else { 64 };
            let mut buf = AlignedBuf::blocks(want.min(segment_end - addr.0));
            match disk.read(addr.offset(), &mut buf) {
                // Alone, and once more: the log may never have come to what was read with it.
                Err(e) if e.is_of_the_medium() => {
                    buf = AlignedBuf::blocks(1);
                    disk.read(addr.offset(), &mut buf)?;
                }
                result => result?,
            }
            self.window = Some((addr, buf));
        }
        let (start, buf) = self.window.as_ref().expect("just read");
        let at = (addr.0 - start.0) as usize * BLOCK_BYTES;
        Ok(&buf[at..at + BLOCK_BYTES])
    }

    /// The next frame, or `None` where the log ends.
    pub(super) fn next(
        &mut self,
        disk: &mut impl BlockingDisk,
    ) -> Result<Option<LogFrame>, DiskError> {
        let (segment, block) = self.position();
        let addr = Addr(self.geometry.segment_start(segment).0 + block);
        let (seq, incarnation, store) = (self.last_seq + 1, self.last_incarnation, self.store);
        let segments_max = self.geometry.segments_max;
        let room = self.geometry.segment_blocks - block;
        let bytes = self.block_at(disk, addr)?;
        let Ok(header) = FrameHeader::decode(bytes) else {
            return Ok(None);
        };
        let next_ok = header.next_segment < segments_max;
        if header.store != store
            || header.addr != addr
            || header.seq != seq
            || header.incarnation < incarnation
            || header.progress.cold
            || header.blocks() > room
            || !next_ok
            || Entries::new(&header, bytes).any(|e| e.is_err())
        {
            return Ok(None);
        }
        let mut copy = AlignedBuf::blocks(1);
        copy.copy_from_slice(bytes);
        self.pass(&header);
        Ok(Some(LogFrame {
            header,
            block: copy,
        }))
    }

    /// Whether something behind the end proves that the frame missing there had been durable.
    pub(super) fn end_is_damaged(
        mut self,
        disk: &mut impl BlockingDisk,
    ) -> Result<bool, DiskError> {
        let missing = self.last_seq + 1;
        // What lies behind the gap is followed to its end: a frame tells of what was durable when it was built, so that it
        // may be far behind.
        while let Some(behind) = self.find_behind(disk, missing)? {
            if behind.durable_seq >= missing {
                return Ok(true);
            }
            self.pass(&behind);
            loop {
                match self.next(disk) {
                    Ok(Some(frame)) if frame.header.durable_seq >= missing => return Ok(true),
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(e) if e.is_of_the_medium() => break,
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(false)
    }

    /// Of the client frames that lie next behind the end, one that knows `missing` as durable, or else the one with the
    /// lowest number. Blocks that cannot be read prove nothing.
    fn find_behind(
        &mut self,
        disk: &mut impl BlockingDisk,
        missing: u64,
    ) -> Result<Option<FrameHeader>, DiskError> {
        let (segment, block) = self.position();
        let geometry = self.geometry;
        let start = geometry.segment_start(segment);
        let mut pieces: Vec<(Addr, u32)> = (block..geometry.segment_blocks)
            .step_by(256)
            .map(|at| (Addr(start.0 + at), (geometry.segment_blocks - at).min(256)))
            .collect();
        if segment != self.next_segment {
            pieces.push((geometry.segment_start(self.next_segment), 1));
        } else if geometry.segment_blocks < FRAME_HEADER_BLOCKS + FRAME_DATA_BLOCKS + 2 {
            // The missing frame may fill its segment, and it alone named the one after. Only small stores, which have few, have
            // segments like that.
            let starts = (0..geometry.segments_max).map(|s| (geometry.segment_start(s), 1));
            pieces.extend(starts);
        }
        let mut first: Option<FrameHeader> = None;
        let mut buf = AlignedBuf::blocks(256);
        for (addr, blocks) in pieces {
            let piece = &mut buf[..blocks as usize * BLOCK_BYTES];
            read_what_can_be(disk, addr, piece)?;
            for (at, bytes) in (addr.0..).zip(piece.chunks_exact(BLOCK_BYTES)) {
                let Some(found) = self.client_frame(Addr(at), bytes) else {
                    continue;
                };
                if found.durable_seq >= missing {
                    return Ok(Some(found));
                }
                if first.is_none_or(|first| found.seq < first.seq) {
                    first = Some(found);
                }
            }
        }
        Ok(first)
    }

    /// The header in a block behind the end, if it is that of a later client frame of this store.
    fn client_frame(&self, addr: Addr, block: &[u8]) -> Option<FrameHeader> {
        let geometry = &self.geometry;
        let header = FrameHeader::decode(block).ok()?;
        (header.store == self.store
            && header.addr == addr
            && !header.progress.cold
            && header.incarnation >= self.last_incarnation
            && header.seq > self.last_seq
            && header.next_segment < geometry.segments_max
            && geometry.contains(addr, header.blocks()))
        .then_some(header)
    }

    /// Goes on behind a frame.
    fn pass(&mut self, header: &FrameHeader) {
        self.segment = self.geometry.segment_of(header.addr);
        self.next_block =
            header.addr.0 - self.geometry.segment_start(self.segment).0 + header.blocks();
        self.next_segment = header.next_segment;
        self.last_seq = header.seq;
        self.last_incarnation = header.incarnation;
        self.segments = self.segments.max(header.next_segment + 1);
        self.last_blocks = header.blocks();
    }
}

/// Reads blocks; those that the medium cannot give back are zeros.
fn read_what_can_be(
    disk: &mut impl BlockingDisk,
    addr: Addr,
    buf: &mut [u8],
) -> Result<(), DiskError> {
    match disk.read(addr.offset(), buf) {
        Err(e) if e.is_of_the_medium() => {}
        result => return result,
    }
    for (at, block) in (addr.0..).zip(buf.chunks_exact_mut(BLOCK_BYTES)) {
        match disk.read(Addr(at).offset(), block) {
            Err(e) if e.is_of_the_medium() => block.fill(0),
            result => result?,
        }
    }
    Ok(())
}

/// Whether the data of a frame is what its entries say.
pub(super) fn data_is_whole(
    disk: &mut impl BlockingDisk,
    frame: &LogFrame,
) -> Result<bool, DiskError> {
    let blocks = u32::from(frame.header.progress.data_blocks);
    if blocks == 0 {
        return Ok(true);
    }
    let mut data = AlignedBuf::blocks(blocks);
    let offset = Addr(frame.header.addr.0 + FRAME_HEADER_BLOCKS).offset();
    match disk.read(offset, &mut data) {
        // It may pass.
        Err(e) if e.is_of_the_medium() => disk.read(offset, &mut data)?,
        result => result?,
    }
    Ok(entries_match(&frame.header, &frame.block, &data))
}

pub(super) fn entries_match(header: &FrameHeader, block: &[u8], data: &[u8]) -> bool {
    Entries::new(header, block).all(|e| {
        e.is_ok_and(|e| {
            (0..e.entry.data_blocks()).all(|i| {
                let at = (e.entry.data_start + i) as usize * BLOCK_BYTES;
                crc32fast::hash(&data[at..at + BLOCK_BYTES]) == e.crc(i)
            })
        })
    })
}
