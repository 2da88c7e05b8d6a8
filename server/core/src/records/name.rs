//! What a volume may be called.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

/// Longest name, in bytes: a DNS label's, so that a name fits wherever an orchestrator's names do.
pub const NAME_MAX_BYTES: usize = 63;

/// A checked volume name: 1 to 63 of `a-z 0-9 . _ -`, beginning and ending with a letter or digit, and not readable
/// as a UUID (an export is asked for by name or by id, and the two must not be mistaken for one another).
///
/// A name is a key in the metadata store and a label in metrics; it is never made into a path.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeName(String);

/// Why a name is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NameError {
    /// The empty name.
    #[error("a volume name must not be empty")]
    Empty,
    /// More than [`NAME_MAX_BYTES`].
    #[error("a volume name has at most {NAME_MAX_BYTES} characters, this one has {length_bytes}")]
    TooLong {
        /// Bytes in the refused name.
        length_bytes: usize,
    },
    /// A character outside the set.
    #[error(
        "{character:?} is not allowed in a volume name: use lower-case letters, digits, '.', '_' and '-', for example \"database-1\""
    )]
    Character {
        /// The first character that is not allowed.
        character: char,
    },
    /// Begins or ends with punctuation.
    #[error("a volume name begins and ends with a lower-case letter or a digit")]
    Edge,
    /// Would be read as an id.
    #[error("a volume name must not look like a UUID, because volumes are also found by their id")]
    LooksLikeId,
}

impl VolumeName {
    /// Checks `name`.
    pub fn parse(name: &str) -> Result<VolumeName, NameError> {
        if name.is_empty() {
            return Err(NameError::Empty);
        }
        if name.len() > NAME_MAX_BYTES {
            return Err(NameError::TooLong {
                length_bytes: name.len(),
            });
        }
        if let Some(character) = name
            .chars()
            .find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '.' | '_' | '-'))
        {
            return Err(NameError::Character { character });
        }
        let edge = |byte: &u8| byte.is_ascii_alphanumeric();
        if !name.as_bytes().first().is_some_and(edge) || !name.as_bytes().last().is_some_and(edge) {
            return Err(NameError::Edge);
        }
        if Uuid::try_parse(name).is_ok() {
            return Err(NameError::LooksLikeId);
        }
        Ok(VolumeName(name.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for VolumeName {
    type Error = NameError;

    fn try_from(name: String) -> Result<VolumeName, NameError> {
        VolumeName::parse(&name)
    }
}

impl From<VolumeName> for String {
    fn from(name: VolumeName) -> String {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::*;

    #[test]
    fn accepts_what_people_and_orchestrators_use() {
        let long = "x".repeat(NAME_MAX_BYTES);
        for name in [
            "a",
            "0",
            "database-1",
            "pvc-6f1d4a0e-30c5-4d8b-8d4f-52a1f64f0c11",
            "a.b_c-d",
            &long,
        ] {
            assert_eq!(VolumeName::parse(name).expect(name).as_str(), name);
        }
    }

    #[test]
    fn refuses_with_the_reason() {
        let long = "x".repeat(NAME_MAX_BYTES + 1);
        let cases = [
            ("", NameError::Empty),
            (&long, NameError::TooLong { length_bytes: 64 }),
            ("Data", NameError::Character { character: 'D' }),
            ("a b", NameError::Character { character: ' ' }),
            ("../etc", NameError::Character { character: '/' }),
            ("a\0b", NameError::Character { character: '\0' }),
            ("é", NameError::Character { character: 'é' }),
            ("-a", NameError::Edge),
            ("a.", NameError::Edge),
            ("..", NameError::Edge),
            (
                "6f1d4a0e-30c5-4d8b-8d4f-52a1f64f0c11",
                NameError::LooksLikeId,
            ),
            ("6f1d4a0e30c54d8b8d4f52a1f64f0c11", NameError::LooksLikeId),
        ];
        for (name, error) in cases {
            assert_eq!(VolumeName::parse(name), Err(error), "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn never_panics_and_never_lets_a_separator_through(name in any::<String>()) {
            if let Ok(name) = VolumeName::parse(&name) {
                assert!(!name.as_str().contains(['/', '\0', ' ', '\n', '"', '\\']));
                assert!(name.as_str() != "." && name.as_str() != "..");
            }
        }
    }
}
