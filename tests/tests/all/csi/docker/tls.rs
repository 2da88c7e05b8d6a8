//! The plugin over TCP: with certificates on both sides, and not without.

use std::net::TcpStream;
use std::sync::Arc;

use ashlar_tests::certificate::{Authority, Files};
use ashlar_tests::csi::text;
use ashlar_tests::tool::Tool;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::*;

/// A call over TLS to `address`, with this certificate or none.
fn post(
    address: &str,
    authority: &Path,
    with: Option<&Files>,
) -> std::io::Result<(u16, String, String)> {
    let mut roots = RootCertStore::empty();
    let authority = CertificateDer::from_pem_file(authority).expect("a certificate");
    roots.add(authority).expect("an authority");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots);
    let config = match with {
        None => config.with_no_client_auth(),
        Some(files) => {
            let certificate = CertificateDer::from_pem_file(&files.certificate).expect("one");
            let key = PrivateKeyDer::from_pem_file(&files.key).expect("a key");
            config
                .with_client_auth_cert(vec![certificate], key)
                .expect("its key")
        }
    };
    let name = ServerName::try_from("localhost").expect("a name");
    let connection = ClientConnection::new(Arc::new(config), name).expect("a client");
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(CALL_LIMIT))?;
    Engine::post_over(StreamOwned::new(connection, stream), "Plugin.Activate", "")
}

#[test]
fn over_tcp_whoever_has_no_certificate_is_answered_nothing() {
    let mut engine = Engine::prepare("docker-tls");
    let scratch = engine.driver.daemon.scratch.path().to_owned();
    let (ours, others) = (Authority::new("engines"), Authority::new("others"));
    let authority = ours.write(&scratch.join("ca.pem"));
    let issue = |of: &Authority, file: &str, expired| of.issue(&scratch, file, &[], expired);
    let server = issue(&ours, "server", false);
    let client = issue(&ours, "client", false);
    engine.arguments = vec![
        "--listen-tls=127.0.0.1:0".to_owned(),
        format!("--tls-certificate={}", text(&server.certificate)),
        format!("--tls-key={}", text(&server.key)),
        format!("--tls-client-ca={}", text(&authority)),
    ];
    engine.start();
    let log = fs::read_to_string(engine.log()).expect("a log");
    let address = log
        .lines()
        .find_map(|line| line.split_once("serving over TLS address="))
        .map(|(_, address)| address.trim().to_owned())
        .unwrap_or_else(|| panic!("it does not say where it listens: {log}"));

    let (code, kind, body) = post(&address, &authority, Some(&client)).expect("answered");
    assert_eq!((code, body.contains("VolumeDriver")), (200, true), "{body}");
    assert_eq!(kind, "application/vnd.docker.plugins.v1+json");
    for (who, files) in [
        ("without a certificate", None),
        ("of others", Some(issue(&others, "other", false))),
        ("an old one", Some(issue(&ours, "old", true))),
    ] {
        let answered = post(&address, &authority, files.as_ref());
        assert!(answered.is_err(), "{who}: {answered:?}");
    }
    let plain = TcpStream::connect(&address).expect("connected");
    plain.set_read_timeout(Some(CALL_LIMIT)).expect("a limit");
    let answered = Engine::post_over(plain, "Plugin.Activate", "");
    assert!(answered.is_err(), "in the clear: {answered:?}");
    // A client that says nothing keeps nobody waiting.
    let _silent: Vec<TcpStream> = (0..8)
        .map(|_| TcpStream::connect(&address).expect("connected"))
        .collect();
    post(&address, &authority, Some(&client)).expect("answered");
    engine.call("Capabilities", &json!({}));
}

#[test]
fn what_is_wrong_with_the_certificates_is_said_at_the_start() {
    let engine = Engine::prepare("docker-tls-wrong");
    let scratch = engine.driver.daemon.scratch.path().to_owned();
    let ours = Authority::new("engines");
    let authority = text(&ours.write(&scratch.join("ca.pem")));
    let files = ours.issue(&scratch, "server", &[], false);
    let (certificate, key) = (text(&files.certificate), text(&files.key));
    let missing = text(&scratch.join("missing.pem"));
    let start = |certificate: &str, key: &str, client_ca: &str| {
        Tool::new(binary("ashlar-csi").to_str().expect("text"))
            .args(["docker", "--attach", "fuse", "--node-id", "node-d"])
            .args(["--endpoint", &text(&engine.socket())])
            .args(["--state-dir", &text(&engine.driver.state_dir())])
            .arg(format!(
                "--daemon=unix:{}",
                engine.driver.daemon.data_dir().join("admin.sock").display()
            ))
            .arg("--listen-tls=127.0.0.1:0")
            .args(["--tls-certificate", certificate, "--tls-key", key])
            .args(["--tls-client-ca", client_ca])
            .run()
            .failure()
    };
    assert!(start(&missing, &key, &authority).contains(&missing));
    assert!(start(&certificate, &certificate, &authority).contains("reading the key"));
    assert!(start(&certificate, &key, &key).contains("has no certificate"));
    let alone = Tool::new(binary("ashlar-csi").to_str().expect("text"))
        .args(["docker", "--listen-tls=127.0.0.1:0"])
        .run()
        .failure();
    assert!(alone.contains("--tls-client-ca"), "{alone}");
}
