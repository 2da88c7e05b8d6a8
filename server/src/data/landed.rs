//! Payloads that are received straight into the store they are for.

use ashlar_core::nbd::request::{Command, Request};
use ashlar_core::store::Landing;
use ashlar_core::units::{BLOCK_BYTES, CHUNK_BLOCKS};

use super::thread::{StoreDriver, Volume};

/// A payload, or room for it, in one of the thread's stores. It ends by [`Landed::cancel`] or with the store having
/// taken it.
pub(super) struct Landed {
    pub(super) store: usize,
    pub(super) landing: Landing,
}

impl Landed {
    /// Room for the payload of a write that covers whole blocks of one chunk, where its store has it at once.
    pub(super) fn reserve(
        stores: &mut [StoreDriver],
        volume: &Volume,
        request: &Request,
    ) -> Option<Landed> {
        let block = BLOCK_BYTES as u64;
        if volume.stores.is_empty()
            || request.command != Command::Write
            || !request.offset.is_multiple_of(block)
            || !request.length.is_multiple_of(block)
        {
            return None;
        }
        let (store, _, first) = volume.place_block(request.offset / block);
        let count = request.length / block;
        if u64::from(first) + count > u64::from(CHUNK_BLOCKS) {
            return None;
        }
        let driver = &mut stores[store];
        // Behind those that wait for room already.
        if !driver.parked.is_empty() {
            return None;
        }
        let landing = driver.store.reserve_landing(count as u32)?;
        Some(Landed { store, landing })
    }

    /// Its bytes, wherever they are at present.
    pub(super) fn bytes<'a>(&self, stores: &'a mut [StoreDriver]) -> &'a mut [u8] {
        stores[self.store].store.landing_mut(&self.landing)
    }

    /// Gives it up.
    pub(super) fn cancel(self, stores: &mut [StoreDriver]) {
        stores[self.store].store.cancel_landing(self.landing);
    }
}
