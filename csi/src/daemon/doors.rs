//! The ways to daemons: over a Unix socket, over TCP on one machine, over TCP with mutual TLS in a cluster.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

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
/// Calls under way at once may all fail when a daemon goes: they are one reason to try the next one, not many.
const STAY: Duration = Duration::from_secs(1);

/// Daemons of one cluster in the order in which they are tried, or a single one. Each is asked until it does not answer.
#[derive(Debug)]
pub(super) struct Doors {
    doors: Vec<(Address, AdminClient<Channel>)>,
    /// Which is asked, and since when.
    present: Mutex<(usize, Instant)>,
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
            present: Mutex::new((0, Instant::now())),
            has_certificates: tls.is_some(),
        })
    }

    fn present(&self) -> &(Address, AdminClient<Channel>) {
        let present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        &self.doors[present.0]
    }

    /// Where the daemon is that is asked now.
    pub(super) fn address(&self) -> Address {
        self.present().0.clone()
    }

    pub(super) fn client(&self) -> AdminClient<Channel> {
        self.present().1.clone()
    }

    /// The daemon that was asked did not answer: the next call goes to the next one.
    pub(super) fn go_on(&self) {
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        if self.doors.len() > 1 && present.1.elapsed() >= STAY {
            *present = ((present.0 + 1) % self.doors.len(), Instant::now());
            tracing::warn!(daemon = %self.doors[present.0].0, "a daemon does not answer; asking another");
        }
    }

    /// What a daemon or the way to it said, with the cause that the gRPC library keeps behind its words.
    pub(super) fn words(&self, status: &Status) -> String {
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
        let is_tcp = matches!(self.present().0, Address::Tcp(_));
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
