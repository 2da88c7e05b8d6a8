//! Why an operation was refused, by the class that decides what an orchestrator does next.
//!
//! Orchestrators read the class, not the words: after [`Class::Aborted`], [`Class::Unavailable`],
//! [`Class::DeadlineExceeded`] and [`Class::ResourceExhausted`] they assume that the work may still be going on and ask
//! again; every other class tells them that it is over. So a refusal of another class is never made while work goes on.

use std::fmt;

/// What kind of refusal it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// A field is missing, malformed or asks for what no volume can do.
    InvalidArgument,
    /// No such volume, node or path.
    NotFound,
    /// It exists, but not as asked for.
    AlreadyExists,
    /// Refused as things stand; the message says what to change.
    FailedPrecondition,
    /// A limit or the space of the stores.
    ResourceExhausted,
    /// A size that cannot be had.
    OutOfRange,
    /// Another operation on the same volume is under way.
    Aborted,
    /// The daemon cannot be reached or is starting; try again.
    Unavailable,
    /// It took too long; it may be going on.
    DeadlineExceeded,
    /// The caller may not do this.
    PermissionDenied,
    /// This driver does not do this.
    Unimplemented,
    /// Something failed that should not.
    Internal,
}

/// A refusal and its reason, in words for a person.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Decides the code that is answered.
    pub class: Class,
    /// Never empty, never with a secret.
    pub message: String,
}

impl Refusal {
    /// A refusal of `class`.
    pub fn new(class: Class, message: impl Into<String>) -> Refusal {
        Refusal {
            class,
            message: message.into(),
        }
    }

    /// See [`Class::InvalidArgument`].
    pub fn invalid(message: impl Into<String>) -> Refusal {
        Refusal::new(Class::InvalidArgument, message)
    }

    /// See [`Class::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Refusal {
        Refusal::new(Class::NotFound, message)
    }

    /// See [`Class::AlreadyExists`].
    pub fn exists(message: impl Into<String>) -> Refusal {
        Refusal::new(Class::AlreadyExists, message)
    }

    /// See [`Class::FailedPrecondition`].
    pub fn precondition(message: impl Into<String>) -> Refusal {
        Refusal::new(Class::FailedPrecondition, message)
    }

    /// See [`Class::Internal`].
    pub fn internal(message: impl Into<String>) -> Refusal {
        Refusal::new(Class::Internal, message)
    }

    /// See [`Class::Aborted`].
    pub fn busy(what: &str) -> Refusal {
        Refusal::new(
            Class::Aborted,
            format!("another operation on {what} is under way; it will be over before long"),
        )
    }

    /// The same refusal, with what was being done before its message.
    #[must_use]
    pub fn during(self, what: &str) -> Refusal {
        Refusal {
            class: self.class,
            message: format!("{what}: {}", self.message),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refusal {}
