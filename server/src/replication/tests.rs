//! Daemons of one cluster in one process: real stores, the real driver, links over socket pairs.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ashlar_core::nbd::session::ReplyStyle;
use ashlar_core::nbd::wire::command;
use ashlar_core::records::{
    HeadClaim, Placement, Record, Replica, ReplicaSet, Transaction, VolumeName, VolumeRecord, keys,
};
use ashlar_core::units::{Epoch, LayerId, NodeId, StoreId};
use async_trait::async_trait;
use tokio::sync::mpsc;
use uuid::Uuid;

mod stopping;
mod strangers;

use super::*;
use crate::data::tests::{Client, Random, Reply, VOLUME};
use crate::data::{DataConfig, DataPlane, LinkEnds, LinkPeer, ReplicatedSpec, StoreConfig};
use crate::meta::{self, MetadataStore, OpenError, SqliteStore};
use crate::stream::Stream;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 130 * MIB;
const PATIENCE: Duration = Duration::from_secs(60);
const CLUSTER: Uuid = Uuid::from_u128(99);

/// Where every daemon's data plane is.
#[derive(Default)]
struct Town {
    planes: Mutex<HashMap<NodeId, DataPlane>>,
}

/// Greets over a socket pair, as over a network.
struct Neighbour {
    town: Arc<Town>,
    this: NodeId,
}

#[async_trait]
impl Dial for Neighbour {
    async fn dial(&self, node: NodeId, store: StoreId) -> Result<LinkEnds, LinkRefused> {
        let plane = self.town.planes.lock().expect("town").get(&node).cloned();
        let Some(plane) = plane else {
            return Err(LinkRefused::NoAddress(node));
        };
        let (ours, theirs) = UnixStream::pair()?;
        for socket in [&ours, &theirs] {
            socket.set_nonblocking(true)?;
        }
        let mut near = tokio::net::UnixStream::from_std(ours)?;
        let mut far = tokio::net::UnixStream::from_std(theirs)?;
        let is_ours = |store| plane.stores().iter().any(|known| known.id == store);
        let (greeted, accepted) = tokio::join!(
            greet(&mut near, CLUSTER, self.this, node, store),
            accept(&mut far, CLUSTER, node, self.this, is_ours)
        );
        greeted?;
        let ends = |stream: tokio::net::UnixStream, node| -> Result<LinkEnds, LinkRefused> {
            Ok(LinkEnds {
                peer: LinkPeer {
                    node,
                    store,
                    address: "pair".to_owned(),
                },
                stream: Stream::Plain(stream.into_std()?.into()),
                leftover: Vec::new(),
                session: None,
            })
        };
        assert_eq!(accepted?, store);
        plane
            .link_accepted(ends(far, self.this)?)
            .map_err(|_| LinkRefused::NoAddress(node))?;
        ends(near, node)
    }
}

struct Daemon {
    node: NodeId,
    plane: DataPlane,
    events: mpsc::UnboundedReceiver<ReplicationEvent>,
    claim: HeadClaim,
}

struct Cluster {
    town: Arc<Town>,
    dir: tempfile::TempDir,
    records: Arc<dyn MetadataStore>,
}

impl Cluster {
    async fn new() -> Cluster {
        let dir = tempfile::tempdir().expect("dir");
        let records = SqliteStore::open(&dir.path().join("cluster.sqlite")).expect("records");
        Cluster {
            town: Arc::default(),
            records: Arc::new(records),
            dir,
        }
    }

    async fn daemon(&self, number: u128) -> Daemon {
        let node = NodeId(Uuid::from_u128(number));
        let home = self.dir.path().join(number.to_string());
        std::fs::create_dir_all(&home).expect("home");
        let database = home.join("node.sqlite");
        let opened = async {
            loop {
                match SqliteStore::open(&database) {
                    // The driver of the daemon before ends by itself.
                    Err(OpenError::InUse { .. }) => tokio::task::yield_now().await,
                    opened => return opened.expect("the node's database"),
                }
            }
        };
        let local = tokio::time::timeout(PATIENCE, opened).await;
        let local: Arc<dyn MetadataStore> = Arc::new(local.expect("free in time"));
        let seals = Seals::new(local);
        let mut config = config(node, &home);
        config.seals = seals.load().await.expect("seals");
        let plane = DataPlane::start(config).await.expect("start");
        let (send, events) = mpsc::unbounded_channel();
        let dial = Arc::new(Neighbour {
            town: self.town.clone(),
            this: node,
        });
        Driver::start(plane.clone(), self.records.clone(), seals, dial, send);
        self.town
            .planes
            .lock()
            .expect("town")
            .insert(node, plane.clone());
        Daemon {
            node,
            plane,
            events,
            claim: HeadClaim {
                node,
                incarnation: Uuid::new_v4(),
            },
        }
    }

    async fn volume(&self, daemons: &[&Daemon]) {
        let replicas = daemons
            .iter()
            .map(|daemon| Replica::in_sync(daemon.node, daemon.plane.stores()[0].id))
            .collect();
        let record = VolumeRecord {
            never_written: false,
            ..VolumeRecord::new(
                VOLUME,
                VolumeName::parse("v").expect("name"),
                SIZE,
                LayerId(1),
                Placement {
                    stores: Vec::new(),
                    sets: vec![ReplicaSet { replicas }],
                },
            )
        };
        record.check_invariants().expect("sound");
        let put = Transaction::new().put(keys::volume(VOLUME), record.encode());
        self.records.commit(put).await.expect("recorded");
    }

    async fn record(&self) -> VolumeRecord {
        let record = meta::read::<VolumeRecord>(&*self.records, &keys::volume(VOLUME)).await;
        record.expect("read").expect("there").record
    }

    async fn open(&self, daemon: &mut Daemon) {
        let record = meta::read::<VolumeRecord>(&*self.records, &keys::volume(VOLUME)).await;
        let spec = ReplicatedSpec {
            record: record.expect("read").expect("there"),
            claim: daemon.claim,
            written: Epoch(0),
            admitted: ashlar_core::nbd::session::Admitted::Anyone,
        };
        daemon.plane.open_replicated(spec).await.expect("open");
        daemon
            .until(|event| matches!(event, ReplicationEvent::Serving { .. }))
            .await;
    }

    /// With what one copy has, whatever the others may have.
    async fn open_alone(&self, daemon: &mut Daemon) {
        let mut record = self.record().await;
        for replica in &mut record.placement.sets[0].replicas {
            if replica.node != daemon.node {
                replica.state = ashlar_core::records::ReplicaState::Out;
            }
        }
        record.min_in_sync = 1;
        let put = Transaction::new().put(keys::volume(VOLUME), record.encode());
        self.records.commit(put).await.expect("recorded");
        self.open(daemon).await;
    }

    fn stop(&self, daemon: &Daemon) {
        self.town.planes.lock().expect("town").remove(&daemon.node);
    }

    async fn in_sync(&self, count: usize) {
        let key = keys::volume(VOLUME);
        let now = self.records.list(&key).await.expect("list").revision;
        let mut changes = self.records.watch(&key, now).await.expect("watch");
        let wait = async {
            while self.record().await.placement.sets[0].in_sync().count() != count {
                changes.next().await.expect("the watch goes on");
            }
        };
        tokio::time::timeout(PATIENCE, wait)
            .await
            .expect("in sync in time");
    }
}

fn config(node: NodeId, home: &Path) -> DataConfig {
    let store = StoreConfig {
        path: home.join("store"),
        expected: None,
        capacity_bytes: 1024 * MIB,
    };
    let mut config = DataConfig::new(node, home.to_path_buf(), vec![store]);
    config.tail_dir = Some(home.to_path_buf());
    config.tail_bytes = 8 * MIB;
    config
}

impl Daemon {
    async fn until(&mut self, wanted: impl Fn(&ReplicationEvent) -> bool) -> ReplicationEvent {
        let wait = async {
            loop {
                let event = self.events.recv().await.expect("alive");
                if wanted(&event) {
                    return event;
                }
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("in time")
    }
}

/// Blocks its thread, as clients do.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("work")
}

/// Random requests of every kind against a model in memory.
fn like_the_model(client: &mut Client, model: &mut [u8], seed: u64, steps: usize) {
    let mut random = Random(seed);
    for step in 0..steps {
        let bases = [0, 64 * MIB - 20_000, 128 * MIB - 50_000, SIZE - 40_000];
        let mut offset = bases[random.below(4) as usize] + random.below(30_000);
        let mut length = 1 + random.below(10_000);
        if random.below(2) == 0 {
            offset -= offset % 4096;
            length = length.next_multiple_of(4096);
        }
        length = length.min(SIZE - offset);
        let range = offset as usize..(offset + length) as usize;
        match random.below(10) {
            0..4 => {
                let data: Vec<u8> = (0..length).map(|i| (i as usize ^ step) as u8).collect();
                client.write(0, offset, &data);
                model[range].copy_from_slice(&data);
            }
            4 => {
                let kind = command::WRITE_ZEROES;
                assert_eq!(client.call(kind, 0, offset, length, &[]), Reply::Ok(vec![]));
                model[range].fill(0);
            }
            5 => {
                let from = offset.next_multiple_of(4096).min(offset + length);
                let until = (offset + length) / 4096 * 4096;
                let kind = command::TRIM;
                assert_eq!(client.call(kind, 0, offset, length, &[]), Reply::Ok(vec![]));
                if from < until {
                    model[from as usize..until as usize].fill(0);
                }
            }
            6 => {
                assert_eq!(client.call(command::FLUSH, 0, 0, 0, &[]), Reply::Ok(vec![]));
            }
            _ => assert!(client.read(offset, length) == model[range], "step {step}"),
        }
    }
}

fn check_all(client: &mut Client, model: &[u8]) {
    for offset in (0..SIZE).step_by(MIB as usize) {
        let until = (offset + MIB).min(SIZE);
        let got = client.read(offset, until - offset);
        assert!(got == model[offset as usize..until as usize], "at {offset}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_copies_behave_like_one_disk() {
    let cluster = Cluster::new().await;
    let mut one = cluster.daemon(1).await;
    let (two, three) = (cluster.daemon(2).await, cluster.daemon(3).await);
    cluster.volume(&[&one, &two, &three]).await;
    cluster.open(&mut one).await;
    let plane = one.plane.clone();
    let model = blocking(move || {
        let mut model = vec![0; SIZE as usize];
        for (seed, style) in [(11, ReplyStyle::Extended), (12, ReplyStyle::Simple)] {
            let mut client = Client::attach(&plane, style, SIZE);
            like_the_model(&mut client, &mut model, seed, 300);
            check_all(&mut client, &model);
        }
        model
    })
    .await;
    assert_eq!(cluster.record().await.epoch, Epoch(1));

    // Another daemon takes it over: the old head is fenced, its clients are gone, the data are the same.
    let plane = one.plane.clone();
    let mut left = blocking(move || Client::attach(&plane, ReplyStyle::Simple, SIZE)).await;
    let mut two = two;
    cluster.open(&mut two).await;
    let stopped = one
        .until(|event| matches!(event, ReplicationEvent::Stopped { .. }))
        .await;
    // By which it is told from a later head of the same daemon.
    let ReplicationEvent::Stopped { incarnation, .. } = stopped else {
        unreachable!("that was waited for")
    };
    assert_eq!(incarnation, one.claim.incarnation);
    let plane = two.plane.clone();
    blocking(move || {
        assert!(left.is_closed());
        let mut client = Client::attach(&plane, ReplyStyle::Extended, SIZE);
        check_all(&mut client, &model);
    })
    .await;
    for daemon in [one, two, three] {
        daemon.plane.drain().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_goes_is_left_out_and_comes_back() {
    let cluster = Cluster::new().await;
    let mut one = cluster.daemon(1).await;
    let (two, three) = (cluster.daemon(2).await, cluster.daemon(3).await);
    cluster.volume(&[&one, &two, &three]).await;
    cluster.open(&mut one).await;
    let plane = one.plane.clone();
    let mut model = blocking(move || {
        let mut model = vec![0; SIZE as usize];
        let mut client = Client::attach(&plane, ReplyStyle::Extended, SIZE);
        like_the_model(&mut client, &mut model, 21, 150);
        model
    })
    .await;
    cluster.stop(&three);
    three.plane.drain().await;
    let plane = one.plane.clone();
    model = blocking(move || {
        let mut client = Client::attach(&plane, ReplyStyle::Extended, SIZE);
        like_the_model(&mut client, &mut model, 22, 150);
        model
    })
    .await;
    cluster.in_sync(2).await;
    let three = cluster.daemon(3).await;
    cluster.in_sync(3).await;
    let plane = one.plane.clone();
    model = blocking(move || {
        let mut client = Client::attach(&plane, ReplyStyle::Extended, SIZE);
        like_the_model(&mut client, &mut model, 23, 150);
        check_all(&mut client, &model);
        model
    })
    .await;
    // Only the copy that came back is left: it has everything.
    for daemon in [&one, &two] {
        cluster.stop(daemon);
        daemon.plane.drain().await;
    }
    let mut three = three;
    cluster.open_alone(&mut three).await;
    let plane = three.plane.clone();
    blocking(move || {
        let mut client = Client::attach(&plane, ReplyStyle::Extended, SIZE);
        check_all(&mut client, &model);
    })
    .await;
    three.plane.drain().await;
}
