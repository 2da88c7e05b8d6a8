//! Sizes as people write and read them.

use std::fmt;

use bytesize::ByteSize;

/// A size given on the command line, in bytes.
///
/// Plain digits are bytes. `K M G T P` and `KiB MiB GiB TiB PiB` (or `Ki Mi …`) are powers of 1024, `KB MB GB TB PB`
/// powers of 1000: the reading of truncate(1) and of qemu-img, so that `10G` means the same everywhere. Upper and lower
/// case are the same. A decimal fraction is allowed where it makes a whole number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size(pub(super) u64);

/// Why a size was not understood; reads well after "invalid value …:".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SizeParseError {
    #[error("a size looks like 10GiB, 512M or 1.5TiB, or is a plain number of bytes")]
    NotASize,
    #[error(
        "{0:?} is not a unit: use K, M, G, T or P (powers of 1024, also KiB, MiB, …) or KB, MB, … (powers of 1000)"
    )]
    UnknownUnit(String),
    #[error("that is not a whole number of bytes, or has more than 15 decimal places")]
    NotWhole,
    #[error("that is more bytes than 64 bits can count")]
    TooLarge,
}

impl std::str::FromStr for Size {
    type Err = SizeParseError;

    fn from_str(text: &str) -> Result<Size, SizeParseError> {
        let text = text.trim();
        let digits_end = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(digits_end);
        let unit = unit_bytes(unit.trim_start())?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let fraction = fraction.trim_end_matches('0');
        if whole.is_empty() || fraction.contains('.') || number.ends_with('.') {
            return Err(SizeParseError::NotASize);
        }
        let whole: u128 = whole.parse().map_err(|_| SizeParseError::TooLarge)?;
        let mut bytes = whole.checked_mul(unit).ok_or(SizeParseError::TooLarge)?;
        if !fraction.is_empty() {
            // 15 places stay below 2^50, so a fraction times the largest unit, 2^50, stays below 2^100.
            if fraction.len() > 15 {
                return Err(SizeParseError::NotWhole);
            }
            let scale = 10u128.pow(fraction.len() as u32);
            let part: u128 = fraction.parse().map_err(|_| SizeParseError::NotASize)?;
            let scaled = part * unit;
            if !scaled.is_multiple_of(scale) {
                return Err(SizeParseError::NotWhole);
            }
            bytes = bytes
                .checked_add(scaled / scale)
                .ok_or(SizeParseError::TooLarge)?;
        }
        u64::try_from(bytes)
            .map(Size)
            .map_err(|_| SizeParseError::TooLarge)
    }
}

/// Bytes in a unit; the empty unit is a byte.
fn unit_bytes(unit: &str) -> Result<u128, SizeParseError> {
    let lower = unit.to_ascii_lowercase();
    let (prefix, base): (&str, u128) = match lower.as_str() {
        "" | "b" => return Ok(1),
        "k" | "m" | "g" | "t" | "p" => (&lower, 1024),
        _ => match (
            lower.strip_suffix("ib").or(lower.strip_suffix('i')),
            lower.strip_suffix('b'),
        ) {
            (Some(prefix), _) => (prefix, 1024),
            (None, Some(prefix)) => (prefix, 1000),
            (None, None) => return Err(SizeParseError::UnknownUnit(unit.to_owned())),
        },
    };
    let power = match prefix {
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return Err(SizeParseError::UnknownUnit(unit.to_owned())),
    };
    Ok(base.pow(power))
}

/// A new size of a volume: absolute, or more than it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NewSize {
    /// `20GiB`
    Absolute(Size),
    /// `+10GiB`
    More(Size),
}

impl std::str::FromStr for NewSize {
    type Err = SizeParseError;

    fn from_str(text: &str) -> Result<NewSize, SizeParseError> {
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
    use proptest::prelude::{any, prop_assert_eq, proptest};

    use super::*;

    #[test]
    fn sizes_are_read() {
        let cases: &[(&str, u64)] = &[
            ("0", 0),
            ("1", 1),
            ("4096", 4096),
            ("4096B", 4096),
            ("1k", 1024),
            ("1K", 1024),
            ("1KiB", 1024),
            ("1kib", 1024),
            ("1Ki", 1024),
            ("1KB", 1000),
            ("1kB", 1000),
            ("10G", 10 << 30),
            ("10GiB", 10 << 30),
            ("10 GiB", 10 << 30),
            ("10GB", 10_000_000_000),
            ("1.5GiB", 3 << 29),
            ("0.5T", 1 << 39),
            ("1.50M", 3 << 19),
            ("1.000", 1),
            ("2P", 2 << 50),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, bytes) in cases {
            assert_eq!(text.parse(), Ok(Size(*bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_told_why() {
        let unit = |u: &str| SizeParseError::UnknownUnit(u.into());
        let cases: &[(&str, SizeParseError)] = &[
            ("", SizeParseError::NotASize),
            ("G", SizeParseError::NotASize),
            (".5G", SizeParseError::NotASize),
            ("1.", SizeParseError::NotASize),
            ("1..5G", SizeParseError::NotASize),
            ("1.2.3", SizeParseError::NotASize),
            ("-1", unit("-1")),
            ("10X", unit("X")),
            ("10Gbit", unit("Gbit")),
            ("10iB", unit("iB")),
            ("1.5", SizeParseError::NotWhole),
            ("0.0001K", SizeParseError::NotWhole),
            (
                "0.3333333333333333333333333333333333333P",
                SizeParseError::NotWhole,
            ),
            ("18446744073709551616", SizeParseError::TooLarge),
            (
                "999999999999999999999999999999999999999999",
                SizeParseError::TooLarge,
            ),
            ("16384P", SizeParseError::TooLarge),
        ];
        for (text, error) in cases {
            assert_eq!(text.parse::<Size>(), Err(error.clone()), "{text}");
        }
    }

    #[test]
    fn a_new_size_may_be_relative() {
        assert_eq!("20G".parse(), Ok(NewSize::Absolute(Size(20 << 30))));
        assert_eq!("+1G".parse(), Ok(NewSize::More(Size(1 << 30))));
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

    proptest! {
        #[test]
        fn any_text_is_refused_or_read(text in any::<String>()) {
            let _ = text.parse::<NewSize>();
        }

        #[test]
        fn plain_bytes_are_themselves(bytes in any::<u64>()) {
            prop_assert_eq!(bytes.to_string().parse(), Ok(Size(bytes)));
        }
    }
}
