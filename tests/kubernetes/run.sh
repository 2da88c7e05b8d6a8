#!/usr/bin/env bash
# Follows docs/kubernetes.md in a real Kubernetes, as root: tests/kubernetes/run.sh for one node, with `cluster` for several.
# `make test-kubernetes` and `make test-kubernetes-cluster` build first.
#
# The control plane runs in namespaces of its own here. The one node is a virtual machine under qemu's software emulation; three
# of those would be too much for a small machine, so the several are kernels of User Mode Linux. Both have an NBD driver. All
# of it ends with this script. What takes long to make is kept in target/kubernetes, and the logs of the last run are in
# target/kubernetes/logs.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-$PWD/target}
work=$target/kubernetes
here=$PWD/tests/kubernetes
what=${1:-node}

if [ "${2:-}" != inside ]; then
    [ "$(id -u)" = 0 ] || { echo "kubernetes: run this as root" >&2; exit 1; }
    "$here/build.sh" "$work" "$what"
    # The document's own command.
    "$here/document.sh" "Build the image" | sed -n 's/^\$ \(podman build.*\)/\1/p' >"$work/build-command"
    echo "+ $(cat "$work/build-command")" >&2
    BUILDAH_ISOLATION=chroot bash -e "$work/build-command" >"$work/build.log" 2>&1 || { tail -n 20 "$work/build.log" >&2; exit 1; }
    rm -f "$work/images/ashlar.tar"
    podman save --quiet --output "$work/images/ashlar.tar" localhost/ashlar:0.1.0
    if [ "$what" = cluster ]; then
        # Three nodes under emulation would take minutes for it.
        cp --sparse=always "$work/node.img" "$work/run.img"
        root=$(mktemp -d)
        mount -o loop "$work/run.img" "$root"
        "$here/preload.sh" "$root" "$work/images/ashlar.tar" || status=$?
        umount "$root"
        rmdir "$root"
        [ -z "${status:-}" ] || exit "$status"
    fi
    # With the first process of these namespaces everything in them ends.
    exec unshare --net --pid --mount --fork --kill-child "$0" "$what" inside
fi

mount -t proc proc /proc
source "$here/machines.sh"
source "$here/checks.sh"
start_control_plane
case $what in
node)
    start_nodes node-1
    # As the document's table has it for any cluster with containerd.
    on_node node-1 "cat >ashlar.tar" <"$work/images/ashlar.tar"
    on_node node-1 "ctr -n k8s.io images import ashlar.tar && rm ashlar.tar"
    source "$here/follow.sh"
    ;;
cluster)
    start_nodes node-1 node-2 node-3
    source "$here/follow-cluster.sh"
    ;;
esac
echo "$checked passed, 0 failed"
exit 0
