// SPDX-License-Identifier: Apache-2.0

//go:build root

package kubernetes

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/test/containerd"
	"github.com/mooring-cni/mooring/test/netns"
)

func TestPlainManifestsAreTheCharts(t *testing.T) {
	root, err := containerd.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	directory, now := filepath.Join(root, "conf", "kubernetes"), t.TempDir()
	command := exec.Command(filepath.Join(directory, "render.sh"), now)
	command.Env = append(os.Environ(), "HELM="+filepath.Join(buildPrograms(t, root, packages), "helm"))
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("render.sh: %v: %s", err, out)
	}
	for _, name := range []string{"mooring.yaml", "uninstall.yaml"} {
		committed, err := os.ReadFile(filepath.Join(directory, name))
		if err != nil {
			t.Fatal(err)
		}
		rendered, err := os.ReadFile(filepath.Join(now, name))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(rendered), string(committed)); diff != "" {
			t.Errorf("%s is not what the chart makes (make manifests writes it):\n%s", name, diff)
		}
	}
}

func TestHelmFindsNoFaultWithTheChart(t *testing.T) {
	root, err := containerd.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	for _, values := range []string{
		"apiServer: {host: 192.0.2.1}",
		"{apiServer: {host: \"fd00::1\"}, config: {routing: {mode: vxlan}}, prepare: false, podAnnotations: {a: b}}",
		"{apiServer: {host: 192.0.2.1}, cni: {versions: [1.0.0, 1.1.0], chained: []}, metrics: {host: 0.0.0.0}}",
		"uninstall: true",
	} {
		out := Helm(t, values, "lint", "--strict", chartDirectory(root), "--namespace", "kube-system", "--values", "-")
		if !strings.Contains(out, "1 chart(s) linted, 0 chart(s) failed") {
			t.Errorf("%s:\n%s", values, out)
		}
	}
}

// daemonPods are the DaemonSet's, with what keeps one from running.
func (c *Cluster) daemonPods() string {
	out, _ := c.Try("-n", "kube-system", "get", "pods", "-o", `jsonpath={range .items[*]}{.metadata.name} on {.spec.nodeName}: {.status.phase} {.status.message}{range .status.initContainerStatuses[*]} {.name}: {.state}{end}{range .status.containerStatuses[*]} {.name}: {.state} ready {.ready}{end}{"\n"}{end}`)
	events, _ := c.Try("-n", "kube-system", "get", "events", "-o", `jsonpath={range .items[*]}{.involvedObject.name} {.reason}: {.message}{"\n"}{end}`)
	return out + events
}

// installed waits until the DaemonSet's pods are ready.
func (c *Cluster) installed(t *testing.T, name string) {
	t.Helper()
	if out, err := c.Try("-n", "kube-system", "rollout", "status", "daemonset/"+name, "--timeout=600s"); err != nil {
		logs, _ := c.Try("-n", "kube-system", "logs", "daemonset/"+name, "--all-containers", "--tail=40")
		t.Fatalf("%v %s\n%s\n%s", err, out, c.daemonPods(), logs)
	}
}

func fileNames(t *testing.T, directory string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(directory)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// socket is that of the DaemonSet's pod on the node.
func (n *Node) socket() string { return filepath.Join(n.Dir, "run", "mooring.sock") }

// inPlace waits until the nodes are ready, and looks at what makes them so.
func (c *Cluster) inPlace(t *testing.T) {
	t.Helper()
	for _, n := range c.Nodes {
		c.Eventually(5*time.Minute, n.NodeName+" is ready", func() bool {
			ready, _ := c.ready(n)
			return ready
		})
		if diff := cmp.Diff([]string{"bandwidth", "loopback", "mooring-cni", "mooring-ipam", "portmap"}, fileNames(t, n.Runtime.BinDir)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", n.NodeName, diff)
		}
		got := map[string]string{}
		for _, key := range []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.ipv6.conf." + netns.Uplink + ".accept_ra"} {
			got[key] = n.SysctlValue(t, key)
		}
		if diff := cmp.Diff(map[string]string{"net.ipv4.ip_forward": "1", "net.ipv6.conf.all.forwarding": "1", "net.ipv6.conf." + netns.Uplink + ".accept_ra": "2"}, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", n.NodeName, diff)
		}
		status, err := api.NewClient(n.socket()).Status(t.Context())
		if err != nil || !status.Healthy || len(status.Problems) > 0 || status.Hook.Mode == "off" {
			t.Errorf("%s: %+v, %v", n.NodeName, status, err)
		}
	}
}

// takenAway looks at what is left on nodes that take no pods any more.
func (c *Cluster) takenAway(t *testing.T) {
	t.Helper()
	for _, n := range c.Nodes {
		if names := fileNames(t, n.Runtime.ConfDir); len(names) > 0 {
			t.Errorf("%s has the configuration %v", n.NodeName, names)
		}
		if names := fileNames(t, n.Runtime.BinDir); slices.Contains(names, "mooring-cni") || slices.Contains(names, "mooring-ipam") {
			t.Errorf("%s has the plugins %v", n.NodeName, names)
		}
		// maps.debug and progs.debug are the kernel's own.
		pins := slices.DeleteFunc(fileNames(t, n.BPFFS), func(name string) bool { return filepath.Ext(name) == ".debug" })
		if len(pins) > 0 {
			t.Errorf("%s has pins: %v", n.NodeName, pins)
		}
		if names := fileNames(t, filepath.Join(n.Dir, "run")); len(names) > 0 {
			t.Errorf("%s has in its run directory: %v", n.NodeName, names)
		}
		if left := n.Sh(t, "iptables-save; ip6tables-save; ip route show table all proto 77; ip -6 route show table all proto 77; ip -o link"); strings.Contains(left, "MOORING") || strings.Contains(left, "mooring") || strings.Contains(left, "10.244") {
			t.Errorf("%s has\n%s", n.NodeName, left)
		}
		c.Eventually(5*time.Minute, n.NodeName+" takes no pods", func() bool {
			ready, why := c.ready(n)
			return !ready && strings.Contains(why, "cni plugin not initialized")
		})
	}
}

// unknown says that the cluster has no object of ours.
func (c *Cluster) unknown(t *testing.T) {
	t.Helper()
	for _, kind := range []string{"daemonsets", "configmaps", "serviceaccounts", "clusterroles", "clusterrolebindings"} {
		if left := c.Kubectl(t, "-n", "kube-system", "get", kind, "-o", "name"); strings.Contains(left, "mooring") {
			t.Errorf("left in the cluster: %s", left)
		}
	}
}

// The DaemonSet is all that installs Mooring here, from the chart and the image
// that users have.
func TestDaemonSet(t *testing.T) {
	t.Parallel()
	c := StartHosts(t, 2)
	archive := c.Programs.MooringImage(t, mooringImage+":"+firstVersion, mooringImage+":"+nextVersion)
	for _, n := range c.Nodes {
		n.Runtime.Import(t, archive)
		// The plugins are the DaemonSet's to bring, those of CNI too.
		for _, name := range fileNames(t, n.Runtime.BinDir) {
			if name != "loopback" {
				if err := os.Remove(filepath.Join(n.Runtime.BinDir, name)); err != nil {
					t.Fatal(err)
				}
			}
		}
		// So are the sysctls.
		n.Sysctl(t, "net.ipv4.ip_forward", "0")
		n.Sysctl(t, "net.ipv6.conf.all.forwarding", "0")
		n.Sysctl(t, "net.ipv6.conf."+netns.Uplink+".accept_ra", "1")
	}
	values := c.values(firstVersion, apiHost, 6443, "", "")

	t.Run("by Helm, and taken away again", func(t *testing.T) {
		page := c.openPage(t, withoutHelm, values)
		page.follow(t, "kubectl config view")
		page.follow(t, "helm install")
		page.follow(t, "kubectl -n kube-system rollout status daemonset/mooring")
		c.inPlace(t)
		page.follow(t, "kubectl get nodes")
		page.follow(t, "kubectl -n kube-system exec daemonset/mooring -c mooringd -- /mooring status")
		page.follow(t, "helm upgrade")
		page.follow(t, "kubectl -n kube-system rollout status daemonset/mooring-uninstall")
		c.takenAway(t)
		page.follow(t, "helm uninstall")
		c.unknown(t)
		page.done(t)
	})

	page := c.openPage(t, withHelm, values)

	t.Run("a node is not ready while its daemon knows no services", func(t *testing.T) {
		c.Apply(t, Chart(t, c.values(firstVersion, netns.Router, 6444, "", "")))
		for _, n := range c.Nodes {
			netns.Eventually(t, 5*time.Minute, n.NodeName+" has a daemon that serves nobody", func() bool {
				node, err := api.NewClient(n.socket()).Node(t.Context())
				return err == nil && !node.Ready
			})
		}
		time.Sleep(3 * time.Second)
		for _, n := range c.Nodes {
			if names := fileNames(t, n.Runtime.ConfDir); len(names) > 0 {
				t.Errorf("%s has %v", n.NodeName, names)
			}
			if ready, why := c.ready(n); ready {
				t.Errorf("%s: %s", n.NodeName, why)
			}
		}
		if t.Failed() {
			t.Log(c.daemonPods())
		}
	})

	t.Run("nodes become ready, with all plugins in place", func(t *testing.T) {
		c.Kubectl(t, "-n", "kube-system", "delete", "daemonset/mooring", "--timeout=600s")
		if address := page.follow(t, "kubectl config view"); address != server {
			t.Errorf("the API server's address is said to be %q", address)
		}
		page.follow(t, "sed s/api.example.internal/192.0.2.1/")
		page.follow(t, "kubectl -n kube-system rollout status daemonset/mooring")
		c.inPlace(t)
		if out := page.follow(t, "kubectl get nodes"); strings.Count(out, " Ready ") != 2 {
			t.Errorf("nodes:\n%s", out)
		}
		if out := page.follow(t, "kubectl -n kube-system exec daemonset/mooring -c mooringd -- /mooring status"); !strings.Contains(out, "node-") {
			t.Errorf("mooring status:\n%s", out)
		}
	})

	for _, n := range c.Nodes {
		c.Apply(t, "apiVersion: v1\nkind: Pod\nmetadata: {name: client-"+n.NodeName+"}\nspec: "+app(n.NodeName, "serve"))
	}
	c.Apply(t, deployment("web", 2, "1")+`
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.100, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`)
	clients := []string{"client-node-a", "client-node-b"}
	c.Kubectl(t, "rollout", "status", "deployment/web", "--timeout=600s")
	c.Kubectl(t, "wait", "--for=condition=Ready", "pod/client-node-a", "pod/client-node-b", "--timeout=600s")
	for _, client := range clients {
		c.reaches(t, client, "http://10.96.0.100/")
	}

	t.Run("a rolling update breaks no connection and leaves nodes ready", func(t *testing.T) {
		const since = `{range .items[*]}{.status.conditions[?(@.type=="Ready")].lastTransitionTime} {end}`
		before := c.Kubectl(t, "get", "nodes", "-o", "jsonpath="+since)
		held := c.inBackground(t, clients, "hold", "10.96.0.100:80")
		loads := c.load(t, clients, "http://10.96.0.100/")
		start := time.Now()
		c.Apply(t, Chart(t, c.values(nextVersion, netns.Router, 6443, "", "")))
		c.installed(t, "mooring")
		t.Logf("both nodes are updated after %v", time.Since(start).Round(time.Second))
		images := strings.Fields(c.Kubectl(t, "-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name=mooring", "-o", "jsonpath={.items[*].spec.containers[0].image}"))
		if !slices.Equal(images, []string{mooringImage + ":" + nextVersion, mooringImage + ":" + nextVersion}) {
			t.Errorf("the pods' images are %v", images)
		}
		loads.check(t)
		// The new daemon sees the pods' sockets in their namespaces: it is by asking
		// them that it knows how many packets a held connection has had.
		for _, n := range c.Nodes {
			netns.Eventually(t, 5*time.Minute, n.NodeName+" counts the packets of a held connection", func() bool {
				for connection, err := range api.NewClient(n.socket()).Connections(t.Context(), api.Filter{}) {
					if err == nil && connection.Tethered && connection.State == "established" && connection.Packets >= 10 {
						return true
					}
				}
				return false
			})
		}
		held.check(t)
		if after := c.Kubectl(t, "get", "nodes", "-o", "jsonpath="+since); after != before {
			t.Errorf("nodes changed: ready since %s, before the update since %s", after, before)
		}
	})

	t.Run("a change of the configuration makes tunnels", func(t *testing.T) {
		c.Apply(t, Chart(t, c.values(nextVersion, netns.Router, 6443, "routing: {mode: vxlan}", "")))
		c.installed(t, "mooring")
		addresses := strings.Fields(c.Kubectl(t, "get", "pods", "-o", "jsonpath={.items[*].status.podIPs[*].ip}"))
		for _, client := range clients {
			c.reaches(t, client, "http://10.96.0.100/")
			for _, address := range addresses {
				c.reaches(t, client, "http://"+net.JoinHostPort(address, "8080")+"/")
			}
		}
		for i, n := range c.Nodes {
			address := c.Kubectl(t, "get", "pod", clients[1-i], "-o", "jsonpath={.status.podIP}")
			if routes := n.Sh(t, "ip route get "+address); !strings.Contains(routes, "dev mooring_vxlan") {
				t.Errorf("the route on %s: %s", n.NodeName, routes)
			}
			status, err := api.NewClient(n.socket()).Status(t.Context())
			if err != nil || !status.Healthy || len(status.Problems) > 0 {
				t.Errorf("%s: %+v, %v", n.NodeName, status, err)
			}
		}
	})

	t.Run("uninstalling leaves nothing on the nodes", func(t *testing.T) {
		c.Kubectl(t, "delete", "deployment/web", "pod/client-node-a", "pod/client-node-b", "--timeout=600s")
		// Without the plugin nothing would take away what the runtime still has.
		c.Kubectl(t, "wait", "--for=delete", "pod", "-l", "app=web", "--timeout=600s")
		page.follow(t, "kubectl -n kube-system delete daemonset/mooring")
		page.follow(t, "kubectl apply -f conf/kubernetes/uninstall.yaml")
		page.follow(t, "kubectl -n kube-system rollout status daemonset/mooring-uninstall")
		c.takenAway(t)
		page.follow(t, "kubectl delete -f conf/kubernetes/uninstall.yaml")
		page.follow(t, "kubectl delete -f conf/kubernetes/mooring.yaml")
		c.unknown(t)
		page.done(t)
	})
}
