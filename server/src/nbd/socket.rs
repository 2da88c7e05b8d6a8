//! Listening sockets: made here, or given by systemd.

use crate::config::{Address, HostPort};
use crate::directory::DirectoryProblem;
use rustix::fs::Mode;
use socket2::{Domain, SockAddr, Socket, Type};
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Connections the kernel keeps for us while we are busy; it cuts this to net.core.somaxconn.
const BACKLOG: i32 = 1024;

/// Why there is no listening socket. Each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A live server answers there.
    #[error("{address} is in use by another process; stop it or choose another address")]
    InUse {
        /// The address.
        address: String,
    },
    /// Something that is not a socket lies at the path.
    #[error("{} exists and is not a socket; remove it or choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The directory of the path is not there; it is not made, because its owner decides who may connect.
    #[error("cannot listen on {address}: {problem}")]
    Directory {
        /// The address.
        address: String,
        /// What is wrong with it.
        problem: DirectoryProblem,
    },
    /// A TCP address beyond this machine.
    #[error(
        "{address} is not a loopback address; without TLS, NBD over TCP is served on loopback only \
         (127.0.0.0/8 or ::1)"
    )]
    NotLoopback {
        /// The address.
        address: SocketAddr,
    },
    /// A host name that has no address.
    #[error("{host} has no address: {source}")]
    Resolve {
        /// The name.
        host: HostPort,
        /// Why.
        source: io::Error,
    },
    /// A socket given by systemd that cannot be used.
    #[error("the socket given by systemd as {name:?} cannot be used: {reason}")]
    Given {
        /// Its name.
        name: String,
        /// Why.
        reason: &'static str,
    },
    /// Anything else.
    #[error("cannot listen on {address}: {source}")]
    Io {
        /// The address.
        address: String,
        /// Why.
        source: io::Error,
    },
}

/// A socket that listens; dropping it closes it and removes a Unix socket's path.
#[derive(Debug)]
pub struct Bound {
    pub(crate) socket: BoundSocket,
    address: String,
}

#[derive(Debug)]
pub(crate) enum BoundSocket {
    Unix(UnixListener, Option<OwnedPath>),
    Tcp(TcpListener),
}

/// A path this process made and removes again, unless another socket has taken its place.
#[derive(Debug)]
pub(crate) struct OwnedPath {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for OwnedPath {
    fn drop(&mut self) {
        if let Ok(now) = std::fs::symlink_metadata(&self.path)
            && (now.dev(), now.ino()) == (self.device, self.inode)
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address)
    }
}

impl Bound {
    /// The TCP address, with the port the kernel chose when 0 was asked for.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match &self.socket {
            BoundSocket::Tcp(listener) => listener.local_addr().ok(),
            BoundSocket::Unix(..) => None,
        }
    }

    /// Takes over a socket that somebody else made and put to listening.
    pub fn given(name: &str, fd: OwnedFd) -> Result<Bound, BindError> {
        let refuse = |reason| BindError::Given {
            name: name.to_owned(),
            reason,
        };
        let socket = Socket::from(fd);
        if !matches!(socket.r#type(), Ok(Type::STREAM)) {
            return Err(refuse("it is not a stream socket"));
        }
        if !matches!(socket.is_listener(), Ok(true)) {
            return Err(refuse("it does not listen (Accept=yes is not supported)"));
        }
        let io = |source| BindError::Io {
            address: format!("systemd:{name}"),
            source,
        };
        socket.set_nonblocking(true).map_err(io)?;
        let local = socket.local_addr().map_err(io)?;
        let (socket, address) = if local.is_unix() {
            let address = match local.as_pathname() {
                Some(path) => format!("unix:{}", path.display()),
                None => format!("systemd:{name}"),
            };
            let listener = UnixListener::from(OwnedFd::from(socket));
            (BoundSocket::Unix(listener, None), address)
        } else if let Some(address) = local.as_socket() {
            if !address.ip().is_loopback() {
                return Err(BindError::NotLoopback { address });
            }
            let listener = TcpListener::from(OwnedFd::from(socket));
            (BoundSocket::Tcp(listener), format!("tcp:{address}"))
        } else {
            return Err(refuse("it is neither a Unix nor a TCP socket"));
        };
        Ok(Bound { socket, address })
    }
}

/// How far away those who connect may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// On this machine.
    Loopback,
    /// Anywhere: what is served there is secured.
    Anywhere,
}

/// Listens on an address: one socket, or one for each address a host name has.
pub fn bind(address: &Address, reach: Reach) -> Result<Vec<Bound>, BindError> {
    match address {
        Address::Unix(path) => {
            let (listener, owned) = bind_unix(path)?;
            Ok(vec![Bound {
                socket: BoundSocket::Unix(listener, Some(owned)),
                address: address.to_string(),
            }])
        }
        Address::Tcp(host) => bind_tcp(host, reach),
    }
}

/// Listens at a path that only this user may connect to (0600 from its first moment on).
///
/// A path left behind by a server that was killed is taken over: nobody answers there. One where somebody answers is
/// left alone.
pub(super) fn bind_unix(path: &Path) -> Result<(UnixListener, OwnedPath), BindError> {
    let name = || format!("unix:{}", path.display());
    let io = |source| BindError::Io {
        address: name(),
        source,
    };
    if let Some(problem) = path.parent().and_then(DirectoryProblem::of) {
        let address = name();
        return Err(BindError::Directory { address, problem });
    }
    let listener = match try_bind_unix(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            match std::fs::symlink_metadata(path) {
                Ok(there) if !there.file_type().is_socket() => {
                    return Err(BindError::NotASocket {
                        path: path.to_owned(),
                    });
                }
                Ok(_) if is_answered(path) => return Err(BindError::InUse { address: name() }),
                Ok(_) => std::fs::remove_file(path).map_err(io)?,
                // Gone in the meantime.
                Err(_) => {}
            }
            try_bind_unix(path)
        }
        other => other,
    }
    .map_err(io)?;
    let there = std::fs::symlink_metadata(path).map_err(io)?;
    let owned = OwnedPath {
        path: path.to_owned(),
        device: there.dev(),
        inode: there.ino(),
    };
    Ok((listener, owned))
}

fn try_bind_unix(path: &Path) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Linux gives the path the mode of the socket's inode at the time of bind(2), so there is no moment in which
    // others could connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(UnixListener::from(OwnedFd::from(socket)))
}

/// Somebody listens at the path. Only a refused connection says for certain that nobody does.
fn is_answered(path: &Path) -> bool {
    let probe = || {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        // A full backlog must not hold us up: it answers EAGAIN, and somebody is there.
        socket.set_nonblocking(true)?;
        socket.connect(&SockAddr::unix(path)?)
    };
    match probe() {
        Ok(()) => true,
        Err(error) => !matches!(
            error.kind(),
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
        ),
    }
}

fn bind_tcp(host: &HostPort, reach: Reach) -> Result<Vec<Bound>, BindError> {
    let resolve = |source| BindError::Resolve {
        host: host.clone(),
        source,
    };
    let addresses: Vec<SocketAddr> = (host.host.as_str(), host.port)
        .to_socket_addrs()
        .map_err(resolve)?
        .collect();
    if addresses.is_empty() {
        return Err(resolve(io::ErrorKind::NotFound.into()));
    }
    if reach == Reach::Loopback
        && let Some(&address) = addresses.iter().find(|address| !address.ip().is_loopback())
    {
        return Err(BindError::NotLoopback { address });
    }
    let mut bound: Vec<Bound> = Vec::new();
    let mut last_error = None;
    for address in addresses {
        // Port 0 means one port, not one for each address.
        if host.port == 0 && !bound.is_empty() {
            break;
        }
        match TcpListener::bind(address).and_then(|listener| {
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            Ok((listener, address))
        }) {
            Ok((listener, address)) => bound.push(Bound {
                socket: BoundSocket::Tcp(listener),
                address: format!("tcp:{address}"),
            }),
            Err(source) if source.kind() == io::ErrorKind::AddrInUse => {
                return Err(BindError::InUse {
                    address: format!("tcp:{address}"),
                });
            }
            // A machine without IPv6 still has 127.0.0.1.
            Err(source) => {
                last_error = Some(BindError::Io {
                    address: format!("tcp:{address}"),
                    source,
                });
            }
        }
    }
    match last_error {
        Some(error) if bound.is_empty() => Err(error),
        _ => Ok(bound),
    }
}
