//! When a filesystem may be made on a volume.
//!
//! No look at the device can tell a blank one from one that does not answer. The record can: a volume is born with
//! `never_written`, and its head has that taken away, durably, before the first change reaches a store.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

use super::change::rewrite;
use super::{Transaction, Versioned, VolumeName, VolumeRecord, VolumeState};

/// Longest type of a filesystem, in bytes.
const FILESYSTEM_TYPE_MAX_BYTES: usize = 32;

/// How far the making of a filesystem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FilesystemState {
    /// Announced: the volume holds part of it and nothing else.
    Formatting,
    /// Made.
    Formatted,
}

/// A filesystem on a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filesystem {
    /// As in /proc/filesystems.
    #[serde(rename = "type")]
    pub kind: FilesystemType,
    /// Its own UUID.
    pub uuid: Uuid,
    /// How far it is.
    pub state: FilesystemState,
}

/// The type of a filesystem, like `ext4`: 1 to 32 lower-case letters, digits, '-' and '_'.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FilesystemType(String);

/// A type that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{text:?} is not a type of filesystem: 1 to 32 lower-case letters, digits, '-' and '_', such as ext4"
)]
pub struct FilesystemTypeError {
    /// What was given.
    pub text: String,
}

impl FilesystemType {
    /// Checks a type.
    pub fn parse(text: &str) -> Result<FilesystemType, FilesystemTypeError> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c);
        if (1..=FILESYSTEM_TYPE_MAX_BYTES).contains(&text.len()) && text.chars().all(allowed) {
            Ok(FilesystemType(text.to_owned()))
        } else {
            Err(FilesystemTypeError {
                text: text.chars().take(2 * FILESYSTEM_TYPE_MAX_BYTES).collect(),
            })
        }
    }

    /// The type.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for FilesystemType {
    type Error = FilesystemTypeError;

    fn try_from(text: String) -> Result<FilesystemType, FilesystemTypeError> {
        FilesystemType::parse(&text)
    }
}

impl From<FilesystemType> for String {
    fn from(kind: FilesystemType) -> String {
        kind.0
    }
}

impl std::fmt::Display for FilesystemType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why no filesystem may be made, or none is recorded as made.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FormatError {
    /// There may be data on it.
    #[error(
        "volume {name} was written to, and no filesystem that was begun accounts for it: making one could destroy data. To have it blank, create a new volume"
    )]
    Written {
        /// Its name.
        name: VolumeName,
    },
    /// Another one was announced or made.
    #[error("volume {name} has a filesystem: {kind} {uuid}, {}", match state { FilesystemState::Formatting => "begun and not finished", FilesystemState::Formatted => "finished" })]
    Other {
        /// Its name.
        name: VolumeName,
        /// Of this type.
        kind: FilesystemType,
        /// With this UUID.
        uuid: Uuid,
        /// How far it is.
        state: FilesystemState,
    },
    /// None was announced.
    #[error("no filesystem was begun on volume {name}")]
    NotBegun {
        /// Its name.
        name: VolumeName,
    },
    /// It is being deleted.
    #[error("volume {name} is being deleted")]
    Deleting {
        /// Its name.
        name: VolumeName,
    },
}

/// What a record says when it is refused for the filesystem it has.
fn other(record: &VolumeRecord, filesystem: &Filesystem) -> FormatError {
    FormatError::Other {
        name: record.name.clone(),
        kind: filesystem.kind.clone(),
        uuid: filesystem.uuid,
        state: filesystem.state,
    }
}

fn not_deleting(record: &VolumeRecord) -> Result<(), FormatError> {
    match record.state {
        VolumeState::Active => Ok(()),
        VolumeState::Deleting => Err(FormatError::Deleting {
            name: record.name.clone(),
        }),
    }
}

/// Decides whether the making of a filesystem may begin. `stores_hold_blocks`: a store was found to hold blocks of the
/// volume, which is news only when the metadata is older than the stores. `None`: it was announced before and may be
/// begun again.
pub fn begin_format(
    current: &Versioned<VolumeRecord>,
    kind: &FilesystemType,
    uuid: Uuid,
    stores_hold_blocks: bool,
) -> Result<Option<(VolumeRecord, Transaction)>, FormatError> {
    let record = &current.record;
    not_deleting(record)?;
    match &record.filesystem {
        Some(known) if known.kind == *kind && known.uuid == uuid => match known.state {
            FilesystemState::Formatting => Ok(None),
            FilesystemState::Formatted => Err(other(record, known)),
        },
        Some(known) => Err(other(record, known)),
        None if !record.never_written || stores_hold_blocks => Err(FormatError::Written {
            name: record.name.clone(),
        }),
        None => {
            let mut begun = record.clone();
            begun.filesystem = Some(Filesystem {
                kind: kind.clone(),
                uuid,
                state: FilesystemState::Formatting,
            });
            let transaction = rewrite(current, &begun);
            Ok(Some((begun, transaction)))
        }
    }
}

/// Decides that the filesystem announced is made. `None`: that is recorded already.
pub fn end_format(
    current: &Versioned<VolumeRecord>,
    uuid: Uuid,
) -> Result<Option<(VolumeRecord, Transaction)>, FormatError> {
    let record = &current.record;
    not_deleting(record)?;
    match &record.filesystem {
        None => Err(FormatError::NotBegun {
            name: record.name.clone(),
        }),
        Some(known) if known.uuid != uuid => Err(other(record, known)),
        Some(known) if known.state == FilesystemState::Formatted => Ok(None),
        Some(known) => {
            let mut ended = record.clone();
            ended.filesystem = Some(Filesystem {
                state: FilesystemState::Formatted,
                ..known.clone()
            });
            let transaction = rewrite(current, &ended);
            Ok(Some((ended, transaction)))
        }
    }
}

/// Decides that a volume counts as written, which its head waits for before its first change. `None`: it does.
pub fn mark_written(current: &Versioned<VolumeRecord>) -> Option<(VolumeRecord, Transaction)> {
    if !current.record.never_written {
        return None;
    }
    let written = VolumeRecord {
        never_written: false,
        ..current.record.clone()
    };
    let transaction = rewrite(current, &written);
    Some((written, transaction))
}

#[cfg(test)]
mod tests;
