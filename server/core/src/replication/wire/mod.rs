//! The bytes between a head and the replicas of other daemons.
//!
//! A *link* is one connection from a data thread to one store of a peer. It carries messages in order, each a header
//! of 64 bytes and a body. Volumes are opened on a link as *sessions*; opening is sealing. What a message means is in
//! docs/replication.md; here is only what its bytes are. Everything received is untrusted until a `decode` function
//! returned it; none of them panics.

mod body;
mod header;
#[cfg(test)]
mod tests;

pub use body::{
    Hello, LEAF_BODY_BYTES, LeafStates, OpenBody, ROW_BYTES, RowVersions, Rows, RowsQuery,
};
pub use header::{HEADER_BYTES, Header, Kind, MAX_BODY_BYTES, Status, flags};

/// What this code speaks. A peer that speaks another is refused by name, not misunderstood.
pub const PROTOCOL_VERSION: u32 = 1;
/// Most blocks of one write or read (1 MiB), as many as a store takes at once.
pub const MAX_MESSAGE_BLOCKS: u32 = 256;
/// Most rows in one answer; with more there, the answer says so.
pub const MAX_ROWS: usize = 256;

/// Why bytes are not a message. The link is closed: what follows cannot be told apart any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The first bytes are those of something else.
    #[error("not a message of Ashlar's replica protocol")]
    Magic,
    /// The header does not match its checksum.
    #[error("the header of a message is damaged")]
    HeaderChecksum,
    /// The body does not match its checksum.
    #[error("the body of a message is damaged")]
    BodyChecksum,
    /// A later version's message.
    #[error("unknown message kind {0}")]
    Kind(u8),
    /// Checksum right, content impossible.
    #[error("impossible {0} in a message")]
    Invalid(&'static str),
    /// The peer speaks another version.
    #[error(
        "the peer speaks version {0} of the replica protocol, and this daemon version {PROTOCOL_VERSION}"
    )]
    Version(u32),
}
