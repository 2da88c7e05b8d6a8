//! How often something is done by itself, as people write it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// How often something is done by itself: `7d`, `12h`, `30m`, `90s`, or `off`, which may also be written `0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Every {
    /// Never.
    Off,
    /// Whole seconds, at least one.
    Interval(Duration),
}

/// A text that says nothing of that kind.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{text:?} does not say how often: write 7d, 12h, 30m or 90s (at most 3650d), or off")]
pub struct EveryError {
    text: String,
}

/// Units from the largest to the smallest, so that printing takes the first that divides.
const UNITS: [(char, u64); 4] = [('d', 86_400), ('h', 3600), ('m', 60), ('s', 1)];
/// Ten years: more is a slip of the keyboard, and `off` says it better.
const SECONDS_MAX: u64 = 3650 * 86_400;

impl Every {
    /// So many days.
    pub const fn days(days: u64) -> Every {
        Every::Interval(Duration::from_secs(days * 86_400))
    }

    /// `None`: never.
    pub fn interval(self) -> Option<Duration> {
        match self {
            Every::Off => None,
            Every::Interval(interval) => Some(interval),
        }
    }
}

impl FromStr for Every {
    type Err = EveryError;

    fn from_str(text: &str) -> Result<Every, EveryError> {
        let trimmed = text.trim();
        let refused = || EveryError {
            text: text.to_owned(),
        };
        if trimmed == "off" {
            return Ok(Every::Off);
        }
        let with_unit = UNITS.iter().find_map(|(unit, factor)| {
            let number = trimmed.strip_suffix(*unit)?;
            Some((number.trim_end(), Some(*factor)))
        });
        let (number, factor) = with_unit.unwrap_or((trimmed, None));
        if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(refused());
        }
        let number: u64 = number.parse().map_err(|_| refused())?;
        match (number, factor) {
            (0, _) => Ok(Every::Off),
            // A number alone could be anything.
            (_, None) => Err(refused()),
            (_, Some(factor)) => match number.checked_mul(factor) {
                Some(seconds) if seconds <= SECONDS_MAX => {
                    Ok(Every::Interval(Duration::from_secs(seconds)))
                }
                _ => Err(refused()),
            },
        }
    }
}

impl fmt::Display for Every {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Every::Interval(interval) = self else {
            return f.write_str("off");
        };
        let seconds = interval.as_secs();
        let divides = |(_, factor): &&(char, u64)| seconds.is_multiple_of(*factor);
        match UNITS.iter().find(divides) {
            Some((unit, factor)) => write!(f, "{}{unit}", seconds / factor),
            None => write!(f, "{seconds}s"),
        }
    }
}

impl Serialize for Every {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Every {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Every, D::Error> {
        /// A file may say `0` without quotes.
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Said {
            Number(u64),
            Text(String),
        }
        let text = match Said::deserialize(deserializer)? {
            Said::Number(number) => number.to_string(),
            Said::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_printed() {
        for (text, seconds, printed) in [
            ("7d", 604_800, "7d"),
            ("168h", 604_800, "7d"),
            (" 12h ", 43_200, "12h"),
            ("90m", 5400, "90m"),
            ("1 s", 1, "1s"),
        ] {
            let every: Every = text.parse().expect(text);
            assert_eq!(every.interval(), Some(Duration::from_secs(seconds)));
            assert_eq!(every.to_string(), printed);
            assert_eq!(printed.parse(), Ok(every));
        }
        for text in ["off", "0", "0d"] {
            assert_eq!(text.parse(), Ok(Every::Off), "{text}");
        }
        assert_eq!(Every::Off.to_string(), "off");
        assert_eq!(Every::days(7).to_string(), "7d");
    }

    #[test]
    fn what_says_nothing_is_refused() {
        let huge = format!("{}d", u64::MAX);
        for text in [
            "", "7", "d", "-1d", "1.5d", "7 days", "weekly", "4000d", &huge, "7dd",
        ] {
            assert!(text.parse::<Every>().is_err(), "{text:?}");
        }
    }
}
