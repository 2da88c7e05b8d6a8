//! What is printed as JSON and YAML: the messages of the admin interface with their enums as words and their times as
//! RFC 3339. Field names are those of the proto file.

use std::collections::BTreeMap;

use ashlar_proto::admin;
use jiff::Timestamp;
use serde::Serialize;

use super::copies::ReplicaSet;
use super::publication::{Filesystem, Publication};

/// RFC 3339 with milliseconds, UTC. A time no calendar has (a daemon with a broken clock) is shown as the number it is.
pub(super) fn time(unix_ms: i64) -> String {
    Timestamp::from_millisecond(unix_ms).map_or_else(|_| format!("{unix_ms} ms"), |t| t.to_string())
}

/// A duration for people: the two largest units.
pub(super) fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) if ms < 10_000 => format!("{}.{:03} s", seconds, ms % 1000),
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Volume {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) size_bytes: u64,
    pub(super) read_only: bool,
    pub(super) write_through: bool,
    pub(super) replicas: u32,
    pub(super) epoch: u32,
    pub(super) created_at: String,
    pub(super) state: &'static str,
    pub(super) layers: Vec<u64>,
    pub(super) store_ids: Vec<String>,
    /// None for a volume of a single node.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) replica_sets: Vec<ReplicaSet>,
    pub(super) min_in_sync: u32,
    /// Empty: its copies may lie on all nodes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) zones: Vec<String>,
    /// Empty when no node ever served it, or its copies are not recorded.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) head_node_id: String,
    pub(super) client_generation: u64,
    pub(super) ever_written: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) filesystem: Option<Filesystem>,
    pub(super) publications: Vec<Publication>,
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) annotations_revision: u64,
    pub(super) limits: VolumeLimits,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) not_served_reason: String,
    /// The head is at the node of `head_node_id`.
    pub(super) served_elsewhere: bool,
    /// Absent when the volume is not open in the daemon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) runtime: Option<VolumeRuntime>,
}

/// 0: no bound.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct VolumeLimits {
    pub(super) iops: u64,
    pub(super) bytes_per_second: u64,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct VolumeRuntime {
    pub(super) connections: u32,
    pub(super) inflight_requests: u32,
    pub(super) resynced_bytes: u64,
}

impl From<admin::Volume> for Volume {
    fn from(volume: admin::Volume) -> Volume {
        Volume {
            state: match volume.state() {
                admin::VolumeState::Active => "active",
                admin::VolumeState::Deleting => "deleting",
                admin::VolumeState::Unspecified => "unknown",
            },
            id: volume.id,
            name: volume.name,
            size_bytes: volume.size_bytes,
            read_only: volume.read_only,
            write_through: volume.write_through,
            replicas: volume.replicas,
            epoch: volume.epoch,
            created_at: time(volume.created_at_unix_ms),
            layers: volume.layers,
            store_ids: volume.store_ids,
            replica_sets: volume
                .replica_sets
                .into_iter()
                .map(ReplicaSet::from)
                .collect(),
            min_in_sync: volume.min_in_sync,
            zones: volume.zones,
            head_node_id: volume.head_node_id,
            client_generation: volume.client_generation,
            ever_written: volume.ever_written,
            filesystem: volume.filesystem.map(Filesystem::from),
            publications: volume
                .publications
                .into_iter()
                .map(Publication::from)
                .collect(),
            annotations: volume.annotations.into_iter().collect(),
            annotations_revision: volume.annotations_revision,
            limits: VolumeLimits {
                iops: volume.limits.map_or(0, |limits| limits.iops),
                bytes_per_second: volume.limits.map_or(0, |limits| limits.bytes_per_second),
            },
            not_served_reason: volume.not_served_reason,
            served_elsewhere: volume.served_elsewhere,
            runtime: volume.runtime.map(|runtime| VolumeRuntime {
                connections: runtime.connections,
                inflight_requests: runtime.inflight_requests,
                resynced_bytes: runtime.resynced_bytes,
            }),
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Connection {
    pub(super) id: u64,
    pub(super) volume_id: String,
    pub(super) volume_name: String,
    pub(super) peer: String,
    /// Empty when the volume is not published.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) node_id: String,
    pub(super) connected_at: String,
    pub(super) read_only: bool,
    pub(super) structured_replies: bool,
    pub(super) extended_headers: bool,
    pub(super) block_status: bool,
    pub(super) inflight_requests: u32,
    pub(super) requests: u64,
    pub(super) read_bytes: u64,
    pub(super) written_bytes: u64,
}

impl From<admin::Connection> for Connection {
    fn from(connection: admin::Connection) -> Connection {
        Connection {
            id: connection.id,
            volume_id: connection.volume_id,
            volume_name: connection.volume_name,
            peer: connection.peer,
            node_id: connection.node_id,
            connected_at: time(connection.connected_at_unix_ms),
            read_only: connection.read_only,
            structured_replies: connection.structured_replies,
            extended_headers: connection.extended_headers,
            block_status: connection.block_status,
            inflight_requests: connection.inflight_requests,
            requests: connection.requests,
            read_bytes: connection.read_bytes,
            written_bytes: connection.written_bytes,
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Listener {
    pub(super) kind: &'static str,
    pub(super) address: String,
}

impl From<admin::Listener> for Listener {
    fn from(listener: admin::Listener) -> Listener {
        Listener {
            kind: match listener.kind() {
                admin::ListenerKind::Nbd => "nbd",
                admin::ListenerKind::Admin => "admin",
                admin::ListenerKind::Http => "http",
                admin::ListenerKind::Unspecified => "unknown",
            },
            address: listener.address,
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Store {
    pub(super) id: String,
    pub(super) path: String,
    pub(super) kind: &'static str,
    pub(super) state: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) poison_reason: String,
    pub(super) capacity_bytes: u64,
    pub(super) live_bytes: u64,
    pub(super) available_bytes: u64,
    pub(super) segment_bytes: u64,
    pub(super) segments: Segments,
    pub(super) tail_bytes: u64,
    pub(super) tail_used_bytes: u64,
    pub(super) tail_on_tmpfs: bool,
    pub(super) checkpoint_sequence: u64,
    pub(super) log_since_checkpoint_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) recovery: Option<Recovery>,
    pub(super) counters: StoreCounters,
    /// `counters.device_written_bytes / counters.accepted_bytes`; absent before the first write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) write_amplification: Option<f64>,
    pub(super) scrub: Scrub,
}

/// What is absent has not happened or will not happen by itself.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Scrub {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) last_finished_at: Option<String>,
    pub(super) last_verified_bytes: u64,
    pub(super) last_damaged_blocks: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) next_at: Option<String>,
    pub(super) running: bool,
    pub(super) done_bytes: u64,
}

impl From<admin::StoreScrub> for Scrub {
    fn from(scrub: admin::StoreScrub) -> Scrub {
        let known = |unix_ms: i64| (unix_ms != 0).then(|| time(unix_ms));
        Scrub {
            last_finished_at: known(scrub.last_finished_at_unix_ms),
            last_verified_bytes: scrub.last_verified_bytes,
            last_damaged_blocks: scrub.last_damaged_blocks,
            next_at: known(scrub.next_at_unix_ms),
            running: scrub.running,
            done_bytes: scrub.done_bytes,
        }
    }
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Segments {
    pub(super) free: u32,
    pub(super) open: u32,
    pub(super) sealed: u32,
    pub(super) awaiting_checkpoint: u32,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Recovery {
    pub(super) duration_ms: u64,
    pub(super) replayed_log_frames: u64,
    pub(super) replayed_tail_frames: u64,
    pub(super) tail_void: bool,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct StoreCounters {
    pub(super) accepted_bytes: u64,
    pub(super) device_written_bytes: u64,
    pub(super) cleaned_bytes: u64,
    pub(super) device_read_bytes: u64,
    pub(super) syncs: u64,
    pub(super) frames: u64,
    pub(super) segments_cleaned: u64,
    pub(super) checkpoints: u64,
    pub(super) checksum_errors: u64,
}

impl From<admin::StoreCounters> for StoreCounters {
    fn from(counters: admin::StoreCounters) -> StoreCounters {
        StoreCounters {
            accepted_bytes: counters.accepted_bytes,
            device_written_bytes: counters.device_written_bytes,
            cleaned_bytes: counters.cleaned_bytes,
            device_read_bytes: counters.device_read_bytes,
            syncs: counters.syncs,
            frames: counters.frames,
            segments_cleaned: counters.segments_cleaned,
            checkpoints: counters.checkpoints,
            checksum_errors: counters.checksum_errors,
        }
    }
}

impl From<admin::Store> for Store {
    fn from(store: admin::Store) -> Store {
        let counters = StoreCounters::from(store.counters.unwrap_or_default());
        let segments = store.segments.unwrap_or_default();
        Store {
            kind: match store.kind() {
                admin::StoreKind::File => "file",
                admin::StoreKind::BlockDevice => "block device",
                admin::StoreKind::Unspecified => "unknown",
            },
            state: match store.state() {
                admin::StoreState::Open => "open",
                admin::StoreState::Poisoned => "poisoned",
                admin::StoreState::Unspecified => "unknown",
            },
            write_amplification: amplification(
                counters.device_written_bytes,
                counters.accepted_bytes,
            ),
            id: store.id,
            path: store.path,
            poison_reason: store.poison_reason,
            capacity_bytes: store.capacity_bytes,
            live_bytes: store.live_bytes,
            available_bytes: store.available_bytes,
            segment_bytes: store.segment_bytes,
            segments: Segments {
                free: segments.free,
                open: segments.open,
                sealed: segments.sealed,
                awaiting_checkpoint: segments.awaiting_checkpoint,
            },
            tail_bytes: store.tail_bytes,
            tail_used_bytes: store.tail_used_bytes,
            tail_on_tmpfs: store.tail_on_tmpfs,
            checkpoint_sequence: store.checkpoint_sequence,
            log_since_checkpoint_bytes: store.log_since_checkpoint_bytes,
            recovery: store.recovery.map(|recovery| Recovery {
                duration_ms: recovery.duration_ms,
                replayed_log_frames: recovery.replayed_log_frames,
                replayed_tail_frames: recovery.replayed_tail_frames,
                tail_void: recovery.tail_void,
            }),
            counters,
            scrub: Scrub::from(store.scrub.unwrap_or_default()),
        }
    }
}

/// Bytes written to the device per byte accepted, to two decimal places.
pub(super) fn amplification(device_written_bytes: u64, accepted_bytes: u64) -> Option<f64> {
    (accepted_bytes > 0)
        .then(|| (device_written_bytes as f64 / accepted_bytes as f64 * 100.0).round() / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_readable() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(1_700_000_000_123), "2023-11-14T22:13:20.123Z");
        assert_eq!(time(i64::MAX), format!("{} ms", i64::MAX));
    }

    #[test]
    fn durations_are_readable() {
        for (ms, text) in [
            (0, "0.000 s"),
            (1_234, "1.234 s"),
            (59_999, "59 s"),
            (61_000, "1 min 1 s"),
            (3_660_000, "1 h 1 min"),
            (90_000_000, "1 d 1 h"),
        ] {
            assert_eq!(duration(ms), text);
        }
    }

    #[test]
    fn amplification_needs_a_write() {
        assert_eq!(amplification(10, 0), None);
        assert_eq!(amplification(1101, 1000), Some(1.1));
    }
}
