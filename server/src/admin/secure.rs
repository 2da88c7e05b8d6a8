//! The admin interface over TCP in a cluster: TLS on every connection, and who is on the other side of it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tonic::{Request, Status};

use crate::identity::{Admitted, Identity, Peer, Session};

/// Handshakes at once; the rest wait in the kernel's queue.
const HANDSHAKES_MAX: usize = 64;
/// Longest that a handshake takes.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the listening socket is left alone after it failed.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// What is spoken inside.
const ALPN: &[&[u8]] = &[b"h2"];

/// Who calls over a secured connection.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    /// `None`: somebody without a certificate.
    pub(super) peer: Option<Peer>,
}

/// Refuses a call that is not for everybody. Callers on the Unix socket, and on a plain one of a single node, are its
/// owner and say nothing about themselves.
pub(super) fn admitted<T>(request: &Request<T>) -> Result<(), Status> {
    match request.extensions().get::<Caller>() {
        Some(Caller { peer: None }) => Err(Status::permission_denied(
            "this needs a certificate of the cluster's authority; `ashlar cluster client-cert NAME --role admin` makes one",
        )),
        Some(Caller { peer: Some(_) }) | None => Ok(()),
    }
}

/// A connection whose handshake is done.
pub(super) struct Secured {
    stream: TlsStream<TcpStream>,
    peer: Option<Peer>,
    /// Cuts the connection when its peer is shut out.
    _session: Option<Session>,
}

/// Accepts connections and makes their handshakes beside each other. A client that is slow or wrong holds nobody up.
pub(super) fn incoming(
    listener: TcpListener,
    identity: Arc<Identity>,
) -> io::Result<impl Stream<Item = io::Result<Secured>>> {
    let config = identity.server(Admitted::Admin, ALPN);
    let acceptor = TlsAcceptor::from(config.map_err(io::Error::other)?);
    let (ready, secured) = mpsc::channel(1);
    tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else {
                return;
            };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = ready.closed() => return,
            };
            let socket = match accepted {
                Ok((socket, _)) => socket,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an admin connection for now");
                    tokio::time::sleep(EXHAUSTED_PAUSE).await;
                    continue;
                }
            };
            let (acceptor, identity, ready) = (acceptor.clone(), identity.clone(), ready.clone());
            tokio::spawn(async move {
                let _place = place;
                let handshake = secure(socket, &acceptor, &identity);
                match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
                    Ok(Ok(secured)) => drop(ready.send(Ok(secured)).await),
                    Ok(Err(error)) => tracing::debug!(%error, "an admin connection was refused"),
                    Err(_) => tracing::debug!("an admin connection took too long to begin"),
                }
            });
        }
    });
    Ok(ReceiverStream::new(secured))
}

async fn secure(
    socket: TcpStream,
    acceptor: &TlsAcceptor,
    identity: &Identity,
) -> io::Result<Secured> {
    socket.set_nodelay(true)?;
    let stream = acceptor.accept(socket).await?;
    let (socket, tls) = stream.get_ref();
    let peer = identity.peer(tls.peer_certificates());
    let session = match &peer {
        Some(peer) => {
            let session = identity.sessions().enter(peer, socket)?;
            // It may have been shut out between the handshake and the line above.
            identity.trust().check(peer).map_err(io::Error::other)?;
            Some(session)
        }
        None => None,
    };
    Ok(Secured {
        stream,
        peer,
        _session: session,
    })
}

impl Connected for Secured {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        Caller {
            peer: self.peer.clone(),
        }
    }
}

impl AsyncRead for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
