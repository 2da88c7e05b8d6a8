# docs/kubernetes.md for several nodes, FlexVolume and the Prometheus operator. Sourced by run.sh.

ashlar() { kubectl -n ashlar exec ashlar-daemon-0 -- ashlar "$@"; }
daemons_ready() { kubectl -n ashlar wait --for=condition=Ready pod --selector app.kubernetes.io/component=daemon --timeout=10s; }
in_sync() { daemons_ready && ! ashlar status | grep -q "copies"; }
node_of() { kubectl "$@" -o jsonpath='{.spec.nodeName}'; }
detached() { [ -z "$(kubectl get volumeattachments -o name)" ]; }
no_volumes() { ! kubectl get pv -o name | grep -q pvc-; }
lines() { # NUMBER: so many starts of the example's pod are in its file
    local starts
    starts=$(kubectl exec notes -- cat /data/starts)
    [[ $starts =~ ^$day($break$day){$(($1 - 1))}$ ]] || fail "not $1 starts but $starts"
}

source "$here/local-path.sh"
node="node-1 node-2 node-3"
section "Choose the node" '.*node-3 .*' "(node/node-. labeled$break?){3}" "[^$break]*($break[^$break]*node-. [^$break]*){3}"
section "Install" '.*created' '.*labeled' skip skip skip skip skip skip

# Without Helm, as far as the API server can judge.
section "Several nodes" skip skip skip "$any" "$any" '.*created' skip skip skip skip skip skip skip skip
openssl verify -CAfile "$work/desk/ca.crt" "$work/desk/tls.crt" || fail "the certificates made by hand"
kubectl apply -k deploy/kustomize/cluster --dry-run=server >"$logs/kustomize.log" 2>&1 || fail "see $logs/kustomize.log"
kubectl -n ashlar delete secret ashlar-etcd-tls

# With small stores: their zeros take room on the disk of the machine that runs this.
"$here/document.sh" "Several nodes" yaml | sed "s/^daemon:/&\n  data: {storeSize: 3GiB}/" >"$work/desk/several.yaml"
ready="(pod/ashlar-daemon-. condition met$break?)"
section "Several nodes" '.*STATUS: deployed.*' "$ready{3}" "$any" skip skip skip skip skip skip skip skip skip skip skip
# That of the StatefulSet is for one daemon.
section "Install" skip skip skip skip skip "$rolled" "$rolled" 'State: +ready.*'
wait_for 300 "the job of the tokens" kubectl -n ashlar wait --for=condition=Complete job --all --timeout=10s
restarts=$(kubectl -n ashlar get pods --selector app.kubernetes.io/component!=etcd \
    -o jsonpath='{.items[*].status.containerStatuses[*].restartCount}')
[[ $restarts =~ ^[0\ ]+$ ]] || fail "containers were started again: $restarts"

section "Several nodes" skip skip skip skip skip skip skip '' '' '.*deleted.*' '' '' '.*napshot saved.*' ''
wait_for 300 "the daemons" daemons_ready

# A volume with three copies, and the pod on another node.
kubectl apply -f deploy/examples/pod.yaml
kubectl wait --for=condition=Ready pod/notes --timeout=10m || fail "a pod with a volume of three copies"
lines 1
first=$(node_of get pod notes)
kubectl cordon "$first"
kubectl delete pod notes
kubectl apply -f deploy/examples/pod.yaml
kubectl wait --for=condition=Ready pod/notes --timeout=10m || fail "the pod on another node"
[ "$(node_of get pod notes)" != "$first" ] || fail "the pod is on the cordoned node"
lines 2
kubectl uncordon "$first"

# A new version: nothing of the daemons is replaced by the upgrade, then one after the other, while a pod writes.
kubectl exec notes -- sh -c '(while sleep 1; do date >>/data/lines && sync || touch /data/failed; done) >/dev/null 2>&1 &'
uids() { kubectl -n ashlar get pods --selector app.kubernetes.io/component=daemon -o jsonpath='{.items[*].metadata.uid}'; }
before=$(uids)
section "Upgrade" '.*STATUS: deployed.*'
helm upgrade ashlar deploy/charts/ashlar --namespace ashlar --reset-then-reuse-values --set logFormat=text >/dev/null
kubectl -n ashlar rollout status daemonset/ashlar-csi-node --timeout=10m || fail "the upgrade of the node part"
[ "$(uids)" = "$before" ] || fail "the upgrade replaced a daemon of the cluster"
in_text "kubectl -n ashlar delete pod ashlar-daemon-2" '.*deleted.*'
wait_for 600 "copies in sync after the first daemon" in_sync
for pod in ashlar-daemon-1 ashlar-daemon-0; do
    kubectl -n ashlar delete pod "$pod"
    wait_for 600 "copies in sync after $pod" in_sync
done
count=$(kubectl exec notes -- sh -c 'wc -l </data/lines')
wait_for 120 "a line after the upgrade" bash -c "[ \"\$(kubectl exec notes -- sh -c 'wc -l </data/lines')\" -gt $count ]"
kubectl exec notes -- test ! -e /data/failed || fail "a write failed during the upgrade"

# Drains, one at a time.
node=$(node_of get pod notes)
kubectl delete pod notes
section "Drain, reboot, failure of the node" '.*drained'
wait_for 600 "copies in sync on the cordoned node" in_sync
kubectl uncordon "$node"
wait_for 600 "etcd after the drain" kubectl -n ashlar rollout status statefulset/ashlar-etcd --timeout=10s

# Metrics, by the operator and by a Prometheus that it configures.
source "$here/prometheus.sh"
section "Watch" "$any" "$any" "$any" skip '.*STATUS: deployed.*'
watched

# Pods that name a volume without the CSI driver.
helm upgrade ashlar deploy/charts/ashlar --namespace ashlar --reset-then-reuse-values --set flexVolume.enabled=true >/dev/null
grep -qF -- '`--set flexVolume.enabled=true`' docs/kubernetes.md || fail "the document has FlexVolume otherwise"
kubectl -n ashlar rollout status daemonset/ashlar-flexvolume --timeout=10m || fail "the DaemonSet of FlexVolume"
ashlar volume create flex --size 1GiB
flex_pod() { # NODE
    kubectl apply -f - <<END
apiVersion: v1
kind: Pod
metadata:
  name: flex
spec:
  nodeName: $1
  terminationGracePeriodSeconds: 5
  containers:
    - name: flex
      image: docker.io/library/busybox:1.37
      command: [sh, -c, "date >>/data/starts && sync && touch /tmp/written && sleep infinity"]
      readinessProbe: {exec: {command: [test, -e, /tmp/written]}, periodSeconds: 1}
      volumeMounts:
        - {name: data, mountPath: /data}
  volumes:
    - name: data
      flexVolume:
        driver: ashlar.io/ashlar
        fsType: ext4
        options: {volume: flex, mountOptions: noatime}
END
    kubectl wait --for=condition=Ready pod/flex --timeout=10m || fail "a pod with FlexVolume on $1"
}
flex_pod node-1
kubectl exec flex -- grep -q '^/dev/nbd.* /data ext4 .*noatime' /proc/mounts || fail "a mounted device of FlexVolume"
kubectl delete pod flex
flex_pod node-2
starts=$(kubectl exec flex -- cat /data/starts)
[ "$(wc -l <<<"$starts")" = 2 ] || fail "the data of FlexVolume on another node: $starts"
kubectl delete pod flex
wait_for 120 "the end of the volume of FlexVolume" ashlar volume delete flex --yes
helm upgrade ashlar deploy/charts/ashlar --namespace ashlar --reset-then-reuse-values --set flexVolume.enabled=false >/dev/null

# Another node.
start_nodes node-4
helm upgrade ashlar deploy/charts/ashlar --namespace ashlar --reset-then-reuse-values --set daemon.replicas=4 >/dev/null
kubectl label node node-4 ashlar.io/daemon=true
wait_for 900 "the fourth daemon" daemons_ready
ashlar node list

# A node dies under a pod, and with it a daemon and a member of etcd. The pod starts elsewhere with its data.
first=$(node_of -n ashlar get pod ashlar-daemon-0)
kubectl cordon node-4
kubectl apply -f - <<END
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: diary
spec:
  storageClassName: ashlar
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 1Gi}}
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: diary
spec:
  serviceName: diary
  selector: {matchLabels: {app: diary}}
  template:
    metadata:
      labels: {app: diary}
    spec:
      affinity:
        nodeAffinity:
          requiredDuringSchedulingIgnoredDuringExecution:
            nodeSelectorTerms:
              - matchExpressions:
                  - {key: kubernetes.io/hostname, operator: NotIn, values: [$first]}
      terminationGracePeriodSeconds: 5
      containers:
        - name: diary
          image: docker.io/library/busybox:1.37
          command: [sh, -c, "date >>/data/starts && sync && touch /tmp/written && sleep infinity"]
          readinessProbe: {exec: {command: [test, -e, /tmp/written]}, periodSeconds: 1}
          volumeMounts:
            - {name: data, mountPath: /data}
      volumes:
        - name: data
          persistentVolumeClaim: {claimName: diary}
END
kubectl rollout status statefulset/diary --timeout=10m || fail "a pod of a StatefulSet"
kubectl uncordon node-4
lost=$(node_of get pod diary-0)
of_lost() { kubectl -n ashlar get pods --field-selector "spec.nodeName=$lost" -o name | grep "$1" | head -n 1; }
member=$(of_lost ashlar-etcd)
member=${member#pod/}
kill_machine "$lost"
wait_for 300 "the end of $lost in Kubernetes" kubectl wait --for=condition=Ready=Unknown "node/$lost" --timeout=10s
grep -qF '`node.kubernetes.io/out-of-service`' docs/kubernetes.md || fail "the document has another taint"
kubectl taint node "$lost" node.kubernetes.io/out-of-service=nodeshutdown:NoExecute
elsewhere() { [ "$(node_of get pod diary-0)" != "$lost" ] && kubectl wait --for=condition=Ready pod/diary-0 --timeout=10s; }
wait_for 900 "the pod of the lost node on another" elsewhere
starts=$(kubectl exec diary-0 -- cat /data/starts)
[ "$(wc -l <<<"$starts")" = 2 ] || fail "the data of the lost node's pod: $starts"

# Another machine in its place, and a member of etcd there.
start_nodes node-5
kubectl label node node-5 ashlar.io/daemon=true
kubectl label node "$lost" ashlar.io/daemon-
kubectl delete node "$lost"
section "Upgrade" '.*STATUS: deployed.*'
wait_for 900 "the daemon in the place of the lost one" daemons_ready
ashlar node list

local_volume node-5
helm upgrade ashlar deploy/charts/ashlar --namespace ashlar --reset-then-reuse-values --set etcd.initialClusterState=existing >/dev/null
grep -qF '`--set etcd.initialClusterState=existing`' docs/kubernetes.md || fail "the document has another value for a lost member of etcd"
other=ashlar-etcd-0
[ "$member" != "$other" ] || other=ashlar-etcd-1
# The members are started anew one after the other: until then nobody answers, and the port is closed again.
of_etcd() { # ARGUMENTS: of etcdctl; what it prints is `output`
    desk "rm -f port-forward.log; kubectl -n ashlar port-forward pod/$other 2379 >port-forward.log 2>&1 &"
    wait_for 120 "the port of etcd" grep -qE 'Forwarding|rror' "$work/desk/port-forward.log"
    at_desk "etcdctl --endpoints https://127.0.0.1:2379 --cacert ca.crt --cert tls.crt --key tls.key $*"
    local ended=$status told=$output
    at_desk 'kill %%; wait'
    output=$told
    return "$ended"
}
wait_for 600 "what etcd says of its members" of_etcd member list
id=$(awk -F', ' -v name="$member" '$3 == name { print $1 }' <<<"$output")
[ -n "$id" ] || fail "etcd does not list $member: $output"
wait_for 120 "etcd without $member" of_etcd member remove "$id"
wait_for 120 "a new member of etcd" of_etcd member add "$member" "--peer-urls=https://$member.ashlar-etcd.ashlar.svc:2380"
kubectl -n ashlar delete pvc "data-$member" --wait=false
kubectl -n ashlar delete pod "$member"
wait_for 900 "the member of etcd in the place of the lost one" kubectl -n ashlar rollout status statefulset/ashlar-etcd --timeout=10s
wait_for 300 "the daemons with it" daemons_ready

# All of it is removed, the data too.
kubectl delete statefulset diary
kubectl delete pvc diary notes
wait_for 300 "the end of the volumes" no_volumes
wait_for 300 "the end of attachments" detached
nodes=()
for name in node-1 node-2 node-3 node-4 node-5; do [ "$name" = "$lost" ] || nodes+=("$name"); done
node=${nodes[*]} shell_node=${nodes[0]}
section "Remove" '' '.*uninstalled.*' "(node/node-. unlabeled$break?){4}" "$any" '' '.*deleted.*' '.*deleted.*' '.*deleted.*'
for name in "${nodes[@]}"; do
    on_node "$name" "rm -rf /var/lib/ashlar /var/lib/ashlar-csi /run/ashlar /var/lib/kubelet/plugins/csi.ashlar.io /var/lib/local-path/etcd/*"
    kubectl delete pv "etcd-$name" --ignore-not-found
    [ "$name" = node-4 ] || local_volume "$name"
done

# And one daemon with a volume becomes a cluster, under a pod that writes.
node=${nodes[0]}
section "Choose the node" skip '.*labeled' skip
section "Install" '.*created' '.*labeled' skip skip skip skip skip skip
helm install ashlar deploy/charts/ashlar --namespace ashlar --set daemon.data.storeSize=3GiB >/dev/null
kubectl apply -f deploy/examples/pod.yaml
kubectl wait --for=condition=Ready pod/notes --timeout=10m || fail "a pod with the volume of one daemon"
kubectl exec notes -- sh -c '(while sleep 1; do date >>/data/lines && sync || touch /data/failed; done) >/dev/null 2>&1 &'
in_text "kubectl delete storageclass ashlar" '.*deleted.*'
helm upgrade ashlar deploy/charts/ashlar --namespace ashlar --values "$work/desk/several.yaml" --set daemon.replicas=1 >/dev/null
wait_for 600 "etcd" kubectl -n ashlar rollout status statefulset/ashlar-etcd --timeout=10s
kubectl -n ashlar delete pod ashlar-daemon-0
wait_for 600 "the daemon as a cluster of one" daemons_ready
ashlar volume list
count=$(kubectl exec notes -- sh -c 'wc -l </data/lines')
wait_for 300 "a line after it became a cluster" bash -c "[ \"\$(kubectl exec notes -- sh -c 'wc -l </data/lines')\" -gt $count ]"
kubectl exec notes -- test ! -e /data/failed || fail "a write failed while one daemon became a cluster"
kubectl label node "${nodes[1]}" "${nodes[2]}" ashlar.io/daemon=true
helm upgrade ashlar deploy/charts/ashlar --namespace ashlar --values "$work/desk/several.yaml" >/dev/null
three_daemons() { [ "$(kubectl -n ashlar get statefulset ashlar-daemon -o jsonpath='{.status.readyReplicas}')" = 3 ]; }
wait_for 900 "three daemons" three_daemons
ashlar node list
kubectl apply -f deploy/examples/statefulset.yaml --dry-run=server >/dev/null
wait_for 120 "a volume on all three" ashlar volume create three --size 64MiB --replicas 3
