//! What the sidecars of Kubernetes take. Their images cannot be run here: the flags are those of the sources of these
//! versions, so a new version means a new look at them.

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
