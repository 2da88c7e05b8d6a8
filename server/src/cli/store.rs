//! `ashlar store …`: the daemon's stores, and a store read without a daemon.

use std::{
    io::{self, Write},
    path::Path,
};

use ashlar_proto::admin::{CheckpointRequest, ListStoresRequest, ScrubRequest};
use serde::Serialize;

use super::{
    args::{DaemonStoreCommand, Format},
    connect::Daemon,
    error::{CliError, Exit},
    output::{self, Answer},
    progress,
    size::human,
    view::{self, Scrub, Store},
};

pub(super) async fn run(
    daemon: &mut Daemon,
    format: Format,
    command: DaemonStoreCommand,
) -> Result<(), CliError> {
    match command {
        DaemonStoreCommand::List => {
            let stores = list(daemon).await?;
            output::print(format, &Stores(stores))
        }
        DaemonStoreCommand::Scrub { store, rate } => {
            let store_id = store_id(daemon, store).await?;
            let request = ScrubRequest {
                store_id,
                rate_bytes_per_second: rate.map_or(0, |rate| rate.0),
            };
            scrub(daemon, format, request).await
        }
        DaemonStoreCommand::Checkpoint { store } => {
            let store_id = store_id(daemon, store).await?;
            let spinner = progress::spinner("taking a checkpoint");
            let answer = daemon
                .client
                .checkpoint(CheckpointRequest { store_id })
                .await;
            spinner.finish_and_clear();
            let answer = answer?.into_inner();
            output::print(
                format,
                &Checkpointed {
                    stores: answer.stores,
                    duration_ms: answer.duration_ms,
                },
            )
        }
    }
}

async fn list(daemon: &mut Daemon) -> Result<Vec<Store>, CliError> {
    let answer = daemon
        .client
        .list_stores(ListStoresRequest {})
        .await?
        .into_inner();
    Ok(answer.stores.into_iter().map(Store::from).collect())
}

/// The id of the store meant by an id or a path; empty for all.
async fn store_id(daemon: &mut Daemon, store: Option<String>) -> Result<String, CliError> {
    let Some(store) = store else {
        return Ok(String::new());
    };
    let stores = list(daemon).await?;
    let path = Path::new(&store).canonicalize().ok();
    let found = stores
        .iter()
        .find(|s| s.id == store || s.path == store || path.as_deref() == Some(Path::new(&s.path)));
    found.map(|s| s.id.clone()).ok_or_else(|| {
        CliError::new(
            Exit::NotFound,
            format_args!("the daemon has no store {store}"),
        )
        .hint("'ashlar store list' shows the ids and paths it has")
    })
}

async fn scrub(daemon: &mut Daemon, format: Format, request: ScrubRequest) -> Result<(), CliError> {
    let paths: Vec<(String, String)> = list(daemon)
        .await?
        .into_iter()
        .map(|s| (s.id, s.path))
        .collect();
    let mut stream = daemon.client.scrub(request).await?.into_inner();
    let mut report = ScrubReport { stores: Vec::new() };
    let mut bar = None;
    let broken_off = loop {
        let step = match stream.message().await {
            Ok(Some(step)) => step,
            Ok(None) => break None,
            Err(status) => break Some(CliError::from(status)),
        };
        if report
            .stores
            .last()
            .is_none_or(|store| store.store_id != step.store_id)
        {
            let path = paths
                .iter()
                .find(|(id, _)| *id == step.store_id)
                .map_or("", |(_, path)| path);
            bar = Some(progress::bytes_bar(step.total_bytes, path));
            report.stores.push(ScrubbedStore {
                store_id: step.store_id.clone(),
                path: path.to_owned(),
                verified_bytes: 0,
                complete: false,
                damaged_blocks: 0,
                damages: Vec::new(),
            });
        }
        let Some(store) = report.stores.last_mut() else {
            continue;
        };
        store.verified_bytes = step.done_bytes;
        store.complete = step.finished;
        store.damaged_blocks = step.damaged_blocks;
        for damage in step.damages {
            let damage = Damage::from(damage);
            if let Some(bar) = &bar {
                bar.suspend(|| output::note(format_args!("{}: {damage}", store.path)));
            }
            store.damages.push(damage);
        }
        if let Some(bar) = &bar {
            bar.set_length(step.total_bytes);
            bar.set_position(step.done_bytes);
            if step.finished {
                bar.finish_and_clear();
            }
        }
    };
    // What was found until then counts, whatever ended it.
    output::print(format, &report)?;
    if let Some(error) = broken_off {
        return Err(error);
    }
    if report.stores.iter().any(|store| store.damaged() > 0) {
        return Err(CliError::reported(Exit::Damaged));
    }
    if report.stores.iter().any(|store| !store.complete) {
        return Err(CliError::new(
            Exit::Failed,
            "the scrub ended before it was complete",
        ));
    }
    Ok(())
}

/// The table of stores, also a part of `ashlar status`.
pub(super) fn store_columns(stores: &[Store]) -> String {
    let rows = stores.iter().map(|store| {
        vec![
            store.path.clone(),
            store.state.to_owned(),
            human(store.capacity_bytes),
            human(store.live_bytes),
            human(store.available_bytes),
            human(store.tail_used_bytes),
            store
                .write_amplification
                .map_or("-".into(), |x| format!("{x:.2}")),
            store.counters.checksum_errors.to_string(),
            store.id.clone(),
        ]
    });
    let header = [
        "STORE",
        "STATE",
        "CAPACITY",
        "LIVE",
        "AVAILABLE",
        "TAIL",
        "WRITE AMP",
        "BAD BLOCKS",
        "ID",
    ];
    let mut text = output::columns(&header, &[2, 3, 4, 5, 6, 7], rows);
    for store in stores
        .iter()
        .filter(|store| !store.poison_reason.is_empty())
    {
        text += &format!("{} is poisoned: {}\n", store.path, store.poison_reason);
    }
    for store in stores {
        text += &format!("{} {}\n", store.path, scrub_line(&store.scrub));
    }
    text
}

/// When a store was verified and will be, in half a sentence.
fn scrub_line(scrub: &Scrub) -> String {
    let last = match &scrub.last_finished_at {
        None => "was never scrubbed".to_owned(),
        Some(at) => format!(
            "was scrubbed at {at}, {} verified, {}",
            human(scrub.last_verified_bytes),
            match scrub.last_damaged_blocks {
                0 => "no damage".to_owned(),
                damaged => format!("{damaged} damaged block(s)"),
            }
        ),
    };
    let next = match (&scrub.next_at, scrub.running) {
        (_, true) => format!("is being scrubbed, {} verified", human(scrub.done_bytes)),
        (Some(at), false) => format!("next at {at}"),
        (None, false) => "never by itself".to_owned(),
    };
    format!("{last}; {next}")
}

#[derive(Serialize)]
#[serde(transparent)]
struct Stores(Vec<Store>);

impl Answer for Stores {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(store_columns(&self.0).as_bytes())
    }
}

#[derive(Serialize)]
struct Checkpointed {
    stores: u32,
    duration_ms: u64,
}

impl Answer for Checkpointed {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "checkpoint of {} store(s) in {}",
            self.stores,
            view::duration(self.duration_ms)
        )
    }
}

#[derive(Serialize)]
struct ScrubReport {
    stores: Vec<ScrubbedStore>,
}

#[derive(Serialize)]
struct ScrubbedStore {
    store_id: String,
    path: String,
    verified_bytes: u64,
    /// False when the scrub ended early.
    complete: bool,
    /// That the scrub could not verify.
    damaged_blocks: u64,
    /// The places met meanwhile, those of clients' reads included.
    damages: Vec<Damage>,
}

impl ScrubbedStore {
    /// Blocks known to be damaged.
    fn damaged(&self) -> u64 {
        self.damaged_blocks.max(self.damages.len() as u64)
    }
}

#[derive(Serialize)]
struct Damage {
    layer: u64,
    chunk: u32,
    block: u32,
    #[serde(skip_serializing_if = "String::is_empty")]
    volume_id: String,
    problem: String,
}

impl From<ashlar_proto::admin::Damage> for Damage {
    fn from(damage: ashlar_proto::admin::Damage) -> Damage {
        Damage {
            layer: damage.layer,
            chunk: damage.chunk,
            block: damage.block,
            volume_id: damage.volume_id,
            problem: damage.problem,
        }
    }
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.volume_id.as_str() {
            "" => write!(f, "layer {}", self.layer)?,
            volume => write!(f, "volume {volume}, layer {}", self.layer)?,
        }
        let Damage {
            chunk,
            block,
            problem,
            ..
        } = self;
        write!(f, ", chunk {chunk}, block {block}: {problem}")
    }
}

impl Answer for ScrubReport {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        for store in &self.stores {
            let verified = human(store.verified_bytes);
            match store.damaged() {
                0 if store.complete => {
                    writeln!(out, "{}: {verified} verified, no damage", store.path)?
                }
                0 => writeln!(
                    out,
                    "{}: {verified} verified, no damage, not complete",
                    store.path
                )?,
                damaged => writeln!(
                    out,
                    "{}: {verified} verified, damaged blocks: {damaged}",
                    store.path
                )?,
            }
        }
        Ok(())
    }
}
