//! Starts an etcd and three nodes of one cluster on 127.0.0.1, .2 and .3, with a volume that has a copy on each.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::ashlar::Ashlar;
use crate::command::run_to_end;
use crate::measure::Metered;
use crate::servers::{EXPORT, Running, ServerProcess, end_of, spawn, wait_for};

/// How many nodes there are, and copies of each block.
pub(crate) const NODES: u32 = 3;
const ETCD_LIMIT: Duration = Duration::from_secs(60);
/// A node tells the others of its room some time after it has joined.
const CREATE_LIMIT: Duration = Duration::from_secs(60);
const SYNC_LIMIT: Duration = Duration::from_secs(120);

/// What the start of a cluster gives.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) running: Running,
    pub(crate) metered: Metered,
    pub(crate) cluster: Cluster,
}

/// The nodes, and what another one is started with.
#[derive(Debug)]
pub(crate) struct Cluster {
    nodes: Vec<Ashlar>,
    programs: PathBuf,
    scratch: PathBuf,
    sockets: PathBuf,
    flags: Vec<String>,
    metadata: String,
    /// Its time is not counted: it takes no part in reads and writes.
    _etcd: ServerProcess,
}

impl Cluster {
    /// The node that everything is asked of; it serves the volume.
    pub(crate) fn first(&self) -> &Ashlar {
        &self.nodes[0]
    }

    pub(crate) fn nodes(&self) -> &[Ashlar] {
        &self.nodes
    }

    /// Starts one more node: the first of all makes the cluster, others join it.
    pub(crate) fn add(&mut self) -> Result<ServerProcess> {
        let number = self.nodes.len() as u32 + 1;
        let name = format!("node-{number}");
        let flags = self.flags.clone();
        let mut node = Ashlar::new(&name, &self.programs, &self.scratch, &self.sockets, flags)?;
        let address = format!("127.0.0.{number}:{}", free_port(number)?);
        let unix = node.admin_address();
        node.more_flags.extend([
            format!("--metadata={}", self.metadata),
            format!("--listen-admin={unix}"),
            format!("--listen-admin=tcp:{address}"),
        ]);
        match self.nodes.first() {
            None => {
                let mut init = Command::new(self.programs.join("ashlar"));
                init.args(["cluster", "init", "--data-dir"]);
                init.arg(&node.data_dir)
                    .args(["--metadata", &self.metadata]);
                run_to_end(init, ETCD_LIMIT).context("making the cluster")?;
            }
            Some(first) => {
                let token = first.ask(&["cluster", "token"])?;
                node.more_flags.push(format!("--join={}", token.trim()));
            }
        }
        let process = node.start().with_context(|| name.clone())?;
        self.nodes.push(node);
        Ok(process)
    }
}

/// Starts the cluster with data in `scratch`, and fills its volume from `file`.
pub(crate) fn start(
    programs: &Path,
    scratch: &Path,
    sockets: &Path,
    flags: &[String],
    size_bytes: u64,
    file: &Path,
) -> Result<Started> {
    let (etcd, metadata) = start_etcd(scratch)?;
    let mut cluster = Cluster {
        nodes: Vec::new(),
        programs: programs.to_owned(),
        scratch: scratch.to_owned(),
        sockets: sockets.to_owned(),
        flags: flags.to_vec(),
        metadata,
        _etcd: etcd,
    };
    let servers = (0..NODES).map(|_| cluster.add());
    let servers: Vec<ServerProcess> = servers.collect::<Result<_>>()?;
    let first = cluster.first();
    let mut refusal = None;
    let copies = NODES.to_string();
    let created = wait_for(CREATE_LIMIT, || {
        refusal = first
            .create_volume(size_bytes, &["--replicas", &copies])
            .err();
        refusal.is_none()
    });
    if let Some(refusal) = refusal.filter(|_| !created) {
        return Err(refusal);
    }
    wait_in_sync(first)?;
    first.fill(file)?;
    wait_in_sync(first)?;
    Ok(Started {
        running: Running {
            target: first.target(),
            servers,
            shared: Vec::new(),
        },
        metered: Metered {
            daemons: cluster.nodes.iter().map(|node| node.http).collect(),
            copies: NODES,
            head: Some(first.clone()),
        },
        cluster,
    })
}

/// Waits until every copy is in sync: only then does a write go to all of them.
fn wait_in_sync(node: &Ashlar) -> Result<()> {
    let mut refusal = None;
    wait_for(SYNC_LIMIT, || {
        refusal = epoch_in_sync(node).err();
        refusal.is_none()
    });
    refusal.map_or(Ok(()), Err)
}

/// The epoch of the volume while every copy is in sync; otherwise an error. No copy can leave and come back without
/// raising it: the same epoch before and after a run means that every write of it went to all copies.
pub(crate) fn epoch_in_sync(node: &Ashlar) -> Result<u64> {
    let shown = node.ask(&["volume", "show", EXPORT, "-o", "json"])?;
    in_sync(&shown).with_context(|| format!("not every copy is in sync: {shown}"))
}

fn in_sync(shown: &str) -> Option<u64> {
    let volume: serde_json::Value = serde_json::from_str(shown).ok()?;
    let has = |state: &str| shown.contains(&format!("\"state\": \"{state}\""));
    let all = has("in-sync") && !has("out") && !has("joining");
    volume["epoch"].as_u64().filter(|_| all)
}

fn free_port(number: u32) -> Result<u16> {
    // A port that was free a moment ago; who is given it says so when it no longer is.
    Ok(TcpListener::bind(format!("127.0.0.{number}:0"))?
        .local_addr()?
        .port())
}

/// Starts an etcd and returns it with what `--metadata` is given.
fn start_etcd(scratch: &Path) -> Result<(ServerProcess, String)> {
    let client = format!("http://127.0.0.1:{}", free_port(1)?);
    let peer = format!("http://127.0.0.1:{}", free_port(1)?);
    let log = scratch.join("etcd.log");
    let mut command = Command::new("etcd");
    command
        .args(["--name", "bench", "--logger", "zap", "--data-dir"])
        .arg(scratch.join("etcd"))
        .args(["--listen-client-urls", &client])
        .args(["--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer])
        .args(["--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("bench={peer}")]);
    let mut etcd = spawn(command, &log)?;
    let serves = wait_for(ETCD_LIMIT, || {
        let said = fs::read_to_string(&log).unwrap_or_default();
        // The words of 3.4 and of what came after.
        let marks = ["ready to serve client requests", "serving client traffic"];
        marks.iter().any(|mark| said.contains(mark)) || !etcd.is_alive()
    });
    if !serves || !etcd.is_alive() {
        bail!(
            "etcd did not start; the end of its log:\n  {}",
            end_of(&log)
        );
    }
    Ok((etcd, format!("etcd:{client}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_is_out_or_joining_is_seen() {
        let shown = |states: [&str; 3]| {
            let copies = states.map(|state| format!("{{\"state\": \"{state}\"}}"));
            format!("{{\"epoch\": 7, \"copies\": [{}]}}", copies.join(","))
        };
        assert_eq!(in_sync(&shown(["in-sync"; 3])), Some(7));
        assert_eq!(in_sync(&shown(["in-sync", "out", "in-sync"])), None);
        assert_eq!(in_sync(&shown(["in-sync", "in-sync", "joining"])), None);
        assert_eq!(in_sync(""), None);
    }
}
