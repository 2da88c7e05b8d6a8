//! Names, sizes and words in the sources.

use super::{SourceFile, assert_tidy, files};

/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 10] = [
    "util", "utils", "helper", "helpers", "common", "manager", "misc", "shared", "stuff", "lib2",
];

/// A file longer than this is asking to be two.
const LINES_MAX: usize = 800;

/// Files that are longer and have a reason, which is written here.
const LONG_FILES: [(&str, &str); 0] = [];

/// Places that may sleep, with the reason.
const SLEEPERS: [(&str, &str); 1] = [(
    "tests/src/wait.rs",
    "polls a condition with a deadline, for everybody else",
)];

/// What must not stand in any source: work left undone, tests switched off, paths of one machine.
fn banned_words() -> Vec<(String, &'static str)> {
    // Put together here so that this file does not hold them itself.
    vec![
        (["to", "do!("].concat(), "unfinished work"),
        (["unimple", "mented!("].concat(), "unfinished work"),
        (
            ["#[ign", "ore"].concat(),
            "a test that never runs is no test",
        ),
        (["/wo", "rk/"].concat(), "a path of one machine"),
        (["/home", "/"].concat(), "a path of one machine"),
        (["/ro", "ot/"].concat(), "a path of one machine"),
    ]
}

fn name_complaints(path: &str) -> Vec<String> {
    let parts = path
        .split('/')
        .map(|part| part.strip_suffix(".rs").unwrap_or(part));
    parts
        .filter(|part| EMPTY_NAMES.contains(part))
        .map(|part| format!("{path}: {part:?} says nothing"))
        .collect()
}

fn word_complaints(file: &SourceFile, banned: &[(String, &'static str)]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        for (word, why) in banned {
            if line.contains(word.as_str()) {
                complaints.push(format!("{}:{}: {word:?}: {why}", file.path, index + 1));
            }
        }
    }
    complaints
}

/// Sleeps where something is tested: all of `tests/`, and what stands below `#[cfg(test)]` elsewhere.
fn sleep_complaints(file: &SourceFile) -> Vec<String> {
    if SLEEPERS.iter().any(|(path, _)| *path == file.path) {
        return Vec::new();
    }
    let sleep = ["sle", "ep("].concat();
    let mut in_test = file.path.starts_with("tests/");
    let mut complaints = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        in_test |= line.trim_start().starts_with("#[cfg(test)]");
        let code = line.split("//").next().unwrap_or_default();
        if in_test && code.contains(&sleep) {
            complaints.push(format!(
                "{}:{}: wait for a condition instead of a time",
                file.path,
                index + 1
            ));
        }
    }
    complaints
}

fn length_complaints(file: &SourceFile, allowed: &[(&str, &str)]) -> Vec<String> {
    let lines = file.text.lines().count();
    let excused = allowed.iter().any(|(path, _)| *path == file.path);
    match (lines > LINES_MAX, excused) {
        (true, false) => vec![format!(
            "{}: {lines} lines, more than {LINES_MAX}: split it",
            file.path
        )],
        (false, true) => vec![format!(
            "{}: no longer needs its place in LONG_FILES",
            file.path
        )],
        _ => Vec::new(),
    }
}

#[test]
fn modules_have_names_that_say_something() {
    assert_tidy(
        files(&[".rs"])
            .iter()
            .flat_map(|file| name_complaints(&file.path))
            .collect(),
    );
}

#[test]
fn no_work_is_left_undone_and_no_path_is_one_machines() {
    let banned = banned_words();
    let endings = [
        ".rs",
        ".toml",
        ".md",
        ".sh",
        ".proto",
        ".yaml",
        ".yml",
        ".service",
        ".socket",
        "Makefile",
        "Containerfile",
    ];
    assert_tidy(
        files(&endings)
            .iter()
            .flat_map(|file| word_complaints(file, &banned))
            .collect(),
    );
}

#[test]
fn tests_wait_for_conditions() {
    assert_tidy(files(&[".rs"]).iter().flat_map(sleep_complaints).collect());
}

#[test]
fn files_are_short() {
    let sources = files(&[".rs"]);
    let mut complaints: Vec<_> = sources
        .iter()
        .flat_map(|file| length_complaints(file, &LONG_FILES))
        .collect();
    for (path, _) in LONG_FILES {
        if !sources.iter().any(|file| file.path == path) {
            complaints.push(format!("{path}: in LONG_FILES, but there is no such file"));
        }
    }
    assert_tidy(complaints);
}

#[test]
fn broken_rules_are_seen() {
    let file = |path: &str, text: String| SourceFile {
        path: path.into(),
        text,
    };
    assert_eq!(name_complaints("server/src/utils/mod.rs").len(), 1);
    assert_eq!(name_complaints("server/src/helpers.rs").len(), 1);
    assert!(name_complaints("server/src/meta/sqlite.rs").is_empty());

    let banned = banned_words();
    for (word, _) in &banned {
        assert_eq!(
            word_complaints(&file("a.rs", format!("x\n{word}")), &banned).len(),
            1,
            "{word}"
        );
    }

    let sleeping = format!("std::thread::{}1);", ["sle", "ep("].concat());
    assert_eq!(
        sleep_complaints(&file("tests/src/a.rs", sleeping.clone())).len(),
        1
    );
    assert!(sleep_complaints(&file("tests/src/wait.rs", sleeping.clone())).is_empty());
    assert!(sleep_complaints(&file("server/src/a.rs", sleeping.clone())).is_empty());
    assert_eq!(
        sleep_complaints(&file(
            "server/src/a.rs",
            format!("#[cfg(test)]\n{sleeping}")
        ))
        .len(),
        1
    );

    let long = file("a.rs", "\n".repeat(LINES_MAX + 1));
    assert_eq!(length_complaints(&long, &[]).len(), 1);
    assert!(length_complaints(&long, &[("a.rs", "a reason")]).is_empty());
    assert_eq!(
        length_complaints(&file("a.rs", String::new()), &[("a.rs", "a reason")]).len(),
        1
    );
}
