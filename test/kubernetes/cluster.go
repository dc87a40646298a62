// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mooring-cni/mooring/test/containerd"
	"github.com/mooring-cni/mooring/test/netns"
)

// Where the cluster's services and pods are.
const (
	ServiceCIDRs = "10.96.0.0/16,fd00:10:96::/112"
	PodCIDRs     = "10.244.0.0/16,fd00:10:244::/56"
	APIServerIP  = "10.96.0.1"
	DNSIP        = "10.96.0.10"
)

// server is where the API server is, in the nodes' network and outside of all
// of them.
const server = "https://" + netns.Router + ":6443"

// Cluster is a control plane and its nodes.
type Cluster struct {
	Outside  *netns.Outside // where the control plane runs, and clients from elsewhere
	Programs *containerd.Programs
	Nodes    []*Node

	t         netns.T
	dir       string
	bin       string // Kubernetes' programs
	cgroup    *netns.Cgroup
	authority *authority
	processes map[string]*netns.Process
	files     int // that pods were told of
}

// Start builds what is missing and brings a control plane and n nodes up. The
// nodes register, and become ready when a CNI configuration is installed.
func Start(t netns.T, n int) *Cluster {
	t.Helper()
	return start(t, n, false)
}

// StartHosts is Start for pods that mount directories of their node: each node
// has its own under the names that Host gives.
func StartHosts(t netns.T, n int) *Cluster {
	t.Helper()
	return start(t, n, true)
}

func start(t netns.T, n int, hosts bool) *Cluster {
	t.Helper()
	root, err := containerd.ModuleRoot()
	if err != nil {
		t.Fatalf("%v", err)
	}
	c := &Cluster{t: t, processes: map[string]*netns.Process{}, bin: buildPrograms(t, root, packages), Programs: containerd.Build(t)}
	c.dir = netns.Directory(t, "cluster")
	c.Outside = netns.NewOutside(t)
	c.cgroup = netns.NewCgroup(t, "control")
	if err := c.issue(n); err != nil {
		t.Fatalf("make the cluster's certificates: %v", err)
	}
	c.startControlPlane()
	for range n {
		c.addNode(hosts)
	}
	c.ranges()
	return c
}

func (c *Cluster) path(parts ...string) string {
	return filepath.Join(append([]string{c.dir}, parts...)...)
}

// users of the API, by the file of their certificate.
func users(nodes int) map[string][2]string {
	all := map[string][2]string{
		"admin":                   {"admin", "system:masters"},
		"kube-controller-manager": {"system:kube-controller-manager", "system:controllers"},
		"kube-scheduler":          {"system:kube-scheduler", "system:schedulers"},
		"apiserver-kubelet":       {"apiserver-kubelet", "system:masters"},
		"mooring":                 {"system:serviceaccount:kube-system:mooring", "system:serviceaccounts"},
	}
	for i := range nodes {
		name := nodeName(i)
		all[name] = [2]string{"system:node:" + name, "system:nodes"}
	}
	return all
}

func nodeName(i int) string { return "node-" + string(rune('a'+i)) }

func (c *Cluster) issue(nodes int) (err error) {
	if c.authority, err = newAuthority(c.path("pki")); err != nil {
		return err
	}
	err = c.authority.server("apiserver",
		[]string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"},
		[]string{"127.0.0.1", APIServerIP, netns.Router, netns.Router6})
	if err != nil {
		return err
	}
	for file, user := range users(nodes) {
		if err := c.authority.client(file, user[0], user[1]); err != nil {
			return err
		}
		if err := c.authority.kubeconfig(c.Kubeconfig(file), server, file); err != nil {
			return err
		}
	}
	return nil
}

// Kubeconfig is the file by which a user reaches the API: "admin", "node-a", or
// "mooring" for the service account of the daemons.
func (c *Cluster) Kubeconfig(user string) string { return c.path(user + ".kubeconfig") }

// run starts a program of the control plane.
func (c *Cluster) run(name string, args ...string) {
	c.t.Helper()
	c.processes[name] = c.Outside.Command(filepath.Join(c.bin, name), args...).In(c.cgroup).Background(c.t)
}

func (c *Cluster) startControlPlane() {
	c.t.Helper()
	c.run("etcd", "--name=etcd", "--data-dir="+c.path("etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
		"--initial-cluster=etcd=http://127.0.0.1:2380")
	c.StartAPIServer()
	c.run("kube-controller-manager", "--kubeconfig="+c.Kubeconfig("kube-controller-manager"), "--use-service-account-credentials=true",
		"--service-account-private-key-file="+c.authority.path("sa.key"), "--root-ca-file="+c.authority.path("ca.crt"),
		"--allocate-node-cidrs=true", "--cluster-cidr="+PodCIDRs, "--service-cluster-ip-range="+ServiceCIDRs,
		"--node-cidr-mask-size-ipv4=24", "--node-cidr-mask-size-ipv6=64",
		"--leader-elect=false", "--bind-address=127.0.0.1", "--node-monitor-grace-period=120s")
	c.run("kube-scheduler", "--kubeconfig="+c.Kubeconfig("kube-scheduler"), "--leader-elect=false", "--bind-address=127.0.0.1")
	c.Eventually(5*time.Minute, "the default service account is there", func() bool {
		_, err := c.Try("get", "serviceaccount", "default")
		return err == nil
	})
}

// StartAPIServer starts the API server, for the first time or after StopAPIServer.
func (c *Cluster) StartAPIServer() {
	c.t.Helper()
	a := c.authority
	c.run("kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--advertise-address="+netns.Router, "--secure-port=6443",
		"--tls-cert-file="+a.path("apiserver.crt"), "--tls-private-key-file="+a.path("apiserver.key"), "--client-ca-file="+a.path("ca.crt"),
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+a.path("sa.pub"),
		"--service-account-signing-key-file="+a.path("sa.key"),
		"--kubelet-client-certificate="+a.path("apiserver-kubelet.crt"), "--kubelet-client-key="+a.path("apiserver-kubelet.key"),
		"--kubelet-preferred-address-types=InternalIP", "--authorization-mode=Node,RBAC",
		"--service-cluster-ip-range="+ServiceCIDRs, "--allow-privileged=true", "--shutdown-delay-duration=0s")
	c.Eventually(5*time.Minute, "the API server is ready", func() bool {
		out, err := c.Try("get", "--raw=/readyz")
		return err == nil && out == "ok"
	})
}

// StopAPIServer ends the API server, as an outage does.
func (c *Cluster) StopAPIServer() { c.processes["kube-apiserver"].Kill() }

// Eventually waits for a condition and fails the test that started the cluster.
func (c *Cluster) Eventually(limit time.Duration, what string, f func() bool) {
	c.t.Helper()
	end := time.Now().Add(limit)
	for !f() {
		if time.Now().After(end) {
			c.t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// Try runs kubectl and returns what it prints.
func (c *Cluster) Try(args ...string) (string, error) { return c.kubectl("", args...) }

func (c *Cluster) kubectlCommand(args ...string) *netns.Cmd {
	return c.Outside.Command(filepath.Join(c.bin, "kubectl"), append([]string{"--kubeconfig=" + c.Kubeconfig("admin")}, args...)...)
}

func (c *Cluster) kubectl(input string, args ...string) (string, error) {
	command := c.kubectlCommand(args...)
	var out, complaint bytes.Buffer
	command.Stdout, command.Stderr, command.Stdin = &out, &complaint, strings.NewReader(input)
	if err := command.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(complaint.String()))
	}
	return out.String(), nil
}

// Kubectl runs kubectl, which must do what it is asked.
func (c *Cluster) Kubectl(t netns.T, args ...string) string {
	t.Helper()
	out, err := c.Try(args...)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return out
}

// Apply applies manifests.
func (c *Cluster) Apply(t netns.T, manifests string) {
	t.Helper()
	if _, err := c.kubectl(manifests, "apply", "-f", "-"); err != nil {
		t.Fatalf("%v", err)
	}
}

// Node is a node with its kubelet, its runtime and, when it was started, its
// mooringd.
type Node struct {
	*netns.Node
	Runtime *containerd.Runtime
	Daemon  *containerd.Daemon

	cluster *Cluster
	kubelet *netns.Process
}

// Host is where every node has a directory of its own: "bin" and "net.d" of the
// runtime, "run", "state", "bpf", and "cgroup".
func (c *Cluster) Host(name string) string { return c.path("host", name) }

func (c *Cluster) addNode(hosts bool) {
	c.t.Helper()
	n := &Node{Node: c.Outside.Node(c.t), cluster: c}
	if hosts {
		n.OwnMounts(c.t)
	}
	n.Runtime = containerd.Start(c.t, n.Node, c.Programs)
	if hosts {
		n.bindHost()
	}
	if err := n.configure(); err != nil {
		c.t.Fatalf("configure the kubelet of %s: %v", n.NodeName, err)
	}
	n.StartKubelet()
	c.Nodes = append(c.Nodes, n)
}

// ranges waits until the nodes have pod ranges: which ones, the controller says.
func (c *Cluster) ranges() {
	c.t.Helper()
	for _, n := range c.Nodes {
		c.Eventually(5*time.Minute, n.NodeName+" has a pod range of each family", func() bool {
			out, err := c.Try("get", "node", n.NodeName, "-o", "jsonpath={.spec.podCIDRs[*]}")
			if err != nil || len(strings.Fields(out)) != 2 {
				return false
			}
			n.PodCIDRs = nil
			for text := range strings.FieldsSeq(out) {
				prefix, err := netip.ParsePrefix(text)
				if err != nil {
					c.t.Fatalf("%s has the pod ranges %s: %v", n.NodeName, out, err)
				}
				n.PodCIDRs = append(n.PodCIDRs, prefix)
			}
			return true
		})
	}
}

// bindHost shows the node's directories where Host says.
func (n *Node) bindHost() {
	t := n.cluster.t
	t.Helper()
	run := filepath.Join(n.Dir, "run")
	for name, directory := range map[string]string{
		"bin": n.Runtime.BinDir, "net.d": n.Runtime.ConfDir, "run": run, "state": n.StateDir, "bpf": n.BPFFS, "cgroup": n.Runtime.Cgroup.Path,
	} {
		for _, path := range []string{run, n.cluster.Host(name)} {
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatalf("make %s: %v", n.NodeName, err)
			}
		}
		n.Bind(t, directory, n.cluster.Host(name))
	}
}

func (n *Node) path(parts ...string) string {
	return filepath.Join(append([]string{n.Dir, "kubelet"}, parts...)...)
}

func (n *Node) configure() error {
	for _, dir := range []string{"root", "manifests", "logs", "volumes"} {
		if err := os.MkdirAll(n.path(dir), 0o755); err != nil {
			return err
		}
	}
	return os.WriteFile(n.path("kubelet.yaml"), fmt.Appendf(nil, `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}, x509: {clientCAFile: %q}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: %q
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: "unix://%s"
address: %s
healthzBindAddress: 127.0.0.1
readOnlyPort: 0
oomScoreAdj: 0
staticPodPath: %q
podLogsDir: %q
volumePluginDir: %q
clusterDNS: [%q]
clusterDomain: cluster.local
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 50Mi, nodefs.available: 1%%, imagefs.available: 1%%, nodefs.inodesFree: 1%%}
nodeStatusUpdateFrequency: 2s
syncFrequency: 5s
fileCheckFrequency: 2s
`, n.cluster.authority.path("ca.crt"), n.Runtime.Cgroup.Name, n.Runtime.Socket, n.IP,
		n.path("manifests"), n.path("logs"), n.path("volumes"), DNSIP), 0o644)
}

// StartKubelet starts the kubelet, for the first time or after StopKubelet.
func (n *Node) StartKubelet() {
	n.cluster.t.Helper()
	n.kubelet = n.Command(filepath.Join(n.cluster.bin, "kubelet"), "--config="+n.path("kubelet.yaml"),
		"--kubeconfig="+n.cluster.Kubeconfig(n.NodeName), "--root-dir="+n.path("root"), "--cert-dir="+n.path("pki"),
		"--hostname-override="+n.NodeName, "--node-ip="+n.IP.String()+","+n.IP6.String()).In(n.Runtime.Cgroup).Background(n.cluster.t)
}

// StopKubelet ends the kubelet. Its pods go on.
func (n *Node) StopKubelet() error { return n.kubelet.Stop() }

// StartMooring starts the node's mooringd as a process beside the kubelet.
func (n *Node) StartMooring(keys string) {
	n.cluster.t.Helper()
	n.Daemon = n.Runtime.StartDaemon(n.cluster.t, fmt.Sprintf("kubeconfig: %s\n%s", n.cluster.Kubeconfig("mooring"), keys))
}
