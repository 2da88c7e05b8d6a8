//! The port of a node's stores answers nothing to whoever is not a node of the cluster.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use ashlar_server::replication::GREETING_TIME;
use ashlar_tests::certificate::Authority;
use ashlar_tests::cluster::Trio;
use ashlar_tests::nbd::Wishes;
use ashlar_tests::tool::Tool;

/// Shakes hands with TLS, believing whoever answers, sends 64 bytes unless told not to, and prints what became of it
/// within so many seconds: `refused`, `closed` and after how many seconds, `open`, or `said` and what was answered.
const TLS_CLIENT: &str = r#"
import socket, ssl, sys, time
host, port, directory, send, seconds = sys.argv[1:6]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname = False
context.verify_mode = ssl.CERT_NONE
if directory != "-":
    context.load_cert_chain(directory + "/client-cert.pem", directory + "/client-key.pem")
try:
    plain = socket.create_connection((host, int(port)), 10)
    stream = context.wrap_socket(plain)
    stream.settimeout(float(seconds))
    began = time.monotonic()
    if send == "yes":
        stream.sendall(b"\x00" * 64)
    said = stream.recv(100)
    print("said " + said.hex() if said else "closed %.3f" % (time.monotonic() - began))
except TimeoutError:
    print("open")
except (ssl.SSLError, ConnectionError) as error:
    print("refused", error)
"#;

/// Less than a greeting may take: who is still connected then is listened to.
const OPEN: Duration = Duration::from_secs(2);
/// More than a greeting may take, for a refusal to arrive.
const REFUSED: Duration = Duration::from_secs(30);

fn shake_hands(
    address: &str,
    certificates: Option<&Path>,
    send: bool,
    patience: Duration,
) -> String {
    let (host, port) = address.rsplit_once(':').expect("HOST:PORT");
    let directory = certificates.map_or("-", |path| path.to_str().expect("UTF-8"));
    let send = if send { "yes" } else { "no" };
    let said = Tool::new("python3")
        .args(["-c", TLS_CLIENT, host, port, directory, send])
        .arg(patience.as_secs().to_string())
        .succeed();
    said.trim().to_owned()
}

/// Whether it was refused, and not only sent away when its time to greet was over.
fn is_refusal(became: &str) -> bool {
    let at_once = |seconds: &str| {
        let took = Duration::from_secs_f64(seconds.parse().expect("seconds"));
        took < GREETING_TIME - Duration::from_secs(1)
    };
    became.starts_with("refused") || became.strip_prefix("closed ").is_some_and(at_once)
}

#[test]
fn strangers_learn_nothing_from_the_port_of_the_stores() {
    let mut trio = Trio::start("strangers");
    trio.expect_losses();
    trio.create("disk", "64MiB");
    let address = trio.nodes[1].link_address();
    // In the clear: nothing, an HTTP request, and what looks like a message of ours. At most a TLS alert comes back.
    for said in [
        &b""[..],
        b"GET / HTTP/1.0\r\n\r\n",
        &[0; 64],
        b"ASHL\x01\0\0\0",
    ] {
        let mut socket = TcpStream::connect(&address).expect("connected");
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("set");
        socket.write_all(said).expect("sent");
        let mut heard = Vec::new();
        // A reset is as good as an end.
        let _ = socket.read_to_end(&mut heard);
        let alert = heard.first().is_none_or(|kind| *kind == 21);
        assert!(heard.len() <= 16 && alert, "{said:?} got {heard:?}");
    }
    // With TLS: no certificate, one of somebody else that says it is this node's, one of ours that is no node's.
    let scratch = &trio.nodes[0].daemon.scratch;
    let foreign = scratch.join("foreign");
    std::fs::create_dir(&foreign).expect("a directory");
    let node = trio.nodes[2].id();
    let name = format!("{node}.node.{}.ashlar.internal", trio.cluster());
    for (at, expired) in [false, true].into_iter().enumerate() {
        let authority = Authority::new("somebody else");
        let files = authority.issue(scratch.path(), &format!("c{at}"), &[&name], expired);
        std::fs::copy(files.certificate, foreign.join("client-cert.pem")).expect("copied");
        std::fs::copy(files.key, foreign.join("client-key.pem")).expect("copied");
        let became = shake_hands(&address, Some(&foreign), false, REFUSED);
        assert!(became.starts_with("refused"), "{became}");
    }
    let admin = trio.nodes[0].client("ops", &["--role", "admin"]);
    let user = trio.nodes[0].client("db", &[]);
    for certificates in [None, Some(&admin), Some(&user)] {
        for send in [false, true] {
            let shown = certificates.map(|path| path.as_path());
            let became = shake_hands(&address, shown, send, REFUSED);
            assert!(is_refusal(&became), "{certificates:?}: {became}");
        }
    }
    // A node is listened to, and that is what the others are not.
    let stolen = trio.nodes[2].stolen();
    let became = shake_hands(&address, Some(&stolen), false, OPEN);
    assert_eq!(became, "open");
    // Not when it is removed from the cluster.
    trio.nodes[0]
        .daemon
        .admin()
        .run(["volume", "delete", "disk", "--yes"]);
    let node = trio.nodes[2].id();
    trio.nodes[2].daemon.kill();
    trio.nodes[0].daemon.admin().run(["node", "remove", &node]);
    ashlar_tests::wait::until(Duration::from_secs(30), "it is shut out", || {
        let became = shake_hands(&address, Some(&stolen), false, OPEN);
        if is_refusal(&became) {
            Ok(())
        } else {
            Err(became)
        }
    });
}

/// Whoever connects and says nothing, or connects very often, keeps no node from its work.
#[test]
fn a_crowd_at_the_port_of_the_stores_harms_nobody() {
    let mut trio = Trio::start("crowd");
    trio.expect_losses();
    trio.create("disk", "64MiB");
    let address = trio.nodes[1].link_address();
    let crowd: Vec<TcpStream> = (0..200)
        .map(|_| TcpStream::connect(&address).expect("connected"))
        .collect();
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    client.write(0, &[1; 65536]).expect("written");
    // And whoever has to connect anew finds its way through it.
    trio.nodes[0].daemon.kill();
    trio.nodes[0].daemon.start();
    trio.wait_served(0, "disk");
    trio.wait_in_sync(0, "disk", 3);
    drop(crowd);
    let mut client = trio.nodes[0].daemon.open("disk", Wishes::SIMPLE);
    assert_eq!(client.read(0, 65536).expect("read"), [1; 65536]);
}
