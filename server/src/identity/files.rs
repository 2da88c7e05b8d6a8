//! The identity of a node on its disk: `identity/` in the data directory, for its owner only.
//!
//! * `identity.json`: certificate, private key and the authority's certificate, in one file that is replaced whole, so
//!   that a crash never leaves a key with the certificate of another;
//! * `ca-key.pem` and `ca-cert.pem`: the authority's, on nodes that sign;
//! * `pending-key.pem`: the key of a node that asked to join and may not have had its answer.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ashlar_core::records::ClusterId;
use ashlar_core::units::NodeId;
use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::authority::{self, Lifetime};
use super::{Authority, IdentityError};

const DIRECTORY: &str = "identity";
const IDENTITY: &str = "identity.json";
const AUTHORITY_KEY: &str = "ca-key.pem";
const AUTHORITY_CERTIFICATE: &str = "ca-cert.pem";
const PENDING_KEY: &str = "pending-key.pem";

/// Why the identity cannot be read or written.
#[derive(Debug, Error)]
pub enum IdentityFileError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What is in it.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// What a node keeps of its identity.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityFile {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
    /// Of the certificate.
    pub lifetime: Lifetime,
    /// PEM.
    authority: String,
    /// PEM.
    certificate: String,
    /// PEM.
    key: String,
}

// A private key is never printed.
impl std::fmt::Debug for IdentityFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IdentityFile")
            .field("cluster", &self.cluster)
            .field("node", &self.node)
            .field("lifetime", &self.lifetime)
            .finish_non_exhaustive()
    }
}

impl IdentityFile {
    /// An identity of a key and what was signed for it.
    pub fn new(
        cluster: ClusterId,
        node: NodeId,
        authority: &CertificateDer<'_>,
        certificate: &CertificateDer<'_>,
        key: &KeyPair,
        lifetime: Lifetime,
    ) -> IdentityFile {
        IdentityFile {
            cluster,
            node,
            lifetime,
            authority: to_pem(authority),
            certificate: to_pem(certificate),
            key: key.serialize_pem(),
        }
    }

    /// Reads it; `None` when the node has no identity yet.
    pub fn read(data_dir: &Path) -> Result<Option<IdentityFile>, IdentityFileError> {
        let Some(text) = read(&data_dir.join(DIRECTORY).join(IDENTITY))? else {
            return Ok(None);
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|error| unusable(format!("{IDENTITY}: {error}")).into())
    }

    /// Writes it, durably and whole.
    pub fn write(&self, data_dir: &Path) -> Result<(), IdentityFileError> {
        // Strings and numbers: nothing JSON lacks.
        let text = serde_json::to_string(self).expect("an identity is JSON");
        write(data_dir, IDENTITY, &text)
    }

    /// The authority's certificate.
    pub fn authority(&self) -> Result<CertificateDer<'static>, IdentityError> {
        parse(&self.authority)
    }

    /// The certificate in PEM.
    pub(super) fn certificate_pem(&self) -> &str {
        &self.certificate
    }

    /// The private key in PEM.
    pub(super) fn key_pem(&self) -> &str {
        &self.key
    }

    /// The key with its chain: the certificate, and the authority's, by whose digest a node that joins knows us.
    pub fn credentials(&self) -> Result<Arc<CertifiedKey>, IdentityError> {
        let key = KeyPair::from_pem(&self.key).map_err(|error| unusable(error.to_string()))?;
        let chain = vec![parse(&self.certificate)?, self.authority()?];
        let certified = authority::certified(&key, chain)?;
        match certified.keys_match() {
            Ok(()) => Ok(Arc::new(certified)),
            Err(_) => Err(unusable(
                "key and certificate do not go together".to_owned(),
            )),
        }
    }
}

fn unusable(reason: String) -> IdentityError {
    IdentityError::Unusable { reason }
}

fn parse(pem: &str) -> Result<CertificateDer<'static>, IdentityError> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| unusable(format!("a certificate cannot be read: {error}")))
}

/// A certificate in PEM.
pub(crate) fn to_pem(certificate: &CertificateDer<'_>) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", certificate.to_vec()))
}

/// The authority this data directory holds; `None` when it holds none.
pub(super) fn own_authority(
    data_dir: &Path,
    cluster: ClusterId,
) -> Result<Option<Authority>, IdentityFileError> {
    let path = data_dir.join(DIRECTORY).join(AUTHORITY_CERTIFICATE);
    let Some(certificate) = read(&path)? else {
        return Ok(None);
    };
    Ok(Authority::load(cluster, &parse(&certificate)?, data_dir)?)
}

/// The key first: a certificate without its key would be of no use.
pub(super) fn write_authority(
    data_dir: &Path,
    key: &str,
    certificate: &str,
) -> Result<(), IdentityFileError> {
    write(data_dir, AUTHORITY_KEY, key)?;
    write(data_dir, AUTHORITY_CERTIFICATE, certificate)
}

pub(super) fn read_authority_key(data_dir: &Path) -> Result<Option<String>, IdentityFileError> {
    read(&data_dir.join(DIRECTORY).join(AUTHORITY_KEY))
}

/// The key to join with: the one of an earlier attempt, or a new one.
pub(super) fn pending_key(data_dir: &Path) -> Result<KeyPair, IdentityFileError> {
    let path = data_dir.join(DIRECTORY).join(PENDING_KEY);
    if let Some(pem) = read(&path)? {
        return KeyPair::from_pem(&pem).map_err(|error| unusable(error.to_string()).into());
    }
    let key = KeyPair::generate().map_err(|error| unusable(error.to_string()))?;
    write(data_dir, PENDING_KEY, &key.serialize_pem())?;
    Ok(key)
}

/// Forgets the key of an attempt that has come to its end.
pub(super) fn forget_pending_key(data_dir: &Path) {
    let _ = std::fs::remove_file(data_dir.join(DIRECTORY).join(PENDING_KEY));
}

fn read(path: &Path) -> Result<Option<String>, IdentityFileError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(IdentityFileError::Io {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Replaces a file whole: written beside it, synced, renamed over it, and the directory synced.
fn write(data_dir: &Path, name: &str, text: &str) -> Result<(), IdentityFileError> {
    let directory = data_dir.join(DIRECTORY);
    write_private(&directory, name, text).map_err(|source| IdentityFileError::Io {
        path: directory.join(name),
        source,
    })
}

/// Writes a file that only its owner can read into a directory that only its owner can enter, durably and whole.
pub(crate) fn write_private(directory: &Path, name: &str, text: &str) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    let beside = directory.join(format!(".{name}.new"));
    // One that a crash left behind may have other permissions.
    let _ = std::fs::remove_file(&beside);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&beside, directory.join(name))?;
    File::open(directory)?.sync_all()
}
