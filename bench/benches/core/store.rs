//! The store's own share of a write.

use std::time::{Duration, Instant};

use ashlar_core::store::{
    Action, ExtentKey, Geometry, OpenOptions, Params, Store, WriteError, format_store, tail_bytes,
};
use ashlar_core::units::{BLOCK_BYTES, CHUNK_BLOCKS, ChunkIndex, LayerId, StoreId, Version};
use criterion::Criterion;

use crate::memory_disk::{MemoryDisk, MemoryTail};

/// Writes that one turn of a data thread's loop finds waiting: a client at depth 32.
const WRITES_A_TURN: u64 = 32;
const CHUNKS: u32 = 4;
/// Four chunks fill it to a quarter, so that cleaning is there but does not dominate.
const STORE_BYTES: usize = 1 << 30;
const TAIL_BYTES: u64 = 64 << 20;

/// A store under random overwrites of four chunks that are all written.
struct Load {
    store: Store,
    disk: MemoryDisk,
    actions: Vec<Action>,
    block: Vec<u8>,
    version: u64,
    random: u64,
    writing: Duration,
    following: Duration,
}

impl Load {
    fn new() -> Load {
        let mut disk = MemoryDisk::new(STORE_BYTES);
        let geometry = Geometry::for_size(STORE_BYTES as u64, None).expect("large enough");
        let node = [1; 16];
        let id = StoreId(uuid::Uuid::nil());
        format_store(&mut disk, geometry, id, node, geometry.segments_max, 0).expect("formatted");
        let tail = Box::new(MemoryTail::new(tail_bytes(TAIL_BYTES)));
        let options = OpenOptions {
            node,
            boot: [2; 16],
            accept_tail_loss: false,
        };
        let (store, _) = Store::open(&mut disk, tail, Params::default(), &options).expect("opened");
        let mut load = Load {
            store,
            disk,
            actions: Vec::new(),
            block: (0..BLOCK_BYTES).map(|at| (at * 31 % 251) as u8).collect(),
            version: 1,
            random: 0x9e37_79b9_7f4a_7c15,
            writing: Duration::ZERO,
            following: Duration::ZERO,
        };
        for chunk in 0..CHUNKS {
            for block in 0..CHUNK_BLOCKS {
                load.write_one(chunk, block);
                if block.is_multiple_of(WRITES_A_TURN as u32) {
                    load.disk.settle(&mut load.store);
                }
            }
        }
        load.disk.settle(&mut load.store);
        load
    }

    fn write_one(&mut self, chunk: u32, block: u32) {
        let key = ExtentKey {
            layer: LayerId(1),
            chunk: ChunkIndex(chunk),
        };
        loop {
            self.version += 1;
            let version = Version(self.version);
            match self.store.write(key, block, &self.block, version, None) {
                Ok(()) => return,
                Err(WriteError::Busy { .. }) => self.disk.settle(&mut self.store),
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// One turn: the writes, then what the store makes of them. The disk's own time is not counted.
    fn turn(&mut self) {
        let began = Instant::now();
        for _ in 0..WRITES_A_TURN {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            let chunk = (self.random >> 32) as u32 % CHUNKS;
            let block = self.random as u32 % CHUNK_BLOCKS;
            self.write_one(chunk, block);
        }
        let written = Instant::now();
        self.writing += written - began;
        let mut actions = std::mem::take(&mut self.actions);
        let mut began = written;
        loop {
            self.store.poll_actions(&mut actions);
            self.following += began.elapsed();
            if actions.is_empty() {
                break;
            }
            let done: Vec<u32> = actions
                .drain(..)
                .filter_map(|action| self.disk.carry_out(&action))
                .collect();
            began = Instant::now();
            for io in done {
                self.store.on_io(io, Ok(()));
            }
        }
        self.actions = actions;
    }

    /// Runs turns that amount to `writes` writes, and returns what `pick` counted of them.
    fn run(&mut self, writes: u64, pick: fn(&Load) -> Duration) -> Duration {
        let before = pick(self);
        let turns = writes.div_ceil(WRITES_A_TURN);
        for _ in 0..turns {
            self.turn();
        }
        (pick(self) - before).mul_f64(writes as f64 / (turns * WRITES_A_TURN) as f64)
    }
}

pub(crate) fn write(criterion: &mut Criterion) {
    let mut load = Load::new();
    let mut group = criterion.benchmark_group("store");
    group.bench_function("write of a block into the tail", |bencher| {
        bencher.iter_custom(|writes| load.run(writes, |load| load.writing));
    });
    group.bench_function(
        "what follows: frames, leaves, checkpoints, cleaning",
        |bencher| {
            bencher.iter_custom(|writes| load.run(writes, |load| load.following));
        },
    );
    group.finish();
    let status = load.store.status();
    let written = status.log_blocks + status.cleaned_blocks + status.checkpoint_blocks;
    let amplification = written as f64 / status.client_blocks as f64;
    println!("blocks written to the disk for each block of a client: {amplification:.3}");
}
