//! What volumes are to orchestrators: publications, client nodes.

use std::collections::BTreeMap;
use std::io::{self, Write};

use ashlar_proto::admin::{
    self, CloseConnectionsRequest, ListNodesRequest, UnpublishVolumeRequest,
};
use serde::Serialize;

use super::args::{ClientNodeCommand, Format};
use super::connect::Daemon;
use super::error::CliError;
use super::output::{self, Answer};
use super::view::time;

/// A volume given to a client node.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Publication {
    pub(super) node_id: String,
    pub(super) access_mode: &'static str,
    pub(super) read_only: bool,
    pub(super) epoch: u32,
    pub(super) published_at: String,
    pub(super) connections: u32,
}

impl From<admin::Publication> for Publication {
    fn from(publication: admin::Publication) -> Publication {
        Publication {
            access_mode: match publication.access_mode() {
                admin::AccessMode::SingleNodeWriter => "single-node-writer",
                admin::AccessMode::SingleNodeReaderOnly => "single-node-reader-only",
                admin::AccessMode::MultiNodeReaderOnly => "multi-node-reader-only",
                admin::AccessMode::SingleNodeSingleWriter => "single-node-single-writer",
                admin::AccessMode::SingleNodeMultiWriter => "single-node-multi-writer",
                admin::AccessMode::Unspecified => "unknown",
            },
            node_id: publication.node_id,
            read_only: publication.read_only,
            epoch: publication.epoch,
            published_at: time(publication.published_at_unix_ms),
            connections: publication.connections,
        }
    }
}

/// The filesystem on a volume.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Filesystem {
    pub(super) r#type: String,
    pub(super) uuid: String,
    pub(super) state: &'static str,
}

impl From<admin::Filesystem> for Filesystem {
    fn from(filesystem: admin::Filesystem) -> Filesystem {
        Filesystem {
            state: match filesystem.state() {
                admin::FilesystemState::Formatting => "formatting",
                admin::FilesystemState::Formatted => "formatted",
                admin::FilesystemState::Unspecified => "unknown",
            },
            r#type: filesystem.r#type,
            uuid: filesystem.uuid,
        }
    }
}

#[derive(Serialize)]
struct Unpublished {
    volume: String,
    node_ids: Vec<String>,
    epoch: u32,
    closed_connections: u32,
}

impl Answer for Unpublished {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.node_ids.is_empty() {
            return writeln!(out, "{} was not published there", self.volume);
        }
        writeln!(
            out,
            "unpublished {} from {}: {} connection(s) ended, epoch {}",
            self.volume,
            self.node_ids.join(", "),
            self.closed_connections,
            self.epoch
        )
    }
}

/// `ashlar volume unpublish`.
pub(super) async fn unpublish(
    daemon: &mut Daemon,
    format: Format,
    volume: String,
    node: Option<String>,
) -> Result<(), CliError> {
    let request = UnpublishVolumeRequest {
        volume: volume.clone(),
        node_id: node.unwrap_or_default(),
    };
    let answer = daemon.client.unpublish_volume(request).await?.into_inner();
    output::print(
        format,
        &Unpublished {
            volume,
            node_ids: answer.node_ids,
            epoch: answer.epoch,
            closed_connections: answer.closed_connections,
        },
    )
}

#[derive(Serialize)]
struct Disconnected {
    volume: String,
    closed_connections: u32,
}

impl Answer for Disconnected {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "{} connection(s) of {} ended; their clients may connect again",
            self.closed_connections, self.volume
        )
    }
}

/// `ashlar volume disconnect`.
pub(super) async fn disconnect(
    daemon: &mut Daemon,
    format: Format,
    volume: String,
) -> Result<(), CliError> {
    let request = CloseConnectionsRequest {
        volume: volume.clone(),
    };
    let answer = daemon.client.close_connections(request).await?;
    output::print(
        format,
        &Disconnected {
            volume,
            closed_connections: answer.into_inner().closed_connections,
        },
    )
}

#[derive(Serialize)]
struct ClientNode {
    node_id: String,
    topology: BTreeMap<String, String>,
    registered_at: String,
    volume_ids: Vec<String>,
}

#[derive(Serialize)]
#[serde(transparent)]
struct NodeList {
    nodes: Vec<ClientNode>,
}

impl Answer for NodeList {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.nodes.is_empty() {
            output::note("no client nodes; the node plugin of an orchestrator registers them");
            return Ok(());
        }
        let rows = self.nodes.iter().map(|node| {
            let topology: Vec<_> = node
                .topology
                .iter()
                .map(|(key, value)| format!("{key}={value}"))
                .collect();
            vec![
                node.node_id.clone(),
                node.volume_ids.len().to_string(),
                node.registered_at.clone(),
                topology.join(","),
            ]
        });
        let header = ["NODE", "VOLUMES", "REGISTERED", "TOPOLOGY"];
        out.write_all(output::columns(&header, &[1], rows).as_bytes())
    }
}

/// `ashlar client-node`.
pub(super) async fn node(
    daemon: &mut Daemon,
    format: Format,
    command: ClientNodeCommand,
) -> Result<(), CliError> {
    let ClientNodeCommand::List = command;
    let answer = daemon.client.list_nodes(ListNodesRequest {}).await?;
    let nodes = answer.into_inner().nodes.into_iter();
    let nodes = nodes.map(|node| ClientNode {
        node_id: node.node_id,
        topology: node.topology.into_iter().collect(),
        registered_at: time(node.registered_at_unix_ms),
        volume_ids: node.volume_ids,
    });
    output::print(
        format,
        &NodeList {
            nodes: nodes.collect(),
        },
    )
}
