//! Metrics of the stores and of the disks below them.

use std::fmt;

use ashlar_core::units::BLOCK_BYTES;

use super::Scrape;
use crate::http::page::{Labels, Page};
use crate::metrics::DiskMetrics;
use crate::plane::StoreView;
use crate::scrubs::StoreScrub;

impl Scrape {
    pub(super) fn encode_store_space(&self, page: &mut Page<'_>) -> fmt::Result {
        let blocks = |blocks: u64| blocks * BLOCK_BYTES as u64;
        page.gauge(
            "ashlar_store_capacity_bytes",
            "Blocks that clients may fill",
            self.each_store(|s, _| blocks(s.status.capacity_blocks)),
        )?;
        page.gauge(
            "ashlar_store_live_bytes",
            "Blocks that hold client data",
            self.each_store(|s, _| blocks(s.status.mapped_blocks)),
        )?;
        page.gauge(
            "ashlar_store_used_bytes",
            "Blocks that data and index take of the capacity",
            self.each_store(|s, _| blocks(s.status.used_blocks)),
        )?;
        page.gauge(
            "ashlar_store_segments",
            "Segments that exist",
            self.each_store(|s, _| u64::from(s.status.segments)),
        )?;
        page.gauge(
            "ashlar_store_segments_free",
            "Segments that may be written at once",
            self.each_store(|s, _| u64::from(s.status.segments_free)),
        )?;
        page.gauge(
            "ashlar_store_tail_bytes",
            "Size of the tail",
            self.each_store(|s, _| blocks(u64::from(s.status.tail_blocks))),
        )?;
        page.gauge(
            "ashlar_store_tail_used_bytes",
            "Part of the tail in use",
            self.each_store(|s, _| blocks(u64::from(s.status.tail_used_blocks))),
        )?;
        page.gauge(
            "ashlar_store_leaves_cached",
            "Leaves in memory",
            self.each_store(|s, _| s.status.leaves_cached as u64),
        )?;
        page.gauge(
            "ashlar_store_leaves_dirty",
            "Leaves changed since the last checkpoint",
            self.each_store(|s, _| s.status.leaves_dirty as u64),
        )?;
        page.gauge(
            "ashlar_store_poisoned",
            "1 when the store stopped after an I/O error",
            self.each_store(|s, _| u64::from(s.status.poisoned.is_some())),
        )?;
        page.gauge(
            "ashlar_store_opening_seconds",
            "What the last opening took, recovery included",
            self.each_store(|s, _| s.opening_took.as_secs_f64()),
        )
    }

    pub(super) fn encode_store_work(&self, page: &mut Page<'_>) -> fmt::Result {
        let blocks = |blocks: u64| blocks * BLOCK_BYTES as u64;
        page.counter(
            "ashlar_store_client_bytes",
            "Client blocks written",
            self.each_store(|s, _| blocks(s.status.client_blocks)),
        )?;
        page.counter(
            "ashlar_store_log_bytes",
            "Written to the log for clients, headers included",
            self.each_store(|s, _| blocks(s.status.log_blocks)),
        )?;
        page.counter(
            "ashlar_store_cleaned_bytes",
            "Written by cleaning",
            self.each_store(|s, _| blocks(s.status.cleaned_blocks)),
        )?;
        page.counter(
            "ashlar_store_cleaning_read_bytes",
            "Read by cleaning",
            self.each_store(|s, _| blocks(s.status.clean_read_blocks)),
        )?;
        page.counter(
            "ashlar_store_segments_cleaned",
            "Segments cleaned",
            self.each_store(|s, _| s.status.segments_cleaned),
        )?;
        page.counter(
            "ashlar_store_checkpoint_bytes",
            "Written for checkpoints",
            self.each_store(|s, _| blocks(s.status.checkpoint_blocks)),
        )?;
        page.counter(
            "ashlar_store_checkpoint_seconds",
            "What checkpoints took, all together",
            self.each_store(|s, _| s.status.checkpoints_took_ms as f64 / 1e3),
        )?;
        page.gauge(
            "ashlar_store_last_checkpoint_seconds",
            "What the newest checkpoint took",
            self.each_store(|s, _| s.status.checkpoint_took_ms as f64 / 1e3),
        )?;
        page.counter(
            "ashlar_store_checkpoints",
            "Checkpoints taken",
            self.each_store(|s, _| s.status.checkpoints),
        )?;
        page.counter(
            "ashlar_store_syncs",
            "Data syncs and durable appends",
            self.each_store(|s, _| s.status.syncs),
        )?;
        page.gauge(
            "ashlar_store_write_amplification",
            "Everything written to the device since the start, by what clients wrote",
            self.each_store(|s, _| write_amplification(s))
                .filter_map(|(labels, ratio)| Some((labels, ratio?))),
        )?;
        page.counter(
            "ashlar_store_checksum_errors",
            "Blocks or leaves that did not match their checksum",
            self.each_store(|s, _| s.status.checksum_errors),
        )?;
        page.counter(
            "ashlar_store_read_errors",
            "Reads the device failed",
            self.each_store(|s, _| s.status.read_errors),
        )?;
        page.gauge(
            "ashlar_store_scrubbing",
            "1 while a scrub runs",
            self.each_store(|s, _| u64::from(s.status.scrubbing)),
        )?;
        page.gauge(
            "ashlar_store_scrub_bytes",
            "Verified by the scrub that runs or ran last",
            self.each_store(|s, _| blocks(s.status.scrub_blocks)),
        )?;
        page.gauge(
            "ashlar_store_scrub_damaged_blocks",
            "Damaged blocks that scrub found",
            self.each_store(|s, _| s.status.scrub_damaged),
        )?;
        page.gauge(
            "ashlar_store_scrub_last_time_seconds",
            "When the last scrub came to its end, since 1970-01-01 UTC",
            self.each_scrub(|s| Some(s.last?.finished_at_unix_ms as f64 / 1e3)),
        )?;
        page.gauge(
            "ashlar_store_scrub_last_damaged_blocks",
            "Damaged blocks found by the last scrub that came to its end, across restarts",
            self.each_scrub(|s| Some(s.last?.damaged_blocks)),
        )?;
        page.gauge(
            "ashlar_store_scrub_next_time_seconds",
            "When the next scrub begins by itself, since 1970-01-01 UTC",
            self.each_scrub(|s| Some(s.next_at_unix_ms? as f64 / 1e3)),
        )
    }

    pub(super) fn encode_disks(&self, page: &mut Page<'_>) -> fmt::Result {
        page.counter(
            "ashlar_store_read_bytes",
            "Read from the file or device",
            self.each_store(|_, d| d.read_bytes.get()),
        )?;
        page.counter(
            "ashlar_store_written_bytes",
            "Written to the file or device",
            self.each_store(|_, d| d.write_bytes.get()),
        )?;
        page.counter(
            "ashlar_store_allocated_bytes",
            "Allocated and written with zeros",
            self.each_store(|_, d| d.allocated_bytes.get()),
        )?;
        page.counter(
            "ashlar_store_disk_errors",
            "Disk operations that failed",
            self.each_store(|_, d| d.errors.get()),
        )?;
        page.gauge(
            "ashlar_store_disk_inflight",
            "Disk operations under way",
            self.each_store(|_, d| d.in_flight.get()),
        )?;
        page.histogram(
            "ashlar_store_disk_read_seconds",
            "Duration of disk reads",
            self.each_store(|_, d| d.read_latency.snapshot()),
        )?;
        page.histogram(
            "ashlar_store_disk_write_seconds",
            "Duration of disk writes",
            self.each_store(|_, d| d.write_latency.snapshot()),
        )?;
        page.histogram(
            "ashlar_store_disk_sync_seconds",
            "Duration of data syncs",
            self.each_store(|_, d| d.sync_latency.snapshot()),
        )
    }

    fn each_store<'a, T>(
        &'a self,
        read: impl Fn(&'a StoreView, &'a DiskMetrics) -> T,
    ) -> impl Iterator<Item = (Labels<'a>, T)> {
        self.stores
            .iter()
            .map(move |(view, disk)| (store_labels(view), read(view, disk)))
    }

    /// Of the stores for which `read` finds something.
    fn each_scrub<T>(
        &self,
        read: impl Fn(&StoreScrub) -> Option<T>,
    ) -> impl Iterator<Item = (Labels<'_>, T)> {
        self.stores.iter().filter_map(move |(view, _)| {
            let value = read(self.scrubs.get(&view.id)?)?;
            Some((store_labels(view), value))
        })
    }
}

fn store_labels(view: &StoreView) -> Labels<'_> {
    vec![
        ("store", view.id.0.to_string().into()),
        ("path", view.path.to_string_lossy()),
    ]
}

/// Blocks written to the device for one client block; `None` before the first.
pub(crate) fn write_amplification(store: &StoreView) -> Option<f64> {
    let status = &store.status;
    (status.client_blocks > 0).then(|| status.written_blocks() as f64 / status.client_blocks as f64)
}
