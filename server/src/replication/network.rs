//! Links over TCP with mutual TLS: who listens, who connects, and who is let in.
//!
//! A peer is a node of this cluster, named by its certificate, or it learns nothing: the handshake fails before any
//! message of ours is sent.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ashlar_core::records::{LinkRecord, Record, SpaceRecord, Transaction, keys};
use ashlar_core::units::{NodeId, StoreId};
use async_trait::async_trait;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::links::{Dial, GREETING_TIME, LinkRefused, accept, greet};
use crate::config::HostPort;
use crate::data::{DataPlane, LinkEnds, LinkPeer};
use crate::identity::{Identity, IdentityError, Peer};
use crate::meta::{self, MetadataError, MetadataStore};
use crate::stream::Stream;

/// Links whose beginning is under way at once, from whoever connects.
const GREETINGS_AT_ONCE: usize = 64;
/// How often the room of the stores is told to the others; that they change is also the sign that this node is alive.
const TELL_SPACE: Duration = Duration::from_secs(5);

/// Why this node's links cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum LinkListenError {
    /// The socket.
    #[error("--listen-link {address}: {source}")]
    Bind {
        /// Where.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// Nobody could find it.
    #[error(
        "a node of a cluster needs an address for links: give --listen-link HOST:PORT, or --listen-admin tcp:HOST:PORT with a host that others can reach"
    )]
    NoAddress,
    /// Its certificate.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Telling the others.
    #[error(transparent)]
    Records(#[from] MetadataError),
}

/// Reaches the stores of this cluster's other nodes.
pub struct Network {
    identity: Arc<Identity>,
    records: Arc<dyn MetadataStore>,
}

impl Network {
    /// Connects as this node; where the others are stands in `records`.
    pub fn new(identity: Arc<Identity>, records: Arc<dyn MetadataStore>) -> Network {
        Network { identity, records }
    }

    async fn connect(&self, node: NodeId, store: StoreId) -> Result<LinkEnds, LinkRefused> {
        let record = meta::read::<LinkRecord>(&*self.records, &keys::link(node)).await;
        let record = record.map_err(|error| io::Error::other(error.to_string()))?;
        let address = record.ok_or(LinkRefused::NoAddress(node))?.record.address;
        let socket = TcpStream::connect(&address).await?;
        prepare(&socket)?;
        let client = self.identity.link_client(node);
        let client = client.map_err(|error| io::Error::other(error.to_string()))?;
        let mut stream = TlsConnector::from(client.config)
            .connect(client.name, socket)
            .await?;
        let cluster = self.identity.cluster().0;
        greet(&mut stream, cluster, self.identity.node(), node, store).await?;
        let (socket, session) = stream.into_inner();
        let guard = self.identity.sessions().enter(&Peer::Node(node), &socket)?;
        // It may have been shut out between the handshake and the line above.
        let trusted = self.identity.trust().check(&Peer::Node(node));
        trusted.map_err(io::Error::other)?;
        let peer = LinkPeer {
            node,
            store,
            address,
        };
        Ok(LinkEnds {
            peer,
            stream: Stream::tls(socket.into_std()?.into(), session.into()),
            leftover: Vec::new(),
            session: Some(guard),
        })
    }
}

#[async_trait]
impl Dial for Network {
    async fn dial(&self, node: NodeId, store: StoreId) -> Result<LinkEnds, LinkRefused> {
        let connect = self.connect(node, store);
        tokio::time::timeout(GREETING_TIME, connect)
            .await
            .unwrap_or(Err(LinkRefused::TooSlow))
    }
}

fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    // Several writes of the largest size, so that a busy link is not cut into small pieces.
    let sizes = socket2::SockRef::from(socket);
    let _ = sizes.set_send_buffer_size(4 << 20);
    let _ = sizes.set_recv_buffer_size(4 << 20);
    Ok(())
}

/// Listens for the heads of other nodes until told to stop, and tells the others where. `wanted`: from the settings;
/// `fallback`: the host that others reach this node's admin interface by.
pub async fn listen(
    identity: Arc<Identity>,
    plane: DataPlane,
    records: Arc<dyn MetadataStore>,
    wanted: Option<HostPort>,
    fallback: Option<HostPort>,
    stop: watch::Receiver<bool>,
) -> Result<(), LinkListenError> {
    let address = wanted
        .or_else(|| fallback.map(|host| HostPort { port: 0, ..host }))
        .ok_or(LinkListenError::NoAddress)?;
    let text = address.to_string();
    let listener = TcpListener::bind((address.host.as_str(), address.port)).await;
    let failed = |source| LinkListenError::Bind {
        address: text.clone(),
        source,
    };
    let listener = listener.map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    let told = HostPort { port, ..address }.to_string();
    let record = LinkRecord {
        node: identity.node(),
        address: told.clone(),
    };
    let put = Transaction::new().put(keys::link(identity.node()), record.encode());
    records.commit(put).await?;
    tracing::info!(address = told, "links of other nodes are accepted");
    let acceptor = TlsAcceptor::from(identity.link_server()?);
    tokio::spawn(tell_space(
        identity.node(),
        plane.clone(),
        records,
        stop.clone(),
    ));
    tokio::spawn(serve(identity, plane, listener, acceptor, stop));
    Ok(())
}

async fn serve(
    identity: Arc<Identity>,
    plane: DataPlane,
    listener: TcpListener,
    acceptor: TlsAcceptor,
    mut stop: watch::Receiver<bool>,
) {
    let greetings = Arc::new(tokio::sync::Semaphore::new(GREETINGS_AT_ONCE));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        let (socket, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a link could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = greetings.clone().try_acquire_owned() else {
            tracing::debug!(%address, "too many links are beginning; one is turned away");
            continue;
        };
        let (identity, plane, acceptor) = (identity.clone(), plane.clone(), acceptor.clone());
        tokio::spawn(async move {
            let _place = place;
            let welcome = welcome(&identity, &plane, &acceptor, socket, address.to_string());
            match tokio::time::timeout(GREETING_TIME, welcome).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::info!(%address, %error, "a link was refused"),
                Err(_) => tracing::info!(%address, "a link did not begin in time"),
            }
        });
    }
}

async fn welcome(
    identity: &Arc<Identity>,
    plane: &DataPlane,
    acceptor: &TlsAcceptor,
    socket: TcpStream,
    address: String,
) -> Result<(), LinkRefused> {
    prepare(&socket)?;
    let mut stream = acceptor.accept(socket).await?;
    let peer = identity.peer(stream.get_ref().1.peer_certificates());
    let Some(peer @ Peer::Node(node)) = peer else {
        return Err(LinkRefused::Stranger("the peer is not a node"));
    };
    let is_ours = |store| plane.stores().iter().any(|known| known.id == store);
    let cluster = identity.cluster().0;
    let store = accept(&mut stream, cluster, identity.node(), node, is_ours).await?;
    let (socket, session) = stream.into_inner();
    let guard = identity.sessions().enter(&peer, &socket)?;
    let trusted = identity.trust().check(&peer);
    trusted.map_err(io::Error::other)?;
    let ends = LinkEnds {
        peer: LinkPeer {
            node,
            store,
            address,
        },
        stream: Stream::tls(socket.into_std()?.into(), session.into()),
        leftover: Vec::new(),
        session: Some(guard),
    };
    plane
        .link_accepted(ends)
        .map_err(|error| io::Error::other(error.to_string()).into())
}

/// How much room this node's stores have.
pub(crate) async fn space_records(node: NodeId, plane: &DataPlane) -> Vec<SpaceRecord> {
    let reports = plane.store_statuses().await.into_iter();
    let record = reports.map(|report| {
        let status = &report.status;
        let free_blocks = if status.poisoned.is_some() {
            0
        } else {
            status.capacity_blocks.saturating_sub(status.used_blocks)
        };
        SpaceRecord {
            store: report.id,
            node,
            capacity_blocks: status.capacity_blocks,
            free_blocks,
            at_unix_ms: crate::volumes::unix_ms(),
        }
    });
    record.collect()
}

/// Tells the others how much room this node's stores have.
async fn tell_space(
    node: NodeId,
    plane: DataPlane,
    records: Arc<dyn MetadataStore>,
    mut stop: watch::Receiver<bool>,
) {
    loop {
        for record in space_records(node, &plane).await {
            let put = Transaction::new().put(keys::space(record.store), record.encode());
            if let Err(error) = records.commit(put).await {
                tracing::debug!(%error, "the room of a store could not be told");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(TELL_SPACE) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}
