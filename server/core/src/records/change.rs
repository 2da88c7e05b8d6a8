//! The decisions: from what was read to a compare-and-swap, or a refusal.

use thiserror::Error;

use super::{
    Annotations, ClientNodeId, Condition, Effect, HeadClaim, LayerCounter, NameRecord, Placement,
    Record, RoundedSize, Transaction, Versioned, VolumeLimits, VolumeName, VolumeRecord,
    VolumeState, Zones, default_min_in_sync, first_annotations, keys,
};
use crate::units::{Epoch, LayerId, NodeId, VolumeId};

/// A volume to create. The id was drawn by the caller, who can therefore tell, when the outcome of the transaction is
/// unknown, whether it happened: the record of that id is there or it is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewVolume {
    /// A fresh UUID.
    pub id: VolumeId,
    /// Checked.
    pub name: VolumeName,
    /// Checked and rounded.
    pub size: RoundedSize,
    /// Served read-only.
    pub read_only: bool,
    /// Every acknowledgement waits for durability.
    pub write_through: bool,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_at_unix_ms: u64,
    /// Copies of each chunk, at least 1.
    pub replicas: u32,
    /// How many of them must be in sync for a write to be answered; `None`: as [`default_min_in_sync`] says.
    pub min_in_sync: Option<u32>,
    /// Where copies may lie, now and later.
    pub zones: Zones,
    /// Where its chunks will lie: with replica sets exactly when `replicas` is more than 1 or the daemon is in a cluster.
    pub placement: Placement,
    /// Bounds on what its clients may ask of it.
    pub limits: VolumeLimits,
    /// What others keep with it.
    pub annotations: Annotations,
}

/// A creation that was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Creation {
    /// The record that will exist.
    pub record: VolumeRecord,
    /// What makes it exist.
    pub transaction: Transaction,
}

/// Why a volume is not created.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CreateError {
    /// Another volume has the name.
    #[error("the name {name} is taken by volume {}; choose another or delete that volume first", holder.0)]
    NameTaken {
        /// The name.
        name: VolumeName,
        /// Who has it.
        holder: VolumeId,
    },
    /// There is nowhere to put it.
    #[error("there is no store to put the volume on; start ashlard with --store PATH")]
    NoStore,
    /// All 2^64 layer ids are used.
    #[error("every layer id has been given out; no volume can be created any more")]
    LayersExhausted,
    /// See [`MinInSyncError`].
    #[error(transparent)]
    MinInSync(#[from] MinInSyncError),
}

/// So many copies cannot be in sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "of {replicas} copies {wanted} cannot be in sync; at least 1 must be, and at most all of them"
)]
pub struct MinInSyncError {
    /// How many were to be.
    pub wanted: u32,
    /// How many there are.
    pub replicas: u32,
}

impl MinInSyncError {
    /// Whether `wanted` of `replicas` copies can be in sync.
    pub fn check(wanted: u32, replicas: u32) -> Result<u32, MinInSyncError> {
        if (1..=replicas).contains(&wanted) {
            Ok(wanted)
        } else {
            Err(MinInSyncError { wanted, replicas })
        }
    }
}

/// Decides the creation of a volume from the holder of its name and the layer counter (absent before the first
/// volume).
pub fn create(
    new: NewVolume,
    name_holder: Option<NameRecord>,
    counter: Option<Versioned<LayerCounter>>,
) -> Result<Creation, CreateError> {
    if let Some(holder) = name_holder {
        return Err(CreateError::NameTaken {
            name: new.name,
            holder: holder.volume,
        });
    }
    if new.placement.stores.is_empty() && new.placement.sets.is_empty() {
        return Err(CreateError::NoStore);
    }
    let (layer, counter_condition) = match &counter {
        Some(counter) => (
            counter.record.next,
            Condition::Unchanged {
                key: keys::NEXT_LAYER.to_owned(),
                changed_at: counter.changed_at,
            },
        ),
        None => (
            LayerCounter::FIRST.next,
            Condition::Absent {
                key: keys::NEXT_LAYER.to_owned(),
            },
        ),
    };
    let next = LayerId(layer.0.checked_add(1).ok_or(CreateError::LayersExhausted)?);
    let record = VolumeRecord {
        replicas: new.replicas,
        min_in_sync: match new.min_in_sync {
            None => default_min_in_sync(new.replicas),
            Some(wanted) => MinInSyncError::check(wanted, new.replicas)?,
        },
        zones: new.zones,
        read_only: new.read_only,
        write_through: new.write_through,
        created_at_unix_ms: new.created_at_unix_ms,
        limits: new.limits,
        ..VolumeRecord::new(new.id, new.name, new.size.bytes, layer, new.placement)
    };
    let mut transaction = Transaction {
        conditions: vec![
            Condition::Absent {
                key: keys::name(&record.name),
            },
            Condition::Absent {
                key: keys::volume(record.id),
            },
            counter_condition,
        ],
        effects: vec![
            Effect::Put {
                key: keys::NEXT_LAYER.to_owned(),
                value: LayerCounter { next }.encode(),
            },
            Effect::Put {
                key: keys::name(&record.name),
                value: NameRecord { volume: record.id }.encode(),
            },
            Effect::Put {
                key: keys::volume(record.id),
                value: record.encode(),
            },
        ],
    };
    if let Some((_, step)) = first_annotations(record.id, &new.annotations) {
        transaction = transaction.and(step);
    }
    Ok(Creation {
        record,
        transaction,
    })
}

/// Why a volume is not claimed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ClaimError {
    /// It is being deleted.
    #[error("volume {name} is being deleted")]
    Deleting {
        /// Its name.
        name: VolumeName,
    },
    /// It was claimed 2^24 - 1 times.
    #[error("volume {name} has used up its epochs; copy it to a new volume")]
    EpochsExhausted {
        /// Its name.
        name: VolumeName,
    },
}

/// Decides the claim that must precede serving a volume: a new epoch with `head` as its holder. Answers the record as
/// it will be.
///
/// `written`: the highest epoch that its stores hold blocks of. It is beyond the record's only when the metadata is
/// older than the stores (restored from a backup); the new epoch is larger than both, because a store never replaces an
/// entry by one of a smaller version, and what is written under a used epoch could vanish.
pub fn claim(
    current: &Versioned<VolumeRecord>,
    head: HeadClaim,
    written: Epoch,
) -> Result<(VolumeRecord, Transaction), ClaimError> {
    let record = &current.record;
    if record.state == VolumeState::Deleting {
        return Err(ClaimError::Deleting {
            name: record.name.clone(),
        });
    }
    let last = record.epoch.max(written);
    if last >= Epoch::MAX {
        return Err(ClaimError::EpochsExhausted {
            name: record.name.clone(),
        });
    }
    let claimed = VolumeRecord {
        epoch: Epoch(last.0 + 1),
        head: Some(head),
        ..record.clone()
    };
    let transaction = rewrite(current, &claimed);
    Ok((claimed, transaction))
}

/// Decides whether layer ids must be passed over: `used` is the highest that a store holds, and it was given out. It is
/// beyond the counter only when the metadata is older than the stores. `None`: nothing to do.
pub fn pass_over_layers(
    counter: Option<Versioned<LayerCounter>>,
    used: LayerId,
) -> Option<Transaction> {
    let next = counter
        .as_ref()
        .map_or(LayerCounter::FIRST.next, |counter| counter.record.next);
    if used < next {
        return None;
    }
    let transaction = match counter {
        Some(counter) => Transaction::new().when_unchanged(keys::NEXT_LAYER, counter.changed_at),
        None => Transaction::new().when_absent(keys::NEXT_LAYER),
    };
    // At the end of all ids the counter stays there, and creation says that there are none left.
    let next = LayerId(used.0.saturating_add(1));
    Some(transaction.put(keys::NEXT_LAYER, LayerCounter { next }.encode()))
}

/// Why a volume is not renamed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RenameError {
    /// Another volume has the name.
    #[error("the name {name} is taken by volume {}; choose another or delete that volume first", holder.0)]
    NameTaken {
        /// The wanted name.
        name: VolumeName,
        /// Who has it.
        holder: VolumeId,
    },
    /// It is being deleted.
    #[error("volume {name} is being deleted")]
    Deleting {
        /// Its name.
        name: VolumeName,
    },
}

/// Decides a change of name from the holder of the wanted one. `None`: it has that name already.
pub fn rename(
    current: &Versioned<VolumeRecord>,
    name: &VolumeName,
    name_holder: Option<NameRecord>,
) -> Result<Option<(VolumeRecord, Transaction)>, RenameError> {
    let record = &current.record;
    if record.state == VolumeState::Deleting {
        return Err(RenameError::Deleting {
            name: record.name.clone(),
        });
    }
    if record.name == *name {
        return Ok(None);
    }
    if let Some(holder) = name_holder {
        return Err(RenameError::NameTaken {
            name: name.clone(),
            holder: holder.volume,
        });
    }
    let renamed = VolumeRecord {
        name: name.clone(),
        ..record.clone()
    };
    let transaction = rewrite(current, &renamed)
        .when_absent(keys::name(name))
        .delete(keys::name(&record.name))
        .put(keys::name(name), NameRecord { volume: record.id }.encode());
    Ok(Some((renamed, transaction)))
}

/// Why a volume is not resized.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ResizeError {
    /// Shrinking would cut off data that a filesystem may still use.
    #[error(
        "volume {name} has {from_bytes} bytes and cannot shrink to {to_bytes}: volumes only grow; create a smaller volume and copy what you need"
    )]
    Shrink {
        /// Its name.
        name: VolumeName,
        /// Present size.
        from_bytes: u64,
        /// Asked size, rounded.
        to_bytes: u64,
    },
    /// It is being deleted.
    #[error("volume {name} is being deleted")]
    Deleting {
        /// Its name.
        name: VolumeName,
    },
}

/// Decides a growth. `None`: it has that size already.
pub fn resize(
    current: &Versioned<VolumeRecord>,
    size: RoundedSize,
) -> Result<Option<(VolumeRecord, Transaction)>, ResizeError> {
    let record = &current.record;
    if record.state == VolumeState::Deleting {
        return Err(ResizeError::Deleting {
            name: record.name.clone(),
        });
    }
    if size.bytes == record.size_bytes {
        return Ok(None);
    }
    if size.bytes < record.size_bytes {
        return Err(ResizeError::Shrink {
            name: record.name.clone(),
            from_bytes: record.size_bytes,
            to_bytes: size.bytes,
        });
    }
    let grown = VolumeRecord {
        size_bytes: size.bytes,
        ..record.clone()
    };
    let transaction = rewrite(current, &grown);
    Ok(Some((grown, transaction)))
}

/// Another node's head has the volume: it alone knows who is connected, and decides what depends on that.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("volume {name} is served by node {}", node.0)]
pub struct ServedElsewhere {
    /// Its name.
    pub name: VolumeName,
    /// That node.
    pub node: NodeId,
}

/// Of a volume with replicas, whether `node` decides.
pub(super) fn check_decides(record: &VolumeRecord, node: NodeId) -> Result<(), ServedElsewhere> {
    match record.head {
        Some(head) if record.placement.is_replicated() && head.node != node => {
            Err(ServedElsewhere {
                name: record.name.clone(),
                node: head.node,
            })
        }
        _ => Ok(()),
    }
}

/// Why a volume's settings are not changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigureError {
    /// Clients were told the present settings when they connected.
    #[error(
        "volume {name} is in use by {connections} connection(s), and its settings are agreed when a client connects; disconnect them first"
    )]
    InUse {
        /// Its name.
        name: VolumeName,
        /// How many.
        connections: u32,
    },
    /// A client node counts on them, connected or not.
    #[error(
        "volume {name} is published to node {node}, which counts on its settings; unpublish it first"
    )]
    Published {
        /// Its name.
        name: VolumeName,
        /// To whom.
        node: ClientNodeId,
    },
    /// It is being deleted.
    #[error("volume {name} is being deleted")]
    Deleting {
        /// Its name.
        name: VolumeName,
    },
    /// See [`ServedElsewhere`].
    #[error(transparent)]
    Elsewhere(#[from] ServedElsewhere),
    /// See [`MinInSyncError`].
    #[error(transparent)]
    MinInSync(#[from] MinInSyncError),
    /// It has no copies that could be elsewhere.
    #[error(
        "volume {name} is from before its node was one of a cluster; its one copy stays on that node"
    )]
    OneCopy {
        /// Its name.
        name: VolumeName,
    },
}

/// Decides how many copies must be in sync from now on for a write to be answered. Clients may be connected: what was
/// answered before keeps what it was promised. `None`: it is so already.
pub fn set_min_in_sync(
    current: &Versioned<VolumeRecord>,
    wanted: u32,
) -> Result<Option<(VolumeRecord, Transaction)>, ConfigureError> {
    let record = &current.record;
    if record.state == VolumeState::Deleting {
        return Err(ConfigureError::Deleting {
            name: record.name.clone(),
        });
    }
    let min_in_sync = MinInSyncError::check(wanted, record.replicas)?;
    if min_in_sync == record.min_in_sync {
        return Ok(None);
    }
    let changed = VolumeRecord {
        min_in_sync,
        ..record.clone()
    };
    let transaction = rewrite(current, &changed);
    Ok(Some((changed, transaction)))
}

/// Decides a change of settings by `node`, which counted the connections; `None` leaves one as it is. Answers `None` when nothing
/// would change.
pub fn configure(
    current: &Versioned<VolumeRecord>,
    node: NodeId,
    read_only: Option<bool>,
    write_through: Option<bool>,
    connections: u32,
) -> Result<Option<(VolumeRecord, Transaction)>, ConfigureError> {
    let record = &current.record;
    if record.state == VolumeState::Deleting {
        return Err(ConfigureError::Deleting {
            name: record.name.clone(),
        });
    }
    let configured = VolumeRecord {
        read_only: read_only.unwrap_or(record.read_only),
        write_through: write_through.unwrap_or(record.write_through),
        ..record.clone()
    };
    if configured == *record {
        return Ok(None);
    }
    check_decides(record, node)?;
    if let Some(publication) = record.publications.first() {
        return Err(ConfigureError::Published {
            name: record.name.clone(),
            node: publication.node.clone(),
        });
    }
    if connections > 0 {
        return Err(ConfigureError::InUse {
            name: record.name.clone(),
            connections,
        });
    }
    let transaction = rewrite(current, &configured);
    Ok(Some((configured, transaction)))
}

/// Why a volume is not deleted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DeleteError {
    /// Clients are connected to it.
    #[error(
        "volume {name} is in use by {connections} connection(s); disconnect its clients first (nbd-client -d, umount, or stop the program that has it open)"
    )]
    InUse {
        /// Its name.
        name: VolumeName,
        /// How many.
        connections: u32,
    },
    /// A client node has it, connected or not.
    #[error(
        "volume {name} is published to node {node}; unpublish it first (`ashlar volume unpublish {name}`)"
    )]
    Published {
        /// Its name.
        name: VolumeName,
        /// To whom.
        node: ClientNodeId,
    },
    /// See [`ServedElsewhere`].
    #[error(transparent)]
    Elsewhere(#[from] ServedElsewhere),
}

/// Decides the first half of a deletion, by `node`, which counted the connections: the volume becomes a tombstone and its name is free. `None`: it is one
/// already. The tombstone goes ([`finish_delete`]) when the stores have dropped its layers, so a deletion that was cut
/// short is taken up again at the next start.
pub fn begin_delete(
    current: &Versioned<VolumeRecord>,
    node: NodeId,
    connections: u32,
) -> Result<Option<(VolumeRecord, Transaction)>, DeleteError> {
    let record = &current.record;
    if record.state == VolumeState::Deleting {
        return Ok(None);
    }
    check_decides(record, node)?;
    if let Some(publication) = record.publications.first() {
        return Err(DeleteError::Published {
            name: record.name.clone(),
            node: publication.node.clone(),
        });
    }
    if connections > 0 {
        return Err(DeleteError::InUse {
            name: record.name.clone(),
            connections,
        });
    }
    let tombstone = VolumeRecord {
        state: VolumeState::Deleting,
        ..record.clone()
    };
    let transaction = rewrite(current, &tombstone).delete(keys::name(&record.name));
    Ok(Some((tombstone, transaction)))
}

/// The second half of a deletion, to be carried out once every layer of the tombstone is durably dropped.
pub fn finish_delete(tombstone: &Versioned<VolumeRecord>) -> Transaction {
    assert_eq!(
        tombstone.record.state,
        VolumeState::Deleting,
        "only a tombstone is removed"
    );
    let key = keys::volume(tombstone.record.id);
    Transaction::new()
        .when_unchanged(key.clone(), tombstone.changed_at)
        .delete(key)
        .delete(keys::annotations(tombstone.record.id))
}

/// Replaces a volume's record. The name record needs no condition of its own: while the volume's record is unchanged,
/// `names/<its name>` points to it, because every change of one goes through a condition on the other.
pub(super) fn rewrite(current: &Versioned<VolumeRecord>, record: &VolumeRecord) -> Transaction {
    let key = keys::volume(record.id);
    Transaction::new()
        .when_unchanged(key.clone(), current.changed_at)
        .put(key, record.encode())
}

#[cfg(test)]
mod tests;
