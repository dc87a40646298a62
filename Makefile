# SPDX-License-Identifier: Apache-2.0
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

GO      ?= go
BIN     := bin
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# Static, so that the plugins run on any host's file system.
BUILD   := CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$(VERSION)"
SUDO    := $(if $(filter-out 0,$(shell id -u)),sudo,)
TAGS    := root,kernels
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ use

.PHONY: demo
demo: build ## a throw-away node with pods and a service, shown step by step (root)
	@CGO_ENABLED=0 $(GO) build -buildvcs=false -o .cache/demo/ ./test/demo github.com/containernetworking/cni/cnitool
	@$(SUDO) .cache/demo/demo --bin $(BIN) --cnitool .cache/demo/cnitool --manifests conf/examples

# What the daemon gets: RUN="--config FILE", or other flags.
RUN ?= --manifests conf/examples --pod-cidrs 10.244.0.0/24,fd00:10:244::/64
.PHONY: run
run: build ## the daemon on this machine itself, on conf/examples: RUN="--config FILE" for others (root)
	$(SUDO) $(BIN)/mooringd $(RUN)

.PHONY: build
build: ## all programs, static, into bin/
	@mkdir -p $(BIN)
	$(BUILD) -o $(BIN)/ ./plugins/... ./daemon/mooringd ./daemon/mooring

PREFIX       ?= /usr/local
CNI_BIN_DIR  ?= /opt/cni/bin
CNI_CONF_DIR ?= /etc/cni/net.d
CONF_DIR     ?= /etc/mooring
UNIT_DIR     ?= /etc/systemd/system
INSTALL = conf/install.sh
.PHONY: install uninstall
install: build ## programs, plugins and the CNI configuration onto this machine (DESTDIR, PREFIX, CNI_BIN_DIR, CNI_CONF_DIR)
	$(SUDO) $(INSTALL) install $(BIN) $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(CNI_BIN_DIR) $(DESTDIR)$(CNI_CONF_DIR) $(DESTDIR)$(CONF_DIR) $(DESTDIR)$(UNIT_DIR)

uninstall: ## take them away again; configuration and state of the daemon stay
	$(SUDO) $(INSTALL) uninstall $(BIN) $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(CNI_BIN_DIR) $(DESTDIR)$(CNI_CONF_DIR) $(DESTDIR)$(CONF_DIR) $(DESTDIR)$(UNIT_DIR)

##@ test

.PHONY: test
test: deps lint generate-check unit test-root test-kernels test-kubernetes ## what CI runs (root; installs what it needs with apt)

.PHONY: unit
unit: ## pure tests: seconds, no root, no clang
	$(GO) vet ./...
	$(GO) test ./...

# Real time, real kernels: a test that fails runs once more, which tells one that fails always from one that
# fails at times. The end of the output names either; the second is a bug as well.
GOTESTSUM = $(GO) tool -modfile=.ci/test/go.mod gotestsum --rerun-fails=1

# The levels up to a container runtime. What needs a cluster, or other kernels, has a target of its own.
ROOT_PACKAGES = $(shell $(GO) list -tags root ./... | grep -vE '/test/(kernels|kubernetes)$$')
.PHONY: test-root
test-root: need-root ## program, namespace and scenario levels, and containerd, on this kernel (root)
	$(GOTESTSUM) --format pkgname-and-test-fails --packages="$(ROOT_PACKAGES)" -- -tags root -count=1 -timeout 40m

.PHONY: test-kernels
test-kernels: ## the root tests inside other kernels: KERNELS="6.1 newest" for some
	$(GOTESTSUM) --format standard-verbose --rerun-fails-run-root-test --packages=./test/kernels -- -tags $(TAGS) -count=1 -timeout 40m

.PHONY: test-kubernetes
test-kubernetes: need-root ## clusters of two nodes: kubelets and control planes built from their modules (root)
	@.ci/deps
	$(GOTESTSUM) --format standard-verbose --rerun-fails-run-root-test --packages=./test/kubernetes -- -tags root -count=1 -timeout 60m

# FOCUS="..." for some of the specs, NODES=3 for one that wants three, PROXY=kube-proxy to compare with it.
.PHONY: conformance
conformance: need-root ## Kubernetes' own suite, what it has about services and networks, without kube-proxy (root; an hour)
	@.ci/deps debootstrap=debootstrap
	$(GO) test -tags root -count=1 -timeout 3h -v -run '^TestConformance$$' ./test/kubernetes -focus '$(or $(FOCUS),all)' \
		$(if $(NODES),-nodes $(NODES)) $(if $(PROXY),-proxy $(PROXY)) -results $(CURDIR)/conformance-$(or $(PROXY),mooring).txt

.PHONY: lint
lint: ## gofmt, go vet and golangci-lint over every build tag
	@out=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$out" || { echo "gofmt: $$out"; exit 1; }
	$(GO) vet -tags $(TAGS) ./...
	$(GO) tool -modfile=.ci/lint/go.mod golangci-lint run ./...

.PHONY: deps
deps: ## Debian packages that the tests need
	@.ci/deps

.PHONY: need-root
need-root:
	@test "$$(id -u)" = 0 || { echo "these tests make network namespaces: run them as root (sudo make $(MAKECMDGOALS))" >&2; exit 1; }

# Runs with nothing else on the machine: a busy one hides what is measured.
.PHONY: bench
bench: build need-root ## speed, as ratios within one run: ROWS="packet cni", ROUNDS=25; writes bench.json (root)
	@.ci/deps ip=iproute2 ss=iproute2 iptables=iptables nft=nftables
	@$(GO) test -tags root -c -o .cache/bench/bench ./test/bench
	@cd test/bench && MOORING_BIN=$(CURDIR)/$(BIN) ../../.cache/bench/bench -test.run '^TestEverySetIsMeasured$$' -test.timeout 2h \
		-full -output $(CURDIR)/bench.json $(if $(ROWS),-rows "$(ROWS)") $(if $(ROUNDS),-rounds $(ROUNDS))

##@ develop

CLANG_PACKAGES := clang-19=clang-19 llvm-strip-19=llvm-19 /usr/include/bpf/bpf_helpers.h=libbpf-dev
GENERATED = bpf/*_bpfel.go bpf/*_bpfel.o bpf/*_string.go bpf/testdata/abi.golden
.PHONY: generate
generate: ## BPF objects, their Go side and the golden layout (needs Debian's clang-19)
	@.ci/deps $(CLANG_PACKAGES)
	$(GO) generate ./bpf
	$(GO) test -vet=off ./bpf -count=1 -run '^TestSharedLayoutIsTheGoldenOne$$' -update

.PHONY: generate-check
generate-check: ## what is committed is what the sources make
	@before=$$(sha256sum $(GENERATED)) && $(MAKE) -s generate && diff <(echo "$$before") <(sha256sum $(GENERATED)) || \
		{ echo "generated files differ from their sources (> now): commit what make generate writes" >&2; exit 1; }

.PHONY: manifests
manifests: ## conf/kubernetes/*.yaml from the Helm chart beside them
	conf/kubernetes/render.sh conf/kubernetes

.PHONY: clean
clean: ## what was built
	rm -rf $(BIN) .cache/demo .cache/bench bench.json
