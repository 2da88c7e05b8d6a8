//! Every program that a container starts understands what it is told, and finds the paths it is told of.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_tests::daemon::binary;
use ashlar_tests::scratch::Scratch;
use ashlar_tests::tool::Tool;
use serde_json::Value;

use super::{
    array, assert_none, both, containers, every, image, joining, pod_spec, sidecars, strings, title,
};

/// Our programs, by the names under which the image has them.
const OURS: [&str; 3] = ["ashlard", "ashlar", "ashlar-csi"];

/// Long flags in the help of one of our programs, or of a subcommand of it.
pub(super) fn flags_of(program: &str, subcommand: &[&str]) -> BTreeSet<String> {
    let help = Tool::new(binary(program).to_str().expect("UTF-8"))
        .args(subcommand)
        .arg("--help")
        .succeed();
    flags_in(&help)
}

/// Long flags that stand at the start of a line of a help.
fn flags_in(help: &str) -> BTreeSet<String> {
    help.lines()
        .flat_map(|line| {
            line.split_whitespace()
                .take_while(|word| word.starts_with('-'))
        })
        .filter(|word| word.starts_with("--"))
        .map(|word| {
            word.split(['=', '[', ','])
                .next()
                .unwrap_or(word)
                .to_owned()
        })
        .collect()
}

/// What a container runs: its program and all arguments, with wrappers peeled off.
struct Run {
    program: String,
    arguments: Vec<String>,
    /// `setpriv` and its own arguments, when it is the way to the program.
    through: Vec<String>,
}

fn run_of(container: &Value) -> Option<Run> {
    let mut words = strings(&container["command"]);
    words.extend(strings(&container["args"]));
    let mut through = Vec::new();
    // A script of the chart ends in a program of ours, or is the way to one.
    if words.first()? == "sh" && words.get(1)?.starts_with(joining::MOUNTED) {
        let script: Vec<_> = words.drain(..2).collect();
        let ends_in: &[&str] = match joining::script_at(&script[1])? {
            "membership" => &["ashlar", "cluster", "init"],
            "tokens" => return Some(tokens(words)),
            _ => &[],
        };
        words.splice(..0, ends_in.iter().map(|&word| word.to_owned()));
    }
    if words.first()? == "setpriv" {
        let end = words.iter().position(|word| word == "--")?;
        through = words.drain(..=end).collect();
        through.pop();
    }
    let program = words.remove(0);
    Some(Run {
        program,
        arguments: words,
        through,
    })
}

/// What the script of that name does with its own arguments.
fn tokens(words: Vec<String>) -> Run {
    Run {
        program: "ashlar".to_owned(),
        arguments: vec![
            "cluster".to_owned(),
            "token".to_owned(),
            format!("--lifetime={}", words[1]),
        ],
        through: Vec::new(),
    }
}

/// Absolute paths in an argument: all of it, after `=`, or after the kind of a socket's address.
fn paths_in(argument: &str) -> Vec<&str> {
    argument
        .split([',', ' '])
        .flat_map(|part| {
            let value = part.split_once('=').map_or(part, |(_, value)| value);
            [value, value.strip_prefix("unix:").unwrap_or(value)]
        })
        .filter(|value| value.starts_with('/'))
        .collect()
}

/// True when `path` is in a place where the container has something of the node's or the pod's.
fn is_mounted(container: &Value, path: &str) -> bool {
    array(&container["volumeMounts"]).iter().any(|mount| {
        let point = mount["mountPath"].as_str().expect("a path");
        path == point || path.starts_with(&format!("{point}/"))
    })
}

/// With `$(NAME)` replaced by what the pod's environment may hold.
fn expanded(container: &Value, argument: &str) -> Result<String, String> {
    let mut argument = argument.to_owned();
    while let Some(start) = argument.find("$(") {
        let end = start + argument[start..].find(')').expect("closed");
        let name = &argument[start + 2..end];
        if !array(&container["env"])
            .iter()
            .any(|env| env["name"] == name)
        {
            return Err(format!("$({name}) is not in the environment"));
        }
        argument.replace_range(start..=end, "value");
    }
    Ok(argument)
}

fn complaints_about_run(run: &Run) -> Vec<String> {
    let mut complaints = Vec::new();
    if !run.through.is_empty() {
        let known = flags_in(&Tool::new("setpriv").arg("--help").succeed());
        for flag in &run.through[1..] {
            let name = flag.split('=').next().expect("a word");
            if !known.contains(name) {
                complaints.push(format!("setpriv has no {name}"));
            }
        }
    }
    match run.program.as_str() {
        "ashlard" => {
            let finished = Tool::new(binary("ashlard").to_str().expect("UTF-8"))
                .args(&run.arguments)
                .arg("--print-config")
                .run();
            if !finished.status.success() {
                complaints.push(finished.to_string());
            }
        }
        "ashlar" => {
            let finished = Tool::new(binary("ashlar").to_str().expect("UTF-8"))
                .args(&run.arguments)
                .arg("--help")
                .run();
            if !finished.status.success() {
                complaints.push(finished.to_string());
            }
        }
        "ashlar-csi" if run.arguments[0] == "flexvolume-install" => {
            complaints.extend(complaints_about_installing(&run.arguments[2..]));
        }
        // It takes its settings from what was installed.
        "ashlar-csi" if run.arguments == ["flexvolume-keep"] => {}
        // It reads its whole command line, and then refuses this log before it does anything.
        "ashlar-csi" => {
            let log = |argument: &&String| argument.starts_with("--log=");
            let finished = Tool::new(binary("ashlar-csi").to_str().expect("UTF-8"))
                .args(run.arguments.iter().filter(|argument| !log(argument)))
                .arg("--log=no[such[log")
                .run();
            let is_refused = finished.status.code() == Some(1) && finished.stderr.contains("--log");
            if !is_refused {
                complaints.push(finished.to_string());
            }
        }
        "sh" => {
            for word in run.arguments[1].split("||").flat_map(|s| s.split("&&")) {
                let program = word.split_whitespace().next().expect("a program");
                if program != "echo" && !image::has_program(program) {
                    complaints.push(format!("the image has no {program}"));
                }
            }
        }
        program if image::has_program(program) => {}
        program => complaints.push(format!("the image has no {program}")),
    }
    complaints
}

/// Installs the FlexVolume driver for real, elsewhere.
fn complaints_about_installing(settings: &[String]) -> Vec<String> {
    let scratch = Scratch::new("flexvolume");
    let finished = Tool::new(binary("ashlar-csi").to_str().expect("UTF-8"))
        .arg("flexvolume-install")
        .arg(scratch.path())
        .args(settings)
        .run();
    if !finished.status.success() {
        return vec![finished.to_string()];
    }
    let entries = std::fs::read_dir(scratch.join("ashlar.io~ashlar")).expect("the driver's folder");
    let mut names: Vec<_> = entries
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    names.sort();
    // Nothing under a name with a dot is left.
    if names == ["ashlar", "flexvolume.conf"] {
        Vec::new()
    } else {
        vec![format!("it installed {names:?}")]
    }
}

fn complaints_about(pod: &Value, container: &Value, repository: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let image_name = container["image"].as_str().expect("an image");
    let ours = format!("{repository}:{}", super::VERSION);
    let mut arguments = Vec::new();
    for argument in strings(&container["args"]) {
        match expanded(container, &argument) {
            Ok(argument) => arguments.push(argument),
            Err(error) => complaints.push(error),
        }
    }
    if image_name == ours {
        match run_of(container) {
            Some(run) => complaints.extend(complaints_about_run(&run)),
            None => complaints.push("says no command".to_owned()),
        }
    } else if let Some(found) = sidecars::of_others(image_name, container, &arguments) {
        complaints.extend(found);
    } else if !container["command"].is_null() {
        complaints.push("a sidecar starts as its image says".to_owned());
    } else {
        complaints.extend(sidecars::complaints(image_name, &arguments));
    }
    for argument in &arguments {
        for path in paths_in(argument) {
            // The registrar only passes on where the kubelet finds the socket.
            let elsewhere = argument.starts_with("--kubelet-registration-path=")
                // A prefix of keys.
                || argument.starts_with("--etcd-prefix=")
                // What is installed runs on the node itself.
                || container["name"] == "install";
            if !elsewhere && !is_mounted(container, path) {
                complaints.push(format!("{argument}: nothing is mounted at {path}"));
            }
        }
    }
    for mount in array(&container["volumeMounts"]) {
        let name = &mount["name"];
        let templates = &pod["volumeClaimTemplates"];
        let is_there = |volumes: &Value| array(volumes).iter().any(|v| &v["name"] == name);
        if !is_there(&pod["volumes"]) && !is_there(templates) {
            complaints.push(format!("no volume {name}"));
        }
    }
    complaints
}

#[test]
fn every_container_runs_what_its_image_has_with_arguments_it_takes() {
    let ours = "localhost/ashlar";
    let repositories = [ours, "registry.example.org/storage/ashlar", ours, ours];
    let mut complaints = Vec::new();
    let mut programs = BTreeSet::new();
    for ((name, objects), repository) in every().into_iter().zip(repositories) {
        for object in &objects {
            let Some(pod) = pod_spec(object) else {
                continue;
            };
            let mut pod = pod.clone();
            // Claims of a StatefulSet are volumes of its pod under the same names.
            pod["volumeClaimTemplates"] = array(&object["spec"]["volumeClaimTemplates"])
                .iter()
                .map(|claim| claim["metadata"].clone())
                .collect();
            for container in containers(&pod) {
                programs.extend(run_of(container).map(|run| run.program));
                let found = complaints_about(&pod, container, repository);
                complaints.extend(found.into_iter().map(|complaint| {
                    format!(
                        "{name}: {} {}: {complaint}",
                        title(object),
                        container["name"]
                    )
                }));
            }
        }
    }
    assert_none(&complaints);
    for program in OURS {
        assert!(programs.contains(program), "nothing runs {program}");
    }
}

#[test]
fn a_wrong_flag_a_wrong_value_and_a_missing_mount_are_found() {
    let [(_, objects), _] = both();
    let daemon = objects
        .iter()
        .find(|object| object["kind"] == "StatefulSet")
        .expect("the daemon");
    let pod = pod_spec(daemon).expect("a pod");
    for (old, new, word) in [
        (
            "--tail-dir=/run/ashlar/tail",
            "--tails=/run/ashlar/tail",
            "--tails",
        ),
        ("--store-size=20GiB", "--store-size=20XB", "20XB"),
        (
            "--tail-dir=/run/ashlar/tail",
            "--tail-dir=/run/other",
            "/run/other",
        ),
        ("--log-format=json", "--log-format=$(FORMAT)", "FORMAT"),
    ] {
        let mut container = pod["containers"][0].clone();
        let arguments: Vec<_> = strings(&container["args"])
            .into_iter()
            .map(|argument| {
                if argument == old {
                    new.to_owned()
                } else {
                    argument
                }
            })
            .collect();
        container["args"] = arguments.into();
        let found = complaints_about(pod, &container, "localhost/ashlar").join("\n");
        assert!(found.contains(word), "{new}: {found:?}");
    }
}

#[test]
fn a_wrong_flag_and_a_wrong_value_of_the_driver_are_found() {
    let good = [
        "--mode=node",
        "--daemon=unix:/run/ashlar/admin.sock",
        "--log=info",
    ];
    let complaints = |arguments: &[&str]| {
        complaints_about_run(&Run {
            program: "ashlar-csi".to_owned(),
            arguments: arguments.iter().map(|&word| word.to_owned()).collect(),
            through: Vec::new(),
        })
    };
    assert_none(&complaints(&good));
    for wrong in [
        "--mod=node",
        "--mode=nodes",
        "--daemon=/run/admin.sock",
        "--nbd-timeout=0",
    ] {
        let name = wrong.split('=').next().expect("a word");
        let arguments: Vec<_> = good
            .into_iter()
            .filter(|argument| !argument.starts_with(&format!("{name}=")))
            .chain([wrong])
            .collect();
        assert_eq!(complaints(&arguments).len(), 1, "{wrong}");
    }
}

#[test]
fn every_probe_reaches_something() {
    for (name, objects) in every() {
        for object in &objects {
            let Some(pod) = pod_spec(object) else {
                continue;
            };
            let endpoints: Vec<String> = containers(pod)
                .flat_map(|container| strings(&container["args"]))
                .filter_map(|argument| {
                    let flags = [
                        "--http-endpoint=",
                        "--listen-http=",
                        "--listen-metrics-urls=http://",
                    ];
                    flags
                        .iter()
                        .find_map(|flag| Some(argument.strip_prefix(flag)?.to_owned()))
                })
                .collect();
            let ports: BTreeMap<_, _> = containers(pod)
                .flat_map(|container| array(&container["ports"]))
                .map(|port| {
                    (
                        port["name"].clone().to_string(),
                        port["containerPort"].clone(),
                    )
                })
                .collect();
            for container in containers(pod) {
                for kind in ["startupProbe", "readinessProbe", "livenessProbe"] {
                    let get = &container[kind]["httpGet"];
                    if get.is_null() {
                        continue;
                    }
                    let port = match &get["port"] {
                        Value::String(_) => &ports[&get["port"].to_string()],
                        number => number,
                    };
                    let host = get["host"].as_str().unwrap_or("");
                    let wanted = format!("{host}:{port}");
                    let reached = endpoints.iter().any(|endpoint| endpoint.ends_with(&wanted));
                    assert!(
                        reached,
                        "{name}: {} {}: {wanted}",
                        title(object),
                        container["name"]
                    );
                }
            }
        }
    }
}

#[test]
fn only_the_node_part_is_privileged_and_root_is_where_it_is_needed() {
    let mut roots = BTreeSet::new();
    for (name, objects) in every() {
        for object in &objects {
            let Some(pod) = pod_spec(object) else {
                continue;
            };
            for container in containers(pod) {
                let who = format!(
                    "{} {}",
                    title(object),
                    container["name"].as_str().unwrap_or("?")
                );
                let security = &container["securityContext"];
                let privileged = security["privileged"] == true;
                let attaches = [
                    "DaemonSet ashlar-csi-node ashlar-csi",
                    "DaemonSet ashlar-flexvolume keep",
                ];
                assert_eq!(
                    privileged,
                    attaches.contains(&who.as_str()),
                    "{name}: {who}"
                );
                assert_eq!(security["readOnlyRootFilesystem"], true, "{name}: {who}");
                if !privileged {
                    assert_eq!(security["allowPrivilegeEscalation"], false, "{name}: {who}");
                    assert_eq!(security["capabilities"]["drop"][0], "ALL", "{name}: {who}");
                }
                let user = [&security["runAsUser"], &pod["securityContext"]["runAsUser"]]
                    .into_iter()
                    .find_map(Value::as_u64);
                let user = user.unwrap_or_else(|| panic!("{name}: {who}: as whom?"));
                if user == 0 {
                    roots.insert((name, who.clone()));
                }
                let resources = &container["resources"];
                assert!(!resources["requests"].is_null(), "{name}: {who}");
                assert!(!resources["limits"]["memory"].is_null(), "{name}: {who}");
                // A processor limit would hold back block I/O, and with it every pod that waits for it.
                assert!(resources["limits"]["cpu"].is_null(), "{name}: {who}");
            }
        }
    }
    let of = |name: &str| -> Vec<String> {
        let of_name = roots.iter().filter(|(which, _)| *which == name);
        of_name.map(|(_, who)| who.clone()).collect()
    };
    let everywhere = [
        "DaemonSet ashlar-csi-node ashlar-csi",
        "DaemonSet ashlar-csi-node liveness-probe",
        "DaemonSet ashlar-csi-node load-nbd",
        "DaemonSet ashlar-csi-node node-driver-registrar",
    ];
    let mut default: Vec<_> = everywhere.to_vec();
    // Becomes another user before it runs the daemon.
    default.push("StatefulSet ashlar-daemon ashlard");
    default.push("StatefulSet ashlar-daemon directories");
    assert_eq!(of("default"), default);
    assert_eq!(of("cluster"), default);
    // Without the kernel's driver there is nothing to load.
    let mut without: Vec<_> = everywhere.to_vec();
    without.retain(|who| !who.ends_with("load-nbd"));
    without.push("StatefulSet ashlar-daemon directories");
    assert_eq!(of("all features"), without);
}

#[test]
fn our_programs_are_those_of_the_image() {
    for program in OURS {
        assert!(image::has_program(program), "{program}");
    }
}
