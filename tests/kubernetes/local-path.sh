# What a driver of local volumes would have made: a class, and a volume on each node. Sourced by follow-cluster.sh.
kubectl apply -f - <<END
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata:
  name: local-path
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: WaitForFirstConsumer
END
local_volume() { # NODE
    kubectl apply -f - <<END
apiVersion: v1
kind: PersistentVolume
metadata:
  name: etcd-$1
spec:
  storageClassName: local-path
  capacity:
    storage: 2Gi
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  local:
    path: /var/lib/local-path/etcd
  nodeAffinity:
    required:
      nodeSelectorTerms:
        - matchExpressions:
            - key: kubernetes.io/hostname
              operator: In
              values: [$1]
END
}
for name in node-1 node-2 node-3; do local_volume "$name"; done
