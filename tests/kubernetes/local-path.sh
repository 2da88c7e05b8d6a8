# What a driver of local volumes would have made: a class, and a volume on each of three nodes. Sourced by follow-cluster.sh.
{
    cat <<END
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata:
  name: local-path
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: WaitForFirstConsumer
END
    for name in node-1 node-2 node-3; do
        cat <<END
---
apiVersion: v1
kind: PersistentVolume
metadata:
  name: etcd-$name
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
              values: [$name]
END
    done
} | kubectl apply -f -
