#!/usr/bin/env bash
# Shows on this machine, in a scratch directory, that a volume with three copies outlives a node: three daemons on
# 127.0.0.1, .2 and .3 with an etcd, a volume under load while one daemon is killed, its return by what it missed,
# and the volume opened on another node with the same bytes.
# Exit status 0 only if every step held. Everything it makes is removed, everything it starts is ended.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PATH:/usr/sbin:/sbin"
bin=${CARGO_TARGET_DIR:-$PWD/target}/release

volume_mib=256
image_mib=64
load_mib=64
load_writes_per_s=1000
step_deadline_s=300
start_deadline_s=60
sync_deadline_s=120

# The default is on disk and not in /tmp, which is memory on many machines.
scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/ashlar-demo.XXXXXX")
# Acknowledged writes outlive a daemon in memory, where there is a tmpfs for them.
if [ -w /dev/shm ]; then tails=$(mktemp -d /dev/shm/ashlar-demo.XXXXXX); else tails=$scratch/tails; fi
etcd_pid=
load_pid=
daemon_pids=(- "" "" "")
admin_ports=(- "" "" "")
step=0
began=$SECONDS

if [ -t 1 ]; then bold=$'\e[1m'; green=$'\e[32m'; red=$'\e[31m'; plain=$'\e[0m'; else bold=; green=; red=; plain=; fi
step() { step=$((step + 1)); printf '%s%d. %s%s\n' "$bold" "$step" "$1" "$plain"; }
held() { printf '   %sok%s  %s\n' "$green" "$plain" "$1"; }
fail() {
    printf '   %sFAILED%s  %s\n' "$red" "$plain" "$1" >&2
    local log
    for log in "$scratch"/*.log; do
        [ -s "$log" ] || continue
        printf '   the end of %s:\n' "${log##*/}" >&2
        tail -n 8 "$log" | sed 's/^/   | /' >&2
    done
    exit 1
}

end_process() { # SIGNAL PID
    [ -n "$2" ] || return 0
    kill "-$1" "$2" 2>/dev/null || true
    wait "$2" 2>/dev/null || true
}

clean_up() {
    local status=$?
    trap - EXIT
    end_process KILL "$load_pid"
    local node
    for node in 1 2 3; do end_process KILL "${daemon_pids[$node]}"; done
    end_process KILL "$etcd_pid"
    rm -rf "$scratch" "$tails"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

free_port() { # ADDRESS
    local port
    while :; do
        port=$((20000 + RANDOM % 12000))
        (exec 3<>"/dev/tcp/$1/$port") 2>/dev/null || break
    done
    printf '%s' "$port"
}

# Runs a command under a deadline, quietly; what it printed shows only when it fails.
try() { # WHAT COMMAND...
    local what=$1
    shift
    if ! timeout --kill-after=5 "$step_deadline_s" "$@" >"$scratch/out" 2>"$scratch/err" </dev/null; then
        head -c 4000 "$scratch/err" | sed 's/^/   | /' >&2
        head -c 2000 "$scratch/out" | sed 's/^/   | /' >&2
        fail "$what"
    fi
}

wait_for() { # DEADLINE_S WHAT COMMAND...
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || fail "$what"
        sleep 0.1
    done
}

asks() { # NODE ARGUMENT...
    local node=$1
    shift
    "$bin/ashlar" --admin "unix:$scratch/$node/admin.sock" "$@"
}

uri_of() { printf 'nbd+unix:///demo?socket=%s/nbd.sock' "$scratch/$1"; }

start_node() { # NODE [FLAG...]
    local node=$1
    shift
    "$bin/ashlard" --data-dir "$scratch/$node" --tail-dir "$tails/$node" --store-size 4GiB --metadata "$metadata" \
        --listen-admin "unix:$scratch/$node/admin.sock" --listen-admin "tcp:127.0.0.$node:${admin_ports[$node]}" \
        --listen-http off "$@" >>"$scratch/node-$node.log" 2>&1 </dev/null &
    daemon_pids[node]=$!
    wait_for "$start_deadline_s" "node $node was not ready after $start_deadline_s s" is_ready "$node"
}

is_ready() { # NODE
    kill -0 "${daemon_pids[$1]}" 2>/dev/null || fail "the daemon of node $1 ended while starting"
    asks "$1" status -o json 2>/dev/null | grep -q '"state": "ready"'
}

copies() { # NODE STATE: how many copies are in that state, as this node knows the volume
    asks "$1" volume show demo -o json 2>/dev/null | grep -c "\"state\": \"$2\"" || true
}

is_out_of_sync() { [ "$(copies "$1" out)" -gt 0 ]; }
is_in_sync() { [ "$(copies "$1" in-sync)" -ge 3 ] && [ "$(copies "$1" out)" = 0 ] && [ "$(copies "$1" joining)" = 0 ]; }

written_mib() { # NODE: what the load has written so far
    local bytes
    bytes=$(asks "$1" connections -o json 2>/dev/null | grep -o '"written_bytes": [0-9]*' | grep -o '[0-9]*' | sort -n | tail -n 1)
    printf '%s' "$((${bytes:-0} >> 20))"
}
is_under_load() {
    kill -0 "$load_pid" 2>/dev/null || fail "the load ended before the kill: $(cat "$scratch/load")"
    [ "$(written_mib 1)" -ge 4 ]
}

image_came_back() { # NODE
    rm -f "$scratch/back"
    try "nbdcopy could not read the volume" nbdcopy "$(uri_of "$1")" "$scratch/back"
    try "what came back differs from the image" cmp -n "$((image_mib << 20))" "$scratch/image" "$scratch/back"
    rm -f "$scratch/back"
}

# The part of the volume behind the image.
fio_on() { # NODE ARGUMENT...
    local node=$1
    shift
    timeout --kill-after=5 "$step_deadline_s" fio --name=demo --ioengine=nbd "--uri=$(uri_of "$node")" \
        --rw=randwrite --bs=4k --iodepth=8 --offset="${image_mib}M" --size="$((volume_mib - image_mib))M" \
        --io_size="${load_mib}M" --randseed=1 --verify=crc32c --verify_fatal=1 --thread --aux-path="$scratch" \
        --eta=never "$@" >"$scratch/load" 2>&1 </dev/null
}

printf 'Ashlar cluster demo in %s\n' "$scratch"

step "Start etcd, which keeps the cluster's records"
etcd_port=$(free_port 127.0.0.1)
peer_port=$(free_port 127.0.0.1)
metadata=etcd:http://127.0.0.1:$etcd_port
etcd --name demo --data-dir "$scratch/etcd" --logger zap \
    --listen-client-urls "http://127.0.0.1:$etcd_port" --advertise-client-urls "http://127.0.0.1:$etcd_port" \
    --listen-peer-urls "http://127.0.0.1:$peer_port" --initial-advertise-peer-urls "http://127.0.0.1:$peer_port" \
    --initial-cluster "demo=http://127.0.0.1:$peer_port" >"$scratch/etcd.log" 2>&1 </dev/null &
etcd_pid=$!
etcd_serves() {
    kill -0 "$etcd_pid" 2>/dev/null || fail "etcd ended while starting"
    # The words of 3.4 and of what came after.
    grep -q -e 'serving client traffic' -e 'ready to serve client requests' "$scratch/etcd.log"
}
wait_for "$start_deadline_s" "etcd was not ready after $start_deadline_s s" etcd_serves
held "process $etcd_pid, $metadata"

step "Make a cluster of three nodes"
for node in 1 2 3; do
    mkdir -p "$scratch/$node" "$tails/$node"
    admin_ports[node]=$(free_port "127.0.0.$node")
done
try "the cluster could not be made" "$bin/ashlar" cluster init --data-dir "$scratch/1" --metadata "$metadata"
start_node 1
held "node 1 on 127.0.0.1, process ${daemon_pids[1]}: it made the cluster's certificate authority"
for node in 2 3; do
    token=$(asks 1 cluster token) || fail "node 1 gave no token"
    start_node "$node" --join "$token"
    held "node $node on 127.0.0.$node, process ${daemon_pids[$node]}: joined with a one-time token"
done

step "Create a volume of $volume_mib MiB with 3 copies"
# A node's room is told to the others some time after it joined.
create() { asks 1 volume create demo --size "${volume_mib}MiB" --replicas 3 >"$scratch/out" 2>&1; }
wait_for "$start_deadline_s" "the volume could not be created" create
wait_for "$sync_deadline_s" "its copies are not in sync" is_in_sync 1
held "$(copies 1 in-sync) copies in sync, served by node 1"

step "Write to it: random bytes with nbdcopy, read back and compared"
head -c "${image_mib}M" /dev/urandom >"$scratch/image"
try "nbdcopy could not write the volume" nbdcopy --flush "$scratch/image" "$(uri_of 1)"
image_came_back 1
held "$image_mib MiB, the same bytes"

step "kill -9 node 3 while fio writes"
fio_on 1 --rate_iops="$load_writes_per_s" &
load_pid=$!
wait_for "$step_deadline_s" "fio wrote nothing" is_under_load
before_mib=$(written_mib 1)
killed=${daemon_pids[3]}
end_process KILL "$killed"
daemon_pids[3]=
kill -0 "$load_pid" 2>/dev/null || fail "fio was done before node 3 was killed"
held "process $killed is gone after $before_mib MiB of $load_mib; fio goes on"
wait_for "$sync_deadline_s" "the copy on node 3 was not recorded as out of sync" is_out_of_sync 1
held "its copy is recorded as out of sync, $(copies 1 in-sync) go on"
status=0
wait "$load_pid" || status=$?
load_pid=
if [ "$status" != 0 ]; then sed 's/^/   | /' "$scratch/load" >&2; fail "fio saw an error"; fi
held "fio: $load_mib MiB of 4 KiB writes, no error, each verified by its checksum"

step "Start node 3 again"
start_node 3
held "process ${daemon_pids[3]}"
wait_for "$sync_deadline_s" "the copy on node 3 did not come back" is_in_sync 1
copied=$(grep -h 'a replica is in sync again' "$scratch/node-1.log" | grep -o 'copied_bytes[^0-9]*[0-9]*' | grep -o '[0-9]*$' | awk '{ sum += $1 } END { print sum + 0 }' || true)
held "$(copies 1 in-sync) copies in sync again; $((${copied:-0} >> 20)) MiB were copied"

step "Open the volume on node 3, taking it from node 1"
try "the volume could not be opened on node 3" "$bin/ashlar" --admin "unix:$scratch/3/admin.sock" volume open demo
nbdinfo --size "$(uri_of 1)" >/dev/null 2>&1 && fail "node 1 still lets clients in"
held "served by node 3; node 1 lets no client in any more"

step "Compare everything there, from the copy that was away"
image_came_back 3
held "the image: the same bytes"
if ! fio_on 3 --verify_only; then sed 's/^/   | /' "$scratch/load" >&2; fail "fio found wrong data"; fi
held "fio: every write is there"

step "Stop the nodes as a service manager would"
for node in 1 2 3; do
    kill -TERM "${daemon_pids[$node]}"
    status=0
    wait "${daemon_pids[$node]}" || status=$?
    daemon_pids[node]=
    [ "$status" = 0 ] || fail "node $node ended with status $status on SIGTERM"
done
held "all three drained and ended with status 0"

printf '\n%sEvery step held%s, in %d s. docs/usage.md tells how to make a cluster that stays.\n' \
    "$green" "$plain" "$((SECONDS - began))"
