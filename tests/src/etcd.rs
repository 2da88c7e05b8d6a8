//! A real etcd, started, stopped, frozen and started again.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::process::Group;
use crate::scratch::{Scratch, free_port};
use crate::wait;

/// Longest wait for etcd to answer: it elects itself within about a second where nothing else runs.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// Certificates for an etcd that speaks TLS only, as files in PEM.
#[derive(Clone, Debug)]
pub struct ServerTls {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Clients need a certificate of this authority.
    pub client_authority: PathBuf,
}

/// One etcd with one member, on loopback.
pub struct Etcd {
    data: PathBuf,
    log: PathBuf,
    host: Ipv4Addr,
    client_port: u16,
    peer_port: u16,
    tls: Option<ServerTls>,
    process: Option<Group>,
}

impl Etcd {
    /// Starts one that keeps its data in `scratch`.
    pub fn start(scratch: &Scratch) -> Etcd {
        Etcd::start_named(scratch, "etcd", None)
    }

    /// Starts one under a name of its own, or with TLS.
    pub fn start_named(scratch: &Scratch, name: &str, tls: Option<ServerTls>) -> Etcd {
        let mut etcd = Etcd::new(scratch, name, Ipv4Addr::LOCALHOST, tls);
        etcd.run();
        etcd
    }

    /// Starts one that listens at another address of this machine.
    pub fn start_at(scratch: &Scratch, host: Ipv4Addr) -> Etcd {
        let mut etcd = Etcd::new(scratch, "etcd", host, None);
        etcd.run();
        etcd
    }

    fn new(scratch: &Scratch, name: &str, host: Ipv4Addr, tls: Option<ServerTls>) -> Etcd {
        Etcd {
            data: scratch.memory().join(name),
            log: scratch.join(&format!("{name}.log")),
            host,
            client_port: free_port(),
            peer_port: free_port(),
            tls,
            process: None,
        }
    }

    fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// Where clients ask.
    pub fn endpoint(&self) -> String {
        format!("{}://{}:{}", self.scheme(), self.host, self.client_port)
    }

    /// What `--metadata` is given.
    pub fn setting(&self) -> String {
        format!("etcd:{}", self.endpoint())
    }

    /// Starts it, again after [`Etcd::kill`], and waits until it listens and has elected itself.
    pub fn run(&mut self) {
        self.spawn();
        let log = self.log.clone();
        let marks = ["ready to serve client requests", "serving client"];
        wait::until(READY_LIMIT, "etcd", || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            if marks.iter().any(|mark| text.contains(mark)) {
                Ok(())
            } else {
                Err(format!("its log: {text}"))
            }
        });
    }

    /// Starts it and waits for nothing.
    pub fn spawn(&mut self) {
        let log = std::fs::File::create(&self.log).expect("a log file for etcd");
        let client = self.endpoint();
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let mut command = Command::new("etcd");
        command
            .args(["--name", "one", "--logger", "zap"])
            .arg("--data-dir")
            .arg(&self.data)
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("one={peer}")])
            // The machine may be slow; an election in the middle of a test is not what it is about.
            .args(["--heartbeat-interval", "500", "--election-timeout", "5000"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log);
        if let Some(tls) = &self.tls {
            command
                .arg("--cert-file")
                .arg(&tls.certificate)
                .arg("--key-file")
                .arg(&tls.key)
                .arg("--trusted-ca-file")
                .arg(&tls.client_authority)
                .arg("--client-cert-auth");
        }
        let group = Group::spawn(&mut command);
        self.process = Some(group.expect("etcd starts; scripts/setup.sh test installs it"));
    }

    /// SIGKILL, as a crash is.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// SIGSTOP: it holds its connections and answers nothing.
    pub fn freeze(&mut self) {
        self.running().signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn thaw(&mut self) {
        self.running().signal(Signal::CONT);
    }

    fn running(&mut self) -> &mut Group {
        self.process.as_mut().expect("etcd runs")
    }
}
