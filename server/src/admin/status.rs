//! From errors to gRPC: the one place that chooses codes. The table is in the proto file.

use ashlar_core::records::{
    ConfigureError, CreateError, JoinError, MemberError, PublishError, RenameError, ZonesError,
};
use tonic::{Code, Status};

use crate::meta::MetadataError;
use crate::volumes::{HostError, VolumeError};

/// The status of a failed operation on a volume; its message is the error's.
pub(super) fn of_volume_error(error: &VolumeError) -> Status {
    let code = match error {
        VolumeError::NotFound { .. } => Code::NotFound,
        VolumeError::Name(_)
        | VolumeError::Size(_)
        | VolumeError::FilesystemType(_)
        | VolumeError::Annotations(_)
        | VolumeError::Limits(_)
        | VolumeError::TooManyCopies { .. }
        | VolumeError::Zones(ZonesError::Name(_) | ZonesError::TooMany(_))
        | VolumeError::ClientNode(_) => Code::InvalidArgument,
        VolumeError::Publish(PublishError::UnknownNode { .. }) => Code::NotFound,
        VolumeError::Publish(PublishError::OtherTerms { .. }) => Code::AlreadyExists,
        VolumeError::Publish(PublishError::TooMany { .. }) => Code::ResourceExhausted,
        VolumeError::Publish(
            PublishError::Elsewhere { .. }
            | PublishError::ReadOnly { .. }
            | PublishError::Deleting { .. },
        )
        | VolumeError::Format(_) => Code::FailedPrecondition,
        VolumeError::AnnotationsMoved(_) => Code::Aborted,
        VolumeError::Create(CreateError::NameTaken { .. })
        | VolumeError::Rename(RenameError::NameTaken { .. }) => Code::AlreadyExists,
        VolumeError::Create(CreateError::MinInSync(_))
        | VolumeError::Configure(ConfigureError::MinInSync(_)) => Code::InvalidArgument,
        VolumeError::Create(CreateError::NoStore)
        | VolumeError::Claim(_)
        | VolumeError::Rename(RenameError::Deleting { .. })
        | VolumeError::Resize(_)
        | VolumeError::Configure(_)
        | VolumeError::Delete(_)
        | VolumeError::NotServed { .. }
        | VolumeError::NotFreed { .. } => Code::FailedPrecondition,
        VolumeError::NoCluster { .. }
        | VolumeError::Zones(ZonesError::NoCluster)
        | VolumeError::Elsewhere { .. }
        | VolumeError::OneCopyElsewhere { .. }
        | VolumeError::NotPublished { .. } => Code::FailedPrecondition,
        VolumeError::Create(CreateError::LayersExhausted)
        | VolumeError::TooFewNodes(_)
        | VolumeError::TooFewInZones { .. } => Code::ResourceExhausted,
        VolumeError::Metadata(error) => of_metadata_error(error),
        VolumeError::BadRecord { .. } => Code::DataLoss,
        VolumeError::Contended => Code::Aborted,
        VolumeError::Host { source, .. } => of_host_error(source),
        VolumeError::ShuttingDown => Code::Unavailable,
    };
    Status::new(code, error.to_string())
}

pub(super) fn of_metadata_error(error: &MetadataError) -> Code {
    match error {
        MetadataError::Unavailable { .. } => Code::Unavailable,
        MetadataError::Unknown { .. } | MetadataError::Compacted { .. } => Code::Aborted,
        MetadataError::Invalid { .. } => Code::Internal,
        MetadataError::Unreadable { .. } => Code::DataLoss,
    }
}

/// The code for a refusal of the data plane.
pub(super) fn of_host_error(error: &HostError) -> Code {
    match error {
        HostError::Busy { .. }
        | HostError::NotOpen
        | HostError::StoreMissing { .. }
        | HostError::Store { .. } => Code::FailedPrecondition,
        HostError::ShuttingDown => Code::Unavailable,
    }
}

/// The status of metadata that could not be read or written.
pub(super) fn unread(error: MetadataError) -> Status {
    Status::new(of_metadata_error(&error), error.to_string())
}

/// The status of a refused change of a node.
pub(super) fn of_member_error(error: &MemberError) -> Status {
    let code = match error {
        MemberError::NotFound { .. } => Code::NotFound,
        MemberError::Label { .. } => Code::InvalidArgument,
        MemberError::HoldsVolumes { .. }
        | MemberError::HoldsCopies { .. }
        | MemberError::Serves { .. }
        | MemberError::Removed { .. }
        | MemberError::Itself { .. }
        | MemberError::LastAuthority { .. } => Code::FailedPrecondition,
    };
    Status::new(code, error.to_string())
}

/// The status of a refused joining.
pub(super) fn of_join_error(error: &JoinError) -> Status {
    let code = match error {
        JoinError::UnknownToken => Code::PermissionDenied,
        JoinError::ExpiredToken
        | JoinError::UsedToken
        | JoinError::Removed { .. }
        | JoinError::AlreadyIn { .. } => Code::FailedPrecondition,
    };
    Status::new(code, error.to_string())
}

#[cfg(test)]
mod tests {
    use ashlar_core::placement::TooFewNodes;
    use ashlar_core::records::{
        DeleteError, MinInSyncError, NameError, ResizeError, SizeError, VolumeName, Zones,
    };
    use ashlar_core::units::VolumeId;

    use super::*;

    #[test]
    fn the_table_holds() {
        let name = || VolumeName::parse("db").expect("name");
        let reference = || "db".to_owned();
        let reason = || "why".to_owned();
        let holder = VolumeId(uuid::Uuid::from_u128(1));
        let too_many_in_sync = MinInSyncError {
            wanted: 3,
            replicas: 2,
        };
        let table = [
            (
                VolumeError::NotFound {
                    reference: reference(),
                },
                Code::NotFound,
            ),
            (NameError::Empty.into(), Code::InvalidArgument),
            (ZonesError::TooMany(17).into(), Code::InvalidArgument),
            (ZonesError::NoCluster.into(), Code::FailedPrecondition),
            (
                VolumeError::TooFewInZones {
                    zones: Zones::default(),
                    source: TooFewNodes {
                        wanted: 2,
                        nodes: 1,
                    },
                },
                Code::ResourceExhausted,
            ),
            (
                ConfigureError::OneCopy { name: name() }.into(),
                Code::FailedPrecondition,
            ),
            (SizeError::Zero.into(), Code::InvalidArgument),
            (
                CreateError::NameTaken {
                    name: name(),
                    holder,
                }
                .into(),
                Code::AlreadyExists,
            ),
            (
                RenameError::NameTaken {
                    name: name(),
                    holder,
                }
                .into(),
                Code::AlreadyExists,
            ),
            (
                RenameError::Deleting { name: name() }.into(),
                Code::FailedPrecondition,
            ),
            (CreateError::NoStore.into(), Code::FailedPrecondition),
            (CreateError::LayersExhausted.into(), Code::ResourceExhausted),
            (
                CreateError::from(too_many_in_sync).into(),
                Code::InvalidArgument,
            ),
            (
                ConfigureError::from(too_many_in_sync).into(),
                Code::InvalidArgument,
            ),
            (
                ResizeError::Shrink {
                    name: name(),
                    from_bytes: 2,
                    to_bytes: 1,
                }
                .into(),
                Code::FailedPrecondition,
            ),
            (
                DeleteError::InUse {
                    name: name(),
                    connections: 1,
                }
                .into(),
                Code::FailedPrecondition,
            ),
            (
                MetadataError::Unavailable { reason: reason() }.into(),
                Code::Unavailable,
            ),
            (
                MetadataError::Unknown { reason: reason() }.into(),
                Code::Aborted,
            ),
            (
                MetadataError::Unreadable { reason: reason() }.into(),
                Code::DataLoss,
            ),
            (VolumeError::Contended, Code::Aborted),
            (VolumeError::ShuttingDown, Code::Unavailable),
            (
                VolumeError::NotServed {
                    reference: reference(),
                    reason: reason(),
                },
                Code::FailedPrecondition,
            ),
            (
                VolumeError::Host {
                    reference: reference(),
                    source: HostError::ShuttingDown,
                },
                Code::Unavailable,
            ),
        ];
        for (error, code) in table {
            let status = of_volume_error(&error);
            assert_eq!(status.code(), code, "{error:?}");
            assert_eq!(status.message(), error.to_string());
        }
    }
}
