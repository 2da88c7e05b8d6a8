//! The Containerfile: what the image has is what the manifests and the driver run.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use ashlar_tests::daemon::binary;
use ashlar_tests::tool::Tool;
use serde_json::Value;

use super::{VERSION, assert_none, objects, read, root};

const CONTAINERFILE: &str = "deploy/Containerfile";

/// Programs from Debian that something runs in the image, and the package that brings each.
const PROGRAMS: [(&str, &str); 36] = [
    ("blkdiscard", "util-linux"),
    ("blkid", "util-linux"),
    ("blockdev", "util-linux"),
    ("cat", "coreutils"),
    ("cmp", "diffutils"),
    ("dd", "coreutils"),
    ("dumpe2fs", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("findmnt", "util-linux"),
    ("fusermount3", "fuse3"),
    ("install", "coreutils"),
    ("kill", "procps"),
    ("losetup", "mount"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("modprobe", "kmod"),
    ("mount", "mount"),
    ("nbd-client", "nbd-client"),
    ("nbdfuse", "libnbd-bin"),
    ("nbdinfo", "libnbd-bin"),
    ("nsenter", "util-linux"),
    ("resize2fs", "e2fsprogs"),
    ("setpriv", "util-linux"),
    ("setsid", "util-linux"),
    ("sh", "dash"),
    ("sleep", "coreutils"),
    ("stat", "coreutils"),
    ("sync", "coreutils"),
    ("timeout", "coreutils"),
    ("tune2fs", "e2fsprogs"),
    ("umount", "mount"),
    ("wipefs", "util-linux"),
    ("xfs_admin", "xfsprogs"),
    ("xfs_db", "xfsprogs"),
    ("xfs_growfs", "xfsprogs"),
    ("xfs_repair", "xfsprogs"),
];

/// Packages that every Debian image has, and that cannot be removed from one.
const ESSENTIAL: [&str; 4] = ["coreutils", "dash", "diffutils", "util-linux"];

/// The Containerfile with continued lines joined and comments gone.
fn instructions() -> Vec<String> {
    let text = read(CONTAINERFILE);
    let lines: Vec<_> = text
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .collect();
    lines
        .join("\n")
        .replace("\\\n", " ")
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|line| !line.is_empty())
        .collect()
}

/// Instructions of the stage that becomes the image.
fn last_stage() -> Vec<String> {
    let all = instructions();
    let start = all
        .iter()
        .rposition(|line| line.starts_with("FROM "))
        .expect("a stage");
    all[start..].to_vec()
}

/// Packages that the image's stage installs.
fn packages() -> BTreeSet<String> {
    let line = last_stage()
        .into_iter()
        .find(|line| line.contains("apt-get install"))
        .expect("packages");
    let (_, rest) = line.split_once("apt-get install").expect("found");
    rest.split("&&")
        .next()
        .expect("a command")
        .split_whitespace()
        .filter(|word| !word.starts_with('-'))
        .map(str::to_owned)
        .collect()
}

/// Our programs that the image gets.
fn ours() -> Vec<String> {
    let build = instructions()
        .into_iter()
        .find(|line| line.starts_with("RUN cargo build"))
        .expect("a build");
    build
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("target/release/"))
        .map(str::to_owned)
        .collect()
}

/// What the image has on its PATH, as far as anything runs it.
pub(super) fn programs() -> BTreeSet<String> {
    let packages = packages();
    let is_there = |package: &&str| packages.contains(*package) || ESSENTIAL.contains(package);
    let debians = PROGRAMS
        .iter()
        .filter(|(_, package)| is_there(package))
        .map(|(name, _)| (*name).to_owned());
    debians.chain(ours()).collect()
}

/// True when the image has `program` on its PATH.
pub(super) fn has_program(program: &str) -> bool {
    programs().contains(program)
}

/// Programs that a source file starts, before its tests.
fn started_in(source: &str) -> BTreeSet<String> {
    let code = source.split("#[cfg(test)]").next().unwrap_or(source);
    ["Child::new(\"", "Command::new(\""]
        .into_iter()
        .flat_map(|call| {
            code.match_indices(call)
                .map(|(start, _)| code[start + call.len()..].split('"').next())
        })
        .flatten()
        .map(str::to_owned)
        .collect()
}

fn sources(folder: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs")
            && path.file_stem().is_none_or(|stem| stem != "tests")
        {
            found.push(fs::read_to_string(&path).expect("UTF-8"));
        }
    }
}

#[test]
fn the_image_has_every_program_that_the_driver_runs() {
    let mut found = Vec::new();
    sources(&root().join("csi/src"), &mut found);
    let started: BTreeSet<_> = found.iter().flat_map(|source| started_in(source)).collect();
    assert!(
        started.contains("mount") && started.contains("mkfs.ext4"),
        "{started:?}"
    );
    let missing = started.iter().filter(|program| !has_program(program));
    assert_none(
        &missing
            .map(|program| format!("the image has no {program}"))
            .collect::<Vec<_>>(),
    );
}

#[test]
fn each_package_brings_the_program_it_is_there_for() {
    let (mut checked, mut complaints) = (0, Vec::new());
    for (program, package) in PROGRAMS {
        let listed = Tool::new("dpkg").args(["--listfiles", package]).run();
        // Only packages that are installed here can be looked into.
        if listed.status.success() {
            checked += 1;
            let ending = format!("/{program}");
            if !listed.stdout.lines().any(|line| line.ends_with(&ending)) {
                complaints.push(format!("{package} has no {program}"));
            }
        }
    }
    assert_none(&complaints);
    assert!(checked > 20, "looked into {checked} packages");
}

#[test]
fn the_image_is_built_from_binaries_that_exist() {
    let ours = ours();
    assert_eq!(ours, ["ashlard", "ashlar", "ashlar-csi"]);
    for program in &ours {
        let said = Tool::new(binary(program).to_str().expect("UTF-8"))
            .arg("--version")
            .succeed();
        assert_eq!(said.trim(), format!("{program} {VERSION}"));
    }
    let entry = last_stage()
        .into_iter()
        .find(|line| line.starts_with("ENTRYPOINT "));
    assert_eq!(entry.as_deref(), Some("ENTRYPOINT [\"ashlard\"]"));
}

#[test]
fn the_image_is_not_root_and_the_chart_knows_its_user() {
    let values = &objects(&read("deploy/charts/ashlar/values.yaml"))[0];
    let user = values["daemon"]["user"].as_u64().expect("a number");
    let stage = last_stage();
    assert!(stage.contains(&format!("USER {user}:{user}")), "{stage:?}");
    let made = stage.iter().any(|line| {
        line.contains(&format!("--uid {user}")) && line.contains(&format!("--gid {user}"))
    });
    assert!(made, "{stage:?}");
}

#[test]
fn the_environment_of_the_image_is_understood() {
    let help = ["ashlard", "ashlar"]
        .map(|program| {
            Tool::new(binary(program).to_str().expect("UTF-8"))
                .arg("--help")
                .succeed()
        })
        .concat();
    let line = last_stage()
        .into_iter()
        .find(|line| line.starts_with("ENV "))
        .expect("an environment");
    let names: Vec<_> = line["ENV ".len()..]
        .split_whitespace()
        .map(|setting| setting.split('=').next().expect("a name"))
        .collect();
    assert!(names.len() > 3);
    for name in names {
        assert!(help.contains(&format!("[env: {name}=")), "{name}");
    }
}

#[test]
fn everybody_calls_the_image_by_the_same_name() {
    let values = &objects(&read("deploy/charts/ashlar/values.yaml"))[0];
    let Value::String(repository) = &values["image"]["repository"] else {
        panic!("a repository");
    };
    let name = format!("{repository}:{VERSION}");
    for path in [CONTAINERFILE, "docs/kubernetes.md"] {
        assert!(
            read(path).contains(&format!("build -f deploy/Containerfile -t {name} .")),
            "{path}: {name}"
        );
    }
}
