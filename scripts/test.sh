#!/usr/bin/env bash
# Runs every test and closes with one line that counts them: scripts/test.sh [CARGO_TEST_ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# A shell's own settings must not reach the daemons that tests start; those of the tests themselves (ASHLAR_TESTS_SEED
# and its like, ASHLAR_SEED, ASHLAR_SEEDS) must reach the tests.
for name in "${!ASHLAR_@}"; do
    case $name in ASHLAR_TESTS_* | ASHLAR_SEED | ASHLAR_SEEDS) ;; *) unset "$name" ;; esac
done
# Most tests wait for something most of the time. Those in virtual machines take turns by themselves.
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-$(($(nproc) + 2))}
# The tests start the real programs, which `cargo test` alone would not build for every crate. Built together with the tests they
# share what both are made of; built alone, with fewer features of a few dependencies, nearly all of ours would be built twice.
cargo build --release --locked --workspace --bins --tests </dev/null
# Else the tests would build the programs as they stand alone.
export ASHLAR_TESTS_BIN_DIR=${ASHLAR_TESTS_BIN_DIR:-${CARGO_TARGET_DIR:-$PWD/target}/release}
status=0
cargo test --release --locked --workspace --no-fail-fast "$@" 2>&1 </dev/null | tee "$log" || status=${PIPESTATUS[0]}

read -r passed failed skipped < <(awk '
    /^test result: / {
        for (i = 1; i < NF; i++) {
            if ($(i + 1) == "passed;") passed += $i
            if ($(i + 1) == "failed;") failed += $i
            if ($(i + 1) == "ignored;") skipped += $i
        }
    }
    END { print passed + 0, failed + 0, skipped + 0 }' "$log")
took=$((SECONDS - started))
printf '\nall tests took %d min %02d s, building included\n' $((took / 60)) $((took % 60))
if [ "$status" = 0 ] && [ "$passed" = 0 ]; then
    echo "no test was run" >&2
    status=1
fi
printf 'total: %d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
exit "$status"
