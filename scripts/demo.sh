#!/usr/bin/env bash
# Shows on this machine, in a scratch directory, that a volume keeps what it was told: an ext4 image goes in and
# comes back the same, fio verifies what it wrote, and both still hold after kill -9 and a restart.
# Exit status 0 only if every step held. Everything it makes is removed, everything it starts is ended.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PATH:/usr/sbin:/sbin"
bin=${CARGO_TARGET_DIR:-$PWD/target}/release

image_mib=256
volume_mib=512
step_deadline_s=300
start_deadline_s=60

# The default is on disk and not in /tmp, which is memory on many machines.
scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/ashlar-demo.XXXXXX")
data=$scratch/data
# Acknowledged writes outlive the daemon in memory, where there is a tmpfs for them.
if [ -w /dev/shm ]; then tails=$(mktemp -d /dev/shm/ashlar-demo.XXXXXX); else tails=$data; fi
admin=unix:$data/admin.sock
uri="nbd+unix:///demo?socket=$data/nbd.sock"
daemon_pid=
step=0
began=$SECONDS

if [ -t 1 ]; then bold=$'\e[1m'; green=$'\e[32m'; red=$'\e[31m'; plain=$'\e[0m'; else bold=; green=; red=; plain=; fi
step() { step=$((step + 1)); printf '%s%d. %s%s\n' "$bold" "$step" "$1" "$plain"; }
held() { printf '   %sok%s  %s\n' "$green" "$plain" "$1"; }
fail() {
    printf '   %sFAILED%s  %s\n' "$red" "$plain" "$1" >&2
    if [ -s "$scratch/ashlard.log" ]; then
        printf '   the end of the daemon'\''s log:\n' >&2
        tail -n 15 "$scratch/ashlard.log" | sed 's/^/   | /' >&2
    fi
    exit 1
}

stop_daemon() { # SIGNAL
    [ -n "$daemon_pid" ] || return 0
    kill "-$1" "$daemon_pid" 2>/dev/null || true
    wait "$daemon_pid" 2>/dev/null || true
    daemon_pid=
}

clean_up() {
    local status=$?
    trap - EXIT
    stop_daemon KILL
    rm -rf "$scratch" "$tails"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Port 0: any free one, so that a daemon already running here is not disturbed.
start_daemon() {
    "$bin/ashlard" --data-dir "$data" --tail-dir "$tails" --listen-http 127.0.0.1:0 >>"$scratch/ashlard.log" 2>&1 </dev/null &
    daemon_pid=$!
    local deadline=$((SECONDS + start_deadline_s))
    until "$bin/ashlar" --admin "$admin" status -o json 2>/dev/null | grep -q '"state": "ready"'; do
        kill -0 "$daemon_pid" 2>/dev/null || fail "the daemon ended while starting"
        [ "$SECONDS" -lt "$deadline" ] || fail "the daemon was not ready after $start_deadline_s s"
        sleep 0.05
    done
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

image_came_back() {
    rm -f "$scratch/back"
    try "nbdcopy could not read the volume" nbdcopy "$uri" "$scratch/back"
    try "what came back differs from the image" cmp -n "$((image_mib << 20))" "$scratch/image" "$scratch/back"
    truncate -s "${image_mib}M" "$scratch/back"
    try "e2fsck found faults in what came back" e2fsck -fn "$scratch/back"
    rm -f "$scratch/back"
}

# The half of the volume behind the image.
fio_verify() { # ARGUMENT...
    try "fio found wrong data" fio --name=demo --ioengine=nbd "--uri=$uri" --rw=randwrite --bs=4k --iodepth=32 \
        --offset="${image_mib}M" --size="$((volume_mib - image_mib))M" --io_size=64M --randseed=1 \
        --verify=crc32c --verify_fatal=1 --thread --aux-path="$scratch" --eta=never --output="$scratch/fio" "$@"
}

printf 'Ashlar demo in %s\n' "$scratch"

step "Start ashlard"
start_daemon
held "process $daemon_pid, data in $data"

step "Create a volume of $volume_mib MiB"
try "the volume could not be created" "$bin/ashlar" --admin "$admin" volume create demo --size "${volume_mib}MiB"
try "the volume cannot be reached over NBD" nbdinfo --size "$uri"
[ "$(cat "$scratch/out")" = "$((volume_mib << 20))" ] || fail "the volume is $(cat "$scratch/out") bytes long"
held "$uri"

step "Copy an ext4 image into it with nbdcopy"
mkdir "$scratch/files"
cp -r Cargo.toml Cargo.lock README.md docs server proto bench tests "$scratch/files/" 2>/dev/null || true
head -c 48M /dev/urandom >"$scratch/files/random"
try "mkfs.ext4 failed" mkfs.ext4 -q -F -d "$scratch/files" "$scratch/image" "${image_mib}M"
try "nbdcopy could not write the volume" nbdcopy "$scratch/image" "$uri"
held "$(find "$scratch/files" -type f | wc -l) files, $(du -sh "$scratch/files" | cut -f1)"

step "Read it back and compare"
image_came_back
held "the same bytes; e2fsck is content"

step "Write at random beside it with fio and verify"
fio_verify
held "64 MiB of 4 KiB writes, 32 in flight, each verified by its checksum"

step "kill -9 the daemon"
killed=$daemon_pid
stop_daemon KILL
kill -0 "$killed" 2>/dev/null && fail "process $killed is still there"
held "process $killed is gone; nothing was flushed or shut down first"

step "Start it again"
restart_began=$(date +%s%N)
start_daemon
held "process $daemon_pid, ready after $((($(date +%s%N) - restart_began) / 1000000)) ms"

step "Verify everything again"
image_came_back
held "the image: the same bytes; e2fsck is content"
fio_verify --verify_only
held "fio: every write is there"

step "Stop it as a service manager would"
stopping=$daemon_pid
kill -TERM "$stopping"
status=0
wait "$stopping" || status=$?
daemon_pid=
[ "$status" = 0 ] || fail "ashlard ended with status $status on SIGTERM"
held "drained and ended with status 0"

cat <<TEXT

${green}Every step held${plain}, in $((SECONDS - began)) s.

To keep a daemon and use a volume as a block device (nbd-client needs root and the kernel's nbd module):

  make run
  $bin/ashlar --admin unix:$PWD/data/admin.sock volume create my-volume --size 10GiB
  sudo modprobe nbd
  sudo nbd-client -unix $PWD/data/nbd.sock -name my-volume /dev/nbd0
  sudo mkfs.ext4 /dev/nbd0 && sudo mount /dev/nbd0 /mnt
  ...
  sudo umount /mnt && sudo nbd-client -d /dev/nbd0
TEXT
