//! Files for the machines: systemd units, udev, LVM, the nbd driver.

use std::fs;

use ashlar_tests::daemon::binary;
use ashlar_tests::tool::Tool;

use super::{assert_none, objects, programs, read, root};

/// A unit's settings, in order.
fn settings(unit: &str) -> Vec<(String, String)> {
    read(&format!("deploy/systemd/{unit}"))
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// Every service in `deploy/systemd`.
fn services() -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(root().join("deploy/systemd"))
        .expect("units")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .into_string()
                .expect("UTF-8")
        })
        .filter(|name| name.ends_with(".service"))
        .collect();
    names.sort();
    names
}

#[test]
fn units_start_our_programs_with_flags_and_variables_they_know() {
    let mut complaints = Vec::new();
    let services = services();
    assert!(services.contains(&"ashlard.service".to_owned()));
    for unit in services {
        let settings = settings(&unit);
        let (_, line) = settings
            .iter()
            .find(|(name, _)| name == "ExecStart")
            .unwrap_or_else(|| panic!("{unit} starts nothing"));
        let mut words = line.split_whitespace();
        let program = words
            .next()
            .and_then(|path| path.strip_prefix("/usr/bin/"))
            .unwrap_or_else(|| panic!("{unit}: {line}"));
        let words: Vec<_> = words.collect();
        let subcommand: Vec<_> = words
            .iter()
            .take_while(|word| !word.starts_with('-'))
            .copied()
            .collect();
        let known = programs::flags_of(program, &subcommand);
        for word in words.iter().filter(|word| word.starts_with("--")) {
            let flag = word.split('=').next().expect("a word");
            if !known.contains(flag) {
                complaints.push(format!("{unit}: {program} has no {flag}"));
            }
        }
        let help = Tool::new(binary(program).to_str().expect("UTF-8"))
            .args(&subcommand)
            .arg("--help")
            .succeed();
        for (_, setting) in settings.iter().filter(|(name, _)| name == "Environment") {
            let name = setting.split('=').next().expect("a name");
            if !help.contains(&format!("[env: {name}=")) {
                complaints.push(format!("{unit}: {program} does not read {name}"));
            }
        }
    }
    assert_none(&complaints);
}

#[test]
fn rules_for_devices_are_of_the_form_that_udev_reads() {
    let text = read("deploy/host/59-ashlar-nbd.rules");
    let rules: Vec<_> = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect();
    assert_eq!(rules.len(), 1);
    let mut assigns = 0;
    for part in rules[0].split(", ") {
        let operator = ["==", "!=", ":=", "+=", "="]
            .into_iter()
            .find(|operator| part.contains(operator))
            .unwrap_or_else(|| panic!("{part}: no operator"));
        let (key, value) = part.split_once(operator).expect("found");
        assert!(
            key.chars()
                .all(|c| c.is_ascii_uppercase() || "{}_".contains(c)),
            "{part}"
        );
        assert!(
            value.len() > 2 && value.starts_with('"') && value.ends_with('"'),
            "{part}"
        );
        assigns += usize::from(matches!(operator, ":=" | "="));
    }
    assert!(assigns >= 4);
}

#[test]
fn chart_and_host_load_the_driver_alike() {
    let values = &objects(&read("deploy/charts/ashlar/values.yaml"))[0];
    let devices = &values["node"]["nbdDevices"];
    let options = format!("options nbd nbds_max={devices} max_part=0");
    assert!(
        read("deploy/host/modprobe-ashlar.conf")
            .lines()
            .any(|line| line == options)
    );
    let init = read("deploy/charts/ashlar/templates/node.yaml");
    assert!(init.contains("modprobe nbd nbds_max={{ .Values.node.nbdDevices }} max_part=0"));
}
