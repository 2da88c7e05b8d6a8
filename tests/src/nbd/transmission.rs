//! Requests and their answers, every rule of the reply formats checked.

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use super::connection::Connection;
use super::wire;

/// Why a client call did not give a result.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The socket failed or the server closed it.
    #[error("socket: {0}")]
    Io(#[from] io::Error),
    /// The server broke the protocol.
    #[error("protocol broken: {0}")]
    Protocol(String),
    /// The server answered an option with an error.
    #[error("option {option} refused with {kind:#x} {text:?}")]
    Refused {
        option: u32,
        kind: u32,
        text: String,
    },
    /// The server answered a request with an error.
    #[error("{command} at {offset}+{length} failed with errno {errno}: {text:?}")]
    Errno {
        command: u16,
        offset: u64,
        length: u64,
        errno: u32,
        text: String,
    },
}

impl Failure {
    /// The error number of an answered request.
    pub fn errno(&self) -> Option<u32> {
        match self {
            Failure::Errno { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

/// The negotiated shape of headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderStyle {
    Simple,
    Structured,
    Extended,
}

/// One request; `length` counts the payload for a write.
#[derive(Clone, Debug, Default)]
pub struct Request<'a> {
    pub flags: u16,
    pub command: u16,
    pub offset: u64,
    pub length: u64,
    pub payload: &'a [u8],
}

/// A complete answer.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub cookie: u64,
    /// 0, or the first error.
    pub errno: u32,
    /// The server's words for the error.
    pub text: String,
    /// What a read returned, holes filled with zeros. Empty when `errno` is not 0.
    pub data: Vec<u8>,
    /// Ranges of the request (from its first byte) that came as holes.
    pub holes: Vec<Range<u64>>,
    /// Block status: per context id, `(length, status)` in order.
    pub statuses: Vec<(u32, Vec<(u64, u64)>)>,
    /// Content chunks of a read, error chunks not counted.
    pub content_chunks: usize,
    /// Whether the answer was a simple reply.
    pub simple: bool,
}

struct Pending {
    command: u16,
    flags: u16,
    offset: u64,
    length: u64,
    answer: Answer,
    covered: Vec<Range<u64>>,
}

/// A connection in the transmission phase.
pub struct Transmission {
    pub connection: Connection,
    pub style: HeaderStyle,
    pub size_bytes: u64,
    pub flags: u16,
    allocation: Option<u32>,
    next_cookie: u64,
    pending: HashMap<u64, Pending>,
}

impl Transmission {
    pub(super) fn new(
        connection: Connection,
        style: HeaderStyle,
        allocation: Option<u32>,
        size_bytes: u64,
        flags: u16,
    ) -> Transmission {
        // A cookie that uses all 64 bits: a server that keeps only 32 of them is found out.
        let next_cookie = 0xc00c_1e00_0000_0001;
        Transmission {
            connection,
            style,
            size_bytes,
            flags,
            allocation,
            next_cookie,
            pending: HashMap::new(),
        }
    }

    /// Requests sent and not yet answered.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// The header of `request` with `cookie`, exactly as given: no flag is added.
    pub fn header(&self, request: &Request<'_>, cookie: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(32 + request.payload.len());
        let magic = match self.style {
            HeaderStyle::Extended => wire::EXTENDED_REQUEST_MAGIC,
            HeaderStyle::Simple | HeaderStyle::Structured => wire::REQUEST_MAGIC,
        };
        bytes.extend_from_slice(&magic.to_be_bytes());
        bytes.extend_from_slice(&request.flags.to_be_bytes());
        bytes.extend_from_slice(&request.command.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&request.offset.to_be_bytes());
        match self.style {
            HeaderStyle::Extended => bytes.extend_from_slice(&request.length.to_be_bytes()),
            HeaderStyle::Simple | HeaderStyle::Structured => {
                let length =
                    u32::try_from(request.length).expect("a length that fits the compact header");
                bytes.extend_from_slice(&length.to_be_bytes());
            }
        }
        bytes
    }

    /// Sends `request` and returns its cookie. Under extended headers a write gets the flag it must carry.
    pub fn submit(&mut self, request: &Request<'_>) -> Result<u64, Failure> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut request = request.clone();
        if self.style == HeaderStyle::Extended && request.command == wire::CMD_WRITE {
            request.flags |= wire::CMD_FLAG_PAYLOAD_LEN;
        }
        let mut bytes = self.header(&request, cookie);
        bytes.extend_from_slice(request.payload);
        self.expect(&request, cookie);
        self.connection.send(&bytes)?;
        Ok(cookie)
    }

    /// Tells the client that `request` with `cookie` is (or will be) on the wire: for bytes sent by hand.
    pub fn expect(&mut self, request: &Request<'_>, cookie: u64) {
        let answer = Answer {
            cookie,
            ..Answer::default()
        };
        let pending = Pending {
            command: request.command,
            flags: request.flags,
            offset: request.offset,
            length: request.length,
            answer,
            covered: Vec::new(),
        };
        assert!(
            self.pending.insert(cookie, pending).is_none(),
            "cookie {cookie:#x} twice in flight"
        );
    }

    /// The next answer that is complete, whichever request it belongs to.
    pub fn complete(&mut self) -> Result<Answer, Failure> {
        loop {
            let magic = self.connection.take_u32()?;
            let answer = match magic {
                wire::SIMPLE_REPLY_MAGIC => Some(self.simple_reply()?),
                wire::CHUNK_MAGIC if self.style == HeaderStyle::Structured => self.chunk(false)?,
                wire::EXTENDED_REPLY_MAGIC if self.style == HeaderStyle::Extended => {
                    self.chunk(true)?
                }
                other => {
                    return Err(Failure::Protocol(format!(
                        "reply magic {other:#010x} under {:?}",
                        self.style
                    )));
                }
            };
            if let Some(answer) = answer {
                if answer.errno != 0 && !wire::KNOWN_ERRORS.contains(&answer.errno) {
                    return Err(Failure::Protocol(format!(
                        "errno {} is not one of the protocol's",
                        answer.errno
                    )));
                }
                return Ok(answer);
            }
        }
    }

    /// Sends one request with none other in flight and returns its answer.
    pub fn ask(&mut self, request: &Request<'_>) -> Result<Answer, Failure> {
        assert_eq!(self.in_flight(), 0, "ask() with requests in flight");
        let cookie = self.submit(request)?;
        let answer = self.complete()?;
        assert_eq!(answer.cookie, cookie);
        Ok(answer)
    }

    fn simple_reply(&mut self) -> Result<Answer, Failure> {
        let errno = self.connection.take_u32()?;
        let cookie = self.connection.take_u64()?;
        let pending = self
            .pending
            .remove(&cookie)
            .ok_or_else(|| unknown_cookie(cookie))?;
        if self.style == HeaderStyle::Extended
            || (self.style == HeaderStyle::Structured && pending.command == wire::CMD_READ)
        {
            return Err(Failure::Protocol(format!(
                "simple reply to command {} under {:?}",
                pending.command, self.style
            )));
        }
        let mut answer = Answer {
            errno,
            simple: true,
            ..pending.answer
        };
        if errno == 0 && pending.command == wire::CMD_READ {
            answer.data = self.connection.take(pending.length as usize)?;
        }
        Ok(answer)
    }

    fn chunk(&mut self, extended: bool) -> Result<Option<Answer>, Failure> {
        let (flags, kind) = (self.connection.take_u16()?, self.connection.take_u16()?);
        let cookie = self.connection.take_u64()?;
        let offset = if extended {
            Some(self.connection.take_u64()?)
        } else {
            None
        };
        let length = if extended {
            self.connection.take_u64()?
        } else {
            u64::from(self.connection.take_u32()?)
        };
        if length > (wire::PAYLOAD_MAX as u64) * 2 {
            return Err(Failure::Protocol(format!("chunk of {length} bytes")));
        }
        let payload = self.connection.take(length as usize)?;
        let pending = self
            .pending
            .get_mut(&cookie)
            .ok_or_else(|| unknown_cookie(cookie))?;
        if let Some(offset) = offset
            && offset != pending.offset
        {
            return Err(Failure::Protocol(format!(
                "reply says offset {offset}, request said {}",
                pending.offset
            )));
        }
        if flags & !wire::CHUNK_DONE != 0 {
            return Err(Failure::Protocol(format!("chunk flags {flags:#x}")));
        }
        let done = flags & wire::CHUNK_DONE != 0;
        accept_chunk(pending, kind, done, &payload, extended).map_err(|what| {
            Failure::Protocol(format!("{what} (chunk type {kind:#x}, {length} bytes)"))
        })?;
        if !done {
            return Ok(None);
        }
        let mut pending = self.pending.remove(&cookie).expect("found above");
        finish(&mut pending, self.allocation).map_err(Failure::Protocol)?;
        Ok(Some(pending.answer))
    }

    fn checked(&mut self, request: &Request<'_>) -> Result<Answer, Failure> {
        let answer = self.ask(request)?;
        if answer.errno == 0 {
            return Ok(answer);
        }
        Err(Failure::Errno {
            command: request.command,
            offset: request.offset,
            length: request.length,
            errno: answer.errno,
            text: answer.text,
        })
    }

    pub fn read(&mut self, offset: u64, length: u64) -> Result<Vec<u8>, Failure> {
        Ok(self
            .checked(&Request {
                command: wire::CMD_READ,
                offset,
                length,
                ..Request::default()
            })?
            .data)
    }

    pub fn write(&mut self, offset: u64, payload: &[u8]) -> Result<(), Failure> {
        self.write_with(offset, payload, 0)
    }

    pub fn write_with(&mut self, offset: u64, payload: &[u8], flags: u16) -> Result<(), Failure> {
        let length = payload.len() as u64;
        self.checked(&Request {
            command: wire::CMD_WRITE,
            offset,
            length,
            payload,
            flags,
        })?;
        Ok(())
    }

    pub fn flush(&mut self) -> Result<(), Failure> {
        self.plain(wire::CMD_FLUSH, 0, 0, 0)
    }

    pub fn trim(&mut self, offset: u64, length: u64) -> Result<(), Failure> {
        self.plain(wire::CMD_TRIM, offset, length, 0)
    }

    pub fn write_zeroes(&mut self, offset: u64, length: u64, flags: u16) -> Result<(), Failure> {
        self.plain(wire::CMD_WRITE_ZEROES, offset, length, flags)
    }

    /// A command without payload either way.
    pub fn plain(
        &mut self,
        command: u16,
        offset: u64,
        length: u64,
        flags: u16,
    ) -> Result<(), Failure> {
        self.checked(&Request {
            command,
            offset,
            length,
            flags,
            payload: &[],
        })?;
        Ok(())
    }

    /// `base:allocation` of a range, as `(length, status)`.
    pub fn allocation(
        &mut self,
        offset: u64,
        length: u64,
        flags: u16,
    ) -> Result<Vec<(u64, u64)>, Failure> {
        let request = Request {
            command: wire::CMD_BLOCK_STATUS,
            offset,
            length,
            flags,
            payload: &[],
        };
        let mut statuses = self.checked(&request)?.statuses;
        match statuses.len() {
            1 => Ok(statuses.remove(0).1),
            count => Err(Failure::Protocol(format!(
                "{count} contexts answered, one was selected"
            ))),
        }
    }

    /// Says goodbye and waits for the server to close.
    pub fn disconnect(mut self) -> Result<(), Failure> {
        let header = self.header(
            &Request {
                command: wire::CMD_DISC,
                ..Request::default()
            },
            0,
        );
        self.connection.send(&header)?;
        let rest = self
            .connection
            .until_closed(std::time::Duration::from_secs(10))?;
        if rest.is_empty() {
            Ok(())
        } else {
            Err(Failure::Protocol(format!(
                "{} bytes after DISC",
                rest.len()
            )))
        }
    }
}

fn unknown_cookie(cookie: u64) -> Failure {
    Failure::Protocol(format!(
        "answer to unknown cookie {cookie:#x}: answered twice, or never asked"
    ))
}

fn be_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn be_u64(bytes: &[u8], at: usize) -> u64 {
    (u64::from(be_u32(bytes, at)) << 32) | u64::from(be_u32(bytes, at + 4))
}

/// Adds one chunk to what is known of a request. The rules are those of "Structured reply types".
fn accept_chunk(
    pending: &mut Pending,
    kind: u16,
    done: bool,
    payload: &[u8],
    extended: bool,
) -> Result<(), String> {
    match kind {
        wire::CHUNK_NONE => {
            if !payload.is_empty() || !done {
                return Err("a NONE chunk has no payload and ends the reply".into());
            }
        }
        wire::CHUNK_OFFSET_DATA => {
            if payload.len() < 9 {
                return Err("a data chunk has at least one byte".into());
            }
            let length = payload.len() as u64 - 8;
            let start = content(pending, be_u64(payload, 0), length)?;
            let end = start + length as usize;
            pending.answer.data[start..end].copy_from_slice(&payload[8..]);
        }
        wire::CHUNK_OFFSET_HOLE => {
            if payload.len() != 12 || be_u32(payload, 8) == 0 {
                return Err("a hole chunk has 12 bytes and a size".into());
            }
            let length = u64::from(be_u32(payload, 8));
            let start = content(pending, be_u64(payload, 0), length)? as u64;
            pending.answer.holes.push(start..start + length);
        }
        wire::CHUNK_BLOCK_STATUS if !extended => {
            if pending.command != wire::CMD_BLOCK_STATUS
                || payload.len() < 12
                || !(payload.len() - 4).is_multiple_of(8)
            {
                return Err("malformed block status".into());
            }
            let extents = payload[4..]
                .chunks(8)
                .map(|d| (u64::from(be_u32(d, 0)), u64::from(be_u32(d, 4))))
                .collect();
            pending.answer.statuses.push((be_u32(payload, 0), extents));
        }
        wire::CHUNK_BLOCK_STATUS_EXT if extended => {
            if pending.command != wire::CMD_BLOCK_STATUS
                || payload.len() < 24
                || !(payload.len() - 8).is_multiple_of(16)
            {
                return Err("malformed extended block status".into());
            }
            let extents: Vec<_> = payload[8..]
                .chunks(16)
                .map(|d| (be_u64(d, 0), be_u64(d, 8)))
                .collect();
            if be_u32(payload, 4) as usize != extents.len() {
                return Err("the descriptor count is wrong".into());
            }
            pending.answer.statuses.push((be_u32(payload, 0), extents));
        }
        wire::CHUNK_ERROR | wire::CHUNK_ERROR_OFFSET => {
            let tail = if kind == wire::CHUNK_ERROR_OFFSET {
                8
            } else {
                0
            };
            let text_length = payload
                .get(4..6)
                .map(|b| usize::from(u16::from_be_bytes([b[0], b[1]])));
            if text_length.is_none_or(|length| payload.len() != 6 + length + tail) {
                return Err("malformed error chunk".into());
            }
            let errno = be_u32(payload, 0);
            if errno == 0 {
                return Err("an error chunk with errno 0".into());
            }
            if pending.answer.errno == 0 {
                pending.answer.errno = errno;
                pending.answer.text =
                    String::from_utf8_lossy(&payload[6..payload.len() - tail]).into_owned();
            }
        }
        _ => return Err("a chunk type this request cannot have".into()),
    }
    Ok(())
}

/// Checks that a content chunk lies in the request and on no earlier one; returns where it starts in the data.
fn content(pending: &mut Pending, offset: u64, length: u64) -> Result<usize, String> {
    if pending.command != wire::CMD_READ {
        return Err("a content chunk for something that is not a read".into());
    }
    let end = offset
        .checked_add(length)
        .ok_or("content offset overflows")?;
    if offset < pending.offset || end > pending.offset + pending.length {
        return Err(format!(
            "content {offset}+{length} outside {}+{}",
            pending.offset, pending.length
        ));
    }
    if let Some(other) = pending
        .covered
        .iter()
        .find(|other| offset < other.end && other.start < end)
    {
        return Err(format!("content {offset}+{length} overlaps {other:?}"));
    }
    pending.covered.push(offset..end);
    pending.answer.content_chunks += 1;
    pending.answer.data.resize(pending.length as usize, 0);
    Ok((offset - pending.offset) as usize)
}

/// The rules about a whole reply.
fn finish(pending: &mut Pending, allocation: Option<u32>) -> Result<(), String> {
    if pending.answer.errno != 0 {
        pending.answer.data.clear();
        return Ok(());
    }
    match pending.command {
        wire::CMD_READ => {
            let covered: u64 = pending
                .covered
                .iter()
                .map(|range| range.end - range.start)
                .sum();
            if covered != pending.length {
                return Err(format!(
                    "a successful read covers {covered} of {} bytes",
                    pending.length
                ));
            }
            if pending.flags & wire::CMD_FLAG_DF != 0
                && (pending.answer.content_chunks > 1 || !pending.answer.holes.is_empty())
            {
                return Err("a DF read came in pieces".into());
            }
        }
        wire::CMD_BLOCK_STATUS => {
            let one = pending.flags & wire::CMD_FLAG_REQ_ONE != 0;
            let mut seen = Vec::new();
            for (context, extents) in &pending.answer.statuses {
                if seen.contains(context) || allocation.is_some_and(|id| id != *context) {
                    return Err(format!(
                        "context {context} answered twice or never selected"
                    ));
                }
                seen.push(*context);
                let before_last: u64 = extents[..extents.len() - 1]
                    .iter()
                    .map(|extent| extent.0)
                    .sum();
                if extents.iter().any(|extent| extent.0 == 0) || before_last >= pending.length {
                    return Err(format!("extents {extents:?} for {} bytes", pending.length));
                }
                if one && (extents.len() != 1 || extents[0].0 > pending.length) {
                    return Err(format!(
                        "REQ_ONE answered with {extents:?} for {} bytes",
                        pending.length
                    ));
                }
            }
            if seen.is_empty() {
                return Err("a successful block status without any status".into());
            }
        }
        _ => {}
    }
    Ok(())
}
