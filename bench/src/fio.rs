//! Runs fio and reads what it measured.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use crate::command::run_to_end;
use crate::rows::Row;

/// What fio is pointed at.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// An NBD URI, through fio's nbd engine: one connection.
    Nbd(String),
    /// A file, through io_uring with O_DIRECT.
    File(PathBuf),
    /// An image of a Ceph cluster, through fio's rbd engine and librbd.
    Rbd {
        /// The cluster's ceph.conf.
        config: PathBuf,
        pool: &'static str,
        image: &'static str,
    },
}

/// One run of fio.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    pub(crate) row: &'a Row,
    pub(crate) target: &'a Target,
    pub(crate) size_bytes: u64,
    pub(crate) duration: Duration,
    /// Decides the order of random blocks; the same for every contender of a round.
    pub(crate) seed: u32,
}

/// What one run of fio measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) operations: u64,
    pub(crate) seconds: f64,
    pub(crate) mean_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) flushes: u64,
    pub(crate) flush_mean_us: f64,
    pub(crate) flush_p99_us: f64,
    /// Processor time of fio's own job.
    pub(crate) client_cpu_us: f64,
}

/// What fio may take beyond its run time before it counts as hung: it connects, allocates and reports in this time.
const GRACE: Duration = Duration::from_secs(30);
/// Runs one job, with fio's files in `scratch`.
pub(crate) fn run(job: &Job<'_>, scratch: &Path) -> Result<Outcome> {
    let report = scratch.join("fio.json");
    let limit = job.duration + GRACE;
    // fio outlives this program when that is killed, and its nbd engine spins for ever when the server goes away.
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=5", &limit.as_secs().to_string(), "fio"])
        .args(arguments(job))
        .arg(format!("--output={}", report.display()));
    command.current_dir(scratch);
    if let Target::Rbd { config, .. } = job.target {
        command.env("CEPH_CONF", config);
    }
    run_to_end(command, limit + GRACE)?;
    let text = fs::read_to_string(&report).with_context(|| report.display().to_string())?;
    parse(&text, job.row)
}

fn arguments(job: &Job<'_>) -> Vec<String> {
    let row = job.row;
    let mut arguments = vec![
        format!("--name={}", row.name),
        format!("--rw={}", row.pattern),
        format!("--bs={}", row.block_bytes),
        format!("--iodepth={}", row.depth),
        format!("--size={}", job.size_bytes),
        format!("--runtime={}", job.duration.as_secs().max(1)),
        "--time_based".to_owned(),
        // Without the map of what was hit, each block is drawn independently and fio itself spends less.
        "--norandommap".to_owned(),
        format!("--randseed={}", job.seed),
        "--thread".to_owned(),
        "--lat_percentiles=1".to_owned(),
        "--clat_percentiles=0".to_owned(),
        "--percentile_list=50:99:99.9".to_owned(),
        "--eta=never".to_owned(),
        "--output-format=json".to_owned(),
    ];
    match job.target {
        Target::Nbd(uri) => {
            arguments.extend(["--ioengine=nbd".to_owned(), format!("--uri={uri}")]);
            if row.flush_every > 0 {
                arguments.push(format!("--fsync={}", row.flush_every));
            }
        }
        Target::Rbd { pool, image, .. } => {
            arguments.extend([
                "--ioengine=rbd".to_owned(),
                "--clientname=admin".to_owned(),
                format!("--pool={pool}"),
                format!("--rbdname={image}"),
            ]);
            if row.flush_every > 0 {
                arguments.push(format!("--fsync={}", row.flush_every));
            }
        }
        Target::File(path) => {
            arguments.extend([
                "--ioengine=io_uring".to_owned(),
                "--direct=1".to_owned(),
                format!("--filename={}", path.display()),
            ]);
            if row.flush_every > 0 {
                arguments.push(format!("--fdatasync={}", row.flush_every));
            }
        }
    }
    arguments
}

fn parse(report: &str, row: &Row) -> Result<Outcome> {
    // fio writes its notes before the JSON.
    let start = report
        .find('{')
        .ok_or_else(|| anyhow!("fio reported nothing: {report:.200}"))?;
    let report: Value = serde_json::from_str(&report[start..]).context("fio's report")?;
    let job = &report["jobs"][0];
    let error = job["error"].as_i64().unwrap_or(0);
    if error != 0 {
        bail!("fio reports error {error}");
    }
    let side = &job[if row.is_read() { "read" } else { "write" }];
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let operations = side["total_ios"].as_u64().unwrap_or(0);
    let seconds = number(&side["runtime"]) / 1000.0;
    if operations == 0 || seconds <= 0.0 {
        bail!("fio finished no operation");
    }
    let sync = &job["sync"];
    // fio's shares are percent of the job's own run time.
    let client_share = (number(&job["usr_cpu"]) + number(&job["sys_cpu"])) / 100.0;
    Ok(Outcome {
        operations,
        seconds,
        mean_us: number(&side["lat_ns"]["mean"]) / 1000.0,
        p99_us: number(&side["lat_ns"]["percentile"]["99.000000"]) / 1000.0,
        flushes: sync["total_ios"].as_u64().unwrap_or(0),
        flush_mean_us: number(&sync["lat_ns"]["mean"]) / 1000.0,
        flush_p99_us: number(&sync["lat_ns"]["percentile"]["99.000000"]) / 1000.0,
        client_cpu_us: client_share * number(&job["job_runtime"]) * 1000.0,
    })
}

/// Whether this fio has the engines that are needed.
pub(crate) fn require_engines(wanted: &[&str]) -> Result<()> {
    let engines = Command::new("fio")
        .arg("--enghelp")
        .output()
        .context("fio could not be started")?;
    let engines = String::from_utf8_lossy(&engines.stdout).into_owned();
    for engine in wanted {
        if !engines.split_whitespace().any(|name| name == *engine) {
            bail!("this fio has no {engine} engine; the distribution's package of fio has one");
        }
    }
    Ok(())
}

/// Writes `size_bytes` of data that cannot be compressed or mistaken for holes, and makes it durable.
pub(crate) fn write_data_file(path: &Path, size_bytes: u64) -> Result<()> {
    use std::io::Write;
    const PIECE_BYTES: usize = 1 << 20;
    let mut file = File::create(path).with_context(|| path.display().to_string())?;
    let mut piece = vec![0u8; PIECE_BYTES];
    // xorshift64: any stream without long runs would do; the seed is arbitrary.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut left = size_bytes;
    while left > 0 {
        for word in piece.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        let count = left.min(PIECE_BYTES as u64);
        file.write_all(&piece[..count as usize])?;
        left -= count;
    }
    file.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::ROWS;

    #[test]
    fn a_report_is_read() {
        let report = r#"fio: some note
            {"jobs":[{"error":0,"job_runtime":2000,"usr_cpu":10.0,"sys_cpu":15.0,
              "write":{"total_ios":1000,"runtime":2000,"lat_ns":{"mean":50000.0,"percentile":{"99.000000":90000}}},
              "sync":{"total_ios":1000,"lat_ns":{"mean":100000.0,"percentile":{"99.000000":300000}}}}]}"#;
        let outcome = parse(report, &ROWS[6]).unwrap();
        assert_eq!(outcome.operations, 1000);
        assert_eq!(outcome.seconds, 2.0);
        assert_eq!(outcome.mean_us, 50.0);
        assert_eq!(outcome.flush_p99_us, 300.0);
        assert_eq!(outcome.client_cpu_us, 500_000.0);
    }

    #[test]
    fn an_error_or_an_empty_run_is_refused() {
        assert!(parse("", &ROWS[0]).is_err());
        assert!(parse("{}", &ROWS[0]).is_err());
        assert!(
            parse(
                r#"{"jobs":[{"error":5,"read":{"total_ios":9,"runtime":9}}]}"#,
                &ROWS[0]
            )
            .is_err()
        );
    }
}
