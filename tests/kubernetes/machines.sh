# The control plane and the nodes. Sourced by run.sh, in namespaces of its own.

logs=$work/logs
rm -rf "$logs" "$work/etcd" "$work"/node-?.disk
mkdir -p "$logs" "$work/etcd"
export PATH="$target/tools/kubernetes:$PATH:$work/cluster" KUBECONFIG="$work/pki/admin.kubeconfig"
declare -A started

start() { # NAME COMMAND...
    local name=$1
    shift
    "$@" >"$logs/$name.log" 2>&1 </dev/null &
    started[$name]=$!
}
wait_for() { # SECONDS WHAT COMMAND...
    local limit=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$limit" ] || fail "$what is not there"
        sleep 1
    done
}
on_node() { # NAME COMMAND
    ssh -q -i "$work/pki/ssh" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ConnectTimeout=5 \
        -o ControlMaster=auto -o ControlPath="$logs/ssh-$1" -o ControlPersist=yes "root@10.20.0.1${1#node-}" "$2"
}

# Machine, disk and address of a node; a disk that is there already is kept.
start_machine() { # NAME
    ip link show "$1" >/dev/null 2>&1 || {
        ip tuntap add dev "$1" mode tap
        ip link set "$1" master nodes up
    }
    local mac=52:54:00:00:00:0${1#node-}
    case $what in
    node)
        qemu-img create -q -f qcow2 -b node.img -F raw "$work/$1.disk"
        start "$1" qemu-system-x86_64 -machine q35 -accel tcg,thread=multi -cpu max -smp 2 -m 4096 -nodefaults -display none \
            -no-reboot -serial "file:$logs/$1-console.log" -kernel "$work/vmlinuz" -initrd "$work/initrd" \
            -append "root=/dev/vda rootflags=discard rw console=ttyS0 quiet mitigations=off systemd.hostname=$1" \
            -drive "if=virtio,format=qcow2,file=$work/$1.disk,discard=unmap,detect-zeroes=unmap,cache=unsafe" \
            -netdev "tap,id=net,ifname=$1,script=no,downscript=no" -device "virtio-net-pci,netdev=net,mac=$mac" \
            -device virtio-rng-pci
        ;;
    cluster)
        start "$1" env TMPDIR=/dev/shm LD_PRELOAD="$work/whole-registers.so" linux.uml mem=2560M "ubd0=$work/$1.disk,$work/run.img" \
            root=/dev/ubda rw quiet con=null con0=null,fd:1 ssl=null "vec0:transport=tap,ifname=$1,depth=128,mac=$mac" \
            "systemd.hostname=$1" "uml_dir=$logs/uml"
        ;;
    esac
}
# As a power cut does.
kill_machine() { # NAME
    # Processes of User Mode Linux are children of it.
    pkill -KILL -P "${started[$1]}" || true
    kill -KILL "${started[$1]}"
    wait "${started[$1]}" || true
    ssh -q -o ControlPath="$logs/ssh-$1" -O exit node 2>/dev/null || true
    rm -f "$logs/ssh-$1"
}
answers_or_ended() { # NAME
    on_node "$1" true || ! kill -0 "${started[$1]}"
}
start_nodes() { # NAME...
    local name
    echo "kubernetes: starting $*" >&2
    for name in "$@"; do start_machine "$name"; done
    for name in "$@"; do
        wait_for 600 "$name" answers_or_ended "$name"
        kill -0 "${started[$name]}" 2>/dev/null || fail "the machine of $name ended: see $logs/$name.log"
        wait_for 600 "$name in Kubernetes" kubectl get node "$name"
    done
    kubectl wait --for=condition=Ready node "$@" --timeout=10m
}

start_control_plane() {
    local pki=$work/pki number part config more
    ip link set lo up
    ip link add nodes type bridge
    ip addr add 10.20.0.1/24 dev nodes
    ip link set nodes up
    for number in 1 2 3 4 5; do ip route add "10.21.$number.0/24" via "10.20.0.1$number"; done

    echo "kubernetes: starting the control plane" >&2
    start etcd etcd --data-dir "$work/etcd" --unsafe-no-fsync \
        --listen-client-urls http://127.0.0.1:12379 --advertise-client-urls http://127.0.0.1:12379 \
        --listen-peer-urls http://127.0.0.1:12380
    start apiserver "$work/programs/kube-apiserver" --etcd-servers=http://127.0.0.1:12379 --bind-address=10.20.0.1 \
        --advertise-address=10.20.0.1 --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" \
        --client-ca-file="$pki/ca.crt" --service-account-key-file="$pki/accounts.pub" \
        --service-account-signing-key-file="$pki/accounts.key" --service-account-issuer=https://kubernetes.default.svc \
        --kubelet-client-certificate="$pki/admin.crt" --kubelet-client-key="$pki/admin.key" \
        --kubelet-preferred-address-types=InternalIP --authorization-mode=Node,RBAC \
        --enable-admission-plugins=NodeRestriction --service-cluster-ip-range=10.96.0.0/16 --allow-privileged=true
    wait_for 120 "the API server" kubectl get --raw /readyz
    for part in controllers:controller-manager scheduler:scheduler; do
        config=$pki/${part%:*}.kubeconfig
        more=()
        [ "${part%:*}" = scheduler ] || more=(--use-service-account-credentials --root-ca-file="$pki/ca.crt"
            --service-account-private-key-file="$pki/accounts.key")
        start "${part#*:}" "$work/programs/kube-${part#*:}" --kubeconfig="$config" --authentication-kubeconfig="$config" \
            --authorization-kubeconfig="$config" --leader-elect=false --bind-address=127.0.0.1 "${more[@]}"
    done
    [ "$what" = node ] || start dns "$work/cluster/dns" -conf "$here/Corefile"
}
