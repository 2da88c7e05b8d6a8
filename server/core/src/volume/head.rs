//! Admission of requests to one volume.

use super::durability::{Durability, FlushPlan, StoreSlot};
use super::lock::{Access, BlockRange, RangeLock, Ticket, Unblocked};
use crate::units::{BLOCK_BYTES, Epoch, LayerId, Version, VolumeId};
use smallvec::SmallVec;

/// Versions that are left when a head asks for a new epoch: at a million writes a second a quarter of a minute in which
/// the claim must be made.
pub const EPOCH_RESERVE: u64 = 1 << 24;

/// What a head is opened with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadSpec {
    /// The volume.
    pub volume: VolumeId,
    /// Its size, a multiple of a block.
    pub size_bytes: u64,
    /// The layer that takes its writes.
    pub live_layer: LayerId,
    /// The epoch claimed for this opening; never one that was used before.
    pub epoch: Epoch,
    /// Refuse every change.
    pub read_only: bool,
    /// Stores in its placement, 1 to 256.
    pub stores: usize,
}

/// Why a request was not admitted. Nothing was locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Past the last block.
    #[error("past the end of the volume")]
    PastEnd,
    /// A change, and the head is read-only.
    #[error("the volume is read-only")]
    ReadOnly,
    /// The head takes no new requests.
    #[error("the volume is being closed")]
    Draining,
    /// The epoch has no version left: claim a new one and call [`Head::renew_epoch`].
    #[error("the epoch has no versions left")]
    VersionsExhausted,
}

/// Why a volume did not change its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResizeRefusal {
    /// Volumes only grow.
    #[error("a volume cannot shrink from {from_bytes} to {to_bytes} bytes")]
    Shrink {
        /// Present size, bytes.
        from_bytes: u64,
        /// Size asked for, bytes.
        to_bytes: u64,
    },
    /// Not a multiple of a block.
    #[error("{0} bytes is not a multiple of 4096")]
    NotBlocks(u64),
}

/// The outcome of [`Head::begin`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Began {
    /// Go on now.
    Now(Started),
    /// An earlier request is in the way; [`Head::finish`] will name this one when it may start.
    Waiting(Ticket),
}

/// A request that holds its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// To finish it with.
    pub ticket: Ticket,
    /// The caller's name for it.
    pub tag: u64,
    /// The version of its blocks; [`Version::NONE`] for a read. Larger than that of every change started before it.
    pub version: Version,
}

/// The one writer of a volume.
pub struct Head {
    volume: VolumeId,
    live_layer: LayerId,
    size_bytes: u64,
    read_only: bool,
    draining: bool,
    epoch: Epoch,
    /// Versions given under this epoch.
    counter: u64,
    /// A new epoch was asked for.
    asked: bool,
    lock: RangeLock,
    durability: Durability,
}

impl Head {
    /// A head with nothing in flight.
    ///
    /// # Panics
    /// When the size is not a multiple of a block, or the number of stores is not in 1..=256: the records that say so
    /// were checked before.
    pub fn new(spec: HeadSpec) -> Head {
        assert!(spec.size_bytes.is_multiple_of(BLOCK_BYTES as u64));
        assert!((1..=256).contains(&spec.stores));
        Head {
            volume: spec.volume,
            live_layer: spec.live_layer,
            size_bytes: spec.size_bytes,
            read_only: spec.read_only,
            draining: false,
            epoch: spec.epoch,
            counter: 0,
            asked: false,
            lock: RangeLock::new(),
            durability: Durability::new(spec.stores),
        }
    }

    /// Asks to touch `range`. A request that was admitted ends with exactly one [`Head::finish`], even if it waited and
    /// is given up before it started.
    ///
    /// `tag` is the caller's; it comes back with the request when it starts later.
    #[inline]
    pub fn begin(&mut self, access: Access, range: BlockRange, tag: u64) -> Result<Began, Refusal> {
        if self.draining {
            return Err(Refusal::Draining);
        }
        if range.end() > self.size_bytes / BLOCK_BYTES as u64 {
            return Err(Refusal::PastEnd);
        }
        if access == Access::Exclusive {
            if self.read_only {
                return Err(Refusal::ReadOnly);
            }
            // Each waiting change will take a version too, and must not fail to when its turn comes.
            if self.counter + u64::from(self.lock.waiting_exclusive()) >= Version::COUNTER_MAX {
                return Err(Refusal::VersionsExhausted);
            }
        }
        let (ticket, now) = self.lock.enter(access, range, tag);
        Ok(if now {
            Began::Now(self.start(Unblocked {
                ticket,
                tag,
                access,
            }))
        } else {
            Began::Waiting(ticket)
        })
    }

    /// As [`Head::begin`] of a change, for copying that clients' requests may be waiting for without knowing: it goes
    /// before those that have not started.
    pub fn begin_ahead(&mut self, range: BlockRange, tag: u64) -> Result<Began, Refusal> {
        if self.draining {
            return Err(Refusal::Draining);
        }
        if range.end() > self.size_bytes / BLOCK_BYTES as u64 {
            return Err(Refusal::PastEnd);
        }
        if self.read_only {
            return Err(Refusal::ReadOnly);
        }
        if self.counter + u64::from(self.lock.waiting_exclusive()) >= Version::COUNTER_MAX {
            return Err(Refusal::VersionsExhausted);
        }
        let (ticket, now) = self.lock.enter_ahead(range, tag);
        Ok(if now {
            Began::Now(self.start(Unblocked {
                ticket,
                tag,
                access: Access::Exclusive,
            }))
        } else {
            Began::Waiting(ticket)
        })
    }

    #[inline]
    fn start(&mut self, request: Unblocked) -> Started {
        let version = match request.access {
            Access::Shared => Version::NONE,
            Access::Exclusive => {
                self.counter += 1;
                Version::new(self.epoch, self.counter)
            }
        };
        Started {
            ticket: request.ticket,
            tag: request.tag,
            version,
        }
    }

    /// A further version for a change that was started: it is written again, to other copies than the first time.
    /// `None`: the epoch has none left.
    pub fn next_version(&mut self) -> Option<Version> {
        if self.counter + u64::from(self.lock.waiting_exclusive()) >= Version::COUNTER_MAX {
            return None;
        }
        self.counter += 1;
        Some(Version::new(self.epoch, self.counter))
    }

    /// Every version given from now on is at least this.
    pub fn versions_from(&self) -> Version {
        Version::new(self.epoch, self.counter + 1)
    }

    /// Ends a request (or gives up one that waits) and appends those that may start now, oldest first.
    #[inline]
    pub fn finish(&mut self, ticket: Ticket, started: &mut SmallVec<[Started; 4]>) {
        let mut unblocked = SmallVec::new();
        self.lock.leave(ticket, &mut unblocked);
        for request in unblocked {
            let request = self.start(request);
            started.push(request);
        }
    }

    /// Says that a store has taken a change of this volume: call it once per write or zero entry, before answering.
    #[inline]
    pub fn taken(&mut self, store: StoreSlot) {
        self.durability.taken(store);
    }

    /// What a flush that arrives now has to sync. Every change answered so far is covered; a change still under way
    /// need not be.
    pub fn flush(&self) -> FlushPlan {
        self.durability.plan()
    }

    /// Every store of the plan has synced without error.
    pub fn flushed(&mut self, plan: &FlushPlan) {
        self.durability.flushed(plan);
    }

    /// Grows the volume. Sessions learn the new size from [`Head::size_bytes`].
    pub fn grow(&mut self, size_bytes: u64, stores: usize) -> Result<(), ResizeRefusal> {
        if !size_bytes.is_multiple_of(BLOCK_BYTES as u64) {
            return Err(ResizeRefusal::NotBlocks(size_bytes));
        }
        if size_bytes < self.size_bytes {
            return Err(ResizeRefusal::Shrink {
                from_bytes: self.size_bytes,
                to_bytes: size_bytes,
            });
        }
        self.size_bytes = size_bytes;
        self.durability.grow(stores);
        Ok(())
    }

    /// Refuses or accepts changes from now on; those admitted before go on.
    pub fn set_read_only(&mut self, read_only: bool) {
        self.read_only = read_only;
    }

    /// Takes no new requests; those admitted go on to their end.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Nothing in flight.
    pub fn is_idle(&self) -> bool {
        self.lock.in_flight() == 0
    }

    /// Requests admitted and not finished, and how many of them wait for another.
    pub fn in_flight(&self) -> (usize, usize) {
        (self.lock.in_flight(), self.lock.waiting())
    }

    /// True once for each epoch, when few versions are left of it: then it is time to claim a new one and call
    /// [`Head::renew_epoch`].
    #[inline]
    pub fn asks_for_epoch(&mut self) -> bool {
        if self.counter < Version::COUNTER_MAX - EPOCH_RESERVE || self.asked {
            return false;
        }
        self.asked = true;
        true
    }

    /// Goes on under a new, larger epoch with a fresh counter.
    ///
    /// # Panics
    /// When the epoch is not larger: a version would be given twice.
    pub fn renew_epoch(&mut self, epoch: Epoch) {
        assert!(epoch > self.epoch);
        self.epoch = epoch;
        self.counter = 0;
        self.asked = false;
    }

    /// The volume.
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// The layer that takes writes.
    pub fn live_layer(&self) -> LayerId {
        self.live_layer
    }

    /// Size, bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// No change is accepted.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The epoch its versions carry.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Panics when something that must always hold does not.
    pub fn check_invariants(&self) {
        self.lock.check_invariants();
        self.durability.check_invariants();
        assert!(
            self.counter + u64::from(self.lock.waiting_exclusive()) <= Version::COUNTER_MAX,
            "a waiting change may find no version"
        );
    }

    /// As if so many versions had been given. For tests: it would take weeks to get there by writing.
    #[doc(hidden)]
    pub fn set_counter(&mut self, counter: u64) {
        self.counter = counter;
    }
}

#[cfg(test)]
mod tests;
