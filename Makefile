# Every target installs what it needs first (scripts/setup.sh), and installs nothing when nothing is missing.
SHELL := /bin/bash
CARGO ?= cargo
# A Rust toolchain that rustup has just installed is not on the PATH of this shell yet.
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/sbin:/sbin
export CARGO_TARGET_DIR ?= $(CURDIR)/target

# Where `make run` keeps its data.
DATA ?= ./data
# More arguments for ashlard (`make run`), the benchmark (`make bench`) or cargo test (`make test`).
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help build demo demo-cluster run test test-kubernetes test-kubernetes-cluster check fix bench bench-cluster

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-23s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## ashlard, ashlar and ashlar-csi, into target/release
	@scripts/setup.sh build
	$(CARGO) build --release --locked -p ashlar-server -p ashlar-csi

demo: ## a volume, an ext4 image in it, kill -9, restart, verify: shows that it works here
	@scripts/setup.sh build demo
	$(CARGO) build --release --locked -p ashlar-server
	@scripts/demo.sh

demo-cluster: ## three nodes, a volume with a copy on each, one node killed under load and back: shows that nothing is lost
	@scripts/setup.sh build demo-cluster
	$(CARGO) build --release --locked -p ashlar-server
	@scripts/demo-cluster.sh

run: ## a daemon that stays; data in ./data (DATA=DIR changes that, ARGS= adds flags)
	@scripts/setup.sh build
	$(CARGO) build --release --locked -p ashlar-server
	@scripts/run.sh "$(DATA)" $(ARGS)

test: ## every test
	@scripts/setup.sh build test
	@scripts/test.sh $(ARGS)

test-kubernetes: ## docs/kubernetes.md followed in a real Kubernetes of one node; as root; an hour and 10 GiB of disk the first time
	@scripts/setup.sh build kubernetes
	$(CARGO) build --release --locked -p ashlar-server -p ashlar-csi
	@tests/kubernetes/run.sh

test-kubernetes-cluster: ## the same for several nodes, FlexVolume and the Prometheus operator; as root; 16 GiB of memory
	@scripts/setup.sh build kubernetes-cluster
	$(CARGO) build --release --locked -p ashlar-server -p ashlar-csi
	@tests/kubernetes/run.sh cluster

check: ## format, lints, docs, audit, tidy; changes nothing
	@scripts/setup.sh build check
	@scripts/check.sh

fix: ## formats and applies the lints' own fixes; the only target that changes files
	@scripts/setup.sh build check
	$(CARGO) clippy --release --locked --workspace --all-targets --fix --allow-dirty --allow-staged
	$(CARGO) fmt --all

bench: ## side by side with other NBD servers, results in bench/results (ARGS='--quick' for a short one)
	@scripts/setup.sh build bench
	$(CARGO) build --release --locked -p ashlar-server -p ashlar-bench
	@"$(CARGO_TARGET_DIR)/release/ashlar-bench" $(ARGS)

bench-cluster: ## three nodes with three copies side by side with Ceph, results in bench/results (ARGS='--quick' for a short one)
	@scripts/setup.sh build bench-cluster
	@scripts/setup.sh ceph || echo "bench-cluster: going on without Ceph" >&2
	$(CARGO) build --release --locked -p ashlar-server -p ashlar-bench
	@"$(CARGO_TARGET_DIR)/release/ashlar-bench" cluster $(ARGS)
