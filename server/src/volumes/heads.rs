//! What the heads of volumes with replicas tell: it is remembered, logged, and kept for those who ask.

use std::sync::Arc;

use ashlar_core::diagnosis::events::Occurrence;
use ashlar_core::replication::{News, StopReason};
use ashlar_core::units::{BLOCK_BYTES, NodeId, VolumeId};
use uuid::Uuid;

use super::diagnosis::{remembered, stopped};
use super::{Serving, Volumes};
use crate::replication::ReplicationEvent;

impl Volumes {
    /// Follows what heads tell, as long as the data plane lives.
    pub(super) fn follow_heads(self: &Arc<Self>) {
        let (host, service) = (self.host.clone(), Arc::downgrade(self));
        tokio::spawn(async move {
            while let Some(event) = host.replication_event().await {
                let Some(service) = service.upgrade() else {
                    return;
                };
                service.on_replication(event).await;
            }
        });
    }

    async fn on_replication(self: &Arc<Self>, event: ReplicationEvent) {
        match event {
            ReplicationEvent::Serving {
                volume,
                incarnation,
                client_generation,
            } => {
                {
                    let mut catalog = self.catalog();
                    // Before anybody is let in: who comes back asks for it.
                    catalog.raise_generation(volume, client_generation);
                    if !catalog.told(volume, incarnation, Serving::Yes) {
                        return;
                    }
                }
                self.served.send_replace(());
                self.tell(volume, None, Occurrence::VolumeServed);
                tracing::info!(id = %volume.0, "a volume is served");
            }
            ReplicationEvent::SessionsEnded {
                volume,
                client_generation,
            } => {
                self.catalog().raise_generation(volume, client_generation);
                self.tell(volume, None, Occurrence::SessionsEnded);
                tracing::error!(id = %volume.0, client_generation, "every copy lost power: writes that were answered and not flushed may be gone; the volume's clients were disconnected");
            }
            ReplicationEvent::Stopped {
                volume,
                incarnation,
                reason,
            } => self.on_stopped(volume, incarnation, reason),
            ReplicationEvent::News { volume, node, news } => self.on_news(volume, node, &news),
        }
    }

    fn on_stopped(&self, volume: VolumeId, incarnation: Uuid, reason: StopReason) {
        let known = self.catalog().get(volume).cloned();
        // Deleted, or a new head of this daemon began before the end of the last one was told.
        let Some(known) = known.filter(|known| known.head == Some(incarnation)) else {
            return;
        };
        self.tell(volume, None, stopped(reason));
        let serving = match reason {
            StopReason::Closed => Serving::No("it was closed".to_owned()),
            StopReason::Fenced { .. } => {
                tracing::warn!(id = %volume.0, %reason, "a volume is no longer served here");
                match known.current.record.head {
                    Some(head) if head.node != self.head.node => {
                        Serving::Elsewhere(Some(head.node))
                    }
                    // The record that says which one is still to be read.
                    _ => Serving::No("another node serves it".to_owned()),
                }
            }
            StopReason::Deleted => {
                self.catalog().remove(volume);
                self.served.send_replace(());
                return;
            }
            StopReason::EpochsExhausted => {
                tracing::error!(id = %volume.0, %reason, "a volume is no longer served");
                Serving::No(reason.to_string())
            }
        };
        self.catalog().told(volume, incarnation, serving);
        self.served.send_replace(());
    }

    fn on_news(&self, volume: VolumeId, node: Option<NodeId>, news: &News) {
        self.tell(volume, node, remembered(news));
        let node = node.map_or_else(String::new, |node| node.0.to_string());
        let id = volume.0;
        match news {
            News::Failed { status, .. } => match status {
                Some(status) => {
                    tracing::warn!(%id, node, %status, "a replica failed; acknowledgements wait until it is recorded as out of sync");
                }
                None => {
                    tracing::warn!(%id, node, "a replica does not answer; acknowledgements wait until it is recorded as out of sync");
                }
            },
            News::Dropped { set, .. } => {
                tracing::warn!(%id, node, set = set.0, "a replica is out of sync");
            }
            News::ResyncStarted { set, .. } => {
                tracing::info!(%id, node, set = set.0, "a replica is being brought up to date");
            }
            News::ResyncFailed { set, .. } => {
                tracing::warn!(%id, node, set = set.0, "bringing a replica up to date was cut off; it is tried again");
            }
            News::Rejoined {
                set, copied_blocks, ..
            } => {
                tracing::info!(%id, node, set = set.0, copied_bytes = copied_blocks * BLOCK_BYTES as u64, "a replica is in sync again");
            }
            News::Removed { set, .. } => {
                tracing::info!(%id, node, set = set.0, "a replica was removed");
            }
            News::LostPower { .. } => {
                tracing::warn!(%id, node, "a replica lost power while it was open for writing");
            }
            News::Repaired {
                extent,
                first_block,
                count,
            } => {
                tracing::warn!(%id, chunk = extent.chunk.0, first_block, count, "damaged blocks were written again from a good copy");
            }
        }
        self.served.send_replace(());
    }
}
