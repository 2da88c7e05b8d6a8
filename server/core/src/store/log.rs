//! Reading the client log back: from a checkpoint to its end.

use super::format::{Addr, Checkpoint, Entries, FRAME_HEADER_BLOCKS, FrameHeader, Geometry};
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
            disk.read(addr.offset(), &mut buf)?;
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
        self.segment = segment;
        self.next_block = block + header.blocks();
        self.next_segment = header.next_segment;
        self.last_seq = header.seq;
        self.last_incarnation = header.incarnation;
        self.segments = self.segments.max(header.next_segment + 1);
        self.last_blocks = header.blocks();
        Ok(Some(LogFrame {
            header,
            block: copy,
        }))
    }

    /// Whether something behind the end proves that the frame missing there had been durable.
    pub(super) fn end_is_damaged(
        &mut self,
        disk: &mut impl BlockingDisk,
    ) -> Result<bool, DiskError> {
        let (segment, block) = self.position();
        let mut buf = AlignedBuf::blocks(256);
        let geometry = self.geometry;
        let proves = |bytes: &[u8], addr: Addr, me: &LogReader| {
            FrameHeader::decode(bytes).is_ok_and(|h| {
                h.store == me.store
                    && h.addr == addr
                    && !h.progress.cold
                    && h.incarnation >= me.last_incarnation
                    && h.seq > me.last_seq
                    && h.durable_seq > me.last_seq
            })
        };
        let mut at = block;
        while at < geometry.segment_blocks {
            let n = (geometry.segment_blocks - at).min(256);
            let addr = Addr(geometry.segment_start(segment).0 + at);
            let piece = &mut buf[..n as usize * BLOCK_BYTES];
            disk.read(addr.offset(), piece)?;
            for (i, bytes) in piece.chunks_exact(BLOCK_BYTES).enumerate() {
                if proves(bytes, Addr(addr.0 + i as u32), self) {
                    return Ok(true);
                }
            }
            at += n;
        }
        if segment != self.next_segment {
            let addr = geometry.segment_start(self.next_segment);
            let piece = &mut buf[..BLOCK_BYTES];
            disk.read(addr.offset(), piece)?;
            return Ok(proves(piece, addr, self));
        }
        Ok(false)
    }
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
    disk.read(
        Addr(frame.header.addr.0 + FRAME_HEADER_BLOCKS).offset(),
        &mut data,
    )?;
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
