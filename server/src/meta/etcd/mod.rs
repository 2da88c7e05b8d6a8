//! The metadata store of a cluster: etcd, version 3.4 and later, over its v3 interface.
//!
//! Records lie under one prefix, so that clusters can share an etcd. Revisions are etcd's own: those of the whole etcd,
//! of which this store sees the changes under its prefix. Compare-and-swap is a transaction of etcd's that compares
//! `mod_revision`; reads are linearisable, whichever member answers.
//!
//! What is told apart with care is a change that certainly did not happen ([`MetadataError::Unavailable`]) from one of
//! which nobody knows ([`MetadataError::Unknown`]): see [`failure`].

mod failure;
mod members;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use ashlar_core::records::{Condition, Effect, Revision, Transaction};
use ashlar_proto::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use ashlar_proto::etcd::request_op::Request as Operation;
use ashlar_proto::etcd::{
    Compare, DeleteRangeRequest, KeyValue, PutRequest, RangeRequest, RequestOp, TxnRequest,
};
use async_trait::async_trait;
use thiserror::Error;
use tokio::sync::watch as state;

use super::{
    Entry, Listing, MetadataError, MetadataStore, Outcome, Watch, check_key, check_prefix,
    check_transaction,
};
use failure::Failure;
use members::Members;

/// Longest that one operation takes, whatever happens to etcd: an election takes about a second with etcd's defaults,
/// and a person at a command line waits this long without wondering.
pub const REQUEST_TIMEOUT_DEFAULT: Duration = Duration::from_secs(5);
/// Keys asked for in one message. With records of at most 1 MiB the answer stays below [`members::MESSAGE_MAX_BYTES`].
const PAGE_KEYS: i64 = 128;
/// How often a list begins anew because a compaction took the revision its first page was of. Compactions are minutes
/// apart.
const LIST_ATTEMPTS: u32 = 4;

/// Where etcd is and how it is spoken to.
#[derive(Clone, Debug)]
pub struct EtcdConfig {
    /// `http://HOST:PORT` or `https://HOST:PORT`, at least one; any member of one etcd cluster will do.
    pub endpoints: Vec<String>,
    /// What every key begins with; ends with a slash.
    pub prefix: String,
    /// Longest that one operation takes.
    pub request_timeout: Duration,
    /// For `https` endpoints.
    pub tls: EtcdTls,
}

/// Certificates for etcd, in PEM.
#[derive(Clone, Default)]
pub struct EtcdTls {
    /// Whom to believe.
    pub authority: Option<Vec<u8>>,
    /// Who we are: certificate chain and private key.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

// A private key is never printed.
impl std::fmt::Debug for EtcdTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdTls")
            .field("authority", &self.authority.is_some())
            .field("identity", &self.identity.is_some())
            .finish()
    }
}

/// Endpoints or certificates that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EtcdConfigError {
    /// Not `http://HOST:PORT` or `https://HOST:PORT`.
    #[error("{endpoint:?} is not an etcd endpoint such as http://10.0.0.1:2379: {reason}")]
    Endpoint {
        /// What was given.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The certificates do not go together or cannot be read.
    #[error("the certificates for etcd cannot be used: {reason}")]
    Tls {
        /// What is wrong with them.
        reason: String,
    },
}

/// A cluster's metadata in etcd. Dropping it ends its watches.
#[derive(Debug)]
pub struct EtcdStore {
    client: Arc<Client>,
    /// Watches end when this goes.
    _open: state::Sender<()>,
    open: state::Receiver<()>,
}

/// What the store and its watches share.
#[derive(Debug)]
struct Client {
    members: Members,
    prefix: String,
}

impl EtcdStore {
    /// A store that connects when it is first asked. Needs a tokio runtime around it.
    pub fn new(config: EtcdConfig) -> Result<EtcdStore, EtcdConfigError> {
        let (sender, open) = state::channel(());
        Ok(EtcdStore {
            client: Arc::new(Client {
                members: Members::new(&config)?,
                prefix: config.prefix,
            }),
            _open: sender,
            open,
        })
    }
}

/// The end of the range of every key that begins with `prefix`. Keys are printable ASCII, so the last byte can be raised.
fn range_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// A revision of ours as etcd's.
fn to_etcd(revision: Revision) -> i64 {
    // A revision comes from etcd, or from a caller who made it up, for whom no change will be found either.
    i64::try_from(revision.0).unwrap_or(i64::MAX)
}

fn from_etcd(revision: i64) -> Revision {
    Revision(u64::try_from(revision).unwrap_or(0))
}

impl Client {
    fn key(&self, key: &str) -> Vec<u8> {
        format!("{}{key}", self.prefix).into_bytes()
    }

    /// One of our keys without the prefix; `None` for what somebody else put there under a key that is none of ours.
    fn own_key(&self, key: &[u8]) -> Option<String> {
        let key = std::str::from_utf8(key).ok()?;
        Some(key.strip_prefix(&self.prefix)?.to_owned())
    }

    fn entry(&self, found: KeyValue) -> Option<Entry> {
        Some(Entry {
            key: self.own_key(&found.key)?,
            value: found.value,
            changed_at: from_etcd(found.mod_revision),
        })
    }

    /// All entries under `prefix` as of one revision, a page at a time.
    async fn pages(&self, prefix: &str) -> Result<Listing, Failure> {
        let start = self.key(prefix);
        let mut request = RangeRequest {
            range_end: range_end(&start),
            key: start,
            limit: PAGE_KEYS,
            ..RangeRequest::default()
        };
        let mut entries = Vec::new();
        loop {
            let answer = self.members.range(request.clone()).await?;
            if request.revision == 0 {
                request.revision = to_etcd(answer.revision);
            }
            let more = answer.more;
            if let Some(last) = answer.found.last() {
                request.key = last.key.clone();
                request.key.push(0);
            }
            let is_empty = answer.found.is_empty();
            entries.extend(answer.found.into_iter().filter_map(|kv| self.entry(kv)));
            if !more || is_empty {
                return Ok(Listing {
                    entries,
                    revision: from_etcd(request.revision),
                });
            }
        }
    }

    fn transaction(&self, transaction: Transaction) -> TxnRequest {
        let compare = transaction.conditions.iter().map(|condition| {
            let (target, union) = match condition {
                Condition::Absent { .. } => (CompareTarget::Create, TargetUnion::CreateRevision(0)),
                Condition::Unchanged { changed_at, .. } => {
                    // For etcd a key that is not there has revision zero; for us nothing was ever written at zero.
                    let revision = match to_etcd(*changed_at) {
                        0 => -1,
                        revision => revision,
                    };
                    (CompareTarget::Mod, TargetUnion::ModRevision(revision))
                }
            };
            Compare {
                result: CompareResult::Equal.into(),
                target: target.into(),
                key: self.key(condition.key()),
                target_union: Some(union),
            }
        });
        let compare = compare.collect();
        let success = transaction.effects.into_iter().map(|effect| {
            let key = self.key(effect.key());
            let operation = match effect {
                Effect::Put { value, .. } => Operation::RequestPut(PutRequest { key, value }),
                Effect::Delete { .. } => Operation::RequestDeleteRange(DeleteRangeRequest { key }),
            };
            RequestOp {
                request: Some(operation),
            }
        });
        TxnRequest {
            compare,
            success: success.collect(),
        }
    }
}

#[async_trait]
impl MetadataStore for EtcdStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, MetadataError> {
        check_key(key)?;
        let request = RangeRequest {
            key: self.client.key(key),
            ..RangeRequest::default()
        };
        let answer = self.client.members.range(request).await;
        let mut found = answer.map_err(Failure::of_a_read)?.found;
        Ok(found.pop().and_then(|kv| self.client.entry(kv)))
    }

    async fn list(&self, prefix: &str) -> Result<Listing, MetadataError> {
        check_prefix(prefix)?;
        for _ in 1..LIST_ATTEMPTS {
            match self.client.pages(prefix).await {
                Err(Failure::Compacted) => {}
                answered => return answered.map_err(Failure::of_a_read),
            }
        }
        self.client.pages(prefix).await.map_err(Failure::of_a_read)
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, MetadataError> {
        check_transaction(&transaction)?;
        let client = self.client.clone();
        let request = client.transaction(transaction);
        // A task of its own: whoever asked may go away, the transaction is not stopped half-way through a member's
        // answer for that.
        let committing = tokio::spawn(async move { client.members.transact(request).await });
        let answered = committing.await.map_err(|error| MetadataError::Unknown {
            reason: error.to_string(),
        })?;
        match answered {
            Ok((true, revision)) => Ok(Outcome::Committed(revision)),
            Ok((false, _)) => Ok(Outcome::Conflict),
            Err(failure) => Err(failure.of_a_change()),
        }
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, MetadataError> {
        check_prefix(prefix)?;
        watch::begin(&self.client, prefix, after, self.open.clone()).await
    }
}
