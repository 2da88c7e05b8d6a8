#!/bin/sh
# Runs before the daemon of each pod and ends when it may start: on the first pod it founds the cluster, on the others it
# waits for a token to join with. Its arguments are those of `ashlar cluster init`; a node that is a member already, on
# whichever pod, is let through. It says what it waits for.
set -u
said_before=
say() {
    [ "$1" = "$said_before" ] || echo "$1"
    said_before=$1
}
while :; do
    if [ -s "$JOIN_DIRECTORY/$POD_NAME" ]; then exit 0; fi
    if [ "$POD_NAME" = "$FOUNDER" ]; then
        # Finishes what an earlier run began.
        said=$(ashlar cluster init "$@" 2>&1) && {
            say "$said"
            exit 0
        }
        case $said in
        *"this node is in cluster "*" already"*) exit 0 ;;
        esac
        say "$said"
    else
        if [ -e "$ASHLAR_DATA_DIR/identity/identity.json" ]; then exit 0; fi
        say "waiting for a token of $POD_NAME"
    fi
    sleep "${RETRY_SECONDS:-5}"
done
