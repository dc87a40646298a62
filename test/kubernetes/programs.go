// SPDX-License-Identifier: Apache-2.0

// Package kubernetes runs a cluster of the real components on one machine: a
// control plane and nodes in network namespaces of their own, each node with a
// kubelet, a containerd and a mooringd, and no kube-proxy.
package kubernetes

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/mooring-cni/mooring/test/netns"
)

// Version is that of Kubernetes, as test/kubernetes/build/go.mod requires it.
const Version = "v1.37.2"

// The programs, by the package that each is built from. The API server comes
// first: it contains most of what the others are made of.
var packages = []program{
	{name: "kube-apiserver", path: "k8s.io/kubernetes/cmd/kube-apiserver"},
	{name: "kubelet", path: "k8s.io/kubernetes/cmd/kubelet"},
	{name: "kube-controller-manager", path: "k8s.io/kubernetes/cmd/kube-controller-manager"},
	{name: "kube-scheduler", path: "k8s.io/kubernetes/cmd/kube-scheduler"},
	{name: "kubectl", path: "k8s.io/kubernetes/cmd/kubectl"},
	{name: "etcd", path: "go.etcd.io/etcd/server/v3"},
}

// What the conformance tests need besides. kube-proxy is for comparison.
var conformancePackages = []program{
	{name: "e2e.test", path: "k8s.io/kubernetes/test/e2e", test: true},
	{name: "agnhost", path: "k8s.io/kubernetes/test/images/agnhost"},
	{name: "regression-issue-74839", path: "k8s.io/kubernetes/test/images/regression-issue-74839"},
	{name: "coredns", path: ".", module: "coredns"},
	{name: "kube-proxy", path: "k8s.io/kubernetes/cmd/kube-proxy"},
}

type program struct {
	name, path string
	module     string // below that of Kubernetes
	test       bool   // a test binary
}

// cacheDirectory is where programs stay between runs.
func cacheDirectory(root string) string {
	if dir := os.Getenv("XDG_CACHE_HOME"); dir != "" {
		return filepath.Join(dir, "mooring", "kubernetes")
	}
	return filepath.Join(root, ".cache", "kubernetes")
}

// buildPrograms returns the directory of the cluster's programs. Those that the
// cache does not have are built: some ten minutes on two processors.
func buildPrograms(t netns.T, root string, packages []program) string {
	t.Helper()
	module := filepath.Join(root, "test", "kubernetes", "build")
	dir, err := programsDirectory(root, module)
	if err != nil {
		t.Fatalf("build Kubernetes: %v", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatalf("build Kubernetes: %v", err)
	}
	// Two test processes do not build the same.
	lock, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		t.Fatalf("build Kubernetes: %v", err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatalf("build Kubernetes: lock %s: %v", lock.Name(), err)
	}
	const stamp = "k8s.io/component-base/version."
	minor := strings.Split(Version, ".")[1]
	flags := fmt.Sprintf("-s -w -X %sgitVersion=%s -X %sgitMajor=1 -X %sgitMinor=%s", stamp, Version, stamp, stamp, minor)
	for _, p := range packages {
		path := filepath.Join(dir, p.name)
		if _, err := os.Stat(path); err == nil {
			continue
		}
		start := time.Now()
		how := []string{"build"}
		if p.test {
			how = []string{"test", "-c", "-vet=off"} // vet would look at all that it imports
		}
		command := exec.Command("go", append(how, "-trimpath", "-buildvcs=false", "-ldflags", flags, "-o", path+".new", p.path)...)
		command.Dir = filepath.Join(module, p.module)
		command.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		if out, err := command.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", p.name, err, out)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatalf("build %s: %v", p.name, err)
		}
		t.Logf("%s built in %v", p.name, time.Since(start).Round(time.Second))
	}
	return dir
}

// programsDirectory is named after all that the programs are made of.
func programsDirectory(root, module string) (string, error) {
	sum := sha256.New()
	for _, file := range []string{"go.mod", "go.sum"} {
		content, err := os.ReadFile(filepath.Join(module, file))
		if err != nil {
			return "", err
		}
		sum.Write(content)
	}
	version, err := exec.Command("go", "env", "GOVERSION", "GOARCH").Output()
	if err != nil {
		return "", fmt.Errorf("ask for Go's version: %w", err)
	}
	sum.Write(version)
	return filepath.Join(cacheDirectory(root), fmt.Sprintf("%s-%x", Version, sum.Sum(nil)[:6])), nil
}
