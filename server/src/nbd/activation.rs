//! Sockets that systemd made for us (`sd_listen_fds(3)`).
//!
//! `FileDescriptorName=` in the `.socket` unit says what a socket is for: `nbd`, `admin` or `http`. One without a name
//! of ours is for NBD, which is what libnbd's socket activation expects.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// First descriptor that is passed; 0, 1 and 2 are the standard streams.
const FIRST_FD: RawFd = 3;
/// More than this is a mistake in the environment.
const MAX_FDS: RawFd = 64;

/// What a passed socket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// NBD clients.
    Nbd,
    /// The admin interface.
    Admin,
    /// Metrics and health.
    Http,
}

/// A passed socket.
#[derive(Debug)]
pub struct Activated {
    /// What it is for.
    pub purpose: Purpose,
    /// Its name, as systemd has it.
    pub name: String,
    /// It.
    pub fd: OwnedFd,
}

/// An environment that makes no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActivationError {
    /// Not a number from 0 to 64.
    #[error("LISTEN_FDS={0:?} is not a number of sockets from 0 to 64")]
    Count(String),
    /// One name each, or none at all.
    #[error("LISTEN_FDNAMES has {names} names for {sockets} sockets")]
    Names {
        /// Names given.
        names: usize,
        /// Sockets given.
        sockets: usize,
    },
}

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes the passed sockets; empty when there are none, they are for another process, or they were taken before.
///
/// Call it at the start, before anything else opens a file: the descriptors are taken on the word of the environment.
pub fn take() -> Result<Vec<Activated>, ActivationError> {
    let variable = |name| std::env::var(name).ok();
    let passed = passed(
        variable("LISTEN_PID").as_deref(),
        variable("LISTEN_FDS").as_deref(),
        variable("LISTEN_FDNAMES").as_deref(),
        std::process::id(),
    )?;
    if passed.is_empty() || TAKEN.swap(true, Ordering::AcqRel) {
        return Ok(Vec::new());
    }
    Ok(passed
        .into_iter()
        .map(|(number, name)| {
            // SAFETY: the service manager opened this descriptor for us (LISTEN_PID is our own) and nothing else in the
            // process knows it; TAKEN makes sure that it gets one owner only.
            let fd = unsafe { OwnedFd::from_raw_fd(number) };
            // Not for children. A descriptor that is not open fails here, and again where it is used.
            let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
            Activated {
                purpose: match name.as_str() {
                    "admin" => Purpose::Admin,
                    "http" => Purpose::Http,
                    _ => Purpose::Nbd,
                },
                name,
                fd,
            }
        })
        .collect())
}

/// Descriptor numbers and names, from the three variables.
fn passed(
    pid: Option<&str>,
    fds: Option<&str>,
    names: Option<&str>,
    own_pid: u32,
) -> Result<Vec<(RawFd, String)>, ActivationError> {
    let Some(fds) = fds else {
        return Ok(Vec::new());
    };
    // Left over from a parent that did not clean up: not ours.
    if pid.and_then(|pid| pid.parse().ok()) != Some(own_pid) {
        return Ok(Vec::new());
    }
    let count = match fds.parse::<RawFd>() {
        Ok(count) if (0..=MAX_FDS).contains(&count) => count,
        _ => return Err(ActivationError::Count(fds.to_owned())),
    };
    let names: Vec<&str> = match names {
        Some(names) if !names.is_empty() => names.split(':').collect(),
        _ => vec!["unknown"; count as usize],
    };
    if names.len() != count as usize {
        return Err(ActivationError::Names {
            names: names.len(),
            sockets: count as usize,
        });
    }
    Ok((FIRST_FD..)
        .zip(names.into_iter().map(str::to_owned))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_read_as_systemd_writes_it() {
        let named = |list: &[(RawFd, &str)]| -> Result<Vec<(RawFd, String)>, ActivationError> {
            Ok(list
                .iter()
                .map(|(fd, name)| (*fd, (*name).to_owned()))
                .collect())
        };
        assert_eq!(passed(None, None, None, 7), named(&[]));
        assert_eq!(passed(Some("8"), Some("1"), None, 7), named(&[]));
        assert_eq!(passed(Some("x"), Some("1"), None, 7), named(&[]));
        assert_eq!(passed(None, Some("1"), None, 7), named(&[]));
        assert_eq!(passed(Some("7"), Some("0"), None, 7), named(&[]));
        assert_eq!(
            passed(Some("7"), Some("1"), None, 7),
            named(&[(3, "unknown")])
        );
        assert_eq!(
            passed(Some("7"), Some("1"), Some(""), 7),
            named(&[(3, "unknown")])
        );
        assert_eq!(
            passed(Some("7"), Some("2"), Some("nbd:admin"), 7),
            named(&[(3, "nbd"), (4, "admin")])
        );
        assert_eq!(
            passed(Some("7"), Some("2"), Some("nbd"), 7),
            Err(ActivationError::Names {
                names: 1,
                sockets: 2
            })
        );
        for bad in ["-1", "65", "many", ""] {
            assert_eq!(
                passed(Some("7"), Some(bad), None, 7),
                Err(ActivationError::Count(bad.to_owned()))
            );
        }
    }
}
