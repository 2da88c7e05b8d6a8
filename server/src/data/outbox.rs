//! What a connection still has to send: header bytes and borrowed payloads, in order, leaving by one `sendmsg` a turn.

use std::collections::VecDeque;
use std::io;

use smallvec::SmallVec;

use super::pool::{Buffer, Pool};
use crate::stream::Stream;

/// Pieces of one `sendmsg`: 64 reads of a 4 KiB block with their headers. The kernel's limit is 1024.
const MAX_PIECES: usize = 128;
/// Header bytes that may lie sent and unused in front of those to send, before they are moved down.
const COMPACT_BYTES: u64 = 64 << 10;

enum Part {
    /// Bytes `from..from + len` of the header stream.
    Headers { from: u64, len: usize },
    Payload {
        buffer: Buffer,
        from: usize,
        len: usize,
    },
    /// Bytes of a buffer whose `Payload` comes further back.
    Early { start: *mut u8, len: usize },
}

/// See the module text.
#[derive(Default)]
pub(super) struct Outbox {
    parts: VecDeque<Part>,
    headers: Vec<u8>,
    /// Stream position of `headers[0]`.
    base: u64,
}

/// What a call of [`Outbox::send`] achieved.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Sent {
    /// Bytes taken by the socket.
    pub(super) bytes: u64,
    /// Calls made.
    pub(super) calls: u64,
    /// Capacity of payload buffers given back to the pool.
    pub(super) freed_bytes: usize,
    /// The socket is full; send again when it is writable.
    pub(super) blocked: bool,
}

impl Outbox {
    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Bytes of headers and small replies waiting.
    pub(super) fn header_bytes(&self) -> usize {
        self.headers.len()
    }

    #[inline]
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let from = self.base + self.headers.len() as u64;
        self.headers.extend_from_slice(bytes);
        match self.parts.back_mut() {
            Some(Part::Headers { len, .. }) => *len += bytes.len(),
            _ => self.parts.push_back(Part::Headers {
                from,
                len: bytes.len(),
            }),
        }
    }

    /// Appends what `fill` writes.
    pub(super) fn push_with(&mut self, fill: impl FnOnce(&mut Vec<u8>)) {
        let before = self.headers.len();
        fill(&mut self.headers);
        let len = self.headers.len() - before;
        match self.parts.back_mut() {
            Some(Part::Headers { len: last, .. }) => *last += len,
            _ => self.parts.push_back(Part::Headers {
                from: self.base + before as u64,
                len,
            }),
        }
    }

    /// Sends `len` bytes of a filled buffer, then gives it back.
    #[inline]
    pub(super) fn push_payload(&mut self, buffer: Buffer, from: usize, len: usize) {
        debug_assert!(from + len <= buffer.capacity());
        self.parts.push_back(Part::Payload { buffer, from, len });
    }

    /// Sends `len` bytes of a filled buffer that is sent in several pieces, all but the last.
    ///
    /// # Safety
    /// The buffer is handed over by [`Outbox::push_payload`] before anything else is done with this outbox but pushing.
    #[inline]
    pub(super) unsafe fn push_early(&mut self, buffer: &Buffer, from: usize, len: usize) {
        debug_assert!(from + len <= buffer.capacity());
        let start = buffer.at(from);
        self.parts.push_back(Part::Early { start, len });
    }

    /// Sends until everything is gone or the socket is full.
    pub(super) fn send(&mut self, stream: &mut Stream, pool: &mut Pool) -> io::Result<Sent> {
        let mut sent = Sent::default();
        while !self.parts.is_empty() || stream.has_unsent() {
            let mut pieces: SmallVec<[libc::iovec; MAX_PIECES]> = SmallVec::new();
            for part in self.parts.iter().take(MAX_PIECES) {
                let (start, len) = match part {
                    Part::Headers { from, len } => (
                        self.headers[(from - self.base) as usize..]
                            .as_ptr()
                            .cast_mut(),
                        *len,
                    ),
                    Part::Payload { buffer, from, len } => (buffer.at(*from), *len),
                    Part::Early { start, len } => (*start, *len),
                };
                pieces.push(libc::iovec {
                    iov_base: start.cast(),
                    iov_len: len,
                });
            }
            // SAFETY: each piece lies in memory owned by `self` that does not change during the call; that of an early
            // piece belongs to a payload behind it, which goes after it.
            let taken = unsafe { stream.send(&pieces)? };
            sent.calls += 1;
            sent.bytes += taken.bytes as u64;
            self.advance(taken.bytes, pool, &mut sent.freed_bytes);
            if taken.blocked {
                sent.blocked = true;
                return Ok(sent);
            }
        }
        Ok(sent)
    }

    fn advance(&mut self, mut bytes: usize, pool: &mut Pool, freed_bytes: &mut usize) {
        while let Some(part) = self.parts.front_mut() {
            let len = match part {
                Part::Headers { len, .. } | Part::Payload { len, .. } | Part::Early { len, .. } => {
                    *len
                }
            };
            if bytes < len {
                match part {
                    Part::Headers { from, len } => {
                        *from += bytes as u64;
                        *len -= bytes;
                    }
                    Part::Payload { from, len, .. } => {
                        *from += bytes;
                        *len -= bytes;
                    }
                    Part::Early { start, len } => {
                        // SAFETY: `bytes < len`, so this stays inside the buffer.
                        *start = unsafe { start.add(bytes) };
                        *len -= bytes;
                    }
                }
                break;
            }
            bytes -= len;
            if let Some(Part::Payload { buffer, .. }) = self.parts.pop_front() {
                *freed_bytes += buffer.capacity();
                pool.give(buffer);
            }
        }
        if self.parts.is_empty() {
            self.base += self.headers.len() as u64;
            self.headers.clear();
        } else if let Some(Part::Headers { from, .. }) = self.parts.front() {
            let unused = from - self.base;
            if unused > COMPACT_BYTES {
                self.headers.drain(..unused as usize);
                self.base += unused;
            }
        }
    }

    /// Forgets everything; the client is gone.
    pub(super) fn clear(&mut self, pool: &mut Pool) {
        for part in self.parts.drain(..) {
            if let Part::Payload { buffer, .. } = part {
                pool.give(buffer);
            }
        }
        self.headers = Vec::new();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn everything_arrives_in_order_through_a_socket_that_fills_up() {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        let mut ours = Stream::Plain(ours.into());
        let mut pool = Pool::new(0);
        let mut outbox = Outbox::default();
        let mut expected = Vec::new();
        for i in 0..1000u32 {
            let header = i.to_be_bytes();
            outbox.push(&header);
            expected.extend_from_slice(&header);
            if i % 3 == 0 {
                outbox.push_with(|out| out.extend_from_slice(b"between"));
                expected.extend_from_slice(b"between");
            }
            let len = 1 + (i as usize * 37) % 5000;
            let mut buffer = pool.take(len + 10);
            buffer.put(10, &vec![i as u8; len]);
            let early = if i % 5 == 0 { len / 2 } else { 0 };
            if early > 0 {
                // SAFETY: the buffer is pushed below.
                unsafe { outbox.push_early(&buffer, 10, early) };
                expected.extend(std::iter::repeat_n(i as u8, early));
                outbox.push(&header);
                expected.extend_from_slice(&header);
            }
            outbox.push_payload(buffer, 10 + early, len - early);
            expected.extend(std::iter::repeat_n(i as u8, len - early));
        }
        let lent = pool.lent_bytes();
        let mut got = Vec::new();
        let mut freed = 0;
        let mut blocked = 0;
        let mut buf = vec![0; 50_000];
        while got.len() < expected.len() {
            let sent = outbox.send(&mut ours, &mut pool).expect("send");
            freed += sent.freed_bytes;
            blocked += usize::from(sent.blocked);
            let n = theirs.read(&mut buf).expect("read");
            got.extend_from_slice(&buf[..n]);
        }
        assert!(blocked > 3 && got == expected);
        assert!(outbox.is_empty() && freed == lent && pool.lent_bytes() == 0);
        outbox.push(b"x");
        drop(theirs);
        assert!(outbox.send(&mut ours, &mut pool).is_err());
        outbox.clear(&mut pool);
    }
}
