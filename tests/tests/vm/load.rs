//! `vm-guest load` as a test drives it: started on a mounted file system, watched, stopped, judged.

use std::time::{Duration, Instant};

use ashlar_tests::vm::Machine;
use ashlar_tests::vm::wire::End;
use ashlar_tests::wait;
use serde_json::Value;

/// Longest wait for a load to get on: the kernel sends again what was in flight only when its timeout is over.
const STALL_LIMIT: Duration = Duration::from_secs(180);
/// How often a device without sockets is given new ones while its load does not get on.
const AGAIN: Duration = Duration::from_secs(10);

/// A load on a mounted file system.
pub(crate) struct Load<'a> {
    machine: &'a Machine,
    folder: String,
    name: String,
    seed: u64,
    pid: Option<u32>,
}

const FILES: u64 = 3;
const BLOCKS: u64 = 1024;

impl<'a> Load<'a> {
    /// On the file system at `folder`.
    pub(crate) fn start(machine: &'a Machine, name: &str, folder: &str, seed: u64) -> Load<'a> {
        let mut load = Load {
            machine,
            folder: folder.to_owned(),
            name: name.to_owned(),
            seed,
            pid: None,
        };
        let (progress, stop, log) = (load.file("progress"), load.file("stop"), load.file("log"));
        let mut argv = vec!["vm-guest".to_owned(), "load".to_owned()];
        argv.extend(load.shape());
        argv.extend(["--progress".into(), progress, "--stop".into(), stop]);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        load.pid = Some(machine.start(&argv, &log));
        machine.save(&log);
        load
    }

    /// One that ran in another machine, to be judged in this.
    pub(crate) fn of_before(machine: &'a Machine, folder: &str, seed: u64) -> Load<'a> {
        Load {
            machine,
            folder: folder.to_owned(),
            name: "before".to_owned(),
            seed,
            pid: None,
        }
    }

    fn file(&self, kind: &str) -> String {
        format!("/run/load-{}.{kind}", self.name)
    }

    fn shape(&self) -> Vec<String> {
        let words = [
            ("--dir", self.folder.clone()),
            ("--seed", self.seed.to_string()),
            ("--files", FILES.to_string()),
            ("--blocks", BLOCKS.to_string()),
        ];
        words
            .into_iter()
            .flat_map(|(name, value)| [name.to_owned(), value])
            .collect()
    }

    fn progress(&self) -> Option<Value> {
        let path = self.file("progress");
        let told = self.machine.try_run(&["cat", &path]);
        told.ok()
            .then(|| serde_json::from_str(&told.ran.stdout).expect("progress is JSON"))
    }

    pub(crate) fn operations(&self) -> u64 {
        self.progress()
            .and_then(|progress| progress["operations"].as_u64())
            .unwrap_or_default()
    }

    pub(crate) fn slowest(&self) -> Duration {
        let progress = self.progress().expect("a load that ran");
        Duration::from_millis(progress["slowest_ms"].as_u64().expect("a number"))
    }

    /// The newest versions that a sync covered.
    pub(crate) fn synced(&self) -> Vec<u64> {
        let progress = self.progress().expect("a load that ran");
        let synced = progress["synced"].as_array().expect("a list");
        synced.iter().filter_map(Value::as_u64).collect()
    }

    /// Waits until `more` operations were answered, and calls `nudge` while there is no progress.
    pub(crate) fn get_on(&self, more: u64, mut nudge: impl FnMut()) {
        let wanted = self.operations() + more;
        let mut nudged = Instant::now();
        wait::until(STALL_LIMIT, "the load gets on", || {
            self.still_runs();
            let now = self.operations();
            if now >= wanted {
                return Ok(());
            }
            if nudged.elapsed() > AGAIN {
                nudge();
                nudged = Instant::now();
            }
            Err(format!("{now} of {wanted} operations"))
        });
    }

    fn still_runs(&self) {
        let end = self.wait(Duration::ZERO);
        assert_eq!(end, End::Running, "{}", self.said());
    }

    fn wait(&self, limit: Duration) -> End {
        self.machine
            .wait(self.pid.expect("a load that was started"), limit)
    }

    pub(crate) fn said(&self) -> String {
        self.machine.read(&self.file("log")).unwrap_or_default()
    }

    /// Lets it end by itself, and calls `nudge` until it has; it must have seen no error.
    pub(crate) fn stop(&self, mut nudge: impl FnMut()) {
        self.machine.write(&self.file("stop"), "");
        let begun = Instant::now();
        let end = loop {
            match self.wait(AGAIN) {
                End::Running if begun.elapsed() < STALL_LIMIT => nudge(),
                end => break end,
            }
        };
        assert_eq!(end, End::Code(0), "{}", self.said());
    }

    /// It has ended with an error, or does so soon; returns what it said.
    pub(crate) fn failed(&self) -> String {
        assert_eq!(self.wait(STALL_LIMIT), End::Code(1), "{}", self.said());
        self.said()
    }

    /// What was synced is on the file system that is mounted there now.
    pub(crate) fn verify(&self, synced: &[u64]) -> String {
        let synced: Vec<String> = synced.iter().map(u64::to_string).collect();
        let synced = synced.join(",");
        let mut argv = vec!["vm-guest".to_owned(), "verify".to_owned()];
        argv.extend(self.shape());
        argv.extend(["--synced".to_owned(), synced]);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        self.machine.run(&argv)
    }
}
