// SPDX-License-Identifier: Apache-2.0

// Package kubernetes runs a cluster of the real components on one machine: a
// control plane and nodes in network namespaces of their own, each node with a
// kubelet, a containerd and a mooringd, and no kube-proxy.
package kubernetes

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/mooring-cni/mooring/test/netns"
)

// Version is that of Kubernetes, as test/kubernetes/build/go.mod requires it.
const Version = "v1.37.2"

// The programs, by the package that each is built from. Whoever needs one has all built:
// one command for all is done sooner than one for some and another for the rest.
var packages = []program{
	{name: "kube-apiserver", path: "k8s.io/kubernetes/cmd/kube-apiserver"},
	{name: "kubelet", path: "k8s.io/kubernetes/cmd/kubelet"},
	{name: "kube-controller-manager", path: "k8s.io/kubernetes/cmd/kube-controller-manager"},
	{name: "kube-scheduler", path: "k8s.io/kubernetes/cmd/kube-scheduler"},
	{name: "kubectl", path: "k8s.io/kubernetes/cmd/kubectl"},
	{name: "etcd", path: "go.etcd.io/etcd/server/v3"},
	{name: "helm", path: "helm.sh/helm/v3/cmd/helm"},
}

// What the conformance tests need besides.
var conformancePackages = []program{
	{name: "e2e", path: "./e2e"},
	{name: "agnhost", path: "k8s.io/kubernetes/test/images/agnhost"},
	{name: "regression-issue-74839", path: "k8s.io/kubernetes/test/images/regression-issue-74839"},
	{name: "coredns", path: "./coredns"},
}

// kubeProxy is for comparison.
var kubeProxy = program{name: "kube-proxy", path: "k8s.io/kubernetes/cmd/kube-proxy"}

type program struct{ name, path string }

// cacheDirectory is where programs stay between runs.
func cacheDirectory(root string) string {
	if dir := os.Getenv("XDG_CACHE_HOME"); dir != "" {
		return filepath.Join(dir, "mooring", "kubernetes")
	}
	return filepath.Join(root, ".cache", "kubernetes")
}

// buildPrograms returns the directory of the cluster's programs. Those that the
// cache does not have are built: minutes on two processors.
func buildPrograms(t netns.T, root string, packages []program) string {
	t.Helper()
	dir := programsDirectory(t, root)
	missing := func() []program {
		return slices.DeleteFunc(slices.Clone(packages), func(p program) bool {
			_, err := os.Stat(filepath.Join(dir, p.name))
			return err == nil
		})
	}
	// Whose programs are there does not wait for who builds others.
	if len(missing()) == 0 {
		return dir
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
	if wanted := missing(); len(wanted) > 0 {
		build(t, root, dir, wanted)
	}
	return dir
}

// build makes programs by one go command, which compiles some while it links others,
// and puts them in place when all are made.
func build(t netns.T, root, dir string, programs []program) {
	t.Helper()
	start := time.Now()
	made := filepath.Join(dir, ".new")
	if err := errors.Join(os.RemoveAll(made), os.Mkdir(made, 0o755)); err != nil {
		t.Fatalf("build Kubernetes: %v", err)
	}
	const stamp = "k8s.io/component-base/version."
	minor := strings.Split(Version, ".")[1]
	link := fmt.Sprintf("-s -w -X %sgitVersion=%s -X %sgitMajor=1 -X %sgitMinor=%s", stamp, Version, stamp, stamp, minor)
	// Inlining is a quarter of the compiler's work, and these programs wait more than they compute.
	arguments := []string{"build", "-trimpath", "-buildvcs=false", "-gcflags=all=-dwarf=false -l", "-ldflags", link, "-o", made + "/"}
	var names []string
	for _, p := range programs {
		arguments, names = append(arguments, p.path), append(names, p.name)
	}
	command := exec.Command("go", arguments...)
	command.Dir = module(root)
	// The compiler spends a third of its time on collecting garbage otherwise.
	command.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOGC=400")
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", strings.Join(names, ", "), err, out)
	}
	for _, p := range programs {
		if err := os.Rename(filepath.Join(made, p.built()), filepath.Join(dir, p.name)); err != nil {
			t.Fatalf("build %s: %v", p.name, err)
		}
	}
	t.Logf("%s built in %v: %v of CPU", strings.Join(names, ", "), time.Since(start).Round(time.Second),
		(command.ProcessState.UserTime() + command.ProcessState.SystemTime()).Round(time.Second))
}

// built is the name that Go gives the program.
func (p program) built() string {
	name := path.Base(p.path)
	if strings.HasPrefix(name, "v") && len(name) == 2 { // of a module of this major version
		name = path.Base(path.Dir(p.path))
	}
	return name
}

// module is that whose go.mod has what the programs are made of.
func module(root string) string { return filepath.Join(root, "test", "kubernetes", "build") }

// programsDirectory is where the programs are, named after all that they are
// made of.
func programsDirectory(t netns.T, root string) string {
	t.Helper()
	sum := sha256.New()
	for _, file := range []string{"go.mod", "go.sum", "coredns/main.go", "e2e/main.go"} {
		content, err := os.ReadFile(filepath.Join(module(root), file))
		if err != nil {
			t.Fatalf("build Kubernetes: %v", err)
		}
		sum.Write(content)
	}
	version, err := exec.Command("go", "env", "GOVERSION", "GOARCH").Output()
	if err != nil {
		t.Fatalf("build Kubernetes: ask for Go's version: %v", err)
	}
	sum.Write(version)
	dir := filepath.Join(cacheDirectory(root), fmt.Sprintf("%s-%x", Version, sum.Sum(nil)[:6]))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatalf("build Kubernetes: %v", err)
	}
	return dir
}
