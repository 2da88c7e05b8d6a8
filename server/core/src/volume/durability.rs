//! Which stores a flush has to sync.
//!
//! A flush covers every change of the volume that was answered before it, on whichever connection. A store in which
//! nothing was written since its last good sync has nothing to say, so a volume spread over many stores does not pay
//! for all of them each time, and a flush of a clean volume is free.

use smallvec::SmallVec;

/// A store of the volume, by its place in the volume's placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StoreSlot(pub u8);

/// What a flush needs. When every store in it has synced, hand it back to [`super::Head::flushed`]; if one failed,
/// drop it, and the next flush will ask again.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a flush is answered after its stores have synced"]
pub struct FlushPlan {
    /// Stores to sync, each with the number of changes it had taken when the flush came.
    taken: SmallVec<[(StoreSlot, u64); 4]>,
}

impl FlushPlan {
    /// The stores to sync; none means that the flush may be answered at once.
    pub fn stores(&self) -> impl Iterator<Item = StoreSlot> {
        self.taken.iter().map(|(slot, _)| *slot)
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    /// Changes the store took.
    taken: u64,
    /// Of those, how many are durable for certain.
    durable: u64,
}

/// Counts, per store, what was taken and what is durable.
#[derive(Debug)]
pub(super) struct Durability {
    stores: SmallVec<[Progress; 4]>,
}

impl Durability {
    /// Every store starts with something to sync: after a crash of the process, what was answered before it may be in
    /// the device's cache only.
    pub(super) fn new(stores: usize) -> Durability {
        Durability {
            stores: smallvec::smallvec![Progress { taken: 1, durable: 0 }; stores],
        }
    }

    #[inline]
    pub(super) fn taken(&mut self, slot: StoreSlot) {
        self.stores[usize::from(slot.0)].taken += 1;
    }

    pub(super) fn plan(&self) -> FlushPlan {
        let mut taken = SmallVec::new();
        for (index, progress) in self.stores.iter().enumerate() {
            if progress.taken > progress.durable {
                taken.push((StoreSlot(index as u8), progress.taken));
            }
        }
        FlushPlan { taken }
    }

    pub(super) fn flushed(&mut self, plan: &FlushPlan) {
        for (slot, taken) in &plan.taken {
            let durable = &mut self.stores[usize::from(slot.0)].durable;
            *durable = (*durable).max(*taken);
        }
    }

    /// More stores, after the volume has grown onto them.
    pub(super) fn grow(&mut self, stores: usize) {
        while self.stores.len() < stores {
            self.stores.push(Progress {
                taken: 1,
                durable: 0,
            });
        }
    }

    pub(super) fn check_invariants(&self) {
        for progress in &self.stores {
            assert!(progress.durable <= progress.taken);
        }
    }
}
