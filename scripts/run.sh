#!/usr/bin/env bash
# A daemon that stays in the foreground until Ctrl-C: scripts/run.sh DATA_DIR [ASHLARD_FLAG...]
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1
shift
bin=${CARGO_TARGET_DIR:-$PWD/target}/release
mkdir -p "$data"
data=$(cd "$data" && pwd)

cat <<TEXT
ashlard runs in the foreground with its data in $data; Ctrl-C stops it cleanly.
In another shell:

  $bin/ashlar --admin unix:$data/admin.sock volume create my-volume --size 10GiB
  $bin/ashlar --admin unix:$data/admin.sock volume show my-volume     # prints how to attach it
  $bin/ashlar --admin unix:$data/admin.sock status

TEXT
exec "$bin/ashlard" --data-dir "$data" "$@"
