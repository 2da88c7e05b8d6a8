//! Blocks that a head has read from one member to write them to others.

use ashlar_core::replication::wire::Status;
use ashlar_core::replication::{CopyId, Event, MemberId};
use ashlar_core::store::ExtentKey;
use ashlar_core::units::{BLOCK_BYTES, Version};

use super::super::pool::Buffer;
use super::super::thread::DataThread;
use super::replica::ReplicaWork;
use super::{Answer, Asked, VolumeRef};

/// What was read; `None`: all of it is zeros.
pub(super) struct Held {
    buffer: Option<Buffer>,
    /// Blocks that were read.
    count: u32,
}

impl DataThread {
    pub(super) fn copy_was_read(&mut self, volume: VolumeRef, copy: CopyId, answer: Answer) {
        let status = match answer {
            Answer::Data { buffer, count } => {
                let held = Held { buffer, count };
                let old = match self.replication(volume) {
                    Some(replication) => replication.copies.insert(copy, held),
                    None => Some(held),
                };
                if let Some(old) = old {
                    self.give_back(old);
                }
                Status::Ok
            }
            other => self.unexpected(other),
        };
        self.head_event(volume, Event::CopyRead { copy, status });
    }

    pub(super) fn copy_write(
        &mut self,
        volume: VolumeRef,
        (copy, member): (CopyId, MemberId),
        (extent, first_block, count): (ExtentKey, u32, u32),
        version: Version,
        zeros: bool,
    ) {
        let asked = Asked::CopyWrite { copy, member };
        let held = self
            .replication(volume)
            .and_then(|r| r.copies.remove(&copy));
        match &held {
            // Nothing may be written that was not read.
            held if !zeros && held.as_ref().is_none_or(|held| held.count < count) => {
                let status = Status::Refused;
                self.head_event(
                    volume,
                    Event::CopyWritten {
                        copy,
                        member,
                        status,
                    },
                );
            }
            Some(Held {
                buffer: Some(buffer),
                ..
            }) if !zeros => {
                // SAFETY: filled by the read, and nothing writes to it while it is held.
                let data = unsafe { buffer.bytes(0, count as usize * BLOCK_BYTES) };
                let work = ReplicaWork::Write {
                    extent,
                    first_block,
                    version,
                    crcs: None,
                    data,
                    durable: false,
                };
                self.ask(volume, member, asked, work);
            }
            _ => {
                let work = ReplicaWork::Zero {
                    extent,
                    first_block,
                    count,
                    version,
                    durable: false,
                };
                self.ask(volume, member, asked, work);
            }
        }
        if let Some(held) = held {
            match self.replication(volume) {
                Some(replication) => {
                    replication.copies.insert(copy, held);
                }
                None => self.give_back(held),
            }
        }
    }

    pub(super) fn copy_end(&mut self, volume: VolumeRef, copy: CopyId) {
        if let Some(held) = self
            .replication(volume)
            .and_then(|r| r.copies.remove(&copy))
        {
            self.give_back(held);
        }
    }

    fn give_back(&mut self, held: Held) {
        if let Some(buffer) = held.buffer {
            self.pool.give(buffer);
        }
    }
}
