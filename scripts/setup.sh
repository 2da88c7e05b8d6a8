#!/usr/bin/env bash
# Installs what is missing and nothing else: scripts/setup.sh SET...
#
#   build   a C compiler and a Rust toolchain
#   demo    what `make demo` runs against the daemon
#   test    what `make test` runs against the daemon
#   bench   the servers and the load generator `make bench` compares with
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
    test)
        tools_of demo
        echo "qemu-img qemu-utils"
        echo "qemu-io qemu-utils"
        echo "/usr/bin/nbdsh python3-libnbd"
        echo "mkfs.xfs xfsprogs"
        echo "xfs_repair xfsprogs"
        echo "nbdkit nbdkit"
        echo "losetup mount"
        echo "fusermount3 fuse3"
        echo "nbdfuse nbdfuse" ;;
    bench)
        echo "fio fio"
        echo "nbdinfo libnbd-bin"
        echo "qemu-nbd qemu-utils"
        echo "qemu-io qemu-utils"
        echo "nbdkit nbdkit"
        echo "nbd-server nbd-server" ;;
    check) ;;
    *) die "unknown set '$1' (build, demo, test, bench, check)" ;;
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

[ "$#" -gt 0 ] || die "say what to set up: build, demo, test, bench, check"

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
    check)
        install_rust
        install_rust_component fmt rustfmt
        install_rust_component clippy clippy
        ;;
    esac
done
