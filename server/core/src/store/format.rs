//! What a store's bytes mean: superblock, frame, leaf and checkpoint. `docs/on-disk.md` says the same in words.
//!
//! All numbers are little-endian. Checksums are CRC-32 (IEEE 802.3, reflected polynomial 0xEDB88320), as computed
//! by crc32fast. Everything read is untrusted until a `decode` function here returned it.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::units::{
    BLOCK_BYTES, CHUNK_BLOCKS, CHUNK_LEAVES, ChunkIndex, LEAF_BLOCKS, LayerId, StoreId,
};

/// The format this code reads and writes; an unknown one is refused.
pub const FORMAT_VERSION: u32 = 1;
/// First bytes of a superblock.
pub const SUPERBLOCK_MAGIC: [u8; 8] = *b"ASHLARSB";
/// First bytes of a frame header.
pub const FRAME_MAGIC: [u8; 8] = *b"ASHLARFR";
/// First bytes of a checkpoint.
pub const CHECKPOINT_MAGIC: [u8; 8] = *b"ASHLARCP";
/// Blocks before the first checkpoint area; the superblock copies live here, 256 KiB apart.
pub const RESERVED_BLOCKS: u32 = 256;
/// Where the copies of the even and the odd superblock generation are.
pub const SUPERBLOCK_BLOCKS: [[u32; 2]; 2] = [[0, 64], [128, 192]];

/// A block's place in the store, counted in blocks from its start. 32 bits reach 16 TiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Addr(pub u32);

impl Addr {
    /// Never written: reads as zeros, or as the parent layer.
    pub const UNMAPPED: Addr = Addr(0);
    /// Written as zeros or trimmed: reads as zeros and masks the parent layer.
    pub const ZERO: Addr = Addr(1);
    /// The mapping was damaged on disk: reads fail until the block is written again.
    pub const LOST: Addr = Addr(2);

    /// Whether this names blocks in a segment (and not one of the markers above).
    pub fn is_stored(self) -> bool {
        self.0 >= RESERVED_BLOCKS
    }

    /// Byte offset in the store.
    pub fn offset(self) -> u64 {
        u64::from(self.0) * BLOCK_BYTES as u64
    }
}

/// Where the parts of a store are. Fixed when the store is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks in a segment; a power of two.
    pub segment_blocks: u32,
    /// How many segments the store may grow to.
    pub segments_max: u32,
    /// Blocks in each of the two checkpoint areas.
    pub checkpoint_blocks: u32,
}

impl Geometry {
    /// The largest geometry that fits in `bytes`, or `None` when that is too small to be a store.
    pub fn for_size(bytes: u64, segment_blocks: Option<u32>) -> Option<Geometry> {
        let blocks = u32::try_from(bytes / BLOCK_BYTES as u64).unwrap_or(u32::MAX);
        // 256 to 512 segments in a small store, 16 MiB each in a large one: cleaning needs many to choose from.
        let segment_blocks =
            segment_blocks.unwrap_or_else(|| (blocks / 512).next_power_of_two().clamp(256, 4096));
        // The directory of a dense store is 0.013 % of it; 1 % leaves room for very sparse volumes.
        let checkpoint_blocks = (blocks / 100).max(64);
        let left = blocks.checked_sub(RESERVED_BLOCKS + 2 * checkpoint_blocks)?;
        let segments_max = left / segment_blocks;
        (segments_max >= 16).then_some(Geometry {
            segment_blocks,
            segments_max,
            checkpoint_blocks,
        })
    }

    /// First block of the first segment.
    pub fn first_segment_block(&self) -> u32 {
        RESERVED_BLOCKS + 2 * self.checkpoint_blocks
    }

    /// First block of segment `segment`.
    pub fn segment_start(&self, segment: u32) -> Addr {
        Addr(self.first_segment_block() + segment * self.segment_blocks)
    }

    /// The segment that holds `addr`, which must be a stored address of this store.
    pub fn segment_of(&self, addr: Addr) -> u32 {
        (addr.0 - self.first_segment_block()) >> self.segment_blocks.trailing_zeros()
    }

    /// Whether `count` blocks at `addr` lie inside one segment.
    pub fn contains(&self, addr: Addr, count: u32) -> bool {
        let first = self.first_segment_block();
        let end = first + self.segments_max * self.segment_blocks;
        count > 0
            && addr.0 >= first
            && addr.0.checked_add(count).is_some_and(|e| e <= end)
            && self.segment_of(addr) == self.segment_of(Addr(addr.0 + count - 1))
    }

    /// First block of checkpoint area 0 or 1.
    pub fn checkpoint_start(&self, area: u32) -> Addr {
        Addr(RESERVED_BLOCKS + area * self.checkpoint_blocks)
    }

    /// Bytes from the store's start to the end of its last possible segment.
    pub fn total_bytes(&self) -> u64 {
        (u64::from(self.first_segment_block())
            + u64::from(self.segments_max) * u64::from(self.segment_blocks))
            * BLOCK_BYTES as u64
    }

    fn is_sane(&self) -> bool {
        let total = u64::from(RESERVED_BLOCKS)
            + 2 * u64::from(self.checkpoint_blocks)
            + u64::from(self.segments_max) * u64::from(self.segment_blocks);
        self.segment_blocks.is_power_of_two()
            && (16..=1 << 20).contains(&self.segment_blocks)
            && self.segments_max >= 4
            && self.checkpoint_blocks > 0
            && total <= u64::from(u32::MAX)
    }
}

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The first bytes are those of something else.
    #[error("no Ashlar signature")]
    Magic,
    /// The checksum does not match.
    #[error("checksum mismatch")]
    Checksum,
    /// Written by a later version of Ashlar.
    #[error("format version {0} (this daemon knows {FORMAT_VERSION})")]
    Version(u32),
    /// Checksum right, content impossible.
    #[error("impossible {0}")]
    Invalid(&'static str),
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawSuperblock {
    magic: [u8; 8],
    /// Over the whole block with this field zero.
    crc: U32,
    format: U32,
    generation: U64,
    store: [u8; 16],
    node: [u8; 16],
    segment_blocks: U32,
    segments_max: U32,
    checkpoint_blocks: U32,
    clean: U32,
    incarnation: U64,
    tail_incarnation: U64,
    boot: [u8; 16],
    checkpoint_seq: U64,
    checkpoint_area: U32,
    checkpoint_crc: U32,
    checkpoint_bytes: U64,
    created_unix_ms: U64,
    reserved: [u8; 3960],
}
const _: () = assert!(size_of::<RawSuperblock>() == BLOCK_BYTES);

/// The root of a store: who it belongs to and which checkpoint is its newest. Written as two copies, alternately to
/// two slots, so that a torn write leaves the older one and a rotten block leaves its twin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Rises with every superblock written; the newest valid one counts.
    pub generation: u64,
    /// This store.
    pub store: StoreId,
    /// The daemon it belongs to.
    pub node: [u8; 16],
    /// Where the parts are.
    pub geometry: Geometry,
    /// Closed in order: the checkpoint holds everything and no tail is wanted.
    pub clean: bool,
    /// How often the store was opened; frames carry it, so that a frame of an earlier life is known as such.
    pub incarnation: u64,
    /// The incarnation whose tail holds acknowledged writes.
    pub tail_incarnation: u64,
    /// The machine's boot in which the store was last opened: a tail of another boot is void.
    pub boot: [u8; 16],
    /// Rises with every checkpoint.
    pub checkpoint_seq: u64,
    /// Which of the two areas holds it.
    pub checkpoint_area: u32,
    /// CRC-32 of its bytes.
    pub checkpoint_crc: u32,
    /// Its length in bytes.
    pub checkpoint_bytes: u64,
    /// When the store was made, milliseconds since 1970 UTC.
    pub created_unix_ms: u64,
}

impl Superblock {
    /// Writes the superblock into `block` (one block).
    pub fn encode(&self, block: &mut [u8]) {
        let mut raw = RawSuperblock {
            magic: SUPERBLOCK_MAGIC,
            crc: U32::ZERO,
            format: U32::new(FORMAT_VERSION),
            generation: U64::new(self.generation),
            store: self.store.0.into_bytes(),
            node: self.node,
            segment_blocks: U32::new(self.geometry.segment_blocks),
            segments_max: U32::new(self.geometry.segments_max),
            checkpoint_blocks: U32::new(self.geometry.checkpoint_blocks),
            clean: U32::new(u32::from(self.clean)),
            incarnation: U64::new(self.incarnation),
            tail_incarnation: U64::new(self.tail_incarnation),
            boot: self.boot,
            checkpoint_seq: U64::new(self.checkpoint_seq),
            checkpoint_area: U32::new(self.checkpoint_area),
            checkpoint_crc: U32::new(self.checkpoint_crc),
            checkpoint_bytes: U64::new(self.checkpoint_bytes),
            created_unix_ms: U64::new(self.created_unix_ms),
            reserved: [0; 3960],
        };
        raw.crc = U32::new(crc32fast::hash(raw.as_bytes()));
        block.copy_from_slice(raw.as_bytes());
    }

    /// Reads one copy of a superblock.
    pub fn decode(block: &[u8]) -> Result<Superblock, FormatError> {
        let mut raw = RawSuperblock::read_from_bytes(block)
            .map_err(|_| FormatError::Invalid("superblock length"))?;
        if raw.magic != SUPERBLOCK_MAGIC {
            return Err(FormatError::Magic);
        }
        let crc = std::mem::replace(&mut raw.crc, U32::ZERO);
        if crc32fast::hash(raw.as_bytes()) != crc.get() {
            return Err(FormatError::Checksum);
        }
        if raw.format.get() != FORMAT_VERSION {
            return Err(FormatError::Version(raw.format.get()));
        }
        let geometry = Geometry {
            segment_blocks: raw.segment_blocks.get(),
            segments_max: raw.segments_max.get(),
            checkpoint_blocks: raw.checkpoint_blocks.get(),
        };
        if !geometry.is_sane() {
            return Err(FormatError::Invalid("geometry"));
        }
        if raw.checkpoint_area.get() > 1
            || raw.checkpoint_bytes.get()
                > u64::from(geometry.checkpoint_blocks) * BLOCK_BYTES as u64
            || raw.reserved.iter().any(|&b| b != 0)
        {
            return Err(FormatError::Invalid("superblock"));
        }
        Ok(Superblock {
            generation: raw.generation.get(),
            store: StoreId(uuid::Uuid::from_bytes(raw.store)),
            node: raw.node,
            geometry,
            clean: raw.clean.get() != 0,
            incarnation: raw.incarnation.get(),
            tail_incarnation: raw.tail_incarnation.get(),
            boot: raw.boot,
            checkpoint_seq: raw.checkpoint_seq.get(),
            checkpoint_area: raw.checkpoint_area.get(),
            checkpoint_crc: raw.checkpoint_crc.get(),
            checkpoint_bytes: raw.checkpoint_bytes.get(),
            created_unix_ms: raw.created_unix_ms.get(),
        })
    }
}

/// A frame's header is always one block: 111 single-block writes fit, which costs 0.9 % of the log.
pub const FRAME_HEADER_BLOCKS: u32 = 1;
/// Data blocks a frame can hold; with its header a frame is at most 1 MiB, the piece disks like.
pub const FRAME_DATA_BLOCKS: u32 = 255;
/// Bytes of the fixed part of a frame header.
pub const FRAME_FIXED_BYTES: usize = size_of::<RawFrame>();
/// Bytes of an entry without its checksums.
pub const ENTRY_BYTES: usize = size_of::<RawEntry>();
/// Where the progress word stands in a header.
pub const PROGRESS_OFFSET: usize = std::mem::offset_of!(RawFrame, progress);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawFrame {
    magic: [u8; 8],
    /// Over the whole header block with this field zero. Filled in when the frame is closed.
    crc: U32,
    addr: U32,
    store: [u8; 16],
    /// Entries, entry bytes, data blocks and flags in one word: in the tail it is published by one store.
    progress: U64,
    incarnation: U64,
    seq: U64,
    durable_seq: U64,
    checkpoint_seq: U64,
    next_segment: U32,
    reserved: U32,
}
const _: () = assert!(size_of::<RawFrame>() == 80 && PROGRESS_OFFSET % 8 == 0);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawEntry {
    layer: U64,
    version: U64,
    chunk: U32,
    first_block: U16,
    count: U16,
    data_start: U16,
    kind: u8,
    flags: u8,
    reserved: U32,
}
const _: () = assert!(size_of::<RawEntry>() == 32);

/// How much of a frame is filled in, as one 64-bit word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Progress {
    /// Entries in the header.
    pub entries: u16,
    /// Bytes they take.
    pub entry_bytes: u16,
    /// Data blocks behind the header.
    pub data_blocks: u16,
    /// The header is complete and has its checksum.
    pub closed: bool,
    /// Written by the cleaner or a checkpoint, not by clients.
    pub cold: bool,
}

impl Progress {
    /// The word.
    pub fn to_word(self) -> u64 {
        u64::from(self.entries)
            | u64::from(self.entry_bytes) << 16
            | u64::from(self.data_blocks) << 32
            | u64::from(self.closed) << 48
            | u64::from(self.cold) << 49
    }

    /// The word taken apart.
    pub fn from_word(word: u64) -> Result<Progress, FormatError> {
        if word >> 50 != 0 {
            return Err(FormatError::Invalid("frame flags"));
        }
        Ok(Progress {
            entries: word as u16,
            entry_bytes: (word >> 16) as u16,
            data_blocks: (word >> 32) as u16,
            closed: word >> 48 & 1 != 0,
            cold: word >> 49 & 1 != 0,
        })
    }
}

/// The fixed part of a frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// The block this header lies in: a misdirected frame is not believed.
    pub addr: Addr,
    /// The store.
    pub store: StoreId,
    /// How much follows.
    pub progress: Progress,
    /// The store's incarnation that wrote it.
    pub incarnation: u64,
    /// Its place in the log: consecutive for client frames.
    pub seq: u64,
    /// Every client frame up to this one was durable when this one was built.
    pub durable_seq: u64,
    /// The newest durable checkpoint when this frame was built.
    pub checkpoint_seq: u64,
    /// The segment in which the log goes on when this one is full.
    pub next_segment: u32,
}

impl FrameHeader {
    /// Writes the fixed part, without checksum, at the start of `block`.
    pub fn encode(&self, block: &mut [u8]) {
        let raw = RawFrame {
            magic: FRAME_MAGIC,
            crc: U32::ZERO,
            addr: U32::new(self.addr.0),
            store: self.store.0.into_bytes(),
            progress: U64::new(self.progress.to_word()),
            incarnation: U64::new(self.incarnation),
            seq: U64::new(self.seq),
            durable_seq: U64::new(self.durable_seq),
            checkpoint_seq: U64::new(self.checkpoint_seq),
            next_segment: U32::new(self.next_segment),
            reserved: U32::ZERO,
        };
        block[..FRAME_FIXED_BYTES].copy_from_slice(raw.as_bytes());
    }

    /// Puts the checksum of the whole header block in its place; the last thing done to a header.
    pub fn seal(block: &mut [u8]) {
        block[8..12].fill(0);
        let crc = crc32fast::hash(&block[..BLOCK_BYTES]);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads a header from a block on disk and checks everything but its entries.
    pub fn decode(block: &[u8]) -> Result<FrameHeader, FormatError> {
        let header = Self::decode_open(block)?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&block[..8]);
        crc.update(&[0; 4]);
        crc.update(&block[12..BLOCK_BYTES]);
        if crc.finalize().to_le_bytes() != block[8..12] {
            return Err(FormatError::Checksum);
        }
        if !header.progress.closed {
            return Err(FormatError::Invalid("open frame"));
        }
        Ok(header)
    }

    /// Reads a header from the tail, where the last frame may still be open and has no checksum.
    pub fn decode_open(block: &[u8]) -> Result<FrameHeader, FormatError> {
        let (raw, _) =
            RawFrame::read_from_prefix(block).map_err(|_| FormatError::Invalid("frame length"))?;
        if raw.magic != FRAME_MAGIC {
            return Err(FormatError::Magic);
        }
        let progress = Progress::from_word(raw.progress.get())?;
        if FRAME_FIXED_BYTES + usize::from(progress.entry_bytes) > BLOCK_BYTES
            || u32::from(progress.data_blocks) > FRAME_DATA_BLOCKS
        {
            return Err(FormatError::Invalid("frame size"));
        }
        Ok(FrameHeader {
            addr: Addr(raw.addr.get()),
            store: StoreId(uuid::Uuid::from_bytes(raw.store)),
            progress,
            incarnation: raw.incarnation.get(),
            seq: raw.seq.get(),
            durable_seq: raw.durable_seq.get(),
            checkpoint_seq: raw.checkpoint_seq.get(),
            next_segment: raw.next_segment.get(),
        })
    }

    /// Blocks of the whole frame.
    pub fn blocks(&self) -> u32 {
        FRAME_HEADER_BLOCKS + u32::from(self.progress.data_blocks)
    }
}

/// What an entry of a frame records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EntryKind {
    /// Blocks written by a client; their data and checksums follow.
    Data = 1,
    /// Blocks trimmed or written as zeros.
    Zero = 2,
    /// A block moved by the cleaner, with the version it had.
    Relocation = 3,
    /// A leaf, two data blocks.
    Leaf = 4,
    /// A layer and everything in it is gone.
    DropLayer = 5,
}

/// A chunk of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExtentKey {
    /// The layer.
    pub layer: LayerId,
    /// The chunk of the volume.
    pub chunk: ChunkIndex,
}

/// One entry of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it records.
    pub kind: EntryKind,
    /// Which chunk of which layer.
    pub key: ExtentKey,
    /// First block in the chunk.
    pub first_block: u32,
    /// Blocks, 1 to a whole chunk.
    pub count: u32,
    /// The version of the write.
    pub version: u64,
    /// Which data block of the frame is the first of this entry.
    pub data_start: u32,
}

impl Entry {
    /// Whether data blocks and checksums belong to it.
    pub fn has_data(&self) -> bool {
        matches!(
            self.kind,
            EntryKind::Data | EntryKind::Relocation | EntryKind::Leaf
        )
    }

    /// Data blocks that belong to it.
    pub fn data_blocks(&self) -> u32 {
        match self.kind {
            EntryKind::Data | EntryKind::Relocation => self.count,
            EntryKind::Leaf => LEAF_DISK_BLOCKS,
            EntryKind::Zero | EntryKind::DropLayer => 0,
        }
    }

    /// Bytes it takes in a header, with its checksums.
    pub fn header_bytes(&self) -> usize {
        ENTRY_BYTES + 4 * self.data_blocks() as usize
    }

    /// Writes the fixed part at the start of `out`; the checksums follow it.
    pub fn encode(&self, out: &mut [u8]) {
        let raw = RawEntry {
            layer: U64::new(self.key.layer.0),
            version: U64::new(self.version),
            chunk: U32::new(self.key.chunk.0),
            first_block: U16::new(self.first_block as u16),
            count: U16::new(self.count as u16),
            data_start: U16::new(self.data_start as u16),
            kind: self.kind as u8,
            flags: 0,
            reserved: U32::ZERO,
        };
        out[..ENTRY_BYTES].copy_from_slice(raw.as_bytes());
    }

    /// Reads the entry at the start of `bytes`; `data_blocks` is how many the frame has.
    fn decode(bytes: &[u8], data_blocks: u32) -> Result<Entry, FormatError> {
        let (raw, _) =
            RawEntry::read_from_prefix(bytes).map_err(|_| FormatError::Invalid("entry length"))?;
        let kind = match raw.kind {
            1 => EntryKind::Data,
            2 => EntryKind::Zero,
            3 => EntryKind::Relocation,
            4 => EntryKind::Leaf,
            5 => EntryKind::DropLayer,
            _ => return Err(FormatError::Invalid("entry kind")),
        };
        let entry = Entry {
            kind,
            key: ExtentKey {
                layer: LayerId(raw.layer.get()),
                chunk: ChunkIndex(raw.chunk.get()),
            },
            first_block: u32::from(raw.first_block.get()),
            count: u32::from(raw.count.get()),
            version: raw.version.get(),
            data_start: u32::from(raw.data_start.get()),
        };
        if kind != EntryKind::DropLayer
            && (entry.count == 0 || entry.first_block + entry.count > CHUNK_BLOCKS)
        {
            return Err(FormatError::Invalid("entry range"));
        }
        if kind == EntryKind::Leaf
            && (entry.first_block % LEAF_BLOCKS != 0 || entry.count != LEAF_BLOCKS)
        {
            return Err(FormatError::Invalid("leaf entry"));
        }
        if entry.data_start + entry.data_blocks() > data_blocks {
            return Err(FormatError::Invalid("entry data"));
        }
        if bytes.len() < entry.header_bytes() {
            return Err(FormatError::Invalid("entry checksums"));
        }
        Ok(entry)
    }
}

/// Walks the entries of a header block (or of its used prefix).
#[derive(Clone, Debug)]
pub struct Entries<'a> {
    bytes: &'a [u8],
    left: u16,
    data_blocks: u32,
    /// Offset in the header of the entry that comes next.
    pub offset: usize,
}

/// An entry with its checksums.
#[derive(Clone, Copy, Debug)]
pub struct EntryRef<'a> {
    /// The entry.
    pub entry: Entry,
    crcs: &'a [u8],
}

impl EntryRef<'_> {
    /// The checksum of its data block number `i`.
    pub fn crc(&self, i: u32) -> u32 {
        let at = i as usize * 4;
        u32::from_le_bytes(self.crcs[at..at + 4].try_into().expect("four bytes"))
    }
}

impl<'a> Entries<'a> {
    /// The entries of a header that was decoded from `block`.
    pub fn new(header: &FrameHeader, block: &'a [u8]) -> Entries<'a> {
        let end = FRAME_FIXED_BYTES + usize::from(header.progress.entry_bytes);
        Entries {
            bytes: &block[..end],
            left: header.progress.entries,
            data_blocks: u32::from(header.progress.data_blocks),
            offset: FRAME_FIXED_BYTES,
        }
    }

    /// The one entry at `offset`, as `Entries::offset` gave it.
    pub fn at(header: &[u8], offset: usize) -> Result<EntryRef<'_>, FormatError> {
        let bytes = &header[offset..];
        let entry = Entry::decode(bytes, u32::from(u16::MAX))?;
        Ok(EntryRef {
            entry,
            crcs: &bytes[ENTRY_BYTES..entry.header_bytes()],
        })
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<EntryRef<'a>, FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        let bytes = &self.bytes[self.offset..];
        match Entry::decode(bytes, self.data_blocks) {
            Ok(entry) => {
                self.offset += entry.header_bytes();
                Some(Ok(EntryRef {
                    entry,
                    crcs: &bytes[ENTRY_BYTES..entry.header_bytes()],
                }))
            }
            Err(e) => {
                self.left = 0;
                Some(Err(e))
            }
        }
    }
}

/// Blocks of a leaf on disk.
pub const LEAF_DISK_BLOCKS: u32 = 2;
/// Bytes of a leaf on disk.
pub const LEAF_BYTES: usize = LEAF_DISK_BLOCKS as usize * BLOCK_BYTES;

/// What a leaf says of one block, and what a directory row says of one leaf; 16 bytes on disk as in memory.
#[derive(
    FromBytes, IntoBytes, KnownLayout, Immutable, Clone, Copy, Debug, PartialEq, Eq, Default,
)]
#[repr(C)]
pub struct Mapping {
    addr: u32,
    /// CRC-32 of what lies at `addr`.
    pub crc: u32,
    /// The version of the write that put it there; of a leaf, the highest in it.
    pub version: u64,
}
const _: () = assert!(size_of::<Mapping>() * LEAF_BLOCKS as usize == LEAF_BYTES);
#[cfg(not(target_endian = "little"))]
compile_error!("leaves are kept in memory as they lie on disk, little-endian");

impl Mapping {
    /// Never written.
    pub const UNMAPPED: Mapping = Mapping {
        addr: 0,
        crc: 0,
        version: 0,
    };

    /// A mapping to `addr`.
    pub fn new(addr: Addr, crc: u32, version: u64) -> Mapping {
        Mapping {
            addr: addr.0,
            crc,
            version,
        }
    }

    /// Where the block or leaf lies.
    pub fn addr(&self) -> Addr {
        Addr(self.addr)
    }
}

/// The entries of a leaf.
pub type LeafEntries = [Mapping; LEAF_BLOCKS as usize];

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawCheckpoint {
    magic: [u8; 8],
    store: [u8; 16],
    seq: U64,
    hot_seq: U64,
    hot_incarnation: U64,
    mapped_blocks: U64,
    hot_segment: U32,
    hot_block: U32,
    hot_next_segment: U32,
    segments: U32,
    rows: U32,
    drops: U32,
    reserved: [u8; 16],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawSegment {
    live: U32,
    state: u8,
    reserved: [u8; 3],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawRowKey {
    layer: U64,
    chunk: U32,
    reserved: U32,
}

/// What a checkpoint says of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointSegment {
    /// Blocks in it that a leaf or the directory refers to.
    pub live: u32,
    /// Whether it may be written.
    pub free: bool,
    /// Whether part of it could not be read back: it is never cleaned nor freed.
    pub damaged: bool,
}

/// A directory row as it lies in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointRow {
    /// The chunk.
    pub key: ExtentKey,
    /// Its leaves.
    pub leaves: [Mapping; CHUNK_LEAVES as usize],
}

/// The state of a store at one point of its log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The store.
    pub store: StoreId,
    /// As in the superblock.
    pub seq: u64,
    /// Every client frame up to this one is in the leaves; none after it is.
    pub hot_seq: u64,
    /// Frames after `hot_seq` carry at least this incarnation.
    pub hot_incarnation: u64,
    /// Where frame `hot_seq + 1` begins.
    pub hot_segment: u32,
    /// Its first block, counted in the segment.
    pub hot_block: u32,
    /// Where the log goes on after that segment.
    pub hot_next_segment: u32,
    /// Blocks that hold data of clients.
    pub mapped_blocks: u64,
    /// The segments allocated so far.
    pub segments: Vec<CheckpointSegment>,
    /// Layers whose blocks are still being given back.
    pub drops: Vec<LayerId>,
    /// The directory.
    pub rows: Vec<CheckpointRow>,
}

/// Appends rows to a checkpoint without building a [`Checkpoint`] first.
pub fn encode_checkpoint<'a>(
    head: &Checkpoint,
    rows: impl ExactSizeIterator<Item = (ExtentKey, &'a [Mapping; CHUNK_LEAVES as usize])>,
) -> Vec<u8> {
    let count = rows.len();
    let mut out = Vec::with_capacity(
        size_of::<RawCheckpoint>()
            + head.segments.len() * size_of::<RawSegment>()
            + head.drops.len() * 8
            + count * ROW_BYTES
            + BLOCK_BYTES,
    );
    out.extend_from_slice(
        RawCheckpoint {
            magic: CHECKPOINT_MAGIC,
            store: head.store.0.into_bytes(),
            seq: U64::new(head.seq),
            hot_seq: U64::new(head.hot_seq),
            hot_incarnation: U64::new(head.hot_incarnation),
            mapped_blocks: U64::new(head.mapped_blocks),
            hot_segment: U32::new(head.hot_segment),
            hot_block: U32::new(head.hot_block),
            hot_next_segment: U32::new(head.hot_next_segment),
            segments: U32::new(head.segments.len() as u32),
            rows: U32::new(count as u32),
            drops: U32::new(head.drops.len() as u32),
            reserved: [0; 16],
        }
        .as_bytes(),
    );
    for s in &head.segments {
        let state = u8::from(s.free) | u8::from(s.damaged) << 1;
        out.extend_from_slice(
            RawSegment {
                live: U32::new(s.live),
                state,
                reserved: [0; 3],
            }
            .as_bytes(),
        );
    }
    for layer in &head.drops {
        out.extend_from_slice(&layer.0.to_le_bytes());
    }
    for (key, leaves) in rows {
        out.extend_from_slice(
            RawRowKey {
                layer: U64::new(key.layer.0),
                chunk: U32::new(key.chunk.0),
                reserved: U32::ZERO,
            }
            .as_bytes(),
        );
        out.extend_from_slice(leaves.as_bytes());
    }
    out
}

/// Bytes of a directory row in a checkpoint.
pub const ROW_BYTES: usize = size_of::<RawRowKey>() + size_of::<Mapping>() * CHUNK_LEAVES as usize;

impl Checkpoint {
    /// Reads a checkpoint whose checksum was found right.
    pub fn decode(bytes: &[u8], geometry: &Geometry) -> Result<Checkpoint, FormatError> {
        let (raw, mut rest) = RawCheckpoint::read_from_prefix(bytes)
            .map_err(|_| FormatError::Invalid("checkpoint length"))?;
        if raw.magic != CHECKPOINT_MAGIC {
            return Err(FormatError::Magic);
        }
        let segment_count = raw.segments.get();
        if segment_count > geometry.segments_max
            || raw.hot_segment.get() >= segment_count
            || raw.hot_next_segment.get() >= segment_count
            || raw.hot_block.get() > geometry.segment_blocks
        {
            return Err(FormatError::Invalid("checkpoint segments"));
        }
        let mut segments = Vec::with_capacity(segment_count as usize);
        for _ in 0..segment_count {
            let (s, left) = RawSegment::read_from_prefix(rest)
                .map_err(|_| FormatError::Invalid("segment table"))?;
            if s.live.get() > geometry.segment_blocks || s.state > 3 {
                return Err(FormatError::Invalid("segment"));
            }
            segments.push(CheckpointSegment {
                live: s.live.get(),
                free: s.state & 1 != 0,
                damaged: s.state & 2 != 0,
            });
            rest = left;
        }
        let mut drops = Vec::new();
        for _ in 0..raw.drops.get() {
            let (d, left) =
                U64::read_from_prefix(rest).map_err(|_| FormatError::Invalid("drop list"))?;
            drops.push(LayerId(d.get()));
            rest = left;
        }
        let mut rows = Vec::with_capacity((raw.rows.get() as usize).min(rest.len() / ROW_BYTES));
        for _ in 0..raw.rows.get() {
            let (k, left) =
                RawRowKey::read_from_prefix(rest).map_err(|_| FormatError::Invalid("directory"))?;
            let (leaves, left) = <[Mapping; CHUNK_LEAVES as usize]>::read_from_prefix(left)
                .map_err(|_| FormatError::Invalid("row"))?;
            for leaf in &leaves {
                let addr = leaf.addr();
                if addr != Addr::UNMAPPED
                    && addr != Addr::ZERO
                    && !geometry.contains(addr, LEAF_DISK_BLOCKS)
                {
                    return Err(FormatError::Invalid("leaf address"));
                }
            }
            let key = ExtentKey {
                layer: LayerId(k.layer.get()),
                chunk: ChunkIndex(k.chunk.get()),
            };
            rows.push(CheckpointRow { key, leaves });
            rest = left;
        }
        Ok(Checkpoint {
            store: StoreId(uuid::Uuid::from_bytes(raw.store)),
            seq: raw.seq.get(),
            hot_seq: raw.hot_seq.get(),
            hot_incarnation: raw.hot_incarnation.get(),
            hot_segment: raw.hot_segment.get(),
            hot_block: raw.hot_block.get(),
            hot_next_segment: raw.hot_next_segment.get(),
            mapped_blocks: raw.mapped_blocks.get(),
            segments,
            drops,
            rows,
        })
    }
}
