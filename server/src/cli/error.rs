//! What can go wrong, what it says, and the exit code it has.

use std::{fmt, io, process::ExitCode};

use tonic::{Code, Status};

/// Exit codes. Listed in the program's help; scripts rely on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// Something unforeseen, in the daemon or here.
    Failed = 1,
    /// The command line or a value in it is wrong; also what clap exits with.
    Usage = 2,
    /// No such volume or store.
    NotFound = 3,
    /// Refused as things stand: name taken, volume in use, shrinking.
    Refused = 4,
    /// The daemon cannot be reached or is not ready.
    Unreachable = 5,
    /// Out of space or past a limit.
    NoSpace = 6,
    /// Damaged data was found.
    Damaged = 7,
}

/// The cause of causes: what libraries say around it ("transport error") helps nobody.
pub(super) fn innermost<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> &'a dyn std::error::Error {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause
}

/// A failure with its exit code, and what to do about it.
#[derive(Debug)]
pub(super) struct CliError {
    pub(super) exit: Exit,
    message: String,
    hint: Option<String>,
    /// The connection broke; what to do depends on how it was made.
    is_broken: bool,
    /// The reader of our output went away, which is not worth a word.
    silent: bool,
}

impl CliError {
    pub(super) fn new(exit: Exit, message: impl fmt::Display) -> CliError {
        CliError {
            exit,
            message: message.to_string(),
            hint: None,
            is_broken: false,
            silent: false,
        }
    }

    /// Adds what to do.
    pub(super) fn hint(mut self, hint: impl fmt::Display) -> CliError {
        self.hint = Some(hint.to_string());
        self
    }

    fn broken(mut self) -> CliError {
        self.is_broken = true;
        self
    }

    /// Adds what to do where the connection broke, which whoever made it knows.
    pub(super) fn hint_if_broken(self, hint: impl fmt::Display) -> CliError {
        match self.is_broken {
            true => self.hint(hint),
            false => self,
        }
    }

    /// Damage that was already reported on its own lines.
    pub(super) fn reported(exit: Exit) -> CliError {
        CliError {
            exit,
            message: String::new(),
            hint: None,
            is_broken: false,
            silent: true,
        }
    }

    /// Tells stderr, and gives the code to exit with.
    pub(super) fn report(&self) -> ExitCode {
        if !self.silent {
            eprintln!("ashlar: {self}");
        }
        ExitCode::from(self.exit as u8)
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n  {hint}"),
            None => Ok(()),
        }
    }
}

/// The one table from gRPC status to exit code. Messages are the daemon's: it knows what to do and says so.
impl From<Status> for CliError {
    fn from(status: Status) -> CliError {
        // What has a cause is not the daemon's answer: it broke on the way.
        if std::error::Error::source(&status).is_some() {
            return CliError::new(
                Exit::Unreachable,
                format_args!("the connection to the daemon broke: {}", innermost(&status)),
            )
            .broken();
        }
        let exit = match status.code() {
            Code::InvalidArgument | Code::OutOfRange => Exit::Usage,
            Code::NotFound => Exit::NotFound,
            Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::PermissionDenied
            | Code::Unauthenticated => Exit::Refused,
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => Exit::Unreachable,
            Code::ResourceExhausted => Exit::NoSpace,
            Code::DataLoss => Exit::Damaged,
            Code::Ok | Code::Unknown | Code::Internal | Code::Unimplemented => Exit::Failed,
        };
        let mut message = status.message().to_owned();
        if message.is_empty() {
            message = format!("the daemon answered: {}", status.code().description());
        }
        let error = CliError::new(exit, message);
        match status.code() {
            Code::Unimplemented => error
                .hint("the daemon is of another version than this program; see 'ashlar status'"),
            Code::Internal | Code::Unknown => error.hint("the daemon's log says more"),
            _ => error,
        }
    }
}

impl From<io::Error> for CliError {
    fn from(error: io::Error) -> CliError {
        CliError {
            exit: Exit::Failed,
            silent: error.kind() == io::ErrorKind::BrokenPipe,
            message: format!("writing the output: {error}"),
            hint: None,
            is_broken: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_its_exit_code() {
        let cases = [
            (Code::Cancelled, Exit::Unreachable),
            (Code::Unknown, Exit::Failed),
            (Code::InvalidArgument, Exit::Usage),
            (Code::DeadlineExceeded, Exit::Unreachable),
            (Code::NotFound, Exit::NotFound),
            (Code::AlreadyExists, Exit::Refused),
            (Code::PermissionDenied, Exit::Refused),
            (Code::ResourceExhausted, Exit::NoSpace),
            (Code::FailedPrecondition, Exit::Refused),
            (Code::Aborted, Exit::Refused),
            (Code::OutOfRange, Exit::Usage),
            (Code::Unimplemented, Exit::Failed),
            (Code::Internal, Exit::Failed),
            (Code::Unavailable, Exit::Unreachable),
            (Code::DataLoss, Exit::Damaged),
            (Code::Unauthenticated, Exit::Refused),
        ];
        for (code, exit) in cases {
            let error = CliError::from(Status::new(code, "said the daemon"));
            assert_eq!(error.exit, exit, "{code:?}");
            assert!(error.to_string().starts_with("said the daemon"));
        }
        assert!(
            !CliError::from(Status::new(Code::Internal, ""))
                .to_string()
                .is_empty()
        );
    }

    #[test]
    fn a_connection_that_broke_is_told_by_its_cause() {
        let cause = io::Error::from(io::ErrorKind::ConnectionReset);
        let error = CliError::from(Status::from_error(Box::new(cause))).hint_if_broken("do this");
        assert_eq!(error.exit, Exit::Unreachable);
        let text = error.to_string();
        assert!(
            text.contains("connection reset") && text.ends_with("do this"),
            "{text}"
        );
        let answered = CliError::from(Status::new(Code::Internal, "no")).hint_if_broken("do this");
        assert!(!answered.to_string().contains("do this"));
    }

    #[test]
    fn a_closed_pipe_is_quiet() {
        assert!(CliError::from(io::Error::from(io::ErrorKind::BrokenPipe)).silent);
        assert!(!CliError::from(io::Error::from(io::ErrorKind::StorageFull)).silent);
    }
}
