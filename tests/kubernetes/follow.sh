# Runs the commands of docs/kubernetes.md, section by section, and looks at what they print. Sourced by run.sh, with `on_node`
# for the commands of the node.

fail() {
    echo "kubernetes: $*" >&2
    {
        kubectl get pods -A -o wide
        kubectl get events -A --sort-by=.lastTimestamp | tail -n 30
        for pod in $(kubectl -n ashlar get pods -o name); do
            echo "== $pod"
            kubectl -n ashlar logs "$pod" --all-containers --prefix --tail=20
        done
    } >"$logs/state" 2>&1 || true
    echo "kubernetes: what was there is in $logs/state" >&2
    echo "0 passed, 1 failed"
    exit 1
}

checked=0
# section NAME EXPECTED...: one for each command, an extended regular expression that its output has to match as a whole, without
# its last line break; `skip` leaves the command out.
section() {
    local name=$1 line command output status expected
    shift
    while IFS= read -r line; do
        [ "$#" -gt 0 ] || fail "'$name' of the document has a command that nothing is expected of: $line"
        expected=$1
        shift
        [ "$expected" != skip ] || continue
        command=${line#* }
        command=${command//NODE/node-1}
        echo "$line" >&2
        status=0
        case $line in
        'node# '*) output=$(on_node "$command" 2>&1 </dev/null) || status=$? ;;
        *) output=$(bash -c "$command" 2>&1 </dev/null) || status=$? ;;
        esac
        printf '%s\n' "$output" | sed 's/^/    /' >&2
        [ "$status" = 0 ] || fail "'$line' ended with $status"
        [[ $output =~ ^($expected)$ ]] || fail "'$line' printed that, and not $expected"
        checked=$((checked + 1))
    done < <("$here/document.sh" "$name")
    [ "$#" = 0 ] || fail "'$name' of the document has fewer commands than were expected"
}

any='.*'
day='[A-Z][a-z]+ [A-Z][a-z]+ +[0-9]+ [0-9:]+ UTC [0-9]+'
break=$'\n'
rolled='.*(successfully rolled out|rolling update complete|roll out complete).*'

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
section "Remove" '' '.*uninstalled.*' '.*unlabeled' skip skip skip skip
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
section "Remove" '' '.*uninstalled.*' '.*unlabeled' '' skip skip '.*deleted'

echo "$checked passed, 0 failed"
exit 0
