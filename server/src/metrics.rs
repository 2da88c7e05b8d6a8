//! Counters and histograms of the data path.
//!
//! Each has one writer, the data thread that owns it, so counting is a plain load and store: no locked instruction on
//! the path of an I/O. Readers see every counter whole, but not all at the same instant.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ashlar_core::units::{ChunkIndex, LayerId, StoreId, VolumeId};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// By the owning thread only.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// By the owning thread only.
    #[inline]
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// By the owning thread only.
    #[inline]
    pub fn add(&self, n: u64) {
        self.set(self.get().wrapping_add(n));
    }

    /// By the owning thread only.
    #[inline]
    pub fn sub(&self, n: u64) {
        self.set(self.get().wrapping_sub(n));
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Buckets of a [`Histogram`], the last one open.
pub const BUCKETS: usize = 50;

/// Upper bounds of all buckets but the last, nanoseconds: 1 µs, 1.5 µs, 2 µs, 3 µs, 4 µs, 6 µs … 17 s. Two a doubling
/// keep a percentile read from them within 20 % or so, over every latency a block device has.
pub const BUCKET_BOUNDS_NS: [u64; BUCKETS - 1] = bounds();

const fn bounds() -> [u64; BUCKETS - 1] {
    let mut bounds = [0; BUCKETS - 1];
    let mut i = 0;
    while i < BUCKETS - 1 {
        let doubling = 1000u64 << (i / 2);
        bounds[i] = if i % 2 == 0 {
            doubling
        } else {
            doubling + doubling / 2
        };
        i += 1;
    }
    bounds
}

fn bucket_of(ns: u64) -> usize {
    if ns <= 1000 {
        return 0;
    }
    // The doubling that `ns` lies in, then which half of it. Bounds are inclusive.
    let units = (ns - 1) / 1000;
    let doubling = (63 - units.leading_zeros()) as usize;
    let upper_half = ns
        > BUCKET_BOUNDS_NS
            .get(doubling * 2 + 1)
            .copied()
            .unwrap_or(u64::MAX);
    (doubling * 2 + 1 + usize::from(upper_half)).min(BUCKETS - 1)
}

/// Latencies, counted by bucket.
#[derive(Debug)]
pub struct Histogram {
    buckets: [Counter; BUCKETS],
    sum_ns: Counter,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram {
            buckets: std::array::from_fn(|_| Counter::default()),
            sum_ns: Counter::default(),
        }
    }
}

impl Histogram {
    /// By the owning thread only.
    #[inline]
    pub fn record(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(ns)].add(1);
        self.sum_ns.add(ns);
    }

    pub fn snapshot(&self) -> HistogramSnapshot {
        HistogramSnapshot {
            buckets: std::array::from_fn(|i| self.buckets[i].get()),
            sum_ns: self.sum_ns.get(),
        }
    }
}

/// A [`Histogram`] at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistogramSnapshot {
    /// How many fell into each bucket (not cumulative); bounds in [`BUCKET_BOUNDS_NS`].
    pub buckets: [u64; BUCKETS],
    pub sum_ns: u64,
}

impl HistogramSnapshot {
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The latency that the share `q` (0 to 1) of operations did not exceed, nanoseconds, interpolated within its
    /// bucket; `None` when nothing was counted.
    pub fn quantile_ns(&self, q: f64) -> Option<u64> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let wanted = (q * count as f64).clamp(1.0, count as f64);
        let mut below = 0.0;
        for (i, &n) in self.buckets.iter().enumerate() {
            let n = n as f64;
            if n > 0.0 && below + n >= wanted {
                let low = if i == 0 { 0 } else { BUCKET_BOUNDS_NS[i - 1] };
                let high = BUCKET_BOUNDS_NS.get(i).copied().unwrap_or(low);
                return Some(low + ((high - low) as f64 * (wanted - below) / n) as u64);
            }
            below += n;
        }
        BUCKET_BOUNDS_NS.last().copied()
    }

    /// What was counted after `earlier` and before `self`.
    pub fn since(&self, earlier: &HistogramSnapshot) -> HistogramSnapshot {
        HistogramSnapshot {
            buckets: std::array::from_fn(|i| self.buckets[i].wrapping_sub(earlier.buckets[i])),
            sum_ns: self.sum_ns.wrapping_sub(earlier.sum_ns),
        }
    }
}

/// What clients ask of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Command {
    Read,
    Write,
    Flush,
    Trim,
    WriteZeroes,
    Cache,
    BlockStatus,
}

impl Command {
    pub const ALL: [Command; 7] = [
        Command::Read,
        Command::Write,
        Command::Flush,
        Command::Trim,
        Command::WriteZeroes,
        Command::Cache,
        Command::BlockStatus,
    ];

    /// The label value in metrics.
    pub fn label(self) -> &'static str {
        match self {
            Command::Read => "read",
            Command::Write => "write",
            Command::Flush => "flush",
            Command::Trim => "trim",
            Command::WriteZeroes => "write_zeroes",
            Command::Cache => "cache",
            Command::BlockStatus => "block_status",
        }
    }
}

/// One command of one volume.
#[derive(Debug, Default)]
pub struct CommandMetrics {
    /// Answered requests, with success or not.
    pub operations: Counter,
    /// Bytes asked for by those that succeeded.
    pub bytes: Counter,
    /// Of the operations, how many were answered with an error.
    pub errors: Counter,
    /// From the request's parsing to its reply's queueing.
    pub latency: Histogram,
}

/// One volume, while it is open in this daemon.
#[derive(Debug, Default)]
pub struct VolumeMetrics {
    commands: [CommandMetrics; 7],
    /// Requests taken and not yet answered.
    pub in_flight: Gauge,
    pub connections: Gauge,
    /// Copied by the head of this daemon to bring replicas up to date.
    pub resynced_blocks: Counter,
}

impl VolumeMetrics {
    #[inline]
    pub fn command(&self, command: Command) -> &CommandMetrics {
        &self.commands[command as usize]
    }
}

/// The disk operations of one store, as the engine saw them.
#[derive(Debug, Default)]
pub struct DiskMetrics {
    pub reads: Counter,
    pub read_bytes: Counter,
    pub writes: Counter,
    pub write_bytes: Counter,
    pub syncs: Counter,
    pub allocated_bytes: Counter,
    pub errors: Counter,
    pub read_latency: Histogram,
    pub write_latency: Histogram,
    pub sync_latency: Histogram,
    pub in_flight: Gauge,
}

/// One data thread.
#[derive(Debug, Default)]
pub struct ThreadMetrics {
    /// Passes of the event loop.
    pub turns: Counter,
    /// Requests taken from sockets; divided by `turns`, the batch size.
    pub requests: Counter,
    /// Calls of recvmsg and sendmsg.
    pub receives: Counter,
    pub sends: Counter,
    pub received_bytes: Counter,
    pub sent_bytes: Counter,
    pub connections: Gauge,
    /// Connections taken since the start.
    pub connections_total: Counter,
    /// Connections closed because the client broke the protocol.
    pub protocol_errors: Counter,
    /// Bytes of requests and replies held for clients.
    pub buffered_bytes: Gauge,
    /// Times a connection was left unread because it or the daemon held too much.
    pub pauses: Counter,
    /// Writes that waited for room in a tail.
    pub parked_writes: Counter,
}

/// Damaged places remembered for each store; the log has them all.
const DAMAGES_KEPT: usize = 1024;

/// A block that could not be returned because what was read is not what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    pub layer: LayerId,
    pub chunk: ChunkIndex,
    /// Of the chunk.
    pub block: u32,
    /// A sentence for people.
    pub problem: String,
}

/// The newest damages of a store.
#[derive(Debug, Default)]
struct Damages {
    /// Ever met; the last of `newest` is number `count`.
    count: u64,
    newest: VecDeque<Damage>,
}

/// Everything that is counted. Shared by the data threads, which write, and the control plane, which reads.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Registry>);

#[derive(Debug, Default)]
struct Registry {
    threads: Mutex<Vec<Arc<ThreadMetrics>>>,
    volumes: Mutex<BTreeMap<VolumeId, (String, Arc<VolumeMetrics>)>>,
    stores: Mutex<BTreeMap<StoreId, Arc<DiskMetrics>>>,
    damages: Mutex<BTreeMap<StoreId, Damages>>,
}

/// Nothing is left half-done under these locks, so one that a panicking thread held is still good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Metrics {
    pub fn new() -> Metrics {
        Metrics::default()
    }

    pub(crate) fn add_thread(&self) -> Arc<ThreadMetrics> {
        let thread = Arc::new(ThreadMetrics::default());
        lock(&self.0.threads).push(thread.clone());
        thread
    }

    pub(crate) fn add_volume(&self, id: VolumeId, name: &str) -> Arc<VolumeMetrics> {
        let mut volumes = lock(&self.0.volumes);
        let entry = volumes.entry(id).or_default();
        entry.0 = name.to_owned();
        entry.1.clone()
    }

    pub(crate) fn remove_volume(&self, id: VolumeId) {
        lock(&self.0.volumes).remove(&id);
    }

    pub(crate) fn add_store(&self, id: StoreId) -> Arc<DiskMetrics> {
        lock(&self.0.stores).entry(id).or_default().clone()
    }

    /// Remembers a damaged block. Rare, so a lock is no matter.
    pub(crate) fn add_damage(&self, store: StoreId, damage: Damage) {
        let mut all = lock(&self.0.damages);
        let damages = all.entry(store).or_default();
        damages.count += 1;
        if damages.newest.len() == DAMAGES_KEPT {
            damages.newest.pop_front();
        }
        damages.newest.push_back(damage);
    }

    /// Damages met so far in a store.
    pub fn damage_count(&self, store: StoreId) -> u64 {
        lock(&self.0.damages)
            .get(&store)
            .map_or(0, |damages| damages.count)
    }

    /// Damages after number `seen`, which becomes the number of the newest.
    pub fn damages_after(&self, store: StoreId, seen: &mut u64) -> Vec<Damage> {
        let all = lock(&self.0.damages);
        let Some(damages) = all.get(&store) else {
            return Vec::new();
        };
        let new = usize::try_from(damages.count.saturating_sub(*seen)).unwrap_or(usize::MAX);
        *seen = damages.count;
        let skip = damages.newest.len().saturating_sub(new);
        damages.newest.iter().skip(skip).cloned().collect()
    }

    /// A volume was given another name.
    pub fn rename_volume(&self, id: VolumeId, name: &str) {
        if let Some(entry) = lock(&self.0.volumes).get_mut(&id) {
            entry.0 = name.to_owned();
        }
    }

    pub fn threads(&self) -> Vec<Arc<ThreadMetrics>> {
        lock(&self.0.threads).clone()
    }

    /// Open volumes: id, name, counters.
    pub fn volumes(&self) -> Vec<(VolumeId, String, Arc<VolumeMetrics>)> {
        lock(&self.0.volumes)
            .iter()
            .map(|(id, (name, metrics))| (*id, name.clone(), metrics.clone()))
            .collect()
    }

    pub fn stores(&self) -> Vec<(StoreId, Arc<DiskMetrics>)> {
        lock(&self.0.stores)
            .iter()
            .map(|(id, metrics)| (*id, metrics.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_falls_into_the_bucket_whose_bounds_hold_it() {
        for ns in (0..5000)
            .chain((5000..50_000_000).step_by(997))
            .chain(BUCKET_BOUNDS_NS.iter().flat_map(|b| [b - 1, *b, b + 1]))
        {
            let expected = BUCKET_BOUNDS_NS
                .iter()
                .position(|bound| ns <= *bound)
                .unwrap_or(BUCKETS - 1);
            assert_eq!(bucket_of(ns), expected, "{ns}");
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn damages_are_told_once_and_the_oldest_are_forgotten() {
        let (metrics, store) = (Metrics::new(), StoreId(uuid::Uuid::from_u128(1)));
        let damage = |block| Damage {
            layer: LayerId(1),
            chunk: ChunkIndex(0),
            block,
            problem: String::new(),
        };
        let mut seen = metrics.damage_count(store);
        assert_eq!(metrics.damages_after(store, &mut seen), []);
        metrics.add_damage(store, damage(1));
        metrics.add_damage(store, damage(2));
        assert_eq!(
            metrics.damages_after(store, &mut seen),
            [damage(1), damage(2)]
        );
        assert_eq!(metrics.damages_after(store, &mut seen), []);
        for block in 0..2000 {
            metrics.add_damage(store, damage(block));
        }
        let told = metrics.damages_after(store, &mut seen);
        assert_eq!(
            (told.len(), told[0].block, seen),
            (DAMAGES_KEPT, 2000 - 1024, 2002)
        );
    }

    #[test]
    fn quantiles_lie_within_a_bucket_of_the_truth() {
        let histogram = Histogram::default();
        assert_eq!(histogram.snapshot().quantile_ns(0.5), None);
        for us in 1..=1000 {
            histogram.record(Duration::from_micros(us));
        }
        let snapshot = histogram.snapshot();
        assert_eq!(snapshot.count(), 1000);
        assert_eq!(snapshot.sum_ns, 500_500_000);
        for (q, us) in [(0.5, 500.0), (0.99, 990.0), (0.01, 10.0)] {
            let got = snapshot.quantile_ns(q).expect("counted") as f64 / 1000.0;
            assert!((got / us - 1.0).abs() < 0.1, "{q}: {got} for {us}");
        }
        assert_eq!(snapshot.since(&snapshot).count(), 0);
    }
}
