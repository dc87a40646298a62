// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"bytes"
	"fmt"
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

// Chart renders Mooring's Helm chart with values, as `helm template` does.
func Chart(t netns.T, values string) string {
	t.Helper()
	root, err := containerd.ModuleRoot()
	if err != nil {
		t.Fatalf("%v", err)
	}
	program := filepath.Join(buildPrograms(t, root, []program{chart}), chart.name)
	command := exec.Command(program, filepath.Join(root, "conf", "kubernetes", "chart"))
	var out, complaint bytes.Buffer
	command.Stdin, command.Stdout, command.Stderr = strings.NewReader(values), &out, &complaint
	if err := command.Run(); err != nil {
		t.Fatalf("render the chart: %v: %s", err, &complaint)
	}
	return out.String()
}

// apiHost is how the plain manifests name the API server's address.
const apiHost = "api.example.internal"

// values are the chart's for this cluster: the places of its nodes, keys of the
// daemon's configuration, and what a test wants besides.
func (c *Cluster) values(version, host string, port int, config, more string) string {
	return fmt.Sprintf(`
image: {repository: %q, tag: %q, pullPolicy: Never}
apiServer: {host: %q, port: %d}
cni: {binDir: %q, confDir: %q, versions: ["1.0.0", "1.1.0"]}
paths: {run: %q, state: %q, bpf: %q, cgroup: %q}
config: {devices: [%q], %s}
%s
`, mooringImage, version, host, port, c.Host("bin"), c.Host("net.d"), c.Host("run"), c.Host("state"), c.Host("bpf"), c.Host("cgroup"), netns.Uplink, config, more)
}
