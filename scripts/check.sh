#!/usr/bin/env bash
# The one read-only gate, for people and for CI: format, lints, docs, audit, tidy. Runs all of them, even after one
# has failed, and ends with what failed. Changes no file outside the target directory.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
tools=$CARGO_TARGET_DIR/tools
PATH="$PATH:$tools/bin"
cargo_deny_version=0.20.2
# How long the advisory database's host may take to answer before it counts as unreachable.
fetch_deadline_s=90

failed=()
gate() { # NAME COMMAND...
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    "$@" </dev/null || failed+=("$name")
}

docs() { RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --workspace --no-deps --quiet; }

advisories=
audit() {
    if ! cargo deny --version >/dev/null 2>&1; then
        echo "installing cargo-deny $cargo_deny_version into $tools (once; some minutes)"
        cargo install --locked --quiet --root "$tools" --version "$cargo_deny_version" cargo-deny || return 1
    fi
    cargo deny --locked check --hide-inclusion-graph bans licenses sources || return 1
    if timeout "$fetch_deadline_s" cargo deny --locked fetch db >/dev/null 2>&1; then
        cargo deny --locked --offline check advisories || return 1
    else
        advisories="the advisory database could not be fetched: known vulnerabilities were NOT checked"
        echo "$advisories"
    fi
}

tidy() { cargo test --release --locked --quiet -p ashlar-tests --test all tidy; }

gate format cargo fmt --all -- --check
gate lints cargo clippy --release --locked --workspace --all-targets -- -D warnings
gate docs docs
gate audit audit
gate tidy tidy

printf '\n'
if [ "${#failed[@]}" -gt 0 ]; then
    [ -z "$advisories" ] || printf 'and %s\n' "$advisories" >&2
    printf 'failed: %s\n' "${failed[*]}" >&2
    exit 1
fi
if [ -n "$advisories" ]; then
    echo "check: clean, but $advisories"
else
    echo "check: all clean"
fi
