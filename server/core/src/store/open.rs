//! Opening a store: newest checkpoint, the log behind it, then what only the tail still has.
//!
//! Nothing is answered before what recovery found is on stable storage: a read must not show what a second power cut
//! could take back.

mod refusal;
mod saving;

use super::append::{Frame, Hot};
use super::format::{
    Addr, Checkpoint, Entries, Entry, EntryKind, FRAME_FIXED_BYTES, FRAME_HEADER_BLOCKS,
    FrameHeader, Superblock,
};
use super::index::{Index, Pending};
use super::log::{LogReader, data_is_whole};
use super::root::{read_checkpoint, read_superblock, require_segments, write_superblock};
use super::segment::{SegmentState, Segments};
use super::tail::{Tail, TailIdentity, TailMemory};
use super::write::most_new_blocks;
use super::{Params, Store};

use saving::only_in_tail;

pub use refusal::{DiskError, OpenError};

/// A disk used one request after the other: for opening a store and for looking at one.
pub trait BlockingDisk {
    /// How long it is. A file may be read behind its end, where it holds zeros.
    fn size_bytes(&mut self) -> Result<u64, DiskError>;
    /// Fills `buf` from `offset`.
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError>;
    /// Writes `buf` at `offset`.
    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), DiskError>;
    /// Makes everything written durable.
    fn sync(&mut self) -> Result<(), DiskError>;
    /// Makes a range exist and hold zeros.
    fn allocate(&mut self, offset: u64, len: u64) -> Result<(), DiskError>;
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
    /// The log ended before a frame, here, that the device could not read: it was taken for torn.
    pub unreadable_end: Option<Addr>,
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
        // A block that the device cannot read ends the log as a torn frame does where nothing can be missing: all that a killed
        // daemon's tail had let go of is asked for below, and the checkpoint of a store that was closed has everything. After a
        // power cut it may be torn, or flushed and readable another time: a person has to decide.
        let unreadable_is_torn = if old.clean {
            checkpoint.hot_incarnation == old.incarnation
        } else {
            replay_tail
        };
        let mut unreadable = None;
        loop {
            let frame = match reader.next(disk) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(e) if unreadable_is_torn && e.is_of_the_medium() => {
                    unreadable = Some(e);
                    break;
                }
                Err(error) if error.is_of_the_medium() => {
                    let (segment, block) = reader.position();
                    let at = Addr(old.geometry.segment_start(segment).0 + block);
                    return Err(OpenError::LogUnreadable { at, error });
                }
                Err(e) => return Err(e.into()),
            };
            if frame.header.checkpoint_seq > old.checkpoint_seq {
                // A later checkpoint was durable and its superblock is gone: this one may name reused segments.
                return Err(OpenError::SuperblockDamaged);
            }
            frames.push(frame);
        }
        require_segments(disk, &old.geometry, reader.segments)?;
        let log_end = |(segment, block)| Addr(old.geometry.segment_start(segment).0 + block);
        let missing = |at, unreadable: Option<DiskError>| {
            unreadable.map_or(OpenError::LogDamaged { at }, |error| {
                OpenError::LogUnreadable { at, error }
            })
        };
        let at = log_end(reader.position());
        if reader.end_is_damaged(disk)? {
            return Err(missing(at, unreadable));
        }
        report.unreadable_end = unreadable.map(|_| at);
        // Frames up to the last known durable one are whole; what came after may be torn or have holes.
        let durable = frames.last().map_or(start_seq, |f| f.header.durable_seq);
        let mut whole = frames.len();
        for (i, frame) in frames.iter().enumerate() {
            if frame.header.seq <= durable {
                continue;
            }
            report.blocks_verified += u64::from(frame.header.blocks());
            match data_is_whole(disk, frame) {
                Ok(true) => continue,
                Ok(false) => {
                    unreadable = None;
                    report.unreadable_end = None;
                }
                Err(e) if unreadable_is_torn && e.is_of_the_medium() => {
                    unreadable = Some(e);
                    report.unreadable_end = Some(frame.header.addr);
                }
                Err(error) if error.is_of_the_medium() => {
                    let at = frame.header.addr;
                    return Err(OpenError::LogUnreadable { at, error });
                }
                Err(e) => return Err(e.into()),
            }
            whole = i;
            break;
        }
        frames.truncate(whole);
        let mut tail_frames = Vec::new();
        if replay_tail {
            match only_in_tail(&mut tail, last_tail, &frames, start_seq) {
                Ok((kept, only)) => {
                    frames.truncate(kept);
                    tail_frames = only;
                }
                Err(_) if options.accept_tail_loss => report.tail_void = true,
                Err(e) => return Err(OpenError::TailDamaged(e)),
            }
        }
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
        // What the tail had let go of was written: the log must have it. Where the tail does not tell any more how much that
        // was, a block that cannot be read may be a part of it.
        if replay_tail {
            let lacks = match tail.first() {
                Ok((_, first_seq_low)) => {
                    ((last_seq as u32)
                        .wrapping_add(1)
                        .wrapping_sub(first_seq_low) as i32)
                        < 0
                }
                Err(_) => unreadable.is_some(),
            };
            if lacks {
                return Err(missing(log_end((segment, next_block)), unreadable));
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
            // Not before: each frame tells what was durable when it was built, and the next start believes it.
            store.hot.durable_seq = store.hot.written_seq;
            store.hot.durable_chain = store.hot.written_seq;
            // The log has everything now. Said before the tail is voided: a process that dies while it wipes the tail
            // must not leave a store that asks for a tail that is gone.
            let superblock = Superblock {
                generation: superblock.generation + 1,
                clean: true,
                ..superblock
            };
            write_superblock(disk, &superblock)?;
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
                clean: false,
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
        // As when it was admitted: the start must not admit more than fits beside it.
        let mut reserved = 0;
        for entry in Entries::new(&header, block) {
            let e = entry.expect("checked by the reader");
            if e.entry.kind == EntryKind::Data {
                reserved += most_new_blocks(e.entry.first_block, e.entry.count);
            }
            self.note_pending(&e.entry, header.seq, header.addr, |i| e.crc(i));
        }
        let used = FRAME_FIXED_BYTES + usize::from(header.progress.entry_bytes);
        self.reserved += reserved;
        self.hot.checkpoint_log_blocks += u64::from(header.blocks());
        self.hot.unapplied_blocks += u64::from(header.blocks());
        self.hot.frames.push_back(Frame {
            seq: header.seq,
            addr: header.addr,
            blocks: header.blocks(),
            tail_at: None,
            header,
            bytes: block[..used].to_vec(),
            reserved,
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
        for leaf in row.leaves.iter().filter(|l| l.addr().is_stored()) {
            segments.note_leaf(leaf.addr());
        }
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
            self.segments.seal(s);
        }
        for s in [self.hot.segment, self.hot.next_segment] {
            self.segments.all[s as usize].state = SegmentState::Open;
        }
        self.segments.collect_free();
    }
}
