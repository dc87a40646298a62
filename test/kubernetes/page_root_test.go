// SPDX-License-Identifier: Apache-2.0

//go:build root

package kubernetes

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/mooring-cni/mooring/test/containerd"
)

// notHere are the page's commands that the test's cluster has no use for: it never
// had kube-proxy.
var notHere = []string{
	"kubectl -n kube-system delete daemonset/kube-proxy configmap/kube-proxy",
	"kube-proxy --cleanup",
}

// The page has two ways, with Helm and without. These are the commands of either alone.
var (
	withHelm = []string{
		"helm install mooring conf/kubernetes/chart --namespace kube-system --set apiServer.host=192.0.2.1",
		"helm upgrade mooring conf/kubernetes/chart --namespace kube-system --reuse-values --set uninstall=true",
		"helm uninstall mooring --namespace kube-system",
	}
	withoutHelm = []string{
		"sed s/api.example.internal/192.0.2.1/ conf/kubernetes/mooring.yaml | kubectl apply -f -",
		"kubectl -n kube-system delete daemonset/mooring --wait=false",
		"kubectl apply -f conf/kubernetes/uninstall.yaml",
		"kubectl delete -f conf/kubernetes/uninstall.yaml",
		"kubectl delete -f conf/kubernetes/mooring.yaml --ignore-not-found",
	}
)

// page is docs/kubernetes.md, whose commands are run as they stand there, in
// their order, in a directory that has the chart with the values of this cluster,
// and the manifests rendered with them.
type page struct {
	cluster  *Cluster
	dir      string
	commands []string // that are to come
}

// openPage opens the page for one of its ways: without the commands of the other.
func (c *Cluster) openPage(t *testing.T, without []string, values string) *page {
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
		if command = strings.TrimSpace(command); indented && !strings.HasPrefix(command, "#") && !slices.Contains(notHere, command) && !slices.Contains(without, command) {
			p.commands = append(p.commands, command)
		}
	}
	directory := filepath.Join(p.dir, "conf", "kubernetes")
	if err := os.CopyFS(filepath.Join(directory, "chart"), os.DirFS(chartDirectory(root))); err != nil {
		t.Fatal(err)
	}
	overrideValues(t, filepath.Join(directory, "chart", "values.yaml"), values)
	for name, uninstall := range map[string]string{"mooring.yaml": "false", "uninstall.yaml": "true"} {
		rendered := Helm(t, "", "template", "mooring", filepath.Join(directory, "chart"), "--namespace", "kube-system", "--kube-version", Version, "--set", "apiServer.host="+apiHost+",uninstall="+uninstall)
		if err := os.WriteFile(filepath.Join(directory, name), []byte(rendered), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// overrideValues gives a chart other defaults.
func overrideValues(t *testing.T, path, values string) {
	t.Helper()
	defaults, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var all, other map[string]any
	if err := errors.Join(yaml.Unmarshal(defaults, &all), yaml.Unmarshal([]byte(values), &other)); err != nil {
		t.Fatal(err)
	}
	var override func(map[string]any, map[string]any)
	override = func(all, other map[string]any) {
		for key, value := range other {
			had, isMap := all[key].(map[string]any)
			if has, areMaps := value.(map[string]any); isMap && areMaps {
				override(had, has)
			} else {
				all[key] = value
			}
		}
	}
	override(all, other)
	content, err := yaml.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
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
	command.Env = append(helmEnvironment(p.dir), "PATH="+p.cluster.bin+":"+os.Getenv("PATH"), "KUBECONFIG="+p.cluster.Kubeconfig("admin"))
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

// What the page says is in its order, and the chart has this cluster's values, however
// it gets them.
func TestPageIsReadBothWays(t *testing.T) {
	c := &Cluster{dir: "/nodes"}
	values := c.values(firstVersion, apiHost, 6443, "routing: {mode: vxlan}", "")
	beginnings := func(p *page) (all []string) {
		for _, command := range p.commands {
			words := strings.Fields(command)
			all = append(all, strings.Join(words[:2], " "))
		}
		return all
	}
	helms := c.openPage(t, withoutHelm, values)
	if diff := cmp.Diff([]string{
		"kubectl config", "helm install", "kubectl -n", "kubectl get", "kubectl -n",
		"helm upgrade", "kubectl -n", "helm uninstall",
	}, beginnings(helms)); diff != "" {
		t.Errorf("with Helm (-want +got):\n%s", diff)
	}
	plain := c.openPage(t, withHelm, values)
	if diff := cmp.Diff([]string{
		"kubectl config", "sed s/api.example.internal/192.0.2.1/", "kubectl -n", "kubectl get", "kubectl -n",
		"kubectl -n", "kubectl apply", "kubectl -n", "kubectl delete", "kubectl delete",
	}, beginnings(plain)); diff != "" {
		t.Errorf("without Helm (-want +got):\n%s", diff)
	}
	want := Chart(t, values)
	got, err := os.ReadFile(filepath.Join(plain.dir, "conf", "kubernetes", "mooring.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("values that are given, and those of the chart itself (-want +got):\n%s", diff)
	}
}
