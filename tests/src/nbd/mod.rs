//! The tests' own NBD client.
//!
//! It shares no code with the server's codec: the constants and the rules are written a second time from the
//! protocol text (NetworkBlockDevice/nbd doc/proto.md), so that a mistake in one is not hidden by the same mistake in
//! the other. It blocks, it has a time limit on every read and write, and it can send any bytes at any moment.

mod connection;
mod handshake;
mod transmission;
pub mod wire;

pub use connection::{Address, Connection};
pub use handshake::{Handshake, Info, OptionReply, export_request, meta_request};
pub use transmission::{Answer, Failure, HeaderStyle, Request, Transmission};

/// What a connection asks for before it enters transmission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Ask for structured replies.
    pub structured: bool,
    /// Ask for extended headers (implies structured replies).
    pub extended: bool,
    /// Select the `base:allocation` context (needs one of the two above).
    pub allocation: bool,
}

impl Wishes {
    /// 28-byte requests and 16-byte replies, as the Linux kernel speaks.
    pub const SIMPLE: Wishes = Wishes {
        structured: false,
        extended: false,
        allocation: false,
    };
    /// Structured replies with block status.
    pub const STRUCTURED: Wishes = Wishes {
        structured: true,
        extended: false,
        allocation: true,
    };
    /// Extended headers with block status.
    pub const EXTENDED: Wishes = Wishes {
        structured: false,
        extended: true,
        allocation: true,
    };
}

/// Shakes hands, asks for `wishes` and enters transmission with `NBD_OPT_GO`. Fails when a wish is refused.
pub fn open(address: &Address, export: &str, wishes: Wishes) -> Result<Transmission, Failure> {
    let mut handshake = Handshake::begin(address)?;
    if wishes.extended {
        handshake.acknowledged(wire::OPT_EXTENDED_HEADERS, &[])?;
    } else if wishes.structured {
        handshake.acknowledged(wire::OPT_STRUCTURED_REPLY, &[])?;
    }
    if wishes.allocation {
        handshake.select_allocation(export)?;
    }
    handshake.go(export)
}
