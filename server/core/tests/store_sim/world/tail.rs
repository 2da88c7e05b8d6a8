//! The memory of a store's tail.

use std::cell::UnsafeCell;
use std::rc::Rc;

use ashlar_core::store::{AlignedBuf, TailMemory, tail_bytes};

/// Tail memory that outlives the store.
#[derive(Clone)]
pub(crate) struct SharedTail(Rc<UnsafeCell<AlignedBuf>>);

// SAFETY: a run stays on one thread; the store's bound is for the daemon.
unsafe impl Send for SharedTail {}

impl SharedTail {
    pub(crate) fn new() -> SharedTail {
        SharedTail(Rc::new(UnsafeCell::new(AlignedBuf::zeroed(tail_bytes(
            4 << 20,
        )))))
    }

    pub(crate) fn snapshot(&self) -> Vec<u8> {
        // SAFETY: nobody writes while a snapshot is taken: one thread.
        unsafe { (*self.0.get()).to_vec() }
    }

    pub(crate) fn restore(&self, bytes: &[u8]) {
        // SAFETY: as above.
        unsafe { (*self.0.get()).copy_from_slice(bytes) }
    }
}

impl TailMemory for SharedTail {
    fn as_mut_ptr(&mut self) -> *mut u8 {
        // SAFETY: the only store that uses it holds this handle.
        unsafe { (*self.0.get()).as_mut_ptr() }
    }
    fn len(&self) -> usize {
        // SAFETY: the length never changes.
        unsafe { (&*self.0.get()).len() }
    }
}
