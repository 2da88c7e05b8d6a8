#!/bin/sh
# Runs what follows with the pod's token, if there is one. A node that is a member already does not look at it.
set -eu
if [ -s "$JOIN_DIRECTORY/$POD_NAME" ]; then
    ASHLAR_JOIN=$(cat "$JOIN_DIRECTORY/$POD_NAME")
    export ASHLAR_JOIN
fi
exec "$@"
