//! Where a listener listens: `unix:PATH` or `tcp:HOST:PORT`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Longest path of a Unix socket: `sun_path` has 108 bytes with the closing zero (unix(7)).
pub const UNIX_PATH_MAX_BYTES: usize = 107;

/// A host and a port; the host is a name or an IP address, an IPv6 address without its brackets.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostPort {
    /// Name or address.
    pub host: String,
    /// 0 lets the kernel choose.
    pub port: u16,
}

impl HostPort {
    /// False when the host is an address beyond this machine. A name is only judged when it has been resolved.
    pub fn may_be_loopback(&self) -> bool {
        self.host
            .parse::<std::net::IpAddr>()
            .map_or(true, |address| address.is_loopback())
    }
}

impl FromStr for HostPort {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<HostPort, AddressError> {
        let wrong = || AddressError::Tcp {
            text: text.to_owned(),
        };
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        let host = match bare {
            Some(v6) => v6
                .parse::<std::net::Ipv6Addr>()
                .map_err(|_| wrong())?
                .to_string(),
            // Without brackets a second colon would make the port ambiguous.
            None if host.is_empty() || host.contains([':', '/', '[', ']', ' ']) => {
                return Err(wrong());
            }
            None => host.to_owned(),
        };
        Ok(HostPort {
            host,
            port: port.parse().map_err(|_| wrong())?,
        })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Where a listener listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(HostPort),
}

/// An address that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AddressError {
    /// Neither kind.
    #[error("{text:?} is not an address: write unix:PATH or tcp:HOST:PORT")]
    Kind {
        /// What was given.
        text: String,
    },
    /// `unix:` without a path that can be one.
    #[error("{text:?} is not the path of a Unix socket")]
    Unix {
        /// What was given.
        text: String,
    },
    /// Not a host and a port.
    #[error("{text:?} is not HOST:PORT, such as 127.0.0.1:9460 or [::1]:9460")]
    Tcp {
        /// What was given.
        text: String,
    },
}

impl Address {
    /// The path, when it is a Unix socket.
    pub fn unix_path(&self) -> Option<&Path> {
        match self {
            Address::Unix(path) => Some(path),
            Address::Tcp(_) => None,
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Address, AddressError> {
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() || path.contains('\0') {
                return Err(AddressError::Unix {
                    text: text.to_owned(),
                });
            }
            return Ok(Address::Unix(PathBuf::from(path)));
        }
        match text.strip_prefix("tcp:") {
            Some(rest) => Ok(Address::Tcp(rest.parse()?)),
            None => Err(AddressError::Kind {
                text: text.to_owned(),
            }),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(host_port) => write!(f, "tcp:{host_port}"),
        }
    }
}

macro_rules! text_form {
    ($type:ty, $error:ty) => {
        impl TryFrom<String> for $type {
            type Error = $error;

            fn try_from(text: String) -> Result<$type, $error> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.to_string()
            }
        }
    };
}
pub(super) use text_form;

text_form!(HostPort, AddressError);
text_form!(Address, AddressError);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_and_print_the_same() {
        for text in [
            "unix:/run/a.sock",
            "unix:a b",
            "tcp:127.0.0.1:10809",
            "tcp:localhost:0",
            "tcp:[::1]:1",
        ] {
            assert_eq!(text.parse::<Address>().expect(text).to_string(), text);
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "unix:",
            "/run/a.sock",
            "tcp:",
            "tcp:host",
            "tcp::1",
            "tcp:::1:5",
            "tcp:h:70000",
            "tcp:[x]:1",
            "udp:h:1",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn loopback_is_told_from_the_world() {
        for (text, expected) in [
            ("127.0.0.1:1", true),
            ("[::1]:1", true),
            ("localhost:1", true),
            ("0.0.0.0:1", false),
            ("10.0.0.1:1", false),
            ("[::]:1", false),
        ] {
            assert_eq!(
                text.parse::<HostPort>().expect(text).may_be_loopback(),
                expected,
                "{text}"
            );
        }
    }
}
