//! What the sidecars of Kubernetes take. Their images cannot be run here: the flags are those of the sources of these
//! versions, so a new version means a new look at them.

use ashlar_tests::tool::Tool;
use serde_json::{Value, json};

use super::{kubectl, strings};

/// Flags with a value that the sidecars with leader election share (csi-lib-utils 0.24), and those of logging.
const SHARED: [&str; 15] = [
    "automaxprocs",
    "csi-address",
    "http-endpoint",
    "kube-api-burst",
    "kube-api-qps",
    "kubeconfig",
    "leader-election-labels",
    "leader-election-lease-duration",
    "leader-election-namespace",
    "leader-election-renew-deadline",
    "leader-election-retry-period",
    "metrics-address",
    "metrics-path",
    "feature-gates",
    "v",
];

struct Sidecar {
    image: &'static str,
    shared: bool,
    /// Flags that take a value.
    valued: &'static [&'static str],
    /// Flags that are there or not, or take `=true` and `=false`.
    switches: &'static [&'static str],
}

const SIDECARS: [Sidecar; 5] = [
    Sidecar {
        image: "registry.k8s.io/sig-storage/csi-provisioner:v6.3.0",
        shared: true,
        valued: &[
            "capacity-ownerref-level",
            "capacity-poll-interval",
            "capacity-threads",
            "default-fstype",
            "retry-interval-max",
            "retry-interval-start",
            "timeout",
            "volume-name-prefix",
            "volume-name-uuid-length",
            "worker-threads",
        ],
        switches: &[
            "capacity-for-immediate-binding",
            "controller-publish-readonly",
            "enable-capacity",
            "extra-create-metadata",
            "immediate-topology",
            "leader-election",
            "strict-topology",
        ],
    },
    Sidecar {
        image: "registry.k8s.io/sig-storage/csi-attacher:v4.12.0",
        shared: true,
        valued: &[
            "default-fstype",
            "max-entries",
            "max-grpc-log-length",
            "reconcile-sync",
            "resync",
            "retry-interval-max",
            "retry-interval-start",
            "timeout",
            "worker-threads",
        ],
        switches: &["leader-election"],
    },
    Sidecar {
        image: "registry.k8s.io/sig-storage/csi-resizer:v2.2.1",
        shared: true,
        valued: &[
            "resync-period",
            "retry-interval-max",
            "retry-interval-start",
            "timeout",
            "workers",
        ],
        switches: &[
            "extra-modify-metadata",
            "handle-volume-inuse-error",
            "leader-election",
        ],
    },
    Sidecar {
        image: "registry.k8s.io/sig-storage/livenessprobe:v2.19.0",
        shared: false,
        valued: &[
            "csi-address",
            "http-endpoint",
            "metrics-path",
            "probe-timeout",
            "v",
        ],
        switches: &[],
    },
    Sidecar {
        image: "registry.k8s.io/sig-storage/csi-node-driver-registrar:v2.17.0",
        shared: false,
        valued: &[
            "csi-address",
            "http-endpoint",
            "kubelet-registration-path",
            "mode",
            "plugin-registration-path",
            "timeout",
            "v",
        ],
        switches: &["enable-pprof"],
    },
];

/// What is wrong with starting `image` with `arguments`.
pub(super) fn complaints(image: &str, arguments: &[String]) -> Vec<String> {
    let Some(sidecar) = SIDECARS.iter().find(|sidecar| sidecar.image == image) else {
        return vec![format!(
            "{image} is neither ours nor a sidecar that is known here"
        )];
    };
    let mut complaints = Vec::new();
    for argument in arguments {
        let Some(flag) = argument.strip_prefix("--") else {
            complaints.push(format!("{image}: {argument} is no flag"));
            continue;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (flag, None),
        };
        let valued = sidecar.valued.contains(&name) || sidecar.shared && SHARED.contains(&name);
        let fits = match value {
            None => sidecar.switches.contains(&name),
            Some("true" | "false") => valued || sidecar.switches.contains(&name),
            Some(value) => valued && !value.is_empty(),
        };
        if !fits {
            complaints.push(format!("{image} takes no {argument}"));
        }
    }
    complaints
}

/// What is wrong with starting etcd or kubectl; None for every other image. The programs of this machine are asked, which
/// are older than the images.
pub(super) fn of_others(
    image: &str,
    container: &Value,
    arguments: &[String],
) -> Option<Vec<String>> {
    let command = strings(&container["command"]);
    let (help, flags) = if image.starts_with("registry.k8s.io/etcd:") {
        // That image starts nothing by itself.
        assert_eq!(command, ["etcd"]);
        let finished = Tool::new("etcd").arg("--help").run();
        (format!("{}{}", finished.stdout, finished.stderr), arguments)
    } else if image.starts_with("registry.k8s.io/kubectl:") {
        assert!(command.is_empty(), "{command:?}");
        let verb = arguments.first().expect("a verb");
        let help = kubectl().args([verb, "--help"]).succeed();
        let options = kubectl().arg("options").succeed();
        let flags = arguments.iter().position(|word| word.starts_with("--"));
        (help + &options, &arguments[flags.unwrap_or(0)..])
    } else {
        return None;
    };
    let is_known = |argument: &&String| {
        let name = argument.split('=').next().unwrap_or(argument);
        let words = || help.split(|c: char| c.is_whitespace() || "=,'".contains(c));
        name.starts_with("--") && words().any(|word| word == name)
    };
    let wrong = flags.iter().filter(|argument| !is_known(argument));
    Some(
        wrong
            .map(|argument| format!("{image} takes no {argument}"))
            .collect(),
    )
}

#[test]
fn wrong_flags_of_etcd_and_kubectl_are_found() {
    let container = |command: &[&str]| json!({ "command": command });
    let complain = |image: &str, command: &[&str], arguments: &[&str]| {
        let arguments: Vec<_> = arguments.iter().map(|&word| word.to_owned()).collect();
        of_others(image, &container(command), &arguments).expect("one of the two")
    };
    let etcd = "registry.k8s.io/etcd:3.6.8-0";
    assert!(complain(etcd, &["etcd"], &["--name=a", "--logger=zap"]).is_empty());
    assert_eq!(complain(etcd, &["etcd"], &["--nam=a"]).len(), 1);
    let kubectl = "registry.k8s.io/kubectl:v1.36.0";
    let good = ["patch", "secret", "a", "--type=merge", "--namespace=a"];
    assert!(complain(kubectl, &[], &good).is_empty());
    assert_eq!(
        complain(kubectl, &[], &["patch", "--patch-fil=/a"]).len(),
        1
    );
}

#[test]
fn unknown_flags_and_images_are_found() {
    let attacher = SIDECARS[1].image;
    let good = ["--leader-election", "--timeout=15s", "--v=2"].map(str::to_owned);
    assert!(complaints(attacher, &good).is_empty());
    for wrong in [
        "--workers=2",
        "--timeout",
        "--leader-election=3",
        "timeout=15s",
    ] {
        let wrong = [wrong.to_owned()];
        assert_eq!(complaints(attacher, &wrong).len(), 1, "{wrong:?}");
    }
    assert_eq!(
        complaints("registry.example.org/csi-attacher:v4", &[]).len(),
        1
    );
}
