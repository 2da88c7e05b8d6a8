//! FlexVolume, driven as a kubelet does: the installed program, one run a call, both outputs read as one.

use std::fs;
use std::path::{Path, PathBuf};

use ashlar_tests::csi::csi::volume_capability::access_mode::Mode;
use ashlar_tests::csi::{Claim, Driver, mounted, text};
use ashlar_tests::daemon::{Setup, binary};
use ashlar_tests::tool::Tool;

const SUCCESS: &str = "{\"status\":\"Success\"}\n";
const NOT_SUPPORTED: &str = "{\"status\":\"Not supported\"}\n";

struct Kubelet {
    driver: Driver,
    program: PathBuf,
}

impl Kubelet {
    fn new(test: &str) -> Kubelet {
        let driver = Driver::prepare(test, Setup::default());
        let admin = driver.daemon.data_dir().join("admin.sock");
        let plugins = driver.daemon.scratch.join("exec");
        let printed = Tool::new(&text(&binary("ashlar-csi")))
            .arg("flexvolume-install")
            .arg(&plugins)
            .arg(format!("--daemon=unix:{}", admin.display()))
            .arg(format!("--state-dir={}", driver.state_dir().display()))
            .arg(format!("--kubelet-dir={}", driver.root().display()))
            .args(["--attach=fuse", "--node-id=node-f"])
            .succeed();
        let program = plugins.join("ashlar.io~ashlar/ashlar");
        assert_eq!(printed.trim(), text(&program));
        Kubelet { driver, program }
    }

    /// What is printed, and whether the program ended well.
    fn call(&self, arguments: &[&str]) -> (String, bool) {
        let finished = Tool::new(&text(&self.program)).args(arguments).run();
        assert_eq!(finished.stderr, "", "{arguments:?}");
        assert_eq!(finished.stdout.lines().count(), 1, "{finished:?}");
        (finished.stdout, finished.status.success())
    }

    fn succeeds(&self, arguments: &[&str]) {
        assert_eq!(self.call(arguments), (SUCCESS.to_owned(), true));
    }

    /// The message of a failure.
    fn fails(&self, arguments: &[&str]) -> String {
        let (printed, ended_well) = self.call(arguments);
        assert!(!ended_well, "{arguments:?}: {printed}");
        let answer: serde_json::Value = serde_json::from_str(&printed).expect("JSON");
        assert_eq!(answer["status"], "Failure", "{printed}");
        let members = answer.as_object().expect("an object").len();
        assert_eq!(members, 2, "{printed}");
        answer["message"].as_str().expect("a message").to_owned()
    }

    /// A pod's directory for a volume, made by the kubelet before it mounts.
    fn directory(&self, pod: &str) -> PathBuf {
        let directory = self
            .driver
            .root()
            .join(format!("pods/{pod}/volumes/ashlar.io~ashlar/data"));
        fs::create_dir_all(&directory).expect("a directory");
        directory
    }

    fn mount(&self, directory: &Path, options: &str) {
        self.succeeds(&["mount", &text(directory), options]);
    }
}

fn options(volume: &str, fs_type: &str, access: &str) -> String {
    format!(
        r#"{{"kubernetes.io/fsType":"{fs_type}","kubernetes.io/pod.name":"p","kubernetes.io/pod.namespace":"n","kubernetes.io/pod.uid":"u","kubernetes.io/pvOrVolumeName":"data","kubernetes.io/readwrite":"{access}","kubernetes.io/secret/key":"c2VjcmV0","kubernetes.io/serviceAccount.name":"default","volume":"{volume}"}}"#
    )
}

#[test]
fn each_command_answers_exactly() {
    let kubelet = Kubelet::new("flex-answers");
    kubelet.driver.daemon.create("v", "64MiB");
    let json = options("v", "", "rw");
    assert_eq!(
        kubelet.call(&["init"]),
        (
            "{\"status\":\"Success\",\"capabilities\":{\"attach\":false,\"selinuxRelabel\":true,\
             \"supportsMetrics\":true,\"fsGroup\":true,\"requiresFSResize\":true}}\n"
                .to_owned(),
            true
        )
    );
    assert_eq!(
        kubelet.call(&["getvolumename", &json]),
        (
            "{\"status\":\"Success\",\"volumeName\":\"v\"}\n".to_owned(),
            true
        )
    );
    let calls: [&[&str]; 7] = [
        &["attach", &json, "node"],
        &["detach", "data", "node"],
        &["waitforattach", "/dev/x", &json],
        &["isattached", &json, "node"],
        &["mountdevice", "/d", "/dev/x", &json],
        &["unmountdevice", "/d"],
        &["newcommand"],
    ];
    for call in calls {
        // By its name, since not every one of these is a command of the installed program.
        let finished = Tool::new(&text(&binary("ashlar-csi")))
            .arg("flexvolume")
            .args(call)
            .run();
        assert_eq!(
            (finished.stdout.as_str(), finished.stderr.as_str()),
            (NOT_SUPPORTED, "")
        );
        assert!(!finished.status.success());
    }
    let large = (128u64 << 20).to_string();
    assert_eq!(
        kubelet.call(&["expandvolume", &json, "", &large, "67108864"]),
        (
            "{\"status\":\"Success\",\"volumeNewSize\":134217728}\n".to_owned(),
            true
        )
    );
    let directory = kubelet.directory("a");
    kubelet.mount(&directory, &json);
    // Mounted after it was expanded: as large as it is asked to be.
    assert_eq!(
        kubelet.call(&["expandfs", &json, "", &text(&directory), &large, "67108864"]),
        (
            "{\"status\":\"Success\",\"volumeNewSize\":134217728}\n".to_owned(),
            true
        )
    );
    kubelet.succeeds(&["unmount", &text(&directory)]);
    assert_eq!(kubelet.driver.leftovers(), Vec::<String>::new());
}

#[test]
fn a_pods_author_gets_neither_other_devices_nor_the_volumes_of_claims() {
    let mut kubelet = Kubelet::new("flex-hostile");
    kubelet.driver.daemon.create("v", "64MiB");
    let directory = text(&kubelet.directory("a"));
    for hostile in [
        "logdev=/dev/sda",
        "noatime,journal_path=/dev/sda",
        "bind",
        "remount",
        "loop=/dev/loop0",
        "X-mount.subdir=x",
        "errors=panic",
    ] {
        let json = options("v", "xfs", "rw").replace(
            r#""volume""#,
            &format!(r#""mountOptions":"{hostile}","volume""#),
        );
        let message = kubelet.fails(&["mount", &directory, &json]);
        assert!(message.contains("mount option"), "{message}");
        assert!(!message.contains(hostile), "{message}");
    }
    let shown = kubelet.driver.daemon.admin().run(["volume", "show", "v"]);
    assert!(!shown.contains("node-f"), "it was taken: {shown}");
    // Of a claim.
    kubelet.driver.start_driver(&[]);
    let capability = mounted("ext4", Mode::SingleNodeWriter);
    let claim = Claim::unpublished(&kubelet.driver, "data", 64 << 20, capability);
    for call in [
        &["mount", &directory, &options(&claim.id, "ext4", "rw")][..],
        &[
            "expandvolume",
            &options(&claim.id, "", "rw"),
            "",
            "134217728",
            "67108864",
        ],
    ] {
        let message = kubelet.fails(call);
        assert!(message.contains("--flexvolume-any-volume"), "{message}");
    }
    kubelet.driver.kill_driver();
    assert_eq!(kubelet.driver.leftovers(), Vec::<String>::new());
    // Unless an administrator wants it.
    let settings = kubelet.program.with_file_name("flexvolume.conf");
    let text_of = fs::read_to_string(&settings).expect("settings");
    fs::write(
        &settings,
        format!("{text_of}--flexvolume-any-volume=true\n"),
    )
    .expect("written");
    kubelet.mount(Path::new(&directory), &options(&claim.id, "ext4", "rw"));
    kubelet.succeeds(&["unmount", &directory]);
    assert_eq!(kubelet.driver.leftovers(), Vec::<String>::new());
}

#[test]
fn two_pods_share_a_volume_and_the_last_one_gives_it_back() {
    let kubelet = Kubelet::new("flex-pods");
    let daemon = &kubelet.driver.daemon;
    daemon.create("v", "64MiB");
    let (first, second) = (kubelet.directory("a"), kubelet.directory("b"));
    kubelet.mount(&first, &options("v", "ext4", "rw"));
    fs::write(first.join("kept"), b"data").expect("written");
    kubelet.mount(&first, &options("v", "ext4", "rw"));
    kubelet.mount(&second, &options("v", "ext4", "ro"));
    assert_eq!(fs::read(second.join("kept")).expect("read"), b"data");
    assert!(fs::write(second.join("more"), b"x").is_err(), "read-only");
    kubelet.succeeds(&["unmount", &text(&first)]);
    assert!(!first.exists());
    assert_eq!(fs::read(second.join("kept")).expect("read"), b"data");
    kubelet.succeeds(&["unmount", &text(&second)]);
    // Repeated, and of what never was.
    kubelet.succeeds(&["unmount", &text(&second)]);
    kubelet.succeeds(&["unmount", &text(&kubelet.directory("c"))]);
    assert_eq!(kubelet.driver.leftovers(), Vec::<String>::new());
    // Nobody has it any more: it can be deleted.
    daemon.admin().run(["volume", "delete", "v", "--yes"]);
}

#[test]
fn what_cannot_be_mounted_is_said_and_leaves_nothing() {
    let kubelet = Kubelet::new("flex-refused");
    kubelet.driver.daemon.create("small", "64MiB");
    let directory = text(&kubelet.directory("a"));
    for (arguments, reason) in [
        (vec!["mount", &directory, "{"], "JSON"),
        (vec!["mount", &directory, "{}"], "missing"),
        (vec!["mount", &directory], "arguments"),
        (vec!["mount", "/etc", &options("small", "", "rw")], "/etc"),
        (vec!["unmount", "/proc"], "/proc"),
        (
            vec!["mount", &directory, &options("none", "", "rw")],
            "no volume",
        ),
        (
            vec!["mount", &directory, &options("small", "xfs", "rw")],
            "xfs needs",
        ),
    ] {
        let message = kubelet.fails(&arguments);
        assert!(message.contains(reason), "{message}");
    }
    assert_eq!(kubelet.driver.leftovers(), Vec::<String>::new());
    // After all that it can be mounted, and the daemon tells who has it.
    kubelet.mount(Path::new(&directory), &options("small", "", "rw"));
    let volume = kubelet
        .driver
        .daemon
        .admin()
        .run(["volume", "show", "small"]);
    assert!(volume.contains("node-f"), "{volume}");
    kubelet.succeeds(&["unmount", &directory]);
    assert_eq!(kubelet.driver.leftovers(), Vec::<String>::new());
}
