//! Requests: from bytes to something that may be carried out, or a refusal that keeps the stream in step.
//!
//! ```text
//! 28 or 32 bytes ─ parse ─> RawRequest ─ check(session) ─> Verdict
//! ```
//!
//! A refusal says how many payload bytes to throw away before the next header, so one bad request costs the client an
//! error and nothing else. A connection is closed only where the next header can no longer be found, or where finding
//! it would mean swallowing more than the maximum payload.

use super::errors::RequestError;
use super::session::{BASE_ALLOCATION_ID, ReplyStyle, Session};
use super::wire::{
    self, EXTENDED_REQUEST_BYTES, EXTENDED_REQUEST_MAGIC, ExtendedRequestHeader, MAX_PAYLOAD_BYTES,
    REQUEST_BYTES, REQUEST_MAGIC, RequestHeader, command, command_flag,
};
use zerocopy::FromBytes;

/// A header as it came, not yet believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawRequest {
    /// See [`command_flag`].
    pub flags: u16,
    /// See [`command`].
    pub command: u16,
    /// Opaque; echoed exactly.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes; 32 bits of it without extended headers.
    pub length: u64,
}

/// A request that makes sense in its session and lies inside the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Opaque; echoed exactly.
    pub cookie: u64,
    /// First byte. Extended replies echo it.
    pub offset: u64,
    /// Bytes. Zero means: answer success, do nothing. For a BLOCK_STATUS with a payload this is 0 until
    /// [`Request::with_status_payload`] has read the real length.
    pub length: u64,
    /// What to do.
    pub command: Command,
    /// Answer only when this request's own change is durable. Set on READ and the like, it means nothing.
    pub fua: bool,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read `length` bytes, at most [`MAX_PAYLOAD_BYTES`].
    Read {
        /// Answer with one content chunk; holes become zero bytes.
        dont_fragment: bool,
    },
    /// Write; `length` bytes of payload follow, at most [`MAX_PAYLOAD_BYTES`].
    Write,
    /// Make durable every change answered so far, on whichever connection.
    Flush,
    /// The blocks may be forgotten.
    Trim,
    /// The range will be read soon.
    Cache,
    /// Zeroes.
    WriteZeroes {
        /// A later write into the range must not fail for lack of space.
        no_hole: bool,
        /// Only if faster than writing.
        fast_only: bool,
    },
    /// Where the holes are.
    BlockStatus {
        /// One extent, no longer than the request.
        one_extent: bool,
        /// A payload of this many bytes follows; zero: none. See [`Request::with_status_payload`].
        payload_bytes: u32,
    },
}

/// What becomes of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Carry it out. First read [`Request::payload_bytes`] from the socket.
    Serve(Request),
    /// Read `payload_bytes` from the socket and forget them, then answer `error`.
    Refuse {
        /// The answer.
        error: RequestError,
        /// At most [`MAX_PAYLOAD_BYTES`].
        payload_bytes: u32,
    },
    /// The client says goodbye: finish every outstanding request, answer them, close.
    Disconnect,
    /// Close without an answer.
    Close(CloseReason),
}

/// Why a connection in transmission is closed without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// Not a request: the stream is out of step.
    #[error("bad request magic {0:#010x}")]
    BadMagic(u32),
    /// A payload longer than we are willing to swallow.
    #[error("payload of {0} bytes, more than the maximum of 33554432")]
    PayloadTooLong(u64),
    /// WRITE in an extended header without PAYLOAD_LEN: whether data follow is anyone's guess, and a guess would let
    /// data be taken for requests.
    #[error("extended WRITE without PAYLOAD_LEN")]
    AmbiguousPayload,
}

impl RawRequest {
    /// Bytes of a request header in a session of this style.
    pub fn header_bytes(style: ReplyStyle) -> usize {
        match style {
            ReplyStyle::Extended => EXTENDED_REQUEST_BYTES,
            ReplyStyle::Simple | ReplyStyle::Structured => REQUEST_BYTES,
        }
    }

    /// Reads the header at the start of `bytes`; `None` when there are not enough yet.
    pub fn parse(style: ReplyStyle, bytes: &[u8]) -> Option<Result<RawRequest, CloseReason>> {
        if style == ReplyStyle::Extended {
            let (header, _) = ExtendedRequestHeader::ref_from_prefix(bytes).ok()?;
            if header.magic.get() != EXTENDED_REQUEST_MAGIC {
                return Some(Err(CloseReason::BadMagic(header.magic.get())));
            }
            return Some(Ok(RawRequest {
                flags: header.flags.get(),
                command: header.command.get(),
                cookie: header.cookie.get(),
                offset: header.offset.get(),
                length: header.length.get(),
            }));
        }
        let (header, _) = RequestHeader::ref_from_prefix(bytes).ok()?;
        if header.magic.get() != REQUEST_MAGIC {
            return Some(Err(CloseReason::BadMagic(header.magic.get())));
        }
        Some(Ok(RawRequest {
            flags: header.flags.get(),
            command: header.command.get(),
            cookie: header.cookie.get(),
            offset: header.offset.get(),
            length: u64::from(header.length.get()),
        }))
    }

    /// Holds the request against the session: the whole table of commands, flags, ranges and permissions.
    ///
    /// The order of the checks is: framing, command, flags, read-only, range, length. The first that fails answers.
    pub fn check(&self, session: &Session) -> Verdict {
        if self.command == command::DISC {
            return Verdict::Disconnect;
        }
        let payload_bytes = match self.framing(session.style) {
            Ok(bytes) => bytes,
            Err(reason) => return Verdict::Close(reason),
        };
        match self.decide(session, payload_bytes) {
            Ok(command) => Verdict::Serve(Request {
                cookie: self.cookie,
                offset: self.offset,
                length: match command {
                    Command::BlockStatus {
                        payload_bytes: 1.., ..
                    } => 0,
                    _ => self.length,
                },
                command,
                fua: self.flags & command_flag::FUA != 0,
            }),
            Err(error) => Verdict::Refuse {
                error,
                payload_bytes,
            },
        }
    }

    /// How many payload bytes follow this header, whatever else is wrong with it.
    fn framing(&self, style: ReplyStyle) -> Result<u32, CloseReason> {
        let is_write = self.command == command::WRITE;
        let has_payload = match style {
            ReplyStyle::Simple | ReplyStyle::Structured => is_write,
            ReplyStyle::Extended => {
                let flagged = self.flags & command_flag::PAYLOAD_LEN != 0;
                if is_write && !flagged {
                    return Err(CloseReason::AmbiguousPayload);
                }
                flagged
            }
        };
        if !has_payload {
            return Ok(0);
        }
        match u32::try_from(self.length) {
            Ok(bytes) if bytes <= MAX_PAYLOAD_BYTES => Ok(bytes),
            _ => Err(CloseReason::PayloadTooLong(self.length)),
        }
    }

    fn decide(&self, session: &Session, payload_bytes: u32) -> Result<Command, RequestError> {
        let extended = session.style == ReplyStyle::Extended;
        let flagged = |flag: u16| self.flags & flag != 0;
        let status_payload = extended && session.base_allocation;
        let (command, own_flags) = match self.command {
            command::READ => (
                Command::Read {
                    dont_fragment: flagged(command_flag::DF),
                },
                if session.style == ReplyStyle::Simple {
                    0
                } else {
                    command_flag::DF
                },
            ),
            command::WRITE => (
                Command::Write,
                if extended {
                    command_flag::PAYLOAD_LEN
                } else {
                    0
                },
            ),
            command::FLUSH => (Command::Flush, 0),
            command::TRIM => (Command::Trim, 0),
            command::CACHE => (Command::Cache, 0),
            command::WRITE_ZEROES => (
                Command::WriteZeroes {
                    no_hole: flagged(command_flag::NO_HOLE),
                    fast_only: flagged(command_flag::FAST_ZERO),
                },
                command_flag::NO_HOLE | command_flag::FAST_ZERO,
            ),
            command::BLOCK_STATUS => (
                Command::BlockStatus {
                    one_extent: flagged(command_flag::REQ_ONE),
                    payload_bytes,
                },
                command_flag::REQ_ONE
                    | if status_payload {
                        command_flag::PAYLOAD_LEN
                    } else {
                        0
                    },
            ),
            _ => return Err(RequestError::UnknownCommand),
        };
        // FUA is valid on every command once it is advertised, and we always advertise it.
        let stray = self.flags & !(own_flags | command_flag::FUA);
        if stray != 0 {
            return Err(if extended && stray == command_flag::PAYLOAD_LEN {
                RequestError::UnexpectedPayload
            } else {
                RequestError::BadFlags
            });
        }
        let changes = matches!(
            command,
            Command::Write | Command::Trim | Command::WriteZeroes { .. }
        );
        if changes && session.read_only {
            return Err(RequestError::ReadOnly);
        }
        match command {
            Command::Flush => {
                if self.offset != 0 || self.length != 0 {
                    return Err(RequestError::FlushWithRange);
                }
            }
            Command::Write | Command::WriteZeroes { .. } => {
                self.inside(session, RequestError::NoRoomPastEnd)?;
            }
            Command::Trim | Command::Cache => self.inside(session, RequestError::PastEnd)?,
            Command::Read { .. } => {
                self.inside(session, RequestError::PastEnd)?;
                if self.length > u64::from(MAX_PAYLOAD_BYTES) {
                    return Err(RequestError::TooLong);
                }
            }
            Command::BlockStatus { .. } => {
                if !session.base_allocation {
                    return Err(RequestError::NoContext);
                }
                if !flagged(command_flag::PAYLOAD_LEN) {
                    self.inside(session, RequestError::PastEnd)?;
                    if self.length == 0 {
                        return Err(RequestError::StatusOfNothing);
                    }
                } else if payload_bytes == 0 {
                    return Err(RequestError::BadStatusPayload);
                }
            }
        }
        Ok(command)
    }

    fn inside(&self, session: &Session, otherwise: RequestError) -> Result<(), RequestError> {
        within(self.offset, self.length, session.size_bytes, otherwise)
    }
}

fn within(
    offset: u64,
    length: u64,
    size_bytes: u64,
    otherwise: RequestError,
) -> Result<(), RequestError> {
    match offset.checked_add(length) {
        Some(end) if end <= size_bytes => Ok(()),
        _ => Err(otherwise),
    }
}

impl Request {
    /// Payload bytes that follow the header.
    pub fn payload_bytes(&self) -> u32 {
        match self.command {
            // `check` bounded it by MAX_PAYLOAD_BYTES.
            Command::Write => self.length as u32,
            Command::BlockStatus { payload_bytes, .. } => payload_bytes,
            _ => 0,
        }
    }

    /// Completes a BLOCK_STATUS whose payload (u64 effect length, then context ids) has arrived.
    ///
    /// Each id must be one the session negotiated and may come once; at least one must come. As a session has one
    /// context, the only valid payload is 12 bytes long.
    pub fn with_status_payload(
        self,
        session: &Session,
        payload: &[u8],
    ) -> Result<Request, RequestError> {
        let Command::BlockStatus { one_extent, .. } = self.command else {
            return Err(RequestError::UnexpectedPayload);
        };
        let (length, ids) = payload
            .split_first_chunk::<8>()
            .ok_or(RequestError::BadStatusPayload)?;
        let wanted: [u8; 4] = ids.try_into().map_err(|_| RequestError::BadStatusPayload)?;
        if u32::from_be_bytes(wanted) != BASE_ALLOCATION_ID || !session.base_allocation {
            return Err(RequestError::BadStatusPayload);
        }
        let length = u64::from_be_bytes(*length);
        within(
            self.offset,
            length,
            session.size_bytes,
            RequestError::PastEnd,
        )?;
        if length == 0 {
            return Err(RequestError::StatusOfNothing);
        }
        Ok(Request {
            length,
            command: Command::BlockStatus {
                one_extent,
                payload_bytes: 0,
            },
            ..self
        })
    }
}

/// A request header as a client sends it; for tests and for tools that speak to an NBD server.
pub fn encode(style: ReplyStyle, raw: &RawRequest, out: &mut Vec<u8>) {
    use zerocopy::IntoBytes;
    if style == ReplyStyle::Extended {
        out.extend_from_slice(
            wire::ExtendedRequestHeader {
                magic: EXTENDED_REQUEST_MAGIC.into(),
                flags: raw.flags.into(),
                command: raw.command.into(),
                cookie: raw.cookie.into(),
                offset: raw.offset.into(),
                length: raw.length.into(),
            }
            .as_bytes(),
        );
    } else {
        out.extend_from_slice(
            wire::RequestHeader {
                magic: REQUEST_MAGIC.into(),
                flags: raw.flags.into(),
                command: raw.command.into(),
                cookie: raw.cookie.into(),
                offset: raw.offset.into(),
                length: (raw.length as u32).into(),
            }
            .as_bytes(),
        );
    }
}

#[cfg(test)]
mod tests;
