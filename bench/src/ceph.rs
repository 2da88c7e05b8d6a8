//! Sets up a Ceph cluster by hand, without systemd: one monitor, one manager and three OSDs on loopback, with all of
//! their files in one directory. It ends with the processes that are returned.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::command::{capture, run_to_end};
use crate::fio::Target;
use crate::rows::Contender;
use crate::servers::{
    EXPORT, Running, ServerProcess, await_socket, end_of, prove_export, spawn, uri, wait_for,
};

const OSDS: u32 = 3;
const POOL: &str = "bench";
/// Placement groups of the pool, for three OSDs: about a hundred copies on each, as Ceph's documentation has it.
const PLACEMENT_GROUPS: &str = "64";
/// Memory that an OSD aims at: above the least that Ceph takes, 896 MiB. What it knows of its objects has room there.
const OSD_MEMORY_BYTES: u64 = 1 << 30;
/// The smallest block file; BlueStore keeps its own database in it too.
const LEAST_BLOCK_FILE_BYTES: u64 = 4 << 30;
/// Each step of the set-up; Ceph's tools wait for a monitor for ever.
const STEP_LIMIT: Duration = Duration::from_secs(120);
const CLEAN_LIMIT: Duration = Duration::from_secs(180);

/// A running cluster.
#[derive(Debug)]
pub(crate) struct Ceph {
    directory: PathBuf,
    config: PathBuf,
    /// The OSDs, the manager and the monitor, in the order in which they are to end.
    pub(crate) processes: Vec<ServerProcess>,
}

impl Ceph {
    /// Makes a cluster in `directory`, for images of `size_bytes`; its sockets go to `sockets`.
    pub(crate) fn start(directory: &Path, sockets: &Path, size_bytes: u64) -> Result<Ceph> {
        fs::create_dir_all(directory)?;
        let mut ceph = Ceph {
            directory: directory.to_owned(),
            config: directory.join("ceph.conf"),
            processes: Vec::new(),
        };
        let fsid = new_uuid()?;
        let monitor = format!(
            "[v2:127.0.0.1:{},v1:127.0.0.1:{}]",
            free_port()?,
            free_port()?
        );
        fs::write(
            &ceph.config,
            configuration(&fsid, &monitor, directory, sockets, size_bytes),
        )?;
        ceph.start_monitor(&fsid, &monitor).context("the monitor")?;
        ceph.start_manager().context("the manager")?;
        for id in 0..OSDS {
            ceph.start_osd(id).with_context(|| format!("OSD {id}"))?;
        }
        ceph.make_pool().context("the pool")?;
        Ok(ceph)
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        command.arg("--conf").arg(&self.config).args(arguments);
        capture(command, STEP_LIMIT)
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    /// Starts a daemon in the foreground.
    fn daemon(&mut self, program: &str, id: &str) -> Result<()> {
        let log = self.directory.join(format!("{program}-{id}.out"));
        let mut command = Command::new(program);
        command.args(["--foreground", "--id", id]);
        command.arg("--conf").arg(&self.config);
        // The last to be started is the first to end.
        self.processes.insert(0, spawn(command, &log)?);
        Ok(())
    }

    fn start_monitor(&mut self, fsid: &str, address: &str) -> Result<()> {
        let (keys, admin) = (self.path("mon.keyring"), self.path("admin.keyring"));
        let allow_all = |who: &'static str| ["--cap", who, "allow *"];
        let key = |path: &str, name: &str, caps: &[&str]| {
            let mut command = Command::new("ceph-authtool");
            command.args(["--create-keyring", path, "--gen-key", "--name", name]);
            command.args(caps);
            run_to_end(command, STEP_LIMIT)
        };
        key(&keys, "mon.", &allow_all("mon"))?;
        let everything = ["mon", "mgr", "osd"].map(allow_all).concat();
        key(&admin, "client.admin", &everything)?;
        let mut command = Command::new("ceph-authtool");
        command.args([&keys, "--import-keyring", &admin]);
        run_to_end(command, STEP_LIMIT)?;
        let map = self.path("monmap");
        let mut command = Command::new("monmaptool");
        command.args(["--create", "--fsid", fsid, "--addv", "a", address, &map]);
        run_to_end(command, STEP_LIMIT)?;
        let new = ["--mkfs", "--id", "a", "--monmap", &map, "--keyring", &keys];
        self.run("ceph-mon", &new)?;
        self.daemon("ceph-mon", "a")?;
        // The first command waits until it answers.
        self.ask(&["mon", "stat"]).map(drop)
    }

    /// Runs the `ceph` command.
    fn ask(&self, arguments: &[&str]) -> Result<String> {
        let more = ["--connect-timeout", "60"];
        self.run("ceph", &[&more, arguments].concat())
    }

    fn start_manager(&mut self) -> Result<()> {
        let folder = self.path("mgr");
        fs::create_dir_all(&folder)?;
        let keys = format!("{folder}/keyring");
        let rights = ["mon", "allow profile mgr", "osd", "allow *"];
        let make = ["auth", "get-or-create", "mgr.x", "-o", &keys];
        self.ask(&[&make[..], &rights].concat())?;
        self.daemon("ceph-mgr", "x")
    }

    fn start_osd(&mut self, number: u32) -> Result<()> {
        let uuid = new_uuid()?;
        let mut command = Command::new("ceph-authtool");
        command.arg("--gen-print-key");
        let secret = capture(command, STEP_LIMIT)?;
        let secrets = self.path("osd-secrets.json");
        fs::write(&secrets, format!("{{\"cephx_secret\": \"{secret}\"}}"))?;
        let id = self.ask(&["osd", "new", &uuid, "-i", &secrets])?;
        fs::remove_file(&secrets)?;
        ensure!(id == number.to_string(), "it was given the number '{id}'");
        let folder = self.path(&format!("osd-{id}"));
        fs::create_dir_all(&folder)?;
        let keys = format!("{folder}/keyring");
        let name = format!("osd.{id}");
        let mut command = Command::new("ceph-authtool");
        command.args(["--create-keyring", &keys, "--name", &name]);
        command.args(["--add-key", &secret]);
        run_to_end(command, STEP_LIMIT)?;
        self.run("ceph-osd", &["--id", &id, "--mkfs", "--osd-uuid", &uuid])?;
        self.daemon("ceph-osd", &id)
    }

    fn make_pool(&mut self) -> Result<()> {
        let groups = PLACEMENT_GROUPS;
        self.ask(&["osd", "pool", "create", POOL, groups, groups, "replicated"])?;
        let mut status = String::new();
        let clean = wait_for(CLEAN_LIMIT, || {
            let ended = self.processes.iter_mut().any(|process| !process.is_alive());
            status = self.ask(&["pg", "stat"]).unwrap_or_default();
            ended || is_clean(&status)
        });
        for (process, log) in self.processes.iter_mut().zip(logs_of(&self.directory)) {
            if !process.is_alive() {
                bail!(
                    "a daemon has ended; the end of {}:\n  {}",
                    log.display(),
                    end_of(&log)
                );
            }
        }
        ensure!(clean, "its placement groups are not clean: {status}");
        let size = self.ask(&["osd", "pool", "get", POOL, "size"])?;
        ensure!(size == format!("size: {OSDS}"), "copies: {size}");
        self.run("rbd", &["pool", "init", POOL]).map(drop)
    }

    /// Makes the image of a contender with the bytes of `file`, and what serves it.
    pub(crate) fn enter(
        &self,
        contender: Contender,
        file: &Path,
        sockets: &Path,
    ) -> Result<Running> {
        let image = contender.slug();
        let source = file.display().to_string();
        self.run("rbd", &["import", "--dest-pool", POOL, &source, image])
            .context("filling the image")?;
        // The first processes are the OSDs.
        let osds = self.processes.iter().take(OSDS as usize);
        let shared = osds.map(|osd| osd.pid).collect();
        if contender == Contender::CephRbd {
            return Ok(Running {
                target: Target::Rbd {
                    config: self.config.clone(),
                    pool: POOL,
                    image,
                },
                servers: Vec::new(),
                shared,
            });
        }
        let socket = sockets.join(image);
        let mut command = Command::new("qemu-nbd");
        // Without librbd's cache, as fio is in the other way.
        command.args(["--persistent", "--shared=0", "--cache=none", "--image-opts"]);
        command.arg(format!("--export-name={EXPORT}"));
        command.arg(format!("--socket={}", socket.display()));
        command.arg(format!(
            "driver=rbd,pool={POOL},image={image},user=admin,conf={}",
            self.config.display()
        ));
        let log = self.directory.join("qemu-nbd.out");
        let mut server = spawn(command, &log)?;
        await_socket(contender, &socket, &mut server).with_context(|| end_of(&log))?;
        prove_export(contender, &socket, file.metadata()?.len())?;
        Ok(Running {
            target: Target::Nbd(uri(&socket)),
            servers: vec![server],
            shared,
        })
    }
}

/// Whether `ceph pg stat` tells of the pool's groups, and of no group that is not clean. The manager may have made a pool
/// of its own with one more.
fn is_clean(status: &str) -> bool {
    let wanted: u32 = PLACEMENT_GROUPS.parse().unwrap_or(u32::MAX);
    let Some((groups, rest)) = status.split_once(" pgs: ") else {
        return false;
    };
    rest.starts_with(&format!("{groups} active+clean;"))
        && groups.parse::<u32>().is_ok_and(|groups| groups >= wanted)
}

/// Where the daemons say why they end, in the order of [`Ceph::processes`].
fn logs_of(directory: &Path) -> Vec<PathBuf> {
    let osds = (0..OSDS).rev().map(|id| format!("ceph-osd-{id}.out"));
    let names = osds.chain(["ceph-mgr-x.out".to_owned(), "ceph-mon-a.out".to_owned()]);
    names.map(|name| directory.join(name)).collect()
}

fn configuration(
    fsid: &str,
    monitor: &str,
    directory: &Path,
    sockets: &Path,
    size_bytes: u64,
) -> String {
    let here = directory.display();
    let block_file = LEAST_BLOCK_FILE_BYTES.max(8 * size_bytes);
    let mut text = format!(
        "[global]\n\
         fsid = {fsid}\n\
         mon_host = {monitor}\n\
         auth_cluster_required = cephx\n\
         auth_service_required = cephx\n\
         auth_client_required = cephx\n\
         auth_allow_insecure_global_id_reclaim = false\n\
         osd_pool_default_size = {OSDS}\n\
         osd_pool_default_min_size = 2\n\
         osd_pool_default_pg_autoscale_mode = off\n\
         # All OSDs are on one host: copies are spread over OSDs.\n\
         osd_crush_chooseleaf_type = 0\n\
         run_dir = {here}\n\
         crash_dir = {here}\n\
         admin_socket = {}/$name.$pid.asok\n\
         log_file = {here}/$name.log\n\
         [client]\n\
         keyring = {here}/admin.keyring\n\
         log_file =\n\
         # An answered write must be more than memory of the client.\n\
         rbd_cache = false\n\
         [mon]\n\
         mon_data = {here}/mon\n\
         mon_cluster_log_file = {here}/cluster.log\n\
         # The disk of a test machine may be nearly full of other things.\n\
         mon_data_avail_crit = 1\n\
         mon_data_avail_warn = 2\n\
         [mgr]\n\
         mgr_data = {here}/mgr\n\
         [osd]\n\
         osd_data = {here}/osd-$id\n\
         osd_memory_target = {OSD_MEMORY_BYTES}\n\
         # Reads are to miss caches; what is read here would be read again from memory.\n\
         bluestore_default_buffered_read = false\n\
         bluestore_block_create = true\n\
         bluestore_block_size = {block_file}\n\
         # A file does not say that it lies on flash, and Ceph would tune itself for a turning disk.\n\
         bluestore_debug_enforce_settings = ssd\n\
         osd_op_num_shards = 8\n\
         osd_op_num_threads_per_shard = 2\n",
        sockets.display()
    );
    for id in 0..OSDS {
        let address = format!("127.0.0.{}", id + 1);
        text += &format!("[osd.{id}]\npublic_addr = {address}\ncluster_addr = {address}\n");
    }
    text
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// The kernel makes them; the benchmark needs no crate for three of them.
fn new_uuid() -> Result<String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("no random UUID")?;
    let uuid = uuid.trim();
    if uuid.len() == 36 {
        Ok(uuid.to_owned())
    } else {
        Err(anyhow!("'{uuid}' is no UUID"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_that_are_missing_or_not_clean_are_waited_for() {
        let tail = "0 B data, 871 MiB used, 11 GiB / 12 GiB avail";
        assert!(is_clean(&format!("65 pgs: 65 active+clean; {tail}")));
        assert!(!is_clean(&format!("1 pgs: 1 active+clean; {tail}")));
        assert!(!is_clean(&format!(
            "64 pgs: 3 peering, 61 active+clean; {tail}"
        )));
        assert!(!is_clean(""));
    }

    #[test]
    fn every_osd_has_an_address_and_the_block_file_has_room() {
        let small = configuration("f", "m", Path::new("/d"), Path::new("/s"), 1 << 20);
        for id in 0..OSDS {
            assert!(small.contains(&format!("[osd.{id}]\npublic_addr = 127.0.0.{}\n", id + 1)));
        }
        assert!(small.contains(&format!("bluestore_block_size = {}\n", 4u64 << 30)));
        let large = configuration("f", "m", Path::new("/d"), Path::new("/s"), 1 << 30);
        assert!(large.contains(&format!("bluestore_block_size = {}\n", 8u64 << 30)));
    }
}
