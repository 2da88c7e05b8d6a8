//! Carries a handshake machine over a socket.

use super::interface::{CatalogError, ExportCatalog};
use ashlar_core::nbd::handshake::{CloseReason, Handshake, Resolution, Step};
use ashlar_core::nbd::session::Session;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;

/// Bytes read at a time: several ordinary options, and little enough for many clients at once.
const READ_BYTES: usize = 4096;
/// How long a client that said ABORT may take to close its side.
const LINGER: Duration = Duration::from_secs(1);
/// Bytes of such a client that are read and forgotten, so that the close does not become a reset that overtakes our
/// answer.
const LINGER_BYTES: usize = 64 << 10;

/// Why a connection did not get to transmission.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The client closed its side.
    #[error("the client hung up")]
    Gone,
    /// It took too long.
    #[error("no end of the handshake within {} s", .0.as_secs())]
    TooSlow(Duration),
    /// It broke a rule, or said goodbye.
    #[error("{0}")]
    Closed(CloseReason),
    /// No TLS came about: no certificate, a wrong one, or no TLS at all.
    #[error("the TLS handshake failed: {0}")]
    Tls(io::Error),
    /// The daemon is stopping.
    #[error("the daemon is stopping")]
    Stopping,
    /// The socket failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// What one part of a handshake came to.
pub(super) enum Negotiated {
    /// Transmission: what was agreed, and the bytes the client sent ahead.
    Entered(Session, Vec<u8>),
    /// The client waits for a TLS handshake; the rest is negotiated inside.
    StartTls(Box<Handshake>),
}

/// Does the server's side of a handshake, or of what is left of it. `out` holds what has to be said first.
pub(super) async fn negotiate<S, C>(
    stream: &mut S,
    mut handshake: Box<Handshake>,
    mut out: Vec<u8>,
    catalog: &C,
    stop: &mut watch::Receiver<bool>,
) -> Result<Negotiated, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    C: ExportCatalog,
{
    let mut buffer = [0; READ_BYTES];
    loop {
        let step = handshake.step(&mut out);
        if !out.is_empty() {
            stream.write_all(&out).await?;
            // Records of TLS may be kept back otherwise.
            stream.flush().await?;
            out.clear();
            // A long list is not worth keeping the room for.
            out.shrink_to(READ_BYTES);
        }
        match step {
            Step::NeedInput => {
                let read = tokio::select! {
                    read = stream.read(&mut buffer) => read?,
                    _ = stop.wait_for(|stop| *stop) => return Err(HandshakeError::Stopping),
                };
                if read == 0 {
                    return Err(HandshakeError::Gone);
                }
                handshake.feed(&buffer[..read]);
            }
            Step::Resolve(name) => {
                let resolution = match catalog.lookup(&name).await {
                    Ok(Some(export)) => Resolution::Found(export),
                    Ok(None) => Resolution::Unknown,
                    Err(error) => refusal(error),
                };
                handshake.resolved(resolution, &mut out);
            }
            Step::List => match catalog.list().await {
                Ok(exports) => handshake.listed(Ok(&exports), &mut out),
                Err(error) => handshake.listed(Err(refusal(error)), &mut out),
            },
            Step::Enter(session) => {
                return Ok(Negotiated::Entered(session, handshake.into_leftover()));
            }
            Step::Close(reason) => {
                if reason == CloseReason::Aborted {
                    linger(stream).await;
                }
                return Err(HandshakeError::Closed(reason));
            }
            Step::StartTls => return Ok(Negotiated::StartTls(handshake)),
        }
    }
}

fn refusal(error: CatalogError) -> Resolution {
    match error {
        CatalogError::ShuttingDown => Resolution::ShuttingDown,
        CatalogError::Unavailable(text) => Resolution::Unavailable(text),
        CatalogError::Forbidden(text) => Resolution::Forbidden(text),
    }
}

/// Lets the client read our last words: a socket closed with unread input sends a reset.
async fn linger<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) {
    let drain = async {
        stream.shutdown().await?;
        let mut buffer = [0; READ_BYTES];
        let mut left = LINGER_BYTES;
        while left > 0 {
            match stream.read(&mut buffer).await? {
                0 => break,
                read => left = left.saturating_sub(read),
            }
        }
        io::Result::Ok(())
    };
    // The client may be gone, or stay for ever; either way we are done.
    let _ = tokio::time::timeout(LINGER, drain).await;
}
