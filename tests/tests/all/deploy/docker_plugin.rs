//! Docker's managed plugin: what its config.json says is so.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use ashlar_tests::daemon::binary;
use ashlar_tests::scratch::Scratch;
use ashlar_tests::tool::Tool;
use serde_json::Value;

use super::{array, image, read, root, strings};

fn config() -> Value {
    serde_json::from_str(&read("deploy/docker-plugin/config.json")).expect("JSON")
}

#[test]
fn the_plugin_starts_what_the_image_has_and_serves_where_docker_looks() {
    let config = config();
    assert_eq!(strings(&config["entrypoint"]), ["ashlar-csi", "docker"]);
    assert!(image::has_program("ashlar-csi"));
    let help = Tool::new(binary("ashlar-csi").to_str().expect("UTF-8"))
        .args(["docker", "--help"])
        .succeed();
    let socket = config["interface"]["socket"].as_str().expect("a name");
    assert!(help.contains(&format!("[default: unix:///run/docker/plugins/{socket}]")));
    // State and mounts: what is there outlives an upgrade of the plugin, and containers see it.
    let state = config["propagatedMount"].as_str().expect("a path");
    assert!(help.contains(&format!("[default: {state}]")), "{help}");
    let types = strings(&config["interface"]["types"]);
    assert_eq!(types, ["docker.volumedriver/1.0"]);
    // The kernel's NBD driver answers in the first network namespace only.
    assert_eq!(config["network"]["type"], "host");
}

#[test]
fn its_environment_is_understood() {
    let help = Tool::new(binary("ashlar-csi").to_str().expect("UTF-8"))
        .args(["docker", "--help"])
        .succeed();
    for variable in array(&config()["env"]) {
        let name = variable["name"].as_str().expect("a name");
        let is_known = name == "PATH" || help.contains(&format!("[env: {name}=]"));
        assert!(is_known, "{name}");
    }
}

#[test]
fn the_layout_has_a_place_for_every_mount() {
    let scratch = Scratch::new("docker-plugin");
    // In the place of an engine: a container of one file.
    let engine = scratch.join("engine");
    let script = "#!/bin/sh\nset -e\ncase $1 in\ncreate) echo c1 ;;\nrm) [ \"$2\" = c1 ] ;;\n\
                  export) [ \"$3\" = c1 ]; cd \"$(dirname \"$0\")\"; mkdir -p usr/local/bin; : >usr/local/bin/ashlar-csi; \
                  tar -cf \"${2#--output=}\" usr ;;\nesac\n";
    fs::write(&engine, script).expect("written");
    fs::set_permissions(&engine, fs::Permissions::from_mode(0o755)).expect("a program");
    let plugin = scratch.join("plugin");
    let build = root().join("deploy/docker-plugin/build.sh");
    Tool::new(build.to_str().expect("UTF-8"))
        .env("ENGINE", &engine)
        .arg("localhost/ashlar:0.1.0")
        .arg(&plugin)
        .succeed();
    let config = config();
    let copied = fs::read_to_string(plugin.join("config.json")).expect("config.json");
    assert_eq!(copied, read("deploy/docker-plugin/config.json"));
    let rootfs = plugin.join("rootfs");
    let mut places: Vec<_> = array(&config["mounts"])
        .iter()
        .map(|mount| mount["destination"].as_str().expect("a path"))
        .collect();
    places.extend(["/run/docker/plugins", "/proc", "/sys", "/tmp"]);
    places.push(config["propagatedMount"].as_str().expect("a path"));
    for place in places {
        assert!(rootfs.join(&place[1..]).is_dir(), "{place}");
    }
    assert!(rootfs.join("usr/local/bin/ashlar-csi").exists());
    assert!(!plugin.join("rootfs.tar").exists());
}
