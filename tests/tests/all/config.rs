//! Flags, the environment, the file; sockets of every kind.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use ashlar_tests::daemon::{Setup, binary};
use ashlar_tests::http;
use ashlar_tests::nbd::{self, Address, Wishes};
use ashlar_tests::process::Group;
use ashlar_tests::scratch::{Scratch, free_port};
use ashlar_tests::tool::Tool;
use ashlar_tests::wait;

fn ashlard() -> Tool {
    Tool::new(binary("ashlard").to_str().unwrap()).limit(Duration::from_secs(20))
}

#[test]
fn flags_environment_and_file_agree() {
    let scratch = Scratch::new("config");
    let file = scratch.join("c.toml");
    let data = scratch.join("d");
    let data = data.to_str().unwrap();
    let by_flags = ashlard()
        .args([
            "--data-dir",
            data,
            "--store-size",
            "1GiB",
            "--tail-size",
            "64MiB",
            "--log-format",
            "json",
            "--scrub-every",
            "36h",
        ])
        .args([
            "--listen-nbd",
            "tcp:127.0.0.1:10810",
            "--listen-http",
            "127.0.0.1:9999",
            "--print-config",
        ])
        .succeed();
    let by_environment = ashlard()
        .env("ASHLAR_DATA_DIR", data)
        .env("ASHLAR_STORE_SIZE", "1GiB")
        .env("ASHLAR_TAIL_SIZE", "64MiB")
        .env("ASHLAR_LOG_FORMAT", "json")
        .env("ASHLAR_SCRUB_EVERY", "36h")
        .env("ASHLAR_LISTEN_NBD", "tcp:127.0.0.1:10810")
        .env("ASHLAR_LISTEN_HTTP", "127.0.0.1:9999")
        .arg("--print-config")
        .succeed();
    assert_eq!(by_flags, by_environment);
    // What it prints is a file that means the same.
    std::fs::write(&file, &by_flags).unwrap();
    let by_file = || ashlard().arg("--config").arg(&file);
    assert_eq!(by_flags, by_file().arg("--print-config").succeed());
    // A flag beats the environment, which beats the file.
    let mixed = by_file()
        .env("ASHLAR_TAIL_SIZE", "65MiB")
        .env("ASHLAR_LOG_FORMAT", "text")
        .args(["--tail-size", "66MiB", "--print-config"])
        .succeed();
    assert!(
        mixed.contains("66MiB") && !mixed.contains("65MiB") && mixed.contains("text"),
        "{mixed}"
    );
    assert!(
        !std::path::Path::new(data).exists(),
        "--print-config touched the data directory"
    );
}

#[test]
fn what_is_misspelt_is_refused() {
    let scratch = Scratch::new("misspelt");
    let data = scratch.join("d");
    let file = scratch.join("c.toml");
    let refused = |tool: Tool, part: &str| {
        let said = tool.run().failure();
        assert!(
            said.contains(part) && !said.contains("panicked"),
            "expected {part:?} in: {said}"
        );
    };
    let with = |arguments: &[&str]| ashlard().arg("--data-dir").arg(&data).args(arguments);
    refused(with(&["--no-such-flag"]), "--no-such-flag");
    refused(ashlard(), "data-dir");
    refused(with(&["--listen-nbd", "tcp:0.0.0.0:10809"]), "TLS");
    refused(with(&["--listen-nbd", "carrier:pigeon"]), "pigeon");
    refused(with(&["--tail-size", "much"]), "much");
    refused(with(&["--data-threads", "0"]), "data-threads");
    let long = format!("unix:/{}", "x".repeat(120));
    refused(with(&["--listen-nbd", &long]), "107");
    std::fs::write(&file, "tail-sise = \"64MiB\"\n").unwrap();
    refused(with(&["--config", file.to_str().unwrap()]), "tail-sise");
    refused(
        with(&["--config", "/no/such/file.toml"]),
        "/no/such/file.toml",
    );
}

#[test]
fn a_tcp_port_on_loopback() {
    let port = free_port();
    let daemon = Setup::default()
        .listen_nbd(&format!("tcp:127.0.0.1:{port}"))
        .start("tcp");
    daemon.create("disk", "8MiB");
    let address = Address::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let mut by_tcp = nbd::open(&address, "disk", Wishes::EXTENDED).unwrap();
    by_tcp.write(4000, &[3; 200]).unwrap();
    assert_eq!(
        daemon.open("disk", Wishes::SIMPLE).read(4000, 200).unwrap(),
        [3; 200]
    );
    Tool::new("nbdinfo").arg(address.uri("disk")).succeed();
}

#[test]
fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    for flag in ["--listen-nbd", "--listen-admin", "--listen-http"] {
        let address = if flag == "--listen-http" {
            format!("127.0.0.1:{port}")
        } else {
            format!("tcp:127.0.0.1:{port}")
        };
        let scratch = Scratch::new("port");
        let mut tool = ashlard()
            .arg("--data-dir")
            .arg(scratch.join("d"))
            .args(["--store-size", "256MiB"]);
        tool = tool
            .arg("--tail-dir")
            .arg(scratch.memory())
            .args([flag, &address]);
        if flag != "--listen-http" {
            tool = tool.args(["--listen-http", "off"]);
        }
        let said = tool.run().failure();
        assert!(
            said.contains(&port.to_string()) && said.contains("in use"),
            "{flag}: {said}"
        );
    }
}

/// A daemon that is passed a listening socket as systemd(1) does it: from descriptor 3 on, with LISTEN_FDS and LISTEN_PID.
fn activated(scratch: &Scratch, listener: &UnixListener, names: &str, more: &[&str]) -> Activated {
    let descriptor = listener.as_raw_fd();
    let port = free_port();
    let log = std::fs::File::create(scratch.join("log")).unwrap();
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\""])
        .env("LISTEN_FDNAMES", names)
        .arg(binary("ashlard"))
        .arg("--data-dir")
        .arg(scratch.join("d"))
        .args([
            "--store-size",
            "256MiB",
            "--listen-http",
            &format!("127.0.0.1:{port}"),
        ])
        .arg("--tail-dir")
        .arg(scratch.memory())
        .args(more)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    // SAFETY: both calls are async-signal-safe; the descriptor is open in the child. dup2 of 3 onto itself would leave it
    // to be closed by exec, hence the flag.
    unsafe {
        command.pre_exec(move || {
            let failed = libc::dup2(descriptor, 3) < 0 || libc::fcntl(3, libc::F_SETFD, 0) < 0;
            if failed {
                Err(std::io::Error::last_os_error())
            } else {
                Ok(())
            }
        });
    }
    Activated {
        process: Group::spawn(&mut command).unwrap(),
        port,
        log: scratch.join("log"),
    }
}

struct Activated {
    process: Group,
    port: u16,
    log: PathBuf,
}

impl Activated {
    fn wait_ready(&self) {
        wait::until(
            Duration::from_secs(60),
            "ashlard is ready",
            || match http::get(self.port, "/readyz") {
                Ok((200, _)) => Ok(()),
                other => Err(format!(
                    "{other:?}: {}",
                    std::fs::read_to_string(&self.log).unwrap_or_default()
                )),
            },
        );
    }

    fn stop(mut self) {
        self.process.signal(rustix::process::Signal::TERM);
        let ended = self.process.wait(Duration::from_secs(30)).expect("it ends");
        assert!(ended.success());
    }
}

#[test]
fn systemd_socket_activation() {
    let scratch = Scratch::new("systemd");
    let path = scratch.join("activated.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let daemon = activated(&scratch, &listener, "nbd", &[]);
    // A client may connect before the daemon is up: that is what activation is for.
    let early = Address::Unix(path.clone()).connect().unwrap();
    daemon.wait_ready();
    drop(early);
    let admin = ashlar_tests::admin::Admin::new(&scratch.join("d/admin.sock"));
    admin.run(["volume", "create", "disk", "--size", "1MiB"]);
    let mut client = nbd::open(&Address::Unix(path.clone()), "disk", Wishes::SIMPLE).unwrap();
    client.write(0, b"activated").unwrap();
    client.disconnect().unwrap();
    daemon.stop();
    assert!(
        path.exists(),
        "the socket belongs to systemd and must not be removed"
    );
}

/// A socket that is passed takes the place of the one at the same address, and of no other.
#[test]
fn an_admin_socket_from_systemd_leaves_the_other_listeners() {
    let scratch = Scratch::new("systemd-admin");
    let (passed, other) = (scratch.join("passed.sock"), scratch.join("other.sock"));
    let listener = UnixListener::bind(&passed).unwrap();
    let settings = [&passed, &other].map(|path| format!("unix:{}", path.display()));
    let more = [
        "--listen-admin",
        &settings[0],
        "--listen-admin",
        &settings[1],
    ];
    let daemon = activated(&scratch, &listener, "admin", &more);
    daemon.wait_ready();
    for socket in [&passed, &other] {
        let said = ashlar_tests::admin::Admin::new(socket).json(["status"]);
        let listeners = said["listeners"].as_array().expect("listeners").clone();
        let admin = listeners.iter().filter(|one| one["kind"] == "admin");
        assert_eq!(admin.count(), 2, "{listeners:?}");
    }
    daemon.stop();
    assert!(passed.exists() && !other.exists());
}

#[test]
fn health_and_json_logs() {
    let mut daemon = Setup::default()
        .args(["--log-format", "json"])
        .start("health");
    for (path, expected) in [
        ("/healthz", 200),
        ("/readyz", 200),
        ("/metrics", 200),
        ("/no-such", 404),
    ] {
        let (code, body) = http::get(daemon.http_port(), path).unwrap();
        assert_eq!(code, expected, "{path}: {body}");
    }
    daemon.stop();
    for line in daemon.log.text().lines() {
        serde_json::from_str::<serde_json::Value>(line)
            .unwrap_or_else(|error| panic!("{error}: {line}"));
    }
}

/// The default engine and the one that containers without io_uring get, and more than one data thread.
#[test]
fn every_engine_and_two_data_threads() {
    for arguments in [
        ["--io-engine", "posix"],
        ["--io-engine", "auto"],
        ["--data-threads", "2"],
    ] {
        let mut daemon = Setup::default().args(arguments).start("engine");
        for volume in ["one", "two", "three"] {
            daemon.create(volume, "16MiB");
            let mut client = daemon.open(volume, Wishes::STRUCTURED);
            client.write(5000, &[9; 100_000]).unwrap();
            client.flush().unwrap();
        }
        daemon.kill();
        daemon.start();
        for volume in ["one", "two", "three"] {
            assert_eq!(
                daemon
                    .open(volume, Wishes::SIMPLE)
                    .read(5000, 100_000)
                    .unwrap(),
                [9; 100_000],
                "{arguments:?}"
            );
        }
        daemon.stop();
    }
}
