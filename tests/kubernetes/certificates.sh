#!/usr/bin/env bash
# An authority and what it says of each part of the Kubernetes: tests/kubernetes/certificates.sh DIRECTORY
set -euo pipefail
cd "$1"

certificate() { # NAME SUBJECT [ALTERNATIVE_NAMES]
    openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj "$2" -CA ca.crt -CAkey ca.key \
        ${3:+-addext "subjectAltName=$3"} -addext "basicConstraints=critical,CA:FALSE" \
        -addext "extendedKeyUsage=serverAuth,clientAuth" -keyout "$1.key" -out "$1.crt" 2>/dev/null
}

user() { # NAME SUBJECT
    certificate "$1" "$2"
    cat >"$1.kubeconfig" <<END
apiVersion: v1
kind: Config
clusters:
  - name: test
    cluster:
      server: https://10.20.0.1:6443
      certificate-authority-data: $(base64 -w 0 ca.crt)
users:
  - name: $1
    user:
      client-certificate-data: $(base64 -w 0 "$1.crt")
      client-key-data: $(base64 -w 0 "$1.key")
contexts:
  - name: test
    context:
      cluster: test
      user: $1
current-context: test
END
}

openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj /CN=test-ca -keyout ca.key -out ca.crt 2>/dev/null
openssl genrsa -out accounts.key 2048 2>/dev/null
openssl rsa -in accounts.key -pubout -out accounts.pub 2>/dev/null
rm -f ssh ssh.pub
ssh-keygen -q -t ed25519 -N "" -f ssh
certificate apiserver /CN=kube-apiserver \
    "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,IP:10.20.0.1,IP:10.96.0.1"
user admin /O=system:masters/CN=admin
user controllers /CN=system:kube-controller-manager
user scheduler /CN=system:kube-scheduler
for number in 1 2 3 4 5; do user "node-$number" "/O=system:nodes/CN=system:node:node-$number"; done
user proxy /CN=system:kube-proxy
