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
    error::{CliError, Exit, innermost},
    output,
};

/// Names that libnbd, and with it most tools, look for in a directory of certificates; ours looks for the same.
pub(super) const AUTHORITY_FILE: &str = "ca-cert.pem";
pub(super) const CERTIFICATE_FILE: &str = "client-cert.pem";
pub(super) const KEY_FILE: &str = "client-key.pem";

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

impl Asked {
    /// Adds what to do to the error of a connection that broke.
    pub(super) fn explain(&self, error: CliError) -> CliError {
        let cause = error.to_string();
        error.hint_if_broken(hint_for(
            self.admin.as_ref(),
            self.certificates.is_some(),
            &cause,
        ))
    }
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
    let has_certificates = asked.certificates.is_some();
    let channel = endpoint
        .connect()
        .await
        .map_err(|error| unreachable_daemon(&address, has_certificates, &error))?;
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
        let [authority, certificate, key] = read_certificates(directory)?;
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

/// The three files of a directory of certificates: authority, certificate, key.
fn read_certificates(directory: &Path) -> Result<[Vec<u8>; 3], CliError> {
    let read = |file: &str| {
        let path = directory.join(file);
        std::fs::read(&path).map_err(|error| {
            CliError::new(Exit::Usage, format_args!("{}: {error}", path.display()))
                .hint("`ashlar cluster client-cert NAME --role admin --out DIR`, on a node, makes such a directory")
        })
    };
    Ok([
        read(AUTHORITY_FILE)?,
        read(CERTIFICATE_FILE)?,
        read(KEY_FILE)?,
    ])
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

fn unreachable_daemon(
    address: &Address,
    has_certificates: bool,
    error: &tonic::transport::Error,
) -> CliError {
    let cause = innermost(error).to_string();
    let hint = hint_for(Some(address), has_certificates, &cause);
    CliError::new(Exit::Unreachable, format_args!("{address}: {cause}")).hint(hint)
}

/// What to do about a connection that does not come about, or broke.
fn hint_for(address: Option<&Address>, has_certificates: bool, cause: &str) -> &'static str {
    let is_tcp = matches!(address, Some(Address::Tcp(_)));
    // The words of the TLS library; whatever it says of certificates, they are not what the other side takes.
    let is_about_certificates = cause.contains("ertificate") || cause.contains("UnknownIssuer");
    match (is_tcp, has_certificates) {
        (true, false) if !cause.contains("refused") => {
            "in a cluster TCP needs --certificates DIR, which `ashlar cluster client-cert NAME --role admin --out DIR` makes"
        }
        (true, true) if is_about_certificates => {
            "are the certificates of this cluster, for the role admin, and still good (`ashlar cluster client-certs`), and does the \
             daemon listen on or --advertise that address?"
        }
        _ => "is ashlard running, and is that its --listen-admin?",
    }
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
    fn what_to_do_depends_on_how_the_daemon_was_asked() {
        let tcp: Address = "tcp:10.0.0.11:9461".parse().expect("an address");
        let unix = Address::Unix("/run/a.sock".into());
        let cases = [
            (Some(&tcp), false, "connection reset", "--certificates DIR"),
            (
                Some(&tcp),
                false,
                "Connection refused (os error 111)",
                "is ashlard running",
            ),
            (
                Some(&tcp),
                true,
                "invalid peer certificate: UnknownIssuer",
                "--advertise",
            ),
            (Some(&tcp), true, "connection reset", "is ashlard running"),
            (Some(&unix), false, "broken pipe", "is ashlard running"),
            (None, false, "broken pipe", "is ashlard running"),
        ];
        for (address, has_certificates, cause, hint) in cases {
            let said = hint_for(address, has_certificates, cause);
            assert!(said.contains(hint), "{cause}: {said}");
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
