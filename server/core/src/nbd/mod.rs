//! The NBD protocol, without a socket: bytes in, bytes and decisions out.
//!
//! Source of every rule: `doc/proto.md` of NetworkBlockDevice/nbd, with its `extension-ext-header` branch for extended
//! headers. [`handshake`] turns option haggling into a [`session::Session`]; [`request`] checks what the client asks
//! for; [`reply`] encodes the answers; [`errors`] is the only place that knows which error number is which refusal.

pub mod errors;
pub mod handshake;
mod options;
pub mod reply;
pub mod request;
pub mod session;
pub mod wire;
