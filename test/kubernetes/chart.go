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

// chartDirectory is where Mooring's chart is.
func chartDirectory(root string) string { return filepath.Join(root, "conf", "kubernetes", "chart") }

// Helm runs helm, which has no configuration of its own and no cluster.
func Helm(t netns.T, input string, args ...string) string {
	t.Helper()
	root, err := containerd.ModuleRoot()
	if err != nil {
		t.Fatalf("%v", err)
	}
	command := exec.Command(filepath.Join(buildPrograms(t, root, packages), "helm"), args...)
	command.Env = helmEnvironment(netns.Directory(t, "helm"))
	var out, complaint bytes.Buffer
	command.Stdin, command.Stdout, command.Stderr = strings.NewReader(input), &out, &complaint
	if err := command.Run(); err != nil {
		t.Fatalf("helm %s: %v: %s%s", strings.Join(args, " "), err, &out, &complaint)
	}
	return out.String()
}

// helmEnvironment keeps helm away from the files of whoever runs the tests.
func helmEnvironment(directory string) []string {
	return append(os.Environ(), "HELM_CACHE_HOME="+directory, "HELM_CONFIG_HOME="+directory, "HELM_DATA_HOME="+directory, "KUBECONFIG=/nonexistent")
}

// Chart renders Mooring's chart with values.
func Chart(t netns.T, values string) string {
	t.Helper()
	root, err := containerd.ModuleRoot()
	if err != nil {
		t.Fatalf("%v", err)
	}
	return Helm(t, values, "template", "mooring", chartDirectory(root), "--namespace", "kube-system", "--kube-version", Version, "--values", "-")
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
