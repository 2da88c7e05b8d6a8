//! Where a server listens.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// `unix:/absolute/path` or `tcp:host:port`, as the daemon prints its listeners.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// A socket in the file system.
    Unix(PathBuf),
    /// Host, an IPv6 one in brackets, and port.
    Tcp(String),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            // Both `unix:/path` and `unix:///path` are in use.
            let path = path.strip_prefix("//").unwrap_or(path);
            if !path.starts_with('/') || path.contains('\0') {
                return Err(format!("{text:?}: a socket needs an absolute path"));
            }
            return Ok(Address::Unix(PathBuf::from(path)));
        }
        if let Some(host) = text.strip_prefix("tcp:") {
            let host = host.strip_prefix("//").unwrap_or(host);
            let port = host
                .rsplit_once(':')
                .map(|(name, port)| (name, port.parse::<u16>()));
            return match port {
                Some((name, Ok(port))) if !name.is_empty() && port != 0 => {
                    Ok(Address::Tcp(host.to_owned()))
                }
                _ => Err(format!("{text:?}: tcp: needs HOST:PORT")),
            };
        }
        Err(format!(
            "{text:?} is neither unix:/path/of/socket nor tcp:HOST:PORT"
        ))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(host) => write!(f, "tcp:{host}"),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = String;

    fn try_from(text: String) -> Result<Address, String> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> String {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_printed() {
        for text in ["unix:/run/a.sock", "tcp:127.0.0.1:10809", "tcp:[::1]:1"] {
            assert_eq!(text.parse::<Address>().expect(text).to_string(), text);
        }
        assert_eq!(
            "unix:///run/a.sock".parse(),
            Ok(Address::Unix("/run/a.sock".into()))
        );
        for text in [
            "", "/run/a", "unix:a", "tcp:host", "tcp::1", "tcp:h:0", "udp:h:1",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
