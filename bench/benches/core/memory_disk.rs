//! A disk and a tail in plain memory: they cost a copy and never fail.

use ashlar_core::store::{Action, BlockingDisk, DiskError, Store, TailMemory};
use ashlar_core::units::BLOCK_BYTES;

/// A disk of a fixed size.
pub(crate) struct MemoryDisk {
    bytes: Vec<u8>,
}

impl MemoryDisk {
    pub(crate) fn new(len_bytes: usize) -> MemoryDisk {
        MemoryDisk {
            bytes: vec![0; len_bytes],
        }
    }

    fn at(&mut self, offset: u64, len: usize) -> &mut [u8] {
        &mut self.bytes[offset as usize..][..len]
    }

    /// Carries out one action. True when it was an I/O, which the caller then has to report.
    pub(crate) fn carry_out(&mut self, action: &Action) -> Option<u32> {
        match *action {
            Action::Write {
                io,
                offset,
                ptr,
                len,
                ..
            } => {
                // SAFETY: an action's memory is the store's and stays where it is until the I/O is reported.
                let from = unsafe { std::slice::from_raw_parts(ptr, len) };
                self.at(offset, len).copy_from_slice(from);
                Some(io)
            }
            Action::Read {
                io,
                offset,
                ptr,
                len,
            } => {
                // SAFETY: as above, and nobody else reads or writes it meanwhile.
                let into = unsafe { std::slice::from_raw_parts_mut(ptr, len) };
                into.copy_from_slice(self.at(offset, len));
                Some(io)
            }
            Action::Sync { io } | Action::Allocate { io, .. } => Some(io),
            Action::Done { .. } | Action::Ready | Action::Event(_) => None,
        }
    }

    /// Carries out everything and reports it, until the store has nothing more to do at once.
    pub(crate) fn settle(&mut self, store: &mut Store) {
        let mut actions = Vec::new();
        loop {
            store.poll_actions(&mut actions);
            if actions.is_empty() {
                return;
            }
            for action in actions.drain(..) {
                if let Some(io) = self.carry_out(&action) {
                    store.on_io(io, Ok(()));
                }
            }
        }
    }
}

impl BlockingDisk for MemoryDisk {
    fn size_bytes(&mut self) -> Result<u64, DiskError> {
        Ok(self.bytes.len() as u64)
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        buf.copy_from_slice(self.at(offset, buf.len()));
        Ok(())
    }

    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        self.at(offset, buf.len()).copy_from_slice(buf);
        Ok(())
    }

    fn sync(&mut self) -> Result<(), DiskError> {
        Ok(())
    }

    fn allocate(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.at(offset, len as usize).fill(0);
        Ok(())
    }
}

#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; BLOCK_BYTES]);

/// A tail that does not outlive the process.
pub(crate) struct MemoryTail(Vec<Page>);

impl MemoryTail {
    pub(crate) fn new(len_bytes: usize) -> MemoryTail {
        MemoryTail(vec![
            Page([0; BLOCK_BYTES]);
            len_bytes.div_ceil(BLOCK_BYTES)
        ])
    }
}

impl TailMemory for MemoryTail {
    fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }

    fn len(&self) -> usize {
        self.0.len() * BLOCK_BYTES
    }
}
