#!/usr/bin/env bash
# How much memory a daemon takes while a large volume is written at random: scripts/memory.sh [GIB]
#
# A volume of GIB (100) is written whole, 4 KiB at a time, each block once, in random order, 64 in flight; the process's
# resident size is looked at twice a second. The store is a compressed RAM disk (zram) that holds the same bytes again and
# again in next to nothing; only headers and index take room there, some 5 GiB for 100 GiB. Needs root, the kernel's zram
# and fio, and takes ten to twenty minutes.
#
# Exit status 0 only if the largest resident size stayed under 256 MiB and the configured cache of index leaves.
set -euo pipefail
cd "$(dirname "$0")/.."
gib=${1:-100}
bound_mib=256
cache_mib=64
# The capacity of a store is some 80 % of its device.
device_gib=$((gib * 7 / 5 + 1))
bin=${CARGO_TARGET_DIR:-$PWD/target}/release

[ "$(id -u)" = 0 ] || { echo "memory: must be root, for the zram device" >&2; exit 1; }
[ -e /sys/class/zram-control/hot_add ] || modprobe zram num_devices=0 2>/dev/null || true
[ -e /sys/class/zram-control/hot_add ] || { echo "memory: this kernel has no zram" >&2; exit 1; }

scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/ashlar-memory.XXXXXX")
tails=$(mktemp -d /dev/shm/ashlar-memory.XXXXXX)
daemon_pid=
fio_pid=
number=
clean_up() {
    local status=$?
    trap - EXIT
    [ -z "$fio_pid" ] || kill "$fio_pid" 2>/dev/null || true
    if [ -n "$daemon_pid" ]; then
        kill -KILL "$daemon_pid" 2>/dev/null || true
        wait "$daemon_pid" 2>/dev/null || true
    fi
    if [ -n "$number" ]; then
        echo 1 >"/sys/block/zram$number/reset" || true
        echo "$number" >/sys/class/zram-control/hot_remove || true
    fi
    rm -rf "$scratch" "$tails"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

number=$(cat /sys/class/zram-control/hot_add)
echo "${device_gib}G" >"/sys/block/zram$number/disksize"
"$bin/ashlard" --data-dir "$scratch/data" --store "/dev/zram$number" --tail-dir "$tails" --listen-http off \
    --leaf-cache-size "${cache_mib}MiB" >"$scratch/log" 2>&1 </dev/null &
daemon_pid=$!
ashlar() { "$bin/ashlar" --admin "unix:$scratch/data/admin.sock" "$@"; }
until ashlar status --wait >/dev/null 2>&1; do
    kill -0 "$daemon_pid" 2>/dev/null || { cat "$scratch/log" >&2; exit 1; }
    sleep 0.1
done
ashlar volume create big --size "${gib}GiB" >/dev/null
fio --name=memory --ioengine=nbd "--uri=nbd+unix:///big?socket=$scratch/data/nbd.sock" --thread --rw=randwrite --bs=4k \
    --iodepth=64 "--size=${gib}G" --random_generator=lfsr --buffer_pattern=0x5a5a5a5a --eta=never \
    --output-format=json --output="$scratch/fio.json" </dev/null &
fio_pid=$!

began=$SECONDS
said=$SECONDS
most=0
at_most=
while kill -0 "$fio_pid" 2>/dev/null; do
    now=$(awk '/^VmRSS/ { r = $2 } /^RssAnon/ { a = $2 } /^RssFile/ { f = $2 } /^RssShmem/ { s = $2 }
        END { print r, a, f, s }' "/proc/$daemon_pid/status")
    read -r resident _ <<<"$now"
    [ -n "$resident" ] || { echo "memory: the daemon is gone" >&2; cat "$scratch/log" >&2; exit 1; }
    if [ "$resident" -gt "$most" ]; then most=$resident; at_most=$now; fi
    if [ $((SECONDS - said)) -ge 60 ]; then
        said=$SECONDS
        printf 'after %4d s: %d MiB resident, %d MiB at the most\n' $((SECONDS - began)) $((resident >> 10)) $((most >> 10))
    fi
    sleep 0.5
done
status=0
wait "$fio_pid" || status=$?
fio_pid=
[ "$status" = 0 ] || { echo "memory: fio failed" >&2; cat "$scratch/log" >&2; exit 1; }

read -r resident anonymous file shared <<<"$at_most"
printf '%d GiB written at random in %d s: %d MiB resident at the most: %d anonymous, %d of the program, %d of the mapped tail\n' \
    "$gib" $((SECONDS - began)) $((resident >> 10)) $((anonymous >> 10)) $((file >> 10)) $((shared >> 10))
# The first write's block of the JSON has the longest wait of a client.
awk -F '[:,]' '/"write" :/ { in_write = 1 } in_write && /"iops" :/ { iops = $2 }
    in_write && /"clat_ns" :/ { in_clat = 1 } in_clat && /"max" :/ { printf "%d writes/s, longest %d ms\n", iops, $2 / 1000000; exit }' \
    "$scratch/fio.json"
ashlar store list -o json | grep -E '"(write_amplification|checkpoints|frames)"' | tr -d ' ",' | tr '\n' ' '
echo
if [ "$resident" -gt $(((bound_mib + cache_mib) << 10)) ]; then
    echo "memory: over $bound_mib MiB and a cache of $cache_mib MiB" >&2
    exit 1
fi
echo "memory: under $bound_mib MiB and a cache of $cache_mib MiB"
