//! An orchestrator: what external-provisioner, external-attacher, external-resizer and the kubelet do with a CSI driver, and
//! what they believe after each answer.
//!
//! Each asks until it is done, with growing pauses. A code that is *final* tells them that nothing is going on and nothing
//! was left, so whoever gives up after one undoes nothing: a driver that leaves something behind then has leaked it. After
//! any other code the outcome is *uncertain*, and giving up means undoing what may have been done.
//! (kubernetes/kubernetes pkg/volume/csi/csi_client.go, isFinalError; kubernetes-csi/external-provisioner
//! pkg/controller/controller.go, checkError.)

mod life;
mod pod;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tonic::Code;

use crate::csi::{Answer, Calls};
use crate::seed::Rng;
use crate::wait;

pub use life::{Kind, Life};

/// Before the first repetition, and the longest pause. A thousandth of what orchestrators take.
const BACKOFF: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// Longest that a driver may refuse what in the end has to be done, restarts of everything included.
const PATIENCE: Duration = Duration::from_secs(150);
/// A call by one who is patient.
const CALL: Duration = Duration::from_secs(60);

/// Whether an orchestrator takes an answer for the end of the matter.
pub fn is_final(code: Code, words: &str) -> bool {
    // A broken connection is Unavailable to the clients of orchestrators; to ours it is one of these.
    let is_broken = matches!(code, Code::Unknown | Code::Internal)
        && ["transport error", "h2 protocol error", "connection"]
            .iter()
            .any(|part| words.contains(part));
    let is_uncertain = matches!(
        code,
        Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Unavailable
            | Code::ResourceExhausted
            | Code::Aborted
    );
    !is_broken && !is_uncertain
}

/// What an orchestrator that gave up believes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GaveUp {
    /// Nothing was done and nothing is going on.
    Final,
    /// It may have been done.
    Uncertain,
}

/// Nodes, and what all volumes of a run have in common.
pub struct World {
    /// The drivers; the first one's controller is asked.
    pub nodes: Vec<Calls>,
    stopping: AtomicBool,
    /// How often each call was answered what.
    tally: Mutex<BTreeMap<(&'static str, String), u64>>,
}

impl World {
    pub fn new(nodes: Vec<Calls>) -> World {
        World {
            nodes,
            stopping: AtomicBool::new(false),
            tally: Mutex::default(),
        }
    }

    /// From here on nothing new is begun, and what there is goes.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    fn count(&self, what: &'static str, answer: String) {
        let mut tally = self.tally.lock().expect("nobody panics with it");
        *tally.entry((what, answer)).or_default() += 1;
    }

    /// How often each call was answered what, a line a call.
    pub fn tally(&self) -> String {
        let tally = self.tally.lock().expect("nobody panics with it");
        let mut lines: BTreeMap<&str, String> = BTreeMap::new();
        for ((what, answer), count) in &*tally {
            let line = lines.entry(what).or_default();
            line.push_str(&format!(" {answer} {count}"));
        }
        let lines = lines.iter().map(|(what, line)| format!("{what}:{line}\n"));
        lines.collect()
    }

    /// How often something happened that [`World::tally`] tells of.
    pub fn happened(&self, what: &str) -> u64 {
        let tally = self.tally.lock().expect("nobody panics with it");
        let all = tally.iter().filter(|((name, _), _)| *name == what);
        all.map(|(_, count)| count).sum()
    }

    /// Asks until it is done. What a caller says when it asks for the last time is the driver's fault.
    fn insist<T>(
        &self,
        rng: &mut Rng,
        what: &'static str,
        on: &Calls,
        call: impl FnMut(&Calls) -> Answer<T>,
    ) -> T {
        match self.ask(rng, what, on, 0, call) {
            Ok(done) => done,
            Err(_) => unreachable!("it does not give up"),
        }
    }

    /// Asks until it is done or, after each refusal, with a chance of `gives_up` in a hundred, somebody loses interest.
    fn ask<T>(
        &self,
        rng: &mut Rng,
        what: &'static str,
        on: &Calls,
        gives_up: u64,
        mut call: impl FnMut(&Calls) -> Answer<T>,
    ) -> Result<T, GaveUp> {
        let begun = Instant::now();
        let mut pause = BACKOFF;
        loop {
            // Some callers vanish while they are served.
            let limit = match rng.chance(10) {
                true => Duration::from_millis(rng.within(1..300)),
                false => CALL,
            };
            let (code, words) = match call(&on.within(limit)) {
                Ok(done) => {
                    self.count(what, "ok".to_owned());
                    return Ok(done);
                }
                Err(refused) => refused,
            };
            self.count(what, format!("{code:?}"));
            let is_final = is_final(code, &words);
            if is_final {
                println!("{what} on {}: {code:?} {words}", on.node_id());
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "{what} is refused for {PATIENCE:?}: {code:?} {words}"
            );
            // What is final is also what people look at.
            if rng.chance(if is_final { 6 * gives_up } else { gives_up }) {
                return Err(match is_final {
                    true => GaveUp::Final,
                    false => GaveUp::Uncertain,
                });
            }
            wait::pass(pause);
            pause = (pause * 2).min(BACKOFF_MAX);
        }
    }
}
