# docs/kubernetes.md for one node. Sourced by run.sh.

section "What you need" yes
section "Choose the node" '.*node-1 .*' '.*labeled' "[^$break]*$break[^$break]*node-1 [^$break]*"
section "Install" '.*created' '.*labeled' '.*STATUS: deployed.*' skip "$rolled" "$rolled" "$rolled" 'State: +ready.*'
# The other way to install it, as far as the API server can judge.
kubectl apply -k deploy/kustomize/base --dry-run=server >"$logs/kustomize.log" 2>&1 || fail "see $logs/kustomize.log"
# Nothing of the driver may need a second start, and the scheduler has to know of the space.
restarts=$(kubectl -n ashlar get pods -o jsonpath='{.items[*].status.containerStatuses[*].restartCount}')
[[ $restarts =~ ^[0\ ]+$ ]] || fail "containers were started again: $restarts"
wait_for 120 "the space of the node" bash -c "kubectl -n ashlar get csistoragecapacities -o name | grep -q ."

section "A pod with data" \
    '.*created' '.*condition met' "$day" "NAME[^$break]*${break}pvc-[^$break]* 1 GiB [^$break]*" \
    '.*deleted.*' '.*created' '.*condition met' "$day$break$day" \
    '.*deleted.*' '.*condition met' "$day$break$day$break$day" \
    '.*patched' '.*condition met' '.* (1\.9|2\.0)G .*/data' '.*deleted.*'
# What the class promises.
wait_for 120 "the end of the volume" bash -c "[ -z \"\$(kubectl get pv -o name)\" ]"

# The example without commands of its own in the document.
kubectl apply -f deploy/examples/raw-block.yaml
kubectl wait --for=condition=Ready pod/disk --timeout=5m || fail "the raw block volume"
wait_for 60 "what was written to the raw block volume" bash -c "kubectl logs disk | grep -q '^written '"
kubectl delete -f deploy/examples/raw-block.yaml

# A pod that writes a line a second lives through the upgrade.
kubectl apply -f deploy/examples/pod.yaml
kubectl wait --for=condition=Ready pod/notes --timeout=5m || fail "a pod before the upgrade"
kubectl exec notes -- sh -c '(while sleep 1; do date >>/data/lines && sync || touch /data/failed; done) >/dev/null 2>&1 &'
section "Upgrade" '.*STATUS: deployed.*'
helm upgrade ashlar deploy/charts/ashlar --namespace ashlar --reset-then-reuse-values --set logFormat=text >/dev/null
for what in statefulset/ashlar-daemon daemonset/ashlar-csi-node deployment/ashlar-csi-controller; do
    kubectl -n ashlar rollout status "$what" --timeout=10m || fail "the upgrade of $what"
done
lines=$(kubectl exec notes -- sh -c 'wc -l </data/lines')
wait_for 120 "a line after the upgrade" bash -c "[ \"\$(kubectl exec notes -- sh -c 'wc -l </data/lines')\" -gt $lines ]"
kubectl exec notes -- test ! -e /data/failed || fail "a write failed during the upgrade"

# The document says what a drain does with a pod that nothing makes again.
kubectl delete pod notes
section "Drain, reboot, failure of the node" '.*drained'
kubectl uncordon node-1
wait_for 300 "the daemon after the drain" kubectl -n ashlar wait --for=condition=Ready pod/ashlar-daemon-0 --timeout=10s
section "Watch" "$any" "$any" "$any" skip skip
detached() { [ -z "$(kubectl get volumeattachments -o name)" ]; }
wait_for 300 "the end of attachments" detached
section "Remove" '' '.*uninstalled.*' '.*unlabeled' "$any" skip skip skip skip
kubectl get pvc notes >/dev/null || fail "the claim went with the chart"
kubectl label node node-1 ashlar.io/daemon=true
# And volumes are the same ones without the kernel's driver.
helm install ashlar deploy/charts/ashlar --namespace ashlar --set node.attach=fuse >/dev/null
kubectl apply -f deploy/examples/pod.yaml
kubectl wait --for=condition=Ready pod/notes --timeout=10m || fail "the claim after another installation"
kubectl exec notes -- test -s /data/lines || fail "the data after another installation"
kubectl exec notes -- grep -q '^/dev/loop.* /data ' /proc/mounts || fail "a loop device"
kubectl delete -f deploy/examples/pod.yaml
wait_for 120 "the end of the volume" bash -c "[ -z \"\$(kubectl get pv -o name)\" ]"
wait_for 120 "the end of attachments" detached
section "Remove" '' '.*uninstalled.*' '.*unlabeled' "$any" '' skip skip '.*deleted'
