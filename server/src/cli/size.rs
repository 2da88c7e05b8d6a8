//! Sizes as people write and read them.

use std::fmt;

use bytesize::ByteSize;

use crate::config::{ByteCount, ByteCountError};

/// A new size of a volume: absolute, or more than it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NewSize {
    /// `20GiB`
    Absolute(ByteCount),
    /// `+10GiB`
    More(ByteCount),
}

impl std::str::FromStr for NewSize {
    type Err = ByteCountError;

    fn from_str(text: &str) -> Result<NewSize, ByteCountError> {
        match text.trim().strip_prefix('+') {
            Some(more) => more.parse().map(NewSize::More),
            None => text.parse().map(NewSize::Absolute),
        }
    }
}

/// Bytes for a table: `10 GiB`, `1.5 MiB`, `512 B`. At most one decimal place, and none where it would be zero.
pub(super) fn human(bytes: u64) -> String {
    ByteSize::b(bytes)
        .display()
        .iec()
        .to_string()
        .replacen(".0 ", " ", 1)
}

/// Bytes exactly and for reading: `10737418240 bytes (10 GiB)`.
pub(super) struct Exact(pub(super) u64);

impl fmt::Display for Exact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0)?;
        if self.0 >= 1024 {
            write!(f, " ({})", human(self.0))
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_size_may_be_relative() {
        assert_eq!("20G".parse(), Ok(NewSize::Absolute(ByteCount(20 << 30))));
        assert_eq!("+1G".parse(), Ok(NewSize::More(ByteCount(1 << 30))));
        assert!("++1G".parse::<NewSize>().is_err());
    }

    #[test]
    fn sizes_are_written() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(512), "512 B");
        assert_eq!(human(10 << 30), "10 GiB");
        assert_eq!(human(3 << 29), "1.5 GiB");
        assert_eq!(Exact(10 << 30).to_string(), "10737418240 bytes (10 GiB)");
        assert_eq!(Exact(12).to_string(), "12 bytes");
    }
}
