//! `ashlar cluster …` and `ashlar node …`: who belongs to a cluster.

use std::io::{self, Write};
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

use super::args::{ClusterCommand, Format, NodeCommand, Role};
use super::connect::{AUTHORITY_FILE, CERTIFICATE_FILE, Daemon, KEY_FILE};
use super::error::{CliError, Exit};
use super::output::{self, Answer};
use super::size::human;
use crate::config::Every;
use crate::identity::{to_pem, write_private};

/// Between two looks at a node that is being drained.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The daemon makes none that live longer.
const TOKEN_LIFETIME_MAX: Duration = Duration::from_secs(30 * 86_400);

fn client(daemon: &Daemon) -> ClusterClient<Channel> {
    ClusterClient::new(daemon.channel.clone())
}

fn failed(error: impl std::fmt::Display) -> CliError {
    CliError::new(Exit::Failed, error)
}

pub(super) async fn run(
    daemon: &mut Daemon,
    format: Format,
    command: ClusterCommand,
) -> Result<(), CliError> {
    let mut client = client(daemon);
    match command {
        ClusterCommand::Token { lifetime } => {
            let request = CreateTokenRequest {
                lifetime_seconds: token_seconds(lifetime)?,
            };
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

/// What the daemon is asked for; 0 is its default.
fn token_seconds(lifetime: Option<Every>) -> Result<u32, CliError> {
    let Some(lifetime) = lifetime else {
        return Ok(0);
    };
    let interval = lifetime.interval();
    let interval = interval.filter(|interval| *interval <= TOKEN_LIFETIME_MAX);
    let interval = interval.ok_or_else(|| {
        CliError::new(
            Exit::Usage,
            "a token has an end: its lifetime is at most 30d",
        )
    })?;
    Ok(interval.as_secs() as u32)
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
                node.serves.to_string(),
                human(node.used_bytes),
                if node.authority { "yes" } else { "" }.to_owned(),
                if node.leader { "yes" } else { "" }.to_owned(),
            ]
        });
        let header = [
            "NODE", "STATE", "ADDRESS", "LABELS", "STORES", "VOLUMES", "COPIES", "SERVES", "USED",
            "SIGNS", "LEADER",
        ];
        out.write_all(output::columns(&header, &[4, 5, 6, 7, 8], rows).as_bytes())?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_always_ends() {
        let seconds = |text: &str| token_seconds(Some(text.parse().expect(text)));
        assert_eq!(token_seconds(None).expect("the default"), 0);
        assert_eq!(seconds("30m").expect("a lifetime"), 1800);
        for wrong in ["off", "31d"] {
            assert_eq!(seconds(wrong).expect_err(wrong).exit, Exit::Usage);
        }
    }

    #[test]
    fn the_table_of_nodes_tells_who_serves_and_who_leads() {
        let node = |id: &str, serves, leader| Node {
            id: id.to_owned(),
            serves,
            leader,
            copies: 7,
            ..Node::default()
        };
        let nodes = [node("n-1", 2, false), node("n-2", 5, true)];
        let nodes = Nodes {
            cluster_id: String::new(),
            nodes: nodes.into_iter().map(NodeView::from).collect(),
        };
        let mut out = Vec::new();
        nodes.write_table(&mut out).expect("writes to memory");
        let text = String::from_utf8(out).expect("text");
        let cells = |line: usize| -> Vec<&str> {
            let line = text.lines().nth(line).expect("a line");
            line.split_whitespace().collect()
        };
        let header = cells(0);
        assert_eq!(header[7..], ["SERVES", "USED", "SIGNS", "LEADER"], "{text}");
        assert!(
            cells(1).contains(&"2") && !cells(1).contains(&"yes"),
            "{text}"
        );
        assert!(
            cells(2).contains(&"5") && cells(2).contains(&"yes"),
            "{text}"
        );
    }
}
