# The Prometheus operator, outside of the cluster, and the Prometheus that it describes. Sourced by follow-cluster.sh.

for file in "$work"/cluster/monitoring.coreos.com_*.yaml; do kubectl create -f "$file"; done
kubectl wait --for=condition=Established crd --all --timeout=2m
kubectl create namespace monitoring
kubectl apply -f - <<'END'
apiVersion: monitoring.coreos.com/v1
kind: Prometheus
metadata:
  name: test
  namespace: monitoring
spec:
  replicas: 0
  version: v2.42.0
  serviceMonitorSelector: {}
  serviceMonitorNamespaceSelector: {}
  ruleSelector: {}
  ruleNamespaceSelector: {}
END
start operator "$work/cluster/operator" --apiserver=https://10.20.0.1:6443 --ca-file="$work/pki/ca.crt" \
    --cert-file="$work/pki/admin.crt" --key-file="$work/pki/admin.key" --web.listen-address=127.0.0.1:18080

# Prometheus has what the operator made of the chart's monitors and rules.
watched() {
    local directory=$work/prometheus
    rm -rf "$directory"
    mkdir -p "$directory/rules"
    wait_for 300 "the operator's configuration" has_scrape_job
    wait_for 300 "the operator's rules" bash -c "kubectl -n monitoring get configmaps -o name | grep -q rulefiles"
    configuration >"$directory/operator.yaml"
    kubectl -n monitoring get configmap prometheus-test-rulefiles-0 -o go-template='{{range .data}}{{.}}{{"\n"}}{{end}}' \
        >"$directory/rules/ashlar.yaml"
    kubectl -n ashlar get services,endpoints --output=json | "$here/targets.py" >"$directory/targets.json"
    # The part of Kubernetes' discovery goes up to the next entry of the job.
    sed -e "s|/etc/prometheus/rules/[^/]*/|$directory/rules/|" -e 's/\$(SHARD)/0/' \
        -e "/^  kubernetes_sd_configs:/,/^  [a-z]/{/^  kubernetes_sd_configs:/{s|.*|  file_sd_configs:\n  - files: [$directory/targets.json]|;b};/^  [a-z]/!d}" \
        "$directory/operator.yaml" >"$directory/prometheus.yaml"
    start prometheus prometheus --config.file="$directory/prometheus.yaml" --storage.tsdb.path="$directory/data" \
        --web.listen-address=127.0.0.1:19090
    wait_for 300 "three daemons that are up" three_up
    curl -s http://127.0.0.1:19090/api/v1/rules | grep -q AshlarStorePoisoned || fail "the chart's alerts in Prometheus"
}
configuration() { kubectl -n monitoring get secret prometheus-test -o go-template='{{index .data "prometheus.yaml.gz" | base64decode}}' | gzip -d; }
has_scrape_job() { configuration | grep -q 'serviceMonitor/ashlar/ashlar-daemon/0'; }
three_up() {
    [ "$(curl -s http://127.0.0.1:19090/api/v1/targets | grep -o '"health":"up"' | wc -l)" = 3 ]
}
