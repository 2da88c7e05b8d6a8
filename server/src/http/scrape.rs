//! The metrics, gathered once a scrape from counters that cost the data path a plain store each.

mod stores;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use ashlar_core::units::{BLOCK_BYTES, StoreId};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, text};
use prometheus_client::registry::Registry;

use super::page::{Labels, Page, one};
use crate::daemon::Usage;
use crate::metrics::{Command, CommandMetrics, DiskMetrics, ThreadMetrics, VolumeMetrics};
use crate::plane::StoreView;
use crate::scrubs::StoreScrub;

/// Everything at one moment.
#[derive(Debug, Default)]
pub struct Scrape {
    /// Of the software.
    pub version: &'static str,
    /// Serving.
    pub ready: bool,
    /// When the process started, milliseconds since 1970-01-01 UTC.
    pub started_at_unix_ms: u64,
    /// Of the process.
    pub usage: Usage,
    /// Connections open, and how many there may be.
    pub connections: u64,
    /// See `connections`.
    pub connections_limit: u64,
    /// The NBD door.
    pub listener: ListenerCounts,
    /// Every volume, open or not.
    pub volumes: Vec<VolumeScrape>,
    /// Every open store with the disk operations below it.
    pub stores: Vec<(StoreView, Arc<DiskMetrics>)>,
    /// The verification of each.
    pub scrubs: BTreeMap<StoreId, StoreScrub>,
    /// The data threads.
    pub threads: Vec<Arc<ThreadMetrics>>,
    /// The cluster, as this daemon sees it.
    pub cluster: Option<ClusterScrape>,
}

/// Copies and nodes of a cluster.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClusterScrape {
    /// This daemon runs the controller.
    pub is_leader: bool,
    /// Changes of replicas that it made as the leader.
    pub changes: u64,
    /// Copies in sync that stay.
    pub in_sync: u64,
    /// Copies that fell behind.
    pub out: u64,
    /// Copies being made.
    pub joining: u64,
    /// Copies that go when others suffice.
    pub leaving: u64,
    /// Copies that are to be made or moved, with no node to take them.
    pub stuck: u64,
    /// Sets of which stores have yet to give blocks back.
    pub leftovers: u64,
    /// Nodes that are not heard of.
    pub away: u64,
    /// Nodes being emptied.
    pub draining: u64,
    /// Bytes that the heads of this daemon have yet to compare for copies that they fill.
    pub filling_bytes: u64,
    /// When the certificate of this node ends, seconds since 1970-01-01 UTC.
    pub certificate_expires_s: u64,
}

/// Counted at the NBD door since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct ListenerCounts {
    /// Connections accepted.
    pub accepted: u64,
    /// Handed over after a handshake.
    pub established: u64,
    /// Closed at the limit of connections.
    pub over_limit: u64,
    /// Closed in the handshake to make room for newer ones.
    pub evicted: u64,
    /// Too slow in the handshake.
    pub too_slow: u64,
    /// Broke the protocol in the handshake.
    pub malformed: u64,
}

/// One volume.
#[derive(Debug)]
pub struct VolumeScrape {
    /// Its name now.
    pub name: String,
    /// Its id.
    pub id: String,
    /// Its size.
    pub size_bytes: u64,
    /// Its counters; `None` when it is not open.
    pub metrics: Option<Arc<VolumeMetrics>>,
}

impl Scrape {
    /// The OpenMetrics text.
    pub fn to_text(self) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        text::encode(&mut text, &registry)?;
        Ok(text)
    }

    fn each_volume<'a, T>(
        &'a self,
        read: impl Fn(&'a VolumeMetrics) -> T,
    ) -> impl Iterator<Item = (Labels<'a>, T)> {
        self.volumes
            .iter()
            .filter_map(move |volume| Some((volume.labels(), read(volume.metrics.as_deref()?))))
    }

    fn each_command<'a, T>(
        &'a self,
        read: impl Fn(&'a CommandMetrics) -> T + 'a,
    ) -> impl Iterator<Item = (Labels<'a>, T)> {
        let of_volume = move |volume: &'a VolumeScrape| {
            let used = Command::ALL.into_iter().filter_map(|command| {
                let metrics = volume.metrics.as_deref()?.command(command);
                // A hundred volumes with seven histograms each would be a long page of zeros.
                (metrics.operations.get() > 0).then_some((command, metrics))
            });
            let used: Vec<_> = used.collect();
            used.into_iter().map(move |(command, metrics)| {
                let mut labels = volume.labels();
                labels.push(("command", command.label().into()));
                (labels, metrics)
            })
        };
        self.volumes
            .iter()
            .flat_map(of_volume)
            .map(move |(labels, metrics)| (labels, read(metrics)))
    }

    fn each_thread<T>(
        &self,
        read: impl Fn(&ThreadMetrics) -> T,
    ) -> impl Iterator<Item = (Labels<'_>, T)> {
        self.threads
            .iter()
            .enumerate()
            .map(move |(index, thread)| (vec![("thread", index.to_string().into())], read(thread)))
    }

    fn encode_process(&self, page: &mut Page<'_>) -> fmt::Result {
        page.gauge(
            "ashlar_build",
            "The software; always 1",
            [(vec![("version", self.version.into())], 1u64)],
        )?;
        page.gauge(
            "ashlar_ready",
            "1 while volumes are served",
            one(u64::from(self.ready)),
        )?;
        page.gauge(
            "process_start_time_seconds",
            "When the process started, since 1970-01-01 UTC",
            one(self.started_at_unix_ms as f64 / 1e3),
        )?;
        page.counter(
            "process_cpu_seconds",
            "Processor time, user and system",
            one(self.usage.cpu.as_secs_f64()),
        )?;
        page.gauge(
            "process_resident_memory_bytes",
            "Resident memory, mapped tails included",
            one(self.usage.resident_bytes),
        )?;
        page.gauge(
            "ashlar_process_anonymous_memory_bytes",
            "Resident memory of the process alone, without mapped files",
            one(self.usage.anonymous_bytes),
        )?;
        page.gauge(
            "process_open_fds",
            "Open descriptors",
            one(self.usage.open_files),
        )
    }

    fn encode_connections(&self, page: &mut Page<'_>) -> fmt::Result {
        let door = &self.listener;
        page.gauge(
            "ashlar_connections",
            "NBD connections open, handshakes included",
            one(self.connections),
        )?;
        page.gauge(
            "ashlar_connections_limit",
            "NBD connections that may be open",
            one(self.connections_limit),
        )?;
        page.counter(
            "ashlar_nbd_accepted",
            "NBD connections accepted",
            one(door.accepted),
        )?;
        page.counter(
            "ashlar_nbd_established",
            "NBD connections that finished their handshake",
            one(door.established),
        )?;
        let refused = [
            ("limit", door.over_limit),
            ("evicted", door.evicted),
            ("too_slow", door.too_slow),
            ("malformed", door.malformed),
        ];
        page.counter(
            "ashlar_nbd_refused",
            "NBD connections closed before the end of their handshake, by reason",
            refused.map(|(reason, count)| (vec![("reason", reason.into())], count)),
        )
    }

    fn encode_volumes(&self, page: &mut Page<'_>) -> fmt::Result {
        page.gauge(
            "ashlar_volume_size_bytes",
            "Size of the volume",
            self.volumes.iter().map(|v| (v.labels(), v.size_bytes)),
        )?;
        page.gauge(
            "ashlar_volume_open",
            "1 while the volume is served",
            self.volumes
                .iter()
                .map(|v| (v.labels(), u64::from(v.metrics.is_some()))),
        )?;
        page.gauge(
            "ashlar_volume_connections",
            "NBD connections of the volume",
            self.each_volume(|m| m.connections.get()),
        )?;
        page.gauge(
            "ashlar_volume_inflight_requests",
            "Requests taken and not yet answered",
            self.each_volume(|m| m.in_flight.get()),
        )?;
        page.counter(
            "ashlar_volume_resynced_bytes",
            "Copied to replicas to bring them up to date",
            self.each_volume(|m| m.resynced_blocks.get() * BLOCK_BYTES as u64),
        )?;
        page.counter(
            "ashlar_volume_operations",
            "Requests answered",
            self.each_command(|m| m.operations.get()),
        )?;
        page.counter(
            "ashlar_volume_errors",
            "Requests answered with an error",
            self.each_command(|m| m.errors.get()),
        )?;
        page.counter(
            "ashlar_volume_bytes",
            "Bytes asked for by requests that succeeded",
            self.each_command(|m| m.bytes.get()),
        )?;
        page.histogram(
            "ashlar_volume_latency_seconds",
            "From the parsing of a request to the queueing of its reply",
            self.each_command(|m| m.latency.snapshot()),
        )
    }

    fn encode_cluster(&self, page: &mut Page<'_>) -> fmt::Result {
        let Some(cluster) = &self.cluster else {
            return Ok(());
        };
        page.gauge(
            "ashlar_cluster_leader",
            "1 on the node that runs the controller",
            one(u64::from(cluster.is_leader)),
        )?;
        page.counter(
            "ashlar_cluster_copy_changes",
            "Changes of copies that the controller on this node made: new, moved, wished away, forgotten",
            one(cluster.changes),
        )?;
        let copies = [
            ("in_sync", cluster.in_sync),
            ("out", cluster.out),
            ("joining", cluster.joining),
            ("leaving", cluster.leaving),
        ];
        page.gauge(
            "ashlar_cluster_copies",
            "Copies of replica sets by what they count for, the same on every node",
            copies.map(|(state, count)| (vec![("state", state.into())], count)),
        )?;
        page.gauge(
            "ashlar_cluster_stuck_copies",
            "Copies to be made or moved for which there is no other node with room",
            one(cluster.stuck),
        )?;
        page.gauge(
            "ashlar_cluster_leftovers",
            "Sets of which stores have yet to give the blocks back",
            one(cluster.leftovers),
        )?;
        let nodes = [("away", cluster.away), ("draining", cluster.draining)];
        page.gauge(
            "ashlar_cluster_nodes",
            "Nodes that need attention, by why",
            nodes.map(|(state, count)| (vec![("state", state.into())], count)),
        )?;
        page.gauge(
            "ashlar_cluster_filling_bytes",
            "Of copies that the heads of this node fill, what has yet to be compared",
            one(cluster.filling_bytes),
        )?;
        page.gauge(
            "ashlar_certificate_expires_time_seconds",
            "When the certificate of this node ends, Unix time; it renews itself a third of its life before",
            one(cluster.certificate_expires_s),
        )
    }

    fn encode_threads(&self, page: &mut Page<'_>) -> fmt::Result {
        page.counter(
            "ashlar_thread_turns",
            "Passes of the event loop",
            self.each_thread(|t| t.turns.get()),
        )?;
        page.counter(
            "ashlar_thread_requests",
            "Requests taken from sockets",
            self.each_thread(|t| t.requests.get()),
        )?;
        page.counter(
            "ashlar_thread_receives",
            "Receive calls",
            self.each_thread(|t| t.receives.get()),
        )?;
        page.counter(
            "ashlar_thread_sends",
            "Send calls",
            self.each_thread(|t| t.sends.get()),
        )?;
        page.counter(
            "ashlar_thread_received_bytes",
            "Received from clients",
            self.each_thread(|t| t.received_bytes.get()),
        )?;
        page.counter(
            "ashlar_thread_sent_bytes",
            "Sent to clients",
            self.each_thread(|t| t.sent_bytes.get()),
        )?;
        page.gauge(
            "ashlar_thread_connections",
            "Connections the thread serves",
            self.each_thread(|t| t.connections.get()),
        )?;
        page.counter(
            "ashlar_thread_protocol_errors",
            "Connections closed because the client broke the protocol",
            self.each_thread(|t| t.protocol_errors.get()),
        )?;
        page.gauge(
            "ashlar_thread_buffered_bytes",
            "Requests and replies held for clients",
            self.each_thread(|t| t.buffered_bytes.get()),
        )?;
        page.counter(
            "ashlar_thread_pauses",
            "Times a connection was left unread at a limit",
            self.each_thread(|t| t.pauses.get()),
        )?;
        page.counter(
            "ashlar_thread_parked_writes",
            "Writes that waited for room in a tail",
            self.each_thread(|t| t.parked_writes.get()),
        )
    }
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page(encoder);
        self.encode_process(&mut page)?;
        self.encode_connections(&mut page)?;
        self.encode_volumes(&mut page)?;
        self.encode_store_space(&mut page)?;
        self.encode_store_work(&mut page)?;
        self.encode_disks(&mut page)?;
        self.encode_cluster(&mut page)?;
        self.encode_threads(&mut page)
    }
}

impl VolumeScrape {
    fn labels(&self) -> Labels<'_> {
        vec![
            ("volume", self.name.as_str().into()),
            ("id", self.id.as_str().into()),
        ]
    }
}
