//! docs/kubernetes.md names what exists: files, objects, values, names of volumes in the examples.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{every, objects, read, root, template, title};

const DOCUMENT: &str = "docs/kubernetes.md";

/// Everything that stands in code, in blocks and in lines.
fn code() -> Vec<String> {
    let mut found = Vec::new();
    let mut block: Option<String> = None;
    let mut prose = String::new();
    for line in read(DOCUMENT).lines() {
        match (&mut block, line.trim_start().starts_with("```")) {
            (None, true) => block = Some(String::new()),
            (Some(text), true) => {
                found.push(text.replace("\\\n", " "));
                block = None;
            }
            (Some(text), false) => {
                text.push_str(line);
                text.push('\n');
            }
            (None, false) => {
                prose.push_str(line);
                prose.push(' ');
            }
        }
    }
    assert!(block.is_none(), "a block is open at the end");
    found.extend(prose.split('`').skip(1).step_by(2).map(str::to_owned));
    found
}

/// Words after `word` in every piece of code.
fn after(word: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for piece in code() {
        let words: Vec<_> = piece.split_whitespace().collect();
        for pair in words.windows(2).filter(|pair| pair[0] == word) {
            found.insert(pair[1].trim_matches(['\'', '"', ';']).to_owned());
        }
    }
    found
}

#[test]
fn every_value_that_is_set_is_one_of_the_charts() {
    let set = after("--set");
    assert!(set.len() > 8, "{set:?}");
    for assignment in set {
        // Placeholders, each in its place.
        let assignment = assignment
            .replace("REGISTRY", "registry.example.org")
            .replace("=UID", "=998");
        template(&["--set", &assignment]).succeed();
    }
    // Whatever looks like a value of the chart is one.
    let values = &objects(&read("deploy/charts/ashlar/values.yaml"))[0];
    for piece in code() {
        let word = piece.split('=').next().expect("a word");
        let top = word.split('.').next().expect("a word");
        if word.contains('.') && !values[top].is_null() && !word.contains([' ', '/']) {
            let found = word
                .split('.')
                .try_fold(values, |value, part| value.get(part));
            assert!(found.is_some(), "{word} is no value of the chart");
        }
    }
}

#[test]
fn every_object_that_is_named_exists() {
    let every = every();
    let titles: BTreeSet<_> = every
        .iter()
        .flat_map(|(_, objects)| objects)
        .map(|object| title(object).to_lowercase().replacen(' ', "/", 1))
        .collect();
    let kinds = ["statefulset", "daemonset", "deployment"];
    let mut checked = 0;
    for piece in code() {
        for word in piece.split_whitespace() {
            if word
                .split('/')
                .next()
                .is_some_and(|kind| kinds.contains(&kind))
            {
                assert!(titles.contains(word), "{word} of {titles:?}");
                checked += 1;
            }
        }
    }
    assert!(checked >= 5, "{checked}");
    // A pod of the StatefulSet.
    assert!(titles.contains("statefulset/ashlar-daemon"));
    assert!(code().iter().any(|piece| piece.contains("ashlar-daemon-0")));
}

#[test]
fn every_file_that_is_used_exists() {
    let mut used = BTreeSet::new();
    for flag in ["-f", "-k"] {
        used.extend(after(flag));
    }
    used.extend(
        after("ashlar")
            .into_iter()
            .filter(|word| word.contains('/')),
    );
    let paths: Vec<_> = used
        .iter()
        .filter(|path| path.starts_with("deploy/"))
        .collect();
    assert!(paths.len() >= 4, "{used:?}");
    for path in paths {
        assert!(root().join(path).exists(), "{path}");
    }
}

#[test]
fn the_label_is_the_charts() {
    let values = &objects(&read("deploy/charts/ashlar/values.yaml"))[0];
    let Value::Object(labels) = &values["daemon"]["nodeSelector"] else {
        panic!("labels");
    };
    assert_eq!(labels.len(), 1);
    let text = code().join("\n");
    for (name, value) in labels {
        let label = format!("{name}={}", value.as_str().expect("text"));
        assert!(text.contains(&format!("kubectl label node NODE {label}")));
        assert!(text.contains(&format!("kubectl get nodes -l {label}")));
        assert!(text.contains(&format!("kubectl label node NODE {name}-")));
    }
}

#[test]
fn the_example_is_the_one_that_the_document_walks_through() {
    let example = objects(&read("deploy/examples/pod.yaml"));
    let titles: Vec<_> = example.iter().map(title).collect();
    assert_eq!(titles, ["PersistentVolumeClaim notes", "Pod notes"]);
    let text = code().join("\n");
    for word in [
        "pod/notes",
        "exec notes",
        "pvc notes",
        "pvc/notes",
        "delete pod notes",
    ] {
        assert!(text.contains(word), "{word}");
    }
    let mount = &example[1]["spec"]["containers"][0]["volumeMounts"][0]["mountPath"];
    assert_eq!(mount, "/data");
    assert!(text.contains("cat /data/starts"));
    // Every example's claims are of a class that the chart makes.
    let classes: Vec<_> = objects(&template(&[]).succeed())
        .into_iter()
        .filter(|object| object["kind"] == "StorageClass")
        .map(|class| class["metadata"]["name"].clone())
        .collect();
    for file in ["pod.yaml", "statefulset.yaml", "raw-block.yaml"] {
        let text = read(&format!("deploy/examples/{file}"));
        let class = text
            .lines()
            .find_map(|line| line.trim().strip_prefix("storageClassName: "))
            .unwrap_or_else(|| panic!("{file} names no class"));
        assert!(classes.contains(&Value::from(class)), "{file}: {class}");
    }
}
