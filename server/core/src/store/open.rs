//! Making a store, and opening one: newest checkpoint, the log behind it, then what only the tail still has.
//!
//! Nothing is answered before what recovery found is on stable storage: a read must not show what a second power cut
//! could take back.

use super::append::{Frame, Hot};
use super::format::{
    Addr, Checkpoint, CheckpointSegment, Entries, Entry, EntryKind, FRAME_DATA_BLOCKS,
    FRAME_FIXED_BYTES, FRAME_HEADER_BLOCKS, FormatError, FrameHeader, Geometry, Progress,
    RESERVED_BLOCKS, SUPERBLOCK_BLOCKS, Superblock, encode_checkpoint,
};
use super::index::{Index, Pending};
use super::segment::{SegmentState, Segments};
use super::tail::{Tail, TailIdentity, TailMemory};
use super::{AlignedBuf, Errno, Params, Store};
use crate::units::{BLOCK_BYTES, StoreId};

/// A disk used one request after the other: for opening a store and for looking at one.
pub trait BlockingDisk {
    /// Fills `buf` from `offset`.
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError>;
    /// Writes `buf` at `offset`.
    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), DiskError>;
    /// Makes everything written durable.
    fn sync(&mut self) -> Result<(), DiskError>;
    /// Makes a range exist and hold zeros.
    fn allocate(&mut self, offset: u64, len: u64) -> Result<(), DiskError>;
}

/// The disk refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DiskError(pub Errno);

/// Why a store cannot be opened. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There is no store here.
    #[error("this is not an Ashlar store (no superblock)")]
    NotAStore,
    /// Written by a later version.
    #[error("the store has format version {0}, this daemon knows {known}; use the version of Ashlar that made it", known = super::format::FORMAT_VERSION)]
    Version(u32),
    /// Every copy of the superblock is damaged.
    #[error(
        "every copy of the superblock is damaged; restore the store from another replica or a backup"
    )]
    SuperblockDamaged,
    /// The store belongs to another daemon.
    #[error("the store belongs to another daemon (node {}); point this daemon at its own data directory", uuid::Uuid::from_bytes(*owner))]
    OtherNode {
        /// Its owner.
        owner: [u8; 16],
    },
    /// The checkpoint is damaged.
    #[error(
        "checkpoint {seq} is damaged ({error}); run 'ashlar store check' and restore from another replica or a backup"
    )]
    CheckpointDamaged {
        /// Its number.
        seq: u64,
        /// What is wrong.
        error: FormatError,
    },
    /// A frame that was durable cannot be read back.
    #[error("the log is damaged at block {}: a frame that was durable cannot be read back; run 'ashlar store check' and restore from another replica or a backup", at.0)]
    LogDamaged {
        /// Where the missing frame begins.
        at: Addr,
    },
    /// The process died in this boot of the machine, and the tail with its last writes is not there.
    #[error(
        "the tail of the daemon that was killed is missing, and acknowledged writes may be in it; put the tail file back (same tail directory), or accept their loss with --accept-tail-loss"
    )]
    TailMissing,
    /// The tail does not go with the log.
    #[error(
        "the tail cannot be read ({0}); acknowledged writes may be in it; accept their loss with --accept-tail-loss"
    )]
    TailDamaged(FormatError),
    /// The memory offered for the tail is too small or not aligned.
    #[error("the tail must have at least 4 MiB of block-aligned memory")]
    TailTooSmall,
    /// The store is larger than the file or device.
    #[error("the store has {want} bytes but the file or device only {have}: it was cut off")]
    Truncated {
        /// Bytes the store refers to.
        want: u64,
        /// Bytes there are.
        have: u64,
    },
    /// The place is too small for a store.
    #[error("a store needs at least {0} bytes")]
    TooSmall(u64),
    /// The log needs more room to save what the tail holds.
    #[error("the store has no free segment to save the tail into")]
    NoRoomForTail,
    /// The disk failed.
    #[error("the device failed: {0}")]
    Disk(#[from] DiskError),
}

/// How to open.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The daemon that opens it.
    pub node: [u8; 16],
    /// This boot of the machine; all zeros when unknown, which voids every tail.
    pub boot: [u8; 16],
    /// Go on without a tail that should be there.
    pub accept_tail_loss: bool,
}

/// What opening found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// The store had been closed in order.
    pub clean: bool,
    /// Log frames replayed behind the checkpoint.
    pub frames_replayed: u64,
    /// Blocks of log read back and verified.
    pub blocks_verified: u64,
    /// Frames that only the tail still had.
    pub frames_from_tail: u64,
    /// Writes answered before a power cut, but not flushed, may be gone.
    pub tail_void: bool,
}

/// Lays out a new store on `disk`, destroying what is there: `initial_segments` are allocated at once.
pub fn format_store(
    disk: &mut impl BlockingDisk,
    geometry: Geometry,
    store: StoreId,
    node: [u8; 16],
    initial_segments: u32,
    now_unix_ms: u64,
) -> Result<(), OpenError> {
    let segments = initial_segments.clamp(4, geometry.segments_max);
    // A half-made store must not look like one: the superblock is written last.
    let zeros = AlignedBuf::blocks(RESERVED_BLOCKS);
    disk.write(0, &zeros)?;
    disk.sync()?;
    disk.allocate(
        geometry.segment_start(0).offset(),
        u64::from(segments) * u64::from(geometry.segment_blocks) * BLOCK_BYTES as u64,
    )?;
    let checkpoint = Checkpoint {
        store,
        seq: 1,
        hot_seq: 0,
        hot_incarnation: 0,
        hot_segment: 0,
        hot_block: 0,
        hot_next_segment: 1,
        mapped_blocks: 0,
        segments: (0..segments)
            .map(|s| CheckpointSegment {
                live: 0,
                free: s > 1,
                damaged: false,
            })
            .collect(),
        drops: Vec::new(),
        rows: Vec::new(),
    };
    let bytes = encode_checkpoint(&checkpoint, std::iter::empty());
    let mut area = AlignedBuf::zeroed(bytes.len().next_multiple_of(BLOCK_BYTES));
    area[..bytes.len()].copy_from_slice(&bytes);
    disk.write(geometry.checkpoint_start(0).offset(), &area)?;
    disk.sync()?;
    let superblock = Superblock {
        generation: 2,
        store,
        node,
        geometry,
        clean: true,
        incarnation: 0,
        tail_incarnation: 0,
        boot: [0; 16],
        checkpoint_seq: 1,
        checkpoint_area: 0,
        checkpoint_crc: crc32fast::hash(&bytes),
        checkpoint_bytes: bytes.len() as u64,
        created_unix_ms: now_unix_ms,
    };
    write_superblock(disk, &superblock)?;
    Ok(())
}

fn write_superblock(
    disk: &mut impl BlockingDisk,
    superblock: &Superblock,
) -> Result<(), DiskError> {
    let mut block = AlignedBuf::blocks(1);
    superblock.encode(&mut block);
    for at in SUPERBLOCK_BLOCKS[(superblock.generation % 2) as usize] {
        disk.write(Addr(at).offset(), &block)?;
    }
    disk.sync()
}

/// The newest valid superblock, and how many of the copies of its generation and the one before are damaged.
pub(super) fn read_superblock(
    disk: &mut impl BlockingDisk,
) -> Result<(Superblock, u32), OpenError> {
    let mut block = AlignedBuf::blocks(1);
    let mut newest: Option<Superblock> = None;
    let (mut damaged, mut foreign, mut version) = (0, 0, None);
    for at in SUPERBLOCK_BLOCKS.into_iter().flatten() {
        disk.read(Addr(at).offset(), &mut block)?;
        match Superblock::decode(&block) {
            Ok(s) => {
                if newest.is_none_or(|n| n.generation < s.generation) {
                    newest = Some(s);
                }
            }
            Err(FormatError::Version(v)) => version = Some(v),
            // The slot of the other generation is blank in a store that is new.
            Err(FormatError::Magic) if block.iter().all(|&b| b == 0) => foreign += 1,
            Err(FormatError::Magic) => foreign += 1,
            Err(_) => damaged += 1,
        }
    }
    match (newest, version) {
        (_, Some(v)) => Err(OpenError::Version(v)),
        (Some(s), _) => Ok((s, damaged)),
        (None, _) if foreign == 4 => Err(OpenError::NotAStore),
        (None, _) => Err(OpenError::SuperblockDamaged),
    }
}

pub(super) fn read_checkpoint(
    disk: &mut impl BlockingDisk,
    superblock: &Superblock,
) -> Result<Checkpoint, OpenError> {
    let bytes = superblock.checkpoint_bytes as usize;
    let mut area = AlignedBuf::zeroed(bytes.next_multiple_of(BLOCK_BYTES));
    let start = superblock
        .geometry
        .checkpoint_start(superblock.checkpoint_area)
        .offset();
    for (i, piece) in area.chunks_mut(1 << 20).enumerate() {
        disk.read(start + (i << 20) as u64, piece)?;
    }
    let seq = superblock.checkpoint_seq;
    let damaged = |error| OpenError::CheckpointDamaged { seq, error };
    if crc32fast::hash(&area[..bytes]) != superblock.checkpoint_crc {
        return Err(damaged(FormatError::Checksum));
    }
    let checkpoint = Checkpoint::decode(&area[..bytes], &superblock.geometry).map_err(damaged)?;
    if checkpoint.store != superblock.store || checkpoint.seq != seq {
        return Err(damaged(FormatError::Invalid("checkpoint of another store")));
    }
    Ok(checkpoint)
}

/// Walks the client log.
pub(super) struct LogReader {
    geometry: Geometry,
    store: StoreId,
    pub(super) segment: u32,
    pub(super) next_block: u32,
    pub(super) next_segment: u32,
    pub(super) last_seq: u64,
    pub(super) last_incarnation: u64,
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

fn entries_match(header: &FrameHeader, block: &[u8], data: &[u8]) -> bool {
    Entries::new(header, block).all(|e| {
        e.is_ok_and(|e| {
            (0..e.entry.data_blocks()).all(|i| {
                let at = (e.entry.data_start + i) as usize * BLOCK_BYTES;
                crc32fast::hash(&data[at..at + BLOCK_BYTES]) == e.crc(i)
            })
        })
    })
}

impl Store {
    /// Opens the store on `disk`; `tail` is the memory its last process may have left acknowledged writes in.
    pub fn open(
        disk: &mut impl BlockingDisk,
        tail: Box<dyn TailMemory>,
        params: Params,
        options: &OpenOptions,
    ) -> Result<(Store, OpenReport), OpenError> {
        let (old, _) = read_superblock(disk)?;
        if old.node != options.node {
            return Err(OpenError::OtherNode { owner: old.node });
        }
        let checkpoint = read_checkpoint(disk, &old)?;
        let mut tail = Tail::new(tail).ok_or(OpenError::TailTooSmall)?;
        let mut report = OpenReport {
            clean: old.clean,
            ..OpenReport::default()
        };
        // The life that died may have saved the tail of the one before and begun its own.
        let begun = TailIdentity {
            store: old.store,
            boot: old.boot,
            incarnation: old.incarnation,
        };
        let last_tail = match tail.identity() {
            Some(found) if found == begun => begun,
            _ => TailIdentity {
                incarnation: old.tail_incarnation,
                ..begun
            },
        };
        let same_boot = old.boot == options.boot && options.boot != [0; 16];
        let replay_tail = if old.clean {
            false
        } else if !same_boot {
            report.tail_void = true;
            false
        } else if tail.identity() == Some(last_tail) {
            true
        } else if options.accept_tail_loss {
            report.tail_void = true;
            false
        } else {
            return Err(OpenError::TailMissing);
        };

        // The log.
        let mut reader = LogReader::new(old.store, old.geometry, &checkpoint);
        let mut frames = Vec::new();
        let start_seq = checkpoint.hot_seq;
        while let Some(frame) = reader.next(disk)? {
            if frame.header.checkpoint_seq > old.checkpoint_seq {
                // A later checkpoint was durable and its superblock is gone: this one may name reused segments.
                return Err(OpenError::SuperblockDamaged);
            }
            frames.push(frame);
        }
        if reader.end_is_damaged(disk)? {
            let (segment, block) = reader.position();
            return Err(OpenError::LogDamaged {
                at: Addr(old.geometry.segment_start(segment).0 + block),
            });
        }
        // Frames up to the last known durable one are whole; what came after may be torn or have holes.
        let durable = frames.last().map_or(start_seq, |f| f.header.durable_seq);
        let mut whole = frames.len();
        for (i, frame) in frames.iter().enumerate() {
            if frame.header.seq <= durable {
                continue;
            }
            report.blocks_verified += u64::from(frame.header.blocks());
            if !data_is_whole(disk, frame)? {
                whole = i;
                break;
            }
        }
        frames.truncate(whole);
        report.frames_replayed = frames.len() as u64;
        let (segment, next_block, next_segment, last_seq) = match frames.last() {
            Some(f) => {
                let segment = old.geometry.segment_of(f.header.addr);
                let block =
                    f.header.addr.0 - old.geometry.segment_start(segment).0 + f.header.blocks();
                (segment, block, f.header.next_segment, f.header.seq)
            }
            None => (
                checkpoint.hot_segment,
                checkpoint.hot_block,
                checkpoint.hot_next_segment,
                start_seq,
            ),
        };
        let mut tail_frames = Vec::new();
        if replay_tail {
            let walked = match tail.walk(last_tail) {
                Ok(w) => w,
                Err(_) if options.accept_tail_loss => Vec::new(),
                Err(e) => return Err(OpenError::TailDamaged(e)),
            };
            // What the tail had let go of was written: the log must have it.
            if ((last_seq as u32)
                .wrapping_add(1)
                .wrapping_sub(tail.first_seq_low()) as i32)
                < 0
            {
                return Err(OpenError::LogDamaged {
                    at: Addr(old.geometry.segment_start(segment).0 + next_block),
                });
            }
            for (at, header) in walked {
                let same_life = frames
                    .last()
                    .is_none_or(|f| f.header.incarnation == header.incarnation);
                if same_life && header.seq <= last_seq {
                    continue;
                }
                let block = tail.slice(at, FRAME_HEADER_BLOCKS);
                let data = tail.slice(
                    at + FRAME_HEADER_BLOCKS,
                    u32::from(header.progress.data_blocks),
                );
                if !entries_match(&header, block, data) {
                    return Err(OpenError::TailDamaged(FormatError::Checksum));
                }
                tail_frames.push((at, header));
            }
        }

        // From here on the store is ours: frames of this life carry a larger incarnation.
        disk.sync()?;
        let incarnation = old.incarnation + 1;
        let superblock = Superblock {
            generation: old.generation + 1,
            incarnation,
            clean: false,
            // Until the tail is this life's, the dead one's still counts.
            boot: if replay_tail { old.boot } else { options.boot },
            tail_incarnation: if replay_tail {
                last_tail.incarnation
            } else {
                incarnation
            },
            ..old
        };
        let log_segments = frames
            .iter()
            .map(|f| old.geometry.segment_of(f.header.addr));
        let log_highest = log_segments.max().unwrap_or(0);
        let mut store = assemble(
            params,
            superblock,
            checkpoint,
            tail,
            (segment, next_block, next_segment, last_seq),
            log_highest,
        );
        if !replay_tail {
            store.tail.reset(
                TailIdentity {
                    store: old.store,
                    boot: options.boot,
                    incarnation,
                },
                store.hot.next_seq,
            );
        }
        for frame in frames {
            store.take_log_frame(frame.header, &frame.block);
        }
        store.claim_log_segments();
        write_superblock(disk, &superblock)?;

        if replay_tail {
            report.frames_from_tail = tail_frames.len() as u64;
            store.save_tail(disk, &tail_frames)?;
            disk.sync()?;
            let identity = TailIdentity {
                store: old.store,
                boot: options.boot,
                incarnation,
            };
            store.tail.reset(identity, store.hot.next_seq);
            store.superblock = Superblock {
                generation: superblock.generation + 1,
                boot: options.boot,
                tail_incarnation: incarnation,
                ..superblock
            };
            let superblock = store.superblock;
            write_superblock(disk, &superblock)?;
        }
        Ok((store, report))
    }

    /// Takes a frame that is on disk as one that waits to be applied.
    fn take_log_frame(&mut self, header: FrameHeader, block: &[u8]) {
        let segment = self.segments.geometry.segment_of(header.addr);
        self.segments.all[segment as usize].last_seq = header.seq;
        for entry in Entries::new(&header, block) {
            let e = entry.expect("checked by the reader");
            self.note_pending(&e.entry, header.seq, header.addr, |i| e.crc(i));
        }
        let used = FRAME_FIXED_BYTES + usize::from(header.progress.entry_bytes);
        self.hot.checkpoint_log_blocks += u64::from(header.blocks());
        self.hot.frames.push_back(Frame {
            seq: header.seq,
            addr: header.addr,
            blocks: header.blocks(),
            tail_at: None,
            header,
            bytes: block[..used].to_vec(),
            reserved: 0,
            written: true,
            synced: true,
        });
    }

    fn note_pending(&mut self, e: &Entry, seq: u64, frame: Addr, crc: impl Fn(u32) -> u32) {
        match e.kind {
            EntryKind::Data => {
                let row = self.index.get_or_insert_row(e.key);
                for i in 0..e.count {
                    let addr = Addr(frame.0 + FRAME_HEADER_BLOCKS + e.data_start + i);
                    let block = e.first_block + i;
                    self.index.set_pending(
                        row,
                        block,
                        Pending {
                            version: e.version,
                            seq,
                            addr,
                            crc: crc(i),
                        },
                    );
                }
            }
            EntryKind::Zero => {
                let row = self.index.get_or_insert_row(e.key);
                self.mark_zero(row, e.first_block, e.count, e.version, seq);
            }
            EntryKind::DropLayer | EntryKind::Relocation | EntryKind::Leaf => {}
        }
    }

    /// Appends what only the tail has to the log. The tail stays as it is until that is durable.
    fn save_tail(
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
                    let mut offset = at + super::format::ENTRY_BYTES;
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
        // Durable once the sync that follows is done, and nobody is answered before that.
        self.hot.durable_seq = seq;
        self.hot.durable_chain = seq;
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
        self.segments.all[self.hot.segment as usize].state = SegmentState::Sealed;
        self.hot.segment = self.hot.next_segment;
        self.hot.next_block = 0;
        self.hot.next_segment = after;
        Ok(())
    }
}

/// A store in the state its checkpoint says, about to write at `position`.
fn assemble(
    params: Params,
    superblock: Superblock,
    checkpoint: Checkpoint,
    tail: Tail,
    position: (u32, u32, u32, u64),
    log_highest: u32,
) -> Store {
    let (segment, next_block, next_segment, last_seq) = position;
    let mut segments = Segments::new(superblock.geometry, &checkpoint.segments);
    let mut index = Index::default();
    let drops = checkpoint.drops.clone();
    for row in checkpoint.rows {
        index.insert_row(row.key, row.leaves);
    }
    // The log may have gone on into segments that were allocated after the checkpoint.
    let highest = segment.max(next_segment).max(log_highest);
    if highest as usize >= segments.all.len() {
        let more = highest + 1 - segments.all.len() as u32;
        segments.grow(more);
    }
    let mut hot = Hot::new(
        superblock.incarnation,
        last_seq,
        segment,
        next_block,
        next_segment,
    );
    hot.applied_seq = checkpoint.hot_seq;
    let mut store = Store::assemble(params, superblock, segments, index, tail, hot);
    store.mapped = checkpoint.mapped_blocks;
    for layer in drops {
        store.begin_drop(layer);
    }
    store
}

impl Store {
    /// Marks the segments the log went through since the checkpoint as in use.
    fn claim_log_segments(&mut self) {
        let geometry = self.segments.geometry;
        let used: Vec<u32> = self
            .hot
            .frames
            .iter()
            .map(|f| geometry.segment_of(f.addr))
            .collect();
        for s in used {
            self.segments.all[s as usize].state = SegmentState::Sealed;
        }
        for s in [self.hot.segment, self.hot.next_segment] {
            self.segments.all[s as usize].state = SegmentState::Open;
        }
        self.segments.collect_free();
    }
}
