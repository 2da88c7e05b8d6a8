//! Runs the cells, interleaved, and sums them up.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::ashlar::Ashlar;
use crate::cluster::{self, Cluster};
use crate::fio::{self, Job, Target};
use crate::http::Http;
use crate::procfs;
use crate::rows::{Comparison, Contender, Group, Row};
use crate::servers::{Running, ServerProcess};

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
    /// Processor time of the server, or of all servers together, an operation. None for the bare file, which has none.
    pub(crate) server_cpu_us: Option<f64>,
    /// Processor time of the whole machine an operation, fio's included: what kernel threads do for a server that
    /// writes through the page cache shows here only.
    pub(crate) machine_cpu_us: f64,
    /// Bytes that Ashlar's stores wrote, up to and with a flush after the run, over the bytes it was told to write to
    /// each copy, from its own metrics.
    pub(crate) write_amplification: Option<f64>,
    /// The same as the kernel counts it (`write_bytes` of proc(5)), for every server: what the first must agree with
    /// where the tail is not on the same disk.
    pub(crate) sent_amplification: Option<f64>,
}

/// The daemons of a contender that is ours, and how many copies they keep of each block.
#[derive(Clone, Debug)]
pub(crate) struct Metered {
    pub(crate) daemons: Vec<Http>,
    pub(crate) copies: u32,
    /// The node that serves the volume, when it has more than one copy.
    pub(crate) head: Option<Ashlar>,
}

impl Metered {
    /// The sum over all daemons, of one copy; None while one does not say.
    fn of_one_copy(&self, read: fn(&Http) -> Result<Option<f64>>) -> Result<Option<f64>> {
        let mut sum = 0.0;
        for daemon in &self.daemons {
            let Some(value) = read(daemon)? else {
                return Ok(None);
            };
            sum += value;
        }
        Ok(Some(sum / f64::from(self.copies)))
    }
}

/// Everyone who is being measured. What comes first ends first.
#[derive(Debug, Default)]
pub(crate) struct Field {
    pub(crate) running: BTreeMap<Contender, Running>,
    pub(crate) ours: BTreeMap<Contender, Metered>,
    /// The nodes of [`Contender::Cluster`], where it runs.
    pub(crate) cluster: Option<Cluster>,
    /// Servers of several contenders, and what none is measured by: Ceph's OSDs, monitor and manager.
    pub(crate) beside: Vec<ServerProcess>,
}

impl Field {
    /// Ends everyone but one.
    pub(crate) fn leave_only(&mut self, contender: Contender) {
        self.running.retain(|other, _| *other == contender);
        self.ours.retain(|other, _| *other == contender);
        self.beside.clear();
    }

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
        ensure!(running.is_alive(), "a server has ended");
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

        let head = self.ours.get(&contender).and_then(|ours| ours.head.clone());
        let epoch = head.as_ref().map(cluster::epoch_in_sync).transpose()?;
        let pids = running.pids();
        let server_cpu = |pids: &[u32]| -> Result<Option<u64>> {
            let times = pids.iter().map(|&pid| procfs::tree_cpu_us(pid));
            let sum: u64 = times.sum::<Result<u64>>()?;
            Ok((!pids.is_empty()).then_some(sum))
        };
        let sent = |pids: &[u32]| -> Option<u64> {
            let sent = pids.iter().map(|&pid| procfs::storage_write_bytes(pid));
            sent.sum::<Option<u64>>().filter(|_| !pids.is_empty())
        };
        let stored_before = self.metered(contender, Http::stored_bytes)?;
        let sent_before = sent(&pids);
        let server_before = server_cpu(&pids)?;
        let machine_before = procfs::machine_busy_us()?;
        let began = Instant::now();
        let outcome = fio::run(&job, scratch)?;
        let wall_us = began.elapsed().as_micros() as f64;
        let server_us = server_cpu(&pids)?
            .zip(server_before)
            .map(|(after, before)| (after - before) as f64);
        let machine_us = (procfs::machine_busy_us()? - machine_before) as f64;

        ensure!(
            head.as_ref().map(cluster::epoch_in_sync).transpose()? == epoch,
            "a copy was out of sync for a time: this was no write to all copies"
        );

        let mut write_amplification = None;
        let mut sent_amplification = None;
        if !row.is_read() {
            self.running
                .get(&contender)
                .context("not running")?
                .settle()?;
            let told = (outcome.operations * row.block_bytes) as f64;
            let stored = self
                .metered(contender, Http::stored_bytes)?
                .zip(stored_before);
            write_amplification = stored.map(|(after, before)| (after - before) / told);
            let sent = sent(&pids).zip(sent_before);
            sent_amplification = sent.map(|(after, before)| (after - before) as f64 / told);
        }
        let tail = if row.is_read() {
            None
        } else {
            self.metered(contender, Http::tail_bytes)?
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

    /// What our daemons count, for one copy; None for everyone else.
    fn metered(
        &self,
        contender: Contender,
        read: fn(&Http) -> Result<Option<f64>>,
    ) -> Result<Option<f64>> {
        match self.ours.get(&contender) {
            Some(metered) => metered.of_one_copy(read),
            None => Ok(None),
        }
    }

    /// Runs all rounds of a row, its contenders in turn, each round beginning with another one. Returns what was
    /// measured and what failed.
    pub(crate) fn run_row(
        &mut self,
        row: &'static Row,
        comparison: Comparison,
        effort: &Effort,
        scratch: &Path,
        mut said: impl FnMut(&Sample),
    ) -> (Vec<Sample>, Vec<String>) {
        let present: Vec<Contender> = comparison
            .contenders(row)
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

/// How long the kernel may take with what it still does for the data that was written.
const QUIET_LIMIT: Duration = Duration::from_secs(60);
/// How long the machine has to be quiet, and the part of a processor that is.
const QUIET_FOR: Duration = Duration::from_secs(1);
const QUIET: f64 = 0.1;

/// Waits until the machine does nothing: everyone's data was written a moment ago, and who is measured first would pay for it.
/// False: it is busy all the same.
pub(crate) fn await_quiet() -> Result<bool> {
    rustix::fs::sync();
    let began = Instant::now();
    while began.elapsed() < QUIET_LIMIT {
        let before = procfs::machine_busy_us()?;
        thread::sleep(QUIET_FOR);
        let busy_us = (procfs::machine_busy_us()? - before) as f64;
        if busy_us < QUIET * QUIET_FOR.as_micros() as f64 {
            return Ok(true);
        }
    }
    Ok(false)
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

pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
