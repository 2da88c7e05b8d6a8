//! How the pods of a cluster become nodes of one: the chart's own scripts, with the arguments that it renders and the
//! certificates that it makes, run here as its pods would run them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use ashlar_tests::daemon::binary;
use ashlar_tests::etcd::{Etcd, ServerTls};
use ashlar_tests::process::Group;
use ashlar_tests::scratch::{Scratch, free_port};
use ashlar_tests::tool::{Running, Tool};
use ashlar_tests::wait;
use serde_json::Value;

use super::{CLUSTER, array, containers, objects, root, strings, template, title};

/// Where containers find the scripts.
pub(super) const MOUNTED: &str = "/scripts/";
const SCRIPTS: [&str; 3] = ["membership", "start", "tokens"];
const LONG: Duration = Duration::from_secs(60);

/// The script that is mounted at a path.
pub(super) fn script_at(path: &str) -> Option<&'static str> {
    let name = path.strip_prefix(MOUNTED)?;
    SCRIPTS.into_iter().find(|script| *script == name)
}

fn script(name: &str) -> PathBuf {
    root().join(format!("deploy/charts/ashlar/files/cluster/{name}.sh"))
}

/// What is rendered for a cluster, with certificates of Helm's.
struct Chart {
    objects: Vec<Value>,
}

impl Chart {
    fn render() -> Chart {
        let own = ["--values", CLUSTER, "--set", "etcd.tlsSecret="];
        Chart {
            objects: objects(&template(&own).succeed()),
        }
    }

    fn object(&self, wanted: &str) -> &Value {
        let found = self.objects.iter().find(|object| title(object) == wanted);
        found.unwrap_or_else(|| panic!("no {wanted}"))
    }

    /// The arguments of a container of the daemon's pod.
    fn arguments(&self, name: &str) -> Vec<String> {
        let set = self.object("StatefulSet ashlar-daemon");
        let container = containers(&set["spec"]["template"]["spec"])
            .find(|container| container["name"] == name)
            .unwrap_or_else(|| panic!("no container {name}"));
        strings(&container["args"])
    }
}

/// Where the programs are that a pod's containers have.
const PROGRAMS: &str = "programs";

/// Puts what is in the image, and nothing else, where pods look for programs.
fn install_programs(scratch: &Scratch) {
    let folder = scratch.join(PROGRAMS);
    fs::create_dir_all(&folder).expect("a folder");
    let ours = binary("ashlard");
    let ours = ours.parent().expect("a folder");
    let places = [ours, Path::new("/usr/bin"), Path::new("/usr/sbin")];
    for program in super::image::programs() {
        let here = places.map(|place| place.join(&program));
        // This machine need not have all of them: a script that runs one of those fails here.
        if let Some(here) = here.iter().find(|path| path.exists()) {
            symlink(here, folder.join(program)).expect("a link");
        }
    }
}

/// One pod with a node of its own.
struct Pod<'a> {
    name: String,
    scratch: &'a Scratch,
    metadata: String,
    number: usize,
    admin_port: u16,
}

impl Pod<'_> {
    fn directory(&self) -> PathBuf {
        self.scratch.join(&self.name)
    }

    /// Its paths and addresses in the place of the chart's.
    fn here(&self, arguments: Vec<String>) -> Vec<String> {
        let own = self.directory().display().to_string();
        let mut here = Vec::new();
        for argument in arguments {
            let (name, value) = argument.split_once('=').expect("NAME=VALUE");
            let value = match name {
                "--data-dir" => format!("{own}/data"),
                "--tail-dir" => format!("{own}/tail"),
                "--metadata" => self.metadata.clone(),
                "--store-size" => "256MiB".to_owned(),
                "--listen-http" => "off".to_owned(),
                // Needs a right that a test may not have.
                "--io-flusher" => "false".to_owned(),
                _ => value
                    .replace("/run/ashlar/", &format!("{own}/"))
                    .replace(
                        "/etcd/",
                        &format!("{}/etcd-tls/", self.scratch.path().display()),
                    )
                    .replace(
                        "$(POD_IP):9461",
                        &format!("127.0.0.{}:{}", self.number + 1, self.admin_port),
                    )
                    .replace("$(POD_IP):9462", &format!("127.0.0.{}:0", self.number + 1)),
            };
            here.push(format!("{name}={value}"));
        }
        here
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        let programs = self.scratch.join(PROGRAMS).display().to_string();
        vec![
            ("PATH", programs),
            ("POD_NAME", self.name.clone()),
            ("FOUNDER", "ashlar-daemon-0".to_owned()),
            (
                "JOIN_DIRECTORY",
                self.scratch.join("join").display().to_string(),
            ),
            (
                "ASHLAR_DATA_DIR",
                format!("{}/data", self.directory().display()),
            ),
            ("ASHLAR_ADMIN", self.admin()),
            ("RETRY_SECONDS", "1".to_owned()),
        ]
    }

    fn admin(&self) -> String {
        format!("unix:{}/admin.sock", self.directory().display())
    }

    fn tool(&self, script_name: &str) -> Tool {
        let tool = Tool::new("sh").arg(script(script_name));
        self.environment()
            .into_iter()
            .fold(tool, |tool, (name, value)| tool.env(name, value))
    }

    /// The init container.
    fn membership(&self, chart: &Chart) -> Tool {
        for folder in ["data", "tail"] {
            fs::create_dir_all(self.directory().join(folder)).expect("a folder");
        }
        let arguments = self.here(chart.arguments("membership"));
        self.tool("membership").args(arguments)
    }

    /// The init container, until it lets the daemon start.
    fn admit(&self, chart: &Chart) {
        admitted(self.membership(chart).start());
    }

    /// The daemon's container, until the daemon is ready.
    fn start(&self, chart: &Chart) -> Group {
        let log = fs::File::create(self.directory().join("log")).expect("a log");
        let mut command = Command::new("sh");
        command
            .arg(script("start"))
            .arg("ashlard")
            .args(self.here(chart.arguments("ashlard")))
            .envs(self.environment())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log);
        let mut daemon = Group::spawn(&mut command).expect("sh starts");
        wait::until(LONG, "the daemon is ready", || {
            if let Some(status) = daemon.exited() {
                let log = fs::read_to_string(self.directory().join("log")).unwrap_or_default();
                panic!("{}: {status}: {log}", self.name);
            }
            let status = self.ask(&["status", "-o", "json"]).run();
            if status.stdout.contains("\"state\": \"ready\"") {
                Ok(())
            } else {
                Err(status.to_string())
            }
        });
        daemon
    }

    fn ask(&self, arguments: &[&str]) -> Tool {
        Tool::new(binary("ashlar").to_str().expect("UTF-8"))
            .args(["--admin", &self.admin()])
            .args(arguments)
    }
}

/// Waits for an init container to let its daemon start. What the script's shell has to say itself, such as that it knows
/// no such program, is the only thing it says there.
fn admitted(membership: Running) {
    let finished = membership.finish();
    assert!(
        finished.status.success() && finished.stderr.is_empty(),
        "{finished}"
    );
}

/// The files of the chart's Secret, in a folder.
fn write_certificates(secret: &Value, folder: &Path) {
    fs::create_dir_all(folder).expect("a folder");
    for name in ["ca.crt", "tls.crt", "tls.key"] {
        let text = secret["data"][name].as_str().expect("base64");
        let encoded = folder.join(format!("{name}.base64"));
        fs::write(&encoded, text).expect("written");
        // PEM is text.
        let pem = Tool::new("base64").arg("--decode").arg(encoded).succeed();
        fs::write(folder.join(name), pem).expect("written");
    }
}

#[test]
fn pods_become_nodes_of_one_cluster_by_themselves() {
    let chart = Chart::render();
    let scratch = Scratch::new("joining");
    install_programs(&scratch);
    let tls = scratch.join("etcd-tls");
    write_certificates(chart.object("Secret ashlar-etcd-tls"), &tls);
    let etcd = Etcd::start_named(
        &scratch,
        "etcd",
        Some(ServerTls {
            certificate: tls.join("tls.crt"),
            key: tls.join("tls.key"),
            client_authority: tls.join("ca.crt"),
        }),
    );
    let join = scratch.join("join");
    fs::create_dir_all(&join).expect("a folder");
    let pod = |name: &str, number: usize| Pod {
        name: name.to_owned(),
        scratch: &scratch,
        metadata: etcd.setting(),
        number,
        admin_port: free_port(),
    };
    let pods: Vec<_> = (0..3)
        .map(|number| pod(&format!("ashlar-daemon-{number}"), number))
        .collect();

    // Pods start in any order: without a token one waits.
    let mut waiting = pods[1].membership(&chart).start();
    pods[0].admit(&chart);
    // It is founded already when the pod is made anew.
    pods[0].admit(&chart);
    let mut daemons = vec![pods[0].start(&chart)];
    assert!(waiting.is_running());

    // The job.
    let job = chart.object("Job ashlar-daemon-join-1");
    let arguments = strings(&job["spec"]["template"]["spec"]["initContainers"][0]["args"]);
    assert_eq!(arguments[2..], ["ashlar-daemon-1", "ashlar-daemon-2"]);
    let patch = scratch.join("patch.json");
    pods[0]
        .tool("tokens")
        .arg(&patch)
        .args(&arguments[1..])
        .succeed();
    let patch: Value =
        serde_json::from_str(&fs::read_to_string(&patch).expect("a patch")).expect("JSON");
    // The kubelet writes what the Secret has.
    for (pod, token) in patch["stringData"].as_object().expect("entries") {
        fs::write(join.join(pod), token.as_str().expect("a token")).expect("written");
    }

    admitted(waiting);
    pods[2].admit(&chart);
    daemons.push(pods[1].start(&chart));
    daemons.push(pods[2].start(&chart));
    let nodes = pods[2].ask(&["node", "list", "-o", "json"]).succeed();
    let nodes: Value = serde_json::from_str(&nodes).expect("JSON");
    assert_eq!(array(&nodes["nodes"]).len(), 3, "{nodes}");

    // A node comes back on another pod and at another address, with a token that is used up.
    drop(daemons.pop());
    fs::remove_file(join.join("ashlar-daemon-2")).expect("removed");
    fs::write(
        join.join("ashlar-daemon-2"),
        patch["stringData"]["ashlar-daemon-1"]
            .as_str()
            .expect("a token"),
    )
    .expect("written");
    pods[2].admit(&chart);
    daemons.push(pods[2].start(&chart));

    // The first pod on another node's data is that node.
    drop(daemons);
    let moved = Pod {
        name: "ashlar-daemon-0".to_owned(),
        ..pod("ashlar-daemon-1", 1)
    };
    fs::rename(pods[0].directory(), scratch.join("away")).expect("renamed");
    fs::rename(pods[1].directory(), moved.directory()).expect("renamed");
    moved.admit(&chart);

    // The first pod on an empty node founds no second cluster in the first one's place.
    fs::rename(moved.directory(), scratch.join("away-too")).expect("renamed");
    let mut lost = pods[0].membership(&chart).start();
    wait::until(LONG, "it says why it does not", || match lost.printed() {
        0 => Err("it says nothing".to_owned()),
        _ => Ok(()),
    });
    assert!(lost.is_running());
    let said = lost.abandon();
    assert!(said.stdout.contains("etcd holds another cluster"), "{said}");
}

#[test]
fn the_scripts_are_those_of_the_chart() {
    let chart = Chart::render();
    let map = chart.object("ConfigMap ashlar-daemon-scripts");
    let names: Vec<_> = map["data"].as_object().expect("scripts").keys().collect();
    assert_eq!(names, SCRIPTS);
    for name in SCRIPTS {
        let text = fs::read_to_string(script(name)).expect("a script");
        assert_eq!(map["data"][name].as_str().map(str::trim), Some(text.trim()));
        Tool::new("sh").arg("-n").arg(script(name)).succeed();
    }
}
