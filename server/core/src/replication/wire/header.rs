//! The header of a message.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::body::{HELLO_BYTES, LEAF_BODY_BYTES, OPEN_BYTES, ROW_BYTES, ROWS_QUERY_BYTES};
use super::{MAX_MESSAGE_BLOCKS, MAX_ROWS, WireError};
use crate::store::ExtentKey;
use crate::units::{BLOCK_BYTES, CHUNK_BLOCKS, CHUNK_LEAVES, ChunkIndex, Epoch, LayerId, Version};

/// Bytes of every header.
pub const HEADER_BYTES: usize = 64;
/// First bytes of every message.
const MAGIC: [u8; 4] = *b"ALNK";
/// Bytes of a block and its checksum in the body of a write or of data.
const BLOCK_AND_CRC_BYTES: u32 = BLOCK_BYTES as u32 + 4;
/// Largest body: the data of a write.
pub const MAX_BODY_BYTES: u32 = MAX_MESSAGE_BLOCKS * BLOCK_AND_CRC_BYTES;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    kind: u8,
    flags: u8,
    status: U16,
    /// Over the header with this field zero.
    header_crc: U32,
    body_bytes: U32,
    session: U32,
    epoch: U32,
    version: U64,
    op: U64,
    layer: U64,
    chunk: U32,
    first_block: U32,
    count: U32,
    /// Over the body of a control message; zero where block checksums cover it.
    body_crc: U32,
}
const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<RawHeader>() == HEADER_BYTES);
    assert!(offset_of!(RawHeader, kind) == 4 && offset_of!(RawHeader, flags) == 5);
    assert!(offset_of!(RawHeader, status) == 6 && offset_of!(RawHeader, header_crc) == 8);
    assert!(offset_of!(RawHeader, body_bytes) == 12 && offset_of!(RawHeader, session) == 16);
    assert!(offset_of!(RawHeader, epoch) == 20 && offset_of!(RawHeader, version) == 24);
    assert!(offset_of!(RawHeader, op) == 32 && offset_of!(RawHeader, layer) == 40);
    assert!(offset_of!(RawHeader, chunk) == 48 && offset_of!(RawHeader, first_block) == 52);
    assert!(offset_of!(RawHeader, count) == 56 && offset_of!(RawHeader, body_crc) == 60);
};

/// What a message is. The numbers are on the wire and never change their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// First message of the side that connected: who it is and which store it wants. Body: [`super::Hello`].
    Hello = 1,
    /// The answer: welcome, with the peer's own [`super::Hello`], or a status that says why not.
    Welcome = 2,
    /// Open a volume on this link and seal it: `session` is the tag to use, `epoch` the seal. Body:
    /// [`super::OpenBody`].
    Open = 3,
    /// The answer to `Open`: `epoch` is the epoch the replica is sealed at, `version` the largest that it holds.
    Opened = 4,
    /// No more operations come on this session. With [`flags::CLEAN`] everything is flushed and the volume is no
    /// longer open for writing; answered with `Done`.
    Close = 5,
    /// The replica was sealed by another head, at `epoch`; nothing of this session is taken any more.
    Fenced = 6,
    /// Asks for a sign of life; `op` comes back.
    Heartbeat = 7,
    /// The sign. Whatever `Fenced` there is was sent before it. `version` is the store's free blocks.
    Alive = 8,
    /// `op` more bytes may be sent on this link.
    Credit = 9,
    /// The copy is whole: what it had lost to a power loss is there again and flushed. Answered with `Done`.
    Whole = 10,
    /// From the replica, unasked: its scrub found `count` blocks that cannot be read. The head writes them again from a
    /// good copy.
    Damaged = 11,
    /// Write `count` blocks. Body: their checksums, then their bytes.
    Write = 16,
    /// Make `count` blocks read as zeros.
    Zero = 17,
    /// Read `count` blocks. Answered with `Data`, or with `Done` and a status.
    Read = 18,
    /// Make everything answered so far durable.
    Flush = 19,
    /// Ask for the highest version in each leaf, of chunks from `chunk` on. Body: [`super::RowsQuery`].
    ReadRows = 20,
    /// Ask for the version of each block of leaf `first_block` of `chunk`.
    ReadLeaf = 21,
    /// Operation `op` ended; `status` says how.
    Done = 32,
    /// What a `Read` found. Body as of `Write`; with [`flags::ZEROS`] none, and all blocks read as zeros.
    Data = 33,
    /// Body: [`super::Rows`]. With [`flags::MORE`] there are more.
    Rows = 34,
    /// Body: [`super::LeafStates`].
    Leaf = 35,
}

impl Kind {
    const ALL: [Kind; 21] = [
        Kind::Hello,
        Kind::Welcome,
        Kind::Open,
        Kind::Opened,
        Kind::Close,
        Kind::Fenced,
        Kind::Heartbeat,
        Kind::Alive,
        Kind::Credit,
        Kind::Whole,
        Kind::Damaged,
        Kind::Write,
        Kind::Zero,
        Kind::Read,
        Kind::Flush,
        Kind::ReadRows,
        Kind::ReadLeaf,
        Kind::Done,
        Kind::Data,
        Kind::Rows,
        Kind::Leaf,
    ];

    fn from_wire(byte: u8) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// Bits of [`Header::flags`].
pub mod flags {
    /// Of a change: answer when it is on stable storage.
    pub const DURABLE: u8 = 1;
    /// Of `Data`: there is no body, all blocks read as zeros.
    pub const ZEROS: u8 = 2;
    /// Of `Rows`: there are more.
    pub const MORE: u8 = 4;
    /// Of `Opened`: the replica lost power while it was open for writing, and lacks what was not flushed.
    pub const LOST_POWER: u8 = 8;
    /// Of `Close`: in order.
    pub const CLEAN: u8 = 16;
    /// Of `Open`: the replica will be brought up to date; it is not in sync.
    pub const RESYNC: u8 = 32;

    pub(super) const KNOWN: u8 = DURABLE | ZEROS | MORE | LOST_POWER | CLEAN | RESYNC;
}

/// How an operation ended at a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[repr(u16)]
pub enum Status {
    /// Done.
    #[error("done")]
    Ok = 0,
    /// The volume is sealed at a larger epoch, or the session is not (any longer) the one that may operate.
    #[error("the replica follows another head")]
    Fenced = 1,
    /// New blocks do not fit; nothing was taken.
    #[error("the store has no room")]
    NoSpace = 2,
    /// The store stopped after an I/O error.
    #[error("the store stopped after an I/O error")]
    Poisoned = 3,
    /// The device could not read.
    #[error("the device failed to read")]
    Device = 4,
    /// What was read is not what was written, or its mapping is damaged.
    #[error("checksum mismatch")]
    Corrupt = 5,
    /// A block did not arrive as the head sent it; nothing was taken.
    #[error("a block was damaged on the way")]
    Garbled = 6,
    /// The peer has no such store, belongs to another cluster, or the sender may not do this.
    #[error("refused")]
    Refused = 7,
}

impl Status {
    /// The status with this number; `None`: there is none.
    pub fn from_wire(number: u16) -> Option<Status> {
        [
            Status::Ok,
            Status::Fenced,
            Status::NoSpace,
            Status::Poisoned,
            Status::Device,
            Status::Corrupt,
            Status::Garbled,
            Status::Refused,
        ]
        .into_iter()
        .find(|status| *status as u16 == number)
    }
}

/// A checked header. Fields that a kind does not use are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// See [`flags`].
    pub flags: u8,
    /// Of answers.
    pub status: Status,
    /// Bytes that follow.
    pub body_bytes: u32,
    /// CRC-32 of a control message's body.
    pub body_crc: u32,
    /// Which of the link's volumes.
    pub session: u32,
    /// The session's epoch, or as the kind says.
    pub epoch: Epoch,
    /// Of changes; otherwise as the kind says.
    pub version: Version,
    /// The sender's name for an operation; comes back with the answer.
    pub op: u64,
    /// Which chunk of which layer.
    pub extent: ExtentKey,
    /// First block in the chunk (or which leaf).
    pub first_block: u32,
    /// Blocks (or rows wanted).
    pub count: u32,
}

impl Header {
    /// A header with everything zero but its kind.
    pub fn new(kind: Kind) -> Header {
        Header {
            kind,
            flags: 0,
            status: Status::Ok,
            body_bytes: 0,
            body_crc: 0,
            session: 0,
            epoch: Epoch(0),
            version: Version::NONE,
            op: 0,
            extent: ExtentKey {
                layer: LayerId(0),
                chunk: ChunkIndex(0),
            },
            first_block: 0,
            count: 0,
        }
    }

    /// Names the body of a control message.
    pub fn with_body(mut self, body: &[u8]) -> Header {
        self.body_bytes = body.len() as u32;
        self.body_crc = crc32fast::hash(body);
        self
    }

    /// Bytes of the body of a `Write` or of `Data` with `count` blocks.
    pub fn data_body_bytes(count: u32) -> u32 {
        count * BLOCK_AND_CRC_BYTES
    }

    /// The bytes to send.
    #[inline]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut raw = RawHeader {
            magic: MAGIC,
            kind: self.kind as u8,
            flags: self.flags,
            status: U16::new(self.status as u16),
            header_crc: U32::ZERO,
            body_bytes: U32::new(self.body_bytes),
            session: U32::new(self.session),
            epoch: U32::new(self.epoch.0),
            version: U64::new(self.version.0),
            op: U64::new(self.op),
            layer: U64::new(self.extent.layer.0),
            chunk: U32::new(self.extent.chunk.0),
            first_block: U32::new(self.first_block),
            count: U32::new(self.count),
            body_crc: U32::new(self.body_crc),
        };
        raw.header_crc = U32::new(crc32fast::hash(raw.as_bytes()));
        let mut bytes = [0; HEADER_BYTES];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// Checks received bytes.
    #[inline]
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, WireError> {
        let mut raw = *RawHeader::ref_from_bytes(bytes)
            .map_err(|_| WireError::Invalid("length of a header"))?;
        if raw.magic != MAGIC {
            return Err(WireError::Magic);
        }
        let crc = std::mem::replace(&mut raw.header_crc, U32::ZERO);
        if crc32fast::hash(raw.as_bytes()) != crc.get() {
            return Err(WireError::HeaderChecksum);
        }
        let header = Header {
            kind: Kind::from_wire(raw.kind).ok_or(WireError::Kind(raw.kind))?,
            flags: raw.flags,
            status: Status::from_wire(raw.status.get()).ok_or(WireError::Invalid("status"))?,
            body_bytes: raw.body_bytes.get(),
            body_crc: raw.body_crc.get(),
            session: raw.session.get(),
            epoch: Epoch(raw.epoch.get()),
            version: Version(raw.version.get()),
            op: raw.op.get(),
            extent: ExtentKey {
                layer: LayerId(raw.layer.get()),
                chunk: ChunkIndex(raw.chunk.get()),
            },
            first_block: raw.first_block.get(),
            count: raw.count.get(),
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), WireError> {
        if self.flags & !flags::KNOWN != 0 {
            return Err(WireError::Invalid("flag"));
        }
        if self.epoch > Epoch::MAX {
            return Err(WireError::Invalid("epoch"));
        }
        if matches!(
            self.kind,
            Kind::Write | Kind::Zero | Kind::Read | Kind::Data | Kind::Damaged
        ) {
            let end = self.first_block.checked_add(self.count);
            if self.count == 0 || end.is_none_or(|end| end > CHUNK_BLOCKS) {
                return Err(WireError::Invalid("range of blocks"));
            }
            if self.kind != Kind::Zero && self.count > MAX_MESSAGE_BLOCKS {
                return Err(WireError::Invalid("number of blocks"));
            }
            if matches!(self.kind, Kind::Write | Kind::Zero) && self.version == Version::NONE {
                return Err(WireError::Invalid("version"));
            }
        }
        if matches!(self.kind, Kind::ReadLeaf | Kind::Leaf) && self.first_block >= CHUNK_LEAVES {
            return Err(WireError::Invalid("leaf"));
        }
        let body = self.body_bytes as usize;
        let right = match self.kind {
            Kind::Hello => body == HELLO_BYTES,
            Kind::Welcome => body == HELLO_BYTES || (body == 0 && self.status != Status::Ok),
            Kind::Open => body == OPEN_BYTES,
            Kind::Write => body == Header::data_body_bytes(self.count) as usize,
            Kind::Data if self.flags & flags::ZEROS == 0 => {
                body == Header::data_body_bytes(self.count) as usize
            }
            Kind::ReadRows => body == ROWS_QUERY_BYTES,
            Kind::Rows => body.is_multiple_of(ROW_BYTES) && body <= MAX_ROWS * ROW_BYTES,
            Kind::Leaf => body == LEAF_BODY_BYTES,
            _ => body == 0,
        };
        if right {
            Ok(())
        } else {
            Err(WireError::Invalid("length of a body"))
        }
    }
}
