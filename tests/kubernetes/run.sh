#!/usr/bin/env bash
# Follows docs/kubernetes.md in a real Kubernetes of one node: tests/kubernetes/run.sh, as root; `make test-kubernetes` builds first.
#
# The control plane runs in namespaces of its own here, the node is a virtual machine with a kernel that has an NBD driver, under
# qemu's software emulation. All of it ends with this script. What takes long to make is kept in target/kubernetes, and the
# logs of the last run are in target/kubernetes/logs.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-$PWD/target}
work=$target/kubernetes
here=$PWD/tests/kubernetes

if [ "${1:-}" != inside ]; then
    [ "$(id -u)" = 0 ] || { echo "kubernetes: run this as root" >&2; exit 1; }
    "$here/build.sh" "$work"
    # The document's own command.
    "$here/document.sh" "Build the image" | sed -n 's/^\$ \(podman build.*\)/\1/p' >"$work/build-command"
    echo "+ $(cat "$work/build-command")" >&2
    BUILDAH_ISOLATION=chroot bash -e "$work/build-command" >"$work/build.log" 2>&1 || { tail -n 20 "$work/build.log" >&2; exit 1; }
    rm -f "$work/images/ashlar.tar"
    podman save --quiet --output "$work/images/ashlar.tar" localhost/ashlar:0.1.0
    # With the first process of these namespaces everything in them ends.
    exec unshare --net --pid --mount --fork --kill-child "$0" inside
fi

logs=$work/logs
rm -rf "$logs" "$work/etcd" "$work/node.qcow2"
mkdir -p "$logs" "$work/etcd"
mount -t proc proc /proc
export PATH="$target/tools/kubernetes:$PATH" KUBECONFIG="$work/pki/admin.kubeconfig"

start() { # NAME COMMAND...
    local name=$1
    shift
    "$@" >"$logs/$name.log" 2>&1 </dev/null &
}
wait_for() { # SECONDS WHAT COMMAND...
    local limit=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$limit" ] || { echo "kubernetes: $what is not there; see $logs" >&2; exit 1; }
        sleep 1
    done
}
on_node() {
    ssh -q -i "$work/pki/ssh" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ConnectTimeout=5 \
        -o ControlMaster=auto -o ControlPath="$logs/ssh" -o ControlPersist=yes root@10.20.0.11 "$@"
}

ip link set lo up
ip tuntap add dev node mode tap
ip addr add 10.20.0.1/24 dev node
ip link set node up

echo "kubernetes: starting the node and the control plane" >&2
qemu-img create -q -f qcow2 -b node.img -F raw "$work/node.qcow2"
start node qemu-system-x86_64 -machine q35 -accel tcg,thread=multi -cpu max -smp 2 -m 4096 -nodefaults -display none -no-reboot \
    -serial "file:$logs/console.log" -kernel "$work/vmlinuz" -initrd "$work/initrd" \
    -append "root=/dev/vda rw console=ttyS0 quiet mitigations=off" \
    -drive "if=virtio,format=qcow2,file=$work/node.qcow2,discard=unmap,detect-zeroes=unmap,cache=unsafe" \
    -netdev tap,id=net,ifname=node,script=no,downscript=no -device virtio-net-pci,netdev=net -device virtio-rng-pci
start etcd etcd --data-dir "$work/etcd" --unsafe-no-fsync \
    --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380
pki=$work/pki
start apiserver "$work/programs/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 --bind-address=10.20.0.1 \
    --advertise-address=10.20.0.1 --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" \
    --client-ca-file="$pki/ca.crt" --service-account-key-file="$pki/accounts.pub" \
    --service-account-signing-key-file="$pki/accounts.key" --service-account-issuer=https://kubernetes.default.svc \
    --kubelet-client-certificate="$pki/admin.crt" --kubelet-client-key="$pki/admin.key" \
    --kubelet-preferred-address-types=InternalIP --authorization-mode=Node,RBAC \
    --enable-admission-plugins=NodeRestriction --service-cluster-ip-range=10.96.0.0/16 --allow-privileged=true
wait_for 120 "the API server" kubectl get --raw /readyz
for part in controllers:controller-manager scheduler:scheduler; do
    config=$pki/${part%:*}.kubeconfig
    more=()
    [ "${part%:*}" = scheduler ] || more=(--use-service-account-credentials --root-ca-file="$pki/ca.crt"
        --service-account-private-key-file="$pki/accounts.key")
    start "${part#*:}" "$work/programs/kube-${part#*:}" --kubeconfig="$config" --authentication-kubeconfig="$config" \
        --authorization-kubeconfig="$config" --leader-elect=false --bind-address=127.0.0.1 "${more[@]}"
done
wait_for 300 "the node" on_node true
wait_for 300 "node-1 in Kubernetes" kubectl get node node-1

echo "kubernetes: bringing the images to the node" >&2
on_node "ctr -n k8s.io images import -" <"$work/images/sidecars.tar" >/dev/null
# As the document's table has it for any cluster with containerd.
on_node "cat >ashlar.tar" <"$work/images/ashlar.tar"
on_node "ctr -n k8s.io images import ashlar.tar && rm ashlar.tar"
kubectl wait --for=condition=Ready node/node-1 --timeout=5m

source "$here/follow.sh"
