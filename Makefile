# SPDX-License-Identifier: Apache-2.0
#
#   make test     everything, as CI runs it
#   make unit     seconds, without root or clang
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help build unit test test-root test-kernels lint generate clean

GO      ?= go
BIN     := bin
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GOFLAGS_BUILD := -trimpath -ldflags "-s -w -X main.version=$(VERSION)"

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

unit: ## pure tests: seconds, no root, no clang
	$(GO) vet ./...
	$(GO) test ./...

test-kernels: ## the root tests inside other kernels: KERNELS="6.1 newest" for some
	$(GO) test -tags root,kernels -count=1 -timeout 20m -v ./test/kernels

test-root: ## program, namespace and scenario levels on this kernel (root)
	$(GO) test -tags root -count=1 -timeout 20m ./...

lint: ## gofmt and go vet over every build tag
	@out=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$out" || { echo "gofmt: $$out"; exit 1; }
	$(GO) vet -tags root,kernels ./...

test: lint unit test-root test-kernels ## everything, as CI runs it

clean: ## what was built
	rm -rf $(BIN)

CLANG_PACKAGES := clang-19 llvm-19 libbpf-dev
generate: ## BPF objects and their Go side (needs Debian's clang-19)
	@command -v clang-19 >/dev/null && test -e /usr/include/bpf/bpf_helpers.h || apt-get install -y -qq $(CLANG_PACKAGES)
	$(GO) generate ./bpf
