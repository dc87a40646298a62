// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/mooring-cni/mooring/test/containerd"
	"github.com/mooring-cni/mooring/test/netns"
)

// Mooring's image, in versions that differ in nothing but their names.
const (
	mooringImage = "registry.example/mooring/mooring"
	firstVersion = "1"
	nextVersion  = "2"
)

// renderer builds the program that renders charts.
func renderer(t netns.T, root string) string {
	t.Helper()
	program := filepath.Join(cacheDirectory(root), "chart")
	command := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", program, ".")
	command.Dir = filepath.Join(root, "test", "kubernetes", "chart")
	command.Env = append(os.Environ(), "GOFLAGS=")
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("build what renders charts: %v\n%s", err, out)
	}
	return program
}

// Chart renders Mooring's Helm chart with values, as `helm template` does.
func Chart(t netns.T, values string) string {
	t.Helper()
	root, err := containerd.ModuleRoot()
	if err != nil {
		t.Fatalf("%v", err)
	}
	command := exec.Command(renderer(t, root), filepath.Join(root, "conf", "kubernetes", "chart"))
	var out, complaint bytes.Buffer
	command.Stdin, command.Stdout, command.Stderr = strings.NewReader(values), &out, &complaint
	if err := command.Run(); err != nil {
		t.Fatalf("render the chart: %v: %s", err, &complaint)
	}
	return out.String()
}

// values are the chart's for this cluster: the places of its nodes, and what a
// test wants besides.
func (c *Cluster) values(version string, port int, more string) string {
	return fmt.Sprintf(`
image: {repository: %q, tag: %q, pullPolicy: Never}
apiServer: {host: %q, port: %d}
cni: {binDir: %q, confDir: %q}
paths: {run: %q, state: %q, bpf: %q, cgroup: %q}
config: {devices: [%q]}
%s
`, mooringImage, version, netns.Router, port, c.Host("bin"), c.Host("net.d"), c.Host("run"), c.Host("state"), c.Host("bpf"), c.Host("cgroup"), netns.Uplink, more)
}
