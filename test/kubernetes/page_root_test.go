// SPDX-License-Identifier: Apache-2.0

//go:build root

package kubernetes

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/mooring-cni/mooring/test/containerd"
)

// notHere are the page's commands that the test's cluster has no use for.
var notHere = []string{
	"kubectl -n kube-system delete daemonset/kube-proxy configmap/kube-proxy", // it never had them
	"kube-proxy --cleanup",
	// helm is not built here; the chart is what the manifests are rendered from.
	"helm install mooring conf/kubernetes/chart --namespace kube-system --set apiServer.host=192.0.2.1",
	"helm upgrade mooring conf/kubernetes/chart --namespace kube-system --reuse-values --set uninstall=true",
	"helm uninstall mooring --namespace kube-system",
}

// page is docs/kubernetes.md, whose commands are run as they stand there, in
// their order, in a directory that has the manifests rendered for this cluster.
type page struct {
	cluster  *Cluster
	dir      string
	commands []string // that are to come
}

func (c *Cluster) openPage(t *testing.T, manifests map[string]string) *page {
	t.Helper()
	root, err := containerd.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "docs", "kubernetes.md"))
	if err != nil {
		t.Fatal(err)
	}
	p := &page{cluster: c, dir: t.TempDir()}
	for line := range strings.Lines(string(text)) {
		command, indented := strings.CutPrefix(line, "       ") // in a step
		if command = strings.TrimSpace(command); indented && !strings.HasPrefix(command, "#") && !slices.Contains(notHere, command) {
			p.commands = append(p.commands, command)
		}
	}
	for name, content := range manifests {
		path := filepath.Join(p.dir, "conf", "kubernetes", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// follow runs the page's next command, which begins so, and returns what it prints.
func (p *page) follow(t *testing.T, beginning string) string {
	t.Helper()
	if len(p.commands) == 0 || !strings.HasPrefix(p.commands[0], beginning) {
		t.Fatalf("docs/kubernetes.md goes on with %q, the test with %q", p.commands, beginning)
	}
	command := p.cluster.Outside.Command("bash", "-o", "pipefail", "-c", p.commands[0])
	p.commands = p.commands[1:]
	command.Dir = p.dir
	command.Env = append(os.Environ(), "PATH="+p.cluster.bin+":"+os.Getenv("PATH"), "KUBECONFIG="+p.cluster.Kubeconfig("admin"))
	out, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", command.Args[len(command.Args)-1], err, out, p.cluster.daemonPods())
	}
	return string(out)
}

// done says that nothing of the page is left out.
func (p *page) done(t *testing.T) {
	t.Helper()
	if len(p.commands) > 0 {
		t.Errorf("the test does not do what docs/kubernetes.md says: %q", p.commands)
	}
}
