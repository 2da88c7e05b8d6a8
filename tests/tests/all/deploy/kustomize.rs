//! The plain manifests are the chart's, and the overlay changes what it says and nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ashlar_tests::scratch::Scratch;
use ashlar_tests::tool::Tool;
use serde_json::Value;

use super::{CLUSTER, containers, installed, kubectl, objects, root, strings, template, title};

fn built(path: &str) -> BTreeMap<String, Value> {
    let text = kubectl().args(["kustomize", path]).succeed();
    objects(&text)
        .into_iter()
        .map(|object| (title(&object), object))
        .collect()
}

fn directory(path: &Path) -> BTreeMap<String, String> {
    fs::read_dir(path)
        .expect("a folder")
        .map(|entry| {
            let entry = entry.expect("an entry");
            let name = entry.file_name().into_string().expect("UTF-8");
            (name, fs::read_to_string(entry.path()).expect("UTF-8"))
        })
        .collect()
}

#[test]
fn the_manifests_are_what_the_script_makes_of_the_chart() {
    let scratch = Scratch::new("kustomize");
    let target = installed("kubernetes/helm");
    let mut script = Tool::new(
        root()
            .join("scripts/render-manifests.sh")
            .to_str()
            .expect("UTF-8"),
    );
    // TARGET/tools/kubernetes/helm, when that is where helm is.
    if let Some(target) = target.ancestors().nth(3) {
        script = script.env("CARGO_TARGET_DIR", target);
    }
    script.arg(scratch.path()).succeed();
    for name in ["base", "cluster"] {
        let there = root().join("deploy/kustomize").join(name);
        assert!(
            directory(&scratch.join(name)) == directory(&there),
            "{name}: run scripts/render-manifests.sh"
        );
    }
}

#[test]
fn kustomize_and_helm_install_the_same() {
    same("base", &[]);
    same("cluster", &["--values", CLUSTER]);
}

fn same(name: &str, values: &[&str]) {
    let plain = built(&format!("deploy/kustomize/{name}"));
    let text = template(values).succeed();
    let mut chart: BTreeMap<_, _> =
        objects(&text.replace("managed-by: Helm", "managed-by: kustomize"))
            .into_iter()
            .map(|object| (title(&object), object))
            .collect();
    // Helm makes the namespace by --create-namespace.
    let namespace = plain["Namespace ashlar"].clone();
    chart.insert("Namespace ashlar".to_owned(), namespace);
    for (title, object) in &chart {
        assert_eq!(plain.get(title), Some(object), "{name}: {title}");
    }
    assert_eq!(plain.len(), chart.len(), "{name}");
}

#[test]
fn the_older_form_differs_in_the_controller_alone() {
    let base = built("deploy/kustomize/base");
    let mut overlay = built("deploy/kustomize/overlays/statefulset-controller");
    let set = overlay
        .remove("StatefulSet ashlar-csi-controller")
        .expect("the controller");
    let service = overlay
        .remove("Service ashlar-csi-controller")
        .expect("its service");
    assert_eq!(set["spec"]["replicas"], 1);
    assert_eq!(set["spec"]["serviceName"], service["metadata"]["name"]);
    let mut rest = base.clone();
    let deployment = rest
        .remove("Deployment ashlar-csi-controller")
        .expect("the controller");
    rest.remove("PodDisruptionBudget ashlar-csi-controller")
        .expect("its budget");
    assert_eq!(overlay, rest);

    let of = |object: &Value| -> Vec<(String, Vec<String>)> {
        containers(&object["spec"]["template"]["spec"])
            .map(|container| {
                let name = container["name"].as_str().expect("a name").to_owned();
                (name, strings(&container["args"]))
            })
            .collect()
    };
    let expected: Vec<_> = of(&deployment)
        .into_iter()
        .map(|(name, arguments)| {
            let renamed = arguments
                .into_iter()
                .map(|argument| argument.replace("ownerref-level=2", "ownerref-level=1"));
            (name, renamed.collect::<Vec<_>>())
        })
        .collect();
    assert_eq!(of(&set), expected);
    let selected = service["spec"]["selector"].as_object().expect("labels");
    for (label, value) in selected {
        assert_eq!(
            &set["spec"]["template"]["metadata"]["labels"][label], value,
            "{label}"
        );
    }
}
