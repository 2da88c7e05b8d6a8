//! Daemons that are nodes of one cluster, on loopback, with a real etcd.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::admin::{Admin, offline};
use crate::daemon::{Daemon, Setup};
use crate::etcd::Etcd;
use crate::scratch::free_port;

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
        let mut daemon = setup
            .args(["--metadata", &etcd.setting()])
            .args(["--listen-admin", &format!("tcp:127.0.0.1:{admin_port}")])
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
