#!/usr/bin/env bash
# The commands of a section of docs/kubernetes.md, one a line with `$ ` or `node# ` before it: tests/kubernetes/document.sh SECTION.
# Or the first block of YAML in it: tests/kubernetes/document.sh SECTION yaml
set -euo pipefail
cd "$(dirname "$0")/../.."
awk -v section="## $1" -v want="${2:-console}" '
    /^## / { inside = ($0 == section); found = found || inside }
    !inside { next }
    /^ *```/ { block = ($0 ~ "```" want); blocks += block; continued = 0; next }
    !block || (want == "yaml" && blocks > 1) { next }
    want == "yaml" { print; next }
    {
        sub(/^ */, "")
        if (continued) printf " "
        else if (!/^(\$|node#) /) next
        # Goes on after a backslash, and in a loop until its end.
        continued = sub(/ *\\$/, "") || / do$/
        printf "%s%s", $0, continued ? "" : "\n"
    }
    END { exit !found }
' docs/kubernetes.md
