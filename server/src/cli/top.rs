//! `ashlar top`: rates and latencies, from the difference of two samples of the daemon's counters.

use std::{
    collections::HashMap,
    io::{self, IsTerminal, Write},
};

use ashlar_proto::admin::{
    Command, CommandStats, Histogram, StatsSample, VolumeStats, WatchStatsRequest,
};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tonic::Streaming;

use super::{
    args::{Format, TopArgs},
    connect::Daemon,
    error::{CliError, Exit},
    output,
    screen::Screen,
    size::human,
    view,
};

pub(super) async fn run(
    daemon: &mut Daemon,
    format: Format,
    args: TopArgs,
) -> Result<(), CliError> {
    if !(0.1..=60.0).contains(&args.interval) {
        return Err(CliError::new(
            Exit::Usage,
            "--interval takes 0.1 to 60 seconds",
        ));
    }
    let request = WatchStatsRequest {
        interval_ms: (args.interval * 1000.0).round() as u32,
    };
    let mut samples = daemon.client.watch_stats(request).await?.into_inner();
    let mut before = next(&mut samples).await?;
    let screen = (format == Format::Table && !args.once && io::stdout().is_terminal())
        .then(Screen::enter)
        .transpose()?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    loop {
        let now = tokio::select! {
            sample = next(&mut samples) => sample?,
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
        };
        let report = Report::between(&before, &now);
        match (&screen, format) {
            (Some(screen), _) => screen.draw(&format!(
                "ashlar top, {}, Ctrl-C ends it\n\n{}",
                daemon.address,
                report.table()
            ))?,
            (None, Format::Table) => io::stdout().write_all(report.table().as_bytes())?,
            (None, _) => output::print_streamed(format, &report)?,
        }
        if args.once {
            return Ok(());
        }
        before = now;
    }
}

async fn next(samples: &mut Streaming<StatsSample>) -> Result<StatsSample, CliError> {
    samples.message().await?.ok_or_else(|| {
        CliError::new(
            Exit::Unreachable,
            "the daemon ended the statistics: it is stopping",
        )
    })
}

/// Everything that happened between two samples, as rates.
#[derive(Serialize)]
struct Report {
    at: String,
    uptime_ms: u64,
    /// Length of what is reported on.
    interval_ms: u64,
    /// Processor time used per time: 1.0 is one core busy.
    cores_busy: f64,
    resident_bytes: u64,
    volumes: Vec<VolumeRates>,
    stores: Vec<StoreRates>,
}

#[derive(Serialize)]
struct VolumeRates {
    volume_id: String,
    name: String,
    connections: u32,
    inflight_requests: u32,
    read: Rates,
    write: Rates,
    flush: Rates,
    /// Trim and write-zeroes together.
    zero: Rates,
    errors_per_second: f64,
}

/// Of one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct Rates {
    requests_per_second: f64,
    bytes_per_second: f64,
    /// Absent when there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    mean_latency_us: Option<f64>,
    /// Upper bound of the histogram bucket that holds the 99th percentile; absent when there was none or when it is
    /// above the histogram's last bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    p99_latency_us: Option<f64>,
}

#[derive(Serialize)]
struct StoreRates {
    id: String,
    path: String,
    state: &'static str,
    live_bytes: u64,
    available_bytes: u64,
    tail_used_bytes: u64,
    accepted_bytes_per_second: f64,
    device_written_bytes_per_second: f64,
    device_read_bytes_per_second: f64,
    cleaned_bytes_per_second: f64,
    syncs_per_second: f64,
    /// Of this interval; absent when nothing was accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    write_amplification: Option<f64>,
}

impl Report {
    fn between(before: &StatsSample, now: &StatsSample) -> Report {
        let interval_ms = now.uptime_ms.saturating_sub(before.uptime_ms);
        let seconds = (interval_ms as f64 / 1000.0).max(0.001);
        let old_volumes: HashMap<&str, &VolumeStats> = before
            .volumes
            .iter()
            .map(|v| (v.volume_id.as_str(), v))
            .collect();
        let old_stores: HashMap<&str, view::StoreCounters> = before
            .stores
            .iter()
            .map(|store| (store.id.as_str(), store.counters.unwrap_or_default().into()))
            .collect();
        Report {
            at: view::time(now.at_unix_ms),
            uptime_ms: now.uptime_ms,
            interval_ms,
            cores_busy: rounded(
                now.cpu_time_us.saturating_sub(before.cpu_time_us) as f64 / 1e6 / seconds,
            ),
            resident_bytes: now.resident_bytes,
            volumes: now
                .volumes
                .iter()
                .map(|volume| {
                    VolumeRates::between(
                        old_volumes.get(volume.volume_id.as_str()).copied(),
                        volume,
                        seconds,
                    )
                })
                .collect(),
            stores: now
                .stores
                .iter()
                .map(|store| {
                    let old = old_stores
                        .get(store.id.as_str())
                        .copied()
                        .unwrap_or_default();
                    StoreRates::between(old, store.clone().into(), seconds)
                })
                .collect(),
        }
    }

    fn table(&self) -> String {
        let mut text = format!(
            "{}  up {}  {:.2} cores busy  {} resident\n\n",
            self.at,
            view::duration(self.uptime_ms),
            self.cores_busy,
            human(self.resident_bytes)
        );
        let header = [
            "VOLUME", "CONN", "INFLIGHT", "READ/s", "READ", "MEAN", "P99", "WRITE/s", "WRITE",
            "MEAN", "P99", "FLUSH/s", "MEAN", "ZERO/s", "ERR/s",
        ];
        let rows = self.volumes.iter().map(|volume| {
            vec![
                volume.name.clone(),
                volume.connections.to_string(),
                volume.inflight_requests.to_string(),
                rate(volume.read.requests_per_second),
                byte_rate(volume.read.bytes_per_second),
                latency(volume.read.mean_latency_us),
                latency(volume.read.p99_latency_us),
                rate(volume.write.requests_per_second),
                byte_rate(volume.write.bytes_per_second),
                latency(volume.write.mean_latency_us),
                latency(volume.write.p99_latency_us),
                rate(volume.flush.requests_per_second),
                latency(volume.flush.mean_latency_us),
                rate(volume.zero.requests_per_second),
                rate(volume.errors_per_second),
            ]
        });
        text += &output::columns(&header, &(1..header.len()).collect::<Vec<_>>(), rows);
        let header = [
            "STORE",
            "STATE",
            "LIVE",
            "AVAILABLE",
            "TAIL",
            "ACCEPTED",
            "WRITTEN",
            "READ",
            "CLEANED",
            "SYNC/s",
            "WRITE AMP",
        ];
        let rows = self.stores.iter().map(|store| {
            vec![
                store.path.clone(),
                store.state.to_owned(),
                human(store.live_bytes),
                human(store.available_bytes),
                human(store.tail_used_bytes),
                byte_rate(store.accepted_bytes_per_second),
                byte_rate(store.device_written_bytes_per_second),
                byte_rate(store.device_read_bytes_per_second),
                byte_rate(store.cleaned_bytes_per_second),
                rate(store.syncs_per_second),
                store
                    .write_amplification
                    .map_or("-".into(), |x| format!("{x:.2}")),
            ]
        });
        text.push('\n');
        text += &output::columns(&header, &(2..header.len()).collect::<Vec<_>>(), rows);
        text
    }
}

impl VolumeRates {
    fn between(before: Option<&VolumeStats>, now: &VolumeStats, seconds: f64) -> VolumeRates {
        let of = |commands: &[Command]| {
            let mut sum = Delta::default();
            for command in commands {
                sum.add(before.and_then(|b| find(b, *command)), find(now, *command));
            }
            sum
        };
        let all: Vec<Command> = now.commands.iter().map(CommandStats::command).collect();
        VolumeRates {
            volume_id: now.volume_id.clone(),
            name: now.name.clone(),
            connections: now.connections,
            inflight_requests: now.inflight_requests,
            read: of(&[Command::Read]).rates(seconds),
            write: of(&[Command::Write]).rates(seconds),
            flush: of(&[Command::Flush]).rates(seconds),
            zero: of(&[Command::Trim, Command::WriteZeroes]).rates(seconds),
            errors_per_second: rounded(of(&all).errors as f64 / seconds),
        }
    }
}

fn find(stats: &VolumeStats, command: Command) -> Option<&CommandStats> {
    stats
        .commands
        .iter()
        .find(|stats| stats.command() == command)
}

/// What one or more commands counted between two samples.
#[derive(Default)]
struct Delta {
    requests: u64,
    errors: u64,
    bytes: u64,
    latency_sum_ns: u64,
    bounds_ns: Vec<u64>,
    counts: Vec<u64>,
}

impl Delta {
    fn add(&mut self, before: Option<&CommandStats>, now: Option<&CommandStats>) {
        let Some(now) = now else { return };
        // Counters go down only when the volume was closed and opened again: then all of `now` is new.
        let before = before.filter(|before| before.requests <= now.requests);
        let since =
            |field: fn(&CommandStats) -> u64| field(now).saturating_sub(before.map_or(0, field));
        self.requests += since(|stats| stats.requests);
        self.errors += since(|stats| stats.errors);
        self.bytes += since(|stats| stats.bytes);
        self.latency_sum_ns += since(|stats| stats.latency_sum_ns);
        if let Some(latency) = &now.latency {
            self.add_histogram(before.and_then(|before| before.latency.as_ref()), latency);
        }
    }

    fn add_histogram(&mut self, before: Option<&Histogram>, now: &Histogram) {
        if self.bounds_ns.is_empty() {
            self.bounds_ns.clone_from(&now.bounds_ns);
            self.counts = vec![0; now.counts.len()];
        } else if self.bounds_ns != now.bounds_ns {
            return;
        }
        let old = |index: usize| {
            before
                .and_then(|b| b.counts.get(index))
                .copied()
                .unwrap_or(0)
        };
        for (index, (sum, count)) in self.counts.iter_mut().zip(&now.counts).enumerate() {
            *sum += count.saturating_sub(old(index));
        }
    }

    fn rates(&self, seconds: f64) -> Rates {
        Rates {
            requests_per_second: rounded(self.requests as f64 / seconds),
            bytes_per_second: rounded(self.bytes as f64 / seconds),
            mean_latency_us: (self.requests > 0)
                .then(|| rounded(self.latency_sum_ns as f64 / self.requests as f64 / 1000.0)),
            p99_latency_us: self.percentile_ns(99).map(|ns| ns as f64 / 1000.0),
        }
    }

    /// The smallest bound below which `percent` of the observations lie.
    fn percentile_ns(&self, percent: u64) -> Option<u64> {
        let total: u64 = self.counts.iter().sum();
        let needed = (total * percent).div_ceil(100);
        let mut seen = 0;
        for (bound, count) in self.bounds_ns.iter().zip(&self.counts) {
            seen += count;
            if total > 0 && seen >= needed {
                return Some(*bound);
            }
        }
        None
    }
}

impl StoreRates {
    fn between(before: view::StoreCounters, store: view::Store, seconds: f64) -> StoreRates {
        let now = store.counters;
        let since =
            |field: fn(&view::StoreCounters) -> u64| field(&now).saturating_sub(field(&before));
        let (accepted, written) = (
            since(|c| c.accepted_bytes),
            since(|c| c.device_written_bytes),
        );
        StoreRates {
            id: store.id,
            path: store.path,
            state: store.state,
            live_bytes: store.live_bytes,
            available_bytes: store.available_bytes,
            tail_used_bytes: store.tail_used_bytes,
            accepted_bytes_per_second: rounded(accepted as f64 / seconds),
            device_written_bytes_per_second: rounded(written as f64 / seconds),
            device_read_bytes_per_second: rounded(since(|c| c.device_read_bytes) as f64 / seconds),
            cleaned_bytes_per_second: rounded(since(|c| c.cleaned_bytes) as f64 / seconds),
            syncs_per_second: rounded(since(|c| c.syncs) as f64 / seconds),
            write_amplification: view::amplification(written, accepted),
        }
    }
}

/// To three decimal places: more would be noise in what programs read.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn rate(per_second: f64) -> String {
    format!("{per_second:.0}")
}

fn byte_rate(per_second: f64) -> String {
    format!("{}/s", human(per_second.round() as u64))
}

fn latency(us: Option<f64>) -> String {
    match us {
        None => "-".into(),
        Some(us) if us < 1000.0 => format!("{us:.0} us"),
        Some(us) if us < 1_000_000.0 => format!("{:.1} ms", us / 1000.0),
        Some(us) => format!("{:.1} s", us / 1_000_000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads(requests: u64, bytes: u64, latency_sum_ns: u64, counts: [u64; 3]) -> CommandStats {
        CommandStats {
            command: Command::Read.into(),
            requests,
            errors: 0,
            bytes,
            latency_sum_ns,
            latency: Some(Histogram {
                bounds_ns: vec![1_000, 10_000],
                counts: counts.to_vec(),
            }),
        }
    }

    fn sample(uptime_ms: u64, commands: Vec<CommandStats>) -> StatsSample {
        let volume = VolumeStats {
            volume_id: "v".into(),
            name: "data".into(),
            commands,
            ..Default::default()
        };
        StatsSample {
            uptime_ms,
            cpu_time_us: uptime_ms * 500,
            volumes: vec![volume],
            ..Default::default()
        }
    }

    #[test]
    fn rates_are_differences_over_time() {
        let before = sample(1_000, vec![reads(100, 4096, 1_000_000, [100, 0, 0])]);
        let now = sample(3_000, vec![reads(300, 4096 * 201, 3_000_000, [297, 3, 0])]);
        let report = Report::between(&before, &now);
        assert_eq!(report.interval_ms, 2_000);
        assert!((report.cores_busy - 0.5).abs() < 1e-9);
        let expected = Rates {
            requests_per_second: 100.0,
            bytes_per_second: 409_600.0,
            mean_latency_us: Some(10.0),
            p99_latency_us: Some(10.0),
        };
        assert_eq!(report.volumes[0].read, expected);
        assert_eq!(report.volumes[0].write, Rates::default());
    }

    #[test]
    fn a_volume_that_appears_or_is_reopened_starts_from_zero() {
        let now = sample(2_000, vec![reads(10, 10, 10, [10, 0, 0])]);
        for before in [
            StatsSample {
                uptime_ms: 1_000,
                ..Default::default()
            },
            sample(1_000, vec![reads(99, 99, 99, [99, 0, 0])]),
        ] {
            let report = Report::between(&before, &now);
            assert_eq!(report.volumes[0].read.requests_per_second, 10.0);
            assert_eq!(report.volumes[0].read.p99_latency_us, Some(1.0));
        }
    }

    #[test]
    fn a_percentile_above_the_last_bound_is_not_known() {
        let before = StatsSample {
            uptime_ms: 0,
            ..Default::default()
        };
        let report = Report::between(&before, &sample(1_000, vec![reads(2, 0, 0, [1, 0, 1])]));
        assert_eq!(report.volumes[0].read.p99_latency_us, None);
    }

    #[test]
    fn the_table_has_a_line_for_each() {
        let now = sample(
            1_000,
            vec![reads(1500, 4096 * 1500, 1_500_000_000, [1500, 0, 0])],
        );
        let table = Report::between(&StatsSample::default(), &now).table();
        let line = table
            .lines()
            .find(|line| line.starts_with("data"))
            .expect("the volume's line");
        assert!(
            line.contains("1500") && line.contains("5.9 MiB/s") && line.contains("1.0 ms"),
            "{line}"
        );
    }
}
