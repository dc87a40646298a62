// SPDX-License-Identifier: Apache-2.0

//go:build root

package containerd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/ipam"
	"github.com/mooring-cni/mooring/test/netns"
)

func TestMain(m *testing.M) {
	netns.OnInterrupt()
	os.Exit(m.Run())
}

// machine is a node with the real runtime and a standalone daemon.
type machine struct {
	*Runtime
	daemon    *Daemon
	manifests string
}

const portmap = `{"type": "portmap", "capabilities": {"portMappings": true}}`
const bandwidth = `{"type": "bandwidth", "capabilities": {"bandwidth": true}}`

func newMachine(t *testing.T) *machine {
	t.Helper()
	for _, program := range []string{"containerd", "ctr", "runc", "iptables"} {
		if _, err := exec.LookPath(program); err != nil {
			missing := fmt.Sprintf("%s is not installed: apt-get install %s", program, strings.Join(Packages, " "))
			if os.Getenv("NO_SKIP") == "1" {
				t.Fatal(missing)
			}
			t.Skip(missing)
		}
	}
	programs := Build(t)
	m := &machine{Runtime: Start(t, netns.NewNode(t), programs)}
	m.manifests = filepath.Join(m.Node.Dir, "manifests")
	if err := os.Mkdir(m.manifests, 0o755); err != nil {
		t.Fatal(err)
	}
	m.daemon = m.StartDaemon(t, fmt.Sprintf("manifests: %s\npodCIDRs: [%s, %q]\nmetricsAddress: \"\"\n",
		m.manifests, m.Node.PodCIDRs[0], m.Node.PodCIDRs[1]))
	return m
}

// apply changes a manifest as the daemon's users do.
func (m *machine) apply(t *testing.T, name, manifest string) {
	t.Helper()
	temporary := filepath.Join(m.Node.Dir, name)
	if err := os.WriteFile(temporary, []byte(manifest), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temporary, filepath.Join(m.manifests, name)); err != nil {
		t.Fatal(err)
	}
}

// pod runs a pod with the app in it, and returns the two's IDs.
func (m *machine) pod(t *testing.T, config SandboxConfig) (sandbox, container string) {
	t.Helper()
	sandbox, err := m.RunSandbox(config)
	if err != nil {
		t.Fatal(err)
	}
	if container, err = m.RunContainer(sandbox, config, "serve"); err != nil {
		t.Fatal(err)
	}
	netns.Eventually(t, 30*time.Second, "the app serves", func() bool { return m.reach(container, "http://127.0.0.1:8080/") == nil })
	return sandbox, container
}

// left is all that pods have on a node.
type left struct {
	Interfaces, Pins, Addresses, Endpoints, Connections []string
}

func (m *machine) left(t *testing.T) (l left) {
	t.Helper()
	links, err := m.Node.Netlink().LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if name := link.Attrs().Name; strings.HasPrefix(name, "lxc") {
			l.Interfaces = append(l.Interfaces, name)
		}
	}
	pins, err := bpf.EndpointLinks(m.Node.BPFFS)
	if err != nil {
		t.Fatal(err)
	}
	l.Pins = append(l.Pins, pins...) // nil when there is none
	pool, err := ipam.Open(m.Node.StateDir, m.Node.PodCIDRs)
	if err != nil {
		t.Fatal(err)
	}
	allocations, err := pool.List(t.Context())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	for _, a := range allocations {
		l.Addresses = append(l.Addresses, fmt.Sprint(a))
	}
	endpoints, err := m.daemon.Endpoints(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range endpoints {
		l.Endpoints = append(l.Endpoints, e.Namespace+"/"+e.Pod)
	}
	for c, err := range m.daemon.Connections(t.Context(), api.Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		l.Connections = append(l.Connections, fmt.Sprintf("%+v", c))
	}
	return l
}

// nothingLeft waits until pods have nothing on the node: no interface, pin,
// address, endpoint, connection or network namespace.
func (m *machine) nothingLeft(t *testing.T, namespaces []string) {
	t.Helper()
	var difference string
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if difference = cmp.Diff(left{}, m.left(t)); difference == "" {
			break
		}
	}
	if difference != "" {
		t.Errorf("left on the node (-want +got):\n%s", difference)
	}
	for _, path := range namespaces {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the pod's network namespace %s is left: %v", path, err)
		}
	}
}

// netnsOf are the files of all pods' network namespaces.
func (m *machine) netnsOf(t *testing.T) (paths []string) {
	t.Helper()
	endpoints, err := m.daemon.Endpoints(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range endpoints {
		if e.Netns == "" {
			t.Errorf("endpoint %s/%s has no network namespace", e.Namespace, e.Pod)
		}
		paths = append(paths, e.Netns)
	}
	return paths
}

// each calls f for 0 to n-1 at once, and fails the test for what fails.
func each(t *testing.T, n int, f func(i int) error) {
	t.Helper()
	failed := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { failed[i] = f(i) })
	}
	all.Wait()
	if err := errors.Join(failed...); err != nil {
		t.Fatal(err)
	}
}

// reach is one HTTP request from a container.
func (m *machine) reach(container, url string) error {
	_, err := m.Exec(container, "/app", "get", url)
	return err
}

func TestContainerd(t *testing.T) {
	m := newMachine(t)

	t.Run("the network is ready when the configuration is there", func(t *testing.T) {
		if ready, _, err := m.NetworkReady(); err != nil || ready {
			t.Fatalf("ready without a configuration: %v, %v", ready, err)
		}
		m.Install(t, Conflist(m.Node, "1.0.0", portmap, bandwidth))
		netns.Eventually(t, 30*time.Second, "the network is ready", func() bool {
			ready, _, err := m.NetworkReady()
			return err == nil && ready
		})
	})

	t.Run("pods reach each other and a service in both families", func(t *testing.T) {
		a, b := m.Sandbox("client"), m.Sandbox("web-1")
		client, inClient := m.pod(t, a)
		server, _ := m.pod(t, b)
		defer m.removed(t, client, server)
		addresses, err := m.Addresses(server)
		if err != nil {
			t.Fatal(err)
		}
		if len(addresses) != 2 {
			t.Fatalf("the runtime knows %v, not one address of each family", addresses)
		}
		m.apply(t, "web.yaml", `
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {clusterIPs: [10.96.0.10, "fd00:10:96::10"], selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: default, labels: {app: web}}
`)
		urls := []string{"http://10.96.0.10/", "http://[fd00:10:96::10]/"}
		for _, address := range addresses {
			urls = append(urls, fmt.Sprintf("http://%s/", netip.AddrPortFrom(netip.MustParseAddr(address), 8080)))
		}
		for _, url := range urls {
			netns.Eventually(t, 15*time.Second, "client reaches "+url, func() bool { return m.reach(inClient, url) == nil })
		}
	})

	t.Run("fifty pods made and removed at once leave nothing", func(t *testing.T) {
		const pods = 50
		ids, addresses := make([]string, pods), make([]string, pods)
		start := time.Now()
		each(t, pods, func(i int) (err error) {
			// The plugin gives a daemon that is slow to answer up and says "try
			// again later"; a kubelet does, and so does a test on a busy machine.
			for range 5 {
				if ids[i], err = m.RunSandbox(m.Sandbox(fmt.Sprintf("churn-%d", i))); err == nil || !strings.Contains(err.Error(), "did not answer in time") {
					break
				}
				t.Logf("again: %v", err)
			}
			if err != nil {
				return err
			}
			all, err := m.Addresses(ids[i])
			addresses[i] = strings.Join(all, " ")
			return err
		})
		made := time.Since(start)
		if distinct := slices.Compact(slices.Sorted(slices.Values(addresses))); len(distinct) != pods {
			t.Errorf("%d pods have %d distinct addresses: %q", pods, len(distinct), distinct)
		}
		if l := m.left(t); len(l.Interfaces) != pods || len(l.Endpoints) != pods || len(l.Addresses) != pods {
			t.Errorf("%d pods run, and the node has %d interfaces, %d endpoints, %d attachments with addresses",
				pods, len(l.Interfaces), len(l.Endpoints), len(l.Addresses))
		}
		namespaces := m.netnsOf(t)
		start = time.Now()
		each(t, pods, func(i int) error { return m.Remove(ids[i]) })
		t.Logf("%d pods made in %v, removed in %v", pods, made.Round(time.Millisecond), time.Since(start).Round(time.Millisecond))
		m.nothingLeft(t, namespaces)
	})

	t.Run("pods survive containerd and are removed after it came back", func(t *testing.T) {
		server, _ := m.pod(t, m.Sandbox("survivor"))
		addresses, err := m.Addresses(server)
		if err != nil {
			t.Fatal(err)
		}
		url := "http://" + addresses[0] + ":8080/"
		namespaces := m.netnsOf(t)
		m.Kill()
		if _, err := m.Node.Get(url); err != nil {
			t.Errorf("the node reaches its pod while containerd is down: %v", err)
		}
		m.Launch()
		again, inAgain := m.pod(t, m.Sandbox("after"))
		if err := m.reach(inAgain, url); err != nil {
			t.Errorf("a pod made after the restart reaches one made before: %v", err)
		}
		m.removed(t, server, again)
		m.nothingLeft(t, namespaces)
	})

	t.Run("the daemon is killed between ADD and DEL", func(t *testing.T) {
		server, _ := m.pod(t, m.Sandbox("server"))
		client, inClient := m.pod(t, m.Sandbox("client"))
		addresses, err := m.Addresses(server)
		if err != nil {
			t.Fatal(err)
		}
		namespaces := m.netnsOf(t)
		m.daemon.Kill()
		for _, address := range addresses {
			if err := m.reach(inClient, fmt.Sprintf("http://%s/", netip.AddrPortFrom(netip.MustParseAddr(address), 8080))); err != nil {
				t.Errorf("pods reach each other while the daemon is down: %v", err)
			}
		}
		m.daemon.Launch()
		if err := m.reach(inClient, "http://"+addresses[0]+":8080/"); err != nil {
			t.Errorf("pods reach each other after the daemon came back: %v", err)
		}
		m.removed(t, server, client)
		m.nothingLeft(t, namespaces)
	})

	t.Run("pods are removed while the daemon is down", func(t *testing.T) {
		server, _ := m.pod(t, m.Sandbox("server"))
		client, inClient := m.pod(t, m.Sandbox("client"))
		addresses, err := m.Addresses(server)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.reach(inClient, "http://"+addresses[0]+":8080/"); err != nil {
			t.Fatal(err)
		}
		namespaces := m.netnsOf(t)
		if err := m.daemon.Stop(); err != nil {
			t.Errorf("mooringd: %v", err)
		}
		m.removed(t, server, client)
		if _, err := m.RunSandbox(m.Sandbox("early")); err == nil {
			t.Error("a pod was made without the daemon")
		} else if !strings.Contains(err.Error(), "mooringd") {
			t.Errorf("the refusal does not name the daemon: %v", err)
		}
		m.daemon.Launch()
		m.nothingLeft(t, namespaces)
	})

	t.Run("a host port leads to its pod", func(t *testing.T) {
		config := m.Sandbox("port")
		config["portMappings"] = []map[string]any{{"hostPort": 18080, "containerPort": 8080, "protocol": "TCP"}}
		server, _ := m.pod(t, config)
		defer m.removed(t, server)
		for _, address := range []netip.Addr{m.Node.IP, m.Node.IP6} {
			url := fmt.Sprintf("http://%s/", netip.AddrPortFrom(address, 18080))
			if body, err := m.Node.Outside.Get(url); err != nil || !strings.HasPrefix(body, "port ") {
				t.Errorf("from outside %s: %q, %v", url, body, err)
			}
		}
	})

	t.Run("bandwidth annotations shape the pod", func(t *testing.T) {
		config := m.Sandbox("slow")
		config["annotations"] = map[string]string{"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "10M"}
		slow, _ := m.pod(t, config)
		client, inClient := m.pod(t, m.Sandbox("client"))
		defer m.removed(t, slow, client)
		endpoints, err := m.daemon.Endpoints(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(endpoints, func(e api.Endpoint) bool { return e.Pod == "slow" })
		if i < 0 {
			t.Fatal("the pod is no endpoint")
		}
		qdiscs, err := m.Node.Netlink().QdiscList(m.Node.Link(t, endpoints[i].Interface))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(qdiscs, func(q netlink.Qdisc) bool { return q.Type() == "tbf" }) {
			t.Errorf("no token bucket on the pod's interface: %v", qdiscs)
		}
		if err := m.reach(inClient, "http://"+endpoints[i].IPs[0].String()+":8080/"); err != nil {
			t.Errorf("the shaped pod is not reached: %v", err)
		}
	})

	t.Run("a configuration of two versions is for old runtimes and new ones", func(t *testing.T) {
		conflist := Conflist(m.Node, "1.0.0 1.1.0", portmap)
		m.Install(t, conflist)
		// This runtime knows only the first.
		known, inKnown := m.pod(t, m.Sandbox("old"))
		defer m.removed(t, known)
		if err := m.reach(inKnown, "http://127.0.0.1:8080/"); err != nil {
			t.Errorf("a pod made by the old runtime: %v", err)
		}
		list, err := libcni.NetworkConfFromBytes([]byte(conflist))
		if err != nil {
			t.Fatal(err)
		}
		if list.CNIVersion != "1.1.0" {
			t.Errorf("a new runtime takes version %s", list.CNIVersion)
		}
		plugins := libcni.NewCNIConfigWithCacheDir([]string{m.BinDir}, filepath.Join(m.Dir, "cache"), nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		status := func() error {
			return m.Node.Do(func() error { return plugins.GetStatusNetworkList(ctx, list) })
		}
		if err := status(); err != nil {
			t.Errorf("STATUS while the daemon serves: %v", err)
		}
		if err := m.daemon.Stop(); err != nil {
			t.Errorf("mooringd: %v", err)
		}
		if err := status(); err == nil || !strings.Contains(err.Error(), "mooringd") {
			t.Errorf("STATUS without the daemon: %v", err)
		}
		m.daemon.Launch()
	})

	t.Run("GC removes what containerd does not know", func(t *testing.T) {
		known, inKnown := m.pod(t, m.Sandbox("known"))
		defer m.removed(t, known)
		list, err := libcni.NetworkConfFromBytes([]byte(Conflist(m.Node, "1.1.0", portmap)))
		if err != nil {
			t.Fatal(err)
		}
		plugins := libcni.NewCNIConfigWithCacheDir([]string{m.BinDir}, filepath.Join(m.Dir, "cache"), nil)
		orphan := netns.Empty(t, "orphan")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := m.Node.Do(func() error {
			_, err := plugins.AddNetworkList(ctx, list, &libcni.RuntimeConf{ContainerID: "orphan", NetNS: orphan.Path(), IfName: "eth0"})
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if l := m.left(t); len(l.Endpoints) != 2 || len(l.Addresses) != 2 {
			t.Fatalf("with an orphan the node has %v", l)
		}
		if err := m.Node.Do(func() error {
			return plugins.GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: []cnitypes.GCAttachment{{ContainerID: known, IfName: "eth0"}}})
		}); err != nil {
			t.Fatal(err)
		}
		l := m.left(t)
		if diff := cmp.Diff([]string{"default/known"}, l.Endpoints); diff != "" || len(l.Addresses) != 1 || len(l.Interfaces) != 1 {
			t.Errorf("after GC the node has %v", l)
		}
		if err := m.reach(inKnown, "http://127.0.0.1:8080/"); err != nil {
			t.Errorf("the known pod: %v", err)
		}
	})
	m.nothingLeft(t, nil)
}

// removed removes pods.
func (m *machine) removed(t *testing.T, sandboxes ...string) {
	t.Helper()
	each(t, len(sandboxes), func(i int) error { return m.Remove(sandboxes[i]) })
}
