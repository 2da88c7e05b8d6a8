#!/usr/bin/env bash
# Renders the Helm chart's defaults as the plain manifests of deploy/kustomize/base: scripts/render-manifests.sh [DIRECTORY]
# The chart is the source; a test compares the two.
set -euo pipefail
cd "$(dirname "$0")/.."
base=${1:-deploy/kustomize/base}
PATH="${CARGO_TARGET_DIR:-$PWD/target}/tools/kubernetes:$PATH"
command -v helm >/dev/null || { echo "helm is missing: scripts/setup.sh test installs it" >&2; exit 1; }

rendered=$(mktemp -d)
trap 'rm -rf "$rendered"' EXIT
helm template ashlar deploy/charts/ashlar --namespace ashlar --output-dir "$rendered" >/dev/null

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
for file in "$rendered"/ashlar/templates/*.yaml; do
    name=$(basename "$file")
    # Helm is not who manages these.
    sed -e '/^# Source: /d' -e 's/managed-by: Helm$/managed-by: kustomize/' "$file" >"$base/$name"
    printf '  - %s\n' "$name" >>"$base/kustomization.yaml"
done
