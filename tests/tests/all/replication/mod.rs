//! Volumes with three copies on three real daemons with a real etcd: nodes that die, freeze, leave and return.

mod chaos;
mod doctor;
mod explained;
mod fencing;
mod followers;
mod moving;
mod outage;
mod partition;
mod power;
mod rolling;
mod scrubbing;
mod strangers;
mod takeover;
mod volumes;

use std::path::PathBuf;
use std::time::Duration;

use ashlar_server::data::DataConfig;
use ashlar_tests::cluster::Trio;
use ashlar_tests::daemon::Daemon;
use ashlar_tests::fio::Fio;
use ashlar_tests::tool::{Finished, Running};
use ashlar_tests::wait;
use serde_json::Value;

/// How long a head relies on what it heard.
const LEASE: Duration = DataConfig::LEASE;
/// Longest wait for what takes a moment on a machine that has nothing else to do.
const LONG: Duration = Duration::from_secs(90);
/// The longest that clients may wait because a node died.
const PAUSE_LIMIT: Duration = Duration::from_secs(6);

/// fio that verifies what it writes, for `seconds`, on the volume that node `at` serves. `rate`: bytes a second.
fn verifying(trio: &Trio, at: usize, volume: &str, seconds: u32, rate: &str) -> Running {
    Fio::verify(&trio.nodes[at].daemon.uri(volume))
        .args(["--rw=randrw", "--bs=4k", "--iodepth=8", "--time_based"])
        .args(["--size=32M", "--output-format=json", "--randrepeat=0"])
        .arg(format!("--runtime={seconds}"))
        .arg(format!("--rate={rate}"))
        .start()
}

/// Bytes that clients of the first node have written to "disk".
fn written(trio: &Trio) -> f64 {
    let metrics = trio.nodes[0].daemon.metrics();
    let labels = [("volume", "disk"), ("command", "write")];
    // Before the first of them there is no such number.
    metrics
        .sum("ashlar_volume_bytes_total", &labels)
        .unwrap_or(0.0)
}

/// Waits until they have written so many more.
fn wait_written(trio: &Trio, more: f64) {
    let before = written(trio);
    wait::until(LONG, "clients write", || {
        let bytes = written(trio) - before;
        if bytes > more {
            Ok(())
        } else {
            Err(format!("{bytes}"))
        }
    });
}

/// Demands that fio saw no error; the longest it waited for an answer.
fn longest_pause(fio: Finished) -> Duration {
    let said = fio.success();
    let json = &said[said.find('{').expect("JSON")..];
    let json: Value = serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {said}"));
    let job = &json["jobs"][0];
    assert_eq!(job["error"], 0, "{said}");
    let longest = ["read", "write"].map(|kind| {
        assert!(job[kind]["total_ios"].as_u64() > Some(0), "{said}");
        job[kind]["clat_ns"]["max"].as_u64().expect("a latency")
    });
    Duration::from_nanos(longest[0].max(longest[1]))
}

/// The file of a daemon's store.
fn store_file(daemon: &Daemon) -> PathBuf {
    let path = daemon.store();
    if !path.is_dir() {
        return path;
    }
    let files = std::fs::read_dir(&path).expect("a directory");
    let files = files.map(|entry| entry.expect("an entry").path());
    files
        .max_by_key(|path| path.metadata().map_or(0, |metadata| metadata.len()))
        .expect("the file of the store")
}
