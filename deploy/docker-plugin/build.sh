#!/bin/sh
# Lays out Docker's managed plugin: deploy/docker-plugin/build.sh IMAGE DIRECTORY
#
#   deploy/docker-plugin/build.sh localhost/ashlar:0.1.0 ./plugin
#   docker plugin create ashlar ./plugin
#   docker plugin enable ashlar
#
# IMAGE is what deploy/Containerfile builds. DIRECTORY gets config.json and rootfs/, the image's files with the places that
# config.json mounts something at. ENGINE is what has the image: docker, or podman.
set -eu
[ "$#" = 2 ] || { echo "usage: $0 IMAGE DIRECTORY" >&2; exit 2; }
here=$(dirname "$0")
image=$1
directory=$2
engine=${ENGINE:-docker}

mkdir "$directory"
mkdir "$directory/rootfs"
container=$("$engine" create "$image")
trap '"$engine" rm "$container" >/dev/null' EXIT
# Not in a pipe, whose first failure would go unseen.
"$engine" export --output="$directory/rootfs.tar" "$container"
tar -x -C "$directory/rootfs" -f "$directory/rootfs.tar"
rm "$directory/rootfs.tar"
for place in run/docker/plugins run/ashlar dev proc sys tmp var/lib/ashlar-csi/docker; do
    mkdir -p "$directory/rootfs/$place"
done
cp "$here/config.json" "$directory/config.json"
