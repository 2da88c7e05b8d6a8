//! What a client notices while a fourth node joins a cluster and gets its share of the copies.
//!
//! One run of fio goes on before, meanwhile and after, so that the same client on the same machine is compared with
//! itself. Its log has every write; the 99th percentile of each second is taken, and of the seconds the median.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::cluster::{self, Cluster};
use crate::fio::Target;
use crate::http::Http;
use crate::measure::{self, Field};
use crate::rows::{Contender, Medium};
use crate::servers::{ServerProcess, end_of, poll, spawn, wait_for};

/// Writes that fio has under way.
const DEPTH: u32 = 8;
/// By how much the fullest node may hold more than the emptiest, of what the fullest holds.
const SPREAD_MAX: f64 = 0.05;
/// How many times as long a write may take meanwhile.
const RATIO_MAX: f64 = 2.0;
/// Longest wait for the load to be even.
const SPREAD_LIMIT: Duration = Duration::from_secs(300);
/// What fio takes beyond that to begin and to write its log.
const FIO_GRACE: Duration = Duration::from_secs(30);
/// How long fio writes before its writes count. The first seconds are faster: nothing of what it overwrites has to be
/// cleaned up yet.
const WARM_UP: Duration = Duration::from_secs(10);
/// Shortest time before and after that counts as undisturbed.
const CALM_MIN: Duration = Duration::from_secs(10);
/// How often the daemons are asked how they fill. A process is started for it and four pages of metrics are written;
/// asked fifty times a second, that is what the client notices.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// What fio says when it begins.
const CONNECTED: &str = "connected to NBD server";
const WINDOW_MS: u64 = 1000;

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Joining {
    pub(crate) medium: Medium,
    /// From the start of the node until the load was even.
    pub(crate) even_after_seconds: f64,
    /// How much more the fullest node held than the emptiest then, of what the fullest held.
    pub(crate) spread: f64,
    /// Before it was started and after the load was even.
    pub(crate) undisturbed_p99_us: f64,
    /// Of each second before it was started.
    pub(crate) before_p99_us_by_second: Vec<f64>,
    /// Of each second after the load was even.
    pub(crate) after_p99_us_by_second: Vec<f64>,
    /// In between.
    pub(crate) moving_p99_us: f64,
    /// Of each second of it.
    pub(crate) moving_p99_us_by_second: Vec<f64>,
}

impl Joining {
    pub(crate) fn ratio(&self) -> f64 {
        self.moving_p99_us / self.undisturbed_p99_us
    }

    pub(crate) fn meets_latency(&self) -> bool {
        self.ratio() <= RATIO_MAX
    }
}

/// Has a fourth node join the cluster of `field`, which it keeps from then on. Everyone else ends before.
pub(crate) fn measure(
    field: &mut Field,
    medium: Medium,
    size_bytes: u64,
    calm: Duration,
    scratch: &Path,
) -> Result<Joining> {
    let calm = calm.max(CALM_MIN);
    field.leave_only(Contender::Cluster);
    let cluster = field.cluster.as_mut().context("no cluster runs")?;
    let running = field.running.get_mut(&Contender::Cluster);
    let running = running.context("no cluster runs")?;
    let log = scratch.join("joining");
    let mut fio = start_fio(&running.target, size_bytes, WARM_UP + 2 * calm, &log)?;
    let is_writing = wait_for(FIO_GRACE, || {
        let said = fs::read_to_string(&log).unwrap_or_default();
        !fio.is_alive() || said.contains(CONNECTED)
    });
    ensure!(is_writing && fio.is_alive(), "fio: {}", end_of(&log));
    std::thread::sleep(WARM_UP);
    let began = unix_ms();
    rest(calm, cluster);
    let joining = unix_ms();
    running.servers.push(cluster.add()?);
    let mut spread = spread_of(cluster);
    let is_even = poll(SPREAD_LIMIT, ASK_EVERY, || {
        spread = spread_of(cluster);
        let is_even = spread.as_ref().is_ok_and(|spread| *spread <= SPREAD_MAX);
        is_even && cluster::epoch_in_sync(cluster.first()).is_ok()
    });
    let even = unix_ms();
    let spread = spread?;
    ensure!(
        is_even,
        "the fullest node still holds {:.0} % more than the emptiest",
        100.0 * spread
    );
    rest(calm, cluster);
    let ended = unix_ms();
    ensure!(fio.is_alive(), "fio: {}", end_of(&log));
    fio.interrupt();
    ensure!(
        wait_for(FIO_GRACE, || !fio.is_alive()),
        "fio does not end when it is asked to"
    );
    let path = latencies(&log);
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let writes = parse(&text);
    let before = p99s_us(&writes, began..joining);
    let moving = p99s_us(&writes, joining..even);
    let after = p99s_us(&writes, even..ended);
    let median = |p99s: &[f64]| measure::median(p99s.to_vec()).context("too short");
    Ok(Joining {
        medium,
        even_after_seconds: (even - joining) as f64 / 1e3,
        spread,
        undisturbed_p99_us: median(&[&before[..], &after[..]].concat())?,
        before_p99_us_by_second: before,
        after_p99_us_by_second: after,
        moving_p99_us: median(&moving)?,
        moving_p99_us_by_second: moving,
    })
}

/// Waits, and asks the daemons meanwhile as often as while something moves.
fn rest(time: Duration, cluster: &Cluster) {
    poll(time, ASK_EVERY, || {
        // What they say is not asked for now, but what it takes to say it is.
        let _ = spread_of(cluster);
        false
    });
}

/// How much more the fullest node holds than the emptiest, of what the fullest holds.
fn spread_of(cluster: &Cluster) -> Result<f64> {
    let held = cluster.nodes().iter().map(|node| live_bytes(&node.http));
    let held: Vec<f64> = held.collect::<Result<_>>()?;
    let most = held.iter().copied().fold(0.0, f64::max);
    let least = held.iter().copied().fold(f64::MAX, f64::min);
    Ok((most - least) / most)
}

fn live_bytes(node: &Http) -> Result<f64> {
    node.live_bytes()?
        .context("a node does not say what it holds")
}

/// The name that fio gives to the log of whole latencies of its first job.
fn latencies(log: &Path) -> String {
    format!("{}_lat.1.log", log.display())
}

/// fio without an end of its own for long enough; its log is read when it is interrupted.
fn start_fio(
    target: &Target,
    size_bytes: u64,
    calm: Duration,
    log: &Path,
) -> Result<ServerProcess> {
    let Target::Nbd(uri) = target else {
        anyhow::bail!("the cluster is not reached over NBD");
    };
    let limit = SPREAD_LIMIT + calm + FIO_GRACE;
    let mut command = Command::new("fio");
    command
        .args(["--name=joining", "--rw=randwrite", "--bs=4096"])
        .args([
            "--time_based",
            "--norandommap",
            "--thread",
            "--ioengine=nbd",
        ])
        .arg(format!("--iodepth={DEPTH}"))
        .arg(format!("--size={size_bytes}"))
        .arg(format!("--runtime={}", limit.as_secs()))
        .arg(format!("--uri={uri}"))
        .arg(format!("--write_lat_log={}", log.display()))
        .args(["--log_unix_epoch=1", "--eta=never"]);
    spawn(command, log)
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// When each write of fio's log ended, in milliseconds since 1970, and how many nanoseconds it took.
fn parse(log: &str) -> Vec<(u64, u64)> {
    let number = |text: Option<&str>| text?.trim().parse().ok();
    let write = |line: &str| {
        let mut fields = line.split(',');
        Some((number(fields.next())?, number(fields.next())?))
    };
    log.lines().filter_map(write).collect()
}

/// The 99th percentile of each whole second of this time. In one in which no write ended, one took as long.
fn p99s_us(writes: &[(u64, u64)], time: Range<u64>) -> Vec<f64> {
    let windows = (time.end - time.start) / WINDOW_MS;
    let mut windows = vec![Vec::new(); windows as usize];
    for &(at, took) in writes.iter().filter(|(at, _)| time.contains(at)) {
        if let Some(window) = windows.get_mut(((at - time.start) / WINDOW_MS) as usize) {
            window.push(took);
        }
    }
    let p99 = |mut took: Vec<u64>| {
        took.sort_unstable();
        let p99 = took.get(took.len().saturating_sub(1) * 99 / 100);
        p99.map_or(WINDOW_MS as f64 * 1e3, |p99| *p99 as f64 / 1e3)
    };
    windows.into_iter().map(p99).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_taken_of_the_seconds() {
        // Three calm seconds of a hundred writes each, with two slow writes in the second one.
        let mut log = String::new();
        for write in 0..300_u64 {
            let took = if (150..152).contains(&write) {
                9_000_000
            } else {
                1_000 + write
            };
            log += &format!("{}, {took}, 1, 4096, 0\n", 5_000 + write * 10);
        }
        let writes = parse(&log);
        assert_eq!(writes.len(), 300);
        let p99 = |time: Range<u64>| measure::median(p99s_us(&writes, time));
        assert_eq!(p99(5_000..8_000), Some(1.298));
        assert_eq!(p99(6_000..7_000), Some(9_000.0));
        assert_eq!(p99s_us(&writes, 5_000..7_000), [1.098, 9_000.0]);
        assert_eq!(p99(0..1_000), Some(1e6));
        assert_eq!(p99s_us(&writes, 5_000..6_900), [1.098]);
    }
}
