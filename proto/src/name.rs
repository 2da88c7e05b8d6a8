//! What a volume may be called.

use std::fmt;

/// Longest name of a volume, in bytes. An NBD export name may have 4096, but a name is also a label in metrics, a
/// part of a URI and, cut to 63 by Kubernetes, of a Kubernetes object; 128 is more than any of them needs.
pub const NAME_BYTES_MAX: usize = 128;

/// Why a name was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameError {
    /// It has no characters.
    Empty,
    /// It has more than [`NAME_BYTES_MAX`] bytes.
    TooLong {
        /// How many it has.
        len_bytes: usize,
    },
    /// Its first character is neither a letter nor a digit.
    BadStart(char),
    /// It holds a character other than an ASCII letter or digit, `-`, `_` and `.`.
    BadCharacter(char),
    /// It has the form of a UUID, so it could be taken for an id.
    LooksLikeId,
}

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NameError::Empty => write!(f, "a name must not be empty"),
            NameError::TooLong { len_bytes } => {
                write!(
                    f,
                    "a name has at most {NAME_BYTES_MAX} characters, this one has {len_bytes}"
                )
            }
            NameError::BadStart(c) => {
                write!(f, "a name starts with a letter or a digit, not with {c:?}")
            }
            NameError::BadCharacter(c) => {
                write!(
                    f,
                    "a name is made of ASCII letters, digits, '-', '_' and '.'; {c:?} is none of them"
                )
            }
            NameError::LooksLikeId => write!(
                f,
                "a name must not have the form of a UUID: it could be taken for an id"
            ),
        }
    }
}

impl std::error::Error for NameError {}

/// Checks a volume's name against the rules in `CreateVolumeRequest.name`.
pub fn check(name: &str) -> Result<(), NameError> {
    let first = name.chars().next().ok_or(NameError::Empty)?;
    if name.len() > NAME_BYTES_MAX {
        return Err(NameError::TooLong {
            len_bytes: name.len(),
        });
    }
    if !first.is_ascii_alphanumeric() {
        return Err(NameError::BadStart(first));
    }
    if let Some(bad) = name
        .chars()
        .find(|c| !c.is_ascii_alphanumeric() && !matches!(c, '-' | '_' | '.'))
    {
        return Err(NameError::BadCharacter(bad));
    }
    if uuid::Uuid::try_parse(name).is_ok() {
        return Err(NameError::LooksLikeId);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        let longest = "x".repeat(NAME_BYTES_MAX);
        let too_long = "x".repeat(NAME_BYTES_MAX + 1);
        let cases: &[(&str, Result<(), NameError>)] = &[
            ("a", Ok(())),
            ("0", Ok(())),
            ("pvc-1.data_2", Ok(())),
            (&longest, Ok(())),
            (&too_long, Err(NameError::TooLong { len_bytes: 129 })),
            ("", Err(NameError::Empty)),
            ("-a", Err(NameError::BadStart('-'))),
            (".hidden", Err(NameError::BadStart('.'))),
            ("a/b", Err(NameError::BadCharacter('/'))),
            ("a b", Err(NameError::BadCharacter(' '))),
            ("a\0", Err(NameError::BadCharacter('\0'))),
            ("größe", Err(NameError::BadCharacter('ö'))),
            (
                "67e55044-10b1-426f-9247-bb680e5fe0c8",
                Err(NameError::LooksLikeId),
            ),
            (
                "67e5504410b1426f9247bb680e5fe0c8",
                Err(NameError::LooksLikeId),
            ),
            ("67e55044-10b1-426f-9247-bb680e5fe0c", Ok(())),
        ];
        for (name, expected) in cases {
            assert_eq!(check(name), *expected, "{name:?}");
        }
    }
}
