//! What a store has of sets that it does not belong to any more is given back, a little at a time.

use ashlar_core::records::LeftoverRecord;
use ashlar_core::store::WriteError;

use super::super::config::DataError;
use super::super::thread::DataThread;

/// Leaves that become zeros in one turn: an entry of the log each, and nothing is read.
const LEAVES_AT_ONCE: usize = 32;

impl DataThread {
    /// True: all of it is given back.
    pub(super) fn give_leftover_back(&mut self, left: &LeftoverRecord) -> Result<bool, DataError> {
        let at = self
            .store_here(left.store)
            .ok_or(DataError::NoSuchStore(left.store))?;
        let driver = &mut self.stores[at];
        // Clients that wait for room go first.
        if !driver.parked.is_empty() {
            return Ok(false);
        }
        for layer in &left.layers {
            let has = |chunk| left.has(chunk);
            match driver.store.give_back(*layer, has, LEAVES_AT_ONCE) {
                Ok(true) => {}
                Ok(false) | Err(WriteError::Busy { .. }) => return Ok(false),
                Err(WriteError::NoSpace) => return Ok(false),
                Err(WriteError::Failed(error)) => return Err(DataError::Store(error)),
            }
        }
        Ok(true)
    }
}
