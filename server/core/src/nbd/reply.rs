//! Replies: headers in small fixed arrays, ready to be copied into a send buffer in front of the data.
//!
//! A READ is answered, in a session of style
//! * `Simple`: by [`read_simple`], then exactly the bytes asked for. An error found after that header went out can only
//!   be told by closing the connection, so send the header when the data are there.
//! * `Structured` or `Extended`: by one [`read_data`] or [`read_hole`] for each run, in any order, together covering the
//!   request exactly once, then [`done`] (or the last content chunk carries the flag).
//!
//! Everything else is answered by [`done`], [`error`] or [`Status`].

use super::errors::RequestError;
use super::session::{BASE_ALLOCATION_ID, ReplyStyle};
use super::wire::{
    EXTENDED_REPLY_MAGIC, ExtendedReplyHeader, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
    SimpleReplyHeader, StructuredReplyHeader, chunk,
};
use crate::units::BLOCK_BYTES;
use smallvec::SmallVec;
use std::ops::Deref;
use zerocopy::IntoBytes;

/// Longest thing built here: an extended error chunk, 32 + 6 + text.
const HEADER_CAPACITY: usize = 96;
/// Longest error text that fits.
const MAX_TEXT_BYTES: usize = HEADER_CAPACITY - 32 - 6;

/// Up to 96 bytes to send before, between or instead of data.
#[derive(Clone, Copy)]
pub struct Header {
    bytes: [u8; HEADER_CAPACITY],
    len: u8,
}

impl Header {
    #[inline]
    fn new() -> Header {
        Header {
            bytes: [0; HEADER_CAPACITY],
            len: 0,
        }
    }

    #[inline]
    fn push(&mut self, more: &[u8]) {
        let start = usize::from(self.len);
        self.bytes[start..start + more.len()].copy_from_slice(more);
        self.len += more.len() as u8;
    }
}

impl Deref for Header {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl std::fmt::Debug for Header {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Header({:02x?})", &self[..])
    }
}

/// Which request is being answered, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// The session's style.
    pub style: ReplyStyle,
    /// The request's cookie.
    pub cookie: u64,
    /// The request's offset; extended replies carry it.
    pub offset: u64,
}

impl ReplyTo {
    #[inline]
    fn simple(&self, error: u32) -> Header {
        let mut header = Header::new();
        header.push(
            SimpleReplyHeader {
                magic: SIMPLE_REPLY_MAGIC.into(),
                error: error.into(),
                cookie: self.cookie.into(),
            }
            .as_bytes(),
        );
        header
    }

    /// A chunk header; `length` counts what follows it. Not for `Simple`.
    #[inline]
    fn chunk(&self, kind: u16, last: bool, length: u64) -> Header {
        let flags = if last { chunk::DONE } else { 0 };
        let mut header = Header::new();
        if self.style == ReplyStyle::Extended {
            header.push(
                ExtendedReplyHeader {
                    magic: EXTENDED_REPLY_MAGIC.into(),
                    flags: flags.into(),
                    kind: kind.into(),
                    cookie: self.cookie.into(),
                    offset: self.offset.into(),
                    length: length.into(),
                }
                .as_bytes(),
            );
        } else {
            debug_assert!(self.style == ReplyStyle::Structured && length <= u64::from(u32::MAX));
            header.push(
                StructuredReplyHeader {
                    magic: STRUCTURED_REPLY_MAGIC.into(),
                    flags: flags.into(),
                    kind: kind.into(),
                    cookie: self.cookie.into(),
                    length: (length as u32).into(),
                }
                .as_bytes(),
            );
        }
        header
    }
}

/// Success with nothing to say: the answer to WRITE, FLUSH, TRIM, CACHE and WRITE_ZEROES, to a READ of nothing, and
/// the end of a reply whose chunks did not carry the flag.
///
/// `after_chunks` must be true for a READ in a session with chunks: it may never be answered by a simple reply.
#[inline]
pub fn done(to: ReplyTo, after_chunks: bool) -> Header {
    match to.style {
        ReplyStyle::Simple => to.simple(0),
        ReplyStyle::Structured if !after_chunks => to.simple(0),
        ReplyStyle::Structured | ReplyStyle::Extended => to.chunk(chunk::NONE, true, 0),
    }
}

/// The header of a READ's data in a `Simple` session.
#[inline]
pub fn read_simple(to: ReplyTo) -> Header {
    debug_assert_eq!(to.style, ReplyStyle::Simple);
    to.simple(0)
}

/// The header of `length` (> 0) bytes of data that belong at byte `at` of the export. `last` only when nothing can
/// fail any more.
#[inline]
pub fn read_data(to: ReplyTo, at: u64, length: u32, last: bool) -> Header {
    debug_assert!(length > 0);
    let mut header = to.chunk(chunk::OFFSET_DATA, last, 8 + u64::from(length));
    header.push(&at.to_be_bytes());
    header
}

/// `length` (> 0) bytes from `at` on are zeroes; no data follow.
#[inline]
pub fn read_hole(to: ReplyTo, at: u64, length: u32, last: bool) -> Header {
    debug_assert!(length > 0);
    let mut header = to.chunk(chunk::OFFSET_HOLE, last, 12);
    header.push(&at.to_be_bytes());
    header.push(&length.to_be_bytes());
    header
}

/// A failure. Valid as the whole answer, and (with chunks) after any number of content chunks.
pub fn error(to: ReplyTo, error: RequestError) -> Header {
    let errno = error.errno() as u32;
    if to.style == ReplyStyle::Simple {
        return to.simple(errno);
    }
    let text = error.text().as_bytes();
    let text = &text[..text.len().min(MAX_TEXT_BYTES)];
    let mut header = to.chunk(chunk::ERROR, true, 6 + text.len() as u64);
    header.push(&errno.to_be_bytes());
    header.push(&(text.len() as u16).to_be_bytes());
    header.push(text);
    header
}

/// What `base:allocation` can say of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Written: neither bit.
    Data,
    /// Never written, or trimmed: reads as zeroes, and a write may find no space.
    Hole,
    /// Reads as zeroes, and its space is reserved.
    Zero,
}

impl Allocation {
    fn bits(self) -> u32 {
        match self {
            Allocation::Data => 0,
            Allocation::Hole => 0b11,
            Allocation::Zero => 0b10,
        }
    }
}

/// Most extents in one reply: 64 KiB of them at 16 bytes each. The client asks again for the rest.
const MAX_EXTENTS: usize = 4096;
/// Longest extent of a 32-bit reply: the largest multiple of a block that fits, so that the next starts on one.
const MAX_SHORT_EXTENT: u64 = (u32::MAX as u64 / BLOCK_BYTES as u64) * BLOCK_BYTES as u64;

/// Collects extents for a BLOCK_STATUS reply: merges equal neighbours, keeps within the request, stops when full.
#[derive(Debug)]
pub struct Status {
    to: ReplyTo,
    remaining: u64,
    most: usize,
    extents: SmallVec<[(u64, Allocation); 32]>,
    full: bool,
}

impl Status {
    /// A reply about `length` (> 0) bytes from the request's offset on.
    pub fn new(to: ReplyTo, length: u64, one_extent: bool) -> Status {
        debug_assert!(to.style != ReplyStyle::Simple && length > 0);
        Status {
            to,
            remaining: length,
            most: if one_extent { 1 } else { MAX_EXTENTS },
            extents: SmallVec::new(),
            full: false,
        }
    }

    /// The next `length` bytes are `allocation`. Anything past the request is cut off. Returns false once no more is
    /// wanted.
    pub fn push(&mut self, length: u64, allocation: Allocation) -> bool {
        let mut length = length.min(self.remaining);
        while length > 0 && !self.full {
            let longest = if self.to.style == ReplyStyle::Extended {
                u64::MAX
            } else {
                MAX_SHORT_EXTENT
            };
            let room = self.extents.len() < self.most;
            let piece = match self.extents.last_mut() {
                Some((last, same)) if *same == allocation && *last < longest => {
                    let piece = length.min(longest - *last);
                    *last += piece;
                    piece
                }
                // Equal neighbours should not follow each other: end the reply where a 32-bit extent is full.
                Some((_, same)) if *same == allocation => 0,
                _ if !room => 0,
                _ => {
                    let piece = length.min(longest);
                    self.extents.push((piece, allocation));
                    piece
                }
            };
            self.full = piece == 0;
            length -= piece;
            self.remaining -= piece;
        }
        !self.full && self.remaining > 0
    }

    /// Bytes described so far.
    pub fn described_bytes(&self) -> u64 {
        self.extents.iter().map(|(length, _)| length).sum()
    }

    /// Appends the reply. At least one extent must have been pushed.
    pub fn finish(self, out: &mut Vec<u8>) {
        assert!(!self.extents.is_empty(), "a status reply needs an extent");
        let count = self.extents.len() as u64;
        if self.to.style == ReplyStyle::Extended {
            out.extend_from_slice(&self.to.chunk(chunk::BLOCK_STATUS_EXT, true, 8 + 16 * count));
            out.extend_from_slice(&BASE_ALLOCATION_ID.to_be_bytes());
            out.extend_from_slice(&(count as u32).to_be_bytes());
            for (length, allocation) in self.extents {
                out.extend_from_slice(&length.to_be_bytes());
                out.extend_from_slice(&u64::from(allocation.bits()).to_be_bytes());
            }
        } else {
            out.extend_from_slice(&self.to.chunk(chunk::BLOCK_STATUS, true, 4 + 8 * count));
            out.extend_from_slice(&BASE_ALLOCATION_ID.to_be_bytes());
            for (length, allocation) in self.extents {
                out.extend_from_slice(&(length as u32).to_be_bytes());
                out.extend_from_slice(&allocation.bits().to_be_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests;
