//! A volume plugin for Docker and podman: `Plugin.Activate` and `VolumeDriver.*` over a Unix socket, and over TLS.
//!
//! A volume is mounted once on the machine, for the first container that asks, and unmounted after the last one. Who asks
//! is told by an id, and the ids are remembered.

pub mod message;
pub mod tls;
pub mod users;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use clap::{CommandFactory, FromArgMatches, Parser};
use tokio::signal::unix::{SignalKind, signal};
use uuid::Uuid;

use super::{Host, Wish};
use crate::capability::{Access, AccessMode, Capability};
use crate::controller::{CreateRequest, NAME_KEY, naming};
use crate::daemon::Volume;
use crate::node::filesystem::mounts;
use crate::node::keep_connected;
use crate::operations::Turn;
use crate::refusal::{Class, Refusal};
use crate::run::{Arguments, keep_registered, open_state_directory, start_log};
use crate::service::server;
use crate::{failpoint, sysfs};
use message::{Answer, Ask, CONTENT_TYPE, Shown};
use users::Users;

const ENDPOINT: &str = "unix:///run/docker/plugins/ashlar.sock";
const STATE_DIRECTORY: &str = "/var/lib/ashlar-csi/docker";
const NODE_SUFFIX: &str = ".docker";
/// How long a call waits for another one on the same volume: the engine gives up mounting after two minutes, and does not
/// ask again.
const TURN_LIMIT: Duration = Duration::from_secs(100);
const TURN_RETRY: Duration = Duration::from_millis(50);
/// Between two attempts to give back volumes that are not used here any more.
const SETTLE_INTERVAL: Duration = Duration::from_secs(30);
/// Marks the volumes that were made here, in the claim part of a volume's annotations.
const ORIGIN_KEY: &str = "created-by";
const ORIGIN: &str = "docker";
const ORIGIN_ANNOTATION: &str = "csi.ashlar.io/claim/created-by";
/// Volumes asked for at a time.
const PAGE: u32 = 500;

/// The settings of the node operations, and those of the plugin alone.
#[derive(Parser)]
struct Settings {
    #[command(flatten)]
    node: Arguments,
    #[command(flatten)]
    tls: tls::Settings,
}

/// Reads the settings and serves until the program is told to stop.
pub fn main(arguments: impl Iterator<Item = OsString>) -> anyhow::Result<()> {
    let command = Settings::command()
        .name("ashlar-csi docker")
        .about("A volume plugin for Docker and podman")
        .mut_arg("endpoint", |endpoint| endpoint.default_value(ENDPOINT))
        .mut_arg("state_dir", |state| state.default_value(STATE_DIRECTORY));
    let name = std::iter::once(OsString::from("ashlar-csi docker"));
    let Settings {
        node: settings,
        tls,
    } = Settings::from_arg_matches(&command.get_matches_from(name.chain(arguments)))?;
    start_log(&settings.log, settings.log_format)?;
    if let Some(name) = &settings.fail_point {
        failpoint::arm(name).map_err(|error| anyhow!(error))?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let served = runtime.block_on(serve(settings, tls));
    runtime.shutdown_background();
    served
}

async fn serve(mut settings: Arguments, tls: tls::Settings) -> anyhow::Result<()> {
    let endpoint = &settings.endpoint.clone();
    if let Some(parent) = endpoint.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    }
    // Before the state is opened: whoever has the socket has the state.
    let listener = server::listen(endpoint)
        .await
        .with_context(|| format!("listening at {}", endpoint.display()))?;
    let tls = tls.listen().await?;
    settings.state_dir = open_state_directory(&settings.state_dir)?;
    let host = Host::open(&settings, NODE_SUFFIX).await?;
    tokio::spawn(keep_connected(Arc::clone(host.node())));
    tokio::spawn(keep_registered(
        host.node().daemon().clone(),
        host.node_id().to_owned(),
        BTreeMap::new(),
    ));
    let boot_id = sysfs::boot_id().context("no boot id")?;
    let mounts = settings.state_dir.join("mounts");
    std::fs::create_dir_all(&mounts).with_context(|| format!("making {}", mounts.display()))?;
    let plugin = Plugin {
        host,
        users: Users::open(settings.state_dir.join("users"), boot_id)
            .context("opening the users")?,
        mounts,
    };
    plugin.clear_up().await;
    let host = plugin.host.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(SETTLE_INTERVAL).await;
            if let Err(error) = host.settle().await {
                tracing::debug!(%error, "volumes could not be given back yet");
            }
        }
    });
    let app = Router::new()
        .route("/{call}", post(answer))
        .with_state(plugin);
    tracing::info!(endpoint = %endpoint.display(), "serving");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
    };
    let over_tls = {
        let app = app.clone();
        async move {
            match tls {
                Some(listener) => axum::serve(listener, app).await,
                None => std::future::pending().await,
            }
        }
    };
    tokio::select! {
        served = axum::serve(listener, app) => served?,
        served = over_tls => served?,
        () = stop => {}
    }
    let _ = std::fs::remove_file(endpoint);
    Ok(())
}

#[derive(Clone)]
struct Plugin {
    host: Host,
    users: Users,
    mounts: PathBuf,
}

async fn answer(State(plugin): State<Plugin>, Path(call): Path<String>, body: Bytes) -> Response {
    // In a task of its own: an engine that gives up must not leave a volume half way.
    let work = tokio::spawn(async move {
        let ask = Ask::parse(&body)?;
        let done = plugin.carry_out(&call, &ask).await;
        if let Err(refusal) = &done {
            tracing::warn!(call, volume = ask.name, %refusal, "refused");
        }
        done
    });
    let answer = match work.await {
        Ok(Ok(Some(answer))) => answer,
        Ok(Ok(None)) => return StatusCode::NOT_FOUND.into_response(),
        Ok(Err(refusal)) => Answer::error(&refusal),
        Err(error) => Answer::error(&Refusal::internal(format!("the call broke off: {error}"))),
    };
    let code = if answer.is_error() {
        StatusCode::INTERNAL_SERVER_ERROR
    } else {
        StatusCode::OK
    };
    let Ok(json) = serde_json::to_vec(&answer) else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    (code, [(header::CONTENT_TYPE, CONTENT_TYPE)], json).into_response()
}

impl Plugin {
    /// `None` for a call there is none of.
    async fn carry_out(&self, call: &str, ask: &Ask) -> Result<Option<Answer>, Refusal> {
        let answer = match call {
            "Plugin.Activate" => Answer::implements(),
            "VolumeDriver.Capabilities" => Answer::capabilities(),
            "VolumeDriver.Create" => self.create(ask).await?,
            "VolumeDriver.Remove" => self.remove(ask).await?,
            "VolumeDriver.Mount" => self.mount(ask).await?,
            "VolumeDriver.Unmount" => self.unmount(ask).await?,
            "VolumeDriver.Path" => {
                let volume = self.find(ask.name()?).await?;
                Answer::mountpoint(self.mountpoint(&volume)?)
            }
            "VolumeDriver.Get" => {
                let volume = self.find(ask.name()?).await?;
                Answer::volume(self.shown(ask.name()?.to_owned(), &volume)?)
            }
            "VolumeDriver.List" => self.list().await?,
            _ => return Ok(None),
        };
        Ok(Some(answer))
    }

    async fn find(&self, name: &str) -> Result<Volume, Refusal> {
        let found = self.host.find(&naming::volume_name(name)).await?;
        found.ok_or_else(|| Refusal::not_found(format!("no such volume: {name}")))
    }

    fn target(&self, volume: Uuid) -> PathBuf {
        self.mounts.join(volume.to_string())
    }

    /// Where a volume is mounted for containers; empty when it is not.
    fn mountpoint(&self, volume: &Volume) -> Result<String, Refusal> {
        let target = self.target(volume.id);
        let mounts = mounts()?;
        Ok(match mounts.at(&target) {
            Some(_) => target.display().to_string(),
            None => String::new(),
        })
    }

    fn shown(&self, name: String, volume: &Volume) -> Result<Shown, Refusal> {
        let users: Vec<&str> = volume
            .publications
            .iter()
            .map(|publication| publication.node_id.as_str())
            .collect();
        Ok(Shown {
            name,
            mountpoint: self.mountpoint(volume)?,
            status: BTreeMap::from([
                ("id", volume.id.to_string().into()),
                ("sizeBytes", volume.size_bytes.into()),
                ("publishedTo", users.into()),
            ]),
        })
    }

    /// The turn for a volume, waited for.
    async fn turn(&self, volume: Uuid) -> Result<Turn, Refusal> {
        let begun = tokio::time::Instant::now();
        loop {
            match self.host.node().turns().begin(&volume.to_string()) {
                Err(refusal) if refusal.class == Class::Aborted && begun.elapsed() < TURN_LIMIT => {
                    tokio::time::sleep(TURN_RETRY).await;
                }
                turn => return turn,
            }
        }
    }

    async fn create(&self, ask: &Ask) -> Result<Answer, Refusal> {
        let (range, mut parameters, mut given) = ask.wanted()?;
        let origin = (ORIGIN_KEY.to_owned(), ORIGIN.to_owned());
        parameters.metadata.extend([origin.clone()]);
        given.extend([origin]);
        let request = CreateRequest {
            name: ask.name()?.to_owned(),
            range,
            capabilities: vec![Capability {
                access: Access::Mount {
                    filesystem: parameters.filesystem,
                    options: Vec::new(),
                },
                mode: AccessMode::SingleNodeMultiWriter,
            }],
            parameters,
            given,
            requisite: Vec::new(),
            preferred: Vec::new(),
        };
        self.host.controller().create(request).await?;
        Ok(Answer::default())
    }

    async fn remove(&self, ask: &Ask) -> Result<Answer, Refusal> {
        let volume = self.find(ask.name()?).await?;
        if !is_made_here(&volume) {
            return Err(Refusal::precondition(format!(
                "volume {} was not created through Docker; delete it with `ashlar volume delete {}`",
                ask.name, volume.name
            )));
        }
        let _turn = self.turn(volume.id).await?;
        self.host.controller().delete(volume.id).await?;
        Ok(Answer::default())
    }

    async fn mount(&self, ask: &Ask) -> Result<Answer, Refusal> {
        let volume = self.find(ask.name()?).await?;
        let _turn = self.turn(volume.id).await?;
        let mut ids = self.users.of(volume.id)?;
        let target = self.target(volume.id);
        self.host
            .bring_up(&volume, &target, &Wish::default())
            .await?;
        // Only now: after a crash before this, the mount has no users and goes on the next start.
        ids.insert(ask.id.clone());
        self.users.set(volume.id, ask.name()?, ids)?;
        Ok(Answer::mountpoint(target.display().to_string()))
    }

    async fn unmount(&self, ask: &Ask) -> Result<Answer, Refusal> {
        // The daemon may be away.
        let volume = match self.users.volume_of(ask.name()?) {
            Some(volume) => volume,
            None => self.find(ask.name()?).await?.id,
        };
        let _turn = self.turn(volume).await?;
        let mut ids = self.users.of(volume)?;
        if ids.remove(&ask.id) {
            // Before the unmounting: the engine may not ask again, and the next start ends what this did not.
            self.users.set(volume, ask.name()?, ids.clone())?;
        }
        if ids.is_empty() {
            self.host.take_down(volume, &self.target(volume)).await?;
        }
        Ok(Answer::default())
    }

    /// The volumes that were made here, and those that are used here.
    async fn list(&self) -> Result<Answer, Refusal> {
        let mut all = Vec::new();
        let mut token = String::new();
        loop {
            let (page, next) = self.host.node().daemon().volumes(PAGE, &token).await?;
            for volume in page.into_iter().filter(|volume| !volume.is_deleting) {
                let is_here = volume
                    .publications
                    .iter()
                    .any(|publication| publication.node_id == self.host.node_id());
                if is_here || is_made_here(&volume) {
                    all.push(self.shown(name_of(&volume), &volume)?);
                }
            }
            if next.is_empty() {
                return Ok(Answer::volumes(all));
            }
            token = next;
        }
    }

    /// Takes down what has no users: an earlier run ended between a mount and its record, or a record and its unmount.
    async fn clear_up(&self) {
        let held = match self.host.node().held() {
            Ok(held) => held,
            Err(error) => return tracing::warn!(%error, "what is mounted cannot be listed"),
        };
        for held in held {
            let done = match self.users.of(held.volume) {
                Ok(users) if users.is_empty() => {
                    let target = self.target(held.volume);
                    self.host.take_down(held.volume, &target).await
                }
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = done {
                tracing::warn!(volume = %held.volume, %error, "a volume without users could not be taken down");
            }
        }
    }
}

fn is_made_here(volume: &Volume) -> bool {
    volume
        .annotations
        .get(ORIGIN_ANNOTATION)
        .is_some_and(|origin| origin == ORIGIN)
}

/// What the engine calls a volume: the name it was made under, where that leads to it.
fn name_of(volume: &Volume) -> String {
    match volume.annotations.get(NAME_KEY) {
        Some(name) if naming::volume_name(name) == volume.name => name.clone(),
        _ => volume.name.clone(),
    }
}
