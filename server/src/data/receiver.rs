//! The receiving side of a connection: bytes from the socket become requests with their payloads.
//!
//! Small requests are received many at a time into one buffer and handed on as slices of it. A payload that is not
//! complete and too long to wait for in that buffer is received straight into a block-aligned buffer of its own, placed
//! as its blocks will lie, or, where that is possible, straight into the store's tail. When nothing is pending the
//! receiver holds no buffer at all.

use std::io;

use ashlar_core::nbd::errors::RequestError;
use ashlar_core::nbd::request::{CloseReason, RawRequest, Request, Verdict};
use ashlar_core::nbd::session::Session;
use ashlar_core::units::BLOCK_BYTES;

use super::gate::Hold;
use super::landed::Landed;
use super::pool::{Buffer, Pool};
use super::thread::{StoreDriver, Volume};
use crate::stream::Stream;

/// Bytes received at a time: the default send buffer of a Unix socket peer (208 KiB) fits, with 32 requests of 4 KiB.
pub(super) const RECEIVE_BYTES: usize = 256 << 10;
/// The same while the daemon's buffers are all lent: enough for headers.
const SCARCE_RECEIVE_BYTES: usize = 4096;
/// An incomplete payload of at least this is received into a buffer of its own rather than moved to the front of
/// the receive buffer.
const OWN_BUFFER_BYTES: usize = 32 << 10;
/// An incomplete payload of at least this is received straight into a store where that is possible: a receive call of
/// its own costs less than a copy.
const LANDING_BYTES: usize = 64 << 10;
/// Bytes received behind a payload that goes to a place of its own: the next header, and not much of what follows it,
/// which is likely to be another such payload.
const AHEAD_BYTES: usize = 4096;
/// A request header at most.
const STASH_BYTES: usize = 32;

/// A payload being received into a place of its own.
struct Incoming {
    request: Request,
    place: Place,
    /// Where in the place its next byte goes.
    at: usize,
    left: usize,
}

enum Place {
    Buffer(Buffer),
    Landed(Landed),
}

/// What [`Receiver::next`] found.
pub(super) enum Next {
    /// Receive more first.
    Incomplete,
    /// The limits do not allow the next request now; ask again when something has been given back.
    Paused,
    /// The next request may not pass its volume's gate now.
    Held(Hold),
    /// A request; a payload, if it has one, is bytes `from..from + len` of the receive buffer, valid until the next
    /// call of anything here.
    Request {
        request: Request,
        from: usize,
        len: usize,
    },
    /// A request whose payload lies in its own buffer, from byte [`payload_start`] on.
    Buffered {
        request: Request,
        buffer: Buffer,
    },
    /// A write whose payload lies in a store.
    Landed {
        request: Request,
        landed: Landed,
    },
    /// Answer this error.
    Refuse {
        cookie: u64,
        offset: u64,
        command: u16,
        error: RequestError,
    },
    Disconnect,
    Close(CloseReason),
}

/// Where a payload for byte `offset` of a volume starts in a buffer that begins with that byte's block.
pub(super) fn payload_start(offset: u64) -> usize {
    (offset % BLOCK_BYTES as u64) as usize
}

/// Bytes of the blocks that a range touches, and two more blocks when it begins or ends inside one: room to read them.
pub(super) fn covering_bytes(offset: u64, len: u64) -> usize {
    let block = BLOCK_BYTES as u64;
    let covered = (offset + len).next_multiple_of(block) - offset / block * block;
    (if covered == len {
        covered
    } else {
        covered + 2 * block
    }) as usize
}

/// See the module text.
pub(super) struct Receiver {
    buffer: Option<Buffer>,
    start: usize,
    end: usize,
    /// The beginning of a header, kept here so that an idle connection holds no buffer.
    stash: [u8; STASH_BYTES],
    stashed: usize,
    incoming: Option<Incoming>,
    /// The payload before went to a place of its own, and the next one probably will.
    expects_large: bool,
    /// Payload bytes of a refused request still to be thrown away.
    discard: u64,
    /// Answer that follows a discarded payload.
    refusal: Option<(u64, u64, u16, RequestError)>,
}

/// What one receive call brought.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// So many bytes. `drained`: fewer than there was room for, so the socket is empty for now.
    Bytes {
        count: usize,
        drained: bool,
    },
    WouldBlock,
    /// The client closed its side.
    End,
}

impl Receiver {
    /// `leftover`: bytes that came with the handshake.
    pub(super) fn new(leftover: &[u8], pool: &mut Pool) -> Receiver {
        let mut receiver = Receiver {
            buffer: None,
            start: 0,
            end: 0,
            stash: [0; STASH_BYTES],
            stashed: 0,
            incoming: None,
            expects_large: false,
            discard: 0,
            refusal: None,
        };
        if !leftover.is_empty() {
            let mut buffer = pool.take_to_receive(leftover.len().max(RECEIVE_BYTES));
            buffer.put(0, leftover);
            receiver.end = leftover.len();
            receiver.buffer = Some(buffer);
        }
        receiver
    }

    /// The receive buffer, for the payload of [`Next::Request`].
    pub(super) fn buffer(&self) -> Option<&Buffer> {
        self.buffer.as_ref()
    }

    /// Whether bytes were received that no request has consumed.
    pub(super) fn has_bytes(&self) -> bool {
        self.end > self.start
    }

    /// Whether it holds a receive buffer.
    pub(super) fn holds_buffer(&self) -> bool {
        self.buffer.is_some()
    }

    /// Whether the client stopped in the middle of a request.
    pub(super) fn is_mid_request(&self) -> bool {
        self.has_bytes() || self.stashed > 0 || self.incoming.is_some() || self.discard > 0
    }

    /// Whether the first part of a request is here whose rest is short.
    pub(super) fn is_mid_small_request(&self) -> bool {
        (self.has_bytes() || self.stashed > 0) && self.incoming.is_none() && !self.expects_large
    }

    /// Whether a payload is being received into a buffer of its own.
    pub(super) fn is_mid_payload(&self) -> bool {
        self.incoming.is_some()
    }

    /// Receives once, as much as there is room for. `scarce`: memory is short, so a receive buffer that must be taken
    /// is a small one.
    pub(super) fn receive(
        &mut self,
        stream: &mut Stream,
        pool: &mut Pool,
        stores: &mut [StoreDriver],
        scarce: bool,
    ) -> io::Result<Received> {
        let bytes = if scarce {
            SCARCE_RECEIVE_BYTES
        } else {
            RECEIVE_BYTES
        };
        let stashed = std::mem::take(&mut self.stashed);
        let buffer = self
            .buffer
            .get_or_insert_with(|| pool.take_to_receive(bytes));
        if stashed > 0 {
            buffer.put(0, &self.stash[..stashed]);
            self.start = 0;
            self.end = stashed;
        }
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
        let mut room = buffer.capacity() - self.end;
        if self.incoming.is_some() || self.expects_large {
            room = room.min(AHEAD_BYTES);
        }
        let mut pieces = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; 2];
        let mut used = 0;
        let mut offered = room;
        if let Some(incoming) = &self.incoming {
            let at = match &incoming.place {
                Place::Buffer(buffer) => buffer.at(incoming.at),
                Place::Landed(landed) => landed.bytes(stores)[incoming.at..].as_mut_ptr(),
            };
            pieces[0] = libc::iovec {
                iov_base: at.cast(),
                iov_len: incoming.left,
            };
            used = 1;
            offered += incoming.left;
        }
        pieces[used] = libc::iovec {
            iov_base: buffer.at(self.end).cast(),
            iov_len: room,
        };
        used += 1;
        debug_assert!(offered > 0);
        // SAFETY: the pieces lie in buffers and a landing claimed by `self`, past what has been received into them.
        let count = match unsafe { stream.receive(&mut pieces[..used]) } {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Ok(Received::WouldBlock);
            }
            Err(error) => return Err(error),
        };
        if count == 0 {
            return Ok(Received::End);
        }
        let mut rest = count;
        if let Some(incoming) = &mut self.incoming {
            let taken = rest.min(incoming.left);
            incoming.at += taken;
            incoming.left -= taken;
            rest -= taken;
        }
        self.end += rest;
        Ok(Received::Bytes {
            count,
            drained: count < offered && !stream.has_ended(),
        })
    }

    /// The next request that is whole. Once a header is there, the volume's gate is asked and then `admit`, with the
    /// bytes of memory the request will need; when either says no, the request stays where it is.
    pub(super) fn next(
        &mut self,
        session: &Session,
        pool: &mut Pool,
        stores: &mut [StoreDriver],
        volume: &Volume,
        now_ns: impl Fn() -> u64,
        admit: impl Fn(usize) -> bool,
    ) -> Next {
        if let Some(incoming) = self.incoming.take_if(|incoming| incoming.left == 0) {
            let request = incoming.request;
            return match incoming.place {
                Place::Buffer(buffer) => Next::Buffered { request, buffer },
                Place::Landed(landed) => Next::Landed { request, landed },
            };
        }
        if self.incoming.is_some() {
            return Next::Incomplete;
        }
        if let Some(next) = self.discarded() {
            return next;
        }
        let Some(buffer) = &mut self.buffer else {
            return Next::Incomplete;
        };
        let header_bytes = RawRequest::header_bytes(session.style);
        // SAFETY: `start..end` was filled by `receive`.
        let bytes = unsafe { buffer.bytes(self.start, self.end - self.start) };
        let raw = match RawRequest::parse(session.style, bytes) {
            None => {
                if buffer.capacity() - self.end < STASH_BYTES {
                    self.move_down();
                }
                return Next::Incomplete;
            }
            Some(Err(reason)) => return Next::Close(reason),
            Some(Ok(raw)) => raw,
        };
        let have = self.end - self.start - header_bytes;
        let request = match raw.check(session) {
            Verdict::Serve(request) => request,
            Verdict::Refuse {
                error,
                payload_bytes,
            } => {
                self.start += header_bytes;
                self.discard = u64::from(payload_bytes);
                self.refusal = Some((raw.cookie, raw.offset, raw.command, error));
                return self.discarded().unwrap_or(Next::Incomplete);
            }
            Verdict::Disconnect => return Next::Disconnect,
            Verdict::Close(reason) => return Next::Close(reason),
        };
        if let Some(gate) = &volume.gate
            && let Some(hold) = gate.hold(&request, now_ns())
        {
            return Next::Held(hold);
        }
        let payload = request.payload_bytes() as usize;
        let needs = match request.command {
            ashlar_core::nbd::request::Command::Read { .. } => request.length as usize,
            _ => payload,
        };
        if payload <= have {
            if !admit(needs) {
                return Next::Paused;
            }
            self.expects_large = false;
            let from = self.start + header_bytes;
            self.start = from + payload;
            return Next::Request {
                request,
                from,
                len: payload,
            };
        }
        if payload >= LANDING_BYTES
            && admit(needs)
            && let Some(landed) = Landed::reserve(stores, volume, &request)
        {
            // SAFETY: received, as `have` says.
            let received = unsafe { buffer.bytes(self.start + header_bytes, have) };
            landed.bytes(stores)[..have].copy_from_slice(received);
            self.begin_incoming(request, Place::Landed(landed), 0, have);
            return Next::Incomplete;
        }
        let room = buffer.capacity() - self.start - header_bytes;
        if payload <= room {
            return Next::Incomplete;
        }
        if payload < OWN_BUFFER_BYTES && header_bytes + payload <= buffer.capacity() {
            self.move_down();
            return Next::Incomplete;
        }
        if !admit(needs) {
            return Next::Paused;
        }
        self.start_incoming(request, header_bytes, have, pool);
        Next::Incomplete
    }

    /// Goes on throwing a refused payload away; when it is gone, the answer.
    fn discarded(&mut self) -> Option<Next> {
        let gone = self.discard.min((self.end - self.start) as u64);
        self.start += gone as usize;
        self.discard -= gone;
        if self.discard > 0 {
            return Some(Next::Incomplete);
        }
        let (cookie, offset, command, error) = self.refusal.take()?;
        Some(Next::Refuse {
            cookie,
            offset,
            command,
            error,
        })
    }

    /// Moves an incomplete request to the front of the receive buffer.
    fn move_down(&mut self) {
        if let Some(buffer) = &mut self.buffer {
            buffer.copy_within(self.start, 0, self.end - self.start);
            self.end -= self.start;
            self.start = 0;
        }
    }

    /// Receives the rest of a payload, of which `have` bytes are here, into its own buffer.
    fn start_incoming(
        &mut self,
        request: Request,
        header_bytes: usize,
        have: usize,
        pool: &mut Pool,
    ) {
        let Some(source) = &self.buffer else { return };
        let payload = request.payload_bytes() as usize;
        let at = payload_start(request.offset);
        let mut buffer = pool.take(covering_bytes(request.offset, payload as u64));
        // SAFETY: received, as `have` says.
        buffer.put(at, unsafe { source.bytes(self.start + header_bytes, have) });
        self.begin_incoming(request, Place::Buffer(buffer), at, have);
    }

    /// The first `have` bytes of a payload have been put into its place from byte `at` on; what the receive buffer
    /// held is used up.
    fn begin_incoming(&mut self, request: Request, place: Place, at: usize, have: usize) {
        self.start = 0;
        self.end = 0;
        self.expects_large = true;
        self.incoming = Some(Incoming {
            request,
            place,
            at: at + have,
            left: request.payload_bytes() as usize - have,
        });
    }

    /// Gives the receive buffer back, keeping the beginning of a request elsewhere. Called when the socket is empty.
    /// Returns false when that is not possible within the limits (`admit` as in [`Receiver::next`]).
    pub(super) fn release(
        &mut self,
        session: &Session,
        pool: &mut Pool,
        admit: impl FnOnce(usize) -> bool,
    ) -> bool {
        let have = self.end - self.start;
        if let Some(buffer) = &self.buffer {
            let header_bytes = RawRequest::header_bytes(session.style);
            // SAFETY: `start..end` was filled by `receive`.
            let bytes = unsafe { buffer.bytes(self.start, have) };
            if have < header_bytes {
                self.stash[..have].copy_from_slice(bytes);
                self.stashed = have;
            } else {
                let Some(Ok(raw)) = RawRequest::parse(session.style, bytes) else {
                    return false;
                };
                let Verdict::Serve(request) = raw.check(session) else {
                    return false;
                };
                let payload = request.payload_bytes() as usize;
                if payload <= have - header_bytes || self.incoming.is_some() || !admit(payload) {
                    return false;
                }
                self.start_incoming(request, header_bytes, have - header_bytes, pool);
            }
        }
        self.start = 0;
        self.end = 0;
        if let Some(buffer) = self.buffer.take() {
            pool.give_received(buffer);
        }
        true
    }

    /// Forgets everything; the client is gone.
    pub(super) fn clear(&mut self, pool: &mut Pool, stores: &mut [StoreDriver]) {
        if let Some(buffer) = self.buffer.take() {
            pool.give_received(buffer);
        }
        if let Some(incoming) = self.incoming.take() {
            match incoming.place {
                Place::Buffer(buffer) => pool.give(buffer),
                Place::Landed(landed) => landed.cancel(stores),
            }
        }
        self.start = 0;
        self.end = 0;
        self.stashed = 0;
    }
}
