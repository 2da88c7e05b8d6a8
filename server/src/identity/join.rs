//! A node joins: with a token, to a node that holds the key of the authority.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use ashlar_core::records::ClusterId;
use ashlar_core::units::NodeId;
use ashlar_proto::cluster::JoinRequest;
use ashlar_proto::cluster::cluster_client::ClusterClient;
use rustls::pki_types::CertificateDer;
use thiserror::Error;
use tonic::transport::{ClientTlsConfig, Endpoint};
use uuid::Uuid;

use super::authority::Lifetime;
use super::files::{self, IdentityFile, IdentityFileError};
use super::tls::FingerprintVerifier;
use super::token::Token;
use super::{IdentityError, sha256_hex};
use crate::config::HostPort;
use crate::volumes::unix_ms;

/// Longest that joining takes; another attempt is made at the next start.
const TIMEOUT: Duration = Duration::from_secs(20);

/// `TOKEN@HOST:PORT`.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinSetting {
    /// What lets this node in.
    pub token: Token,
    /// The admin interface of a node that signs certificates.
    pub address: HostPort,
}

/// Text that is none. It is not repeated: it may hold a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("that is not TOKEN@HOST:PORT as `ashlar cluster token` prints it")]
pub struct JoinSettingError;

impl FromStr for JoinSetting {
    type Err = JoinSettingError;

    fn from_str(text: &str) -> Result<JoinSetting, JoinSettingError> {
        let (token, address) = text.split_once('@').ok_or(JoinSettingError)?;
        Ok(JoinSetting {
            token: token.parse().map_err(|_| JoinSettingError)?,
            address: address.parse().map_err(|_| JoinSettingError)?,
        })
    }
}

impl fmt::Debug for JoinSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinSetting(…@{})", self.address)
    }
}

/// Why a node did not join.
#[derive(Debug, Error)]
pub enum JoiningError {
    /// The other node was not reached, or is none of the token's cluster.
    #[error("cannot join the cluster at {address}: {reason}")]
    Unreachable {
        /// Who was asked.
        address: HostPort,
        /// What happened.
        reason: String,
    },
    /// It said no.
    #[error("{address} refuses to let this node join: {reason}")]
    Refused {
        /// Who was asked.
        address: HostPort,
        /// Its words.
        reason: String,
    },
    /// What it answered makes no sense.
    #[error("{address} answered something that cannot be used: {reason}")]
    Answer {
        /// Who was asked.
        address: HostPort,
        /// What is wrong.
        reason: String,
    },
    /// The identity cannot be kept.
    #[error(transparent)]
    Files(#[from] IdentityFileError),
}

/// Joins, and writes the identity down. What was written by an attempt whose answer was lost is used again.
pub async fn join(
    setting: &JoinSetting,
    data_dir: &Path,
    node: NodeId,
    address: Option<String>,
    names: Vec<String>,
    labels: BTreeMap<String, String>,
) -> Result<ClusterId, JoiningError> {
    let key = files::pending_key(data_dir)?;
    let asked = || setting.address.clone();
    let unreachable = |reason: String| JoiningError::Unreachable {
        address: asked(),
        reason,
    };
    let verifier = FingerprintVerifier::new(setting.token.authority_sha256());
    let endpoint = Endpoint::from_shared(format!("https://{}", setting.address))
        .and_then(|endpoint| {
            endpoint
                .connect_timeout(TIMEOUT)
                .timeout(TIMEOUT)
                .tls_config_with_verifier(ClientTlsConfig::new().timeout(TIMEOUT), verifier)
        })
        .map_err(|error| unreachable(innermost(&error)))?;
    let channel = endpoint
        .connect()
        .await
        .map_err(|error| unreachable(innermost(&error)))?;
    let request = JoinRequest {
        secret: setting.token.secret().to_owned(),
        node_id: node.0.to_string(),
        public_key: key.public_key_raw().to_vec(),
        address: address.unwrap_or_default(),
        names,
        labels: labels.into_iter().collect(),
    };
    let answer = ClusterClient::new(channel).join(request).await;
    let answer = answer.map_err(|status| JoiningError::Refused {
        address: asked(),
        reason: status.message().to_owned(),
    })?;
    let answer = answer.into_inner();
    let wrong = |reason: &str| JoiningError::Answer {
        address: asked(),
        reason: reason.to_owned(),
    };
    let cluster = Uuid::try_parse(&answer.cluster_id).map_err(|_| wrong("no cluster id"))?;
    let cluster = ClusterId(cluster);
    let authority = CertificateDer::from(answer.authority);
    if sha256_hex(&authority) != setting.token.authority_sha256() {
        return Err(wrong("another authority than the token's"));
    }
    let file = IdentityFile::new(
        cluster,
        node,
        &authority,
        &CertificateDer::from(answer.certificate),
        &key,
        Lifetime {
            issued_at_unix_ms: unix_ms(),
            expires_at_unix_ms: answer.expires_at_unix_ms,
        },
    );
    // Told apart from a certificate for another key before it replaces anything.
    file.credentials()
        .map_err(|error: IdentityError| wrong(&error.to_string()))?;
    file.write(data_dir)?;
    files::forget_pending_key(data_dir);
    Ok(cluster)
}

/// The library's own text is "transport error"; the innermost cause is the one that helps.
pub(super) fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
