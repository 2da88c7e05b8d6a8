//! Telling the service manager how it goes (`sd_notify(3)`).

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// What the service manager is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Notice {
    /// Volumes are served.
    Ready,
    /// The daemon drains and will end.
    Stopping,
}

impl Notice {
    fn text(self) -> &'static str {
        match self {
            Notice::Ready => "READY=1\nSTATUS=Serving",
            Notice::Stopping => "STOPPING=1\nSTATUS=Draining",
        }
    }
}

/// Tells whoever set `NOTIFY_SOCKET`; nobody else cares.
pub(super) fn notify(notice: Notice) {
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET")
        && let Err(error) = send(&socket, notice)
    {
        tracing::warn!(%error, ?socket, "the service manager could not be told");
    }
}

fn send(socket: &OsStr, notice: Notice) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(socket)?,
        _ => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a path nor an abstract socket",
            ));
        }
    };
    UnixDatagram::unbound()?
        .send_to_addr(notice.text().as_bytes(), &address)
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_address_are_understood() {
        let scratch = tempfile::tempdir().expect("temporary directory");
        let path = scratch.path().join("notify");
        let by_path = UnixDatagram::bind(&path).expect("bind");
        send(path.as_os_str(), Notice::Ready).expect("send");
        let mut heard = [0; 64];
        let length = by_path.recv(&mut heard).expect("receive");
        assert!(heard[..length].starts_with(b"READY=1\n"));

        let name = format!("ashlar-notify-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("address");
        let by_name = UnixDatagram::bind_addr(&address).expect("bind");
        send(OsStr::new(&format!("@{name}")), Notice::Stopping).expect("send");
        let length = by_name.recv(&mut heard).expect("receive");
        assert!(heard[..length].starts_with(b"STOPPING=1\n"));

        assert!(send(OsStr::new("vsock:2:1234"), Notice::Ready).is_err());
    }
}
