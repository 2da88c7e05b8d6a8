//! Changes of volumes' records: read, decided and committed, again when somebody else was first.

use ashlar_core::records::{
    ClientNodeId, FilesystemType, LayerCounter, NewPublication, NewVolume, PublishError,
    RoundedSize, Transaction, Versioned, VolumeLimits, VolumeName, VolumeRecord, Zones,
    begin_delete, begin_format, claim, configure, create, end_format, keys, lose_answers,
    mark_written, publish, rename, resize, set_limits, set_min_in_sync, set_zones, unpublish,
};
use ashlar_core::units::VolumeId;
use uuid::Uuid;

use super::{ATTEMPTS, VolumeError, Volumes};
use crate::meta::{self, MetadataError, Outcome};

/// A change of records, decided afresh from what is read at each attempt.
pub(super) enum Change<'a> {
    Create(NewVolume),
    Rename {
        id: VolumeId,
        name: &'a VolumeName,
    },
    Resize {
        id: VolumeId,
        size: RoundedSize,
    },
    Configure {
        id: VolumeId,
        read_only: Option<bool>,
        write_through: Option<bool>,
        connections: u32,
    },
    BeginDelete {
        id: VolumeId,
        connections: u32,
    },
    Claim {
        id: VolumeId,
    },
    Limit {
        id: VolumeId,
        limits: VolumeLimits,
    },
    RequireInSync {
        id: VolumeId,
        min_in_sync: u32,
    },
    Confine {
        id: VolumeId,
        zones: &'a Zones,
    },
    Publish {
        id: VolumeId,
        new: &'a NewPublication,
    },
    Unpublish {
        id: VolumeId,
        node: Option<&'a ClientNodeId>,
    },
    BeginFormat {
        id: VolumeId,
        kind: &'a FilesystemType,
        uuid: Uuid,
    },
    EndFormat {
        id: VolumeId,
        uuid: Uuid,
    },
    MarkWritten {
        id: VolumeId,
    },
    LoseAnswers {
        id: VolumeId,
    },
}

impl Volumes {
    /// Reads, decides and commits until there is no conflict; `None` when nothing had to change. When the outcome is
    /// unknown, the record is read again: if it is the decided one, the transaction happened (an id is drawn once, a
    /// claim carries this run's incarnation, and the volume is locked, so nobody else writes that record).
    pub(super) async fn change(
        &self,
        change: &Change<'_>,
    ) -> Result<Option<Versioned<VolumeRecord>>, VolumeError> {
        for _ in 0..ATTEMPTS {
            let Some((record, transaction)) = self.decide(change).await? else {
                return Ok(None);
            };
            match self.store.commit(transaction).await {
                Ok(Outcome::Committed(changed_at)) => {
                    return Ok(Some(Versioned { record, changed_at }));
                }
                Ok(Outcome::Conflict) => {}
                Err(unknown @ MetadataError::Unknown { .. }) => {
                    let key = keys::volume(record.id);
                    let found = meta::read::<VolumeRecord>(&*self.store, &key).await?;
                    return match found {
                        Some(found) if found.record == record => Ok(Some(found)),
                        _ => Err(unknown.into()),
                    };
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(VolumeError::Contended)
    }

    /// Reads what a change depends on and lets the pure half decide.
    pub(super) async fn decide(
        &self,
        change: &Change<'_>,
    ) -> Result<Option<(VolumeRecord, Transaction)>, VolumeError> {
        match *change {
            Change::Create(ref new) => {
                let holder = self.name_holder(&new.name).await?;
                let counter = meta::read::<LayerCounter>(&*self.store, keys::NEXT_LAYER).await?;
                let creation = create(new.clone(), holder, counter)?;
                Ok(Some((creation.record, creation.transaction)))
            }
            Change::Rename { id, name } => {
                let holder = self.name_holder(name).await?;
                Ok(rename(&self.reread(id).await?, name, holder)?)
            }
            Change::Resize { id, size } => Ok(resize(&self.reread(id).await?, size)?),
            Change::Configure {
                id,
                read_only,
                write_through,
                connections,
            } => Ok(configure(
                &self.reread(id).await?,
                self.head.node,
                read_only,
                write_through,
                connections,
            )?),
            Change::BeginDelete { id, connections } => {
                let current = self.reread(id).await?;
                Ok(begin_delete(&current, self.head.node, connections)?)
            }
            Change::Claim { id } => {
                let current = self.reread(id).await?;
                let written = self.written_epoch(&current.record);
                Ok(Some(claim(&current, self.head, written)?))
            }
            Change::Limit { id, limits } => Ok(set_limits(&self.reread(id).await?, limits)?),
            Change::RequireInSync { id, min_in_sync } => {
                Ok(set_min_in_sync(&self.reread(id).await?, min_in_sync)?)
            }
            Change::Confine { id, zones } => Ok(set_zones(&self.reread(id).await?, zones)?),
            Change::Publish { id, new } => {
                let node = self.client_node(&new.node).await?;
                let node = node.ok_or_else(|| PublishError::UnknownNode {
                    node: new.node.clone(),
                })?;
                Ok(publish(&self.reread(id).await?, &node, new)?)
            }
            Change::Unpublish { id, node } => {
                let current = self.reread(id).await?;
                let written = self.written_epoch(&current.record);
                Ok(unpublish(&current, node, self.head, written)?)
            }
            Change::BeginFormat { id, kind, uuid } => {
                let current = self.reread(id).await?;
                let stores_hold_blocks = self.stores_hold_blocks(&current.record);
                Ok(begin_format(&current, kind, uuid, stores_hold_blocks)?)
            }
            Change::EndFormat { id, uuid } => Ok(end_format(&self.reread(id).await?, uuid)?),
            Change::MarkWritten { id } => Ok(mark_written(&self.reread(id).await?)),
            Change::LoseAnswers { id } => Ok(Some(lose_answers(&self.reread(id).await?))),
        }
    }
}
