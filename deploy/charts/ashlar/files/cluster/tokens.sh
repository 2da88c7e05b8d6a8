#!/bin/sh
# Writes a patch of a Secret to the file $1: a new token, good for one node and the time $2, for each pod named after it.
# Runs beside the node that founded the cluster, whose admin interface it asks.
set -eu
patch=$1
lifetime=$2
shift 2
until ashlar status >/dev/null; do sleep "${RETRY_SECONDS:-5}"; done
umask 077
entries=
for pod in "$@"; do
    token=$(ashlar cluster token --lifetime="$lifetime")
    entries="$entries${entries:+,}\"$pod\":\"$token\""
done
printf '{"stringData":{%s}}\n' "$entries" >"$patch"
