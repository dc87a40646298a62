// SPDX-License-Identifier: Apache-2.0

// Package scenario runs the project's own binaries as a user would: a daemon
// with manifests on a throw-away node, pods made by the CNI plugin, and the
// command line client. The scenarios are the scripts in testdata.
package scenario

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/test/netns"
)

// Node is a node with the project's programs.
type Node struct {
	*netns.Node
	Programs  string // their directory
	Manifests string // the daemon's directory of manifests; empty: Flags name an API server
	Flags     []string

	t      netns.T
	daemon *netns.Process
	cgroup *netns.Cgroup
	pods   map[string]*Pod
}

// Pod is a network namespace that the CNI plugin has connected to the node.
type Pod struct {
	*netns.NS
	ID      string // of the container
	IP, IP6 netip.Addr

	namespace, name string
}

// built is the directory of programs that were made here.
var built string

// programs are built once for all tests of a process; MOORING_BIN names a
// directory that has them already.
var programs = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("MOORING_BIN"); dir != "" {
		return dir, nil
	}
	module, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find go.mod: %w", err)
	}
	dir, err := os.MkdirTemp("", "mooring-programs-")
	if err != nil {
		return "", err
	}
	built = dir
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-X main.version=v0.0.0-test", "-o", dir+"/",
		"./daemon/mooringd", "./daemon/mooring", "./plugins/mooring-cni", "./plugins/mooring-ipam")
	build.Dir = filepath.Dir(strings.TrimSpace(string(module)))
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return "", fmt.Errorf("build the programs: %w\n%s", err, out)
	}
	return dir, nil
})

// RemovePrograms removes what was built; the last thing that a test process does.
func RemovePrograms() {
	if built != "" {
		os.RemoveAll(built)
	}
}

// NewNode makes a node with an empty directory of manifests. Nothing runs yet.
func NewNode(t netns.T) *Node {
	t.Helper()
	dir, err := programs()
	if err != nil {
		t.Fatalf("%v", err)
	}
	return newNode(t, netns.NewNode(t), dir)
}

// NewNodes makes as many nodes as there are to be on one network, that know each
// other by the manifest nodes.yaml.
func NewNodes(t netns.T, count int) (nodes []*Node) {
	t.Helper()
	dir, err := programs()
	if err != nil {
		t.Fatalf("%v", err)
	}
	outside := netns.NewOutside(t)
	manifest := ""
	for range count {
		n := newNode(t, outside.Node(t), dir)
		nodes = append(nodes, n)
		manifest += fmt.Sprintf("---\napiVersion: v1\nkind: Node\nmetadata: {name: %s}\nspec: {podCIDRs: [%q, %q]}\nstatus: {addresses: [{type: InternalIP, address: %q}, {type: InternalIP, address: %q}]}\n",
			n.NodeName, n.PodCIDRs[0], n.PodCIDRs[1], n.IP, n.IP6)
	}
	for _, n := range nodes {
		n.Write("nodes.yaml", manifest)
	}
	return nodes
}

func newNode(t netns.T, place *netns.Node, programs string) *Node {
	t.Helper()
	n := &Node{Node: place, cgroup: netns.NewCgroup(t, place.NodeName), Programs: programs, t: t, pods: map[string]*Pod{}}
	n.Manifests = filepath.Join(n.Dir, "manifests")
	if err := os.Mkdir(n.Manifests, 0o755); err != nil {
		t.Fatalf("%v", err)
	}
	return n
}

// Again is another daemon of the same node, with places of its own and no manifests.
func (n *Node) Again() *Node {
	n.t.Helper()
	return newNode(n.t, n.Node.Again(n.t), n.Programs)
}

// Args are the daemon's arguments on this node.
func (n *Node) Args() []string {
	var cidrs []string
	for _, p := range n.PodCIDRs {
		cidrs = append(cidrs, p.String())
	}
	args := []string{"--node-name", n.NodeName, "--pod-cidrs", strings.Join(cidrs, ",")}
	if n.Manifests != "" {
		args = append(args, "--manifests", n.Manifests)
	}
	return append(append(args,
		"--cgroup", n.cgroup.Path, "--socket", n.Socket, "--bpffs", n.BPFFS, "--state-dir", n.StateDir,
		"--metrics-address", "127.0.0.1:9964", "--conntrack-max-entries", "131072", "--log-level", "debug",
	), n.Flags...)
}

// Drops are the daemon's metrics of dropped packets, a line each, or why they cannot be had.
func (n *Node) Drops() (lines string) {
	metrics, err := n.Get("http://127.0.0.1:9964/metrics")
	if err != nil {
		return err.Error()
	}
	for line := range strings.Lines(metrics) {
		if strings.HasPrefix(line, "mooring_dropped_packets_total{") {
			lines += line
		}
	}
	return lines
}

// Launch starts the daemon and does not wait for it.
func (n *Node) Launch() *netns.Process {
	n.t.Helper()
	n.daemon = n.Start(n.t, filepath.Join(n.Programs, "mooringd"), n.Args()...)
	return n.daemon
}

// startLimit is how long the daemon may take to load its programs.
func startLimit() time.Duration {
	if os.Getenv("MOORING_KERNEL") != "" {
		return 4 * time.Minute // emulated
	}
	return 2 * time.Minute // that nothing but a machine busy with other work comes near to
}

// Up starts the daemon and waits until all services are in the datapath.
func (n *Node) Up() {
	n.t.Helper()
	p := n.Launch()
	for end := time.Now().Add(startLimit()); ; time.Sleep(10 * time.Millisecond) {
		select {
		case <-p.Done():
			n.t.Fatalf("mooringd ended: %v\n%s", p.Wait(), p.Output())
		default:
		}
		if _, err := n.Get("http://127.0.0.1:9964/readyz"); err == nil {
			return
		} else if time.Now().After(end) {
			n.t.Fatalf("mooringd is not ready: %v\n%s", err, p.Output())
		}
	}
}

// Down ends the daemon by SIGTERM and says how it ended.
func (n *Node) Down() error { return n.daemon.Stop() }

// Crash ends the daemon by SIGKILL.
func (n *Node) Crash() { n.daemon.Kill() }

// Daemon is the process that was started last.
func (n *Node) Daemon() *netns.Process { return n.daemon }

// EnterCgroup puts this process, and so the sockets that it makes from now on in
// any namespace, where the daemon's programs of cgroups see them.
func (n *Node) EnterCgroup() {
	n.t.Helper()
	n.cgroup.Enter(n.t)
}

// API is a client of the daemon.
func (n *Node) API() *api.Client { return api.NewClient(n.Socket) }

// Write makes a manifest, in one step as an editor does.
func (n *Node) Write(name, content string) {
	n.t.Helper()
	path := filepath.Join(n.Manifests, name)
	hidden := filepath.Join(n.Manifests, "."+name)
	if err := os.WriteFile(hidden, []byte(content), 0o644); err != nil {
		n.t.Fatalf("write manifest: %v", err)
	}
	if err := os.Rename(hidden, path); err != nil {
		n.t.Fatalf("write manifest: %v", err)
	}
}

// Mooring runs the command line client.
func (n *Node) Mooring(args ...string) (string, error) {
	c := n.Command(filepath.Join(n.Programs, "mooring"), append([]string{"--socket", n.Socket}, args...)...)
	out, err := c.Output()
	return string(out), err
}

// cni calls the plugin as a container runtime does.
func (n *Node) cni(verb string, p *Pod) ([]byte, error) {
	stanza, err := json.Marshal(map[string]any{
		"cniVersion": "1.1.0", "name": "mooring", "type": "mooring-cni",
		"socket": n.Socket, "bpffs": n.BPFFS, "ipam": map[string]any{"type": "mooring-ipam"},
	})
	if err != nil {
		return nil, err
	}
	c := n.Command(filepath.Join(n.Programs, "mooring-cni"))
	c.Stdin = strings.NewReader(string(stanza))
	c.Env = append(os.Environ(), "CNI_COMMAND="+verb, "CNI_CONTAINERID="+p.ID, "CNI_NETNS="+p.Path(), "CNI_IFNAME=eth0", "CNI_PATH="+n.Programs,
		fmt.Sprintf("CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=%s;K8S_POD_NAME=%s;K8S_POD_INFRA_CONTAINER_ID=%s", p.namespace, p.name, p.ID))
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("%s of pod %s: %w: %s", verb, p.name, err, out)
	}
	return out, nil
}

// AddPod makes a pod: of the namespace default, or NAMESPACE/POD.
func (n *Node) AddPod(name string) *Pod {
	n.t.Helper()
	p := n.NewPod(name)
	if err := n.Attach(p); err != nil {
		n.t.Fatalf("%v", err)
	}
	n.pods[name] = p
	return p
}

// NewPod is AddPod before ADD.
func (n *Node) NewPod(name string) *Pod {
	n.t.Helper()
	namespace, short, given := strings.Cut(name, "/")
	if !given {
		namespace, short = "default", name
	}
	flat := strings.ReplaceAll(name, "/", "-")
	return &Pod{NS: netns.Empty(n.t, flat), ID: "container-" + flat, namespace: namespace, name: short}
}

// Attach connects a pod's namespace: ADD.
func (n *Node) Attach(p *Pod) error {
	out, err := n.cni("ADD", p)
	if err != nil {
		return err
	}
	var result struct {
		IPs []struct {
			Address netip.Prefix `json:"address"`
		} `json:"ips"`
	}
	if err := json.Unmarshal(out, &result); err != nil {
		return fmt.Errorf("result of ADD: %w", err)
	}
	for _, ip := range result.IPs {
		if addr := ip.Address.Addr(); addr.Is4() {
			p.IP = addr
		} else {
			p.IP6 = addr
		}
	}
	if !p.IP.IsValid() || !p.IP6.IsValid() {
		return fmt.Errorf("result of ADD has not both families: %s", out)
	}
	return nil
}

// DeletePod disconnects a pod: DEL.
func (n *Node) DeletePod(name string) {
	n.t.Helper()
	p := n.Pod(name)
	if _, err := n.cni("DEL", p); err != nil {
		n.t.Fatalf("%v", err)
	}
	delete(n.pods, name)
}

// Pod is a pod by its name.
func (n *Node) Pod(name string) *Pod {
	n.t.Helper()
	p := n.pods[name]
	if p == nil {
		n.t.Fatalf("there is no pod %q", name)
	}
	return p
}

// Place is where a script's command happens: a pod, "node" or "outside".
func (n *Node) Place(name string) *netns.NS {
	n.t.Helper()
	switch name {
	case "node":
		return n.NS
	case "outside":
		return n.Outside.NS
	}
	return n.Pod(name).NS
}
