//! Amounts of bytes as people write them.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// An amount of bytes.
///
/// Plain digits are bytes. `K M G T P` and `KiB MiB GiB TiB PiB` (or `Ki Mi …`) are powers of 1024, `KB MB GB TB PB`
/// powers of 1000: the reading of truncate(1) and of qemu-img. Upper and lower case are the same. A decimal fraction is
/// allowed where it makes a whole number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteCount(pub u64);

/// Why a text is no amount of bytes.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ByteCountError {
    /// No number, or something around it.
    #[error("an amount of bytes looks like 10GiB, 512M or 1.5TiB, or is a plain number")]
    NotAnAmount,
    /// What follows the number.
    #[error(
        "{0:?} is not a unit: use K, M, G, T or P (powers of 1024, also KiB, MiB, …) or KB, MB, … (powers of 1000)"
    )]
    UnknownUnit(String),
    /// A fraction of a byte would be left.
    #[error("that is not a whole number of bytes, or has more than 15 decimal places")]
    NotWhole,
    /// Past 2^64.
    #[error("that is more bytes than 64 bits can count")]
    TooLarge,
}

/// Units from the largest to the smallest, so that printing takes the first that divides.
const BINARY: [(&str, u64); 5] = [
    ("PiB", 1 << 50),
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
];

impl FromStr for ByteCount {
    type Err = ByteCountError;

    fn from_str(text: &str) -> Result<ByteCount, ByteCountError> {
        let text = text.trim();
        let digits_end = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(digits_end);
        let unit = unit_bytes(unit.trim_start())?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let fraction = fraction.trim_end_matches('0');
        if whole.is_empty() || fraction.contains('.') || number.ends_with('.') {
            return Err(ByteCountError::NotAnAmount);
        }
        let whole: u128 = whole.parse().map_err(|_| ByteCountError::TooLarge)?;
        let mut bytes = whole.checked_mul(unit).ok_or(ByteCountError::TooLarge)?;
        if !fraction.is_empty() {
            // 15 places stay below 2^50, so a fraction times the largest unit, 2^50, stays below 2^100.
            if fraction.len() > 15 {
                return Err(ByteCountError::NotWhole);
            }
            let scale = 10u128.pow(fraction.len() as u32);
            let part: u128 = fraction.parse().map_err(|_| ByteCountError::NotAnAmount)?;
            let scaled = part * unit;
            if !scaled.is_multiple_of(scale) {
                return Err(ByteCountError::NotWhole);
            }
            bytes = bytes
                .checked_add(scaled / scale)
                .ok_or(ByteCountError::TooLarge)?;
        }
        u64::try_from(bytes)
            .map(ByteCount)
            .map_err(|_| ByteCountError::TooLarge)
    }
}

/// Bytes in a unit; the empty unit is a byte.
fn unit_bytes(unit: &str) -> Result<u128, ByteCountError> {
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
            (None, None) => return Err(ByteCountError::UnknownUnit(unit.to_owned())),
        },
    };
    let power = match prefix {
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return Err(ByteCountError::UnknownUnit(unit.to_owned())),
    };
    Ok(base.pow(power))
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match BINARY
            .iter()
            .find(|(_, factor)| self.0 >= *factor && self.0.is_multiple_of(*factor))
        {
            Some((unit, factor)) => write!(f, "{}{unit}", self.0 / factor),
            None => self.0.fmt(f),
        }
    }
}

impl Serialize for ByteCount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ByteCount, D::Error> {
        struct TextOrNumber;

        impl Visitor<'_> for TextOrNumber {
            type Value = ByteCount;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an amount of bytes such as \"256MiB\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteCount, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<ByteCount, E> {
                u64::try_from(number)
                    .map(ByteCount)
                    .map_err(|_| E::custom("an amount of bytes is not negative"))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<ByteCount, E> {
                Ok(ByteCount(number))
            }
        }

        deserializer.deserialize_any(TextOrNumber)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

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
            assert_eq!(text.parse(), Ok(ByteCount(*bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_told_why() {
        let unit = |u: &str| ByteCountError::UnknownUnit(u.into());
        let cases: &[(&str, ByteCountError)] = &[
            ("", ByteCountError::NotAnAmount),
            ("G", ByteCountError::NotAnAmount),
            (".5G", ByteCountError::NotAnAmount),
            ("1.", ByteCountError::NotAnAmount),
            ("1..5G", ByteCountError::NotAnAmount),
            ("1.2.3", ByteCountError::NotAnAmount),
            ("-1", unit("-1")),
            ("10X", unit("X")),
            ("10Gbit", unit("Gbit")),
            ("10iB", unit("iB")),
            ("1.5", ByteCountError::NotWhole),
            ("0.0001K", ByteCountError::NotWhole),
            (
                "0.3333333333333333333333333333333333333P",
                ByteCountError::NotWhole,
            ),
            ("18446744073709551616", ByteCountError::TooLarge),
            (
                "999999999999999999999999999999999999999999",
                ByteCountError::TooLarge,
            ),
            ("16384P", ByteCountError::TooLarge),
        ];
        for (text, error) in cases {
            assert_eq!(text.parse::<ByteCount>(), Err(error.clone()), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(bytes in any::<u64>(), shift in 0..50u32) {
            for bytes in [bytes, bytes >> shift << shift] {
                assert_eq!(ByteCount(bytes).to_string().parse(), Ok(ByteCount(bytes)));
            }
        }

        #[test]
        fn parsing_never_panics(text in any::<String>()) {
            let _ = text.parse::<ByteCount>();
        }
    }
}
