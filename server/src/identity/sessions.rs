//! The open connections of peers with a certificate, so that they can be cut when their peer is shut out.

use std::collections::BTreeMap;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use super::names::Peer;

/// Every open connection.
#[derive(Debug, Default)]
pub struct Sessions {
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    connections: BTreeMap<u64, (Peer, OwnedFd)>,
}

/// One open connection; forgotten when this is dropped.
#[derive(Debug)]
pub struct Session {
    sessions: Arc<Sessions>,
    number: u64,
}

impl Sessions {
    /// Remembers the connection on `socket`. Costs a descriptor: the connection may be handed to another thread, or be
    /// closed and its number given to another one, and still be cut or not by us.
    pub fn enter(self: &Arc<Self>, peer: &Peer, socket: impl AsFd) -> std::io::Result<Session> {
        let socket = socket.as_fd().try_clone_to_owned()?;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let number = open.next;
        open.next += 1;
        open.connections.insert(number, (peer.clone(), socket));
        Ok(Session {
            sessions: self.clone(),
            number,
        })
    }

    /// Cuts the connections of everybody who is not let in any more. Answers how many.
    pub(super) fn cut(&self, is_shut_out: impl Fn(&Peer) -> bool) -> usize {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cut = 0;
        for (peer, socket) in open.connections.values() {
            if is_shut_out(peer) {
                tracing::info!(%peer, "a connection is cut: its peer was shut out");
                let socket = socket2::SockRef::from(socket);
                // Fails when the other side was quicker.
                let _ = socket.shutdown(Shutdown::Both);
                cut += 1;
            }
        }
        cut
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut open = self
            .sessions
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        open.connections.remove(&self.number);
    }
}
