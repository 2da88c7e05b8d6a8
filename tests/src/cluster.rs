//! Daemons that are nodes of one cluster, on loopback, with a real etcd.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ashlar_proto::admin;
use serde_json::Value;

use crate::admin::{Admin, offline};
use crate::daemon::{Daemon, Setup};
use crate::etcd::Etcd;
use crate::network::{Network, Place};
use crate::rpc::Rpc;
use crate::scratch::{Scratch, free_port};
use crate::wait;

/// A daemon with its TCP admin port.
pub struct Node {
    pub daemon: Daemon,
    pub admin_port: u16,
}

/// Makes the stopped `daemon` the first node of a cluster.
pub fn found(daemon: &Daemon, etcd: &Etcd, more: &[&str]) -> Value {
    let data = daemon.data_dir().to_str().expect("UTF-8");
    let setting = etcd.setting();
    let mut arguments = vec![
        "cluster",
        "init",
        "-o",
        "json",
        "--data-dir",
        data,
        "--metadata",
        &setting,
    ];
    arguments.extend(more);
    let said = offline(arguments).success();
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("not JSON ({error}): {said}"))
}

impl Node {
    /// A node that is not started yet.
    pub fn prepare(test: &str, etcd: &Etcd, setup: Setup) -> Node {
        let admin_port = free_port();
        let host = setup.host();
        let mut daemon = setup
            .args(["--metadata", &etcd.setting()])
            .args(["--listen-admin", &format!("tcp:{host}:{admin_port}")])
            .prepare(test);
        let socket = daemon.data_dir().join("admin.sock");
        let socket = format!("unix:{}", socket.display());
        daemon.setup = daemon.setup.clone().args(["--listen-admin", &socket]);
        Node { daemon, admin_port }
    }

    /// The first node, started.
    pub fn first(test: &str, etcd: &Etcd, setup: Setup) -> Node {
        let mut node = Node::prepare(test, etcd, setup);
        found(&node.daemon, etcd, &[]);
        node.daemon.start();
        node
    }

    /// What another node is given to join here.
    pub fn token(&self) -> String {
        let said = self.daemon.admin().run(["cluster", "token"]);
        said.trim().to_owned()
    }

    /// A node that joined through this one, started.
    pub fn joined(&self, test: &str, etcd: &Etcd, setup: Setup) -> Node {
        let mut node = Node::prepare(test, etcd, setup.env("ASHLAR_JOIN", &self.token()));
        node.daemon.start();
        node
    }

    /// The admin interface over TCP.
    pub fn admin_over_tcp(&self, certificates: Option<&Path>) -> Admin {
        Admin::tcp(self.admin_port, certificates)
    }

    /// A directory with a client's certificate.
    pub fn client(&self, name: &str, more: &[&str]) -> PathBuf {
        let directory = self.daemon.scratch.join(&format!("client-{name}"));
        let out = directory.to_str().expect("UTF-8");
        let arguments = [&["cluster", "client-cert", name, "--out", out], more].concat();
        self.daemon.admin().run(arguments);
        directory
    }

    /// A directory with the node's own certificate, as if somebody had stolen it.
    pub fn stolen(&self) -> PathBuf {
        let path = self.daemon.data_dir().join("identity/identity.json");
        let text = std::fs::read_to_string(path).expect("an identity");
        let identity: Value = serde_json::from_str(&text).expect("JSON");
        let directory = self.daemon.scratch.join("stolen");
        std::fs::create_dir_all(&directory).expect("a directory");
        for (file, field) in [
            ("ca-cert.pem", "authority"),
            ("client-cert.pem", "certificate"),
            ("client-key.pem", "key"),
        ] {
            let pem = identity[field].as_str().expect("PEM");
            std::fs::write(directory.join(file), pem).expect("a file");
        }
        directory
    }

    /// The node's id.
    pub fn id(&self) -> String {
        let listed = self.daemon.admin().json(["node", "list"]);
        let nodes = listed["nodes"].as_array().expect("nodes").clone();
        let own = nodes.iter().find(|node| node["is_asked"] == true);
        own.expect("itself")["id"]
            .as_str()
            .expect("an id")
            .to_owned()
    }
}

/// Much longer than anything takes here.
const LONG: Duration = Duration::from_secs(90);

/// What daemons say when a node is away, as tests make it be.
const OF_LOST_NODES: [&str; 13] = [
    "a replica failed",
    "a replica does not answer",
    "a replica is out of sync",
    "bringing a replica up to date was cut off",
    "a volume's record was not changed for certain",
    "the records of volumes cannot be followed",
    "closing a link",
    "could not be recorded; its first write waits",
    "stopped without finishing the drain",
    "stopping with requests that are not answered",
    "has been away for long",
    "with replicas on other nodes are still being opened",
    "is not heard of in the metadata store, but answers",
];

/// Said when a volume is opened at another one.
const NO_LONGER_SERVED: &str = "a volume is no longer served here";

/// Three nodes of one cluster and their etcd.
pub struct Trio {
    pub nodes: Vec<Node>,
    pub etcd: Etcd,
    expects_losses: bool,
    _scratch: Scratch,
}

impl Trio {
    pub fn start(test: &str) -> Trio {
        Trio::with(test, Setup::default)
    }

    /// `setup` for each of them.
    pub fn with(test: &str, setup: impl Fn() -> Setup) -> Trio {
        let scratch = Scratch::new(test);
        let etcd = Etcd::start(&scratch);
        Trio::found(test, scratch, etcd, |_| setup())
    }

    /// Each of them a host of `network`, and etcd outside.
    pub fn on(test: &str, network: &Network) -> Trio {
        Trio::on_with(test, network, Setup::default)
    }

    /// The same, with `setup` for each of them.
    pub fn on_with(test: &str, network: &Network, setup: impl Fn() -> Setup) -> Trio {
        let scratch = Scratch::new(test);
        let etcd = Etcd::start_at(&scratch, network.address(Place::Outside));
        Trio::found(test, scratch, etcd, |host| on_host(network, host, setup()))
    }

    /// One more node, which joins through the first: host `nodes.len()` of `network`. Returns its place.
    pub fn join(&mut self, test: &str, network: &Network, setup: Setup) -> usize {
        let number = self.nodes.len();
        let setup = on_host(network, number, setup);
        let mut node = self.nodes[0].joined(&format!("{test}-{number}"), &self.etcd, setup);
        if self.expects_losses {
            node.expect_losses();
        }
        self.nodes.push(node);
        number
    }

    fn found(test: &str, scratch: Scratch, etcd: Etcd, setup: impl Fn(usize) -> Setup) -> Trio {
        let first = Node::first(&format!("{test}-0"), &etcd, setup(0));
        let mut nodes = vec![first];
        for number in 1..3 {
            let joined = nodes[0].joined(&format!("{test}-{number}"), &etcd, setup(number));
            nodes.push(joined);
        }
        Trio {
            nodes,
            etcd,
            expects_losses: false,
            _scratch: scratch,
        }
    }

    /// Nodes will be away, by the test's doing: what the others say of it, and they of the others, is expected.
    pub fn expect_losses(&mut self) {
        self.expects_losses = true;
        for node in &mut self.nodes {
            node.expect_losses();
        }
    }

    /// The cluster's id.
    pub fn cluster(&self) -> String {
        let path = self.nodes[0]
            .daemon
            .data_dir()
            .join("identity/identity.json");
        let text = std::fs::read_to_string(path).expect("an identity");
        let identity: Value = serde_json::from_str(&text).expect("JSON");
        identity["cluster"].as_str().expect("an id").to_owned()
    }

    /// A volume with three copies that node 0 serves.
    pub fn create(&self, volume: &str, size: &str) {
        self.create_with(volume, size, &[]);
    }

    pub fn create_with(&self, volume: &str, size: &str, options: &[&str]) {
        let create = [
            "volume",
            "create",
            volume,
            "--size",
            size,
            "--replicas",
            "3",
        ];
        // The room of a node that has just joined is not told at once.
        wait::until(LONG, "a volume with three copies", || {
            let finished = self.nodes[0]
                .daemon
                .admin()
                .try_run([&create, options].concat());
            if finished.status.success() {
                Ok(())
            } else if finished.stderr.contains("is taken by") {
                panic!("{finished:?}")
            } else {
                Err(finished.stderr)
            }
        });
    }

    /// A volume will be served by node `to`: any of the others may say that it is not served there any more.
    pub fn expect_move(&self, to: usize) {
        for (_, node) in self.nodes.iter().enumerate().filter(|(at, _)| *at != to) {
            node.daemon.log.expect(NO_LONGER_SERVED);
        }
    }

    /// Has node `at` serve a volume. Returns how long that took.
    pub fn open_at(&self, at: usize, volume: &str) -> Duration {
        self.expect_move(at);
        let start = Instant::now();
        self.nodes[at]
            .daemon
            .admin()
            .run(["volume", "open", volume]);
        start.elapsed()
    }

    /// A volume as node `at` knows it.
    pub fn volume(&self, at: usize, volume: &str) -> admin::Volume {
        self.nodes[at].rpc().volume(volume)
    }

    /// Waits until node `at` serves a volume.
    pub fn wait_served(&self, at: usize, volume: &str) {
        wait::until(LONG, "the volume is served", || {
            let reason = self.volume(at, volume).not_served_reason;
            if reason.is_empty() {
                Ok(())
            } else {
                Err(reason)
            }
        });
    }

    /// Waits until the record of a volume, as node `at` knows it, says that `count` copies of each chunk are in sync.
    pub fn wait_in_sync(&self, at: usize, volume: &str, count: usize) -> Duration {
        let start = Instant::now();
        wait::until(LONG, &format!("{count} copies are in sync"), || {
            let now = self.volume(at, volume);
            let in_sync = |set: &admin::ReplicaSet| {
                let states = set.replicas.iter().map(admin::Replica::state);
                states
                    .filter(|state| *state == admin::ReplicaState::InSync)
                    .count()
            };
            if now.replica_sets.iter().all(|set| in_sync(set) == count) {
                Ok(())
            } else {
                Err(format!(
                    "{:?}\n{}",
                    now.replica_sets,
                    self.nodes[at].daemon.log.tail()
                ))
            }
        });
        start.elapsed()
    }
}

fn on_host(network: &Network, host: usize, setup: Setup) -> Setup {
    let address = network.address(Place::Host(host));
    setup.in_namespace(&network.namespace(host), address)
}

impl Node {
    fn expect_losses(&mut self) {
        for said in OF_LOST_NODES {
            self.daemon.log.expect(said);
        }
    }

    /// A fresh connection to the admin interface.
    pub fn rpc(&self) -> Rpc {
        Rpc::connect(&self.daemon.data_dir().join("admin.sock"))
    }

    /// Where it accepts links, as it said when it started last.
    pub fn link_address(&self) -> String {
        let text = self.daemon.log.text();
        let mut said = text
            .lines()
            .filter(|line| line.contains("links of other nodes are accepted"));
        let line = said.next_back().expect("it told");
        let (_, rest) = line.split_once("address=").expect("an address");
        rest.trim_matches('"').trim().to_owned()
    }

    /// The bytes that this node, as the head, copied to bring replicas up to date, once for each that came back.
    pub fn copied_bytes(&self) -> Vec<u64> {
        let text = self.daemon.log.text();
        let said = text
            .lines()
            .filter(|line| line.contains("a replica is in sync again"));
        let bytes = said.filter_map(|line| line.split_once("copied_bytes="));
        bytes
            .map(|(_, rest)| rest.trim().parse().expect("a number"))
            .collect()
    }
}

impl Drop for Trio {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            for node in &self.nodes {
                node.daemon.log.check();
            }
        }
        // They are ended one by one now.
        self.expect_losses();
    }
}
