//! What `deploy/` installs: that it is valid, and that every image, program, flag, path and metric in it exists.
//!
//! The judges are the real ones, helm, kubectl and the schemas of Kubernetes, offline; scripts/setup.sh brings them.

mod docker_plugin;
mod documents;
mod host;
mod image;
mod joining;
mod kustomize;
mod metrics;
mod programs;
mod render;
mod sidecars;
mod values;

use std::fs;
use std::path::{Path, PathBuf};

use ashlar_tests::tool::Tool;
use serde::Deserialize;
use serde_json::Value;

/// The version of the software, which is also that of chart and image.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Values of a cluster with an etcd of the chart's own.
const CLUSTER: &str = "deploy/charts/ashlar/ci/cluster-values.yaml";
/// Values with FlexVolume, which goes with the kernel's driver only.
const FLEXVOLUME: &str = "deploy/charts/ashlar/ci/flexvolume-values.yaml";
/// Values that turn everything on.
const ALL_FEATURES: &str = "deploy/charts/ashlar/ci/all-features-values.yaml";

/// The workspace.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ lies in the workspace")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Where scripts/setup.sh put `name`; the name alone, for the PATH, when it is not there.
fn installed(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a test knows its own path");
    let target = own.ancestors().nth(3).expect("TARGET/PROFILE/deps");
    let path = target.join("tools").join(name);
    if path.exists() {
        path
    } else {
        PathBuf::from(Path::new(name).file_name().expect("a program"))
    }
}

fn helm() -> Tool {
    Tool::new(installed("kubernetes/helm").to_str().expect("UTF-8")).directory(root())
}

fn kubectl() -> Tool {
    Tool::new(installed("kubernetes/kubectl").to_str().expect("UTF-8")).directory(root())
}

/// `helm template` as it is installed, with more arguments.
fn template(arguments: &[&str]) -> Tool {
    helm()
        .args(["template", "ashlar", "deploy/charts/ashlar"])
        .args(["--namespace", "ashlar"])
        .args(arguments)
}

/// The objects of a YAML stream.
fn objects(text: &str) -> Vec<Value> {
    serde_yaml_ng::Deserializer::from_str(text)
        .map(|document| Value::deserialize(document).expect("YAML"))
        .filter(|value| !value.is_null())
        .collect()
}

/// The chart's default, and with everything on.
fn both() -> [(&'static str, Vec<Value>); 2] {
    [
        ("default", objects(&template(&[]).succeed())),
        (
            "all features",
            objects(&template(&["--values", ALL_FEATURES]).succeed()),
        ),
    ]
}

/// Those two, a cluster, and FlexVolume.
fn every() -> [(&'static str, Vec<Value>); 4] {
    let [default, all] = both();
    let with = |values| objects(&template(&["--values", values]).succeed());
    [
        default,
        all,
        ("cluster", with(CLUSTER)),
        ("flexvolume", with(FLEXVOLUME)),
    ]
}

/// `Kind name` of an object, for messages.
fn title(object: &Value) -> String {
    format!(
        "{} {}",
        object["kind"].as_str().unwrap_or("?"),
        object["metadata"]["name"].as_str().unwrap_or("?")
    )
}

/// The pod that an object starts or is.
fn pod_spec(object: &Value) -> Option<&Value> {
    match object["kind"].as_str()? {
        "Pod" => Some(&object["spec"]),
        "Deployment" | "StatefulSet" | "DaemonSet" | "Job" => {
            Some(&object["spec"]["template"]["spec"])
        }
        _ => None,
    }
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn strings(value: &Value) -> Vec<String> {
    array(value)
        .iter()
        .map(|item| item.as_str().expect("a string").to_owned())
        .collect()
}

/// Containers and init containers of a pod.
fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    array(&pod["initContainers"])
        .iter()
        .chain(array(&pod["containers"]))
}

/// Fails with every complaint at once.
fn assert_none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}
