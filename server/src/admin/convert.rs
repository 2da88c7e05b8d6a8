//! From the daemon's own words to those of the admin interface.

use ashlar_core::records::{Replica, ReplicaSet, ReplicaState, VolumeRecord, VolumeState};
use ashlar_core::units::{BLOCK_BYTES, StoreId, VolumeId};
use ashlar_proto::admin;

use super::orchestration;
use crate::data::ReplicationStatus;
use crate::metrics::{
    BUCKET_BOUNDS_NS, Command, CommandMetrics, Damage, DiskMetrics, VolumeMetrics,
};
use crate::plane::{ConnectionView, StoreView};
use crate::scrubs::StoreScrub;
use crate::volumes::{Serving, VolumeRuntime, VolumeView};

pub(super) fn volume(view: &VolumeView) -> admin::Volume {
    let record = &view.record;
    admin::Volume {
        id: record.id.0.to_string(),
        name: record.name.to_string(),
        size_bytes: record.size_bytes,
        read_only: record.read_only,
        write_through: record.write_through,
        replicas: record.replicas,
        epoch: record.epoch.0,
        created_at_unix_ms: record.created_at_unix_ms as i64,
        state: match record.state {
            VolumeState::Active => admin::VolumeState::Active,
            VolumeState::Deleting => admin::VolumeState::Deleting,
        }
        .into(),
        layers: record.layers.iter().map(|layer| layer.0).collect(),
        store_ids: each_once(&record.placement.stores),
        replica_sets: record.placement.sets.iter().map(replica_set).collect(),
        min_in_sync: record.min_in_sync,
        zones: record.zones.names().map(str::to_owned).collect(),
        head_node_id: record
            .head
            .map_or_else(String::new, |head| head.node.0.to_string()),
        client_generation: record.client_generation,
        runtime: view.runtime.map(
            |VolumeRuntime {
                 connections,
                 inflight_requests,
                 resynced_bytes,
             }| admin::VolumeRuntime {
                connections,
                inflight_requests,
                resynced_bytes,
            },
        ),
        ever_written: view.ever_written,
        filesystem: orchestration::filesystem(record),
        publications: record
            .publications
            .iter()
            .map(orchestration::publication)
            .collect(),
        annotations: view.annotations.entries.clone().into_iter().collect(),
        annotations_revision: view.annotations.revision,
        limits: Some(orchestration::limits(record.limits)),
        served_elsewhere: matches!(view.serving, Serving::Elsewhere(Some(_))),
        not_served_reason: view.serving.reason().unwrap_or_default(),
    }
}

fn replica_set(set: &ReplicaSet) -> admin::ReplicaSet {
    let replica = |replica: &Replica| admin::Replica {
        node_id: replica.node.0.to_string(),
        store_id: replica.store.0.to_string(),
        state: match replica.state {
            ReplicaState::InSync => admin::ReplicaState::InSync,
            ReplicaState::Out => admin::ReplicaState::Out,
            ReplicaState::Joining => admin::ReplicaState::Joining,
        }
        .into(),
        leaving: replica.leaving,
        ..admin::Replica::default()
    };
    admin::ReplicaSet {
        replicas: set.replicas.iter().map(replica).collect(),
    }
}

/// Says which copies the head, which is in this daemon, has a connection to, and how far those are that it fills.
pub(super) fn mark_linked(volume: &mut admin::Volume, status: &ReplicationStatus) {
    for (set, replicas) in volume.replica_sets.iter_mut().enumerate() {
        for replica in &mut replicas.replicas {
            replica.linked = status.replicas.iter().any(|known| {
                usize::from(known.set.0) == set
                    && known.is_linked
                    && known.store.0.to_string() == replica.store_id
            });
            let fill = status.fills.iter().find(|fill| {
                usize::from(fill.set.0) == set && fill.store.0.to_string() == replica.store_id
            });
            if let Some(fill) = fill {
                replica.filling = true;
                replica.copied_bytes = fill.copied_bytes;
                replica.left_bytes = fill.left_bytes;
            }
        }
    }
}

pub(super) fn connection(record: &VolumeRecord, view: ConnectionView) -> admin::Connection {
    admin::Connection {
        id: view.id,
        volume_id: record.id.0.to_string(),
        volume_name: record.name.to_string(),
        node_id: orchestration::node_of(record, view.token),
        peer: view.peer,
        connected_at_unix_ms: view.connected_at_unix_ms as i64,
        read_only: view.read_only,
        structured_replies: view.structured_replies,
        extended_headers: view.extended_headers,
        block_status: view.block_status,
        inflight_requests: view.inflight_requests,
        requests: view.requests,
        read_bytes: view.read_bytes,
        written_bytes: view.written_bytes,
    }
}

pub(super) fn store(
    view: &StoreView,
    disk: Option<&DiskMetrics>,
    scrub: StoreScrub,
) -> admin::Store {
    let status = &view.status;
    let bytes = |blocks: u64| blocks * BLOCK_BYTES as u64;
    let other_segments = status.segments_free + status.segments_open + status.segments_freeing;
    admin::Store {
        id: view.id.0.to_string(),
        path: view.path.display().to_string(),
        kind: if view.is_device {
            admin::StoreKind::BlockDevice
        } else {
            admin::StoreKind::File
        }
        .into(),
        state: match status.poisoned {
            None => admin::StoreState::Open,
            Some(_) => admin::StoreState::Poisoned,
        }
        .into(),
        poison_reason: poison_reason(view).unwrap_or_default(),
        capacity_bytes: bytes(status.capacity_blocks),
        live_bytes: bytes(status.mapped_blocks),
        available_bytes: bytes(status.capacity_blocks.saturating_sub(status.used_blocks)),
        segment_bytes: bytes(u64::from(status.segment_blocks)),
        segments: Some(admin::SegmentCounts {
            free: status.segments_free,
            open: status.segments_open,
            sealed: status.segments.saturating_sub(other_segments),
            awaiting_checkpoint: status.segments_freeing,
        }),
        tail_bytes: bytes(u64::from(status.tail_blocks)),
        tail_used_bytes: bytes(u64::from(status.tail_used_blocks)),
        tail_on_tmpfs: view.tail_on_tmpfs,
        checkpoint_sequence: status.checkpoint_seq,
        log_since_checkpoint_bytes: bytes(status.checkpoint_log_blocks),
        recovery: Some(admin::RecoveryReport {
            duration_ms: view.opening_took.as_millis() as u64,
            replayed_log_frames: view.recovery.frames_replayed,
            replayed_tail_frames: view.recovery.frames_from_tail,
            tail_void: view.recovery.tail_void,
        }),
        counters: Some(admin::StoreCounters {
            accepted_bytes: bytes(status.client_blocks),
            device_written_bytes: bytes(status.written_blocks()),
            cleaned_bytes: bytes(status.cleaned_blocks),
            device_read_bytes: disk.map_or(0, |disk| disk.read_bytes.get()),
            syncs: status.syncs,
            frames: status.frames,
            segments_cleaned: status.segments_cleaned,
            checkpoints: status.checkpoints,
            checksum_errors: status.checksum_errors,
        }),
        scrub: Some(admin::StoreScrub {
            last_finished_at_unix_ms: scrub.last.map_or(0, |last| last.finished_at_unix_ms as i64),
            last_verified_bytes: scrub.last.map_or(0, |last| last.verified_bytes),
            last_damaged_blocks: scrub.last.map_or(0, |last| last.damaged_blocks),
            next_at_unix_ms: scrub.next_at_unix_ms.unwrap_or(0) as i64,
            running: status.scrubbing,
            done_bytes: if status.scrubbing {
                bytes(status.scrub_blocks)
            } else {
                0
            },
        }),
    }
}

pub(super) fn damage(damage: &Damage, owner: Option<VolumeId>) -> admin::Damage {
    admin::Damage {
        layer: damage.layer.0,
        chunk: damage.chunk.0,
        block: damage.block,
        volume_id: owner.map(|id| id.0.to_string()).unwrap_or_default(),
        problem: damage.problem.clone(),
    }
}

/// Why a store is poisoned, for people.
pub(crate) fn poison_reason(view: &StoreView) -> Option<String> {
    let errno = view.status.poisoned?;
    let error = std::io::Error::from_raw_os_error(errno.0);
    Some(format!(
        "a write or sync of {} failed ({error}); nothing more is written there. Deal with the cause, then restart ashlard",
        view.path.display()
    ))
}

pub(super) fn volume_stats(view: &VolumeView, metrics: &VolumeMetrics) -> admin::VolumeStats {
    let used = |command: Command| {
        let counters = metrics.command(command);
        (counters.operations.get() > 0).then(|| command_stats(command, counters))
    };
    admin::VolumeStats {
        volume_id: view.record.id.0.to_string(),
        name: view.record.name.to_string(),
        connections: metrics.connections.get() as u32,
        inflight_requests: metrics.in_flight.get() as u32,
        commands: Command::ALL.into_iter().filter_map(used).collect(),
    }
}

fn command_stats(command: Command, counters: &CommandMetrics) -> admin::CommandStats {
    let latency = counters.latency.snapshot();
    admin::CommandStats {
        command: match command {
            Command::Read => admin::Command::Read,
            Command::Write => admin::Command::Write,
            Command::Flush => admin::Command::Flush,
            Command::Trim => admin::Command::Trim,
            Command::WriteZeroes => admin::Command::WriteZeroes,
            Command::Cache => admin::Command::Cache,
            Command::BlockStatus => admin::Command::BlockStatus,
        }
        .into(),
        requests: counters.operations.get(),
        errors: counters.errors.get(),
        bytes: counters.bytes.get(),
        latency_sum_ns: latency.sum_ns,
        latency: Some(admin::Histogram {
            bounds_ns: BUCKET_BOUNDS_NS.to_vec(),
            counts: latency.buckets.to_vec(),
        }),
    }
}
/// A placement is a deal in which a store comes as often as its share is large.
fn each_once(stores: &[StoreId]) -> Vec<String> {
    let mut seen = Vec::new();
    for store in stores {
        if !seen.contains(store) {
            seen.push(*store);
        }
    }
    seen.iter().map(|store| store.0.to_string()).collect()
}
