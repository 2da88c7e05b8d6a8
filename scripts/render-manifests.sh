#!/usr/bin/env bash
# Renders the Helm chart as plain manifests: its defaults as base, and a cluster with an etcd as cluster, both below
# deploy/kustomize unless told otherwise: scripts/render-manifests.sh [DIRECTORY]
# The chart is the source; a test compares the two.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-deploy/kustomize}
PATH="${CARGO_TARGET_DIR:-$PWD/target}/tools/kubernetes:$PATH"
command -v helm >/dev/null || { echo "helm is missing: scripts/setup.sh test installs it" >&2; exit 1; }

rendered=$(mktemp -d)
trap 'rm -rf "$rendered"' EXIT

render() { # NAME [HELM_ARGUMENT...]
    local name=$1 base=$target/$1 file
    shift
    rm -rf "${rendered:?}/$name"
    helm template ashlar deploy/charts/ashlar --namespace ashlar --output-dir "$rendered/$name" "$@" >/dev/null
    mkdir -p "$base"
    rm -f "$base"/*.yaml
    cat >"$base/namespace.yaml" <<'EOF'
apiVersion: v1
kind: Namespace
metadata:
  name: ashlar
  labels:
    # The daemon uses directories of the node, and the node part of the driver is privileged.
    pod-security.kubernetes.io/enforce: privileged
EOF
    {
        printf '# Made by scripts/render-manifests.sh from the Helm chart: change the chart, or patch this in an overlay.\n'
        printf 'apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n'
        printf '  - namespace.yaml\n'
    } >"$base/kustomization.yaml"
    for file in "$rendered/$name"/ashlar/templates/*.yaml; do
        # Helm is not who manages these.
        sed -e '/^# Source: /d' -e 's/managed-by: Helm$/managed-by: kustomize/' "$file" >"$base/$(basename "$file")"
        printf '  - %s\n' "$(basename "$file")" >>"$base/kustomization.yaml"
    done
}

render base
render cluster --values deploy/charts/ashlar/ci/cluster-values.yaml
