//! Watches that outlive connections and members.
//!
//! A watch is one stream to one member. When it breaks, a new one begins after the last revision that was seen, at
//! whichever member answers; nothing is seen twice and nothing is missed. Only when a compaction took changes that were
//! not seen yet does the watch end, as one that fell behind.

use std::sync::Arc;
use std::time::Duration;

use ashlar_core::records::Revision;
use ashlar_proto::etcd::event::EventType;
use ashlar_proto::etcd::watch_request::RequestUnion;
use ashlar_proto::etcd::{Event, RangeRequest, WatchCreateRequest, WatchRequest, WatchResponse};
use tokio::sync::{mpsc, watch as state};
use tokio::time::sleep;

use super::failure::Failure;
use super::members::Events;
use super::{Client, from_etcd, range_end, to_etcd};
use crate::meta::{Batch, Change, MetadataError, Watch, WatchEnd};

/// Batches a watcher may be behind before its watch ends; as with SQLite.
const WATCH_BATCHES: usize = 1024;
/// Pauses between attempts to take a watch up again.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Begins a watch; fails if it cannot begin after that revision.
pub(super) async fn begin(
    client: &Arc<Client>,
    prefix: &str,
    after: Revision,
    open: state::Receiver<()>,
) -> Result<Watch, MetadataError> {
    let prefix = client.key(prefix);
    let events = match open_after(client, &prefix, after).await {
        Ok(events) => events,
        Err(Failure::Compacted) => {
            let oldest = oldest(client, &prefix).await.map_err(Failure::of_a_read)?;
            return Err(MetadataError::Compacted { oldest });
        }
        Err(failure) => return Err(failure.of_a_read()),
    };
    let (sender, receiver) = mpsc::channel(WATCH_BATCHES + 1);
    let following = Following {
        client: client.clone(),
        prefix,
        after,
        sender,
    };
    tokio::spawn(following.run(events, open));
    Ok(Watch::new(receiver))
}

/// A stream of the changes after a revision, if all of them are kept.
///
/// etcd lets a watch begin one revision before the oldest that can be read, and older versions of it drop the mark of a
/// key that was deleted at the very revision of the compaction, which such a watch would miss. So the revision itself
/// has to be readable.
async fn open_after(client: &Client, prefix: &[u8], after: Revision) -> Result<Events, Failure> {
    let is_kept = RangeRequest {
        key: prefix.to_vec(),
        // An empty etcd is at revision one.
        revision: to_etcd(after).max(1),
        count_only: true,
        ..RangeRequest::default()
    };
    client.members.range(is_kept).await?;
    let (events, first) = client
        .members
        .watch(create(prefix, to_etcd(after) + 1))
        .await?;
    match first {
        WatchResponse {
            compact_revision: 1..,
            ..
        } => Err(Failure::Compacted),
        WatchResponse {
            created: true,
            canceled: false,
            ..
        } => Ok(events),
        other => Err(Failure::Unsure {
            reason: format!("etcd refused a watch: {}", other.cancel_reason),
        }),
    }
}

fn create(prefix: &[u8], start_revision: i64) -> WatchRequest {
    WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(WatchCreateRequest {
            key: prefix.to_vec(),
            range_end: range_end(prefix),
            start_revision,
            progress_notify: true,
        })),
    }
}

/// The revision of the last compaction, which only a watch is told that begins too early.
async fn oldest(client: &Client, prefix: &[u8]) -> Result<Revision, Failure> {
    let (mut events, mut answer) = client.members.watch(create(prefix, 1)).await?;
    while answer.compact_revision == 0 {
        let next = events.responses.message().await;
        let next =
            next.map_err(|status| Failure::from_status(client.members.preferred_name(), &status))?;
        answer = next.ok_or_else(|| Failure::Unsure {
            reason: "the watch ended before it said what is kept".to_owned(),
        })?;
    }
    Ok(from_etcd(answer.compact_revision))
}

/// How one stream ended.
enum Ended {
    /// Begin another one.
    Broken,
    /// The watch is over.
    Over(WatchEnd),
    /// Nobody listens any more.
    Unheard,
}

struct Following {
    client: Arc<Client>,
    /// With the store's own prefix.
    prefix: Vec<u8>,
    /// The last revision of which everything was sent.
    after: Revision,
    sender: mpsc::Sender<Result<Batch, WatchEnd>>,
}

impl Following {
    async fn run(mut self, mut events: Events, mut open: state::Receiver<()>) {
        let sender = self.sender.clone();
        tokio::select! {
            ended = async {
                loop {
                    match self.follow(&mut events).await {
                        Ended::Broken => {}
                        ended => break ended,
                    }
                    match self.take_up_again().await {
                        Ok(again) => events = again,
                        Err(end) => break Ended::Over(end),
                    }
                }
            } => {
                if let Ended::Over(end) = ended {
                    // One place is kept for this.
                    let _ = sender.try_send(Err(end));
                }
            }
            // The store was dropped; the receiver sees the channel close.
            _ = open.changed() => {}
            () = sender.closed() => {}
        }
    }

    /// Passes on what one stream says until it breaks.
    async fn follow(&mut self, events: &mut Events) -> Ended {
        loop {
            let response = match events.responses.message().await {
                Ok(Some(response)) => response,
                Ok(None) => return Ended::Broken,
                Err(status) => {
                    tracing::debug!(error = status.message(), "a watch on etcd broke");
                    return Ended::Broken;
                }
            };
            if response.compact_revision > 0 {
                return Ended::Over(WatchEnd::Lagged);
            }
            if response.canceled {
                tracing::debug!(reason = response.cancel_reason, "etcd ended a watch");
                return Ended::Broken;
            }
            let reached = response.header.map_or(0, |header| header.revision);
            let is_progress = response.events.is_empty() && !response.created;
            for batch in batches(&self.client, response.events) {
                if batch.revision <= self.after {
                    continue;
                }
                self.after = batch.revision;
                if self.sender.capacity() <= 1 {
                    return Ended::Over(WatchEnd::Lagged);
                }
                if self.sender.try_send(Ok(batch)).is_err() {
                    return Ended::Unheard;
                }
            }
            // Keeps a watch on quiet keys ahead of compactions.
            if is_progress {
                self.after = self.after.max(from_etcd(reached));
            }
        }
    }

    async fn take_up_again(&mut self) -> Result<Events, WatchEnd> {
        let mut pause = PAUSE_MIN;
        self.client.members.pass_over_preferred();
        loop {
            match open_after(&self.client, &self.prefix, self.after).await {
                Ok(events) => return Ok(events),
                Err(Failure::Compacted | Failure::Future | Failure::Invalid { .. }) => {
                    return Err(WatchEnd::Lagged);
                }
                Err(Failure::NotDone { reason } | Failure::Unsure { reason }) => {
                    tracing::debug!(reason, "a watch on etcd is not taken up again yet");
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

/// Events as batches of one revision each. They come ordered by revision.
fn batches(client: &Client, events: Vec<Event>) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    for event in events {
        let deleted = event.r#type() == EventType::Delete;
        let Some(kv) = event.kv else { continue };
        let Some(key) = client.own_key(&kv.key) else {
            continue;
        };
        let revision = from_etcd(kv.mod_revision);
        let change = if deleted {
            Change::Deleted { key }
        } else {
            Change::Put {
                key,
                value: kv.value,
            }
        };
        match batches.last_mut() {
            Some(batch) if batch.revision == revision => batch.changes.push(change),
            _ => batches.push(Batch {
                revision,
                changes: vec![change],
            }),
        }
    }
    batches
}
