//! The door, with real sockets, a catalogue of two exports and data threads that only keep what they get.

use super::socket::{BindError, Bound, Reach, bind};
use super::{
    Attach, AttachError, AttachedClient, CatalogError, ConnectionCount, ExportCatalog,
    ListenerConfig, ListenerStats, Listeners,
};
use crate::config::{Address, HostPort};
use crate::stream::Stream;
use ashlar_core::nbd::handshake::{Export, ExportName};
use ashlar_core::nbd::session::ReplyStyle;
use ashlar_core::units::VolumeId;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use uuid::Uuid;

/// Longer than anything here takes; a test that runs into it has failed.
const PATIENCE: Duration = Duration::from_secs(20);

struct Catalogue;

fn export(name: &str) -> Export {
    Export {
        volume: VolumeId(Uuid::from_u128(1)),
        name: name.to_owned(),
        description: "for tests".to_owned(),
        size_bytes: 64 << 20,
        read_only: false,
        token: None,
    }
}

impl ExportCatalog for Catalogue {
    async fn lookup(&self, name: &str) -> Result<Option<Export>, CatalogError> {
        match name {
            "disk" | "gone" => Ok(Some(export(name))),
            "broken" => Err(CatalogError::Unavailable("its store stopped".to_owned())),
            "stuck" => std::future::pending().await,
            _ => Ok(None),
        }
    }

    async fn list(&self) -> Result<Vec<ExportName>, CatalogError> {
        Ok(vec![ExportName {
            name: "disk".to_owned(),
            description: "for tests".to_owned(),
        }])
    }
}

struct Keeper(Sender<AttachedClient>);

impl Attach for Keeper {
    fn attach(&self, client: AttachedClient) -> Result<(), AttachError> {
        self.0.send(client).map_err(|_| AttachError::NotOpen)
    }
}

struct Door {
    runtime: Runtime,
    listeners: Option<Listeners>,
    clients: Receiver<AttachedClient>,
    stats: Arc<ListenerStats>,
    connections: ConnectionCount,
    path: PathBuf,
    _directory: TempDir,
}

impl Door {
    fn open(config: ListenerConfig, most_connections: usize) -> Door {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nbd.sock");
        let bound = bind(&Address::Unix(path.clone()), Reach::Loopback).unwrap();
        Door::with(bound, config, most_connections, directory, path)
    }

    fn with(
        bound: Vec<Bound>,
        config: ListenerConfig,
        most_connections: usize,
        directory: TempDir,
        path: PathBuf,
    ) -> Door {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (sender, clients) = channel();
        let stats = Arc::new(ListenerStats::default());
        let connections = ConnectionCount::new(most_connections);
        let listeners = {
            let _guard = runtime.enter();
            Listeners::start(
                bound,
                Arc::new(Catalogue),
                Arc::new(Keeper(sender)),
                config,
                connections.clone(),
                Arc::clone(&stats),
                None,
            )
            .unwrap()
        };
        Door {
            runtime,
            listeners: Some(listeners),
            clients,
            stats,
            connections,
            path,
            _directory: directory,
        }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn stop(&mut self) {
        let listeners = self.listeners.take().unwrap();
        self.runtime.block_on(listeners.stop());
    }

    fn client(&self) -> AttachedClient {
        self.clients.recv_timeout(PATIENCE).unwrap()
    }
}

/// The socket of a client that uses no TLS.
fn socket(stream: Stream) -> OwnedFd {
    match stream {
        Stream::Plain(socket) => socket,
        Stream::Tls(_) => panic!("TLS was not asked for"),
    }
}

fn greeted<S: Read>(stream: &mut S) {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn go(name: &str) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&[0, 0]);
    option(7, &data)
}

/// Reads one option reply; gives its type.
fn reply<S: Read>(stream: &mut S) -> u32 {
    let mut header = [0; 20];
    stream.read_exact(&mut header).unwrap();
    let mut data = vec![0; u32::from_be_bytes(header[16..].try_into().unwrap()) as usize];
    stream.read_exact(&mut data).unwrap();
    u32::from_be_bytes(header[12..16].try_into().unwrap())
}

/// The server closes, and sends nothing before it does.
fn closed<S: Read>(stream: &mut S) {
    let mut byte = [0];
    match stream.read(&mut byte) {
        Ok(0) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("the connection is still there: {other:?}"),
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

fn counted(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[test]
fn a_client_is_handed_over_with_what_it_sent_ahead() {
    let door = Door::open(ListenerConfig::default(), 4);
    let mut stream = door.connect();
    greeted(&mut stream);
    let mut bytes = 3u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option(8, &[]));
    bytes.extend_from_slice(&go("disk"));
    bytes.extend_from_slice(b"a request");
    stream.write_all(&bytes).unwrap();
    assert_eq!(reply(&mut stream), 1);
    assert_eq!(reply(&mut stream), 3);
    assert_eq!(reply(&mut stream), 1);
    let client = door.client();
    assert_eq!(client.leftover, b"a request");
    assert_eq!(client.session.style, ReplyStyle::Structured);
    assert_eq!(client.session.volume, VolumeId(Uuid::from_u128(1)));
    let own = format!("unix:pid={},uid=", std::process::id());
    assert!(client.peer.starts_with(&own), "{}", client.peer);
    // The socket is whole: both ends talk over it.
    let mut server = UnixStream::from(socket(client.stream));
    stream.write_all(b"ping").unwrap();
    server.set_nonblocking(false).unwrap();
    let mut word = [0; 4];
    server.read_exact(&mut word).unwrap();
    server.write_all(b"pong").unwrap();
    stream.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"pong");
    assert_eq!(door.connections.open(), 1);
    drop(client.slot);
    assert_eq!(door.connections.open(), 0);
}

#[test]
fn an_error_leaves_the_talk_open() {
    let door = Door::open(ListenerConfig::default(), 4);
    let mut stream = door.connect();
    greeted(&mut stream);
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    for (name, kind) in [("broken", 0x8000_0004), ("nowhere", 0x8000_0006)] {
        stream.write_all(&go(name)).unwrap();
        assert_eq!(reply(&mut stream), kind);
    }
    stream.write_all(&option(3, &[])).unwrap();
    assert_eq!((reply(&mut stream), reply(&mut stream)), (2, 1));
    // ABORT is acknowledged even when more was sent behind it.
    let mut abort = option(2, b"bye");
    abort.extend_from_slice(&[0; 500]);
    stream.write_all(&abort).unwrap();
    assert_eq!(reply(&mut stream), 1);
    closed(&mut stream);
}

#[test]
fn a_client_that_does_not_finish_is_closed() {
    let config = ListenerConfig {
        handshake_timeout: Duration::from_secs(1),
        ..ListenerConfig::default()
    };
    let door = Door::open(config, 8);
    let mut silent = door.connect();
    greeted(&mut silent);
    let mut slow_lookup = door.connect();
    greeted(&mut slow_lookup);
    slow_lookup.write_all(&3u32.to_be_bytes()).unwrap();
    slow_lookup.write_all(&go("stuck")).unwrap();
    // One that sends without end and never reads what it is told.
    let deaf = door.connect();
    let mut half = deaf.try_clone().unwrap();
    let flood = std::thread::spawn(move || {
        let _ = half.write_all(&3u32.to_be_bytes());
        let options = option(99, &[]).repeat(1000);
        while half.write_all(&options).is_ok() {}
    });
    closed(&mut silent);
    closed(&mut slow_lookup);
    flood.join().unwrap();
    drop(deaf);
    eventually("two were too slow", || counted(&door.stats.too_slow) >= 2);
    eventually("every slot is free again", || door.connections.open() == 0);
}

#[test]
fn connections_over_the_limit_are_closed_and_others_stay() {
    let door = Door::open(ListenerConfig::default(), 2);
    let mut first = door.connect();
    let mut second = door.connect();
    greeted(&mut first);
    greeted(&mut second);
    closed(&mut door.connect());
    assert_eq!(counted(&door.stats.over_limit), 1);
    drop(first);
    eventually("the slot is free", || door.connections.open() == 1);
    greeted(&mut door.connect());
    second.write_all(&3u32.to_be_bytes()).unwrap();
    second.write_all(&option(99, &[])).unwrap();
    assert_eq!(reply(&mut second), 0x8000_0001);
}

#[test]
fn the_oldest_idle_handshake_makes_room() {
    let config = ListenerConfig {
        max_handshakes: 2,
        handshake_grace: Duration::from_millis(50),
        ..ListenerConfig::default()
    };
    let door = Door::open(config, 100);
    let mut oldest = door.connect();
    greeted(&mut oldest);
    let mut middle = door.connect();
    greeted(&mut middle);
    let mut newest = door.connect();
    greeted(&mut newest);
    closed(&mut oldest);
    assert_eq!(counted(&door.stats.evicted), 1);
    drop(middle);
    newest.write_all(&3u32.to_be_bytes()).unwrap();
    newest.write_all(&go("disk")).unwrap();
    assert_eq!((reply(&mut newest), reply(&mut newest)), (3, 1));
    door.client();
}

#[test]
fn a_place_that_is_given_up_is_taken_without_ending_anyone() {
    let config = ListenerConfig {
        max_handshakes: 1,
        handshake_grace: PATIENCE,
        ..ListenerConfig::default()
    };
    let door = Door::open(config, 100);
    let mut first = door.connect();
    greeted(&mut first);
    let mut second = door.connect();
    drop(first);
    greeted(&mut second);
    assert_eq!(counted(&door.stats.evicted), 0);
}

#[test]
fn rubbish_costs_its_own_connection_only() {
    let door = Door::open(ListenerConfig::default(), 1000);
    let mut good = door.connect();
    greeted(&mut good);
    good.write_all(&3u32.to_be_bytes()).unwrap();
    let mut seed = 1u64;
    for _ in 0..300 {
        let mut bad = door.connect();
        let bytes: Vec<u8> = (0..200)
            .map(|_| {
                // xorshift64: any bytes will do, the same each time.
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed as u8
            })
            .collect();
        let _ = bad.write_all(&bytes);
    }
    good.write_all(&go("disk")).unwrap();
    assert_eq!((reply(&mut good), reply(&mut good)), (3, 1));
    let client = door.client();
    eventually("only the good one is left", || door.connections.open() == 1);
    drop(client);
}

#[test]
fn stopping_ends_handshakes_and_removes_the_path() {
    let mut door = Door::open(ListenerConfig::default(), 10);
    let mut attached = door.connect();
    greeted(&mut attached);
    attached.write_all(&3u32.to_be_bytes()).unwrap();
    attached.write_all(&go("disk")).unwrap();
    assert_eq!((reply(&mut attached), reply(&mut attached)), (3, 1));
    let client = door.client();
    let mut idle = door.connect();
    greeted(&mut idle);
    door.stop();
    closed(&mut idle);
    assert!(!door.path.exists());
    // The established one is the data threads' now.
    UnixStream::from(socket(client.stream))
        .write_all(b"x")
        .unwrap();
    attached.read_exact(&mut [0]).unwrap();
}

#[test]
fn the_socket_is_for_its_owner_only() {
    let door = Door::open(ListenerConfig::default(), 10);
    let mode = std::fs::metadata(&door.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

fn bind_at(path: &Path) -> Result<Vec<Bound>, BindError> {
    bind(&Address::Unix(path.to_owned()), Reach::Loopback)
}

#[test]
fn a_stale_path_is_taken_over_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    // std does not remove the path when a listener is dropped: this is what SIGKILL leaves behind.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let first = bind_at(&path).unwrap();
    let second = bind_at(&path).unwrap_err();
    assert!(matches!(second, BindError::InUse { .. }), "{second}");
    assert!(second.to_string().contains("in use by another process"));
    drop(first);
    assert!(!path.exists());
    std::fs::write(&path, b"precious").unwrap();
    let error = bind_at(&path).unwrap_err();
    assert!(matches!(error, BindError::NotASocket { .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_path_that_another_server_took_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let first = bind_at(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let second = bind_at(&path).unwrap();
    drop(first);
    assert!(path.exists());
    drop(second);
    assert!(!path.exists());
}

fn tcp(host: &str, port: u16) -> Result<Vec<Bound>, BindError> {
    bind(
        &Address::Tcp(HostPort {
            host: host.to_owned(),
            port,
        }),
        Reach::Loopback,
    )
}

#[test]
fn tcp_is_for_loopback() {
    for host in ["0.0.0.0", "::", "192.0.2.1"] {
        let error = tcp(host, 0).unwrap_err();
        assert!(matches!(error, BindError::NotLoopback { .. }), "{error}");
        assert!(error.to_string().contains("loopback only"));
    }
    let bound = tcp("127.0.0.1", 0).unwrap();
    let address = bound[0].tcp_address().unwrap();
    let error = tcp("127.0.0.1", address.port()).unwrap_err();
    assert!(matches!(error, BindError::InUse { .. }), "{error}");

    let door = Door::with(
        bound,
        ListenerConfig::default(),
        4,
        tempfile::tempdir().unwrap(),
        PathBuf::new(),
    );
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    greeted(&mut stream);
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    stream.write_all(&go("disk")).unwrap();
    assert_eq!((reply(&mut stream), reply(&mut stream)), (3, 1));
    let client = door.client();
    assert!(client.peer.starts_with("tcp:127.0.0.1:"));
    let socket = std::net::TcpStream::from(socket(client.stream));
    assert!(socket.nodelay().unwrap());
}

#[test]
fn a_given_socket_must_be_a_listening_stream() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("given");
    let listener = UnixListener::bind(&path).unwrap();
    let bound = Bound::given("nbd", OwnedFd::from(listener)).unwrap();
    assert_eq!(bound.to_string(), format!("unix:{}", path.display()));
    let mut door = Door::with(vec![bound], ListenerConfig::default(), 4, directory, path);
    greeted(&mut door.connect());
    door.stop();
    // systemd keeps the path for the next start.
    assert!(door.path.exists());

    let (one, _other) = UnixStream::pair().unwrap();
    let error = Bound::given("x", OwnedFd::from(one)).unwrap_err();
    assert!(error.to_string().contains("does not listen"), "{error}");
    let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let error = Bound::given("x", OwnedFd::from(datagram)).unwrap_err();
    assert!(error.to_string().contains("not a stream"), "{error}");
    let wide = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let error = Bound::given("x", OwnedFd::from(wide)).unwrap_err();
    assert!(matches!(error, BindError::NotLoopback { .. }), "{error}");
}

/// libnbd's own idea of what we said.
#[test]
fn nbdinfo_understands_the_door() {
    let door = Door::open(ListenerConfig::default(), 10);
    let uri = |name: &str| format!("nbd+unix:///{name}?socket={}", door.path.display());
    // The data threads' part here: a client that says anything says goodbye, and waits for the close.
    let clients = door.clients;
    let goodbyes = std::thread::spawn(move || {
        for client in clients {
            let mut stream = UnixStream::from(socket(client.stream));
            stream.set_nonblocking(false).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let _ = stream.read(&mut [0; 28]);
        }
    });
    let run = |arguments: &[&str]| {
        let output = Command::new("nbdinfo").args(arguments).output();
        let output = output.expect("nbdinfo is installed (Debian: libnbd-bin)");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), text, errors)
    };
    let (ok, json, errors) = run(&["--no-content", "--json", &uri("disk")]);
    assert!(ok, "{errors}");
    for line in [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"export-name\": \"disk\"",
        "\"description\": \"for tests\"",
        "\"base:allocation\"",
        "\"is_read_only\": false",
        "\"can_cache\": true",
        "\"can_df\": true",
        "\"can_fast_zero\": true",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"block_size_minimum\": 1",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
        "\"export-size\": 67108864",
    ] {
        assert!(json.contains(line), "{line} in {json}");
    }
    let (ok, size, errors) = run(&["--size", &uri("disk")]);
    assert!(ok, "{errors}");
    assert_eq!(size.trim(), "67108864");
    let (ok, list, errors) = run(&["--no-content", "--list", &uri("")]);
    assert!(ok && list.contains("export=\"disk\""), "{list} {errors}");
    let (ok, _, errors) = run(&["--no-content", &uri("nowhere")]);
    assert!(!ok && errors.contains("No such file"), "{errors}");
    let listeners = door.listeners.unwrap();
    door.runtime.block_on(listeners.stop());
    drop(door.runtime);
    goodbyes.join().unwrap();
}
