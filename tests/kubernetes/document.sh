#!/usr/bin/env bash
# The commands of a section of docs/kubernetes.md, one a line with `$ ` or `node# ` before it: tests/kubernetes/document.sh SECTION
set -euo pipefail
cd "$(dirname "$0")/../.."
awk -v section="## $1" '
    /^## / { inside = ($0 == section); found = found || inside }
    !inside { next }
    /^ *```/ { block = /```console/; continued = 0; next }
    block {
        sub(/^ */, "")
        if (continued) printf " "
        else if (!/^(\$|node#) /) next
        continued = sub(/ *\\$/, "")
        printf "%s%s", $0, continued ? "" : "\n"
    }
    END { exit !found }
' docs/kubernetes.md
