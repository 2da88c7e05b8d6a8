//! What others keep with a volume.
//!
//! In a record of its own, because it may be large and the volume's record is rewritten at every claim.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Record, Transaction, Versioned, keys};
use crate::units::VolumeId;

/// Most bytes of a volume's annotations, keys and values together.
pub const ANNOTATIONS_MAX_BYTES: usize = 16 << 10;
/// Longest key of an annotation, in bytes.
const ANNOTATION_KEY_MAX_BYTES: usize = 128;

/// Annotations within their bounds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Annotations(BTreeMap<String, String>);

/// Annotations that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AnnotationsError {
    /// Too much of them.
    #[error("annotations have at most {ANNOTATIONS_MAX_BYTES} bytes in all, not {0}")]
    TooLarge(usize),
    /// A key that cannot be.
    #[error(
        "an annotation's key has 1 to {ANNOTATION_KEY_MAX_BYTES} bytes and no control characters"
    )]
    Key,
}

impl Annotations {
    /// Checks them.
    pub fn check(entries: BTreeMap<String, String>) -> Result<Annotations, AnnotationsError> {
        let bytes = entries.iter().map(|(k, v)| k.len() + v.len()).sum();
        if bytes > ANNOTATIONS_MAX_BYTES {
            return Err(AnnotationsError::TooLarge(bytes));
        }
        let good = |key: &String| {
            (1..=ANNOTATION_KEY_MAX_BYTES).contains(&key.len())
                && !key.chars().any(char::is_control)
        };
        if !entries.keys().all(good) {
            return Err(AnnotationsError::Key);
        }
        Ok(Annotations(entries))
    }
}

/// The annotations of a volume. A volume without this record has none and revision 0.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnnotationsRecord {
    /// One more for each change.
    pub revision: u64,
    /// All of them.
    pub entries: BTreeMap<String, String>,
}

impl Record for AnnotationsRecord {}

/// The annotations a volume is created with, as a step of its creation. `None`: there are none.
pub fn first_annotations(
    id: VolumeId,
    annotations: &Annotations,
) -> Option<(AnnotationsRecord, Transaction)> {
    if annotations.0.is_empty() {
        return None;
    }
    let record = AnnotationsRecord {
        revision: 1,
        entries: annotations.0.clone(),
    };
    let key = keys::annotations(id);
    let transaction = Transaction::new()
        .when_absent(key.clone())
        .put(key, record.encode());
    Some((record, transaction))
}

/// They were changed by somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the annotations are at revision {now}, not {expected}: read them again")]
pub struct AnnotationsMoved {
    /// What the caller had read.
    pub expected: u64,
    /// What they are at.
    pub now: u64,
}

/// Decides a change of all annotations. To be carried out with a condition on the volume's own record, so that a
/// deleted volume gets none.
pub fn annotate(
    id: VolumeId,
    current: Option<&Versioned<AnnotationsRecord>>,
    expected_revision: u64,
    annotations: &Annotations,
) -> Result<(AnnotationsRecord, Transaction), AnnotationsMoved> {
    let now = current.map_or(0, |current| current.record.revision);
    if now != expected_revision {
        return Err(AnnotationsMoved {
            expected: expected_revision,
            now,
        });
    }
    let record = AnnotationsRecord {
        revision: now + 1,
        entries: annotations.0.clone(),
    };
    let key = keys::annotations(id);
    let transaction = match current {
        Some(current) => Transaction::new().when_unchanged(key.clone(), current.changed_at),
        None => Transaction::new().when_absent(key.clone()),
    };
    let transaction = transaction.put(key, record.encode());
    Ok((record, transaction))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::Revision;

    fn entries(key: &str, value: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(key.to_owned(), value.to_owned())])
    }

    #[test]
    fn they_are_bounded() {
        assert!(Annotations::check(entries("k", &"v".repeat(ANNOTATIONS_MAX_BYTES - 1))).is_ok());
        assert_eq!(
            Annotations::check(entries("k", &"v".repeat(ANNOTATIONS_MAX_BYTES))),
            Err(AnnotationsError::TooLarge(ANNOTATIONS_MAX_BYTES + 1))
        );
        for key in ["", "a\tb", &"k".repeat(129)] {
            assert_eq!(
                Annotations::check(entries(key, "v")),
                Err(AnnotationsError::Key)
            );
        }
    }

    #[test]
    fn one_of_two_writers_loses() {
        let id = VolumeId(uuid::Uuid::from_u128(1));
        let set = |text| Annotations::check(entries("k", text)).expect("small");
        assert_eq!(first_annotations(id, &Annotations::default()), None);
        let (first, _) = annotate(id, None, 0, &set("a")).expect("first");
        assert_eq!(first.revision, 1);
        let stored = Versioned {
            record: AnnotationsRecord::decode("k", &first.encode()).expect("decodes"),
            changed_at: Revision(5),
        };
        let (second, _) = annotate(id, Some(&stored), 1, &set("b")).expect("second");
        assert_eq!((second.revision, &second.entries["k"][..]), (2, "b"));
        assert_eq!(
            annotate(id, Some(&stored), 0, &set("c")),
            Err(AnnotationsMoved {
                expected: 0,
                now: 1
            })
        );
    }
}
