//! Writes, trims and zeroes: from the range lock into the stores, past full tails.

use ashlar_core::nbd::errors::RequestError;
use ashlar_core::store::{MAX_WRITE_BLOCKS, OpId, ReadOutcome};
use ashlar_core::units::{BLOCK_BYTES, CHUNK_BLOCKS, Version};
use ashlar_core::volume::{Access, Began, BlockRange, Started, blocks_touched};

use super::execute::refusal_text;
use super::landed::Landed;
use super::operation::{
    Edges, NotTaken, Operation, Payload, Request, Source, Stage, Work, Write, op_id, refusal_of,
};
use super::pool::Buffer;
use super::receiver::covering_bytes;
use super::thread::DataThread;

/// Blocks of real zeros written at a time.
const ZERO_BLOCKS: usize = MAX_WRITE_BLOCKS;
static ZEROS: Zeros = Zeros([0; ZERO_BLOCKS * BLOCK_BYTES]);

#[repr(align(4096))]
struct Zeros([u8; ZERO_BLOCKS * BLOCK_BYTES]);

/// Zero entries (a chunk each) and real zeros (1 MiB each) one request may cause in a turn.
const STEPS_PER_TURN: usize = 64;

/// Puts what a change changes of the blocks at its edges into those blocks, which were read to the scratch.
/// `first_block`: where the payload begins, which lies in the buffer as its blocks lie in the volume.
pub(super) fn put_edges(buffer: &mut Buffer, edges: &Edges, source: Source, first_block: u64) {
    for (edge, scratch) in [
        (edges.first, edges.scratch),
        (edges.last, edges.scratch + BLOCK_BYTES),
    ] {
        let Some(edge) = edge else { continue };
        let (from, len) = (edge.from as usize, (edge.to - edge.from) as usize);
        if source == Source::Buffer {
            let payload = (edge.block - first_block) as usize * BLOCK_BYTES + from;
            buffer.copy_within(payload, scratch + from, len);
        } else {
            buffer.zero(scratch + from, len);
        }
    }
}

/// Which edge a read of a store is for, as the part number of its operation id.
const PART_FIRST_EDGE: u32 = u32::MAX;
const PART_LAST_EDGE: u32 = u32::MAX - 1;

/// How far a change got.
enum Progress {
    Complete,
    /// Waits in a store's line, or for its turn; everything is noted.
    Waits,
    Failed(RequestError),
}

/// A change that is being given to the stores; what of its request that needs, as the request may not be in the table
/// yet.
struct Giving {
    /// Where the request is or will be in the table.
    key: usize,
    volume: usize,
    version: Version,
    durable: bool,
    /// `Done`s that will come.
    pending: u32,
}

impl Giving {
    fn of(key: usize, request: &Request) -> Giving {
        Giving {
            key,
            volume: request.volume,
            version: request.version,
            durable: request.durable,
            pending: request.pending,
        }
    }

    /// The operation a store is to end when the change is durable.
    fn op(&self) -> Option<OpId> {
        self.durable.then_some(op_id(self.key, 0))
    }
}

impl DataThread {
    // -- changes

    /// A write of whole blocks whose payload lies in the receive buffer or in its store: in the common case it is taken
    /// and answered at once.
    pub(super) fn write_whole(
        &mut self,
        mut request: Request,
        range: BlockRange,
        mut payload: Payload<'_>,
    ) {
        let key = self.operations.vacant_key();
        let began = self.volumes[request.volume].head.admission_mut().begin(
            Access::Exclusive,
            range,
            key as u64,
        );
        self.watch_epoch(request.volume);
        let mut taken = 0u64;
        let progress = match began {
            Ok(Began::Now(Started {
                ticket, version, ..
            })) => {
                request.ticket = Some(ticket);
                request.version = version;
                let mut giving = Giving::of(key, &request);
                let progress;
                (payload, progress) = match payload {
                    Payload::Landed(landed) => {
                        self.store_landed(&mut giving, range, &mut taken, landed)
                    }
                    _ => {
                        let bytes = payload.received();
                        let progress = self.store_blocks(&mut giving, range, &mut taken, bytes);
                        (payload, progress)
                    }
                };
                request.pending = giving.pending;
                Some(progress)
            }
            Ok(Began::Waiting(ticket)) => {
                request.ticket = Some(ticket);
                None
            }
            Err(refusal) => Some(Progress::Failed(refusal_text(refusal))),
        };
        let stage = match progress {
            None => Stage::Waiting,
            Some(Progress::Waits) => Stage::Storing,
            Some(Progress::Complete) => Stage::Stored,
            Some(Progress::Failed(error)) => {
                request.error = Some(error);
                Stage::Stored
            }
        };
        if stage != Stage::Stored {
            let mut buffer = self.hold(request.connection, request.length as usize);
            buffer.put(
                0,
                match &payload {
                    Payload::Landed(landed) => landed.bytes(&mut self.stores),
                    _ => payload.received(),
                },
            );
            request.buffer = Some(buffer);
        }
        if let Payload::Landed(landed) = payload {
            landed.cancel(&mut self.stores);
        }
        if stage == Stage::Stored && request.pending == 0 {
            return self.finish(request);
        }
        request.work = Work::Write(Write {
            edges: Edges::default(),
            middle: Some(range),
            source: Source::Buffer,
            taken,
            stage,
        });
        self.put(key, request);
    }

    /// Every other change.
    pub(super) fn change(
        &mut self,
        mut request: Request,
        mut edges: Edges,
        middle: Option<BlockRange>,
        source: Source,
    ) {
        let key = self.operations.vacant_key();
        let range = match (middle, edges.is_empty()) {
            (Some(middle), true) => Some(middle),
            _ => blocks_touched(request.reply.offset, request.length),
        };
        let Some(range) = range else {
            return self.answer_done(request);
        };
        if !edges.is_empty() {
            if source == Source::Buffer {
                edges.scratch =
                    covering_bytes(request.reply.offset, request.length) - 2 * BLOCK_BYTES;
            } else {
                request.buffer = Some(self.hold(request.connection, 2 * BLOCK_BYTES));
            }
        }
        let began = self.volumes[request.volume].head.admission_mut().begin(
            Access::Exclusive,
            range,
            key as u64,
        );
        self.watch_epoch(request.volume);
        let mut write = Write {
            edges,
            middle,
            source,
            taken: 0,
            stage: Stage::Waiting,
        };
        match began {
            Ok(Began::Now(Started {
                ticket, version, ..
            })) => {
                request.ticket = Some(ticket);
                request.version = version;
                write.stage = if edges.is_empty() {
                    Stage::Storing
                } else {
                    Stage::ReadingEdges
                };
                request.work = Work::Write(write);
                self.put(key, request);
                self.start_change(key);
            }
            Ok(Began::Waiting(ticket)) => {
                request.ticket = Some(ticket);
                request.work = Work::Write(write);
                self.put(key, request);
            }
            Err(refusal) => self.answer_error(request, refusal_text(refusal)),
        }
    }

    /// A change in the table has its range: reads its edges, or goes on to the stores.
    pub(super) fn start_change(&mut self, key: usize) {
        let Some(Operation::Request(request)) = self.operations.get(key) else {
            return;
        };
        let Work::Write(write) = &request.work else {
            return;
        };
        let edges = write.edges;
        if edges.is_empty() {
            self.store_change(key);
            return;
        }
        let volume = request.volume;
        let Some(buffer) = &request.buffer else {
            return;
        };
        let targets = [
            (edges.first, buffer.at(edges.scratch), PART_FIRST_EDGE),
            (
                edges.last,
                buffer.at(edges.scratch + BLOCK_BYTES),
                PART_LAST_EDGE,
            ),
        ];
        let mut pending = 0;
        let mut error = None;
        for (edge, target, part) in targets {
            let Some(edge) = edge else { continue };
            let (store, extent, first) = self.volumes[volume].place_block(edge.block);
            // SAFETY: the scratch blocks are inside the buffer and apart from each other and from the payload.
            let target = unsafe { std::slice::from_raw_parts_mut(target, BLOCK_BYTES) };
            // SAFETY: the buffer stays with the request, which stays in the table until all its parts are done.
            match unsafe {
                self.stores[store]
                    .store
                    .read(op_id(key, part), extent, first, target)
            } {
                Ok(ReadOutcome::Done(_)) => {}
                Ok(ReadOutcome::Pending) => pending += 1,
                Err(e) => error = Some(refusal_of(&e)),
            }
        }
        let Some(Operation::Request(request)) = self.operations.get_mut(key) else {
            return;
        };
        request.pending += pending;
        if error.is_some() {
            request.error = error;
        }
        if request.pending == 0 {
            self.edges_read(key);
        }
    }

    /// The edge blocks are in the scratch: put the changed bytes into them.
    pub(super) fn edges_read(&mut self, key: usize) {
        let Some(Operation::Request(request)) = self.operations.get_mut(key) else {
            return;
        };
        if request.error.is_some() {
            self.finish_at(key);
            return;
        }
        let offset = request.reply.offset;
        let Work::Write(write) = &mut request.work else {
            return;
        };
        write.stage = Stage::Storing;
        let (edges, source) = (write.edges, write.source);
        let Some(buffer) = &mut request.buffer else {
            return;
        };
        let first_block = offset / BLOCK_BYTES as u64;
        put_edges(buffer, &edges, source, first_block);
        self.store_change(key);
    }

    /// Gives the stores what they have not yet taken of a change.
    pub(super) fn store_change(&mut self, key: usize) {
        let Some(Operation::Request(request)) = self.operations.get_mut(key) else {
            return;
        };
        let Work::Write(write) = &mut request.work else {
            return;
        };
        let (mut edges, middle, source, mut taken) =
            (write.edges, write.middle, write.source, write.taken);
        let mut giving = Giving::of(key, request);
        let offset = request.reply.offset;
        // The buffer is taken out while the stores copy from it, and put back.
        let buffer = request.buffer.take();
        let mut progress = Progress::Complete;

        for (edge, scratch) in [
            (&mut edges.first, edges.scratch),
            (&mut edges.last, edges.scratch + BLOCK_BYTES),
        ] {
            let (Some(edge), Some(buffer)) = (edge, &buffer) else {
                continue;
            };
            if edge.is_stored || !matches!(progress, Progress::Complete) {
                continue;
            }
            let Some(range) = BlockRange::new(edge.block, edge.block + 1) else {
                continue;
            };
            // SAFETY: the store read the block here and the change was put into it.
            let block = unsafe { buffer.bytes(scratch, BLOCK_BYTES) };
            let mut edge_taken = 0;
            progress = self.store_blocks(&mut giving, range, &mut edge_taken, block);
            edge.is_stored = matches!(progress, Progress::Complete);
        }
        if let (Progress::Complete, Some(range)) = (&progress, middle) {
            progress = match (source, &buffer) {
                (Source::Buffer, Some(buffer)) => {
                    let start =
                        (range.first() - offset / BLOCK_BYTES as u64) as usize * BLOCK_BYTES;
                    // SAFETY: the payload filled every whole block of the range.
                    let data = unsafe {
                        buffer.bytes(start, (range.end() - range.first()) as usize * BLOCK_BYTES)
                    };
                    self.store_blocks(&mut giving, range, &mut taken, data)
                }
                (Source::Buffer, None) => Progress::Failed(RequestError::NoMemory),
                (Source::Holes, _) => self.store_holes(&mut giving, range, &mut taken),
                (Source::Zeros, _) => self.store_zeros(&mut giving, range, &mut taken),
            };
        }

        let Some(Operation::Request(request)) = self.operations.get_mut(key) else {
            return;
        };
        request.buffer = buffer;
        request.pending = giving.pending;
        if let Work::Write(write) = &mut request.work {
            write.edges = edges;
            write.taken = taken;
            if !matches!(progress, Progress::Waits) {
                write.stage = Stage::Stored;
            }
        }
        if let Progress::Failed(error) = progress {
            request.error.get_or_insert(error);
        }
        if !matches!(progress, Progress::Waits) && giving.pending == 0 {
            self.finish_at(key);
        }
    }

    /// Writes the blocks of `range` from the `taken`-th on. `data` holds all of them.
    fn store_blocks(
        &mut self,
        giving: &mut Giving,
        range: BlockRange,
        taken: &mut u64,
        data: &[u8],
    ) -> Progress {
        let block = BLOCK_BYTES as u64;
        while range.first() + *taken < range.end() {
            let (store, extent, first) =
                self.volumes[giving.volume].place_block(range.first() + *taken);
            let left = range.end() - range.first() - *taken;
            let count = left
                .min(u64::from(CHUNK_BLOCKS - first))
                .min(MAX_WRITE_BLOCKS as u64);
            // Behind those that came before; while these are retried the line is empty.
            if !self.stores[store].parked.is_empty() {
                self.park(store, giving.key);
                return Progress::Waits;
            }
            let from = (*taken * block) as usize;
            let piece = &data[from..from + (count * block) as usize];
            let result =
                self.stores[store]
                    .store
                    .write(extent, first, piece, giving.version, giving.op());
            match result.map_err(NotTaken::from) {
                Ok(()) => {
                    *taken += count;
                    giving.pending += u32::from(giving.durable);
                    self.taken(giving.volume, extent.chunk);
                }
                Err(NotTaken::Busy { accepted }) => {
                    *taken += u64::from(accepted);
                    if accepted > 0 {
                        self.taken(giving.volume, extent.chunk);
                    }
                    self.park(store, giving.key);
                    return Progress::Waits;
                }
                Err(NotTaken::Refused(error)) => return Progress::Failed(error),
            }
        }
        Progress::Complete
    }

    /// Has a store take a payload that lies in it; what it did not take is given back.
    fn store_landed<'a>(
        &mut self,
        giving: &mut Giving,
        range: BlockRange,
        taken: &mut u64,
        landed: Landed,
    ) -> (Payload<'a>, Progress) {
        let (store, extent, first) = self.volumes[giving.volume].place_block(range.first());
        debug_assert_eq!(store, landed.store);
        let driver = &mut self.stores[store];
        if !driver.parked.is_empty() {
            self.park(store, giving.key);
            return (Payload::Landed(landed), Progress::Waits);
        }
        let result =
            driver
                .store
                .write_landed(landed.landing, extent, first, giving.version, giving.op());
        let Err((landing, error)) = result else {
            *taken = range.end() - range.first();
            giving.pending += u32::from(giving.durable);
            self.taken(giving.volume, extent.chunk);
            return (Payload::Received(&[]), Progress::Complete);
        };
        let progress = match NotTaken::from(error) {
            NotTaken::Busy { accepted } => {
                *taken = u64::from(accepted);
                if accepted > 0 {
                    self.taken(giving.volume, extent.chunk);
                }
                self.park(store, giving.key);
                Progress::Waits
            }
            NotTaken::Refused(error) => Progress::Failed(error),
        };
        (Payload::Landed(Landed { store, landing }), progress)
    }

    /// Zero entries for the blocks of `range` from the `taken`-th on.
    fn store_holes(&mut self, giving: &mut Giving, range: BlockRange, taken: &mut u64) -> Progress {
        for _ in 0..STEPS_PER_TURN {
            if range.first() + *taken >= range.end() {
                return Progress::Complete;
            }
            let (store, extent, first) =
                self.volumes[giving.volume].place_block(range.first() + *taken);
            let left = range.end() - range.first() - *taken;
            let count = left.min(u64::from(CHUNK_BLOCKS - first)) as u32;
            let result = self.stores[store].store.write_zeroes(
                extent,
                first,
                count,
                giving.version,
                giving.op(),
            );
            match result.map_err(NotTaken::from) {
                Ok(()) => {
                    *taken += u64::from(count);
                    giving.pending += u32::from(giving.durable);
                    self.taken(giving.volume, extent.chunk);
                }
                Err(NotTaken::Busy { accepted }) => {
                    *taken += u64::from(accepted);
                    self.park(store, giving.key);
                    return Progress::Waits;
                }
                Err(NotTaken::Refused(error)) => return Progress::Failed(error),
            }
        }
        if range.first() + *taken >= range.end() {
            return Progress::Complete;
        }
        self.resumable.push(giving.key);
        Progress::Waits
    }

    /// Blocks of zeros for the blocks of `range` from the `taken`-th on.
    fn store_zeros(&mut self, giving: &mut Giving, range: BlockRange, taken: &mut u64) -> Progress {
        for _ in 0..STEPS_PER_TURN {
            let from = range.first() + *taken;
            let Some(step) = BlockRange::new(from, range.end().min(from + ZERO_BLOCKS as u64))
            else {
                return Progress::Complete;
            };
            let count = step.end() - step.first();
            let mut step_taken = 0;
            let data = &ZEROS.0[..count as usize * BLOCK_BYTES];
            let progress = self.store_blocks(giving, step, &mut step_taken, data);
            *taken += step_taken;
            if !matches!(progress, Progress::Complete) {
                return progress;
            }
        }
        if range.first() + *taken >= range.end() {
            return Progress::Complete;
        }
        self.resumable.push(giving.key);
        Progress::Waits
    }

    pub(super) fn park(&mut self, store: usize, key: usize) {
        self.metrics.parked_writes.add(1);
        self.stores[store].parked.push_back(key);
    }
}
