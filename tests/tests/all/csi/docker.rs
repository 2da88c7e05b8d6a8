//! The volume plugin, driven as an engine does: HTTP over its socket, or over TLS.

mod tls;

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use ashlar_tests::csi::Driver;
use ashlar_tests::daemon::{Setup, binary};
use ashlar_tests::process::Group;
use ashlar_tests::wait;
use serde_json::{Value, json};

/// Longest call, as long as the engine waits for a mount.
const CALL_LIMIT: Duration = Duration::from_secs(120);

struct Engine {
    driver: Driver,
    plugin: Option<Group>,
    /// Beside those that the plugin always has.
    arguments: Vec<String>,
}

impl Engine {
    fn new(test: &str) -> Engine {
        let mut engine = Engine::prepare(test);
        engine.start();
        engine
    }

    /// Without the plugin.
    fn prepare(test: &str) -> Engine {
        Engine {
            driver: Driver::prepare(test, Setup::default()),
            plugin: None,
            arguments: Vec::new(),
        }
    }

    fn log(&self) -> PathBuf {
        self.driver.daemon.scratch.join("docker.log")
    }

    fn socket(&self) -> PathBuf {
        self.driver.daemon.scratch.join("p/ashlar.sock")
    }

    fn start(&mut self) {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log())
            .expect("a log");
        let mut command = Command::new(binary("ashlar-csi"));
        command
            .args(["docker", "--attach", "fuse", "--node-id", "node-d"])
            .arg("--endpoint")
            .arg(self.socket())
            .arg("--daemon")
            .arg(format!(
                "unix:{}",
                self.driver.daemon.data_dir().join("admin.sock").display()
            ))
            .arg("--state-dir")
            .arg(self.driver.state_dir())
            .args(["--unstage-patience", "2"])
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.plugin = Some(Group::spawn(&mut command).expect("it starts"));
        wait::until(Duration::from_secs(60), "the plugin answers", || {
            self.post("Plugin.Activate", "")
                .map(drop)
                .map_err(|error| error.to_string())
        });
    }

    fn kill(&mut self) {
        self.plugin.take().expect("it runs").kill();
    }

    /// Status code, content type and body of a call.
    fn post(&self, call: &str, body: &str) -> std::io::Result<(u16, String, String)> {
        let stream = UnixStream::connect(self.socket())?;
        stream.set_read_timeout(Some(CALL_LIMIT))?;
        Engine::post_over(stream, call, body)
    }

    fn post_over(
        mut stream: impl Read + Write,
        call: &str,
        body: &str,
    ) -> std::io::Result<(u16, String, String)> {
        write!(
            stream,
            "POST /{call} HTTP/1.1\r\nHost: plugin\r\nAccept: application/vnd.docker.plugins.v1.2+json\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let odd = || std::io::Error::other(format!("not an answer: {text}"));
        let (head, body) = text.split_once("\r\n\r\n").ok_or_else(odd)?;
        let code = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        let kind = head
            .lines()
            .find_map(|line| line.strip_prefix("content-type: "))
            .unwrap_or_default();
        Ok((code.ok_or_else(odd)?, kind.to_owned(), body.to_owned()))
    }

    fn call(&self, call: &str, body: &Value) -> Value {
        let (code, kind, answer) = self
            .post(&format!("VolumeDriver.{call}"), &body.to_string())
            .expect("answered");
        assert_eq!(
            (code, kind.as_str()),
            (200, "application/vnd.docker.plugins.v1+json"),
            "{call} {body}: {answer}"
        );
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        assert_eq!(answer["Err"], "", "{call} {body}");
        answer
    }

    /// The error of a call.
    fn refused(&self, call: &str, body: &Value) -> String {
        let (code, _, answer) = self
            .post(&format!("VolumeDriver.{call}"), &body.to_string())
            .expect("answered");
        assert_eq!(code, 500, "{call} {body}: {answer}");
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        answer["Err"].as_str().expect("words").to_owned()
    }

    fn mount(&self, name: &str, id: &str) -> PathBuf {
        let answer = self.call("Mount", &json!({"Name": name, "ID": id}));
        PathBuf::from(answer["Mountpoint"].as_str().expect("a path"))
    }

    fn unmount(&self, name: &str, id: &str) {
        let answer = self.call("Unmount", &json!({"Name": name, "ID": id}));
        assert_eq!(answer, json!({"Err": ""}));
    }

    fn path(&self, name: &str) -> String {
        let answer = self.call("Path", &json!({"Name": name}));
        answer["Mountpoint"].as_str().expect("a path").to_owned()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(mut plugin) = self.plugin.take() {
            plugin.kill();
        }
        if std::thread::panicking() {
            let log = fs::read_to_string(self.log());
            eprintln!("--- the plugin's log\n{}", log.unwrap_or_default());
        }
    }
}

fn is_mounted(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("there is a /proc");
    table
        .lines()
        .any(|line| line.split(' ').nth(4) == path.to_str())
}

#[test]
fn a_volume_from_create_to_remove() {
    let engine = Engine::new("docker-calls");
    let (code, kind, body) = engine.post("Plugin.Activate", "").expect("answered");
    assert_eq!(
        (code, body.as_str()),
        (200, r#"{"Implements":["VolumeDriver"],"Err":""}"#)
    );
    assert_eq!(kind, "application/vnd.docker.plugins.v1+json");
    assert_eq!(
        engine.call("Capabilities", &json!({})),
        json!({"Capabilities": {"Scope": "global"}, "Err": ""})
    );
    assert_eq!(engine.post("Volume.Else", "{}").expect("answered").0, 404);
    assert_eq!(engine.call("List", &json!({}))["Volumes"], json!([]));

    let create = json!({"Name": "My_Data", "Opts": {"size": "64MiB", "filesystem": "ext4"}});
    assert_eq!(engine.call("Create", &create), json!({"Err": ""}));
    engine.call("Create", &create);
    engine.refused(
        "Create",
        &json!({"Name": "My_Data", "Opts": {"size": "2g"}}),
    );
    let get = engine.call("Get", &json!({"Name": "My_Data"}));
    assert_eq!(get["Volume"]["Name"], "My_Data");
    assert_eq!(get["Volume"]["Mountpoint"], "");
    assert_eq!(get["Volume"]["Status"]["sizeBytes"], 64 << 20);
    assert_eq!(engine.path("My_Data"), "");
    assert_eq!(
        engine.call("List", &json!({}))["Volumes"][0]["Name"],
        "My_Data"
    );

    let point = engine.mount("My_Data", "c1");
    assert_eq!(engine.path("My_Data"), point.to_str().expect("text"));
    fs::write(point.join("kept"), b"data").expect("written");
    let refused = engine.refused("Remove", &json!({"Name": "My_Data"}));
    assert!(refused.contains("published to node node-d"), "{refused}");
    engine.unmount("My_Data", "c1");
    assert!(!is_mounted(&point));
    assert_eq!(engine.driver.leftovers(), Vec::<String>::new());
    let again = engine.mount("My_Data", "c2");
    assert_eq!(fs::read(again.join("kept")).expect("read"), b"data");
    engine.unmount("My_Data", "c2");
    engine.call("Remove", &json!({"Name": "My_Data"}));
    for call in ["Get", "Mount", "Unmount", "Path", "Remove"] {
        let refused = engine.refused(call, &json!({"Name": "My_Data", "ID": "c1"}));
        assert_eq!(refused, "no such volume: My_Data", "{call}");
    }
    // What Docker did not make, it can use and not remove.
    engine.driver.daemon.create("foreign", "64MiB");
    engine.mount("foreign", "c1");
    assert_eq!(
        engine.call("List", &json!({}))["Volumes"][0]["Name"],
        "foreign"
    );
    engine.unmount("foreign", "c1");
    assert_eq!(engine.call("List", &json!({}))["Volumes"], json!([]));
    let refused = engine.refused("Remove", &json!({"Name": "foreign"}));
    assert!(refused.contains("not created through Docker"), "{refused}");
    for (call, body) in [
        ("Create", "{"),
        ("Create", "{}"),
        ("Create", r#"{"Name":"x","Opts":{"sise":"1g"}}"#),
        ("Create", r#"{"Name":"x","Opts":{"size":"much"}}"#),
        ("Mount", r#"{"ID":"c"}"#),
    ] {
        let (code, _, answer) = engine
            .post(&format!("VolumeDriver.{call}"), body)
            .expect("answered");
        assert_eq!(code, 500, "{call} {body}: {answer}");
    }
    assert_eq!(engine.driver.leftovers(), Vec::<String>::new());
}

#[test]
fn two_containers_share_a_volume_over_a_restart_of_the_plugin() {
    let mut engine = Engine::new("docker-two");
    engine.call("Create", &json!({"Name": "v", "Opts": {"size": "64MiB"}}));
    // Both at once, as containers of one composition start.
    let (first, second) = std::thread::scope(|threads| {
        let first = threads.spawn(|| engine.mount("v", "c1"));
        let second = threads.spawn(|| engine.mount("v", "c2"));
        (
            first.join().expect("mounted"),
            second.join().expect("mounted"),
        )
    });
    assert_eq!(first, second);
    assert_eq!(
        engine.mount("v", "c2"),
        first,
        "the same id again is no one more"
    );
    fs::write(first.join("kept"), b"data").expect("written");
    engine.unmount("v", "c1");
    assert_eq!(fs::read(first.join("kept")).expect("read"), b"data");

    engine.kill();
    assert_eq!(fs::read(first.join("kept")).expect("read"), b"data");
    engine.start();
    assert_eq!(engine.path("v"), first.to_str().expect("text"));
    engine.mount("v", "c3");
    engine.unmount("v", "c2");
    // Of one that is not known, while another uses it.
    engine.unmount("v", "c9");
    assert_eq!(fs::read(first.join("kept")).expect("read"), b"data");
    engine.unmount("v", "c3");
    assert!(!is_mounted(&first));
    assert_eq!(engine.driver.leftovers(), Vec::<String>::new());

    // Without the daemon: unmounted all the same, and given back when it is there again.
    engine.mount("v", "c5");
    engine.driver.daemon.kill();
    engine.unmount("v", "c5");
    assert!(!is_mounted(&first));
    assert_eq!(engine.driver.leftovers(), Vec::<String>::new());
    engine.driver.daemon.start();
    wait::until(Duration::from_secs(120), "the volume is given back", || {
        let get = engine.call("Get", &json!({"Name": "v"}));
        let users = &get["Volume"]["Status"]["publishedTo"];
        (users == &json!([])).then_some(()).ok_or(users.to_string())
    });

    // What nobody is recorded to use goes when the plugin starts: it was killed between a mount and its record.
    engine.mount("v", "c4");
    engine.kill();
    let users = engine.driver.state_dir().join("users");
    for entry in fs::read_dir(users).expect("listed").flatten() {
        fs::remove_file(entry.path()).expect("removed");
    }
    engine.start();
    assert_eq!(engine.path("v"), "");
    assert_eq!(engine.driver.leftovers(), Vec::<String>::new());
    engine.call("Remove", &json!({"Name": "v"}));
}
