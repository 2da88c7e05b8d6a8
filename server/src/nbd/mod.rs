//! The NBD front door: listens, haggles, hands finished connections to the data threads.
//!
//! A connection lives here only until its handshake ends. Then its socket, what was agreed
//! ([`ashlar_core::nbd::session::Session`]) and any bytes the client sent ahead go to [`Attach`], and this module never
//! touches it again. A client that misbehaves before that point costs its own connection and a bounded amount of memory
//! and time.

pub mod activation;
mod driver;
mod interface;
mod listener;
pub mod socket;

pub use driver::HandshakeError;
pub use interface::{
    Attach, AttachError, AttachedClient, CatalogError, ConnectionCount, ConnectionSlot,
    ExportCatalog,
};
pub use listener::{ListenerConfig, ListenerStats, Listeners, Security};

#[cfg(test)]
mod tests;
