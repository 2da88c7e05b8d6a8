//! The schema refuses what the templates or the programs could not use, and says where.

use std::collections::BTreeSet;

use serde_json::Value;

use super::programs::flags_of;
use super::{assert_none, both, objects, read, template};

/// Sets of values that must be refused, with a word of the reason.
const WRONG: [(&str, &str); 26] = [
    // One daemon is no cluster, and a cluster has one etcd.
    ("daemon.replicas=3", "/daemon/replicas"),
    ("daemon.replicas=0", "/daemon/replicas"),
    ("etcd.enabled=true", "/etcd/enabled"),
    ("cluster.enabled=true", "/etcd/endpoints"),
    (
        "storageClasses=[{\"name\":\"a\",\"parameters\":{\"replicas\":3}}]",
        "/storageClasses/0/parameters/replicas",
    ),
    ("etcd.replicas=2", "/etcd/replicas"),
    (
        "etcd.initialClusterState=\"old\"",
        "/etcd/initialClusterState",
    ),
    ("cluster.etcdPrefix=\"ashlar\"", "/cluster/etcdPrefix"),
    // Typing mistakes.
    ("daemon.replica=1", "replica"),
    ("nodes={}", "nodes"),
    ("daemon.data.kind=\"hostpath\"", "/daemon/data/kind"),
    ("csi.spec=\"1.11\"", "/csi/spec"),
    ("daemon.settings={\"data-dir\":\"/elsewhere\"}", "data-dir"),
    ("daemon.settings={\"scrubrate\":\"1MiB\"}", "scrubrate"),
    // Values that would do harm.
    ("daemon.user=0", "/daemon/user"),
    ("daemon.nodeSelector=null", "nodeSelector"),
    ("daemon.runDirectory=\"run/ashlar\"", "/daemon/runDirectory"),
    ("daemon.data.storeSize=\"20 GiB\"", "/daemon/data/storeSize"),
    (
        "daemon.terminationGracePeriodSeconds=5",
        "/daemon/terminationGracePeriodSeconds",
    ),
    ("daemon.httpPort=70000", "/daemon/httpPort"),
    ("controller.replicas=0", "/controller/replicas"),
    (
        "storageClasses=[{\"name\":\"a\",\"filesystem\":\"btrfs\"}]",
        "/storageClasses/0/filesystem",
    ),
    (
        "storageClasses=[{\"name\":\"a\",\"parameters\":{\"minInSync\":0}}]",
        "/storageClasses/0/parameters/minInSync",
    ),
    (
        "storageClasses=[{\"name\":\"a\",\"parameters\":{\"zones\":\"a,,b\"}}]",
        "/storageClasses/0/parameters/zones",
    ),
    (
        "volumeAttributesClasses=[{\"name\":\"a\",\"parameters\":{\"iops\":5}}]",
        "/volumeAttributesClasses/0/parameters/iops",
    ),
    (
        "sidecars.attacher.image=\"csi-attacher\"",
        "/sidecars/attacher/image",
    ),
];

#[test]
fn wrong_values_are_refused() {
    for (set, word) in WRONG {
        let said = template(&["--set-json", set]).run().failure();
        assert!(
            said.contains("don't meet the specifications of the schema") && said.contains(word),
            "{set}: {said}"
        );
    }
}

/// Complains about values that have no schema of their own.
fn unjudged(schema: Option<&Value>, value: &Value, path: &str, out: &mut Vec<String>) {
    let Some(schema) = schema else {
        out.push(format!("{path} has no schema"));
        return;
    };
    for (name, value) in value.as_object().into_iter().flatten() {
        let schema = schema["properties"]
            .get(name)
            // Names that the user chooses.
            .or_else(|| schema.get("additionalProperties").filter(|s| s.is_object()));
        unjudged(schema, value, &format!("{path}.{name}"), out);
    }
}

#[test]
fn every_value_has_a_schema_and_every_schema_a_value() {
    let values = &objects(&read("deploy/charts/ashlar/values.yaml"))[0];
    let schema: Value = serde_json::from_str(&read("deploy/charts/ashlar/values.schema.json"))
        .expect("a JSON schema");
    let mut complaints = Vec::new();
    unjudged(Some(&schema), values, "", &mut complaints);
    assert_none(&complaints);
    let mut unknown = Vec::new();
    missing(&schema, values, "", &mut unknown);
    assert_eq!(unknown, ["global"], "in the schema, not in values.yaml");
}

/// Names in `schema` that `values` lacks.
fn missing(schema: &Value, values: &Value, path: &str, out: &mut Vec<String>) {
    let Some(properties) = schema["properties"].as_object() else {
        return;
    };
    for (name, schema) in properties {
        let path = format!("{path}.{name}");
        match values.get(name) {
            Some(value) => missing(schema, value, &path, out),
            None => out.push(path.trim_start_matches('.').to_owned()),
        }
    }
}

/// Settings of a node of a cluster that the chart leaves as they are: where it is reached follows from where it listens,
/// the token comes by the environment, and the rest can be changed later.
const OF_CLUSTERS: [&str; 4] = ["advertise", "certificate-lifetime", "join", "label"];

/// Flags that no installation has for longer than one start.
const BY_HAND: [&str; 5] = [
    "accept-tail-loss",
    "config",
    "print-config",
    "help",
    "version",
];

#[test]
fn the_settings_of_the_daemon_are_flags_that_the_chart_does_not_set_itself() {
    let schema: Value = serde_json::from_str(&read("deploy/charts/ashlar/values.schema.json"))
        .expect("a JSON schema");
    let allowed: BTreeSet<String> =
        schema["properties"]["daemon"]["properties"]["settings"]["propertyNames"]["enum"]
            .as_array()
            .expect("names")
            .iter()
            .map(|name| name.as_str().expect("a name").to_owned())
            .collect();
    let template = read("deploy/charts/ashlar/templates/daemon.yaml")
        + &read("deploy/charts/ashlar/templates/_names.tpl");
    let of_chart = |flag: &String| template.contains(&format!("- --{flag}="));
    let expected: BTreeSet<String> = flags_of("ashlard", &[])
        .into_iter()
        .map(|flag| flag.trim_start_matches('-').to_owned())
        .filter(|flag| !of_chart(flag))
        .filter(|flag| !BY_HAND.contains(&flag.as_str()))
        .filter(|flag| !OF_CLUSTERS.contains(&flag.as_str()))
        .collect();
    assert_eq!(allowed, expected, "daemon.settings in values.schema.json");
}

/// Values of the constants `pub const NAME: &str = "VALUE"` of a source file.
fn constants_in(source: &str) -> BTreeSet<String> {
    source
        .lines()
        .filter(|line| line.starts_with("pub const ") && line.contains(": &str = "))
        .filter_map(|line| line.split('"').nth(1).map(str::to_owned))
        .collect()
}

fn names_of(schema: &Value) -> BTreeSet<String> {
    let properties = schema["properties"].as_object().expect("properties");
    properties.keys().cloned().collect()
}

#[test]
fn parameters_of_classes_are_those_of_the_driver() {
    let schema: Value = serde_json::from_str(&read("deploy/charts/ashlar/values.schema.json"))
        .expect("a JSON schema");
    let of =
        |list: &str| names_of(&schema["properties"][list]["items"]["properties"]["parameters"]);
    let known = constants_in(&read("csi/src/controller/parameters.rs"));
    let storage = of("storageClasses");
    // The filesystem is a value of its own.
    let elsewhere = ["filesystem"].map(str::to_owned);
    let expected: BTreeSet<_> = known.difference(&elsewhere.into()).cloned().collect();
    assert_eq!(storage, expected);
    let mutable = of("volumeAttributesClasses");
    assert!(mutable.is_subset(&storage) && !mutable.is_empty());
}

#[test]
fn large_numbers_stay_whole() {
    let [_, (_, objects)] = both();
    let text = serde_json::to_string(&objects).expect("JSON");
    for part in ["--owner=2000000", "\"104857600\"", "--max-connections=2000"] {
        assert!(text.contains(part), "{part}");
    }
    assert!(!text.contains("e+0"));
}
