//! The NBD front door: listens, haggles, hands finished connections to the data threads.
//!
//! A connection lives here only until its handshake ends. Then its socket, what was agreed ([`Session`]) and any bytes
//! the client sent ahead go to [`Attach`], and this module never touches it again. A client that misbehaves before that
//! point costs its own connection and a bounded amount of memory and time.

mod interface;

pub use interface::{
    Attach, AttachError, AttachedClient, CatalogError, ConnectionCount, ConnectionSlot,
    ExportCatalog,
};
