//! The records of the metadata store and the decisions that change them.
//!
//! A decision is a pure function: it takes what was read (with the revision it was read at) and answers either a
//! [`Transaction`], which names everything it relied on, or a closed error. Carrying the transaction out, and reading
//! again when it meets a conflict, is the shell's part. No decision looks at a clock or draws an id: both come in.

mod change;
mod cluster;
mod name;
mod record;
mod size;
mod transaction;

pub use change::{
    ClaimError, ConfigureError, CreateError, Creation, DeleteError, NewVolume, RenameError,
    ResizeError, begin_delete, claim, configure, create, finish_delete, pass_over_layers, rename,
    resize,
};
pub use cluster::{
    CLIENT_NAME_MAX_BYTES, ClientNameError, ClientRecord, ClientRole, ClusterId, ClusterRecord,
    JoinError, Joiner, LABEL_MAX_BYTES, LABELS_MAX, MemberError, MemberRecord, MemberState,
    MembershipRecord, TOKEN_REMEMBERED_MS, TokenRecord, TokenUse, check_client_name, check_label,
    join, label, put_member, remove,
};
pub use name::{NAME_MAX_BYTES, NameError, VolumeName};
pub use record::{
    DecodeError, HeadClaim, LayerCounter, NameRecord, NodeRecord, Placement, Record, ScrubRecord,
    StoreRecord, VolumeRecord, VolumeState, keys,
};
pub use size::{RoundedSize, SizeError, VOLUME_MAX_BYTES, round_up_to_block};
pub use transaction::{Condition, Effect, Revision, Transaction, Versioned};
