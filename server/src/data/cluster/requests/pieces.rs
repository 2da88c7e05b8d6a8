//! The pieces of a request: each goes where the head says, and to others when that came to nothing.

use ashlar_core::nbd::errors::RequestError;
use ashlar_core::replication::wire::{MAX_MESSAGE_BLOCKS, Status};
use ashlar_core::replication::{MemberId, ReplicaMask, WriteAdmission};
use ashlar_core::store::ExtentKey;
use ashlar_core::units::{BLOCK_BYTES, CHUNK_BLOCKS, ChunkIndex, Version};
use smallvec::SmallVec;

use super::{Stage, error_of};
use crate::data::cluster::head::Way;
use crate::data::cluster::outgoing::checksums;
use crate::data::cluster::replica::ReplicaWork;
use crate::data::cluster::{Asked, VolumeRef};
use crate::data::operation::{Operation, op_id, op_key};
use crate::data::thread::DataThread;

/// Real zeros, sent where zeros must take space.
static ZEROS: [u8; MAX_MESSAGE_BLOCKS as usize * BLOCK_BYTES] =
    [0; MAX_MESSAGE_BLOCKS as usize * BLOCK_BYTES];

/// Blocks of one chunk.
pub(in crate::data::cluster) struct Piece {
    pub(in crate::data::cluster) extent: ExtentKey,
    pub(in crate::data::cluster) first_block: u32,
    pub(in crate::data::cluster) count: u32,
    /// Where they lie in the request's buffer, bytes.
    pub(in crate::data::cluster) at: usize,
    pub(in crate::data::cluster) content: Content,
    /// Of a read: the replicas that could not give it.
    pub(in crate::data::cluster) tried: ReplicaMask,
    /// One of them has a damaged copy.
    pub(in crate::data::cluster) is_damaged: bool,
    /// What the last of them said.
    pub(in crate::data::cluster) refusal: Status,
    /// Of a read under way: the session it was asked on, and the place of that replica.
    pub(in crate::data::cluster) asked: Option<(u32, u8)>,
    /// A store of this thread has not ended it.
    pub(in crate::data::cluster) is_here: bool,
    /// Version it was sent with.
    pub(in crate::data::cluster) version: Version,
    pub(in crate::data::cluster) is_done: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::data::cluster) enum Content {
    /// Read into the buffer.
    Read,
    /// Written from the buffer.
    Buffer,
    /// A zero entry.
    Hole,
    /// Zeros that take space.
    Zeros,
}

impl DataThread {
    /// Adds the pieces of a run of blocks.
    pub(super) fn cut(&mut self, key: usize, first: u64, blocks: u64, at: usize, content: Content) {
        let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) else {
            return;
        };
        let layer = self.volumes[entry.volume.key].spec.layer;
        let most = if content == Content::Hole {
            CHUNK_BLOCKS
        } else {
            MAX_MESSAGE_BLOCKS
        };
        let mut done = 0;
        while done < blocks {
            let block = first + done;
            let first_block = (block % u64::from(CHUNK_BLOCKS)) as u32;
            let count = (blocks - done)
                .min(u64::from(CHUNK_BLOCKS - first_block))
                .min(u64::from(most)) as u32;
            entry.pieces.push(Piece {
                extent: ExtentKey {
                    layer,
                    chunk: ChunkIndex((block / u64::from(CHUNK_BLOCKS)) as u32),
                },
                first_block,
                count,
                at: at + done as usize * BLOCK_BYTES,
                content,
                tried: ReplicaMask::default(),
                is_damaged: false,
                refusal: Status::Device,
                asked: None,
                is_here: false,
                version: entry.request.version,
                is_done: false,
            });
            entry.left += 1;
            done += u64::from(count);
        }
    }

    pub(super) fn ask_pieces(&mut self, key: usize) {
        let Some(Operation::Replicated(entry)) = self.operations.get(key) else {
            return;
        };
        let (serial, count, stage) = (entry.serial, entry.pieces.len(), entry.stage);
        for piece in 0..count {
            // The answers may all be there already, and something else in its place.
            let goes_on = matches!(self.operations.get(key), Some(Operation::Replicated(entry))
                if entry.serial == serial && entry.stage == stage);
            if !goes_on {
                return;
            }
            self.ask_piece(key, piece as u32);
        }
    }

    /// Asks the head where a piece goes, and sends it there.
    fn ask_piece(&mut self, key: usize, index: u32) {
        let Some(Operation::Replicated(entry)) = self.operations.get(key) else {
            return;
        };
        let Some(piece) = entry.pieces.get(index as usize) else {
            return;
        };
        if piece.is_done || entry.is_over {
            return;
        }
        if piece.content == Content::Read {
            self.ask_read(key, index);
        } else {
            self.ask_change(key, index);
        }
    }

    pub(in crate::data::cluster) fn wait_piece(
        &mut self,
        volume: VolumeRef,
        key: usize,
        index: u32,
    ) {
        let Some(Operation::Replicated(entry)) = self.operations.get(key) else {
            return;
        };
        let serial = entry.serial;
        if let Some(replication) = self.replication(volume) {
            replication.waiting.push((key, serial, index));
        }
    }

    fn ask_change(&mut self, key: usize, index: u32) {
        let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) else {
            return;
        };
        let volume = entry.volume;
        let durable = entry.request.durable;
        let piece = &entry.pieces[index as usize];
        let (extent, first_block, count) = (piece.extent, piece.first_block, piece.count);
        let (at, content, version) = (piece.at, piece.content, piece.version);
        let connection = entry.request.connection;
        let buffer = entry.request.buffer.take();
        let serial = entry.serial;
        let tag = op_id(key, index);
        let admission = self.with_head(volume, |head, now_us, _| {
            let set = head.set_of(extent.chunk);
            let admission = head.admit_write(set, extent, first_block, count, tag, version, now_us);
            (set, admission)
        });
        let mut stopped = false;
        match admission {
            Some((
                set,
                WriteAdmission::Send {
                    op,
                    version,
                    targets,
                },
            )) => {
                let data: &[u8] = match (content, &buffer) {
                    (Content::Zeros, _) => &ZEROS[..count as usize * BLOCK_BYTES],
                    // SAFETY: the payload, or an edge that was read and changed, fills the blocks of the piece.
                    (Content::Buffer, Some(buffer)) => unsafe {
                        buffer.bytes(at, count as usize * BLOCK_BYTES)
                    },
                    _ => &[],
                };
                let members: SmallVec<[(u8, MemberId, bool); 8]> = match self.replication(volume) {
                    Some(replication) => targets
                        .places()
                        .map(|place| {
                            let member = replication.head.replica(set, place as u8);
                            let here = replication
                                .session(member)
                                .is_some_and(|s| matches!(s.way, Way::Here(_)));
                            (place as u8, member, here)
                        })
                        .collect(),
                    None => SmallVec::new(),
                };
                // A store of this thread computes its own.
                let crcs = members
                    .iter()
                    .any(|(.., here)| !here)
                    .then(|| checksums(data));
                let work = if content == Content::Hole {
                    ReplicaWork::Zero {
                        extent,
                        first_block,
                        count,
                        version,
                        durable,
                    }
                } else {
                    ReplicaWork::Write {
                        extent,
                        first_block,
                        version,
                        crcs: crcs.as_deref(),
                        data,
                        durable,
                    }
                };
                // Those that are far have the longer way, so they begin.
                for is_here in [false, true] {
                    for (place, member, here) in &members {
                        if *here == is_here {
                            let asked = Asked::Change { op, place: *place };
                            self.ask(volume, *member, asked, work);
                        }
                    }
                }
            }
            Some((_, WriteAdmission::Wait)) => self.wait_piece(volume, key, index),
            Some((_, WriteAdmission::Stopped)) | None => stopped = true,
        }
        // Every answer may have been there at once.
        match self.operations.get_mut(key) {
            Some(Operation::Replicated(entry)) if entry.serial == serial => {
                entry.request.buffer = buffer;
                if stopped {
                    self.end_replicated(key, Some(RequestError::Fenced));
                }
            }
            _ => {
                if let Some(buffer) = buffer {
                    self.give(connection, buffer);
                }
            }
        }
    }

    /// The head says that a change or a flush is done.
    pub(in crate::data::cluster) fn piece_acknowledged(&mut self, tag: u64) {
        let (key, index) = op_key(tag);
        let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) else {
            return;
        };
        if entry.stage == Stage::Flush {
            return self.end_replicated(key, None);
        }
        self.piece_done(key, index);
    }

    pub(in crate::data::cluster) fn piece_failed(&mut self, tag: u64, status: Status) {
        let (key, index) = op_key(tag);
        let error = error_of(status);
        let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) else {
            return;
        };
        entry.request.error.get_or_insert(error);
        if entry.stage == Stage::Flush {
            return self.end_replicated(key, Some(error));
        }
        self.piece_done(key, index);
    }

    pub(in crate::data::cluster) fn piece_again(&mut self, tag: u64, version: Version) {
        let (key, index) = op_key(tag);
        if let Some(Operation::Replicated(entry)) = self.operations.get_mut(key)
            && let Some(piece) = entry.pieces.get_mut(index as usize)
        {
            piece.version = version;
            self.ask_piece(key, index);
        }
    }

    /// A flush has to be asked again, later.
    pub(in crate::data::cluster) fn piece_waits(&mut self, volume: VolumeRef, tag: u64) {
        let (key, index) = op_key(tag);
        self.wait_piece(volume, key, index);
    }

    /// Asks again what was told to wait.
    pub(in crate::data::cluster) fn retry_waiting(&mut self, volume: VolumeRef) {
        let Some(replication) = self.replication(volume) else {
            return;
        };
        for (key, serial, index) in std::mem::take(&mut replication.waiting) {
            match self.operations.get(key) {
                Some(Operation::Replicated(entry)) if entry.serial == serial => {
                    if entry.stage == Stage::Flush {
                        self.ask_flush(key);
                    } else {
                        self.ask_piece(key, index);
                    }
                }
                _ => {}
            }
        }
    }

    pub(in crate::data::cluster) fn piece_done(&mut self, key: usize, index: u32) {
        let Some(Operation::Replicated(entry)) = self.operations.get_mut(key) else {
            return;
        };
        let Some(piece) = entry.pieces.get_mut(index as usize) else {
            return;
        };
        if std::mem::replace(&mut piece.is_done, true) {
            return;
        }
        entry.left -= 1;
        if entry.left > 0 {
            return;
        }
        if entry.stage == Stage::Edges && entry.request.error.is_none() {
            self.change_edges(key);
            return self.start_body(key);
        }
        let error = entry.request.error;
        self.end_replicated(key, error);
    }
}
