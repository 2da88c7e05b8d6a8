//! Identities as names in certificates.
//!
//! A name is a DNS name below `.ashlar.internal` (`internal` is reserved for private use), in the subject alternative
//! names, so that every TLS library can check it: `NODE.node.CLUSTER`, or `CERTIFICATE.NAME.volumes.CLUSTER` and
//! `CERTIFICATE.NAME.admin.CLUSTER` for clients, where NODE, CLUSTER and CERTIFICATE are UUIDs.

use std::fmt;

use ashlar_core::records::{ClientRole, ClusterId, check_client_name};
use ashlar_core::units::NodeId;
use rustls::pki_types::CertificateDer;
use thiserror::Error;
use uuid::Uuid;

const DOMAIN: &str = "ashlar.internal";

/// Who holds a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// A daemon.
    Node(NodeId),
    /// A user of volumes, or somebody who administers the cluster.
    Client {
        /// The name it was issued for.
        name: String,
        /// Which of the certificates of that name.
        certificate: Uuid,
        /// What it is for.
        role: ClientRole,
    },
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Node(node) => write!(f, "node {}", node.0),
            Peer::Client { name, .. } => write!(f, "client {name}"),
        }
    }
}

/// A certificate that names nobody we could know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PeerError {
    /// Not a certificate.
    #[error("the certificate cannot be read")]
    Unreadable,
    /// It has no name, or several, of this cluster.
    #[error("the certificate does not name one identity of this cluster")]
    NotOne,
}

impl Peer {
    /// Its name in a certificate of `cluster`.
    pub fn dns_name(&self, cluster: ClusterId) -> String {
        let cluster = cluster.0;
        match self {
            Peer::Node(node) => format!("{}.node.{cluster}.{DOMAIN}", node.0),
            Peer::Client {
                name,
                certificate,
                role,
            } => format!("{certificate}.{name}.{}.{cluster}.{DOMAIN}", word(*role)),
        }
    }

    /// Reads a name. `None`: not a name of ours.
    fn parse(dns_name: &str) -> Option<(Peer, ClusterId)> {
        let rest = dns_name.strip_suffix(DOMAIN)?.strip_suffix('.')?;
        let (rest, cluster) = rest.rsplit_once('.')?;
        let (rest, kind) = rest.rsplit_once('.')?;
        let peer = match kind {
            "node" => Peer::Node(NodeId(uuid(rest)?)),
            _ => {
                let role = [ClientRole::Volumes, ClientRole::Admin]
                    .into_iter()
                    .find(|role| word(*role) == kind)?;
                let (certificate, name) = rest.split_once('.')?;
                check_client_name(name).ok()?;
                Peer::Client {
                    name: name.to_owned(),
                    certificate: uuid(certificate)?,
                    role,
                }
            }
        };
        Some((peer, ClusterId(uuid(cluster)?)))
    }
}

fn word(role: ClientRole) -> &'static str {
    match role {
        ClientRole::Volumes => "volumes",
        ClientRole::Admin => "admin",
    }
}

/// A UUID in its one canonical form.
fn uuid(text: &str) -> Option<Uuid> {
    let parsed = Uuid::try_parse(text).ok()?;
    (parsed.to_string() == text).then_some(parsed)
}

/// The identity in a certificate, and its cluster. Whether the certificate is to be believed is not looked at.
pub fn peer_in(certificate: &CertificateDer<'_>) -> Result<(Peer, ClusterId), PeerError> {
    let parsed = webpki::EndEntityCert::try_from(certificate).map_err(|_| PeerError::Unreadable)?;
    let mut names = parsed.valid_dns_names().filter_map(Peer::parse);
    match (names.next(), names.next()) {
        (Some(found), None) => Ok(found),
        _ => Err(PeerError::NotOne),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_are_not() {
        let cluster = ClusterId(Uuid::from_u128(9));
        let peers = [
            Peer::Node(NodeId(Uuid::from_u128(1))),
            Peer::Client {
                name: "node".to_owned(),
                certificate: Uuid::from_u128(2),
                role: ClientRole::Volumes,
            },
            Peer::Client {
                name: "a-b".to_owned(),
                certificate: Uuid::from_u128(2),
                role: ClientRole::Admin,
            },
        ];
        for peer in peers {
            assert_eq!(
                Peer::parse(&peer.dns_name(cluster)),
                Some((peer.clone(), cluster))
            );
            assert_eq!(Peer::parse(&format!("x.{}", peer.dns_name(cluster))), None);
        }
        for other in [
            "",
            "localhost",
            "ashlar.internal",
            ".node.x.ashlar.internal",
        ] {
            assert_eq!(Peer::parse(other), None, "{other}");
        }
    }
}
