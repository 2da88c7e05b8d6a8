//! What the client of a store does: it writes, receives, zeroes, flushes, reads and drops, and tells the oracle.

use ashlar_core::store::{AlignedBuf, ExtentKey, ReadOutcome, WriteError};
use ashlar_core::units::{BLOCK_BYTES, ChunkIndex, Epoch, LEAF_BLOCKS, LayerId, Version};

use super::{CHUNKS, Incoming, LEAVES, Op, PER_LEAF, World};
use crate::oracle::fill;

impl World {
    fn next_version(&mut self) -> Version {
        self.version += 1;
        Version::new(Epoch(self.epoch), self.version)
    }

    pub(super) fn key(&mut self) -> ExtentKey {
        ExtentKey {
            layer: LayerId(self.layer),
            chunk: ChunkIndex(self.rng.below(CHUNKS) as u32),
        }
    }

    /// Some blocks next to each other.
    fn range(&mut self) -> (u32, u32) {
        let leaf = self.rng.below(LEAVES) as u32;
        // At the end of a leaf now and then, to cross into the next.
        let at = if self.rng.below(4) == 0 {
            LEAF_BLOCKS - 4
        } else {
            self.rng.below(PER_LEAF) as u32
        };
        let count = if self.rng.below(3) == 0 {
            1 + self.rng.below(20)
        } else {
            1 + self.rng.below(3)
        } as u32;
        (leaf * LEAF_BLOCKS + at, count)
    }

    pub(crate) fn client_op(&mut self) {
        match self.rng.below(100) {
            0..=39 => self.write(),
            40..=54 => self.receive(),
            55..=62 => self.zero(),
            63..=77 => self.flush(),
            78..=95 => self.read(),
            96 => self.checkpoint(),
            97 if self.rng.below(4) == 0 => self.drop_layer(),
            _ => {
                self.now += self.rng.below(60);
                let now = self.now;
                self.store_mut().on_tick(now);
            }
        }
        self.pump();
    }

    pub(super) fn op(&mut self, op: Op) -> u64 {
        self.next_op += 1;
        self.ops.insert(self.next_op, op);
        self.next_op
    }

    pub(crate) fn write(&mut self) {
        let key = self.key();
        let (first, count) = self.range();
        self.write_at(key, first, count);
    }

    pub(crate) fn write_at(&mut self, key: ExtentKey, first: u32, count: u32) {
        let version = self.next_version();
        let mut data = vec![0; count as usize * BLOCK_BYTES];
        for (i, block) in data.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            fill(block, (key, first + i as u32), version.0);
        }
        let durable = self.durable();
        let result = self.store_mut().write(key, first, &data, version, durable);
        self.note_write((key, first, count), version, durable, result);
    }

    pub(super) fn durable(&mut self) -> Option<u64> {
        (self.rng.below(6) == 0).then(|| {
            self.next_op += 1;
            self.next_op
        })
    }

    /// Begins to receive a payload where the store has room for it, or ends that.
    fn receive(&mut self) {
        let Some(incoming) = self.incoming.take() else {
            let key = self.key();
            let (first, count) = self.range();
            if let Some(landing) = self.store_mut().reserve_landing(count) {
                // Half of it, of a version that is never given.
                let half = self.store_mut().landing_mut(&landing);
                let half = &mut half[..count as usize * BLOCK_BYTES / 2];
                half.fill(0xee);
                self.incoming = Some(Incoming {
                    landing,
                    key,
                    first,
                    count,
                });
            }
            return;
        };
        let Incoming {
            landing,
            key,
            first,
            count,
        } = incoming;
        if self.rng.below(8) == 0 {
            self.store_mut().cancel_landing(landing);
            return;
        }
        let version = self.next_version();
        let store = self.store.as_mut().expect("open");
        let data = store.landing_mut(&landing);
        assert!(
            data[..data.len() / 2].iter().all(|&byte| byte == 0xee),
            "what was received is not there any more"
        );
        for (i, block) in data.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            fill(block, (key, first + i as u32), version.0);
        }
        let durable = self.durable();
        let store = self.store.as_mut().expect("open");
        let result = store.write_landed(landing, key, first, version, durable);
        self.landed += u64::from(result.is_ok());
        let result = result.map_err(|(landing, error)| {
            self.store_mut().cancel_landing(landing);
            error
        });
        self.note_write((key, first, count), version, durable, result);
    }

    fn note_write(
        &mut self,
        (key, first, count): (ExtentKey, u32, u32),
        version: Version,
        durable: Option<u64>,
        result: Result<(), WriteError>,
    ) {
        let taken = match result {
            Ok(()) => count,
            Err(WriteError::Busy { accepted }) => {
                self.busy += 1;
                accepted
            }
            Err(WriteError::NoSpace) => {
                self.no_space += 1;
                0
            }
            Err(e) => panic!("write: {e}"),
        };
        let mut marks = Vec::new();
        for i in 0..taken {
            let place = (key, first + i);
            self.oracle.wrote(place, version.0, false, result.is_ok());
            marks.push((place, version.0));
        }
        if let (Some(op), true) = (durable, result.is_ok()) {
            self.ops.insert(op, Op::Durable(marks));
        }
    }

    fn zero(&mut self) {
        let key = self.key();
        let (first, count) = if self.rng.below(4) == 0 {
            (self.rng.below(LEAVES) as u32 * LEAF_BLOCKS, LEAF_BLOCKS)
        } else {
            self.range()
        };
        let version = self.next_version();
        match self
            .store_mut()
            .write_zeroes(key, first, count, version, None)
        {
            Ok(()) => {
                for place in self.oracle.places() {
                    if place.0 == key && (first..first + count).contains(&place.1) {
                        self.oracle.wrote(place, version.0, true, true);
                    }
                }
            }
            Err(WriteError::Busy { accepted: 0 }) => {}
            Err(e) => panic!("zero: {e}"),
        }
    }

    pub(crate) fn flush(&mut self) {
        let marks = self.oracle.marks();
        let op = self.op(Op::Flush(marks));
        self.store_mut().flush(op);
    }

    pub(crate) fn checkpoint(&mut self) {
        let op = self.op(Op::Other);
        self.store_mut().checkpoint(op);
    }

    fn drop_layer(&mut self) {
        let op = self.op(Op::Other);
        let layer = self.layer;
        // Reads of the layer must be over.
        if self.ops.values().any(|o| matches!(o, Op::Read { .. })) {
            self.ops.remove(&op);
            return;
        }
        match self.store_mut().drop_layer(op, LayerId(layer)) {
            Ok(()) => {
                self.oracle.forget_layer(layer);
                if let Some(incoming) = self.incoming.take() {
                    self.store_mut().cancel_landing(incoming.landing);
                }
                self.layer += 1;
            }
            Err(_) => {
                self.ops.remove(&op);
            }
        }
    }

    pub(super) fn read(&mut self) {
        let key = self.key();
        let (first, count) = self.range();
        let since: Vec<u64> = (0..count)
            .map(|i| self.oracle.mark((key, first + i)))
            .collect();
        let mut buf = AlignedBuf::blocks(count);
        let op = self.next_op + 1;
        self.next_op = op;
        // SAFETY: the buffer is kept in `ops` until the operation is done; its heap memory does not move.
        let outcome = unsafe {
            let slice = std::slice::from_raw_parts_mut(buf.as_mut_ptr(), buf.len());
            self.store_mut().read(op, key, first, slice)
        };
        match outcome {
            Ok(ReadOutcome::Done(info)) => {
                for &(at, n) in &info.holes {
                    assert!(
                        buf[at as usize * BLOCK_BYTES..][..n as usize * BLOCK_BYTES]
                            .iter()
                            .all(|&b| b == 0)
                    );
                }
                self.check_read(key, first, &since, &buf);
            }
            Ok(ReadOutcome::Pending) => {
                self.ops.insert(
                    op,
                    Op::Read {
                        key,
                        first,
                        since,
                        buf,
                    },
                );
            }
            Err(e) => panic!("read: {e}"),
        }
    }

    pub(super) fn check_read(&self, key: ExtentKey, first: u32, since: &[u64], buf: &[u8]) {
        for (i, block) in buf.chunks_exact(BLOCK_BYTES).enumerate() {
            self.oracle
                .read((key, first + i as u32), since[i], block)
                .unwrap_or_else(|e| panic!("{e}"));
        }
    }
}
