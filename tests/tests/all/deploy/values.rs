//! The schema refuses what the templates or the programs could not use, and says where.

use std::collections::BTreeSet;

use serde_json::Value;

use super::programs::flags_of;
use super::{objects, read, template};

/// Sets of values that must be refused, with a word of the reason.
const WRONG: [(&str, &str); 18] = [
    // Not there yet.
    ("daemon.replicas=3", "/daemon/replicas"),
    ("daemon.replicas=0", "/daemon/replicas"),
    ("etcd.enabled=true", "/etcd/enabled"),
    // Typing mistakes.
    ("daemon.replica=1", "replica"),
    ("nodes={}", "nodes"),
    ("daemon.data.kind=hostpath", "/daemon/data/kind"),
    ("csi.spec=\"1.11\"", "/csi/spec"),
    ("daemon.settings={\"data-dir\":\"/elsewhere\"}", "data-dir"),
    ("daemon.settings={\"scrubrate\":\"1MiB\"}", "scrubrate"),
    // Values that would do harm.
    ("daemon.user=0", "/daemon/user"),
    ("daemon.nodeSelector=null", "/daemon/nodeSelector"),
    ("daemon.runDirectory=\"run/ashlar\"", "/daemon/runDirectory"),
    ("daemon.data.storeSize=\"20 GiB\"", "/daemon/data/storeSize"),
    ("daemon.terminationGracePeriodSeconds=5", "/daemon/terminationGracePeriodSeconds"),
    ("daemon.httpPort=70000", "/daemon/httpPort"),
    ("controller.replicas=0", "/controller/replicas"),
    ("storageClasses=[{\"name\":\"a\",\"filesystem\":\"btrfs\"}]", "/storageClasses/0/filesystem"),
    ("sidecars.attacher.image=\"csi-attacher\"", "/sidecars/attacher/image"),
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

/// Paths of the leaves of `value`.
fn leaves(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value.as_object() {
        Some(fields) if !fields.is_empty() => {
            for (name, field) in fields {
                leaves(field, &format!("{path}.{name}"), found);
            }
        }
        _ => {
            found.insert(path.to_owned());
        }
    }
}

/// The schema of the value at `path`, `None` when it names none.
fn schema_at<'a>(schema: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.')
        .filter(|part| !part.is_empty())
        .try_fold(schema, |schema, part| {
            schema["properties"]
                .get(part)
                .or_else(|| schema.get("additionalProperties").filter(|s| s.is_object()))
        })
}

#[test]
fn every_value_has_a_schema_and_every_schema_a_value() {
    let values = &objects(&read("deploy/charts/ashlar/values.yaml"))[0];
    let schema: Value = serde_json::from_str(&read("deploy/charts/ashlar/values.schema.json"))
        .expect("a JSON schema");
    let mut found = BTreeSet::new();
    leaves(values, "", &mut found);
    for path in &found {
        assert!(schema_at(&schema, path).is_some(), "{path} has no schema");
    }
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

#[test]
fn the_settings_of_the_daemon_are_flags_that_the_chart_does_not_set_itself() {
    let schema: Value = serde_json::from_str(&read("deploy/charts/ashlar/values.schema.json"))
        .expect("a JSON schema");
    let allowed: BTreeSet<String> = schema["properties"]["daemon"]["properties"]["settings"]
        ["propertyNames"]["enum"]
        .as_array()
        .expect("names")
        .iter()
        .map(|name| name.as_str().expect("a name").to_owned())
        .collect();
    let template = read("deploy/charts/ashlar/templates/daemon.yaml");
    let of_chart = |flag: &String| template.contains(&format!("- --{flag}="));
    let expected: BTreeSet<String> = flags_of("ashlard", &[])
        .into_iter()
        .map(|flag| flag.trim_start_matches('-').to_owned())
        .filter(|flag| !of_chart(flag))
        .filter(|flag| !["config", "print-config", "help", "version"].contains(&flag.as_str()))
        .collect();
    assert_eq!(allowed, expected, "daemon.settings in values.schema.json");
}
