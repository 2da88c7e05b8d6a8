//! What the listener needs from the rest of the daemon, and what it gives.

use ashlar_core::nbd::handshake::{Export, ExportName};
use ashlar_core::nbd::session::Session;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::stream::Stream;

/// A client that finished its handshake.
#[derive(Debug)]
pub struct AttachedClient {
    /// The connected socket, non-blocking, with TCP_NODELAY where that exists. Nothing is queued in user space for
    /// sending.
    pub stream: Stream,
    /// What was agreed, the volume among it.
    pub session: Session,
    /// Bytes the client sent behind its last option: the start of its requests.
    pub leftover: Vec<u8>,
    /// Who it is, for logs and listings: `unix:pid=4242,uid=0`, `tcp:127.0.0.1:50000` or, with the name in its
    /// certificate, `tcp:127.0.0.1:50000 (client db)`.
    pub peer: String,
    /// Cuts the connection when the holder of its certificate is shut out; keep it until the connection is closed.
    pub certified: Option<crate::identity::Session>,
    /// Counts against the daemon's connection limit; keep it until the connection is closed.
    pub slot: ConnectionSlot,
}

/// Takes over connections after the handshake.
pub trait Attach: Send + Sync + 'static {
    /// Takes the client. On an error the client is dropped, which closes its connection.
    fn attach(&self, client: AttachedClient) -> Result<(), AttachError>;
}

/// Why a connection was not taken over.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The volume was closed or deleted between the look-up and now.
    #[error("the volume is not open")]
    NotOpen,
    /// The daemon is draining.
    #[error("the daemon is shutting down")]
    ShuttingDown,
    /// Anything else, for the log.
    #[error("{0}")]
    Failed(String),
}

/// Finds exports.
pub trait ExportCatalog: Send + Sync + 'static {
    /// The volume with this name or this id (in the usual hyphenated form). The empty name asks for the default
    /// export, if there is one. `Ok(None)`: no such volume.
    fn lookup(
        &self,
        name: &str,
    ) -> impl Future<Output = Result<Option<Export>, CatalogError>> + Send;

    /// Every export, for clients that list them.
    fn list(&self) -> impl Future<Output = Result<Vec<ExportName>, CatalogError>> + Send;
}

/// Why an export cannot be served, though it may exist. The text goes to the client.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The daemon is draining.
    #[error("the daemon is shutting down")]
    ShuttingDown,
    /// The volume exists and cannot be used now; the reason, for people.
    #[error("{0}")]
    Unavailable(String),
    /// The volume exists and this client may not have it; the reason, for people.
    #[error("{0}")]
    Forbidden(String),
}

/// Connections of the daemon, in whatever phase.
#[derive(Clone, Debug)]
pub struct ConnectionCount {
    open: Arc<AtomicUsize>,
    most: usize,
}

impl ConnectionCount {
    /// At most `most` at a time.
    pub fn new(most: usize) -> ConnectionCount {
        ConnectionCount {
            open: Arc::new(AtomicUsize::new(0)),
            most,
        }
    }

    /// Room for one more, or `None`.
    pub fn try_slot(&self) -> Option<ConnectionSlot> {
        let mut open = self.open.load(Ordering::Acquire);
        while open < self.most {
            let taken = self.open.compare_exchange_weak(
                open,
                open + 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            match taken {
                Ok(_) => return Some(ConnectionSlot(Arc::clone(&self.open))),
                Err(now) => open = now,
            }
        }
        None
    }

    /// How many there are.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Acquire)
    }
}

/// One connection's place under the limit; dropping it gives the place back.
#[derive(Debug)]
pub struct ConnectionSlot(Arc<AtomicUsize>);

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
