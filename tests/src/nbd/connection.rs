//! A socket with a time limit on everything.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// Longest wait for one read or write. Far above what a loaded 2-core machine needs; a server that lets a client wait
/// this long hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl Address {
    /// The NBD URI of `export` at this address.
    pub fn uri(&self, export: &str) -> String {
        match self {
            Address::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
            Address::Tcp(address) => format!("nbd://{address}/{export}"),
        }
    }

    pub fn connect(&self) -> io::Result<Connection> {
        let stream = match self {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                Stream::Unix(stream)
            }
            Address::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, PATIENCE)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                Stream::Tcp(stream)
            }
        };
        Ok(Connection { stream })
    }
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// One raw connection.
pub struct Connection {
    stream: Stream,
}

impl Connection {
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    /// Exactly `count` bytes.
    pub fn take(&mut self, count: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    pub fn take_u16(&mut self) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.read_exact(&mut bytes)?;
        Ok(u16::from_be_bytes(bytes))
    }

    pub fn take_u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    pub fn take_u64(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.read_exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }

    /// Reads until the server closes and returns what came before that, or an error of kind `TimedOut` when it keeps
    /// the connection open for `patience`. A reset counts as a close.
    pub fn until_closed(&mut self, patience: Duration) -> io::Result<Vec<u8>> {
        self.set_read_timeout(patience)?;
        let mut all = Vec::new();
        let mut piece = [0; 4096];
        let result = loop {
            match self.read(&mut piece) {
                Ok(0) => break Ok(all),
                Ok(count) => all.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break Ok(all),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    break Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!(
                            "the server kept the connection open for {patience:?} ({} bytes came)",
                            all.len()
                        ),
                    ));
                }
                Err(error) => break Err(error),
            }
        };
        self.set_read_timeout(PATIENCE)?;
        result
    }

    /// No more bytes will come from this side; the other direction stays open.
    pub fn finish_sending(&self) -> io::Result<()> {
        match &self.stream {
            Stream::Unix(stream) => stream.shutdown(std::net::Shutdown::Write),
            Stream::Tcp(stream) => stream.shutdown(std::net::Shutdown::Write),
        }
    }

    pub fn set_read_timeout(&self, limit: Duration) -> io::Result<()> {
        match &self.stream {
            Stream::Unix(stream) => stream.set_read_timeout(Some(limit)),
            Stream::Tcp(stream) => stream.set_read_timeout(Some(limit)),
        }
    }

    pub fn set_write_timeout(&self, limit: Duration) -> io::Result<()> {
        match &self.stream {
            Stream::Unix(stream) => stream.set_write_timeout(Some(limit)),
            Stream::Tcp(stream) => stream.set_write_timeout(Some(limit)),
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.stream {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.stream {
            Stream::Unix(stream) => stream.read(buffer),
            Stream::Tcp(stream) => stream.read(buffer),
        }
    }
}

impl Write for Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match &mut self.stream {
            Stream::Unix(stream) => stream.write(buffer),
            Stream::Tcp(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
