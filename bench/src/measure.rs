//! Runs the cells, interleaved, and sums them up.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::ashlar::Ashlar;
use crate::fio::{self, Job, Target};
use crate::procfs;
use crate::rows::{Contender, Group, Row};
use crate::servers::Running;

/// How long and how often.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Effort {
    pub(crate) rounds: u32,
    pub(crate) run_seconds: u64,
    /// The same load before each measured run, not counted.
    pub(crate) warm_up_seconds: u64,
    pub(crate) size_bytes: u64,
}

/// One contender's run in one row.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sample {
    pub(crate) row: &'static str,
    pub(crate) contender: Contender,
    pub(crate) round: u32,
    pub(crate) operations: u64,
    pub(crate) seconds: f64,
    #[serde(flatten)]
    pub(crate) figures: Figures,
    /// Processor time in cores that neither the server nor fio's job used: the kernel's own threads, interrupts,
    /// and whatever else ran on the machine.
    pub(crate) other_cores: f64,
    /// How many times Ashlar's tail was filled by the run: below 4, what was measured is the tail rather than the
    /// store.
    pub(crate) tails_written: Option<f64>,
}

/// What a cell of the table shows; of several rounds, each is the median.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Figures {
    pub(crate) operations_per_second: f64,
    pub(crate) mean_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) flush_mean_us: Option<f64>,
    pub(crate) flush_p99_us: Option<f64>,
    /// Processor time of the server an operation. None for the bare file, which has none.
    pub(crate) server_cpu_us: Option<f64>,
    /// Processor time of the whole machine an operation, fio's included: what kernel threads do for a server that
    /// writes through the page cache shows here only.
    pub(crate) machine_cpu_us: f64,
    /// Bytes that Ashlar's stores wrote, up to and with a flush after the run, over the bytes it was told to write,
    /// from its own metrics.
    pub(crate) write_amplification: Option<f64>,
    /// The same as the kernel counts it (`write_bytes` of proc(5)), for every server: what the first must agree with
    /// where the tail is not on the same disk.
    pub(crate) sent_amplification: Option<f64>,
}

/// Everyone who is being measured.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) running: BTreeMap<Contender, Running>,
    pub(crate) ashlar: Option<Ashlar>,
}

impl Field {
    /// Runs one cell once.
    fn sample(
        &mut self,
        row: &'static Row,
        contender: Contender,
        round: u32,
        effort: &Effort,
        scratch: &Path,
    ) -> Result<Sample> {
        let running = self.running.get_mut(&contender).context("not running")?;
        if let Some(process) = &mut running.process {
            ensure!(process.is_alive(), "the server has ended");
        }
        if row.is_read() {
            drop_page_cache(&running.target)?;
        }
        let target = running.target.clone();
        let mut job = Job {
            row,
            target: &target,
            size_bytes: effort.size_bytes,
            duration: Duration::from_secs(effort.warm_up_seconds),
            // Two seeds a round: the warm-up must not touch just the blocks that are measured.
            seed: 2 * round,
        };
        if effort.warm_up_seconds > 0 {
            fio::run(&job, scratch).context("warm-up")?;
        }
        job.duration = Duration::from_secs(effort.run_seconds);
        job.seed += 1;

        let pid = running.process.as_ref().map(|process| process.pid);
        let server_cpu = |pid: Option<u32>| pid.map(procfs::tree_cpu_us).transpose();
        let stored_before = self.stored(contender)?;
        let sent_before = pid.and_then(procfs::storage_write_bytes);
        let server_before = server_cpu(pid)?;
        let machine_before = procfs::machine_busy_us()?;
        let began = Instant::now();
        let outcome = fio::run(&job, scratch)?;
        let wall_us = began.elapsed().as_micros() as f64;
        let server_us = server_cpu(pid)?
            .zip(server_before)
            .map(|(after, before)| (after - before) as f64);
        let machine_us = (procfs::machine_busy_us()? - machine_before) as f64;

        let mut write_amplification = None;
        let mut sent_amplification = None;
        if !row.is_read() {
            self.running
                .get(&contender)
                .context("not running")?
                .settle()?;
            let told = (outcome.operations * row.block_bytes) as f64;
            let stored = self.stored(contender)?.zip(stored_before);
            write_amplification = stored.map(|(after, before)| (after - before) / told);
            let sent = pid.and_then(procfs::storage_write_bytes).zip(sent_before);
            sent_amplification = sent.map(|(after, before)| (after - before) as f64 / told);
        }
        let tail = match &self.ashlar {
            Some(ashlar) if contender == Contender::Ashlar && !row.is_read() => {
                ashlar.tail_bytes()?
            }
            _ => None,
        };
        let operations = outcome.operations as f64;
        let flushed = row.group == Group::SyncedWrites && outcome.flushes > 0;
        Ok(Sample {
            row: row.name,
            contender,
            round,
            operations: outcome.operations,
            seconds: outcome.seconds,
            other_cores: (machine_us - server_us.unwrap_or(0.0) - outcome.client_cpu_us).max(0.0)
                / wall_us,
            tails_written: tail.map(|tail| operations * row.block_bytes as f64 / tail),
            figures: Figures {
                operations_per_second: operations / outcome.seconds,
                mean_us: outcome.mean_us,
                p99_us: outcome.p99_us,
                flush_mean_us: flushed.then_some(outcome.flush_mean_us),
                flush_p99_us: flushed.then_some(outcome.flush_p99_us),
                server_cpu_us: server_us.map(|us| us / operations),
                machine_cpu_us: machine_us / operations,
                write_amplification,
                sent_amplification,
            },
        })
    }

    fn stored(&self, contender: Contender) -> Result<Option<f64>> {
        match &self.ashlar {
            Some(ashlar) if contender == Contender::Ashlar => ashlar.stored_bytes(),
            _ => Ok(None),
        }
    }

    /// Runs all rounds of a row, its contenders in turn, each round beginning with another one. Returns what was
    /// measured and what failed.
    pub(crate) fn run_row(
        &mut self,
        row: &'static Row,
        effort: &Effort,
        scratch: &Path,
        mut said: impl FnMut(&Sample),
    ) -> (Vec<Sample>, Vec<String>) {
        let present: Vec<Contender> = row
            .contenders()
            .iter()
            .copied()
            .filter(|contender| self.running.contains_key(contender))
            .collect();
        let mut samples = Vec::new();
        let mut failures = Vec::new();
        for round in 0..effort.rounds {
            for turn in 0..present.len() {
                let contender = present[(turn + round as usize) % present.len()];
                match self.sample(row, contender, round, effort, scratch) {
                    Ok(sample) => {
                        said(&sample);
                        samples.push(sample);
                    }
                    Err(error) => {
                        failures.push(format!("{}, {}: {error:#}", row.name, contender.title()))
                    }
                }
            }
        }
        (samples, failures)
    }
}

/// Empties the page cache, so that a read goes to the device for everyone. Without the right to do so, only what the
/// cache holds of the target's file can be given up.
fn drop_page_cache(target: &Target) -> Result<()> {
    if fs::write("/proc/sys/vm/drop_caches", "3").is_ok() {
        return Ok(());
    }
    if let Target::File(path) = target {
        let file = fs::File::open(path)?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}

/// The medians of each contender's rounds.
pub(crate) fn summarise(samples: &[Sample]) -> BTreeMap<Contender, Figures> {
    let mut by_contender: BTreeMap<Contender, Vec<Figures>> = BTreeMap::new();
    for sample in samples {
        by_contender
            .entry(sample.contender)
            .or_default()
            .push(sample.figures);
    }
    by_contender
        .into_iter()
        .map(|(contender, rounds)| (contender, middle(&rounds)))
        .collect()
}

fn middle(rounds: &[Figures]) -> Figures {
    let of = |pick: fn(&Figures) -> Option<f64>| median(rounds.iter().filter_map(pick).collect());
    Figures {
        operations_per_second: of(|figures| Some(figures.operations_per_second))
            .unwrap_or_default(),
        mean_us: of(|figures| Some(figures.mean_us)).unwrap_or_default(),
        p99_us: of(|figures| Some(figures.p99_us)).unwrap_or_default(),
        flush_mean_us: of(|figures| figures.flush_mean_us),
        flush_p99_us: of(|figures| figures.flush_p99_us),
        server_cpu_us: of(|figures| figures.server_cpu_us),
        machine_cpu_us: of(|figures| Some(figures.machine_cpu_us)).unwrap_or_default(),
        write_amplification: of(|figures| figures.write_amplification),
        sent_amplification: of(|figures| figures.sent_amplification),
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// How Ashlar stands in one row.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Standing {
    pub(crate) best_peer: Contender,
    /// Ashlar's operations a second over the best peer's.
    pub(crate) ratio: f64,
    /// Over the bare file's.
    pub(crate) bare_ratio: Option<f64>,
    /// Ashlar's processor time an operation over that of the peer which spends least.
    pub(crate) cpu_ratio: Option<f64>,
    pub(crate) meets_speed: bool,
    pub(crate) meets_cpu: bool,
}

/// A row is won at this many times the best peer's operations a second...
const RATIO_WANTED: f64 = 1.3;
/// ...or, where the device is the limit, at this part of what the bare file gives...
const BARE_RATIO_WANTED: f64 = 0.9;
/// ...with at most this part of the processor time of the peer that spends least.
const CPU_RATIO_WANTED: f64 = 0.8;

/// Compares Ashlar with the peers of a row; None when either side is missing.
pub(crate) fn standing(row: &Row, figures: &BTreeMap<Contender, Figures>) -> Option<Standing> {
    let ashlar = figures.get(&Contender::Ashlar)?;
    let peers = || {
        figures
            .iter()
            .filter(|(contender, _)| !matches!(contender, Contender::Ashlar | Contender::Bare))
    };
    let speed = |figures: &Figures| figures.operations_per_second;
    let (&best_peer, best) =
        peers().max_by(|(_, one), (_, other)| speed(one).total_cmp(&speed(other)))?;
    let least_cpu = peers()
        .filter_map(|(_, figures)| figures.server_cpu_us)
        .min_by(f64::total_cmp);
    let ratio = speed(ashlar) / speed(best);
    let bare_ratio = figures
        .get(&Contender::Bare)
        .map(|bare| speed(ashlar) / speed(bare));
    let cpu_ratio = ashlar
        .server_cpu_us
        .zip(least_cpu)
        .map(|(ours, theirs)| ours / theirs);
    let beats_bare = !row.must_beat_bare || bare_ratio.is_none_or(|ratio| ratio > 1.0);
    Some(Standing {
        best_peer,
        ratio,
        bare_ratio,
        cpu_ratio,
        meets_speed: beats_bare
            && (ratio >= RATIO_WANTED
                || bare_ratio.is_some_and(|ratio| ratio >= BARE_RATIO_WANTED)),
        meets_cpu: cpu_ratio.is_some_and(|ratio| ratio <= CPU_RATIO_WANTED),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::ROWS;

    fn at(operations_per_second: f64, server_cpu_us: Option<f64>) -> Figures {
        Figures {
            operations_per_second,
            server_cpu_us,
            ..Figures::default()
        }
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn the_fastest_and_the_leanest_peer_may_differ() {
        let figures = BTreeMap::from([
            (Contender::Ashlar, at(130.0, Some(4.0))),
            (Contender::Nbdkit, at(100.0, Some(10.0))),
            (Contender::NbdServer, at(50.0, Some(5.0))),
        ]);
        let standing = standing(&ROWS[4], &figures).unwrap();
        assert_eq!(standing.best_peer, Contender::Nbdkit);
        assert_eq!(standing.ratio, 1.3);
        assert_eq!(standing.cpu_ratio, Some(0.8));
        assert!(standing.meets_speed && standing.meets_cpu);
    }

    #[test]
    fn the_bare_file_excuses_a_row_bound_by_the_device_but_not_one_that_must_beat_it() {
        let figures = BTreeMap::from([
            (Contender::Ashlar, at(95.0, Some(4.0))),
            (Contender::QemuNone, at(94.0, Some(10.0))),
            (Contender::Bare, at(100.0, None)),
        ]);
        assert!(standing(&ROWS[0], &figures).unwrap().meets_speed);
        assert!(ROWS[6].must_beat_bare && !standing(&ROWS[6], &figures).unwrap().meets_speed);
    }
}
