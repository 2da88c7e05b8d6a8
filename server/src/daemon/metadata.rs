//! Opens what keeps the records: SQLite in the data directory, and etcd when the node is one of a cluster.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ashlar_core::records::keys;
use ashlar_core::units::NodeId;
use thiserror::Error;

use crate::config::{Config, EtcdAccess, Metadata};
use crate::meta::{
    ETCD_TIMEOUT_DEFAULT, EtcdConfig, EtcdConfigError, EtcdStore, EtcdTls, MetadataError,
    MetadataStore, OpenError, SqliteStore,
};
use crate::volumes::node_record;

/// The metadata in the data directory.
const METADATA_FILE: &str = "metadata.db";

/// Why the metadata cannot be opened.
#[derive(Debug, Error)]
pub enum MetadataOpenError {
    /// The file in the data directory.
    #[error(transparent)]
    Sqlite(#[from] OpenError),
    /// How etcd is to be reached.
    #[error(transparent)]
    Etcd(#[from] EtcdConfigError),
    /// A certificate or key for etcd.
    #[error("--{setting} {}: {source}", path.display())]
    File {
        /// Which setting names it.
        setting: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Records that would be left behind.
    #[error(
        "{} holds volumes of this node alone; `ashlar cluster init` moves them into the cluster, or start without --metadata etcd",
        path.display()
    )]
    NotMoved {
        /// The file.
        path: PathBuf,
    },
    /// A record.
    #[error(transparent)]
    Records(#[from] MetadataError),
}

/// What keeps the records.
pub(crate) struct OpenMetadata {
    /// The records of volumes, stores and nodes.
    pub(crate) records: Arc<dyn MetadataStore>,
    /// The node's own database: what no other node needs to know, and what must be there when the cluster's is not.
    pub(crate) local: Arc<dyn MetadataStore>,
    /// This daemon.
    pub(crate) node: NodeId,
    /// Whether others share the records.
    pub(crate) is_shared: bool,
}

impl OpenMetadata {
    /// Opens it. The node's own identity is kept in the data directory in either case.
    pub(crate) async fn open(config: &Config) -> Result<OpenMetadata, MetadataOpenError> {
        let path = config.data_dir.join(METADATA_FILE);
        let local: Arc<dyn MetadataStore> = Arc::new(SqliteStore::open(&path)?);
        let node = node_record(&*local).await?.id;
        let Metadata::Etcd(access) = &config.metadata else {
            return Ok(OpenMetadata {
                records: local.clone(),
                local,
                node,
                is_shared: false,
            });
        };
        if !local.list(keys::VOLUMES).await?.entries.is_empty() {
            return Err(MetadataOpenError::NotMoved { path });
        }
        let records = connect(access)?;
        // Told now, in one sentence, and not by whatever asks first.
        records.get(keys::NEXT_LAYER).await?;
        Ok(OpenMetadata {
            records: Arc::new(records),
            local,
            node,
            is_shared: true,
        })
    }
}

/// The store in etcd that the settings mean. Needs a tokio runtime around it; connects when it is first asked.
pub(crate) fn connect(access: &EtcdAccess) -> Result<EtcdStore, MetadataOpenError> {
    let authority = access.authority.as_deref();
    let authority = authority.map(|path| read("etcd-ca", path)).transpose()?;
    let identity = match (&access.certificate, &access.key) {
        (Some(certificate), Some(key)) => {
            Some((read("etcd-cert", certificate)?, read("etcd-key", key)?))
        }
        _ => None,
    };
    Ok(EtcdStore::new(EtcdConfig {
        endpoints: access.endpoints.clone(),
        prefix: access.prefix.clone(),
        request_timeout: ETCD_TIMEOUT_DEFAULT,
        tls: EtcdTls {
            authority,
            identity,
        },
    })?)
}

fn read(setting: &'static str, path: &Path) -> Result<Vec<u8>, MetadataOpenError> {
    std::fs::read(path).map_err(|source| MetadataOpenError::File {
        setting,
        path: path.to_owned(),
        source,
    })
}
