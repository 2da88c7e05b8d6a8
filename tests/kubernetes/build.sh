#!/usr/bin/env bash
# What run.sh starts, into WORK: Kubernetes' programs, images, certificates and the nodes' disk. What is there is kept.
# tests/kubernetes/build.sh WORK [cluster]
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$1
what=${2:-node}
here=$PWD/tests/kubernetes
target=${CARGO_TARGET_DIR:-$PWD/target}
mkdir -p "$work"/{programs,sidecars,cluster,images,pki}

say() { printf 'kubernetes: %s\n' "$*" >&2; }

go_build() { # MODULE OUT PACKAGE...
    local module=$1 out=$2
    shift 2
    (
        cd "$here/$module"
        export CGO_ENABLED=0 GOTOOLCHAIN=auto GOFLAGS="-mod=readonly -buildvcs=false"
        # Kubernetes' own build sets it; the kubelet refuses to have none.
        version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes 2>/dev/null) || version=none
        go build -trimpath -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$version" -o "$out" "$@"
    )
}

if [ ! -x "$work/programs/kubelet" ]; then
    say "building Kubernetes, which takes some minutes"
    go_build programs "$work/programs/" \
        k8s.io/kubernetes/cmd/kube-{apiserver,controller-manager,proxy,scheduler} k8s.io/kubernetes/cmd/kubelet
fi
if [ ! -x "$work/sidecars/livenessprobe" ]; then
    say "building the sidecars"
    module=github.com/kubernetes-csi
    go_build sidecars "$work/sidecars/" "$module/external-attacher/v4/cmd/csi-attacher" \
        "$module/external-provisioner/v6/cmd/csi-provisioner" "$module/external-resizer/v2/cmd/csi-resizer" \
        ./csi-node-driver-registrar ./livenessprobe
fi
if [ "$what" = cluster ] && [ ! -x "$work/cluster/operator" ]; then
    say "building etcd, CoreDNS and the Prometheus operator"
    go_build cluster "$work/cluster/dns" ./dns
    go_build cluster "$work/cluster/etcd" go.etcd.io/etcd/server/v3
    go_build cluster "$work/cluster/etcdctl" go.etcd.io/etcd/etcdctl/v3
    module=github.com/prometheus-operator/prometheus-operator
    # A module has a directory once it was downloaded.
    (cd "$here/cluster" && GOTOOLCHAIN=auto go mod download "$module")
    cp "$(cd "$here/cluster" && GOTOOLCHAIN=auto go list -m -f '{{.Dir}}' "$module")"/example/prometheus-operator-crd/*.yaml "$work/cluster/"
    go_build cluster "$work/cluster/operator" "$module/cmd/operator"
fi

if [ "$what" = cluster ]; then
    cc -shared -fPIC -O2 -o "$work/whole-registers.so" "$here/whole-registers.c"
fi

# Every image under the name that the chart and the examples know it by, and none from a registry. Of chroot's isolation
# nothing is asked that the machine may not allow.
export BUILDAH_ISOLATION=chroot
image() { # NAME DIRECTORY, with the Containerfile on standard input
    podman build --quiet --file - --tag "$1" "$2" >/dev/null
}
saved() { # NAME FILE
    rm -f "$2"
    podman save --quiet --output "$2" "$1"
}
if [ ! -e "$work/images/sidecars.tar" ]; then
    say "making images of the sidecars, of busybox and of the pause container"
    names=()
    while read -r name; do
        program=${name##*/}
        program=${program%:*}
        image "$name" "$work/sidecars" <<<"FROM scratch
COPY $program /$program
ENTRYPOINT [\"/$program\"]"
        names+=("$name")
    done < <(sed -n 's/^    image: \(.*sig-storage.*\)/\1/p' deploy/charts/ashlar/values.yaml)
    cc -static -Os -s -o "$work/images/pause" "$here/pause.c"
    image registry.k8s.io/pause:3.6 "$work/images" <<<'FROM scratch
COPY pause /pause
ENTRYPOINT ["/pause"]'
    cp "$(command -v busybox)" "$work/images/busybox"
    image docker.io/library/busybox:1.37 "$work/images" <<<'FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "/bin"]
RUN ["/bin/busybox", "mkdir", "-p", "/tmp", "/etc"]
CMD ["sh"]'
    names+=(registry.k8s.io/pause:3.6 docker.io/library/busybox:1.37)
    rm -f "$work/images/sidecars.tar"
    podman save --quiet --multi-image-archive --output "$work/images/sidecars.tar" "${names[@]}"
    rm -f "$work/node.img"
fi
if [ "$what" = cluster ] && [ ! -e "$work/images/cluster.tar" ]; then
    say "making images of etcd and kubectl"
    cp "$target/tools/kubernetes/kubectl" "$work/cluster/"
    names=()
    while read -r name; do
        program=${name##*/}
        program=${program%:*}
        image "$name" "$work/cluster" <<<"FROM scratch
COPY $program /usr/local/bin/$program
ENV PATH=/usr/local/bin
ENTRYPOINT [\"/usr/local/bin/$program\"]"
        names+=("$name")
    done < <(sed -n 's/^  \(kubectlI\|i\)mage: \(registry.*\)/\2/p' deploy/charts/ashlar/values.yaml)
    podman save --quiet --multi-image-archive --output "$work/images/cluster.tar" "${names[@]}"
    rm -f "$work/node.img"
fi

# The image of Ashlar, by its Containerfile as it is. Compiling in it would take longer than all the rest: its first base has a
# `cargo` that takes what is built already.
debian=docker.io/library/debian:bookworm-slim
if ! podman image exists "$debian"; then
    say "making a base image of Debian"
    mmdebstrap --quiet --variant=minbase --include=ca-certificates bookworm "$work/debian.tar"
    podman import --quiet "$work/debian.tar" "$debian" >/dev/null
    rm "$work/debian.tar"
fi
for program in ashlard ashlar ashlar-csi; do
    strip -g -o "$work/images/$program" "$target/release/$program"
done
image docker.io/library/rust:1-bookworm "$work/images" <<<"FROM $debian
COPY ashlard ashlar ashlar-csi /programs/
RUN printf '#!/bin/sh\nmkdir -p target/release && cp /programs/* target/release/\n' >/usr/local/bin/cargo && chmod 755 /usr/local/bin/cargo"

if [ ! -e "$work/pki/node-5.kubeconfig" ]; then
    "$here/certificates.sh" "$work/pki"
    rm -f "$work/node.img"
fi
if [ ! -e "$work/node.img" ] || [ -n "$(find "$here/node" -newer "$work/node.img")" ]; then
    say "making the disk that nodes begin with"
    root=$(mktemp -d "$work/root-XXXXXX")
    mmdebstrap --quiet --variant=minbase --include=linux-image-cloud-amd64,initramfs-tools,systemd-sysv,udev,containerd,runc \
        --include=containernetworking-plugins,iptables,conntrack,kmod,iproute2,procps,openssh-server,mount,util-linux,e2fsprogs \
        bookworm "$root"
    cp -r "$here/node/." "$root/"
    for unit in prepare-node kubelet kube-proxy; do
        ln -s "/etc/systemd/system/$unit.service" "$root/etc/systemd/system/multi-user.target.wants/"
    done
    install -m 755 "$work/programs/kubelet" "$work/programs/kube-proxy" "$root/usr/local/bin/"
    install -m 600 "$work/pki/ca.crt" "$work/pki/proxy.kubeconfig" "$root/etc/kubernetes/"
    install -D -m 600 -t "$root/etc/kubernetes/nodes" "$work"/pki/node-?.kubeconfig
    install -D -m 600 "$work/pki/ssh.pub" "$root/root"/.ssh/authorized_keys
    for number in 1 2 3 4 5; do echo "10.20.0.1$number node-$number" >>"$root/etc/hosts"; done
    : >"$root/etc/fstab"
    # Where nodes are of User Mode Linux.
    for modules in /usr/lib/uml/modules/*; do
        [ ! -d "$modules" ] || { cp -r "$modules" "$root/lib/modules/" && depmod -b "$root" "${modules##*/}"; }
    done
    rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*
    for images in "$work"/images/{sidecars,cluster}.tar; do
        [ ! -e "$images" ] || "$here/preload.sh" "$root" "$images"
    done
    cp "$root"/boot/vmlinuz-* "$work/vmlinuz"
    cp "$root"/boot/initrd.img-* "$work/initrd"
    mke2fs -q -t ext4 -d "$root" "$work/node.img.new" 40G
    mv "$work/node.img.new" "$work/node.img"
    rm -rf "$root"
fi
