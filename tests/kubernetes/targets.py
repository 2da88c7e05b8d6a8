#!/usr/bin/env python3
"""What Kubernetes' service discovery of Prometheus finds behind services, as a file of targets: services and endpoints, as
`kubectl get --output=json` has them, on standard input. Debian's Prometheus has no discovery of its own."""

import json
import re
import sys


def labels_of(kind, labels):
    named = {re.sub(r"\W", "_", name): value for name, value in labels.items()}
    found = {f"__meta_kubernetes_{kind}_label_{name}": value for name, value in named.items()}
    return found | {f"__meta_kubernetes_{kind}_labelpresent_{name}": "true" for name in named}


items = json.load(sys.stdin)["items"]
services = {item["metadata"]["name"]: item for item in items if item["kind"] == "Service"}
targets = []
for item in items:
    name = item["metadata"]["name"]
    if item["kind"] != "Endpoints" or name not in services:
        continue
    for subset in item.get("subsets", []):
        for address in subset.get("addresses", []):
            for port in subset.get("ports", []):
                target = address.get("targetRef", {})
                labels = {
                    "__meta_kubernetes_namespace": item["metadata"]["namespace"],
                    "__meta_kubernetes_service_name": name,
                    "__meta_kubernetes_endpoint_port_name": port.get("name", ""),
                    "__meta_kubernetes_endpoint_address_target_kind": target.get("kind", ""),
                    "__meta_kubernetes_endpoint_address_target_name": target.get("name", ""),
                    "__meta_kubernetes_pod_name": target.get("name", ""),
                }
                labels |= labels_of("service", services[name]["metadata"].get("labels", {}))
                targets.append({"targets": [f"{address['ip']}:{port['port']}"], "labels": labels})
json.dump(targets, sys.stdout)
