//! Frames: a header block that names what follows, then the blocks.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Addr, ExtentKey, FRAME_MAGIC, FormatError, LEAF_DISK_BLOCKS, with_check};
use crate::units::{BLOCK_BYTES, CHUNK_BLOCKS, ChunkIndex, LEAF_BLOCKS, LayerId, StoreId};

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
const _: () = assert!(size_of::<RawFrame>() == 80 && PROGRESS_OFFSET.is_multiple_of(8));

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
    /// Over what precedes it. It counts while the frame is open; then the header's checksum covers everything.
    check: U32,
}
const CHECK_OFFSET: usize = std::mem::offset_of!(RawEntry, check);
const _: () = assert!(size_of::<RawEntry>() == 32 && CHECK_OFFSET == 28);

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

/// Bits of the word that say something.
const PROGRESS_BITS: u32 = 50;

impl Progress {
    /// The word. That of a frame that is still filled is not covered by the header's checksum and has one of its own.
    pub fn to_word(self) -> u64 {
        let word = u64::from(self.entries)
            | u64::from(self.entry_bytes) << 16
            | u64::from(self.data_blocks) << 32
            | u64::from(self.closed) << 48
            | u64::from(self.cold) << 49;
        if self.closed {
            word
        } else {
            with_check(word, PROGRESS_BITS)
        }
    }

    /// The word taken apart.
    pub fn from_word(word: u64) -> Result<Progress, FormatError> {
        let bits = word & ((1 << PROGRESS_BITS) - 1);
        let closed = word >> 48 & 1 != 0;
        if closed && word != bits {
            return Err(FormatError::Invalid("frame flags"));
        }
        if !closed && word != with_check(bits, PROGRESS_BITS) {
            return Err(FormatError::Checksum);
        }
        Ok(Progress {
            entries: word as u16,
            entry_bytes: (word >> 16) as u16,
            data_blocks: (word >> 32) as u16,
            closed,
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
        self.encode_with(FRAME_MAGIC, block);
    }

    /// As [`FrameHeader::encode`], but what makes it a header is zero: nobody takes it for one until that is put in its
    /// place.
    pub fn encode_nameless(&self, block: &mut [u8]) {
        self.encode_with([0; 8], block);
    }

    fn encode_with(&self, magic: [u8; 8], block: &mut [u8]) {
        let raw = RawFrame {
            magic,
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
        let crc = Self::checksum(
            block,
            block[PROGRESS_OFFSET..][..8].try_into().expect("8 bytes"),
        );
        block[8..12].copy_from_slice(&crc.to_le_bytes());
    }

    /// Puts the checksum in its place that the header block has when its progress is this one, which is the last thing
    /// that is written to it.
    pub fn seal_for(block: &mut [u8], progress: Progress) {
        let crc = Self::checksum(block, progress.to_word().to_le_bytes());
        block[8..12].copy_from_slice(&crc.to_le_bytes());
    }

    fn checksum(block: &[u8], progress: [u8; 8]) -> u32 {
        let mut crc = crc32fast::Hasher::new();
        crc.update(&block[..8]);
        crc.update(&[0; 4]);
        crc.update(&block[12..PROGRESS_OFFSET]);
        crc.update(&progress);
        crc.update(&block[PROGRESS_OFFSET + 8..BLOCK_BYTES]);
        crc.finalize()
    }

    /// Reads a header from a block on disk and checks everything but its entries.
    pub fn decode(block: &[u8]) -> Result<FrameHeader, FormatError> {
        let header = Self::decode_open(block)?;
        let progress = block[PROGRESS_OFFSET..][..8].try_into().expect("8 bytes");
        if Self::checksum(block, progress).to_le_bytes() != block[8..12] {
            return Err(FormatError::Checksum);
        }
        if !header.progress.closed {
            return Err(FormatError::Invalid("open frame"));
        }
        Ok(header)
    }

    /// Whether `block` begins as the header of the frame with this name does, `seq_low` being the low half of its number;
    /// nothing else in it is judged.
    pub fn is_named(block: &[u8], store: StoreId, incarnation: u64, seq_low: u32) -> bool {
        RawFrame::read_from_prefix(block).is_ok_and(|(raw, _)| {
            raw.magic == FRAME_MAGIC
                && raw.store == store.0.into_bytes()
                && raw.incarnation.get() == incarnation
                && raw.seq.get() as u32 == seq_low
        })
    }

    /// Reads a header from the tail, where the newest frame may still be open and has no checksum.
    pub fn decode_in_tail(block: &[u8]) -> Result<FrameHeader, FormatError> {
        let header = Self::decode_open(block)?;
        if header.progress.closed {
            return Self::decode(block);
        }
        Ok(header)
    }

    /// Reads a header whose checksum is not there yet, or is somebody else's to check.
    fn decode_open(block: &[u8]) -> Result<FrameHeader, FormatError> {
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
            check: U32::ZERO,
        };
        out[..ENTRY_BYTES].copy_from_slice(raw.as_bytes());
        let check = crc32fast::hash(&out[..CHECK_OFFSET]);
        out[CHECK_OFFSET..ENTRY_BYTES].copy_from_slice(&check.to_le_bytes());
    }

    /// As [`Entry::decode`], of a frame whose header has no checksum yet.
    fn decode_open(bytes: &[u8], data_blocks: u32) -> Result<Entry, FormatError> {
        let entry = Entry::decode(bytes, data_blocks)?;
        let check = crc32fast::hash(&bytes[..CHECK_OFFSET]);
        if bytes[CHECK_OFFSET..ENTRY_BYTES] != check.to_le_bytes() {
            return Err(FormatError::Checksum);
        }
        Ok(entry)
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
            && (!entry.first_block.is_multiple_of(LEAF_BLOCKS) || entry.count != LEAF_BLOCKS)
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
    closed: bool,
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
            closed: header.progress.closed,
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
        let decode = if self.closed {
            Entry::decode
        } else {
            Entry::decode_open
        };
        match decode(bytes, self.data_blocks) {
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
