#!/usr/bin/env bash
# Brings images into containerd's store of a root directory, much faster than the node could: tests/kubernetes/preload.sh ROOT TAR...
set -euo pipefail
if [ "${inside:-}" != yes ]; then
    # With the first process of these namespaces its containerd and its mounts end.
    inside=yes exec unshare --mount --pid --fork --kill-child "$0" "$@"
fi
root=$1
shift
mount -t proc proc "$root/proc"
mount -t tmpfs run "$root/run"
mount --rbind /dev "$root/dev"
chroot "$root" containerd >"$root/run/log" 2>&1 &
until chroot "$root" ctr version >/dev/null 2>&1; do
    kill -0 $! || { cat "$root/run/log" >&2; exit 1; }
    sleep 0.2
done
for images in "$@"; do
    chroot "$root" ctr -n k8s.io images import - <"$images" >/dev/null
done
kill $!
wait $! || true
