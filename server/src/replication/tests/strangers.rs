//! A peer with a sound certificate that does what no head does.

use std::io::{Read, Write};

use ashlar_core::replication::wire::{HEADER_BYTES, Header, Kind, OpenBody, Status};
use ashlar_core::store::ExtentKey;
use ashlar_core::units::{ChunkIndex, Version, VolumeId};

use super::*;

/// The peer's end of a link to a daemon's store.
struct Peer {
    node: NodeId,
    stream: UnixStream,
}

impl Peer {
    fn reach(daemon: &Daemon) -> Peer {
        let (near, far) = UnixStream::pair().expect("a pair");
        far.set_nonblocking(true).expect("non-blocking");
        near.set_read_timeout(Some(PATIENCE)).expect("a limit");
        let node = NodeId(Uuid::from_u128(77));
        let peer = LinkPeer {
            node,
            store: daemon.plane.stores()[0].id,
            address: "pair".to_owned(),
        };
        let ends = LinkEnds {
            peer,
            stream: Stream::Plain(far.into()),
            leftover: Vec::new(),
            session: None,
        };
        daemon.plane.link_accepted(ends).expect("taken");
        Peer { node, stream: near }
    }

    /// What it is answered, by its status.
    fn ask(&mut self, header: &Header, body: &[u8]) -> (Kind, Status) {
        self.stream.write_all(&header.encode()).expect("sent");
        self.stream.write_all(body).expect("sent");
        let mut bytes = [0; HEADER_BYTES];
        self.stream.read_exact(&mut bytes).expect("an answer");
        let answer = Header::decode(&bytes).expect("an answer");
        assert_eq!((answer.op, answer.body_bytes), (header.op, 0));
        (answer.kind, answer.status)
    }

    fn open(&mut self, session: u32, volume: VolumeId, layer: LayerId) -> (Kind, Status) {
        let claim = HeadClaim {
            node: self.node,
            incarnation: Uuid::from_u128(5),
        };
        let body = OpenBody {
            volume,
            claim,
            opening: 1,
        }
        .encode();
        let mut header = Header::new(Kind::Open).with_body(&body);
        header.session = session;
        header.epoch = Epoch(1);
        header.extent.layer = layer;
        self.ask(&header, &body)
    }

    fn zero(&mut self, session: u32, layer: LayerId) -> (Kind, Status) {
        let mut header = Header::new(Kind::Zero);
        header.session = session;
        header.epoch = Epoch(1);
        header.op = 9;
        header.extent = ExtentKey {
            layer,
            chunk: ChunkIndex(0),
        };
        header.count = 1;
        header.version = Version::new(Epoch(1000), 1);
        self.ask(&header, &[])
    }
}

/// Who may open some volume may not change another one through it: that one's acceptor was never asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_reaches_no_blocks_but_those_of_its_volume() {
    let cluster = Cluster::new().await;
    let mut one = cluster.daemon(1).await;
    let two = cluster.daemon(2).await;
    cluster.volume(&[&one, &two]).await;
    cluster.open(&mut one).await;
    let plane = one.plane.clone();
    let mut client = blocking(move || {
        let mut client = Client::attach(&plane, ReplyStyle::Extended, SIZE);
        client.write(0, 0, &[7; 4096]);
        client
    })
    .await;
    let (another, its_layer, layer) = (VolumeId(Uuid::from_u128(66)), LayerId(66), LayerId(1));
    let mut peer = Peer::reach(&two);
    client = blocking(move || {
        let refused = (Kind::Opened, Status::Refused);
        assert_eq!(peer.open(1, another, layer), refused, "a layer of another");
        assert_eq!(peer.open(2, VOLUME, its_layer), refused, "not its layer");
        let opened = (Kind::Opened, Status::Ok);
        assert_eq!(peer.open(3, another, its_layer), opened);
        let done = |status| (Kind::Done, status);
        assert_eq!(peer.zero(3, layer), done(Status::Refused));
        assert_eq!(peer.zero(3, its_layer), done(Status::Ok));
        // The volume's own head goes on.
        client.write(0, 4096, &[8; 4096]);
        client
    })
    .await;
    drop(client);
    let mut two = two;
    cluster.stop(&one);
    one.plane.drain().await;
    cluster.open_alone(&mut two).await;
    let plane = two.plane.clone();
    blocking(move || {
        let mut client = Client::attach(&plane, ReplyStyle::Extended, SIZE);
        assert_eq!(client.read(0, 4096), [7; 4096]);
        assert_eq!(client.read(4096, 4096), [8; 4096]);
    })
    .await;
    two.plane.drain().await;
}
