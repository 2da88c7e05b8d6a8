//! The bodies of control messages.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Header, MAX_ROWS, PROTOCOL_VERSION, WireError};
use crate::records::HeadClaim;
use crate::replication::{BlockContent, BlockState};
use crate::units::{CHUNK_LEAVES, ChunkIndex, LEAF_BLOCKS, NodeId, StoreId, Version, VolumeId};
use uuid::Uuid;

fn checked<'a>(header: &Header, body: &'a [u8]) -> Result<&'a [u8], WireError> {
    if body.len() != header.body_bytes as usize {
        return Err(WireError::Invalid("length of a body"));
    }
    if crc32fast::hash(body) != header.body_crc {
        return Err(WireError::BodyChecksum);
    }
    Ok(body)
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHello {
    protocol: U32,
    reserved: U32,
    cluster: [u8; 16],
    node: [u8; 16],
    store: [u8; 16],
}
pub(super) const HELLO_BYTES: usize = 56;
const _: () = assert!(size_of::<RawHello>() == HELLO_BYTES);

/// Who is at one end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The cluster both must belong to.
    pub cluster: Uuid,
    /// The sender; must be whom its certificate names.
    pub node: NodeId,
    /// The store the link leads to.
    pub store: StoreId,
}

impl Hello {
    /// The bytes to send.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let raw = RawHello {
            protocol: U32::new(PROTOCOL_VERSION),
            reserved: U32::ZERO,
            cluster: self.cluster.into_bytes(),
            node: self.node.0.into_bytes(),
            store: self.store.0.into_bytes(),
        };
        zerocopy::transmute!(raw)
    }

    /// Checks a received body.
    pub fn decode(header: &Header, body: &[u8]) -> Result<Hello, WireError> {
        let raw = RawHello::ref_from_bytes(checked(header, body)?)
            .map_err(|_| WireError::Invalid("length of a body"))?;
        if raw.protocol.get() != PROTOCOL_VERSION {
            return Err(WireError::Version(raw.protocol.get()));
        }
        if raw.reserved.get() != 0 {
            return Err(WireError::Invalid("reserved field"));
        }
        Ok(Hello {
            cluster: Uuid::from_bytes(raw.cluster),
            node: NodeId(Uuid::from_bytes(raw.node)),
            store: StoreId(Uuid::from_bytes(raw.store)),
        })
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawOpen {
    volume: [u8; 16],
    node: [u8; 16],
    incarnation: [u8; 16],
    opening: U64,
}
pub(super) const OPEN_BYTES: usize = 56;
const _: () = assert!(size_of::<RawOpen>() == OPEN_BYTES);

/// Who opens which volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenBody {
    /// The volume.
    pub volume: VolumeId,
    /// The claim under which its head runs.
    pub claim: HeadClaim,
    /// Rises with every opening by this claim, so that an earlier one that comes late is known as such.
    pub opening: u64,
}

impl OpenBody {
    /// The bytes to send.
    pub fn encode(&self) -> [u8; OPEN_BYTES] {
        let raw = RawOpen {
            volume: self.volume.0.into_bytes(),
            node: self.claim.node.0.into_bytes(),
            incarnation: self.claim.incarnation.into_bytes(),
            opening: U64::new(self.opening),
        };
        zerocopy::transmute!(raw)
    }

    /// Checks a received body.
    pub fn decode(header: &Header, body: &[u8]) -> Result<OpenBody, WireError> {
        let raw = RawOpen::ref_from_bytes(checked(header, body)?)
            .map_err(|_| WireError::Invalid("length of a body"))?;
        Ok(OpenBody {
            volume: VolumeId(Uuid::from_bytes(raw.volume)),
            claim: HeadClaim {
                node: NodeId(Uuid::from_bytes(raw.node)),
                incarnation: Uuid::from_bytes(raw.incarnation),
            },
            opening: raw.opening.get(),
        })
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawRowsQuery {
    sets: U32,
    set: U32,
    floor: U64,
}
pub(super) const ROWS_QUERY_BYTES: usize = 16;
const _: () = assert!(size_of::<RawRowsQuery>() == ROWS_QUERY_BYTES);

/// Which rows are wanted: chunks `c` with `c mod sets = set` that hold a version of at least `floor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowsQuery {
    /// Entries of the volume's placement; at least 1.
    pub sets: u32,
    /// Which of them; smaller than `sets`.
    pub set: u32,
    /// Rows in which every version is smaller are left out.
    pub floor: Version,
}

impl RowsQuery {
    /// The bytes to send.
    pub fn encode(&self) -> [u8; ROWS_QUERY_BYTES] {
        let raw = RawRowsQuery {
            sets: U32::new(self.sets),
            set: U32::new(self.set),
            floor: U64::new(self.floor.0),
        };
        zerocopy::transmute!(raw)
    }

    /// Checks a received body.
    pub fn decode(header: &Header, body: &[u8]) -> Result<RowsQuery, WireError> {
        let raw = RawRowsQuery::ref_from_bytes(checked(header, body)?)
            .map_err(|_| WireError::Invalid("length of a body"))?;
        let (sets, set) = (raw.sets.get(), raw.set.get());
        if set >= sets {
            return Err(WireError::Invalid("replica set"));
        }
        Ok(RowsQuery {
            sets,
            set,
            floor: Version(raw.floor.get()),
        })
    }

    /// Whether a chunk's row belongs into the answer, whatever its versions.
    pub fn names(&self, chunk: ChunkIndex) -> bool {
        chunk.0 % self.sets == self.set
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawRow {
    chunk: U32,
    reserved: U32,
    leaves: [U64; CHUNK_LEAVES as usize],
}
/// Bytes of a row on the wire.
pub const ROW_BYTES: usize = 264;
const _: () = assert!(size_of::<RawRow>() == ROW_BYTES);

/// The highest version in each leaf of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowVersions {
    /// The chunk.
    pub chunk: ChunkIndex,
    /// One for each leaf; [`Version::NONE`] where nothing was ever written.
    pub leaves: [Version; CHUNK_LEAVES as usize],
}

/// Rows in the order of their chunks; at most [`MAX_ROWS`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// Ascending by chunk.
    pub rows: Vec<RowVersions>,
    /// There are more, from the last of these on.
    pub more: bool,
}

impl Rows {
    /// The bytes to send; [`Rows::more`] goes into the header's flags.
    pub fn encode(&self) -> Vec<u8> {
        let raw = |row: &RowVersions| RawRow {
            chunk: U32::new(row.chunk.0),
            reserved: U32::ZERO,
            leaves: row.leaves.map(|version| U64::new(version.0)),
        };
        let mut bytes = Vec::with_capacity(self.rows.len() * ROW_BYTES);
        for row in &self.rows {
            bytes.extend_from_slice(raw(row).as_bytes());
        }
        bytes
    }

    /// Checks a received body.
    pub fn decode(header: &Header, body: &[u8]) -> Result<Rows, WireError> {
        let raw = <[RawRow]>::ref_from_bytes(checked(header, body)?)
            .map_err(|_| WireError::Invalid("length of a body"))?;
        if raw.len() > MAX_ROWS {
            return Err(WireError::Invalid("number of rows"));
        }
        if raw.iter().any(|row| row.reserved.get() != 0) {
            return Err(WireError::Invalid("reserved field"));
        }
        if raw
            .windows(2)
            .any(|two| two[0].chunk.get() >= two[1].chunk.get())
        {
            return Err(WireError::Invalid("order of rows"));
        }
        let more = header.flags & super::flags::MORE != 0;
        if more && raw.is_empty() {
            return Err(WireError::Invalid("empty answer with more to come"));
        }
        let row = |raw: &RawRow| RowVersions {
            chunk: ChunkIndex(raw.chunk.get()),
            leaves: raw.leaves.map(|version| Version(version.get())),
        };
        Ok(Rows {
            rows: raw.iter().map(row).collect(),
            more,
        })
    }
}

/// Bytes of a leaf's states on the wire: the versions, then what each block holds.
pub const LEAF_BODY_BYTES: usize = LEAF_BLOCKS as usize * 9;

/// What a replica has of each block of a leaf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafStates(pub Box<[BlockState; LEAF_BLOCKS as usize]>);

impl LeafStates {
    /// Nothing was ever written.
    pub fn holes() -> LeafStates {
        LeafStates(Box::new([BlockState::HOLE; LEAF_BLOCKS as usize]))
    }

    /// The bytes to send.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(LEAF_BODY_BYTES);
        for state in self.0.iter() {
            bytes.extend_from_slice(&state.version.0.to_le_bytes());
        }
        bytes.extend(self.0.iter().map(|state| match state.content {
            BlockContent::Hole => 0,
            BlockContent::Zeros => 1,
            BlockContent::Data => 2,
            BlockContent::Lost => 3,
        }));
        bytes
    }

    /// Checks a received body.
    pub fn decode(header: &Header, body: &[u8]) -> Result<LeafStates, WireError> {
        let body = checked(header, body)?;
        if body.len() != LEAF_BODY_BYTES {
            return Err(WireError::Invalid("length of a body"));
        }
        let (versions, contents) = body.split_at(LEAF_BLOCKS as usize * 8);
        let mut states = LeafStates::holes();
        let fields = versions.chunks_exact(8).zip(contents);
        for (state, (version, content)) in states.0.iter_mut().zip(fields) {
            let mut number = [0; 8];
            number.copy_from_slice(version);
            state.version = Version(u64::from_le_bytes(number));
            state.content = match content {
                0 => BlockContent::Hole,
                1 => BlockContent::Zeros,
                2 => BlockContent::Data,
                3 => BlockContent::Lost,
                _ => return Err(WireError::Invalid("content of a block")),
            };
        }
        Ok(states)
    }
}
