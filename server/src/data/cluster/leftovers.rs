//! What a store has of sets that it does not belong to any more is given back, a little at a time.

use ashlar_core::records::LeftoverRecord;
use ashlar_core::store::WriteError;
use ashlar_core::units::{ChunkIndex, LayerId};

use super::super::config::DataError;
use super::super::thread::DataThread;

/// Leaves that become zeros in one turn: an entry of the log each, and nothing is read.
const LEAVES_AT_ONCE: usize = 32;

impl DataThread {
    /// Gives some of one layer back, from a chunk on. Answers where to go on; `None`: all of it is given back.
    pub(super) fn give_leftover_back(
        &mut self,
        left: &LeftoverRecord,
        layer: LayerId,
        from: ChunkIndex,
    ) -> Result<Option<ChunkIndex>, DataError> {
        let at = self
            .store_here(left.store)
            .ok_or(DataError::NoSuchStore(left.store))?;
        let driver = &mut self.stores[at];
        // Clients that wait for room go first.
        if !driver.parked.is_empty() {
            return Ok(Some(from));
        }
        let has = |chunk| left.has(chunk);
        match driver.store.give_back(layer, from, has, LEAVES_AT_ONCE) {
            Ok(next) => Ok(next),
            // What was done stays done; the rest of the piece is found again.
            Err(WriteError::Busy { .. } | WriteError::NoSpace) => Ok(Some(from)),
            Err(WriteError::Failed(error)) => Err(DataError::Store(error)),
        }
    }
}
