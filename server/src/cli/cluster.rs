//! `ashlar cluster …` and `ashlar node …`: who belongs to a cluster.

use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use ashlar_proto::cluster::cluster_client::ClusterClient;
use ashlar_proto::cluster::{
    ClientRole, CreateTokenRequest, DrainNodeRequest, IssueClientCertificateRequest,
    LabelNodeRequest, ListClientCertificatesRequest, ListNodesRequest, Node, RemoveNodeRequest,
    RevokeClientCertificateRequest,
};
use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use serde::Serialize;
use tonic::transport::Channel;

use super::args::{ClusterCommand, Format, InitArgs, NodeCommand, Role};
use super::connect::Daemon;
use super::error::{CliError, Exit};
use super::output::{self, Answer};
use super::size::human;
use crate::config::{Arguments, Config, Metadata, Settings};
use crate::daemon::{DataDirLock, certificate_names, connect, node_record, open_local};
use crate::identity::{Initialising, initialise, to_pem, write_private};

/// Names that libnbd, and with it most tools, look for in a directory of certificates; ours looks for the same.
pub(super) const AUTHORITY_FILE: &str = "ca-cert.pem";
pub(super) const CERTIFICATE_FILE: &str = "client-cert.pem";
pub(super) const KEY_FILE: &str = "client-key.pem";

/// Between two looks at a node that is being drained.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

fn client(daemon: &Daemon) -> ClusterClient<Channel> {
    ClusterClient::new(daemon.channel.clone())
}

fn failed(error: impl std::fmt::Display) -> CliError {
    CliError::new(Exit::Failed, error)
}

/// Makes the node of a data directory the first of a cluster. Its daemon must not run.
pub(super) async fn init(format: Format, args: InitArgs) -> Result<(), CliError> {
    let arguments = Arguments {
        config: args.config,
        print_config: false,
        settings: Settings {
            data_dir: args.data_dir,
            metadata: args.metadata,
            etcd_prefix: args.etcd_prefix,
            etcd_ca: args.etcd_ca,
            etcd_cert: args.etcd_cert,
            etcd_key: args.etcd_key,
            advertise: args.advertise,
            label: args.label,
            ..Settings::default()
        },
    };
    let config = Config::resolve(&arguments).map_err(|error| CliError::new(Exit::Usage, error))?;
    let Metadata::Etcd(access) = &config.metadata else {
        return Err(CliError::new(
            Exit::Usage,
            "a cluster keeps its records in etcd; give --metadata etcd:http://HOST:PORT",
        ));
    };
    let _lock = DataDirLock::take(&config.data_dir).map_err(|error| {
        CliError::new(Exit::Refused, error)
            .hint("stop ashlard first; its volumes are moved as they are")
    })?;
    let local = open_local(&config.data_dir).map_err(failed)?;
    let shared = connect(access).map_err(failed)?;
    let node = node_record(&*local).await.map_err(failed)?.id;
    let founded = initialise(&Initialising {
        data_dir: &config.data_dir,
        local: &*local,
        shared: &shared,
        node,
        names: certificate_names(&config),
        labels: config.labels.clone(),
        length: config.certificate_lifetime,
    })
    .await
    .map_err(|error| CliError::new(Exit::Refused, error))?;
    output::print(
        format,
        &Founded {
            cluster_id: founded.cluster.0.to_string(),
            node_id: node.0.to_string(),
            authority_sha256: founded.authority_sha256,
            volumes: founded.volumes,
        },
    )
}

pub(super) async fn run(
    daemon: &mut Daemon,
    format: Format,
    command: ClusterCommand,
) -> Result<(), CliError> {
    let mut client = client(daemon);
    match command {
        ClusterCommand::Token { lifetime } => {
            let lifetime_seconds = lifetime.map_or(Ok(0), |every| {
                u32::try_from(every.interval().unwrap_or_default().as_secs())
            });
            let lifetime_seconds = lifetime_seconds
                .map_err(|_| CliError::new(Exit::Usage, "a token lives at most 30 days"))?;
            let request = CreateTokenRequest { lifetime_seconds };
            let answer = client.create_token(request).await?.into_inner();
            output::print(
                format,
                &NewToken {
                    token: answer.token,
                    expires_at_unix_ms: answer.expires_at_unix_ms,
                    addresses: answer.addresses,
                },
            )
        }
        ClusterCommand::ClientCert {
            name,
            out,
            role,
            days,
        } => {
            let key = KeyPair::generate().map_err(failed)?;
            let role = match role {
                Role::Admin => ClientRole::Admin,
                Role::Volumes => ClientRole::Volumes,
            };
            let request = IssueClientCertificateRequest {
                name: name.clone(),
                role: role.into(),
                public_key: key.public_key_raw().to_vec(),
                lifetime_days: days.unwrap_or(0),
            };
            let directory = out.unwrap_or_else(|| name.clone().into());
            if directory.join(KEY_FILE).exists() {
                return Err(CliError::new(
                    Exit::Refused,
                    format_args!("{} holds a key already", directory.display()),
                )
                .hint("name another directory with --out"));
            }
            let answer = client.issue_client_certificate(request).await?;
            let answer = answer.into_inner();
            let write = |file: &str, text: &str| {
                write_private(&directory, file, text).map_err(|error| {
                    failed(format_args!("{}: {error}", directory.join(file).display()))
                })
            };
            write(KEY_FILE, &key.serialize_pem())?;
            write(
                CERTIFICATE_FILE,
                &to_pem(&CertificateDer::from(answer.certificate)),
            )?;
            write(
                AUTHORITY_FILE,
                &to_pem(&CertificateDer::from(answer.authority)),
            )?;
            output::print(
                format,
                &Issued {
                    name,
                    directory: directory.display().to_string(),
                    expires_at_unix_ms: answer.expires_at_unix_ms,
                },
            )
        }
        ClusterCommand::ClientCerts => {
            let answer = client
                .list_client_certificates(ListClientCertificatesRequest {})
                .await?
                .into_inner();
            let certificates = answer.certificates.into_iter().map(|one| Certificate {
                role: match one.role() {
                    ClientRole::Admin => "admin",
                    ClientRole::Volumes | ClientRole::Unspecified => "volumes",
                },
                name: one.name,
                issued_at_unix_ms: one.issued_at_unix_ms,
                expires_at_unix_ms: one.expires_at_unix_ms,
            });
            output::print(
                format,
                &Certificates {
                    certificates: certificates.collect(),
                },
            )
        }
        ClusterCommand::RevokeClient { name } => {
            let request = RevokeClientCertificateRequest { name: name.clone() };
            client.revoke_client_certificate(request).await?;
            output::print(format, &Revoked { revoked: name })
        }
    }
}

pub(super) async fn node(
    daemon: &mut Daemon,
    format: Format,
    command: NodeCommand,
) -> Result<(), CliError> {
    let mut client = client(daemon);
    let changed = match command {
        NodeCommand::List => {
            let answer = client.list_nodes(ListNodesRequest {}).await?.into_inner();
            return output::print(
                format,
                &Nodes {
                    cluster_id: answer.cluster_id,
                    nodes: answer.nodes.into_iter().map(NodeView::from).collect(),
                },
            );
        }
        NodeCommand::Remove { node } => {
            let answer = client.remove_node(RemoveNodeRequest { node }).await?;
            answer.into_inner().node
        }
        NodeCommand::Drain { node, cancel, wait } => {
            let answer = client.drain_node(DrainNodeRequest { node, cancel }).await?;
            match answer.into_inner().node {
                Some(node) if wait => Some(drained(&mut client, node).await?),
                other => other,
            }
        }
        NodeCommand::Label { node, labels } => {
            let mut request = LabelNodeRequest {
                node,
                ..LabelNodeRequest::default()
            };
            for label in labels {
                match (label.split_once('='), label.strip_suffix('-')) {
                    (Some((key, value)), _) => {
                        request.set.insert(key.to_owned(), value.to_owned());
                    }
                    (None, Some(key)) => request.unset.push(key.to_owned()),
                    (None, None) => {
                        return Err(CliError::new(
                            Exit::Usage,
                            format_args!("{label:?} is neither KEY=VALUE nor KEY-"),
                        ));
                    }
                }
            }
            client.label_node(request).await?.into_inner().node
        }
    };
    let node = changed.ok_or_else(|| failed("the daemon's answer names no node"))?;
    output::print(format, &NodeView::from(node))
}

/// Waits until a node that is being drained has no copy left.
async fn drained(client: &mut ClusterClient<Channel>, mut node: Node) -> Result<Node, CliError> {
    let mut told = String::new();
    while node.copies > 0 {
        if !node.draining {
            return Err(CliError::new(
                Exit::Refused,
                "somebody has cancelled the drain; the node keeps what has not moved",
            ));
        }
        let mut text = format!(
            "{} copies are left, {} are in use on the node",
            node.copies,
            human(node.used_bytes)
        );
        if node.stuck_copies > 0 {
            text.push_str(&format!(
                "; {} have no other node to go to: add one, or room",
                node.stuck_copies
            ));
        }
        if text != told && output::stderr_is_watched() {
            output::note(format_args!("{text}"));
            told = text;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
        let listed = client.list_nodes(ListNodesRequest {}).await?.into_inner();
        let found = listed.nodes.into_iter().find(|other| other.id == node.id);
        node = found.ok_or_else(|| failed("the node is not in the cluster any more"))?;
    }
    Ok(node)
}

#[derive(Serialize)]
struct Founded {
    cluster_id: String,
    node_id: String,
    authority_sha256: String,
    volumes: usize,
}

impl Answer for Founded {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "cluster {} has its first node, {}",
            self.cluster_id, self.node_id
        )?;
        writeln!(out, "volumes moved into it: {}", self.volumes)?;
        writeln!(out, "authority (SHA-256):   {}", self.authority_sha256)?;
        writeln!(
            out,
            "keep a copy of identity/ca-key.pem where it is safe; start ashlard with the same --metadata"
        )
    }
}

#[derive(Serialize)]
struct NewToken {
    token: String,
    expires_at_unix_ms: u64,
    addresses: Vec<String>,
}

impl Answer for NewToken {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        let address = self.addresses.first().map_or("HOST:PORT", String::as_str);
        writeln!(out, "{}@{address}", self.token)?;
        if output::stderr_is_watched() {
            output::note(format_args!(
                "good for one node, until {}; give it to ashlard with --join or ASHLAR_JOIN",
                moment(self.expires_at_unix_ms)
            ));
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct Issued {
    name: String,
    directory: String,
    expires_at_unix_ms: u64,
}

impl Answer for Issued {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "{}: {AUTHORITY_FILE}, {CERTIFICATE_FILE} and {KEY_FILE} for {}, good until {}",
            self.directory,
            self.name,
            moment(self.expires_at_unix_ms)
        )
    }
}

#[derive(Serialize)]
struct Certificate {
    name: String,
    role: &'static str,
    issued_at_unix_ms: u64,
    expires_at_unix_ms: u64,
}

#[derive(Serialize)]
struct Certificates {
    certificates: Vec<Certificate>,
}

impl Answer for Certificates {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        let rows = self.certificates.iter().map(|one| {
            vec![
                one.name.clone(),
                one.role.to_owned(),
                moment(one.issued_at_unix_ms),
                moment(one.expires_at_unix_ms),
            ]
        });
        let header = ["NAME", "ROLE", "ISSUED", "EXPIRES"];
        out.write_all(output::columns(&header, &[], rows).as_bytes())
    }
}

#[derive(Serialize)]
struct Revoked {
    revoked: String,
}

impl Answer for Revoked {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{} is shut out", self.revoked)
    }
}

#[derive(Serialize)]
struct NodeView {
    id: String,
    state: &'static str,
    address: String,
    authority: bool,
    labels: std::collections::BTreeMap<String, String>,
    stores: u32,
    volumes: u32,
    joined_at_unix_ms: u64,
    is_asked: bool,
    copies: u32,
    /// Of those, the ones that have no other node to go to.
    stuck_copies: u32,
    serves: u32,
    used_bytes: u64,
    capacity_bytes: u64,
    silent_seconds: u32,
    /// It runs the controller.
    leader: bool,
}

impl From<Node> for NodeView {
    fn from(node: Node) -> NodeView {
        NodeView {
            state: match (node.removed, node.away, node.draining) {
                (true, ..) => "removed",
                (_, true, true) => "away,draining",
                (_, true, false) => "away",
                (_, false, true) => "draining",
                (_, false, false) => "active",
            },
            copies: node.copies,
            stuck_copies: node.stuck_copies,
            serves: node.serves,
            used_bytes: node.used_bytes,
            capacity_bytes: node.capacity_bytes,
            silent_seconds: node.silent_seconds,
            leader: node.leader,
            id: node.id,
            address: node.address,
            authority: node.authority,
            labels: node.labels.into_iter().collect(),
            stores: node.stores,
            volumes: node.volumes,
            joined_at_unix_ms: node.joined_at_unix_ms,
            is_asked: node.self_,
        }
    }
}

impl NodeView {
    fn labels(&self) -> String {
        let pairs: Vec<_> = self
            .labels
            .iter()
            .map(|(k, v)| format!("{k}={v}"))
            .collect();
        pairs.join(",")
    }
}

impl Answer for NodeView {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "node {} is {} {}", self.id, self.state, self.labels())?;
        if self.state.contains("draining") {
            writeln!(
                out,
                "copies left: {}, bytes in use: {}, volumes served: {}",
                self.copies,
                human(self.used_bytes),
                self.serves
            )?;
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct Nodes {
    cluster_id: String,
    nodes: Vec<NodeView>,
}

impl Answer for Nodes {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        let rows = self.nodes.iter().map(|node| {
            let star = if node.is_asked { "*" } else { "" };
            vec![
                format!("{}{star}", node.id),
                node.state.to_owned(),
                node.address.clone(),
                node.labels(),
                node.stores.to_string(),
                node.volumes.to_string(),
                node.copies.to_string(),
                human(node.used_bytes),
                if node.authority { "yes" } else { "" }.to_owned(),
            ]
        });
        let header = [
            "NODE", "STATE", "ADDRESS", "LABELS", "STORES", "VOLUMES", "COPIES", "USED", "SIGNS",
        ];
        out.write_all(output::columns(&header, &[4, 5, 6, 7], rows).as_bytes())?;
        for node in &self.nodes {
            if node.state.contains("away") {
                writeln!(
                    out,
                    "node {} was not heard of for {} s",
                    node.id, node.silent_seconds
                )?;
            }
            if node.state.contains("draining") {
                let stuck = match node.stuck_copies {
                    0 => String::new(),
                    stuck => format!(", of which {stuck} have no other node to go to"),
                };
                writeln!(
                    out,
                    "node {} is being drained: {} copies are left{stuck}",
                    node.id, node.copies
                )?;
            }
        }
        Ok(())
    }
}

fn moment(unix_ms: u64) -> String {
    i64::try_from(unix_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(String::new, |moment| {
            moment.strftime("%Y-%m-%d %H:%M UTC").to_string()
        })
}

/// The three files of a directory of certificates: authority, certificate, key.
pub(super) fn read_certificates(directory: &Path) -> Result<[Vec<u8>; 3], CliError> {
    let read = |file: &str| {
        let path = directory.join(file);
        std::fs::read(&path).map_err(|error| {
            CliError::new(Exit::Usage, format_args!("{}: {error}", path.display()))
        })
    };
    Ok([
        read(AUTHORITY_FILE)?,
        read(CERTIFICATE_FILE)?,
        read(KEY_FILE)?,
    ])
}
