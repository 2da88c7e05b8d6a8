//! Dependencies point one way, and the deciding half depends on nothing that acts.

use super::{SourceFile, assert_tidy, files};

/// For each crate of the workspace, the ones it may use.
const EDGES: [(&str, &[&str]); 6] = [
    ("ashlar-core", &[]),
    ("ashlar-proto", &[]),
    ("ashlar-server", &["ashlar-core", "ashlar-proto"]),
    ("ashlar-csi", &["ashlar-proto"]),
    (
        "ashlar-bench",
        &["ashlar-core", "ashlar-proto", "ashlar-server"],
    ),
    (
        "ashlar-tests",
        &[
            "ashlar-core",
            "ashlar-proto",
            "ashlar-server",
            "ashlar-bench",
            "ashlar-csi",
        ],
    ),
];

/// Everything from outside that `ashlar-core` may use: containers, formats and checksums. Nothing here opens a file, reads a
/// clock, draws a number or waits.
const CORE_MAY_USE: [&str; 9] = [
    "crc32fast",
    "hashbrown",
    "serde",
    "serde_json",
    "slab",
    "smallvec",
    "thiserror",
    "uuid",
    "zerocopy",
];

/// Parts of the standard library that act, and what else makes two runs of one seed differ.
const CORE_MAY_NOT_SAY: [&str; 12] = [
    "std::fs",
    "std::net",
    "std::process",
    "std::thread",
    "std::env",
    "std::time::Instant",
    "std::time::SystemTime",
    "Instant::now",
    "SystemTime::now",
    "new_v4(",
    "now_v7(",
    "async fn",
];

/// Name and dependencies of one manifest. Dev-dependencies do not reach a user of the crate and are not looked at.
fn manifest(text: &str) -> Option<(String, Vec<String>)> {
    let table: toml::Table = text.parse().ok()?;
    let name = table.get("package")?.get("name")?.as_str()?.to_owned();
    let dependencies = table.get("dependencies").and_then(|d| d.as_table());
    Some((
        name,
        dependencies
            .map(|d| d.keys().cloned().collect())
            .unwrap_or_default(),
    ))
}

fn edge_complaints(name: &str, dependencies: &[String]) -> Vec<String> {
    let Some((_, allowed)) = EDGES.iter().find(|(crate_name, _)| *crate_name == name) else {
        return vec![format!(
            "{name}: a crate that the table of edges does not know"
        )];
    };
    let mut complaints = Vec::new();
    for dependency in dependencies {
        let ours = dependency.starts_with("ashlar-");
        if ours && !allowed.contains(&dependency.as_str()) {
            complaints.push(format!("{name} must not depend on {dependency}"));
        }
        if !ours && name == "ashlar-core" && !CORE_MAY_USE.contains(&dependency.as_str()) {
            complaints.push(format!(
                "{name} must not depend on {dependency}: only on {CORE_MAY_USE:?}"
            ));
        }
    }
    complaints
}

/// Code that acts inside the deciding half. Its tests may do as they like.
fn purity_complaints(file: &SourceFile) -> Vec<String> {
    let mut complaints = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        if line.trim_start().starts_with("#[cfg(test)]") {
            break;
        }
        let code = line.split("//").next().unwrap_or_default();
        for word in CORE_MAY_NOT_SAY {
            if code.contains(word) {
                complaints.push(format!(
                    "{}:{}: {word} in the deciding half",
                    file.path,
                    index + 1
                ));
            }
        }
    }
    complaints
}

#[test]
fn dependencies_point_one_way() {
    let mut complaints = Vec::new();
    let mut seen = 0;
    for file in files(&["Cargo.toml"]) {
        if let Some((name, dependencies)) = manifest(&file.text) {
            seen += 1;
            complaints.extend(edge_complaints(&name, &dependencies));
        }
    }
    assert!(seen >= 5, "only {seen} manifests were found");
    assert_tidy(complaints);
}

#[test]
fn the_deciding_half_is_pure() {
    let files = files(&[".rs"]);
    let core: Vec<_> = files
        .iter()
        .filter(|file| file.path.starts_with("server/core/src/"))
        .collect();
    assert!(!core.is_empty(), "server/core/src has no source");
    assert_tidy(core.into_iter().flat_map(purity_complaints).collect());
}

#[test]
fn broken_edges_are_seen() {
    let (name, dependencies) = manifest(
        "[package]\nname = \"ashlar-core\"\n[dependencies]\ntokio = \"1\"\nserde.workspace = true\nashlar-proto.workspace = true\n\
         [dev-dependencies]\nproptest = \"1\"\n",
    )
    .expect("a manifest");
    let complaints = edge_complaints(&name, &dependencies);
    assert_eq!(complaints.len(), 2, "{complaints:?}");
    assert!(!edge_complaints("ashlar-csi", &["ashlar-server".into()]).is_empty());
    assert!(!edge_complaints("ashlar-new", &[]).is_empty());
    assert!(edge_complaints("ashlar-server", &["ashlar-core".into(), "tokio".into()]).is_empty());
}

#[test]
fn impure_code_is_seen_and_comments_are_not_code() {
    let file = |text: &str| SourceFile {
        path: "a.rs".into(),
        text: text.into(),
    };
    assert_eq!(
        purity_complaints(&file("let f = std::fs::read(p);")).len(),
        1
    );
    assert!(purity_complaints(&file("// not std::fs::read")).is_empty());
    assert!(purity_complaints(&file("#[cfg(test)]\nmod tests { use std::thread; }")).is_empty());
}
