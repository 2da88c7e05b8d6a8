//! Finding the daemon and talking to it.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use ashlar_proto::admin::admin_client::AdminClient;
use tokio::net::UnixStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::config::{Address, AddressError};

use super::{
    error::{CliError, Exit},
    output,
};

/// Where to look for a daemon when nobody said where it is: the data directory of `make run`, then those of a packaged
/// daemon.
const GUESSES: [&str; 3] = [
    "./data/admin.sock",
    "/run/ashlar/admin.sock",
    "/var/lib/ashlar/admin.sock",
];

/// Bound on connecting. A daemon on this machine answers at once or not at all; one behind TCP may be a continent away.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads an address as a person gives it: what the daemon's flags take, and also a bare path.
pub(super) fn parse_address(text: &str) -> Result<Address, AddressError> {
    if text.contains('/') && !text.contains(':') {
        return Ok(Address::Unix(text.into()));
    }
    match text.strip_prefix("unix://") {
        Some(path) if path.starts_with('/') => Ok(Address::Unix(path.into())),
        _ => text.parse(),
    }
}

/// Where the daemon is, as far as somebody said.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) admin: Option<Address>,
    /// A directory.
    pub(super) certificates: Option<PathBuf>,
}

/// A connected client, and where it is connected to.
pub(super) struct Daemon {
    pub(super) client: AdminClient<Channel>,
    /// For the other services.
    pub(super) channel: Channel,
    pub(super) address: Address,
}

/// Connects to what was asked for, or to the first guess that answers.
pub(super) async fn connect(asked: Asked) -> Result<Daemon, CliError> {
    let address = match asked.admin {
        Some(Address::Unix(path)) => {
            probe(&path)
                .await
                .map_err(|error| unreachable_socket(&path, &error))?;
            Address::Unix(path)
        }
        Some(address) => address,
        None => Address::Unix(guess().await?),
    };
    let endpoint = endpoint(&address, asked.certificates.as_deref())?;
    let channel = endpoint
        .connect()
        .await
        .map_err(|error| unreachable_daemon(&address, &error))?;
    Ok(Daemon {
        client: AdminClient::new(channel.clone()),
        channel,
        address,
    })
}

fn endpoint(address: &Address, certificates: Option<&Path>) -> Result<Endpoint, CliError> {
    let uri = match address {
        Address::Unix(path) => match path.to_str() {
            Some(path) => format!("unix:{path}"),
            None => {
                return Err(CliError::new(
                    Exit::Usage,
                    format_args!("{address}: the path is not UTF-8"),
                ));
            }
        },
        Address::Tcp(host_port) if certificates.is_some() => format!("https://{host_port}"),
        Address::Tcp(host_port) => format!("http://{host_port}"),
    };
    let wrong = |error: &dyn std::fmt::Display| {
        CliError::new(Exit::Usage, format_args!("{address}: {error}"))
    };
    let mut endpoint = Endpoint::from_shared(uri).map_err(|e| wrong(&e))?;
    if let (Address::Tcp(_), Some(directory)) = (address, certificates) {
        let [authority, certificate, key] = super::cluster::read_certificates(directory)?;
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(authority))
            .identity(Identity::from_pem(certificate, key))
            .timeout(CONNECT_TIMEOUT);
        endpoint = endpoint.tls_config(tls).map_err(|e| {
            wrong(&std::error::Error::source(&e).map_or(e.to_string(), ToString::to_string))
        })?;
    }
    Ok(endpoint.connect_timeout(CONNECT_TIMEOUT))
}

/// Whether something accepts connections there. Says why not with the system's own error, which the gRPC library hides.
async fn probe(path: &Path) -> io::Result<()> {
    UnixStream::connect(path).await.map(drop)
}

async fn guess() -> Result<PathBuf, CliError> {
    let mut tried = String::new();
    let mut denied = false;
    for guess in GUESSES.map(Path::new) {
        match probe(guess).await {
            Ok(()) => {
                // Several daemons may run on a machine: a person should see which of them is meant.
                if output::stderr_is_watched() {
                    output::note(format_args!("using {}", guess.display()));
                }
                return Ok(guess.to_owned());
            }
            Err(error) => {
                denied |= error.kind() == io::ErrorKind::PermissionDenied;
                tried += &format!("\n    {}: {}", guess.display(), reason(&error));
            }
        }
    }
    let hint = if denied {
        "a daemon belongs to another user: run this as that user or with sudo"
    } else {
        "start one with 'ashlard --data-dir ./data', or say where it is with --admin or ASHLAR_ADMIN"
    };
    Err(CliError::new(
        Exit::Unreachable,
        format_args!("no daemon found; tried{tried}"),
    )
    .hint(hint))
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "no such socket".into(),
        io::ErrorKind::ConnectionRefused => "nothing listens there any more".into(),
        io::ErrorKind::PermissionDenied => "permission denied".into(),
        _ => error.to_string(),
    }
}

fn unreachable_socket(path: &Path, error: &io::Error) -> CliError {
    let refused = CliError::new(
        Exit::Unreachable,
        format_args!("unix:{}: {}", path.display(), reason(error)),
    );
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            refused.hint("run this as the daemon's user or with sudo")
        }
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => refused.hint(
            "is ashlard running, and is that its --listen-admin (by default DIR/admin.sock)?",
        ),
        _ => refused,
    }
}

fn unreachable_daemon(address: &Address, error: &tonic::transport::Error) -> CliError {
    use std::error::Error;
    // The library's own text is "transport error"; the innermost cause is the one that helps.
    let mut cause: &dyn Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    CliError::new(Exit::Unreachable, format_args!("{address}: {cause}")).hint(
        "is ashlard running, and is that its --listen-admin? In a cluster TCP needs --certificates",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        for (text, meant) in [
            ("unix:/run/a.sock", "unix:/run/a.sock"),
            ("unix:data/a.sock", "unix:data/a.sock"),
            ("unix:///run/a.sock", "unix:/run/a.sock"),
            ("/run/a.sock", "unix:/run/a.sock"),
            ("./a.sock", "unix:./a.sock"),
            ("tcp:127.0.0.1:9461", "tcp:127.0.0.1:9461"),
            ("tcp:[::1]:9461", "tcp:[::1]:9461"),
        ] {
            assert_eq!(parse_address(text).expect(text).to_string(), meant);
        }
        for text in ["tcp:host", "tcp::1", "unix:", "a.sock", ""] {
            assert!(parse_address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_missing_socket_says_what_to_do() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("runtime");
        let missing = Address::Unix("/nonexistent/ashlar/admin.sock".into());
        let error = runtime
            .block_on(connect(Asked {
                admin: Some(missing),
                certificates: None,
            }))
            .err()
            .expect("unreachable");
        assert_eq!(error.exit, Exit::Unreachable);
        let text = error.to_string();
        assert!(
            text.contains("no such socket") && text.contains("is ashlard running"),
            "{text}"
        );
    }
}
