//! The members of an etcd cluster: connections, deadlines, which one to ask, and whether it is still the same etcd.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock};
use std::time::Duration;

use ashlar_core::records::Revision;
use ashlar_proto::etcd::kv_client::KvClient;
use ashlar_proto::etcd::watch_client::WatchClient;
use ashlar_proto::etcd::{
    KeyValue, RangeRequest, ResponseHeader, TxnRequest, WatchRequest, WatchResponse,
};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Status, Streaming};

use super::failure::Failure;
use super::{EtcdConfig, EtcdConfigError};

/// Largest message taken from etcd: [`super::PAGE_KEYS`] records of the largest size, with some room. One transaction's
/// events are less.
pub(super) const MESSAGE_MAX_BYTES: usize = 160 << 20;
/// How often a connection with a request or a watch on it is probed. etcd counts probes closer than 5 s as abuse
/// (`--grpc-keepalive-min-time`).
const PROBE_INTERVAL: Duration = Duration::from_secs(10);
/// How long a probe may stay without an answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest that making a connection takes before the next member is tried.
const CONNECT_TIMEOUT_MAX: Duration = Duration::from_secs(2);
/// Least time a member is given to answer a read before another one is asked.
const ATTEMPT_MIN: Duration = Duration::from_millis(500);
/// Pause after every member has failed.
const ROUND_PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct Member {
    /// Its endpoint, for messages.
    name: String,
    endpoint: Endpoint,
    channel: RwLock<Channel>,
}

impl Member {
    fn channel(&self) -> Channel {
        self.channel
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// What was asked over the connection got no answer: the next request has one of its own. One that was cut off for a
    /// while would otherwise be waited for until TCP sends again, long after the way is free.
    fn connect_anew(&self) {
        let mut channel = self.channel.write().unwrap_or_else(PoisonError::into_inner);
        *channel = self.endpoint.connect_lazy();
    }
}

/// Every endpoint that was configured.
#[derive(Debug)]
pub(super) struct Members {
    members: Vec<Member>,
    /// The one that answered last.
    preferred: AtomicUsize,
    request_timeout: Duration,
    /// The etcd cluster that answered first; another one is not listened to.
    cluster: OnceLock<u64>,
    /// The largest revision that was answered.
    revision: AtomicU64,
}

/// What a range holds.
pub(super) struct Found {
    pub(super) found: Vec<KeyValue>,
    /// The limit cut it off.
    pub(super) more: bool,
    /// Of the whole etcd.
    pub(super) revision: Revision,
}

/// An open stream of a watch. etcd ends the watch when `_requests` goes.
pub(super) struct Events {
    pub(super) responses: Streaming<WatchResponse>,
    _requests: mpsc::Sender<WatchRequest>,
}

/// Whether a request may be sent again when it is not known what became of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Yes,
    No,
}

impl Members {
    pub(super) fn new(config: &EtcdConfig) -> Result<Members, EtcdConfigError> {
        let members = config
            .endpoints
            .iter()
            .map(|endpoint| member(endpoint, config))
            .collect::<Result<Vec<_>, _>>()?;
        if members.is_empty() {
            return Err(EtcdConfigError::Endpoint {
                endpoint: String::new(),
                reason: "at least one is needed".to_owned(),
            });
        }
        Ok(Members {
            members,
            preferred: AtomicUsize::new(0),
            request_timeout: config.request_timeout,
            cluster: OnceLock::new(),
            revision: AtomicU64::new(0),
        })
    }

    /// Reads a range, linearisably.
    pub(super) async fn range(&self, request: RangeRequest) -> Result<Found, Failure> {
        let before = self.revision.load(Ordering::Acquire);
        let ask = |channel: Channel| {
            let request = asking(request.clone());
            async move {
                let client = KvClient::new(channel);
                let mut client = client.max_decoding_message_size(MESSAGE_MAX_BYTES);
                client.range(request).await.map(tonic::Response::into_inner)
            }
        };
        let (member, answer) = self.ask(Repeat::Yes, ask).await?;
        let revision = self.checked(member, answer.header, before)?;
        Ok(Found {
            found: answer.kvs,
            more: answer.more,
            revision,
        })
    }

    /// Carries a transaction out, at most once. Answers whether its conditions held, and the revision after it.
    pub(super) async fn transact(&self, request: TxnRequest) -> Result<(bool, Revision), Failure> {
        let before = self.revision.load(Ordering::Acquire);
        let ask = |channel: Channel| {
            let request = asking(request.clone());
            async move {
                let mut client = KvClient::new(channel);
                client.txn(request).await.map(tonic::Response::into_inner)
            }
        };
        let (member, answer) = self.ask(Repeat::No, ask).await?;
        let revision = self.checked(member, answer.header, before)?;
        Ok((answer.succeeded, revision))
    }

    /// Opens a stream and sends `request` on it. The answer is the stream's first.
    pub(super) async fn watch(
        &self,
        request: WatchRequest,
    ) -> Result<(Events, WatchResponse), Failure> {
        let before = self.revision.load(Ordering::Acquire);
        let ask = |channel: Channel| {
            let request = request.clone();
            async move {
                let (requests, outgoing) = mpsc::channel(1);
                // There is room for one.
                let _ = requests.try_send(request);
                let client = WatchClient::new(channel);
                let mut client = client.max_decoding_message_size(MESSAGE_MAX_BYTES);
                let outgoing = asking(ReceiverStream::new(outgoing));
                let mut responses = client.watch(outgoing).await?.into_inner();
                let first = responses.message().await?;
                let first =
                    first.ok_or_else(|| Status::unavailable("the watch ended as it began"))?;
                let events = Events {
                    responses,
                    _requests: requests,
                };
                Ok((events, first))
            }
        };
        let (member, (events, first)) = self.ask(Repeat::Yes, ask).await?;
        self.checked(member, first.header, before)?;
        Ok((events, first))
    }

    /// Asks one member after the other, beginning with the one that answered last, until one has answered or time is up.
    /// Where repeating is not allowed, the next one is asked only if the one before certainly did nothing.
    async fn ask<T, F>(
        &self,
        repeat: Repeat,
        call: impl Fn(Channel) -> F,
    ) -> Result<(usize, T), Failure>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let count = self.members.len();
        let deadline = Instant::now() + self.request_timeout;
        let share = (self.request_timeout / count as u32).max(ATTEMPT_MIN);
        let mut last = Failure::NotDone {
            reason: "etcd was not asked in time".to_owned(),
        };
        loop {
            let first = self.preferred.load(Ordering::Relaxed);
            for offset in 0..count {
                let index = (first + offset) % count;
                let member = &self.members[index];
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(last);
                }
                let attempt = match repeat {
                    // With some time left to ask again over another connection.
                    Repeat::Yes => left.min(share.min((left / 2).max(ATTEMPT_MIN))),
                    Repeat::No => left,
                };
                let failure = match timeout(attempt, call(member.channel())).await {
                    Ok(Ok(answer)) => {
                        self.preferred.store(index, Ordering::Relaxed);
                        return Ok((index, answer));
                    }
                    Ok(Err(status)) => Failure::from_status(&member.name, &status),
                    Err(_) => {
                        member.connect_anew();
                        Failure::Unsure {
                            reason: format!("etcd at {} did not answer in time", member.name),
                        }
                    }
                };
                let is_over = match (&failure, repeat) {
                    (Failure::Unsure { .. }, Repeat::No) => true,
                    (failure, _) => !failure.may_pass(),
                };
                if is_over {
                    return Err(failure);
                }
                last = failure;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            sleep(ROUND_PAUSE.min(left)).await;
        }
    }

    /// The revision of an answer, if the answer is from the etcd that answered before and has not gone back behind
    /// `before`. Anything else is another etcd, or one that was restored from a backup: what is remembered of revisions
    /// means nothing there.
    fn checked(
        &self,
        member: usize,
        header: Option<ResponseHeader>,
        before: u64,
    ) -> Result<Revision, Failure> {
        let name = &self.members[member].name;
        let unsure = |reason: String| Failure::Unsure { reason };
        let header = header.ok_or_else(|| unsure(format!("etcd at {name}: no header")))?;
        let known = *self.cluster.get_or_init(|| header.cluster_id);
        if known != header.cluster_id {
            return Err(unsure(format!(
                "etcd at {name} belongs to cluster {:x} and not to {known:x}; list members of one etcd cluster only",
                header.cluster_id
            )));
        }
        let revision = u64::try_from(header.revision).unwrap_or(0);
        if revision < before {
            return Err(unsure(format!(
                "etcd at {name} has gone back from revision {before} to {revision}; if it was restored from a backup, restart ashlard"
            )));
        }
        self.revision.fetch_max(revision, Ordering::AcqRel);
        Ok(Revision(revision))
    }

    /// The name of the member that answered last.
    pub(super) fn preferred_name(&self) -> &str {
        &self.members[self.preferred.load(Ordering::Relaxed) % self.members.len()].name
    }

    /// Prefers another member from now on.
    pub(super) fn pass_over_preferred(&self) {
        self.preferred.fetch_add(1, Ordering::Relaxed);
    }
}

/// A request that a member without a leader refuses at once, instead of keeping it until an election.
fn asking<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let yes = tonic::metadata::MetadataValue::from_static("true");
    request.metadata_mut().insert("hasleader", yes);
    request
}

fn member(endpoint: &str, config: &EtcdConfig) -> Result<Member, EtcdConfigError> {
    let wrong = |reason: String| EtcdConfigError::Endpoint {
        endpoint: endpoint.to_owned(),
        reason,
    };
    let built = Endpoint::from_shared(endpoint.to_owned()).map_err(|e| wrong(e.to_string()))?;
    let scheme = built.uri().scheme_str().unwrap_or_default().to_owned();
    if !matches!(scheme.as_str(), "http" | "https") {
        return Err(wrong("it begins with http:// or https://".to_owned()));
    }
    if built.uri().port_u16().is_none() || built.uri().path().len() > 1 {
        return Err(wrong("host and port, and nothing after them".to_owned()));
    }
    let share = config.request_timeout / (2 * config.endpoints.len() as u32);
    let connect_timeout = share.min(CONNECT_TIMEOUT_MAX);
    let mut built = built
        .connect_timeout(connect_timeout)
        .http2_keep_alive_interval(PROBE_INTERVAL)
        .keep_alive_timeout(PROBE_TIMEOUT)
        .keep_alive_while_idle(false)
        .tcp_nodelay(true);
    if scheme == "https" {
        let mut tls = ClientTlsConfig::new().timeout(connect_timeout);
        if let Some(authority) = &config.tls.authority {
            tls = tls.ca_certificate(Certificate::from_pem(authority));
        }
        if let Some((chain, key)) = &config.tls.identity {
            tls = tls.identity(Identity::from_pem(chain, key));
        }
        built = built
            .tls_config(tls)
            .map_err(|error| EtcdConfigError::Tls {
                reason: std::error::Error::source(&error)
                    .map_or_else(|| error.to_string(), ToString::to_string),
            })?;
    }
    Ok(Member {
        name: endpoint.to_owned(),
        channel: RwLock::new(built.connect_lazy()),
        endpoint: built,
    })
}
