//! Accepts connections and keeps those in the handshake few and short.

use super::driver::{HandshakeError, Negotiated, negotiate};
use super::interface::{Attach, AttachedClient, ConnectionCount, ConnectionSlot, ExportCatalog};
use super::socket::{Bound, BoundSocket, OwnedPath};
use crate::identity::{Admitted, Identity, IdentityError, Peer};
use crate::stream::Stream;
use ashlar_core::nbd::handshake::{CloseReason, Handshake, Limits, TlsMode};
use ashlar_core::nbd::session::Session;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

/// How long to leave the listening socket alone when the process has no descriptor or memory for a connection.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// Replies that may lie in a Unix socket. A full one says that it may be written to again only when it is nearly empty,
/// so with the system's default of 208 KiB a reader of large pieces and we would wait for each other by turns.
const UNIX_SEND_BYTES: usize = 1 << 20;

/// What clients may cost before they are known.
#[derive(Clone, Copy, Debug)]
pub struct ListenerConfig {
    /// From accept to the end of the handshake.
    pub handshake_timeout: Duration,
    /// Handshakes at a time. One more waits for a place.
    pub max_handshakes: usize,
    /// Where nobody gives up a place, the oldest handshake is ended, but not before it was this old: a client that
    /// means it is done in milliseconds, so what is old and idle is what floods us.
    pub handshake_grace: Duration,
    /// Per handshake.
    pub limits: Limits,
}

impl Default for ListenerConfig {
    fn default() -> ListenerConfig {
        ListenerConfig {
            handshake_timeout: Duration::from_secs(10),
            max_handshakes: 128,
            handshake_grace: Duration::from_secs(1),
            limits: Limits::default(),
        }
    }
}

/// What happened at the door, counted since the start.
#[derive(Debug, Default)]
pub struct ListenerStats {
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Of those, handed to the data threads.
    pub established: AtomicU64,
    /// Closed at once: the daemon has its limit of connections.
    pub over_limit: AtomicU64,
    /// Closed in the handshake to make room for a newer one.
    pub evicted: AtomicU64,
    /// Not done with the handshake in time.
    pub too_slow: AtomicU64,
    /// Broke the protocol in the handshake.
    pub malformed: AtomicU64,
}

impl ListenerStats {
    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// How connections over TCP are secured, in a cluster: on loopback where a client asks for it, beyond always.
#[derive(Clone)]
pub struct Security {
    acceptor: TlsAcceptor,
    identity: Arc<Identity>,
}

impl Security {
    /// With the certificates of this node.
    pub fn new(identity: Arc<Identity>) -> Result<Security, IdentityError> {
        let config = identity.server(Admitted::Volumes, &[])?;
        Ok(Security {
            acceptor: TlsAcceptor::from(config),
            identity,
        })
    }
}

/// What one listening socket does about TLS.
#[derive(Clone)]
enum Tls {
    Off,
    Offered(Security),
    Required(Security),
}

struct Shared<C, A> {
    catalog: Arc<C>,
    attach: Arc<A>,
    config: ListenerConfig,
    connections: ConnectionCount,
    stats: Arc<ListenerStats>,
    /// One permit for each handshake under way.
    places: Arc<Semaphore>,
    /// The handshakes under way, oldest first; those that ended are weeded out when the next begins.
    handshakes: Mutex<VecDeque<(Instant, AbortHandle)>>,
    stop: watch::Receiver<bool>,
}

impl<C, A> Shared<C, A> {
    fn under_way(&self) -> MutexGuard<'_, VecDeque<(Instant, AbortHandle)>> {
        self.handshakes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for room for one more handshake, and makes it where there is none.
    async fn place(&self) -> OwnedSemaphorePermit {
        let grace = self.config.handshake_grace;
        // The place of a handshake just ended comes free a moment later; no other one goes before that.
        let mut not_before = Instant::now();
        loop {
            let oldest = {
                let mut under_way = self.under_way();
                under_way.retain(|(_, handshake)| !handshake.is_finished());
                under_way.front().map(|(since, _)| *since)
            };
            let until = not_before.max(oldest.unwrap_or_else(Instant::now) + grace);
            let place = Arc::clone(&self.places).acquire_owned();
            match tokio::time::timeout_at(until, place).await {
                Ok(Ok(place)) => return place,
                Ok(Err(_)) => unreachable!("the semaphore is never closed"),
                Err(_) => {
                    // Only the one that was looked at: another loop may have ended it already.
                    let mut under_way = self.under_way();
                    if under_way.front().map(|(since, _)| *since) == oldest
                        && let Some((_, handshake)) = under_way.pop_front()
                    {
                        handshake.abort();
                        ListenerStats::count(&self.stats.evicted);
                    }
                    not_before = Instant::now() + grace;
                }
            }
        }
    }
}

/// The sockets that listen for NBD clients.
pub struct Listeners {
    stop: watch::Sender<bool>,
    loops: JoinSet<()>,
    addresses: Vec<String>,
}

impl Listeners {
    /// Starts to accept. Call it inside a tokio runtime.
    pub fn start<C: ExportCatalog, A: Attach>(
        sockets: Vec<Bound>,
        catalog: Arc<C>,
        attach: Arc<A>,
        config: ListenerConfig,
        connections: ConnectionCount,
        stats: Arc<ListenerStats>,
        security: Option<Security>,
    ) -> io::Result<Listeners> {
        let (stop, stopped) = watch::channel(false);
        let shared = Arc::new(Shared {
            catalog,
            attach,
            config,
            connections,
            stats,
            places: Arc::new(Semaphore::new(config.max_handshakes.max(1))),
            handshakes: Mutex::default(),
            stop: stopped,
        });
        let mut loops = JoinSet::new();
        let mut addresses = Vec::new();
        for bound in sockets {
            addresses.push(bound.to_string());
            match bound.socket {
                BoundSocket::Unix(listener, path) => {
                    let listener = UnixDoor(UnixListener::from_std(listener)?, path);
                    loops.spawn(accept_loop(listener, Tls::Off, Arc::clone(&shared)));
                }
                BoundSocket::Tcp(listener) => {
                    let is_near = listener.local_addr()?.ip().is_loopback();
                    let listener = TcpListener::from_std(listener)?;
                    let tls = match (&security, is_near) {
                        (None, _) => Tls::Off,
                        (Some(security), true) => Tls::Offered(security.clone()),
                        (Some(security), false) => Tls::Required(security.clone()),
                    };
                    loops.spawn(accept_loop(listener, tls, Arc::clone(&shared)));
                }
            }
        }
        Ok(Listeners {
            stop,
            loops,
            addresses,
        })
    }

    /// Where it listens, as `unix:PATH` or `tcp:ADDRESS:PORT`.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Accepts no more, ends the handshakes under way and removes the paths of Unix sockets. Established connections
    /// are not touched.
    pub async fn stop(mut self) {
        let _ = self.stop.send(true);
        while self.loops.join_next().await.is_some() {}
    }
}

/// What a listening socket can do.
trait Door: Send + 'static {
    type Stream: Caller;

    fn accept(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

/// What a connected socket can do.
trait Caller: AsyncRead + AsyncWrite + AsFd + Unpin + Send + 'static {
    /// Small replies leave at once; a peer that vanished is noticed.
    fn tune(&self) -> io::Result<()>;

    fn peer(&self) -> String;

    fn into_fd(self) -> io::Result<OwnedFd>;
}

/// A listener, and the path to remove when it is gone.
struct UnixDoor(
    UnixListener,
    #[expect(dead_code, reason = "dropped with it")] Option<OwnedPath>,
);

impl Door for UnixDoor {
    type Stream = UnixStream;

    async fn accept(&self) -> io::Result<UnixStream> {
        self.0.accept().await.map(|(stream, _)| stream)
    }
}

impl Door for TcpListener {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<TcpStream> {
        TcpListener::accept(self).await.map(|(stream, _)| stream)
    }
}

impl Caller for UnixStream {
    fn tune(&self) -> io::Result<()> {
        // Beyond net.core.wmem_max where the process may, else as far as that goes.
        if rustix::net::sockopt::set_socket_send_buffer_size_force(self, UNIX_SEND_BYTES).is_ok() {
            return Ok(());
        }
        socket2::SockRef::from(self).set_send_buffer_size(UNIX_SEND_BYTES)
    }

    fn peer(&self) -> String {
        match self.peer_cred() {
            Ok(who) => match who.pid() {
                Some(pid) => format!("unix:pid={pid},uid={}", who.uid()),
                None => format!("unix:uid={}", who.uid()),
            },
            Err(_) => "unix".to_owned(),
        }
    }

    fn into_fd(self) -> io::Result<OwnedFd> {
        self.into_std().map(OwnedFd::from)
    }
}

impl Caller for TcpStream {
    fn tune(&self) -> io::Result<()> {
        self.set_nodelay(true)?;
        socket2::SockRef::from(self).set_keepalive(true)
    }

    fn peer(&self) -> String {
        match self.peer_addr() {
            Ok(address) => format!("tcp:{address}"),
            Err(_) => "tcp".to_owned(),
        }
    }

    fn into_fd(self) -> io::Result<OwnedFd> {
        self.into_std().map(OwnedFd::from)
    }
}

async fn accept_loop<D: Door, C: ExportCatalog, A: Attach>(
    door: D,
    tls: Tls,
    shared: Arc<Shared<C, A>>,
) {
    let mut stop = shared.stop.clone();
    let mut handshakes = JoinSet::new();
    let mut full = false;
    loop {
        let accepted = tokio::select! {
            accepted = door.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
            // Reap what has ended, so that the set does not grow.
            Some(_) = handshakes.join_next() => continue,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) if is_exhaustion(&error) => {
                tracing::warn!(%error, "cannot accept NBD connections for now");
                tokio::time::sleep(EXHAUSTED_PAUSE).await;
                continue;
            }
            // The client was gone before we looked.
            Err(error) => {
                tracing::debug!(%error, "an NBD connection failed before it was accepted");
                continue;
            }
        };
        ListenerStats::count(&shared.stats.accepted);
        let Some(slot) = shared.connections.try_slot() else {
            ListenerStats::count(&shared.stats.over_limit);
            if !std::mem::replace(&mut full, true) {
                tracing::warn!(
                    open = shared.connections.open(),
                    "the limit of connections is reached; new NBD connections are closed"
                );
            }
            continue;
        };
        full = false;
        let place = tokio::select! {
            place = shared.place() => place,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        let task = handshakes.spawn(welcome(
            stream,
            tls.clone(),
            slot,
            place,
            Arc::clone(&shared),
        ));
        let mut under_way = shared.under_way();
        under_way.retain(|(_, handshake)| !handshake.is_finished());
        under_way.push_back((Instant::now(), task));
    }
    // Each notices `stop` where it waits for its client; a look-up under way is given its time.
    drop(door);
    while handshakes.join_next().await.is_some() {}
}

fn is_exhaustion(error: &io::Error) -> bool {
    use rustix::io::Errno;
    Errno::from_io_error(error).is_some_and(|errno| {
        [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM].contains(&errno)
    })
}

/// What a handshake came to.
struct Agreed<S> {
    stream: S,
    session: Session,
    leftover: Vec<u8>,
    tls: Option<rustls::ServerConnection>,
    certified: Option<crate::identity::Session>,
    /// In the client's certificate.
    name: Option<Peer>,
}

/// Negotiates, in the clear and then, where that is asked for, inside TLS.
async fn agree<S: Caller, C: ExportCatalog, A: Attach>(
    mut stream: S,
    tls: Tls,
    shared: &Shared<C, A>,
) -> Result<Agreed<S>, HandshakeError> {
    let mut stop = shared.stop.clone();
    stream.tune()?;
    let (mode, security) = match &tls {
        Tls::Off => (TlsMode::Off, None),
        Tls::Offered(security) => (TlsMode::Offered, Some(security)),
        Tls::Required(security) => (TlsMode::Required, Some(security)),
    };
    let mut out = Vec::new();
    let handshake = Box::new(Handshake::new(mode, shared.config.limits, &mut out));
    let catalog = &*shared.catalog;
    let first = negotiate(&mut stream, handshake, out, catalog, &mut stop).await?;
    let mut handshake = match first {
        Negotiated::Entered(session, leftover) => {
            return Ok(Agreed {
                stream,
                session,
                leftover,
                tls: None,
                certified: None,
                name: None,
            });
        }
        Negotiated::StartTls(handshake) => handshake,
    };
    let Some(security) = security else {
        return Err(HandshakeError::Tls(io::ErrorKind::Unsupported.into()));
    };
    let mut secured = tokio::select! {
        accepted = security.acceptor.accept(stream) => accepted.map_err(HandshakeError::Tls)?,
        _ = stop.wait_for(|stop| *stop) => return Err(HandshakeError::Stopping),
    };
    let (socket, connection) = secured.get_ref();
    let name = security
        .identity
        .peer(connection.peer_certificates())
        .ok_or_else(|| HandshakeError::Tls(io::ErrorKind::InvalidData.into()))?;
    let session = security.identity.sessions().enter(&name, socket)?;
    // It may have been shut out between the handshake and the line above.
    let trusted = security.identity.trust().check(&name);
    trusted.map_err(|error| HandshakeError::Tls(io::Error::other(error)))?;
    handshake.tls_established();
    match negotiate(&mut secured, handshake, Vec::new(), catalog, &mut stop).await? {
        Negotiated::Entered(agreed, leftover) => {
            let (stream, connection) = secured.into_inner();
            Ok(Agreed {
                stream,
                session: agreed,
                leftover,
                tls: Some(connection),
                certified: Some(session),
                name: Some(name),
            })
        }
        // The machine refuses a second STARTTLS.
        Negotiated::StartTls(_) => Err(HandshakeError::Tls(io::ErrorKind::InvalidData.into())),
    }
}

/// One connection, from accept to the data threads.
async fn welcome<S: Caller, C: ExportCatalog, A: Attach>(
    stream: S,
    tls: Tls,
    slot: ConnectionSlot,
    _place: OwnedSemaphorePermit,
    shared: Arc<Shared<C, A>>,
) {
    let peer = stream.peer();
    let timeout = shared.config.handshake_timeout;
    let agreed = match tokio::time::timeout(timeout, agree(stream, tls, &shared)).await {
        Ok(agreed) => agreed,
        Err(_) => Err(HandshakeError::TooSlow(timeout)),
    };
    let agreed = match agreed {
        Ok(agreed) => agreed,
        Err(error) => {
            match &error {
                HandshakeError::TooSlow(_) => ListenerStats::count(&shared.stats.too_slow),
                HandshakeError::Closed(CloseReason::Aborted) => {}
                HandshakeError::Closed(_) | HandshakeError::Tls(_) => {
                    ListenerStats::count(&shared.stats.malformed);
                }
                HandshakeError::Gone | HandshakeError::Stopping | HandshakeError::Io(_) => {}
            }
            return tracing::debug!(peer, %error, "an NBD handshake ended without a session");
        }
    };
    let peer = match &agreed.name {
        Some(name) => format!("{peer} ({name})"),
        None => peer,
    };
    let volume = agreed.session.volume;
    let attached = agreed.stream.into_fd().map(|stream| {
        shared.attach.attach(AttachedClient {
            stream: match agreed.tls {
                Some(connection) => Stream::tls(stream, connection.into()),
                None => Stream::Plain(stream),
            },
            session: agreed.session,
            leftover: agreed.leftover,
            peer: peer.clone(),
            certified: agreed.certified,
            slot,
        })
    });
    match attached {
        Ok(Ok(())) => {
            ListenerStats::count(&shared.stats.established);
            tracing::debug!(peer, volume = %volume.0, "an NBD client is attached");
        }
        Ok(Err(error)) => {
            tracing::warn!(peer, volume = %volume.0, %error, "an NBD client was not attached")
        }
        Err(error) => tracing::debug!(peer, %error, "an NBD client was lost"),
    }
}
