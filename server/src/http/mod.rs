//! HTTP for Prometheus and for probes: `/metrics`, `/healthz`, `/readyz`.
//!
//! It only tells, takes no input beyond the path, and holds no secret but the names of volumes; so it may be reached
//! from other machines when the configuration says so.

mod page;
mod scrape;

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::Arc;

use async_trait::async_trait;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Serialize;
use thiserror::Error;

pub use scrape::{ClusterScrape, ListenerCounts, Scrape, VolumeScrape};

use crate::config::HostPort;

/// What is told over HTTP.
#[async_trait]
pub trait Probe: Send + Sync + 'static {
    /// Everything that is measured, now.
    async fn scrape(&self) -> Scrape;

    /// Whether volumes are served, and what is in the way.
    async fn readiness(&self) -> Readiness;
}

/// The answer of `/readyz`; 200 when `ready`, else 503.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Readiness {
    /// Clients can connect to volumes.
    pub ready: bool,
    /// `starting`, `ready` or `draining`.
    pub state: &'static str,
    /// Why it is not ready, and, ready or not, what a person should look at.
    pub reasons: Vec<String>,
}

/// Why HTTP is not served.
#[derive(Debug, Error)]
pub enum HttpBindError {
    /// The port is taken.
    #[error(
        "http address {address} is in use by another process; choose another --listen-http or \"off\""
    )]
    InUse {
        /// As configured.
        address: HostPort,
    },
    /// The system refused.
    #[error("cannot listen for http on {address}: {source}")]
    Io {
        /// As configured.
        address: HostPort,
        /// What the system said.
        source: io::Error,
    },
}

/// Listens; answers the socket and its address, with the port the kernel chose when 0 was asked for.
pub fn bind(address: &HostPort) -> Result<(TcpListener, SocketAddr), HttpBindError> {
    let bind = || -> io::Result<_> {
        let addresses: Vec<_> = (address.host.as_str(), address.port)
            .to_socket_addrs()?
            .collect();
        let listener = TcpListener::bind(&addresses[..])?;
        listener.set_nonblocking(true)?;
        let local = listener.local_addr()?;
        Ok((listener, local))
    };
    bind().map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => HttpBindError::InUse {
            address: address.clone(),
        },
        _ => HttpBindError::Io {
            address: address.clone(),
            source,
        },
    })
}

/// Serves until `stop` is done. Requests are a few hundred bytes and answered at once, so none is waited for.
pub async fn serve(
    listener: TcpListener,
    probe: Arc<dyn Probe>,
    stop: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let service = routes(probe);
    tokio::select! {
        served = async { axum::serve(listener, service).await } => served,
        () = stop => Ok(()),
    }
}

fn routes(probe: Arc<dyn Probe>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .with_state(probe)
}

async fn metrics(State(probe): State<Arc<dyn Probe>>) -> Response {
    // OpenMetrics 1.0, which Prometheus reads and which its own text format is a near relative of.
    const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match probe.scrape().await.to_text() {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn readyz(State(probe): State<Arc<dyn Probe>>) -> Response {
    let readiness = probe.readiness().await;
    let code = if readiness.ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    // Strings and a flag: there is nothing that JSON lacks.
    let mut body = serde_json::to_string(&readiness).expect("readiness serialises");
    body.push('\n');
    (code, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

#[cfg(test)]
mod tests;
