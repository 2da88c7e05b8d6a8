//! Numbers and fixed headers of the protocol. Everything is big-endian.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First eight bytes a server sends: `NBDMAGIC`.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: second magic of the greeting and first of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First eight bytes of every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First four bytes of a compact (28-byte) request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First four bytes of an extended (32-byte) request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First four bytes of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First four bytes of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First four bytes of an extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Longest string on the wire, bytes (names, descriptions, queries, error texts).
pub const MAX_STRING_BYTES: usize = 4096;
/// Longest payload in either direction, bytes: what the protocol assumes when nothing is advertised, and what we
/// advertise.
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;
/// Smallest request, bytes.
pub const MIN_BLOCK_BYTES: u32 = 1;
/// Request size and alignment that avoid a read-modify-write, bytes.
pub const PREFERRED_BLOCK_BYTES: u32 = crate::units::BLOCK_BYTES as u32;

/// Handshake flags of the server and, with the same numbers, of the client.
pub mod handshake_flag {
    /// The client may send any option and read its reply.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// EXPORT_NAME is not followed by 124 zero bytes.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Option numbers.
pub mod option {
    /// Choose an export and start; cannot fail politely.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Start TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and start.
    pub const GO: u32 = 7;
    /// Ask for structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Ask for extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Option reply types.
pub mod option_reply {
    /// Done, without error.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One piece of information about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Option not known.
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    /// Forbidden by the server's configuration.
    pub const ERR_POLICY: u32 = 0x8000_0002;
    /// Malformed, or not valid now.
    pub const ERR_INVALID: u32 = 0x8000_0003;
    /// Not possible here.
    pub const ERR_PLATFORM: u32 = 0x8000_0004;
    /// TLS first.
    pub const ERR_TLS_REQD: u32 = 0x8000_0005;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    /// The server is going away.
    pub const ERR_SHUTDOWN: u32 = 0x8000_0007;
    /// The option is too long.
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
    /// Extended headers are on; this is no longer possible.
    pub const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;
}

/// Information types of INFO and GO.
pub mod info {
    /// Size and transmission flags; always sent.
    pub const EXPORT: u16 = 0;
    /// The export's canonical name.
    pub const NAME: u16 = 1;
    /// A description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Commands.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Disconnect.
    pub const DISC: u16 = 2;
    /// Flush.
    pub const FLUSH: u16 = 3;
    /// Trim.
    pub const TRIM: u16 = 4;
    /// Prefetch.
    pub const CACHE: u16 = 5;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Block status.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub mod command_flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES must leave space reserved.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ in one chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS with one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES only when fast.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length is that of a payload (extended headers).
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Reply chunk types and flags.
pub mod chunk {
    /// Nothing more to say.
    pub const NONE: u16 = 0;
    /// Data at an offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes at an offset.
    pub const OFFSET_HOLE: u16 = 2;
    /// Block status, 32-bit.
    pub const BLOCK_STATUS: u16 = 5;
    /// Block status, 64-bit.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// An error with a text.
    pub const ERROR: u16 = 0x8001;
    /// Flag: the last chunk of a reply.
    pub const DONE: u16 = 1 << 0;
}

/// The greeting.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Greeting {
    /// [`GREETING_MAGIC`].
    pub magic: U64,
    /// [`OPTION_MAGIC`].
    pub option_magic: U64,
    /// See [`handshake_flag`].
    pub flags: U16,
}

/// What precedes the data of an option.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// [`OPTION_MAGIC`].
    pub magic: U64,
    /// See [`option`].
    pub option: U32,
    /// Length of the data that follow, bytes.
    pub length: U32,
}

/// What precedes the data of an option reply.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionReplyHeader {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option this answers.
    pub option: U32,
    /// See [`option_reply`].
    pub kind: U32,
    /// Length of the data that follow, bytes.
    pub length: U32,
}

/// A compact request.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RequestHeader {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// See [`command_flag`].
    pub flags: U16,
    /// See [`command`].
    pub command: U16,
    /// Opaque; echoed.
    pub cookie: U64,
    /// First byte.
    pub offset: U64,
    /// Bytes.
    pub length: U32,
}

/// A request of a session with extended headers.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedRequestHeader {
    /// [`EXTENDED_REQUEST_MAGIC`].
    pub magic: U32,
    /// See [`command_flag`].
    pub flags: U16,
    /// See [`command`].
    pub command: U16,
    /// Opaque; echoed.
    pub cookie: U64,
    /// First byte.
    pub offset: U64,
    /// Bytes, of effect or (with PAYLOAD_LEN) of payload.
    pub length: U64,
}

/// A simple reply.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SimpleReplyHeader {
    /// [`SIMPLE_REPLY_MAGIC`].
    pub magic: U32,
    /// Zero or an [`super::errors::Errno`].
    pub error: U32,
    /// The request's.
    pub cookie: U64,
}

/// A chunk of a structured reply.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct StructuredReplyHeader {
    /// [`STRUCTURED_REPLY_MAGIC`].
    pub magic: U32,
    /// [`chunk::DONE`] or 0.
    pub flags: U16,
    /// See [`chunk`].
    pub kind: U16,
    /// The request's.
    pub cookie: U64,
    /// Length of what follows, bytes.
    pub length: U32,
}

/// A chunk of an extended reply.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedReplyHeader {
    /// [`EXTENDED_REPLY_MAGIC`].
    pub magic: U32,
    /// [`chunk::DONE`] or 0.
    pub flags: U16,
    /// See [`chunk`].
    pub kind: U16,
    /// The request's.
    pub cookie: U64,
    /// The request's.
    pub offset: U64,
    /// Length of what follows, bytes.
    pub length: U64,
}

/// Bytes of a compact request.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of an extended request.
pub const EXTENDED_REQUEST_BYTES: usize = 32;

const _: () = assert!(
    size_of::<Greeting>() == 18
        && size_of::<OptionHeader>() == 16
        && size_of::<OptionReplyHeader>() == 20
        && size_of::<RequestHeader>() == REQUEST_BYTES
        && size_of::<ExtendedRequestHeader>() == EXTENDED_REQUEST_BYTES
        && size_of::<SimpleReplyHeader>() == 16
        && size_of::<StructuredReplyHeader>() == 20
        && size_of::<ExtendedReplyHeader>() == 32
);
