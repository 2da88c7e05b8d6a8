//! Who is who in a cluster: the certificate authority, certificates of nodes and clients, join tokens, and whom to let in.
//!
//! Every identity is a name in a certificate that the cluster's own authority signed, and a record in the metadata store.
//! Both are needed: the certificate is checked in the TLS handshake, and the record, which every daemon watches, says
//! whether its holder is still one of us ([`Trust`]). Removing a node or revoking a client changes one record; from then
//! on handshakes fail, and connections that were open are cut ([`Sessions`]).
//!
//! Private keys are files that only their owner can read (0600); they are never logged and never leave their machine.

mod authority;
mod channel;
mod files;
mod init;
mod join;
mod names;
mod renew;
mod sessions;
mod tls;
mod token;
mod trust;

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use ashlar_core::records::ClusterId;
use ashlar_core::units::NodeId;
use aws_lc_rs::digest::{SHA256, digest};
use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;
use thiserror::Error;

pub use authority::{Authority, Lifetime};
pub use files::{IdentityFile, IdentityFileError};
pub(crate) use files::{to_pem, write_private};
pub use init::{InitError, Initialised, Initialising, initialise};
pub use join::{JoinSetting, JoinSettingError, JoiningError, join};
pub use names::{Peer, PeerError, peer_in};
pub use renew::keep_renewed;
pub use sessions::{Session, Sessions};
pub use tls::{Admitted, LinkClient};
pub use token::{Token, TokenError};
pub(crate) use trust::member;
pub use trust::{Trust, TrustError};

/// Something of this node's identity that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum IdentityError {
    /// Key and certificate do not go together, or the library refuses them.
    #[error("the identity of this node cannot be used: {reason}")]
    Unusable {
        /// Why.
        reason: String,
    },
    /// This node has no key of the authority.
    #[error("this node does not hold the key of the cluster's authority; ask {holders}")]
    NoAuthority {
        /// Who does.
        holders: String,
    },
}

/// The identity of this node in its cluster.
pub struct Identity {
    cluster: ClusterId,
    node: NodeId,
    authority_certificate: CertificateDer<'static>,
    /// Present where certificates are signed.
    authority: Option<Authority>,
    current: RwLock<Current>,
    trust: Arc<Trust>,
    sessions: Arc<Sessions>,
    data_dir: PathBuf,
}

/// What changes when the certificate is renewed.
#[derive(Clone)]
struct Current {
    credentials: Arc<CertifiedKey>,
    lifetime: Lifetime,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("cluster", &self.cluster)
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// The identity in `file`, and the authority's key if the data directory has it.
    pub fn new(
        file: &IdentityFile,
        data_dir: PathBuf,
        trust: Arc<Trust>,
        sessions: Arc<Sessions>,
    ) -> Result<Identity, IdentityError> {
        let authority_certificate = file.authority()?;
        let authority = Authority::load(file.cluster, &authority_certificate, &data_dir)?;
        Ok(Identity {
            cluster: file.cluster,
            node: file.node,
            authority,
            current: RwLock::new(Current {
                credentials: file.credentials()?,
                lifetime: file.lifetime,
            }),
            authority_certificate,
            trust,
            sessions,
            data_dir,
        })
    }

    /// The cluster.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The certificate of the cluster's authority.
    pub fn authority_certificate(&self) -> &CertificateDer<'static> {
        &self.authority_certificate
    }

    /// What signs certificates, where this node does.
    pub fn authority(&self) -> Option<&Authority> {
        self.authority.as_ref()
    }

    /// Whom to let in.
    pub fn trust(&self) -> &Arc<Trust> {
        &self.trust
    }

    /// The open connections of those who were let in.
    pub fn sessions(&self) -> &Arc<Sessions> {
        &self.sessions
    }

    /// When this node's certificate ends, milliseconds since 1970-01-01 UTC.
    pub fn expires_at_unix_ms(&self) -> u64 {
        self.current().lifetime.expires_at_unix_ms
    }

    fn current(&self) -> Current {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.clone()
    }

    /// Shows another certificate from the next handshake on.
    fn replace(&self, file: &IdentityFile) -> Result<(), IdentityError> {
        let renewed = Current {
            credentials: file.credentials()?,
            lifetime: file.lifetime,
        };
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = renewed;
        Ok(())
    }
}

/// SHA-256 in hexadecimal digits.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing into a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
