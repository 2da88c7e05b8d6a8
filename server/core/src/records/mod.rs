//! The records of the metadata store and the decisions that change them.
//!
//! A decision is a pure function: it takes what was read (with the revision it was read at) and answers either a
//! [`Transaction`], which names everything it relied on, or a closed error. Carrying the transaction out, and reading
//! again when it meets a conflict, is the shell's part. No decision looks at a clock or draws an id: both come in.

mod annotations;
mod change;
mod client_node;
mod cluster;
mod fabric;
mod filesystem;
pub mod keys;
mod leader;
mod leftover;
mod limits;
mod loss;
mod name;
mod publication;
mod record;
mod replica;
#[cfg(test)]
mod sample;
mod size;
mod transaction;
mod zones;

pub use annotations::{
    ANNOTATIONS_MAX_BYTES, Annotations, AnnotationsError, AnnotationsMoved, AnnotationsRecord,
    annotate, first_annotations,
};
pub use change::{
    ClaimError, ConfigureError, CreateError, Creation, DeleteError, MinInSyncError, NewVolume,
    RenameError, ResizeError, ServedElsewhere, begin_delete, claim, configure, create,
    finish_delete, pass_over_layers, rename, resize, set_min_in_sync,
};
pub use client_node::{
    ClientNodeError, ClientNodeId, ClientNodeRecord, register_node, unregister_node,
};
pub use cluster::{
    CLIENT_NAME_MAX_BYTES, ClientNameError, ClientRecord, ClientRole, ClusterId, ClusterRecord,
    Holdings, JoinError, Joiner, LABEL_MAX_BYTES, LABELS_MAX, MemberError, MemberRecord,
    MemberState, MembershipRecord, TOKEN_REMEMBERED_MS, TokenRecord, TokenUse, check_client_name,
    check_label, drain, join, label, put_member, remove,
};
pub use fabric::{LinkRecord, SpaceRecord};
pub use filesystem::{
    Filesystem, FilesystemState, FilesystemType, FilesystemTypeError, FormatError, begin_format,
    end_format, mark_written,
};
pub use leader::{LeaderRecord, lead};
pub use leftover::LeftoverRecord;
pub use limits::{LimitsError, VolumeLimits, set_limits};
pub use loss::{OpenedAs, answers_may_be_gone, lose_answers};
pub use name::{NAME_MAX_BYTES, NameError, VolumeName};
pub use publication::{
    AccessMode, NewPublication, PUBLICATIONS_MAX, Publication, PublishError, UnpublishError,
    parse_export_name, publish, unpublish,
};
pub use record::{
    DecodeError, HeadClaim, LayerCounter, NameRecord, NodeRecord, PLACEMENT_ENTRIES_MAX, Placement,
    Record, ScrubRecord, StoreRecord, VolumeRecord, VolumeState,
};
pub use replica::{
    COPIES_MAX, REPLICAS_MAX, Replica, ReplicaSet, ReplicaState, SetIndex, default_min_in_sync,
};
pub use size::{RoundedSize, SizeError, VOLUME_MAX_BYTES, round_up_to_block};
pub use transaction::{Condition, Effect, Revision, Transaction, Versioned};
pub use zones::{ZONE_LABEL, ZONES_MAX, Zones, ZonesError, set_zones};
