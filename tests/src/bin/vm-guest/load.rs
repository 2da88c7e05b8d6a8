//! A write-and-verify load on a mounted file system, whose result can be judged after any end of it.
//!
//! Every worker writes versions 1, 2, 3, … to blocks of its own file. Which block a version goes to follows from the seed alone,
//! so a later run can tell from the seed and the last synced version what each block may hold: the newest version that was
//! synced, or a newer one of the same block.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use rustix::fs::{Advice, fadvise};
use serde::{Deserialize, Serialize};

use ashlar_tests::pattern::{self, BLOCK, Content};
use ashlar_tests::seed::Rng;
use ashlar_tests::wait;

use crate::{option, wanted};

/// Versions between two syncs.
const SYNC_EVERY: u64 = 16;
/// Versions between two renames of a small file, which is what a journal is for.
const MARK_EVERY: u64 = 64;
/// How often the progress is told.
const TELL_EVERY: Duration = Duration::from_millis(50);

/// What the load tells while it runs, as JSON in the file of `--progress`.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Progress {
    /// Writes, reads and syncs that were answered.
    operations: u64,
    /// Longest time one of them took.
    slowest_ms: u64,
    /// Per worker, the newest version that a sync covered.
    synced: Vec<u64>,
}

#[derive(Default)]
struct Counters {
    operations: AtomicU64,
    slowest_ms: AtomicU64,
    synced: AtomicU64,
}

#[derive(Clone, Copy)]
struct Shape {
    seed: u64,
    files: u64,
    blocks: u64,
}

impl Shape {
    fn parse(words: &[&str]) -> anyhow::Result<Shape> {
        Ok(Shape {
            seed: wanted(words, "seed")?,
            files: wanted(words, "files")?,
            blocks: wanted(words, "blocks")?,
        })
    }

    /// The block that `version` of `file` goes to.
    fn block_of(self, file: u64, version: u64) -> u64 {
        let stream = self.seed ^ file.rotate_left(40) ^ version.wrapping_mul(0x2545_f491_4f6c_dd1d);
        Rng::new(stream).below(self.blocks)
    }
}

fn data_path(folder: &Path, file: u64) -> PathBuf {
    folder.join(format!("data-{file}"))
}

fn mark_path(folder: &Path, file: u64) -> PathBuf {
    folder.join(format!("mark-{file}"))
}

/// Memory that O_DIRECT takes.
struct Aligned {
    memory: Vec<u8>,
    at: usize,
}

impl Aligned {
    fn new() -> Aligned {
        let memory = vec![0; 2 * BLOCK];
        let at = memory.as_ptr().align_offset(BLOCK);
        Aligned { memory, at }
    }

    fn block(&mut self) -> &mut [u8] {
        &mut self.memory[self.at..self.at + BLOCK]
    }
}

/// Runs until the file of `--stop` appears.
pub(super) fn run(words: &[&str]) -> anyhow::Result<()> {
    let folder = PathBuf::from(option(words, "dir").context("--dir is missing")?);
    let shape = Shape::parse(words)?;
    let told = PathBuf::from(option(words, "progress").context("--progress is missing")?);
    let stop_file = PathBuf::from(option(words, "stop").context("--stop is missing")?);
    let stop = AtomicBool::new(false);
    let counters: Vec<Counters> = (0..shape.files).map(|_| Counters::default()).collect();
    let tell = || -> anyhow::Result<()> {
        let progress = Progress {
            operations: counters
                .iter()
                .map(|c| c.operations.load(Ordering::Relaxed))
                .sum(),
            slowest_ms: counters
                .iter()
                .map(|c| c.slowest_ms.load(Ordering::Relaxed))
                .max()
                .unwrap_or_default(),
            synced: counters
                .iter()
                .map(|c| c.synced.load(Ordering::Relaxed))
                .collect(),
        };
        let fresh = told.with_extension("new");
        std::fs::write(&fresh, serde_json::to_vec(&progress)?)?;
        Ok(std::fs::rename(&fresh, &told)?)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..shape.files)
            .zip(&counters)
            .map(|(file, counters)| {
                let (folder, stop) = (&folder, &stop);
                scope.spawn(move || {
                    let done = work(folder, shape, file, counters, stop);
                    // One that failed ends the others, so that the failure is seen at once.
                    stop.store(true, Ordering::Relaxed);
                    done
                })
            })
            .collect();
        while !stop.load(Ordering::Relaxed) && !stop_file.exists() {
            tell()?;
            wait::pass(TELL_EVERY);
        }
        stop.store(true, Ordering::Relaxed);
        for (file, worker) in workers.into_iter().enumerate() {
            worker
                .join()
                .map_err(|_| anyhow!("worker {file} panicked"))?
                .with_context(|| format!("worker {file}"))?;
        }
        tell()
    })
}

fn timed<T>(counters: &Counters, what: impl FnOnce() -> std::io::Result<T>) -> std::io::Result<T> {
    let start = Instant::now();
    let done = what()?;
    counters.operations.fetch_add(1, Ordering::Relaxed);
    counters
        .slowest_ms
        .fetch_max(start.elapsed().as_millis() as u64, Ordering::Relaxed);
    Ok(done)
}

fn open(path: &Path, direct: bool) -> anyhow::Result<File> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(flags)
        .open(path)
        .with_context(|| path.display().to_string())
}

/// Every second worker goes around the page cache, the others through it.
fn work(
    folder: &Path,
    shape: Shape,
    file: u64,
    counters: &Counters,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    let direct = file.is_multiple_of(2);
    let data = open(&data_path(folder, file), direct)?;
    data.set_len(shape.blocks * BLOCK as u64)?;
    data.sync_all()?;
    let directory = File::open(folder)?;
    let mut memory = Aligned::new();
    let mut held = vec![0; shape.blocks as usize];
    let mut rng = Rng::new(shape.seed ^ !file);
    let mut version = 0;
    while !stop.load(Ordering::Relaxed) {
        version += 1;
        let block = shape.block_of(file, version);
        pattern::fill(memory.block(), file, block, version);
        timed(counters, || {
            data.write_all_at(memory.block(), block * BLOCK as u64)
        })
        .with_context(|| format!("writing version {version} to block {block}"))?;
        held[block as usize] = version;
        if version.is_multiple_of(SYNC_EVERY) {
            timed(counters, || data.sync_data())
                .with_context(|| format!("syncing version {version}"))?;
            counters.synced.store(version, Ordering::Relaxed);
            if !direct {
                // What is clean leaves the page cache, so that reads come from the device.
                fadvise(&data, 0, None, Advice::DontNeed)?;
            }
        }
        if version.is_multiple_of(MARK_EVERY) {
            timed(counters, || mark(folder, &directory, file, version))
                .with_context(|| format!("renaming at version {version}"))?;
        }
        if version.is_multiple_of(4) {
            let block = rng.below(shape.blocks);
            timed(counters, || {
                data.read_exact_at(memory.block(), block * BLOCK as u64)
            })
            .with_context(|| format!("reading block {block}"))?;
            let found = version_in(memory.block(), file, block)?;
            ensure!(
                found == held[block as usize],
                "block {block} holds version {found}, not {}",
                held[block as usize]
            );
        }
    }
    data.sync_all()?;
    counters.synced.store(version, Ordering::Relaxed);
    Ok(())
}

/// Replaces the worker's mark by a file that names `version`, durably, the way editors and databases do.
fn mark(folder: &Path, directory: &File, file: u64, version: u64) -> std::io::Result<()> {
    let fresh = folder.join(format!("mark-{file}.new"));
    std::fs::write(&fresh, version.to_string())?;
    File::open(&fresh)?.sync_all()?;
    std::fs::rename(&fresh, mark_path(folder, file))?;
    directory.sync_all()
}

fn version_in(block: &[u8], file: u64, number: u64) -> anyhow::Result<u64> {
    match pattern::identify(block, file, number).map_err(|why| anyhow!(why))? {
        Content::Zeros => Ok(0),
        Content::Version(version) => Ok(version),
    }
}

/// Judges what is on the file system now: everything that `--synced` says was synced is there or was overwritten by a later
/// write, and nothing else is.
pub(super) fn verify(words: &[&str]) -> anyhow::Result<()> {
    let folder = PathBuf::from(option(words, "dir").context("--dir is missing")?);
    let shape = Shape::parse(words)?;
    let synced: Vec<u64> = option(words, "synced")
        .context("--synced is missing")?
        .split(',')
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    ensure!(
        synced.len() as u64 == shape.files,
        "--synced has a number for each file"
    );
    let (mut newer, mut kept) = (0, 0);
    for (file, synced) in (0..shape.files).zip(&synced) {
        let mut floor = vec![0; shape.blocks as usize];
        for version in 1..=*synced {
            floor[shape.block_of(file, version) as usize] = version;
        }
        let data = open(&data_path(&folder, file), true)?;
        let mut memory = Aligned::new();
        for (block, floor) in (0..shape.blocks).zip(floor) {
            data.read_exact_at(memory.block(), block * BLOCK as u64)
                .with_context(|| format!("file {file}: reading block {block}"))?;
            let found =
                version_in(memory.block(), file, block).with_context(|| format!("file {file}"))?;
            ensure!(
                found >= floor,
                "file {file}: block {block} holds version {found}; version {floor} of it was synced"
            );
            ensure!(
                found == 0 || shape.block_of(file, found) == block,
                "file {file}: block {block} holds version {found}, which went elsewhere"
            );
            newer += u64::from(found > *synced);
            kept += u64::from(found != 0);
        }
        // The mark of a version follows its sync, and may have failed when nothing later was synced.
        let marked = synced.saturating_sub(1) / MARK_EVERY * MARK_EVERY;
        if marked > 0 {
            let text = std::fs::read_to_string(mark_path(&folder, file))
                .with_context(|| format!("file {file}: its mark"))?;
            let found: u64 = text
                .parse()
                .with_context(|| format!("file {file}: mark {text:?}"))?;
            ensure!(
                found >= marked,
                "file {file}: mark {found}; {marked} was synced"
            );
        }
    }
    println!("{kept} blocks hold data, {newer} of them newer than the last sync");
    Ok(())
}
