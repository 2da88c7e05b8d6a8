//! NBD inside TLS, with the clients people have: who gets in, who does not, and that data are the same on the way back.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ashlar_tests::certificate::Authority;
use ashlar_tests::cluster::Node;
use ashlar_tests::daemon::Setup;
use ashlar_tests::etcd::Etcd;
use ashlar_tests::nbd::{Address, Handshake, Wishes};
use ashlar_tests::scratch::{Scratch, free_port};
use ashlar_tests::tool::{Finished, Tool};
use ashlar_tests::wait;
use serde_json::Value;

const LONG: Duration = Duration::from_secs(120);
/// NBD_OPT_STARTTLS, and others.
const STARTTLS: u32 = 5;
const LIST: u32 = 3;
const ABORT: u32 = 2;
const STRUCTURED_REPLY: u32 = 8;
const ACK: u32 = 1;
const ERR_TLS_REQD: u32 = 0x8000_0005;
const ERR_INVALID: u32 = 0x8000_0003;

/// A node with a volume, a port that every address of the machine reaches, and one of loopback.
struct Served {
    node: Node,
    wide: u16,
    near: u16,
    _etcd: Etcd,
    scratch: Scratch,
}

fn serve(test: &str) -> Served {
    let scratch = Scratch::new(&format!("{test}-e"));
    let etcd = Etcd::start(&scratch);
    let (wide, near) = (free_port(), free_port());
    let setup = Setup::default()
        .arg("--log-level=info,ashlar_server::nbd=debug")
        .listen_nbd(&format!("tcp:0.0.0.0:{wide}"))
        .listen_nbd(&format!("tcp:127.0.0.1:{near}"));
    let node = Node::first(test, &etcd, setup);
    node.daemon.create("disk", "64MiB");
    Served {
        node,
        wide,
        near,
        _etcd: etcd,
        scratch,
    }
}

fn uri(port: u16, certificates: &Path) -> String {
    format!(
        "nbds://localhost:{port}/disk?tls-certificates={}",
        certificates.display()
    )
}

fn nbdinfo(uri: &str) -> Finished {
    Tool::new("nbdinfo").args(["--size", uri]).run()
}

fn begin(port: u16) -> Handshake {
    let address = Address::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    Handshake::begin(&address).expect("a greeting")
}

#[test]
fn data_come_back_through_tls_as_they_went_in() {
    let served = serve("tls-data");
    let user = served.node.client("db", &[]);
    let source = served.scratch.join("source");
    let pattern: Vec<u8> = (0..64u32 << 20)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    std::fs::File::create(&source)
        .and_then(|mut file| file.write_all(&pattern))
        .expect("a file");
    for port in [served.wide, served.near] {
        assert_eq!(nbdinfo(&uri(port, &user)).success().trim(), "67108864");
        let there = uri(port, &user);
        let back = served.scratch.join(&format!("back-{port}"));
        let copy = |from: &str, to: &str| {
            Tool::new("nbdcopy")
                .args(["--flush", from, to])
                .limit(LONG)
                .succeed();
        };
        copy(source.to_str().expect("UTF-8"), &there);
        copy(&there, back.to_str().expect("UTF-8"));
        assert!(
            std::fs::read(&back).expect("a file") == pattern,
            "port {port}"
        );
        served
            .node
            .daemon
            .open_when_served("disk", Wishes::SIMPLE)
            .write_zeroes(0, 32 << 20, 0)
            .expect("zeroes");
    }
    let connections = served.node.daemon.admin().json(["connections"]);
    println!("{connections}");
}

/// Many requests in flight, of sizes around those of TLS records and of our buffers, compared by the client.
#[test]
fn requests_of_every_size_in_flight_are_answered_right() {
    let served = serve("tls-sizes");
    let user = served.node.client("db", &[]);
    let script = format!(
        r#"
import random
random.seed(7)
h = nbd.NBD()
h.set_tls(nbd.TLS_REQUIRE)
h.set_tls_certificates("{}")
h.set_export_name("disk")
h.connect_tcp("localhost", "{}")
size = h.get_size()
shadow = bytearray(size)
sizes = [1, 511, 4096, 16383, 16384, 16385, 65536, 70001, 300000, 2 << 20]
def ranges():
    used = []
    for _ in range(32):
        n = random.choice(sizes)
        at = random.randrange(size - n)
        if all(at >= end or at + n <= start for start, end in used):
            used.append((at, at + n))
    return used
def finish(pending):
    while True:
        pending = [c for c in pending if not h.aio_command_completed(c)]
        if not pending:
            return
        h.poll(-1)
for turn in range(30):
    writes = []
    for start, end in ranges():
        data = bytearray(random.getrandbits(8 * (end - start)).to_bytes(end - start, "little"))
        shadow[start:end] = data
        writes.append(h.aio_pwrite(nbd.Buffer.from_bytearray(data), start))
    finish(writes)
    reads = []
    for start, end in ranges():
        buffer = nbd.Buffer(end - start)
        reads.append((h.aio_pread(buffer, start), buffer, start, end))
    finish([cookie for cookie, _, _, _ in reads])
    for _, buffer, start, end in reads:
        assert buffer.to_bytearray() == shadow[start:end], (turn, start, end)
    h.flush()
h.shutdown()
print("same")
"#,
        user.display(),
        served.wide
    );
    let said = Tool::new("nbdsh")
        .args(["-c", &script])
        .limit(LONG)
        .succeed();
    assert_eq!(said.trim(), "same");
}

#[test]
fn a_port_beyond_loopback_answers_nothing_but_starttls_in_the_clear() {
    let served = serve("tls-forced");
    let plain = nbdinfo(&format!("nbd://localhost:{}/disk", served.wide)).failure();
    assert!(plain.contains("TLS"), "{plain}");
    let mut client = begin(served.wide);
    // LIST, INFO, GO, STRUCTURED_REPLY, the contexts, EXTENDED_HEADERS, and one that nobody knows.
    for option in [LIST, 4, 6, 7, STRUCTURED_REPLY, 9, 10, 11, 4711] {
        assert_eq!(
            client.verdict(option, b"").expect("answered"),
            ERR_TLS_REQD,
            "{option}"
        );
    }
    assert_eq!(
        client.verdict(STARTTLS, b"x").expect("answered"),
        ERR_INVALID
    );
    assert_eq!(client.verdict(ABORT, b"").expect("answered"), ACK);
    // On loopback the clear is allowed as before.
    assert_eq!(
        nbdinfo(&format!("nbd://localhost:{}/disk", served.near))
            .success()
            .trim(),
        "67108864"
    );
}

#[test]
fn what_was_said_before_tls_does_not_count_and_what_is_pipelined_ends_the_connection() {
    let served = serve("tls-before");
    for port in [served.wide, served.near] {
        // In one segment behind STARTTLS: no answer, no TLS.
        let mut client = begin(port);
        let option = |number: u32| {
            let mut bytes = b"IHAVEOPT".to_vec();
            bytes.extend_from_slice(&number.to_be_bytes());
            bytes.extend_from_slice(&0u32.to_be_bytes());
            bytes
        };
        let both = [option(STARTTLS), option(LIST)].concat();
        client.connection.send(&both).expect("sent");
        let answer = client.connection.until_closed(LONG).expect("closed");
        assert!(answer.is_empty(), "answered {answer:?}");
        // Behind the acknowledgement, where a TLS handshake belongs.
        let mut client = begin(port);
        assert_eq!(client.verdict(STARTTLS, b"").expect("answered"), ACK);
        client.connection.send(&option(LIST)).expect("sent");
        let answer = client.connection.until_closed(LONG).expect("closed");
        assert!(
            !answer.starts_with(&[0, 3, 0xe8, 0x89]),
            "an option was answered in the clear"
        );
    }
    // None of it harms anybody else.
    let user = served.node.client("db", &[]);
    assert_eq!(
        nbdinfo(&uri(served.near, &user)).success().trim(),
        "67108864"
    );
}

/// The authority of the cluster itself, as somebody has it who copied its key.
fn forger(node: &Node) -> Authority {
    let identity = node.daemon.data_dir().join("identity");
    let text = std::fs::read_to_string(identity.join("identity.json")).expect("an identity");
    let parsed: Value = serde_json::from_str(&text).expect("JSON");
    let cluster = parsed["cluster"].as_str().expect("an id");
    let key = std::fs::read_to_string(identity.join("ca-key.pem")).expect("a key");
    Authority::of_key(&format!("Ashlar cluster {cluster}"), &key)
}

fn with_certificate(
    served: &Served,
    authority: &Authority,
    name: &str,
    names: &[&str],
    expired: bool,
) -> PathBuf {
    let directory = served.scratch.join(name);
    std::fs::create_dir(&directory).expect("a directory");
    let files = authority.issue(served.scratch.path(), name, names, expired);
    std::fs::copy(files.certificate, directory.join("client-cert.pem")).expect("copied");
    std::fs::copy(files.key, directory.join("client-key.pem")).expect("copied");
    let user = served.node.client(&format!("for-{name}"), &[]);
    std::fs::copy(user.join("ca-cert.pem"), directory.join("ca-cert.pem")).expect("copied");
    directory
}

#[test]
fn certificates_of_every_wrong_kind_are_refused() {
    let served = serve("tls-wrong");
    let user = served.node.client("db", &[]);
    nbdinfo(&uri(served.wide, &user)).success();

    let foreign = Authority::new("somebody else");
    let forger = forger(&served.node);
    let cluster = served.node.daemon.admin().json(["node", "list"])["cluster_id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let namesake = Authority::new(&format!("Ashlar cluster {cluster}"));
    let unknown = "00000000-0000-4000-8000-000000000000";
    let client_name = format!("{unknown}.db.volumes.{cluster}.ashlar.internal");
    let node_name = format!("{unknown}.node.{cluster}.ashlar.internal");
    let none = served.scratch.join("none");
    std::fs::create_dir(&none).expect("a directory");
    std::fs::copy(user.join("ca-cert.pem"), none.join("ca-cert.pem")).expect("copied");
    let cases = [
        (none, "no certificate", "no certificates"),
        // A client keeps it to itself, because its authority is not among those the server names.
        (
            with_certificate(&served, &foreign, "foreign", &[&client_name], false),
            "of another authority",
            "no certificates",
        ),
        (
            with_certificate(&served, &namesake, "namesake", &[&client_name], false),
            "of another authority of the same name",
            "invalid peer certificate",
        ),
        (
            with_certificate(&served, &forger, "expired", &[&client_name], true),
            "of the past",
            "expired",
        ),
        (
            with_certificate(&served, &forger, "unrecorded", &[&client_name], false),
            "signed by the authority, recorded nowhere",
            "ApplicationVerificationFailure",
        ),
        (
            with_certificate(&served, &forger, "no-node", &[&node_name], false),
            "of a node that never joined",
            "ApplicationVerificationFailure",
        ),
        (
            with_certificate(&served, &forger, "nameless", &[], false),
            "that names nobody",
            "ApplicationVerificationFailure",
        ),
        (
            served.node.client("ops", &["--role", "admin"]),
            "for the admin interface",
            "ApplicationVerificationFailure",
        ),
    ];
    for (directory, what, why) in cases {
        let before = served.node.daemon.log.text().len();
        let finished = nbdinfo(&uri(served.wide, &directory));
        assert!(!finished.status.success(), "{what}: let in: {finished:?}");
        wait::until(LONG, what, || {
            let said = served.node.daemon.log.text()[before..].to_owned();
            if said.contains("the TLS handshake failed") && said.contains(why) {
                Ok(())
            } else {
                Err(said)
            }
        });
    }
    // The client's side: a server that another authority vouches for, or one of another name, is not believed.
    let fooled = served.scratch.join("fooled");
    std::fs::create_dir(&fooled).expect("a directory");
    for file in ["client-cert.pem", "client-key.pem"] {
        std::fs::copy(user.join(file), fooled.join(file)).expect("copied");
    }
    foreign.write(&fooled.join("ca-cert.pem"));
    assert!(!nbdinfo(&uri(served.wide, &fooled)).status.success());
    nbdinfo(&uri(served.wide, &user)).success();
}

/// `cluster init` does not know where the daemon will listen, and settings change: what the certificate lacks is added.
#[test]
fn a_node_is_believed_by_the_names_that_it_was_started_with_last() {
    let scratch = Scratch::new("tls-names-e");
    let etcd = Etcd::start(&scratch);
    let (first, second) = (free_port(), free_port());
    let setup = Setup::default().listen_nbd(&format!("tcp:127.0.0.77:{first}"));
    let mut node = Node::first("tls-names", &etcd, setup);
    // libnbd sends the address as the name of the server, which is against the rules of TLS.
    node.daemon.log.expect("Illegal SNI extension");
    node.daemon.create("disk", "64MiB");
    let user = node.client("db", &[]);
    let believed = |host: &str, port: u16| {
        let uri = format!(
            "nbds://{host}:{port}/disk?tls-certificates={}",
            user.display()
        );
        wait::until(LONG, host, || {
            let finished = nbdinfo(&uri);
            match finished.status.success() {
                true => Ok(()),
                false => Err(finished.stderr),
            }
        });
    };
    believed("127.0.0.77", first);
    node.daemon.stop();
    let setup = node.daemon.setup.clone();
    node.daemon.setup = setup.listen_nbd(&format!("tcp:127.0.0.78:{second}"));
    node.daemon.start();
    believed("127.0.0.78", second);
    believed("127.0.0.77", first);
}

#[test]
fn a_revoked_client_is_cut_off_in_the_middle_of_its_work() {
    let served = serve("tls-revoked");
    let user = served.node.client("db", &[]);
    let script = format!(
        r#"
import sys
h = nbd.NBD()
h.set_tls(nbd.TLS_REQUIRE)
h.set_tls_certificates("{}")
h.set_export_name("disk")
h.connect_tcp("localhost", "{}")
print("connected", flush=True)
try:
    while True:
        h.pwrite(b"x" * 4096, 0)
        h.pread(65536, 0)
except nbd.Error as error:
    print("cut:", error)
"#,
        user.display(),
        served.wide
    );
    let working = Tool::new("nbdsh").args(["-c", &script]).limit(LONG).start();
    wait::until(LONG, "the client works", || {
        let listed = served.node.daemon.admin().json(["connections"]).to_string();
        if listed.contains("client db") {
            Ok(())
        } else {
            Err(listed)
        }
    });
    served
        .node
        .daemon
        .admin()
        .run(["cluster", "revoke-client", "db"]);
    let said = working.finish().success();
    assert!(said.contains("cut:"), "{said}");
    assert!(!nbdinfo(&uri(served.wide, &user)).status.success());
    wait::until(LONG, "the connection is gone", || {
        let listed = served.node.daemon.admin().json(["connections"]).to_string();
        if listed.contains("client db") {
            Err(listed)
        } else {
            Ok(())
        }
    });
}
