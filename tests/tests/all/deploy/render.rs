//! helm and the schemas of Kubernetes accept the chart and the examples.

use std::fs;

use ashlar_tests::scratch::Scratch;
use ashlar_tests::tool::Tool;
use serde_json::Value;

use super::{
    ALL_FEATURES, CLUSTER, FLEXVOLUME, VERSION, array, every, helm, installed, objects, read, root,
    strings, template, title,
};

/// The oldest and the newest version that the manifests are judged by; Chart.yaml names the oldest too.
const KUBERNETES: [&str; 2] = ["1.31", "1.37"];
/// Objects whose schemas Kubernetes does not bring.
const CUSTOM: [&str; 2] = ["ServiceMonitor", "PrometheusRule"];

/// Fails unless Kubernetes `version` knows every field of every object.
fn assert_valid(objects: &[Value], version: &str) {
    let scratch = Scratch::new("deploy");
    let mut validate = Tool::new(
        installed("python/bin/kubernetes-validate")
            .to_str()
            .expect("UTF-8"),
    )
    .args(["--strict", "--kubernetes-version", version]);
    assert!(!objects.is_empty());
    for (index, object) in objects.iter().enumerate() {
        // JSON is YAML.
        let path = scratch.join(&format!("{index}.yaml"));
        fs::write(&path, object.to_string()).expect("written");
        validate = validate.arg(path);
    }
    let said = validate.succeed();
    let passed = said
        .lines()
        .filter(|line| line.contains(" passed "))
        .count();
    assert_eq!(passed, objects.len(), "{said}");
}

/// Without those whose schemas Kubernetes does not bring.
fn of_kubernetes(objects: &[Value]) -> Vec<Value> {
    let known = |object: &&Value| !CUSTOM.contains(&object["kind"].as_str().expect("a kind"));
    objects.iter().filter(known).cloned().collect()
}

#[test]
fn helm_finds_nothing_to_complain_about() {
    for values in [None, Some(ALL_FEATURES), Some(CLUSTER), Some(FLEXVOLUME)] {
        let mut lint = helm().args(["lint", "--strict", "deploy/charts/ashlar"]);
        if let Some(values) = values {
            lint = lint.args(["--values", values]);
        }
        let said = lint.succeed();
        assert!(
            !said.contains("[WARNING]") && !said.contains("[ERROR]"),
            "{said}"
        );
    }
}

#[test]
fn kubernetes_knows_every_field_of_the_chart() {
    let oldest = format!("kubeVersion: \">={}.0-0\"", KUBERNETES[0]);
    assert!(
        read("deploy/charts/ashlar/Chart.yaml").contains(&oldest),
        "{oldest}"
    );
    for version in KUBERNETES {
        for (_, objects) in every() {
            assert_valid(&of_kubernetes(&objects), version);
        }
    }
}

#[test]
fn kubernetes_knows_volume_attributes_classes_where_it_has_them() {
    let classes = r#"volumeAttributesClasses=[{"name":"slow","parameters":{"iops":100}}]"#;
    let rendered = objects(&template(&["--set-json", classes]).succeed());
    let class: Vec<_> = rendered
        .into_iter()
        .filter(|object| object["kind"] == "VolumeAttributesClass")
        .collect();
    assert_eq!(class.len(), 1);
    assert_eq!(class[0]["parameters"]["iops"], "100");
    assert_valid(&class, "1.34");
}

#[test]
fn kubernetes_knows_every_field_of_the_examples() {
    for entry in fs::read_dir(root().join("deploy/examples")).expect("examples") {
        let text = fs::read_to_string(entry.expect("an entry").path()).expect("UTF-8");
        for version in KUBERNETES {
            assert_valid(&objects(&text), version);
        }
    }
}

#[test]
fn the_judge_finds_a_field_that_does_not_exist() {
    let mut wrong = objects(&read("deploy/examples/pod.yaml"));
    wrong[1]["spec"]["containers"][0]["volumeMount"] = Value::from("data");
    let judged = std::panic::catch_unwind(|| assert_valid(&wrong, KUBERNETES[1]));
    assert!(judged.is_err(), "strict validation passed an unknown field");
}

#[test]
fn chart_and_image_have_the_version_of_the_software() {
    let chart = &objects(&read("deploy/charts/ashlar/Chart.yaml"))[0];
    assert_eq!(chart["version"], VERSION);
    assert_eq!(chart["appVersion"], VERSION);
}

#[test]
fn a_person_replaces_what_devices_of_nbdfuse_depend_on() {
    let strategies = |more: &[&str]| -> Vec<String> {
        objects(&template(more).succeed())
            .iter()
            .filter(|o| o["kind"] == "DaemonSet" || o["kind"] == "StatefulSet")
            .map(|o| o["spec"]["updateStrategy"]["type"].to_string())
            .collect()
    };
    assert_eq!(strategies(&[]), [r#""RollingUpdate""#; 2]);
    let fuse = strategies(&["--set", "node.attach=fuse"]);
    assert_eq!(fuse, [r#""OnDelete""#; 2]);
}

#[test]
fn each_sidecar_has_a_role_of_its_own_and_no_role_has_a_wildcard() {
    for (name, objects) in every() {
        for sidecar in ["provisioner", "attacher", "resizer"] {
            for kind in ["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"] {
                let wanted = format!("ashlar-csi-controller-{sidecar}");
                assert!(
                    objects
                        .iter()
                        .any(|o| o["kind"] == kind && o["metadata"]["name"] == wanted.as_str()),
                    "{name}: {kind} {wanted}"
                );
            }
        }
        for role in objects.iter().filter(|o| !o["rules"].is_null()) {
            for rule in array(&role["rules"]) {
                let text = rule.to_string();
                assert!(!text.contains('*'), "{name}: {text}");
                if text.contains("secrets") {
                    // One Secret that the chart makes itself: who may make any may become any account.
                    assert_eq!(title(role), "Role ashlar-daemon-join", "{name}");
                    assert_eq!(strings(&rule["resourceNames"]), ["ashlar-daemon-join"]);
                    assert_eq!(strings(&rule["verbs"]), ["get", "patch"]);
                }
            }
        }
    }
}

/// Whoever asks for a class asks for a driver by its name, and there is only the one that the program answers with.
#[test]
fn every_object_names_the_driver_as_the_program_does() {
    let mut named = 0;
    for (from, objects) in every() {
        for object in &objects {
            let name = match object["kind"].as_str() {
                Some("CSIDriver") => &object["metadata"]["name"],
                Some("StorageClass") => &object["provisioner"],
                Some("VolumeAttributesClass" | "VolumeSnapshotClass") => &object["driverName"],
                _ => continue,
            };
            assert_eq!(
                *name,
                ashlar_csi::service::NAME,
                "{from}: {}",
                title(object)
            );
            named += 1;
        }
    }
    assert!(named >= 2, "{named}");
}

/// A claim that is made with a VolumeAttributesClass is read with it by the provisioner, one that is changed by the resizer.
#[test]
fn the_sidecars_may_read_classes_of_attributes() {
    for (name, objects) in every() {
        for sidecar in ["provisioner", "resizer"] {
            let role = format!("ashlar-csi-controller-{sidecar}");
            let role = objects
                .iter()
                .find(|o| o["kind"] == "ClusterRole" && o["metadata"]["name"] == role.as_str());
            let may = array(&role.expect("there is one")["rules"])
                .iter()
                .any(|rule| {
                    strings(&rule["resources"]).contains(&"volumeattributesclasses".to_owned())
                        && strings(&rule["verbs"]).contains(&"get".to_owned())
                });
            assert!(may, "{name}: {sidecar}");
        }
    }
}
