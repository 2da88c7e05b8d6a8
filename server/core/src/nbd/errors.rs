//! Every way a request can fail, and the one table from there to the wire.

/// The error numbers the protocol allows in a reply; there are no others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Errno {
    /// Not permitted: a change to a read-only export.
    Perm = 1,
    /// The storage failed.
    Io = 5,
    /// The server could not get memory.
    NoMem = 12,
    /// The request makes no sense.
    Inval = 22,
    /// No room, or a write past the end.
    NoSpc = 28,
    /// A read that may not be fragmented is too long for one chunk.
    Overflow = 75,
    /// A fast zero that could not be fast.
    NotSup = 95,
    /// The server is going away.
    Shutdown = 108,
}

/// Why a request was not carried out. Protocol refusals come from [`super::request`], the rest from what lies below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum RequestError {
    /// A command number nobody defined, or one that was not advertised.
    #[error("unknown command")]
    UnknownCommand,
    /// A flag that this command does not take with what was negotiated.
    #[error("a flag that this command does not take")]
    BadFlags,
    /// A payload on a command that carries none (extended headers).
    #[error("this command carries no payload")]
    UnexpectedPayload,
    /// WRITE, TRIM or WRITE_ZEROES on a read-only export.
    #[error("the export is read-only")]
    ReadOnly,
    /// READ, TRIM, CACHE or BLOCK_STATUS past the end of the export.
    #[error("past the end of the export")]
    PastEnd,
    /// WRITE or WRITE_ZEROES past the end of the export.
    #[error("past the end of the export")]
    NoRoomPastEnd,
    /// READ of more than the advertised maximum payload.
    #[error("longer than the maximum payload")]
    TooLong,
    /// A READ with DF that the server cannot answer in one chunk.
    #[error("too long for one chunk")]
    CannotStayWhole,
    /// FLUSH with an offset or a length.
    #[error("flush takes no offset and no length")]
    FlushWithRange,
    /// BLOCK_STATUS without a negotiated context.
    #[error("no metadata context was negotiated")]
    NoContext,
    /// BLOCK_STATUS of nothing: there is no extent to answer with.
    #[error("the status of zero bytes")]
    StatusOfNothing,
    /// A BLOCK_STATUS payload with a bad length, an unknown context or the same context twice.
    #[error("malformed list of metadata contexts")]
    BadStatusPayload,
    /// FAST_ZERO that could not be faster than writing.
    #[error("zeroing would not be fast")]
    NotFast,
    /// A new block, and the store is full.
    #[error("no space left in the store")]
    NoSpace,
    /// The device answered an error.
    #[error("the device failed")]
    Device,
    /// What was read does not match its checksum.
    #[error("a stored block does not match its checksum")]
    Corrupt,
    /// An earlier write or sync failed; the store refuses everything until it is reopened.
    #[error("the store stopped after a failed write")]
    Poisoned,
    /// The head may not write any more under its epoch, or another head has taken over.
    #[error("the volume's head lost its claim")]
    Fenced,
    /// No memory for the request.
    #[error("out of memory")]
    NoMemory,
    /// The daemon is draining, or the volume is being closed.
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl RequestError {
    /// The number that goes on the wire.
    pub fn errno(self) -> Errno {
        match self {
            RequestError::ReadOnly => Errno::Perm,
            RequestError::Device
            | RequestError::Corrupt
            | RequestError::Poisoned
            | RequestError::Fenced => Errno::Io,
            RequestError::NoMemory => Errno::NoMem,
            RequestError::UnknownCommand
            | RequestError::BadFlags
            | RequestError::UnexpectedPayload
            | RequestError::PastEnd
            | RequestError::TooLong
            | RequestError::FlushWithRange
            | RequestError::NoContext
            | RequestError::StatusOfNothing
            | RequestError::BadStatusPayload => Errno::Inval,
            RequestError::NoRoomPastEnd | RequestError::NoSpace => Errno::NoSpc,
            RequestError::CannotStayWhole => Errno::Overflow,
            RequestError::NotFast => Errno::NotSup,
            RequestError::ShuttingDown => Errno::Shutdown,
        }
    }

    /// The same as [`ToString`], without allocating; for error chunks, which carry text.
    pub fn text(self) -> &'static str {
        match self {
            RequestError::UnknownCommand => "unknown command",
            RequestError::BadFlags => "a flag that this command does not take",
            RequestError::UnexpectedPayload => "this command carries no payload",
            RequestError::ReadOnly => "the export is read-only",
            RequestError::PastEnd | RequestError::NoRoomPastEnd => "past the end of the export",
            RequestError::TooLong => "longer than the maximum payload",
            RequestError::CannotStayWhole => "too long for one chunk",
            RequestError::FlushWithRange => "flush takes no offset and no length",
            RequestError::NoContext => "no metadata context was negotiated",
            RequestError::StatusOfNothing => "the status of zero bytes",
            RequestError::BadStatusPayload => "malformed list of metadata contexts",
            RequestError::NotFast => "zeroing would not be fast",
            RequestError::NoSpace => "no space left in the store",
            RequestError::Device => "the device failed",
            RequestError::Corrupt => "a stored block does not match its checksum",
            RequestError::Poisoned => "the store stopped after a failed write",
            RequestError::Fenced => "the volume's head lost its claim",
            RequestError::NoMemory => "out of memory",
            RequestError::ShuttingDown => "the server is shutting down",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[(RequestError, u32)] = &[
        (RequestError::UnknownCommand, 22),
        (RequestError::BadFlags, 22),
        (RequestError::UnexpectedPayload, 22),
        (RequestError::ReadOnly, 1),
        (RequestError::PastEnd, 22),
        (RequestError::NoRoomPastEnd, 28),
        (RequestError::TooLong, 22),
        (RequestError::CannotStayWhole, 75),
        (RequestError::FlushWithRange, 22),
        (RequestError::NoContext, 22),
        (RequestError::StatusOfNothing, 22),
        (RequestError::BadStatusPayload, 22),
        (RequestError::NotFast, 95),
        (RequestError::NoSpace, 28),
        (RequestError::Device, 5),
        (RequestError::Corrupt, 5),
        (RequestError::Poisoned, 5),
        (RequestError::Fenced, 5),
        (RequestError::NoMemory, 12),
        (RequestError::ShuttingDown, 108),
    ];

    #[test]
    fn each_refusal_has_its_number_on_the_wire() {
        for &(error, number) in TABLE {
            assert_eq!(error.errno() as u32, number, "{error:?}");
            assert_eq!(error.text(), error.to_string(), "{error:?}");
        }
    }
}
