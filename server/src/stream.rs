//! The bytes of a connection, as a data thread moves them: straight from and to the socket, or through TLS.
//!
//! Both kinds are non-blocking and take and give several pieces at a time, so that a turn costs one system call in each
//! direction whatever lies above. The handshake of TLS is over before a stream comes here.

use std::cell::RefCell;
use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// Ciphertext received at a time: sixteen records of the largest size, so that a busy link costs few calls.
const CIPHERTEXT_BYTES: usize = 256 << 10;
/// Ciphertext that may wait for the socket before no more plaintext is taken.
const UNSENT_BYTES: usize = 512 << 10;

/// Buffers that a thread keeps for connections that have nothing to decrypt; beyond these they go back to the allocator.
const KEPT_BUFFERS: usize = 4;

thread_local! {
    /// Of [`CIPHERTEXT_BYTES`] each. Made anew they would have to be zeroed, which costs more than what most of them carry.
    static BUFFERS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A connected, non-blocking stream socket.
pub enum Stream {
    /// As it comes.
    Plain(OwnedFd),
    /// Encrypted; the peer was authenticated in the handshake.
    Tls(Box<TlsStream>),
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stream::Plain(_) => "Stream::Plain",
            Stream::Tls(_) => "Stream::Tls",
        })
    }
}

/// What a call of [`Stream::send`] achieved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Bytes that need not be offered again.
    pub bytes: usize,
    /// The socket is full: go on when it is writable, even if everything was taken.
    pub blocked: bool,
}

impl Stream {
    /// A socket with a TLS session whose handshake is over.
    pub fn tls(socket: OwnedFd, mut session: rustls::Connection) -> Stream {
        session.set_buffer_limit(Some(UNSENT_BYTES));
        Stream::Tls(Box::new(TlsStream {
            socket,
            session,
            ciphertext: Vec::new(),
            start: 0,
            end: 0,
            hung_up: false,
            has_ended: false,
        }))
    }

    /// The socket itself, to be watched.
    pub fn socket(&self) -> &OwnedFd {
        match self {
            Stream::Plain(socket) => socket,
            Stream::Tls(stream) => &stream.socket,
        }
    }

    /// Its descriptor.
    pub fn fd(&self) -> RawFd {
        self.socket().as_raw_fd()
    }

    /// The engine saw the peer hang up: whatever comes, the end is behind it, and nothing will tell of it again. What
    /// is received from here on goes as far as that end.
    pub fn hung_up(&mut self) {
        if let Stream::Tls(stream) = self {
            stream.hung_up = true;
        }
    }

    /// Fills `pieces` in order and says how many bytes came; zero is the end. Fewer than there is room for: the socket
    /// is empty for now, or has ended ([`Stream::has_ended`]). [`io::ErrorKind::WouldBlock`]: it was empty from the beginning.
    ///
    /// # Safety
    /// Each piece names memory that may be written to and that nothing else uses during the call.
    pub unsafe fn receive(&mut self, pieces: &mut [libc::iovec]) -> io::Result<usize> {
        match self {
            // SAFETY: the caller's promise.
            Stream::Plain(socket) => unsafe { receive_plain(socket.as_raw_fd(), pieces) },
            // SAFETY: the caller's promise.
            Stream::Tls(stream) => unsafe { stream.receive(pieces) },
        }
    }

    /// Offers `pieces` in order, and with them whatever an earlier call left unsent.
    ///
    /// # Safety
    /// Each piece names initialised memory that does not change during the call.
    pub unsafe fn send(&mut self, pieces: &[libc::iovec]) -> io::Result<Taken> {
        match self {
            // SAFETY: the caller's promise.
            Stream::Plain(socket) => unsafe { send_plain(socket.as_raw_fd(), pieces) },
            // SAFETY: the caller's promise.
            Stream::Tls(stream) => unsafe { stream.send(pieces) },
        }
    }

    /// Whether the peer has said that nothing more comes. The socket itself may stay silent about it.
    pub fn has_ended(&self) -> bool {
        match self {
            Stream::Plain(_) => false,
            Stream::Tls(stream) => stream.has_ended,
        }
    }

    /// Whether bytes that were taken still wait for the socket.
    pub fn has_unsent(&self) -> bool {
        match self {
            Stream::Plain(_) => false,
            Stream::Tls(stream) => stream.session.wants_write(),
        }
    }
}

/// See [`Stream::Tls`].
pub struct TlsStream {
    socket: OwnedFd,
    session: rustls::Connection,
    /// Received and not yet decrypted: bytes `start..end`. Empty while there are none.
    ciphertext: Vec<u8>,
    start: usize,
    end: usize,
    /// See [`Stream::hung_up`].
    hung_up: bool,
    /// The peer said that this is its end.
    has_ended: bool,
}

impl TlsStream {
    unsafe fn receive(&mut self, pieces: &mut [libc::iovec]) -> io::Result<usize> {
        let mut filled = 0;
        let mut is_empty = false;
        let mut ended = false;
        for piece in pieces {
            let mut at = 0;
            while at < piece.iov_len {
                // SAFETY: the caller's promise; decrypted bytes are copied in, nothing is read.
                let room = unsafe {
                    std::slice::from_raw_parts_mut(
                        piece.iov_base.cast::<u8>().add(at),
                        piece.iov_len - at,
                    )
                };
                match self.session.reader().read(room) {
                    Ok(0) => {
                        self.has_ended = true;
                        return Ok(filled);
                    }
                    Ok(count) => {
                        at += count;
                        filled += count;
                        continue;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    // The socket ended without a word: what was cut off is for the protocol above to see.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        return Ok(filled);
                    }
                    Err(error) => return Err(error),
                }
                if self.start == self.end {
                    if is_empty || ended {
                        self.let_go();
                        return if filled > 0 || ended {
                            Ok(filled)
                        } else {
                            Err(io::ErrorKind::WouldBlock.into())
                        };
                    }
                    match self.fill() {
                        Ok(0) => ended = true,
                        // A stream socket that gave less than it might is empty, and tells of what comes later. Not so
                        // of an end that it told of already: that may be right behind, and what came no whole record.
                        Ok(count) => is_empty = count < CIPHERTEXT_BYTES && !self.hung_up,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            is_empty = true;
                            continue;
                        }
                        Err(error) => return Err(error),
                    }
                }
                self.decrypt()?;
            }
        }
        Ok(filled)
    }

    /// One receive call into the empty ciphertext buffer.
    fn fill(&mut self) -> io::Result<usize> {
        if self.ciphertext.is_empty() {
            let kept = BUFFERS.with_borrow_mut(Vec::pop);
            self.ciphertext = kept.unwrap_or_else(|| vec![0; CIPHERTEXT_BYTES]);
        }
        let mut piece = [libc::iovec {
            iov_base: self.ciphertext.as_mut_ptr().cast(),
            iov_len: CIPHERTEXT_BYTES,
        }];
        // SAFETY: the piece is the buffer, which is borrowed for the call.
        let count = unsafe { receive_plain(self.socket.as_raw_fd(), &mut piece)? };
        self.start = 0;
        self.end = count;
        Ok(count)
    }

    /// Gives the session what was received, as much as it takes at once; nothing received tells it the end.
    fn decrypt(&mut self) -> io::Result<()> {
        let mut received = &self.ciphertext[self.start..self.end];
        let before = received.len();
        self.session.read_tls(&mut received)?;
        self.start += before - received.len();
        self.session
            .process_new_packets()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(())
    }

    /// An idle connection holds no buffer.
    fn let_go(&mut self) {
        let buffer = std::mem::take(&mut self.ciphertext);
        BUFFERS.with_borrow_mut(|kept| {
            if !buffer.is_empty() && kept.len() < KEPT_BUFFERS {
                kept.push(buffer);
            }
        });
        self.start = 0;
        self.end = 0;
    }

    unsafe fn send(&mut self, pieces: &[libc::iovec]) -> io::Result<Taken> {
        let mut taken = Taken::default();
        if self.push_out()? {
            taken.blocked = true;
            return Ok(taken);
        }
        let mut pieces = pieces;
        let mut skip = 0;
        while !pieces.is_empty() {
            // One record for small neighbours: a header and its block travel together.
            let slices: smallvec::SmallVec<[IoSlice<'_>; 16]> = pieces
                .iter()
                .take(16)
                .enumerate()
                .map(|(i, piece)| {
                    let skip = if i == 0 { skip } else { 0 };
                    // SAFETY: the caller's promise.
                    IoSlice::new(unsafe {
                        std::slice::from_raw_parts(
                            piece.iov_base.cast::<u8>().cast_const().add(skip),
                            piece.iov_len - skip,
                        )
                    })
                })
                .collect();
            let mut count = self.session.writer().write_vectored(&slices)?;
            taken.bytes += count;
            if count == 0 && self.push_out()? {
                taken.blocked = true;
                return Ok(taken);
            }
            while let Some(piece) = pieces.first() {
                let left = piece.iov_len - skip;
                if count < left {
                    skip += count;
                    break;
                }
                count -= left;
                skip = 0;
                pieces = &pieces[1..];
            }
        }
        taken.blocked = self.push_out()?;
        Ok(taken)
    }

    /// Sends ciphertext until there is none (false) or the socket is full (true).
    fn push_out(&mut self) -> io::Result<bool> {
        while self.session.wants_write() {
            let mut socket = Socket(self.socket.as_raw_fd());
            match self.session.write_tls(&mut socket) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }
}

impl Drop for TlsStream {
    fn drop(&mut self) {
        // A goodbye, so that the peer can tell an end from a cut; one that does not fit is not waited for.
        self.session.send_close_notify();
        let _ = self.push_out();
    }
}

/// Where a session writes its records to.
struct Socket(RawFd);

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let pieces: smallvec::SmallVec<[libc::iovec; 64]> = slices
            .iter()
            .map(|slice| libc::iovec {
                iov_base: slice.as_ptr().cast_mut().cast(),
                iov_len: slice.len(),
            })
            .collect();
        // SAFETY: the pieces are the borrowed slices.
        let taken = unsafe { send_plain(self.0, &pieces)? };
        if taken.bytes == 0 && taken.blocked {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(taken.bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn message_of(pieces: *mut libc::iovec, count: usize) -> libc::msghdr {
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces;
    message.msg_iovlen = count as _;
    message
}

unsafe fn receive_plain(fd: RawFd, pieces: &mut [libc::iovec]) -> io::Result<usize> {
    let mut message = message_of(pieces.as_mut_ptr(), pieces.len());
    loop {
        // SAFETY: the pieces may be written to, as the caller promises.
        let result = unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT) };
        if result >= 0 {
            return Ok(result as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

unsafe fn send_plain(fd: RawFd, pieces: &[libc::iovec]) -> io::Result<Taken> {
    let message = message_of(pieces.as_ptr().cast_mut(), pieces.len());
    let offered: usize = pieces.iter().map(|piece| piece.iov_len).sum();
    loop {
        // SAFETY: the pieces can be read, as the caller promises.
        let result = unsafe {
            libc::sendmsg(
                fd,
                &raw const message,
                libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
            )
        };
        if result >= 0 {
            let bytes = result as usize;
            // A stream socket that took less than it was offered is full.
            let blocked = bytes < offered;
            return Ok(Taken { bytes, blocked });
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => {
                return Ok(Taken {
                    bytes: 0,
                    blocked: true,
                });
            }
            _ => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
