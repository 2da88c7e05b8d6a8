//! The Container Storage Interface over the controller's and the node's operations.
//!
//! Here and nowhere else messages are checked and turned into types that can be relied upon ([`convert`]), and refusals
//! into codes ([`status`]).

pub mod controller;
pub mod convert;
pub mod identity;
pub mod node;
pub mod server;

use std::time::Duration;

use tonic::metadata::MetadataMap;
use tonic::{Code, Status};

use crate::operations::Operations;
use crate::refusal::{Class, Refusal};

/// The driver's name.
pub const NAME: &str = "csi.ashlar.io";

/// Which version of the interface is advertised. The health calls of 1.13 are served either way; orchestrators and test
/// suites of 1.12 reject capabilities they do not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Spec {
    /// What present orchestrators speak.
    #[default]
    #[value(name = "1.12")]
    V1_12,
    /// With volume and storage health.
    #[value(name = "1.13")]
    V1_13,
}

/// The code of a refusal.
pub fn code(class: Class) -> Code {
    match class {
        Class::InvalidArgument => Code::InvalidArgument,
        Class::NotFound => Code::NotFound,
        Class::AlreadyExists => Code::AlreadyExists,
        Class::FailedPrecondition => Code::FailedPrecondition,
        Class::ResourceExhausted => Code::ResourceExhausted,
        Class::OutOfRange => Code::OutOfRange,
        Class::Aborted => Code::Aborted,
        Class::Unavailable => Code::Unavailable,
        Class::DeadlineExceeded => Code::DeadlineExceeded,
        Class::PermissionDenied => Code::PermissionDenied,
        Class::Unimplemented => Code::Unimplemented,
        Class::Internal => Code::Internal,
    }
}

/// A refusal as it is answered: a code and words, no details.
pub fn status(refusal: Refusal) -> Status {
    Status::new(code(refusal.class), refusal.message)
}

/// Carries an operation out to its end, under the turn for `key`.
async fn carry_out<T: Send + 'static>(
    turns: &Operations,
    key: &str,
    waits: Option<Duration>,
    work: impl Future<Output = Result<T, Refusal>> + Send + 'static,
) -> Result<T, Status> {
    turns.carry_out(key, waits, work).await.map_err(status)
}

/// Kept back from a caller's deadline, so that our answer arrives before it.
const MARGIN: Duration = Duration::from_millis(200);

/// How long a caller waits, by its `grpc-timeout` header: at most eight digits and a unit.
pub fn patience(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    let patience = match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    };
    Some(patience.saturating_sub(MARGIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_its_code() {
        let table = [
            (Class::InvalidArgument, 3),
            (Class::DeadlineExceeded, 4),
            (Class::NotFound, 5),
            (Class::AlreadyExists, 6),
            (Class::PermissionDenied, 7),
            (Class::ResourceExhausted, 8),
            (Class::FailedPrecondition, 9),
            (Class::Aborted, 10),
            (Class::OutOfRange, 11),
            (Class::Unimplemented, 12),
            (Class::Internal, 13),
            (Class::Unavailable, 14),
        ];
        for (class, number) in table {
            let status = status(Refusal::new(class, "why"));
            assert_eq!(i32::from(status.code()), number, "{class:?}");
            assert_eq!((status.message(), status.details().len()), ("why", 0));
        }
    }

    #[test]
    fn deadlines_are_read() {
        let of = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().expect("a header"));
            patience(&metadata)
        };
        assert_eq!(of("2M"), Some(Duration::from_secs(120) - MARGIN));
        assert_eq!(
            of("99999999u"),
            Some(Duration::from_micros(99_999_999) - MARGIN)
        );
        assert_eq!(of("1n"), Some(Duration::ZERO));
        for odd in ["", "S", "1", "5x", "123456789S", "-1S"] {
            assert_eq!(of(odd), None, "{odd}");
        }
    }
}
