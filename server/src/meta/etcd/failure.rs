//! What an error of etcd's means for the change that was asked for.
//!
//! Only three kinds of errors say that a transaction did not happen: it was never sent, a member refused it before
//! proposing it to the others, or it was not valid. Everything else leaves it open: a time-out, a connection that broke,
//! a member that lost its leader while the proposal was on its way. One is easily taken for a refusal and is none: when
//! etcd's space runs out while a transaction is applied, it is applied *and* answered with "database space exceeded".

use std::error::Error as _;

use ashlar_core::records::Revision;
use tonic::{Code, Status};

use crate::meta::MetadataError;

/// Why a request to etcd failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// It was not carried out and will not be.
    NotDone { reason: String },
    /// It may have been carried out, or may be later.
    Unsure { reason: String },
    /// The revision asked for is not kept any more.
    Compacted,
    /// The revision asked for has not been reached.
    Future,
    /// etcd does not take it, and never will.
    Invalid { reason: String },
}

impl Failure {
    /// Judges what a member, or the connection to it, answered.
    pub(super) fn from_status(member: &str, status: &Status) -> Failure {
        let reason = format!("etcd at {member}: {}", told(status));
        if never_sent(status) {
            return Failure::NotDone { reason };
        }
        let message = status.message();
        match status.code() {
            Code::OutOfRange if message.contains("compacted") => Failure::Compacted,
            Code::OutOfRange if message.contains("future revision") => Failure::Future,
            Code::InvalidArgument => Failure::Invalid { reason },
            // Answered by interceptors and checks that come before the proposal.
            Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented => {
                Failure::NotDone { reason }
            }
            Code::Unavailable if message == "etcdserver: no leader" => Failure::NotDone { reason },
            Code::ResourceExhausted if message == "etcdserver: too many requests" => {
                Failure::NotDone { reason }
            }
            _ => Failure::Unsure { reason },
        }
    }

    /// Whether another member, or the same one later, may do better.
    pub(super) fn may_pass(&self) -> bool {
        matches!(self, Failure::NotDone { .. } | Failure::Unsure { .. })
    }

    /// As the outcome of a request that changes nothing.
    pub(super) fn of_a_read(self) -> MetadataError {
        match self {
            Failure::NotDone { reason } | Failure::Unsure { reason } => {
                MetadataError::Unavailable { reason }
            }
            Failure::Compacted => MetadataError::Compacted {
                oldest: Revision(0),
            },
            Failure::Future => MetadataError::Invalid {
                reason: "that revision is in the future".to_owned(),
            },
            Failure::Invalid { reason } => MetadataError::Invalid { reason },
        }
    }

    /// As the outcome of a transaction.
    pub(super) fn of_a_change(self) -> MetadataError {
        match self {
            Failure::Unsure { reason } => MetadataError::Unknown { reason },
            other => other.of_a_read(),
        }
    }
}

/// Whether no byte of the request left this process: there was no connection to send it on.
fn never_sent(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    // How the generated clients say that a channel did not become ready for the request.
    status.code() == Code::Unknown && status.message().starts_with("Service was not ready")
}

/// The status and, for a connection's failure, what is at the bottom of it.
fn told(status: &Status) -> String {
    let mut deepest = None;
    let mut source = status.source();
    while let Some(error) = source {
        deepest = Some(error.to_string());
        source = error.source();
    }
    match deepest {
        Some(deepest) if !status.message().contains(&deepest) => {
            format!("{}: {deepest}", status.message())
        }
        _ => status.message().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(code: Code, message: &str) -> Failure {
        Failure::from_status("http://e:1", &Status::new(code, message))
    }

    #[test]
    fn refusals_before_the_proposal_are_certain() {
        for (code, message) in [
            (Code::Unavailable, "etcdserver: no leader"),
            (Code::ResourceExhausted, "etcdserver: too many requests"),
            (Code::PermissionDenied, "etcdserver: permission denied"),
            (Code::Unauthenticated, "etcdserver: invalid auth token"),
        ] {
            let failure = of(code, message);
            assert!(
                matches!(failure, Failure::NotDone { .. }),
                "{message}: {failure:?}"
            );
            assert!(matches!(
                failure.of_a_change(),
                MetadataError::Unavailable { .. }
            ));
        }
        let never_sent =
            Status::from_error(Box::new(tonic::ConnectError("connection refused".into())));
        let failure = Failure::from_status("http://e:1", &never_sent);
        assert!(matches!(failure, Failure::NotDone { .. }), "{failure:?}");
    }

    #[test]
    fn everything_else_leaves_it_open() {
        for (code, message) in [
            (Code::Unavailable, "etcdserver: request timed out"),
            (
                Code::Unavailable,
                "etcdserver: request timed out, possibly due to previous leader failure",
            ),
            (Code::Unavailable, "etcdserver: leader changed"),
            (Code::Unavailable, "etcdserver: server stopped"),
            (Code::Unavailable, "error reading a body from connection"),
            (
                Code::ResourceExhausted,
                "etcdserver: mvcc: database space exceeded",
            ),
            (Code::DeadlineExceeded, "context deadline exceeded"),
            (Code::Cancelled, "Timeout expired"),
            (Code::Unknown, "raft proposal dropped"),
            (Code::Internal, "h2 protocol error"),
        ] {
            let failure = of(code, message);
            assert!(
                matches!(failure, Failure::Unsure { .. }),
                "{message}: {failure:?}"
            );
            assert!(failure.may_pass());
            assert!(matches!(
                failure.clone().of_a_read(),
                MetadataError::Unavailable { .. }
            ));
            assert!(matches!(
                failure.of_a_change(),
                MetadataError::Unknown { .. }
            ));
        }
    }

    #[test]
    fn revisions_that_are_gone_or_to_come_are_told_apart() {
        let gone = "etcdserver: mvcc: required revision has been compacted";
        assert_eq!(of(Code::OutOfRange, gone), Failure::Compacted);
        let to_come = "etcdserver: mvcc: required revision is a future revision";
        assert_eq!(of(Code::OutOfRange, to_come), Failure::Future);
        let large = of(Code::InvalidArgument, "etcdserver: request is too large");
        assert!(matches!(large, Failure::Invalid { .. }) && !large.may_pass());
    }
}
