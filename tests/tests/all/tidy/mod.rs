//! What the whole tree keeps to: who may depend on whom, what a module may be called, that the documents' links lead
//! somewhere. Each rule is a function from text to complaints, tested on text that breaks it, and then run on the tree.

mod documents;
mod edges;
mod sources;

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Where the workspace is.
fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests
        .parent()
        .expect("tests/ lies in the workspace")
        .to_owned()
}

/// A file of the tree.
struct SourceFile {
    /// From the workspace's root, with `/` between the parts.
    path: String,
    text: String,
}

/// What is built, installed or left by a run, and not ours to judge.
const NOT_SOURCE: [&str; 5] = [".git", "target", "data", "results", "node_modules"];

/// Every file of the tree whose name ends in one of `endings`, in a fixed order.
fn files(endings: &[&str]) -> Vec<SourceFile> {
    let root = root();
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a readable folder") {
            let entry = entry.expect("a readable entry");
            let name = entry.file_name().into_string().expect("a UTF-8 name");
            let kind = entry.file_type().expect("a file type");
            if kind.is_dir() && !NOT_SOURCE.contains(&name.as_str()) {
                folders.push(entry.path());
            } else if kind.is_file() && endings.iter().any(|ending| name.ends_with(ending)) {
                let path = entry.path();
                let relative = path.strip_prefix(&root).expect("under the root");
                found.push(SourceFile {
                    path: relative.to_str().expect("a UTF-8 path").to_owned(),
                    text: fs::read_to_string(&path).expect("a UTF-8 file"),
                });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(!found.is_empty(), "no {endings:?} under {}", root.display());
    found
}

/// Fails with every complaint at once.
fn assert_tidy(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}
