//! A data thread from its first step to its end.

use std::sync::mpsc;

use ashlar_core::replication::BootId;
use tokio::sync::oneshot;

use super::Mailbox;
use crate::data::cluster::Cluster;
use crate::data::config::{DataConfig, OpenedStore, StartError, Tells};
use crate::data::open::open_store;
use crate::data::sparse::Sparse;
use crate::data::thread::{DataThread, Parts, StoreDriver};
use crate::engine::{self, FaultEngine};
use crate::metrics::Metrics;

/// A panic of a data thread must not leave a daemon that looks alive and serves nothing, or serves from broken state.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(
                "a data thread panicked; ending the daemon, which loses nothing that was acknowledged"
            );
            std::process::abort();
        }
    }
}

/// A thread that serves, or why there is none.
pub(super) type Started = Result<(Mailbox, Vec<OpenedStore>), StartError>;

/// The body of a data thread: everything it owns is made here and stays here.
pub(super) fn run_thread(
    index: usize,
    count: usize,
    config: &DataConfig,
    tells: (Metrics, Tells),
    started: oneshot::Sender<Started>,
) {
    let _abort = AbortOnPanic;
    let (thread, mailbox, opened) = match build_thread(index, count, config, tells) {
        Ok(built) => built,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let mut thread = thread;
    if started.send(Ok((mailbox, opened))).is_err() {
        return;
    }
    if let Err(error) = thread.run() {
        tracing::error!(%error, "the I/O engine failed; ending the daemon, which loses nothing that was acknowledged");
        std::process::abort();
    }
    thread.remove_tails();
}

fn build_thread(
    index: usize,
    count: usize,
    config: &DataConfig,
    (metrics, tells): (Metrics, Tells),
) -> Result<(DataThread, Mailbox, Vec<OpenedStore>), StartError> {
    let (engine, reason) = engine::open(config.engine).map_err(|source| StartError::Io {
        what: "no I/O engine",
        source,
    })?;
    tracing::info!(thread = index, "I/O engine {reason}");
    let mut engine = match &config.fault {
        Some(plan) => {
            tracing::warn!("faults are being injected into disk operations");
            Box::new(FaultEngine::new(engine, plan.clone()))
        }
        None => engine,
    };
    let mut drivers = Vec::new();
    let mut reports = Vec::new();
    for store in config.stores.iter().skip(index).step_by(count) {
        let opened = open_store(config, store, index)?;
        let file = engine
            .add_file(opened.fd)
            .map_err(|source| StartError::Io {
                what: "the I/O engine refused a store",
                source,
            })?;
        let report = &opened.report.report;
        let lost_answers = config.accept_tail_loss && report.tail_void && !report.clean;
        drivers.push(StoreDriver {
            store: opened.store,
            id: opened.report.id,
            path: opened.report.path.clone(),
            file,
            tail: opened.tail,
            metrics: metrics.add_store(opened.report.id),
            parked: Default::default(),
            waiting_for_index: Vec::new(),
            is_ready: false,
            lost_answers,
            read_failures: Sparse::default(),
        });
        reports.push(opened.report);
    }
    let tails: Vec<(*mut u8, usize)> = drivers
        .iter_mut()
        .map(|driver| driver.store.tail_memory())
        .collect();
    // SAFETY: a store keeps its tail mapped until it is dropped, which the thread does after its engine.
    if let Err(error) = unsafe { engine.pin(&tails) } {
        tracing::info!(thread = index, %error, "the tails' memory could not be registered with io_uring (the limit on locked memory?); writes take a little more processor time");
    }
    let (commands, inbox) = mpsc::channel();
    let mailbox = Mailbox {
        commands,
        engine_reason: reason,
        waker: engine.waker(),
    };
    let mut limits = config.limits;
    limits.bytes /= count;
    // An id that is never met again: without the real one no replica can know that it kept its memory.
    let boot = crate::tail::boot_id().map_or_else(|_| uuid::Uuid::new_v4(), uuid::Uuid::from_bytes);
    let cluster = Cluster::new(
        BootId(boot),
        config.seals.clone(),
        tells.cluster.clone(),
        config.lease.as_micros() as u64,
        config.fill_bytes_per_second,
    );
    let parts = Parts {
        index,
        engine,
        stores: drivers,
        limits,
        registry: metrics,
        tells,
        cluster,
        commands: inbox,
        spin: config.spin,
    };
    Ok((DataThread::new(parts), mailbox, reports))
}
