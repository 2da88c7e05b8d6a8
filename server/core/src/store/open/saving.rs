//! What only the tail of a killed process still has: finding it, and appending it to the log.

use super::{BlockingDisk, OpenError};
use crate::store::format::{
    Addr, ENTRY_BYTES, Entries, Entry, FRAME_DATA_BLOCKS, FRAME_FIXED_BYTES, FRAME_HEADER_BLOCKS,
    FormatError, FrameHeader, Progress,
};
use crate::store::log::{LogFrame, entries_match};
use crate::store::tail::{Tail, TailIdentity};
use crate::store::{AlignedBuf, Store};
use crate::units::BLOCK_BYTES;

/// How many of the log's frames stay, and the frames that only the tail has: where each lies in it, and its header.
///
/// What starts that were killed had saved of the tail goes, for the tail still has it and it is saved in the same place; else
/// each of them would take room. Errors when the tail is damaged, or has less than was saved of it.
pub(super) fn only_in_tail(
    tail: &mut Tail,
    identity: TailIdentity,
    frames: &[LogFrame],
    start_seq: u64,
) -> Result<(usize, Vec<(u32, FrameHeader)>), FormatError> {
    let mut only = tail.walk(identity)?;
    let of_tail = |f: &LogFrame| f.header.incarnation <= identity.incarnation;
    let kept = frames
        .iter()
        .position(|f| !of_tail(f))
        .unwrap_or(frames.len());
    let (log, saved) = frames.split_at(kept);
    let (last_seq, same_life) = log.last().map_or((start_seq, true), |f| {
        (f.header.seq, f.header.incarnation == identity.incarnation)
    });
    only.retain(|(_, header)| !same_life || header.seq > last_seq);
    let last_saved = saved
        .last()
        .and_then(|f| Entries::new(&f.header, &f.block).last())
        .transpose()?
        .map(|e| e.entry);
    let mut has_last_saved = last_saved.is_none();
    for (at, header) in &only {
        let block = tail.slice(*at, FRAME_HEADER_BLOCKS);
        let data_blocks = u32::from(header.progress.data_blocks);
        let data = tail.slice(at + FRAME_HEADER_BLOCKS, data_blocks);
        if !entries_match(header, block, data) {
            return Err(FormatError::Checksum);
        }
        has_last_saved |= last_saved.is_some_and(|saved| {
            Entries::new(header, block)
                .flatten()
                .any(|e| contains(&e.entry, &saved))
        });
    }
    if !has_last_saved {
        return Err(FormatError::Invalid("end: more was saved of it"));
    }
    Ok((kept, only))
}

/// Whether `part` is of the same write as `whole`, and within it.
fn contains(whole: &Entry, part: &Entry) -> bool {
    (whole.kind, whole.key, whole.version) == (part.kind, part.key, part.version)
        && whole.first_block <= part.first_block
        && part.first_block + part.count <= whole.first_block + whole.count
}

impl Store {
    /// Appends what only the tail has to the log. The tail stays as it is until that is durable.
    pub(super) fn save_tail(
        &mut self,
        disk: &mut impl BlockingDisk,
        frames: &[(u32, FrameHeader)],
    ) -> Result<(), OpenError> {
        let segment_blocks = self.segments.geometry.segment_blocks;
        for &(at, old) in frames {
            // A frame of the tail may not fit where the log goes on now: it is cut at entries, and a large entry in two.
            let block = self.tail.slice(at, FRAME_HEADER_BLOCKS).to_vec();
            let data = self
                .tail
                .slice(
                    at + FRAME_HEADER_BLOCKS,
                    u32::from(old.progress.data_blocks),
                )
                .to_vec();
            let mut buf = AlignedBuf::blocks(FRAME_HEADER_BLOCKS + FRAME_DATA_BLOCKS);
            let mut progress = Progress::default();
            for entry in Entries::new(&old, &block) {
                let e = entry.expect("checked before");
                let mut done = 0;
                loop {
                    let mut room = (segment_blocks.saturating_sub(self.hot.next_block))
                        .min(FRAME_HEADER_BLOCKS + FRAME_DATA_BLOCKS);
                    if room < 2 {
                        self.enter_next_segment(disk)?;
                        room = segment_blocks.min(FRAME_HEADER_BLOCKS + FRAME_DATA_BLOCKS);
                    }
                    let data_room = room - FRAME_HEADER_BLOCKS - u32::from(progress.data_blocks);
                    let n = (e.entry.data_blocks() - done).min(data_room);
                    let part = if e.entry.has_data() {
                        Entry {
                            first_block: e.entry.first_block + done,
                            count: n,
                            data_start: u32::from(progress.data_blocks),
                            ..e.entry
                        }
                    } else {
                        e.entry
                    };
                    let at = FRAME_FIXED_BYTES + usize::from(progress.entry_bytes);
                    if (e.entry.has_data() && n == 0) || at + part.header_bytes() > BLOCK_BYTES {
                        self.write_saved(disk, &mut buf, &mut progress)?;
                        continue;
                    }
                    part.encode(&mut buf[at..]);
                    let mut offset = at + ENTRY_BYTES;
                    for i in 0..part.data_blocks() {
                        buf[offset..offset + 4].copy_from_slice(&e.crc(done + i).to_le_bytes());
                        offset += 4;
                        let from = (e.entry.data_start + done + i) as usize * BLOCK_BYTES;
                        let to = (FRAME_HEADER_BLOCKS + part.data_start + i) as usize * BLOCK_BYTES;
                        buf[to..to + BLOCK_BYTES].copy_from_slice(&data[from..from + BLOCK_BYTES]);
                    }
                    progress.entries += 1;
                    progress.entry_bytes = (offset - FRAME_FIXED_BYTES) as u16;
                    progress.data_blocks += part.data_blocks() as u16;
                    done += part.data_blocks();
                    if done >= e.entry.data_blocks() {
                        break;
                    }
                }
            }
            self.write_saved(disk, &mut buf, &mut progress)?;
        }
        Ok(())
    }

    fn write_saved(
        &mut self,
        disk: &mut impl BlockingDisk,
        buf: &mut AlignedBuf,
        progress: &mut Progress,
    ) -> Result<(), OpenError> {
        if progress.entries == 0 {
            return Ok(());
        }
        let addr =
            Addr(self.segments.geometry.segment_start(self.hot.segment).0 + self.hot.next_block);
        let header = FrameHeader {
            addr,
            store: self.superblock.store,
            progress: Progress {
                closed: true,
                ..std::mem::take(progress)
            },
            incarnation: self.hot.incarnation,
            seq: self.hot.next_seq,
            durable_seq: self.hot.durable_seq,
            checkpoint_seq: self.superblock.checkpoint_seq,
            next_segment: self.hot.next_segment,
        };
        header.encode(buf);
        FrameHeader::seal(&mut buf[..BLOCK_BYTES]);
        disk.write(
            addr.offset(),
            &buf[..header.blocks() as usize * BLOCK_BYTES],
        )?;
        self.hot.next_block += header.blocks();
        self.hot.next_seq += 1;
        let seq = header.seq;
        self.take_log_frame(header, &buf[..BLOCK_BYTES]);
        self.hot.issued_seq = seq;
        self.hot.written_seq = seq;
        self.hot.reclaimed_seq = seq;
        buf.fill(0);
        Ok(())
    }

    fn enter_next_segment(&mut self, disk: &mut impl BlockingDisk) -> Result<(), OpenError> {
        let after = match self.segments.take(0) {
            Some(s) => s,
            None => {
                let have = self.segments.all.len() as u32;
                if have >= self.segments.geometry.segments_max {
                    return Err(OpenError::NoRoomForTail);
                }
                let bytes = u64::from(self.segments.geometry.segment_blocks) * BLOCK_BYTES as u64;
                disk.allocate(self.segments.geometry.segment_start(have).offset(), bytes)?;
                self.segments.grow(1);
                self.segments.take(0).ok_or(OpenError::NoRoomForTail)?
            }
        };
        self.segments.seal(self.hot.segment);
        self.hot.segment = self.hot.next_segment;
        self.hot.next_block = 0;
        self.hot.next_segment = after;
        Ok(())
    }
}
