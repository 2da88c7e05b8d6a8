//! The plugin over TCP, for engines that are not to have its socket: with certificates on both sides, and not without.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::serve::Listener;
use clap::Args;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, crypto::aws_lc_rs};
use tokio_rustls::server::TlsStream;

/// Handshakes at a time; others wait to be accepted.
const HANDSHAKES: usize = 32;
/// Longest handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Before the next attempt when none could be accepted, as without file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// Where and with what to serve over TCP.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// Serve over TCP as well, to engines of this machine with a certificate: HOST:PORT
    #[arg(
        long,
        env = "ASHLAR_DOCKER_LISTEN_TLS",
        requires_all = ["tls_certificate", "tls_key", "tls_client_ca"]
    )]
    listen_tls: Option<String>,
    /// The certificate to serve with, and what leads to its authority, in PEM; read once
    #[arg(long, env = "ASHLAR_DOCKER_TLS_CERTIFICATE", requires = "listen_tls")]
    tls_certificate: Option<PathBuf>,
    /// Its key, in PEM
    #[arg(long, env = "ASHLAR_DOCKER_TLS_KEY", requires = "listen_tls")]
    tls_key: Option<PathBuf>,
    /// The authority that clients' certificates are of, in PEM: whoever has one may use every volume
    #[arg(long, env = "ASHLAR_DOCKER_TLS_CLIENT_CA", requires = "listen_tls")]
    tls_client_ca: Option<PathBuf>,
}

impl Settings {
    /// Listens; `None`: over TCP nothing is served.
    pub(super) async fn listen(&self) -> anyhow::Result<Option<TlsListener>> {
        let (Some(at), Some(certificate), Some(key), Some(client_ca)) = (
            &self.listen_tls,
            &self.tls_certificate,
            &self.tls_key,
            &self.tls_client_ca,
        ) else {
            return Ok(None);
        };
        let acceptor = acceptor(certificate, key, client_ca)?;
        let listener = TcpListener::bind(at)
            .await
            .with_context(|| format!("listening at tcp:{at}"))?;
        let address = listener.local_addr()?;
        let (send, ready) = mpsc::channel(1);
        tokio::spawn(greet(listener, acceptor, send));
        tracing::info!(%address, "serving over TLS");
        Ok(Some(TlsListener { ready, address }))
    }
}

fn acceptor(certificate: &Path, key: &Path, client_ca: &Path) -> anyhow::Result<TlsAcceptor> {
    let certificates = certificates(certificate)?;
    let key = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("reading the key {}", key.display()))?;
    let mut authorities = RootCertStore::empty();
    for authority in self::certificates(client_ca)? {
        authorities
            .add(authority)
            .with_context(|| format!("{}", client_ca.display()))?;
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(authorities), provider.clone())
            .build()
            .with_context(|| format!("{}", client_ca.display()))?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates, key)
        .with_context(|| format!("{} with its key", certificate.display()))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// All of a file; none is an error.
fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let reading = || format!("reading the certificate {}", path.display());
    let found = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(reading)?;
    anyhow::ensure!(!found.is_empty(), "{} has no certificate", path.display());
    Ok(found)
}

type Greeted = (TlsStream<TcpStream>, SocketAddr);

/// Accepts connections and shakes hands, each in a task of its own: a slow one keeps nobody waiting.
async fn greet(listener: TcpListener, acceptor: TlsAcceptor, ready: mpsc::Sender<Greeted>) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    while let Ok(turn) = Arc::clone(&handshakes).acquire_owned().await {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "no connection could be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let (acceptor, ready) = (acceptor.clone(), ready.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let _ = ready.send((stream, peer)).await;
                }
                Ok(Err(error)) => tracing::info!(%peer, %error, "a client was not let in"),
                Err(_) => tracing::info!(%peer, "a client did not shake hands in time"),
            }
            drop(turn);
        });
    }
}

/// Connections whose handshake is over.
pub(super) struct TlsListener {
    ready: mpsc::Receiver<Greeted>,
    address: SocketAddr,
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> Greeted {
        match self.ready.recv().await {
            Some(greeted) => greeted,
            // Who greets goes on for ever.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        Ok(self.address)
    }
}
