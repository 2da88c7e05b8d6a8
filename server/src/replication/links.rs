//! The beginning of a link: who connects, to which store, and whether that is allowed. After the greeting the connection
//! goes to a data thread.

use std::io;
use std::time::Duration;

use ashlar_core::replication::wire::{HEADER_BYTES, Header, Hello, Kind, Status, WireError};
use ashlar_core::units::{NodeId, StoreId};
use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use uuid::Uuid;

use crate::data::{LinkEnds, greeting};

/// How long the whole beginning of a link may take, encryption included.
pub const GREETING_TIME: Duration = Duration::from_secs(5);

/// Reaches the stores of other daemons.
#[async_trait]
pub trait Dial: Send + Sync + 'static {
    /// One try.
    async fn dial(&self, node: NodeId, store: StoreId) -> Result<LinkEnds, LinkRefused>;
}

/// A daemon of its own: there is nobody to reach.
#[derive(Debug)]
pub struct NoPeers;

#[async_trait]
impl Dial for NoPeers {
    async fn dial(&self, node: NodeId, _: StoreId) -> Result<LinkEnds, LinkRefused> {
        Err(LinkRefused::NoAddress(node))
    }
}

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum LinkRefused {
    /// Nobody knows where the node is.
    #[error("no address of node {} is known", .0.0)]
    NoAddress(NodeId),
    /// It cannot be reached, or who answers is not that node.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Who answers does not speak our protocol.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// Who answers is another node, or of another cluster, or wants another one.
    #[error("{0}")]
    Stranger(&'static str),
    /// It said no.
    #[error("the peer refused: {0}")]
    Refused(Status),
    /// It took too long.
    #[error("no greeting within {} s", GREETING_TIME.as_secs())]
    TooSlow,
}

/// Says hello over a connection to `node`, which its certificate has named, and hears its welcome.
pub async fn greet<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    cluster: Uuid,
    from: NodeId,
    node: NodeId,
    store: StoreId,
) -> Result<(), LinkRefused> {
    let hello = Hello {
        cluster,
        node: from,
        store,
    };
    stream.write_all(&greeting(Kind::Hello, &hello)).await?;
    stream.flush().await?;
    let (header, body) = read_message(stream).await?;
    if header.kind != Kind::Welcome {
        return Err(LinkRefused::Stranger("the peer does not answer a hello"));
    }
    if header.status != Status::Ok {
        return Err(LinkRefused::Refused(header.status));
    }
    let welcome = Hello::decode(&header, &body)?;
    if welcome.cluster != cluster || welcome.node != node || welcome.store != store {
        return Err(LinkRefused::Stranger("the peer is not whom we wanted"));
    }
    Ok(())
}

/// Hears the hello of `peer`, which its certificate has named, and answers it. `is_ours`: whether a store is one of
/// this daemon's. The store that is wanted.
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    cluster: Uuid,
    this: NodeId,
    peer: NodeId,
    is_ours: impl FnOnce(StoreId) -> bool,
) -> Result<StoreId, LinkRefused> {
    let (header, body) = read_message(stream).await?;
    if header.kind != Kind::Hello {
        return Err(LinkRefused::Stranger("the peer does not say hello"));
    }
    let hello = Hello::decode(&header, &body)?;
    let refusal = if hello.cluster != cluster {
        Some("the peer is of another cluster")
    } else if hello.node != peer {
        Some("the peer is not the node that its certificate names")
    } else if !is_ours(hello.store) {
        Some("the peer wants a store that is not here")
    } else {
        None
    };
    if let Some(refusal) = refusal {
        let mut no = Header::new(Kind::Welcome);
        no.status = Status::Refused;
        stream.write_all(&no.encode()).await?;
        stream.flush().await?;
        return Err(LinkRefused::Stranger(refusal));
    }
    let welcome = Hello {
        cluster,
        node: this,
        store: hello.store,
    };
    stream.write_all(&greeting(Kind::Welcome, &welcome)).await?;
    stream.flush().await?;
    Ok(hello.store)
}

/// Reads exactly one message, and not a byte more.
async fn read_message<S: AsyncRead + Unpin>(
    stream: &mut S,
) -> Result<(Header, Vec<u8>), LinkRefused> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).await?;
    let header = Header::decode(&header)?;
    if !matches!(header.kind, Kind::Hello | Kind::Welcome) {
        return Err(LinkRefused::Stranger("the peer does not greet"));
    }
    let mut body = vec![0; header.body_bytes as usize];
    stream.read_exact(&mut body).await?;
    Ok((header, body))
}
