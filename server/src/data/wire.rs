//! The bytes of a connection as they lie on the socket: as they are, or as TLS records.
//!
//! TLS is done here, on the data thread: what is received is decrypted straight to where the receiver wants it, and what
//! is sent goes through a bounded buffer of records. A connection in the clear has none of that and costs nothing more.
//! The kernel's own TLS is not used: it would spare a copy and needs a module that is seldom loaded.

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::RawFd;

use rustls::ServerConnection;

use super::receiver::Received;
use crate::nbd::Secured;

/// Plaintext turned into records at a time, and so about the most that waits for the socket: four records.
const RECORDS_BYTES: usize = 64 << 10;

/// See the module text.
pub(super) struct Wire {
    /// `None`: in the clear. In a box because nearly all connections have none.
    tls: Option<Box<Secured>>,
}

/// What one call of [`Wire::send`] achieved.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Taken {
    /// Bytes that need not be offered again.
    pub(super) bytes: usize,
    /// The socket is full.
    pub(super) full: bool,
}

impl Wire {
    pub(super) fn new(tls: Option<Secured>) -> Wire {
        let tls = tls.map(|mut secured| {
            secured.connection.set_buffer_limit(Some(RECORDS_BYTES));
            Box::new(secured)
        });
        Wire { tls }
    }

    /// Receives once into `pieces`, which offer `offered` bytes in all.
    ///
    /// # Safety
    /// Each piece is memory that nothing else uses during the call.
    pub(super) unsafe fn receive(
        &mut self,
        fd: RawFd,
        pieces: &mut [libc::iovec],
        offered: usize,
    ) -> io::Result<Received> {
        match &mut self.tls {
            // SAFETY: as promised by the caller.
            None => unsafe { receive_plain(fd, pieces, offered) },
            // SAFETY: as promised by the caller.
            Some(tls) => unsafe { receive_secured(&mut tls.connection, fd, pieces, offered) },
        }
    }

    /// Offers `pieces` to the socket.
    ///
    /// # Safety
    /// Each piece is memory that does not change during the call.
    pub(super) unsafe fn send(
        &mut self,
        fd: RawFd,
        pieces: &mut [libc::iovec],
    ) -> io::Result<Taken> {
        let Some(tls) = &mut self.tls else {
            let offered: usize = pieces.iter().map(|piece| piece.iov_len).sum();
            // SAFETY: as promised by the caller.
            let bytes = unsafe { send_plain(fd, pieces)? };
            // A stream socket that took less than offered is full.
            let full = bytes < offered;
            return Ok(Taken { bytes, full });
        };
        if !flush(&mut tls.connection, fd)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut bytes = 0;
        for piece in pieces {
            // SAFETY: as promised by the caller.
            let plain = unsafe {
                std::slice::from_raw_parts(piece.iov_base.cast::<u8>().cast_const(), piece.iov_len)
            };
            let taken = tls.connection.writer().write(plain)?;
            bytes += taken;
            if taken < plain.len() {
                break;
            }
        }
        let full = !flush(&mut tls.connection, fd)?;
        Ok(Taken { bytes, full })
    }

    /// Sends what is left of records that were begun. Answers whether nothing is.
    pub(super) fn flush(&mut self, fd: RawFd) -> io::Result<bool> {
        match &mut self.tls {
            None => Ok(true),
            Some(tls) => flush(&mut tls.connection, fd),
        }
    }

    /// Whether records wait for the socket.
    pub(super) fn has_pending(&self) -> bool {
        self.tls
            .as_ref()
            .is_some_and(|tls| tls.connection.wants_write())
    }

    /// Says that nothing more comes, as far as the socket takes that now.
    pub(super) fn say_end(&mut self, fd: RawFd) {
        if let Some(tls) = &mut self.tls {
            tls.connection.send_close_notify();
            let _ = flush(&mut tls.connection, fd);
        }
    }
}

/// # Safety
/// Each piece is memory that nothing else uses during the call.
unsafe fn receive_plain(
    fd: RawFd,
    pieces: &mut [libc::iovec],
    offered: usize,
) -> io::Result<Received> {
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len() as _;
    loop {
        // SAFETY: the pieces are memory for our use alone, as promised by the caller.
        let result = unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT) };
        if result > 0 {
            let count = result as usize;
            let drained = count < offered;
            return Ok(Received::Bytes { count, drained });
        }
        if result == 0 {
            return Ok(Received::End);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Ok(Received::WouldBlock),
            _ => return Err(error),
        }
    }
}

/// Goes on until the pieces are full or the socket is empty, so that "drained" means for both what it says: records that
/// were received are nowhere seen by whoever waits for the socket.
///
/// # Safety
/// Each piece is memory that nothing else uses during the call.
unsafe fn receive_secured(
    connection: &mut ServerConnection,
    fd: RawFd,
    pieces: &mut [libc::iovec],
    offered: usize,
) -> io::Result<Received> {
    let mut count = 0;
    let mut pieces = pieces.iter().map(|piece| {
        // SAFETY: as promised by the caller. The memory may not have been written to yet; the reader of decrypted bytes
        // only writes to it.
        unsafe { std::slice::from_raw_parts_mut(piece.iov_base.cast::<u8>(), piece.iov_len) }
    });
    let mut room: &mut [u8] = &mut [];
    let drained = loop {
        if room.is_empty() {
            match pieces.next() {
                Some(next) => room = next,
                None => break false,
            }
            continue;
        }
        match connection.reader().read(room) {
            // The other side said that nothing more comes.
            Ok(0) if count == 0 => return Ok(Received::End),
            Ok(0) => break false,
            Ok(taken) => {
                count += taken;
                room = &mut room[taken..];
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // It went away without a word.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                if count == 0 {
                    return Ok(Received::End);
                }
                break false;
            }
            Err(error) => return Err(error),
        }
        match connection.read_tls(&mut Socket(fd)) {
            Ok(_) => {
                if let Err(error) = connection.process_new_packets() {
                    // The alert that says what is wrong.
                    let _ = flush(connection, fd);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, error));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break true,
            Err(error) => return Err(error),
        }
    };
    debug_assert!(count <= offered);
    if connection.wants_write() {
        // An answer of the protocol itself, to a change of keys.
        flush(connection, fd)?;
    }
    if count == 0 {
        Ok(Received::WouldBlock)
    } else {
        Ok(Received::Bytes { count, drained })
    }
}

/// # Safety
/// Each piece is memory that does not change during the call.
unsafe fn send_plain(fd: RawFd, pieces: &mut [libc::iovec]) -> io::Result<usize> {
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len() as _;
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the pieces do not change, as promised by the caller.
    let result = unsafe { libc::sendmsg(fd, &raw const message, flags) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as usize)
}

/// Sends records until none are left (true) or the socket is full (false).
fn flush(connection: &mut ServerConnection, fd: RawFd) -> io::Result<bool> {
    while connection.wants_write() {
        match connection.write_tls(&mut Socket(fd)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// The socket as TLS reads and writes it.
struct Socket(RawFd);

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut piece = [libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        }];
        // SAFETY: the piece is `buffer`, borrowed for our use alone.
        match unsafe { receive_plain(self.0, &mut piece, buffer.len())? } {
            Received::Bytes { count, .. } => Ok(count),
            Received::End => Ok(0),
            Received::WouldBlock => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        /// Records of one call.
        const PIECES_MAX: usize = 16;
        let mut pieces = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; PIECES_MAX];
        let used = slices.len().min(PIECES_MAX);
        for (piece, slice) in pieces.iter_mut().zip(slices) {
            piece.iov_base = slice.as_ptr().cast_mut().cast();
            piece.iov_len = slice.len();
        }
        loop {
            // SAFETY: the pieces are `slices`, borrowed.
            match unsafe { send_plain(self.0, &mut pieces[..used]) } {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
