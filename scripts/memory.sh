#!/usr/bin/env bash
# How much memory a daemon takes while a large volume is written at random: scripts/memory.sh [GIB]
#
# A volume of GIB (100) is written whole, 128 KiB at a time in random order; then a twenty-fifth of it again at random,
# 4 KiB at a time and 64 in flight, some twenty such writes for each page of the index, so that as much waits for the
# index as ever may. Meanwhile the process's resident size is looked at twice a second.
#
# The store is a compressed RAM disk (zram) that holds the same bytes again and again in next to nothing; but headers and
# index do take room there, which is why not all of it is written 4 KiB at a time. Up to 10 GiB for 100 GiB: with less
# memory than that to spare, write less. Needs root, the kernel's zram and fio.
#
# Exit status 0 only if the largest resident size stayed under 256 MiB and the configured cache of index leaves.
set -euo pipefail
cd "$(dirname "$0")/.."
gib=${1:-100}
bound_mib=256
cache_mib=64
device_memory_gib=10
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
        # The kernel lets go of a killed process's files a moment later.
        local left=100
        until echo "$number" 2>/dev/null >/sys/class/zram-control/hot_remove || [ "$left" = 0 ]; do
            left=$((left - 1))
            sleep 0.1
        done
        [ "$left" -gt 0 ] || echo "memory: /dev/zram$number is still there" >&2
    fi
    rm -rf "$scratch" "$tails"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

number=$(cat /sys/class/zram-control/hot_add)
# Past it writes fail, which fails the run and not the machine.
echo "${device_memory_gib}G" >"/sys/block/zram$number/mem_limit"
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
most=0
at_most=
began=$SECONDS
# Writes and watches the daemon meanwhile.
write() { # WHAT FIO_ARGUMENT...
    local what=$1 resident now status=0
    shift
    fio --name=memory --ioengine=nbd "--uri=nbd+unix:///big?socket=$scratch/data/nbd.sock" --thread --rw=randwrite \
        "--size=${gib}G" --buffer_pattern=0x5a5a5a5a --randseed=1 --eta=never --output-format=json \
        --output="$scratch/fio.json" "$@" </dev/null &
    fio_pid=$!
    while kill -0 "$fio_pid" 2>/dev/null; do
        now=$(awk '/^VmRSS/ { r = $2 } /^RssAnon/ { a = $2 } /^RssFile/ { f = $2 } /^RssShmem/ { s = $2 }
            END { print r, a, f, s }' "/proc/$daemon_pid/status")
        read -r resident _ <<<"$now"
        [ -n "$resident" ] || { echo "memory: the daemon is gone" >&2; tail -n 15 "$scratch/log" >&2; exit 1; }
        if [ "$resident" -gt "$most" ]; then most=$resident; at_most=$now; fi
        sleep 0.5
    done
    wait "$fio_pid" || status=$?
    fio_pid=
    [ "$status" = 0 ] || { echo "memory: fio failed" >&2; tail -n 15 "$scratch/log" >&2; exit 1; }
    printf '%s: %d MiB resident at the most so far; ' "$what" $((most >> 10))
    # The longest wait of a client: the first "max" of the completion times of writes.
    awk -F '[:,]' '/"write" :/ { w = 1 } w && /"iops" :/ { iops = $2 } w && /"clat_ns" :/ { c = 1 }
        c && /"max" :/ { printf "%d writes/s, the longest took %d ms\n", iops, $2 / 1000000; exit }' "$scratch/fio.json"
}
write "$gib GiB at random, 128 KiB each" --bs=128k --iodepth=16
write "$((gib * 1024 / 25)) MiB more, 4 KiB each" --bs=4k --iodepth=64 --norandommap "--io_size=$((gib * 1024 / 25))M"

read -r resident anonymous file shared <<<"$at_most"
printf 'in %d s: %d MiB resident at the most: %d anonymous, %d of the program file, %d of the mapped tail\n' \
    $((SECONDS - began)) $((resident >> 10)) $((anonymous >> 10)) $((file >> 10)) $((shared >> 10))
read -r stored _ held _ <"/sys/block/zram$number/mm_stat"
printf 'the device holds %d GiB in %d MiB\n' $((stored >> 30)) $((held >> 20))
if [ "$resident" -gt $(((bound_mib + cache_mib) << 10)) ]; then
    echo "memory: over $bound_mib MiB and a cache of $cache_mib MiB" >&2
    exit 1
fi
echo "memory: under $bound_mib MiB and a cache of $cache_mib MiB"
