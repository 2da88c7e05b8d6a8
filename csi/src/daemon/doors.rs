//! The ways to daemons: over a Unix socket, over TCP on one machine, over TCP with mutual TLS in a cluster.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ashlar_proto::admin::admin_client::AdminClient;
use tonic::Status;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::address::Address;
use crate::refusal::Refusal;

/// What `ashlar cluster client-cert` writes.
const AUTHORITY_FILE: &str = "ca-cert.pem";
const CERTIFICATE_FILE: &str = "client-cert.pem";
const KEY_FILE: &str = "client-key.pem";
/// Bound on connecting and on the handshake.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Daemons of one cluster in the order in which they are tried, or a single one. Each is asked until it does not answer.
#[derive(Debug)]
pub(super) struct Doors {
    doors: Vec<(Address, AdminClient<Channel>)>,
    /// Which is asked.
    present: AtomicUsize,
    has_certificates: bool,
}

impl Doors {
    /// None of them need be there yet.
    pub(super) fn new(
        addresses: &[Address],
        certificates: Option<&Path>,
    ) -> Result<Doors, Refusal> {
        let tls = certificates.map(read).transpose()?;
        let open = |address: &Address| -> Result<_, Refusal> {
            let endpoint = endpoint(address, tls.as_ref())?;
            Ok((address.clone(), AdminClient::new(endpoint.connect_lazy())))
        };
        let doors = addresses.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        if doors.is_empty() {
            return Err(Refusal::invalid("no daemon is named"));
        }
        Ok(Doors {
            doors,
            present: AtomicUsize::new(0),
            has_certificates: tls.is_some(),
        })
    }

    /// Where the daemon is that is asked now.
    pub(super) fn address(&self) -> Address {
        self.doors[self.present.load(Ordering::Relaxed)].0.clone()
    }

    /// The daemon that is asked now, and which that is.
    pub(super) fn present(&self) -> (usize, AdminClient<Channel>) {
        let door = self.present.load(Ordering::Relaxed);
        (door, self.doors[door].1.clone())
    }

    /// That daemon did not answer: the next call goes to the next one, unless somebody has gone on already. So calls that
    /// were under way at once are one reason to try the next, and one that fails late is none.
    pub(super) fn go_on(&self, door: usize) {
        let next = (door + 1) % self.doors.len();
        let moved = self
            .present
            .compare_exchange(door, next, Ordering::Relaxed, Ordering::Relaxed);
        if next != door && moved.is_ok() {
            tracing::warn!(daemon = %self.doors[next].0, "a daemon does not answer; asking another");
        }
    }

    /// What a daemon or the way to it said, with the cause that the gRPC library keeps behind its words.
    pub(super) fn words(&self, door: usize, status: &Status) -> String {
        let mut words = status.message().to_owned();
        let mut cause = std::error::Error::source(status);
        while let Some(error) = cause {
            let more = error.to_string();
            if !words.contains(&more) {
                words.push_str(": ");
                words.push_str(&more);
            }
            cause = error.source();
        }
        let is_tcp = matches!(self.doors[door].0, Address::Tcp(_));
        if is_tcp && !self.has_certificates && std::error::Error::source(status).is_some() {
            words.push_str(" (a daemon of a cluster wants a certificate: --daemon-certificates)");
        }
        words
    }
}

fn read(directory: &Path) -> Result<ClientTlsConfig, Refusal> {
    let read = |file: &str| {
        let path = directory.join(file);
        std::fs::read(&path).map_err(|error| {
            Refusal::invalid(format!(
                "{}: {error}; `ashlar cluster client-cert NAME --role admin` makes the three files of this directory",
                path.display()
            ))
        })
    };
    Ok(ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(read(AUTHORITY_FILE)?))
        .identity(Identity::from_pem(read(CERTIFICATE_FILE)?, read(KEY_FILE)?))
        .timeout(CONNECT_LIMIT))
}

fn endpoint(address: &Address, tls: Option<&ClientTlsConfig>) -> Result<Endpoint, Refusal> {
    let wrong = |error: tonic::transport::Error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        Refusal::invalid(format!("{address}: {}", cause.unwrap_or(error.to_string())))
    };
    let uri = match (address, tls) {
        (Address::Unix(path), _) => format!("unix:{}", path.display()),
        (Address::Tcp(host), None) => format!("http://{host}"),
        (Address::Tcp(host), Some(_)) => format!("https://{host}"),
    };
    let mut endpoint = Endpoint::from_shared(uri).map_err(wrong)?;
    if let (Address::Tcp(_), Some(tls)) = (address, tls) {
        endpoint = endpoint.tls_config(tls.clone()).map_err(wrong)?;
    }
    Ok(endpoint.connect_timeout(CONNECT_LIMIT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failure_moves_on_from_the_daemon_that_failed_and_no_other() {
        let addresses = ["unix:/a", "unix:/b"].map(|text| text.parse().expect("an address"));
        let doors = Doors::new(&addresses, None).expect("doors");
        let (first, _) = doors.present();
        doors.go_on(first);
        let (second, _) = doors.present();
        assert_ne!(second, first);
        // Calls to the first that fail later.
        doors.go_on(first);
        doors.go_on(first);
        assert_eq!(doors.present().0, second);
        doors.go_on(second);
        assert_eq!(doors.present().0, first);
    }
}
