//! What a client and we agreed on.

use crate::units::{ExportToken, VolumeId};

/// Transmission flags, as advertised with an export.
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Changes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH works.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA works.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM works.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES and NO_HOLE work.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// DF works.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what was answered on any.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE works.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// FAST_ZERO works.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS may name contexts in a payload.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// The shape of replies (and, for `Extended`, of requests).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyStyle {
    /// 28-byte requests, 16-byte replies.
    Simple,
    /// 28-byte requests; READ and BLOCK_STATUS are answered in chunks, errors carry text.
    Structured,
    /// 32-byte requests, 64-bit lengths, chunks only.
    Extended,
}

/// The name of the one metadata context there is.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Its id: unique within a session, which has one context at most.
pub const BASE_ALLOCATION_ID: u32 = 1;

/// Whose connections a volume's head serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admitted {
    /// Those that were opened by the volume's name or id.
    Anyone,
    /// Those that were opened by one of these tokens.
    Holders(Vec<ExportToken>),
}

impl Admitted {
    /// Whether a connection opened by this token, or without one, is among them.
    pub fn admits(&self, token: Option<ExportToken>) -> bool {
        match (self, token) {
            (Admitted::Anyone, None) => true,
            (Admitted::Holders(holders), Some(token)) => holders.contains(&token),
            (Admitted::Anyone, Some(_)) | (Admitted::Holders(_), None) => false,
        }
    }
}

/// What a connection carries from the handshake into transmission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The volume exported.
    pub volume: VolumeId,
    /// Shape of requests and replies.
    pub style: ReplyStyle,
    /// `base:allocation` was chosen for this export.
    pub base_allocation: bool,
    /// No change is accepted on this connection.
    pub read_only: bool,
    /// What it was opened by; `None`: the volume's name or id.
    pub token: Option<ExportToken>,
    /// Bytes of the export. Raise it when the volume grows: requests are checked against this figure.
    pub size_bytes: u64,
}

impl Session {
    /// The transmission flags that were told to the client.
    pub fn flags(&self) -> u16 {
        transmission_flags(self.style, self.base_allocation, self.read_only)
    }
}

/// Which transmission flags an export has in a session.
///
/// A read-only export advertises neither TRIM nor WRITE_ZEROES; sent all the same, they are refused with EPERM.
pub fn transmission_flags(style: ReplyStyle, base_allocation: bool, read_only: bool) -> u16 {
    use transmission_flag as flag;
    let mut flags = flag::HAS_FLAGS
        | flag::SEND_FLUSH
        | flag::SEND_FUA
        | flag::CAN_MULTI_CONN
        | flag::SEND_CACHE;
    flags |= if read_only {
        flag::READ_ONLY
    } else {
        flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO
    };
    if style != ReplyStyle::Simple {
        flags |= flag::SEND_DF;
    }
    if style == ReplyStyle::Extended && base_allocation {
        flags |= flag::BLOCK_STATUS_PAYLOAD;
    }
    flags
}
