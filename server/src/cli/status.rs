//! `ashlar status` and `ashlar connections`

use std::{
    io::{self, Write},
    time::{Duration, Instant},
};

use ashlar_proto::admin::{DaemonState, GetStatusRequest, ListConnectionsRequest};
use serde::Serialize;

use super::{
    args::Format,
    connect::{self, Asked, Daemon},
    error::{CliError, Exit},
    output::{self, Answer},
    size::human,
    store::store_columns,
    view::{self, Connection, Listener, Store},
};

/// Between two looks at a daemon that is waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Prints the status; fails when the daemon is not ready, after waiting for that as long as `limit`.
pub(super) async fn status(asked: Asked, format: Format, limit: Duration) -> Result<(), CliError> {
    let deadline = Instant::now() + limit;
    let status = loop {
        let status = ask(asked.clone()).await;
        let settled = match &status {
            Ok(status) => status.state != STARTING,
            Err(error) => error.exit != Exit::Unreachable,
        };
        if settled || Instant::now() >= deadline {
            break status?;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    };
    output::print(format, &status)?;
    if status.state == READY {
        Ok(())
    } else {
        Err(CliError::reported(Exit::Unreachable))
    }
}

async fn ask(asked: Asked) -> Result<Status, CliError> {
    let mut daemon = connect::connect(asked).await?;
    let status = daemon
        .client
        .get_status(GetStatusRequest {})
        .await?
        .into_inner();
    Ok(Status {
        admin: daemon.address.to_string(),
        state: match status.state() {
            DaemonState::Starting => STARTING,
            DaemonState::Ready => READY,
            DaemonState::Draining => "draining",
            DaemonState::Unspecified => "unknown",
        },
        node_id: status.node_id,
        version: status.version,
        pid: status.pid,
        started_at: view::time(status.started_at_unix_ms),
        uptime_ms: status.uptime_ms,
        data_dir: status.data_dir,
        listeners: status.listeners.into_iter().map(Listener::from).collect(),
        engine: status.engine,
        engine_fallback_reason: status.engine_fallback_reason,
        data_threads: status.data_threads,
        volumes: status.volumes,
        connections: status.connections,
        stores: status.stores.into_iter().map(Store::from).collect(),
        warnings: status.warnings,
    })
}

const STARTING: &str = "starting";
const READY: &str = "ready";

pub(super) async fn connections(
    daemon: &mut Daemon,
    format: Format,
    volume: Option<String>,
) -> Result<(), CliError> {
    let request = ListConnectionsRequest {
        volume: volume.unwrap_or_default(),
    };
    let answer = daemon.client.list_connections(request).await?.into_inner();
    output::print(
        format,
        &Connections(
            answer
                .connections
                .into_iter()
                .map(Connection::from)
                .collect(),
        ),
    )
}

#[derive(Serialize)]
struct Status {
    /// The address this answer came from.
    admin: String,
    state: &'static str,
    node_id: String,
    version: String,
    pid: u32,
    started_at: String,
    uptime_ms: u64,
    data_dir: String,
    listeners: Vec<Listener>,
    engine: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    engine_fallback_reason: String,
    data_threads: u32,
    volumes: u32,
    connections: u32,
    stores: Vec<Store>,
    warnings: Vec<String>,
}

/// What a daemon that is starting does not know yet has no text.
fn known(text: &str) -> String {
    if text.is_empty() {
        "-".into()
    } else {
        text.into()
    }
}

impl Answer for Status {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        let engine = match self.engine_fallback_reason.as_str() {
            "" => self.engine.clone(),
            reason => format!("{} ({reason})", self.engine),
        };
        let mut fields = vec![
            ("State", self.state.to_owned()),
            (
                "Daemon",
                format!("ashlard {}, pid {}", self.version, self.pid),
            ),
            ("Node", known(&self.node_id)),
            (
                "Up",
                format!(
                    "{} since {}",
                    view::duration(self.uptime_ms),
                    self.started_at
                ),
            ),
            ("Data", self.data_dir.clone()),
            (
                "Engine",
                match self.data_threads {
                    0 => known(&engine),
                    threads => format!("{engine}, {threads} data thread(s)"),
                },
            ),
        ];
        for listener in &self.listeners {
            let label = match listener.kind {
                "nbd" => "NBD",
                "admin" => "Admin",
                "http" => "HTTP",
                other => other,
            };
            fields.push((label, listener.address.clone()));
        }
        fields.push(("Asked at", self.admin.clone()));
        fields.push(("Volumes", self.volumes.to_string()));
        fields.push(("Connections", self.connections.to_string()));
        out.write_all(output::fields(&fields).as_bytes())?;
        if !self.stores.is_empty() {
            write!(out, "\n{}", store_columns(&self.stores))?;
        }
        if !self.warnings.is_empty() {
            writeln!(out, "\nNeeds attention:")?;
            for warning in &self.warnings {
                writeln!(out, "  {warning}")?;
            }
        }
        Ok(())
    }
}

#[derive(Serialize)]
#[serde(transparent)]
struct Connections(Vec<Connection>);

impl Answer for Connections {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.0.is_empty() {
            output::note("no open connections");
            return Ok(());
        }
        let rows = self.0.iter().map(|connection| {
            let features = [
                (connection.structured_replies, "structured"),
                (connection.extended_headers, "extended"),
                (connection.block_status, "status"),
                (connection.read_only, "read-only"),
            ];
            let features: Vec<_> = features
                .iter()
                .filter(|(on, _)| *on)
                .map(|(_, word)| *word)
                .collect();
            vec![
                connection.id.to_string(),
                connection.volume_name.clone(),
                connection.peer.clone(),
                connection.connected_at.clone(),
                features.join(","),
                connection.inflight_requests.to_string(),
                connection.requests.to_string(),
                human(connection.read_bytes),
                human(connection.written_bytes),
            ]
        });
        let header = [
            "ID", "VOLUME", "PEER", "SINCE", "FEATURES", "INFLIGHT", "REQUESTS", "READ", "WRITTEN",
        ];
        out.write_all(output::columns(&header, &[0, 5, 6, 7, 8], rows).as_bytes())
    }
}
