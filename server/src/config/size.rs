//! Amounts of bytes as people write them.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// An amount of bytes, written `4096`, `64KiB`, `1.5GiB` or `10GB` (powers of 1000).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteCount(pub u64);

/// Text that is no amount of bytes.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{text:?} is not an amount of bytes: write a number with a unit, such as 256MiB or 10GiB")]
pub struct ByteCountError {
    text: String,
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
        // bytesize calls a lone letter a power of 1000 in some versions and of 1024 in others; refuse what is unclear.
        let wrong = || ByteCountError {
            text: text.to_owned(),
        };
        let trimmed = text.trim();
        let unit_at = trimmed
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(unit_at);
        let factor = match unit.trim_start().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kib" | "k" => 1 << 10,
            "mib" | "m" => 1 << 20,
            "gib" | "g" => 1 << 30,
            "tib" | "t" => 1 << 40,
            "pib" | "p" => 1 << 50,
            "kb" => 1000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            "pb" => 1_000_000_000_000_000,
            _ => return Err(wrong()),
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(factor).map(ByteCount).ok_or_else(wrong);
        }
        let (whole, fraction) = number.split_once('.').ok_or_else(wrong)?;
        let is_digits = |text: &str| {
            !text.is_empty() && text.len() <= 6 && text.bytes().all(|b| b.is_ascii_digit())
        };
        if factor == 1 || !is_digits(fraction) || !whole.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        let whole: u64 = whole.parse().map_err(|_| wrong())?;
        let numerator: u64 = fraction.parse().map_err(|_| wrong())?;
        // At most 10^6 * 2^50, which fits; the remainder of a byte is dropped.
        let part = u128::from(numerator) * u128::from(factor) / 10u128.pow(fraction.len() as u32);
        let total = u128::from(whole) * u128::from(factor) + part;
        u64::try_from(total).map(ByteCount).map_err(|_| wrong())
    }
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
    fn sizes_mean_what_people_mean() {
        let cases = [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("64KiB", 65536),
            ("1 GiB", 1 << 30),
            ("1.5GiB", 3 << 29),
            ("10GB", 10_000_000_000),
            ("2t", 2 << 40),
            ("0.5 mib", 1 << 19),
        ];
        for (text, bytes) in cases {
            assert_eq!(text.parse(), Ok(ByteCount(bytes)), "{text}");
        }
        for text in [
            "",
            "GiB",
            "-1",
            "1.GiB",
            ".5GiB",
            "1.5",
            "1e3",
            "1XB",
            "1GiB2",
            "99999999999PiB",
            "١",
        ] {
            assert!(text.parse::<ByteCount>().is_err(), "{text}");
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
