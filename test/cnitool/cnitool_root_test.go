// SPDX-License-Identifier: Apache-2.0

//go:build root

package cnitool

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/ipam"
	"github.com/mooring-cni/mooring/test/netns"
)

// programs is where the project's own programs are, built once.
var programs = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "mooring-cnitool-")
	if err != nil {
		return "", err
	}
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", dir+"/", "./plugins/...", "./daemon/mooringd")
	build.Dir = filepath.Join("..", "..")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return "", fmt.Errorf("build the programs: %w\n%s", err, out)
	}
	return dir, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, err := programs(); err == nil {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

// node is a node with a daemon, a service and a CNI configuration.
type node struct {
	*netns.Node
	t          *testing.T
	programs   string
	references string
	network    string
	daemon     *netns.Process
	flags      []string
}

const service = `
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  selector: {app: web}
  ipFamilyPolicy: RequireDualStack
  ipFamilies: [IPv4, IPv6]
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:10:96::10"]
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: default, labels: {app: web}}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: default, labels: {app: client}}
`

var clusterIPs = []string{"10.96.0.10", "fd00:10:96::10"}

func newNode(t *testing.T, flags ...string) *node {
	t.Helper()
	n := &node{Node: netns.NewNode(t), t: t}
	var err error
	if n.programs, err = programs(); err != nil {
		t.Fatal(err)
	}
	if n.references, err = References(); err != nil {
		t.Fatal(err)
	}
	// cnitool keeps results of all networks in one place, by their names.
	n.network = filepath.Base(n.Dir)
	for _, dir := range []string{"manifests", "net.d"} {
		if err := os.Mkdir(filepath.Join(n.Dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.write("manifests/web.yaml", service)
	n.flags = append([]string{"--cgroup", netns.NewCgroup(t, "node").Path, "--node-name", n.NodeName, "--manifests", filepath.Join(n.Dir, "manifests"),
		"--pod-cidrs", fmt.Sprint(n.PodCIDRs[0], ",", n.PodCIDRs[1]), "--socket", n.Socket, "--bpffs", n.BPFFS, "--state-dir", n.StateDir,
		"--conntrack-max-entries", "65536", "--log-level", "debug"}, flags...)
	n.up(t)
	return n
}

// up starts the daemon.
func (n *node) up(t *testing.T) {
	t.Helper()
	n.daemon = n.Start(t, filepath.Join(n.programs, "mooringd"), n.flags...)
	netns.Eventually(t, time.Minute, "mooringd is ready", func() bool {
		_, err := n.Get("http://127.0.0.1:9964/readyz")
		return err == nil
	})
}

func (n *node) write(name, content string) {
	n.t.Helper()
	if err := os.WriteFile(filepath.Join(n.Dir, name), []byte(content), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

// configure writes the node's only CNI configuration: mooring-cni with more
// keys, and other plugins after it.
func (n *node) configure(version, more string, others ...string) {
	n.t.Helper()
	first := fmt.Sprintf(`{"type": "mooring-cni", "socket": %q%s}`, n.Socket, more)
	n.write("net.d/10-mooring.conflist", fmt.Sprintf(`{"cniVersion": %q, "name": %q, "plugins": [%s]}`,
		version, n.network, strings.Join(append([]string{first}, others...), ", ")))
}

// pod is a namespace and what cnitool is told of it.
type pod struct {
	*netns.NS
	node         *node
	name         string
	capabilities string // CAP_ARGS
	result       *current.Result
}

func (n *node) pod(t *testing.T, name string) *pod {
	t.Helper()
	return &pod{NS: netns.Empty(t, name), node: n, name: name}
}

// cnitool runs one verb.
func (p *pod) cnitool(verb string) (string, error) {
	cmd := p.node.Command(filepath.Join(p.node.references, "cnitool"), verb, p.node.network, p.Path())
	cmd.Env = append(os.Environ(), "CNI_PATH="+p.node.programs+":"+p.node.references, "NETCONFPATH="+filepath.Join(p.node.Dir, "net.d"),
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME="+p.name, "CAP_ARGS="+p.capabilities)
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("cnitool %s: %w: %s", verb, err, complaint.String())
	}
	return string(out), err
}

func (p *pod) do(t *testing.T, verbs ...string) {
	t.Helper()
	for _, verb := range verbs {
		out, err := p.cnitool(verb)
		if err != nil {
			t.Fatal(err)
		}
		if verb != "add" {
			continue
		}
		raw, err := create.CreateFromBytes([]byte(out))
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if p.result, err = current.NewResultFromResult(raw); err != nil {
			t.Fatal(err)
		}
	}
}

func (p *pod) ips() (ips []netip.Addr) {
	for _, c := range p.result.IPs {
		ip, _ := netip.AddrFromSlice(c.Address.IP)
		ips = append(ips, ip.Unmap())
	}
	return ips
}

func url(ip string, port uint16) string {
	return "http://" + netip.AddrPortFrom(netip.MustParseAddr(ip), port).String() + "/"
}

// serves waits until the service has the pod behind it, and asks it.
func serves(t *testing.T, client *pod, ips ...string) {
	t.Helper()
	for _, ip := range ips {
		var body string
		var err error
		netns.Eventually(t, 5*time.Second, "the service answers on "+ip, func() bool {
			body, err = client.Get(url(ip, 80))
			return err == nil
		})
		if !strings.Contains(body, "web") {
			t.Errorf("%s: %q", ip, body)
		}
	}
}

// left fails the test when anything of a pod is left on the node.
func (n *node) left(t *testing.T) {
	t.Helper()
	for _, name := range n.Links(t) {
		if name != netns.Uplink {
			t.Errorf("interface %s is left", name)
		}
	}
	if pins, err := bpf.EndpointLinks(n.BPFFS); err != nil || len(pins) > 0 {
		t.Errorf("pins of %v are left, %v", pins, err)
	}
	pool, err := ipam.Open(n.StateDir, n.PodCIDRs)
	if err != nil {
		t.Fatal(err)
	}
	if given, err := pool.List(t.Context()); err != nil || len(given) > 0 {
		t.Errorf("addresses are left: %v, %v", given, err)
	}
	client := api.NewClient(n.Socket)
	defer client.Close()
	if endpoints, err := client.Endpoints(t.Context()); err != nil || len(endpoints) > 0 {
		t.Errorf("endpoints are left: %v, %v", endpoints, err)
	}
	var connections []string
	for c, err := range client.Connections(t.Context(), api.Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		connections = append(connections, c.Type+" "+c.Source+" "+c.Destination)
	}
	if len(connections) > 0 {
		t.Errorf("connections are left: %v", connections)
	}
	if files, err := filepath.Glob(filepath.Join(n.Dir, "host-local", "*", "*.*.*.*")); err != nil || len(files) > 0 {
		t.Errorf("addresses of host-local are left: %v, %v", files, err)
	}
}

func TestTwoPodsAndAServiceInEverySpecVersion(t *testing.T) {
	n := newNode(t)
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			n.configure(version, "")
			web, client := n.pod(t, "web"), n.pod(t, "client")
			if version >= "1.1.0" {
				web.do(t, "status")
			}
			web.do(t, "add")
			client.do(t, "add")
			netns.HTTPEcho(t, web.NS, "[::]:8080", "web")
			serves(t, client, clusterIPs...)
			for _, ip := range web.ips() {
				if _, err := client.Get(url(ip.String(), 8080)); err != nil {
					t.Errorf("from pod to pod: %v", err)
				}
			}
			if version != "0.3.1" {
				web.do(t, "check")
				client.do(t, "check")
			}
			client.do(t, "del", "del")
			if version >= "1.1.0" {
				web.do(t, "gc") // cnitool names no attachment as valid
				if web.HasLink("eth0") {
					t.Error("GC has left the pod's interface")
				}
			}
			web.do(t, "del")
			n.left(t)
		})
	}
}

func TestFamiliesAndIPAMPlugins(t *testing.T) {
	n := newNode(t)
	own := func(cidrs string) string {
		return fmt.Sprintf(`, "ipam": {"type": "mooring-ipam", "podCIDRs": %s}`, cidrs)
	}
	hostLocal := func(ranges string) string {
		return fmt.Sprintf(`, "ipam": {"type": "host-local", "dataDir": %q, "ranges": %s}`, filepath.Join(n.Dir, "host-local"), ranges)
	}
	static := func(addresses ...string) string {
		var list []string
		for _, a := range addresses {
			list = append(list, fmt.Sprintf(`{"address": %q}`, a))
		}
		return `, "ipam": {"type": "static", "addresses": [` + strings.Join(list, ", ") + `], "dns": {"nameservers": ["10.96.0.53"]}}`
	}
	for _, test := range []struct {
		name        string
		web, client string // the ipam key
		services    []string
		wantWeb     []string
	}{
		{"mooring-ipam, IPv4", own(`["10.244.0.0/24"]`), own(`["10.244.0.0/24"]`), clusterIPs[:1], nil},
		{"mooring-ipam, IPv6", own(`["fd00:10:244::/64"]`), own(`["fd00:10:244::/64"]`), clusterIPs[1:], nil},
		{"mooring-ipam, dual stack", own(`["10.244.0.0/24", "fd00:10:244::/64"]`), own(`["10.244.0.0/24", "fd00:10:244::/64"]`), clusterIPs, nil},
		{"host-local, IPv4", hostLocal(`[[{"subnet": "10.244.0.0/24", "rangeStart": "10.244.0.50"}]]`), hostLocal(`[[{"subnet": "10.244.0.0/24"}]]`), clusterIPs[:1], []string{"10.244.0.50"}},
		{"host-local, IPv6", hostLocal(`[[{"subnet": "fd00:10:244::/64"}]]`), hostLocal(`[[{"subnet": "fd00:10:244::/64"}]]`), clusterIPs[1:], nil},
		{"host-local, dual stack", hostLocal(`[[{"subnet": "10.244.0.0/24"}], [{"subnet": "fd00:10:244::/64"}]]`), hostLocal(`[[{"subnet": "10.244.0.0/24"}], [{"subnet": "fd00:10:244::/64"}]]`), clusterIPs, nil},
		{"static, IPv4", static("10.244.0.60/24"), static("10.244.0.61/24"), clusterIPs[:1], []string{"10.244.0.60"}},
		{"static, IPv6", static("fd00:10:244::60/64"), static("fd00:10:244::61/64"), clusterIPs[1:], []string{"fd00:10:244::60"}},
		{"static, dual stack", static("10.244.0.60/24", "fd00:10:244::60/64"), static("10.244.0.61/24", "fd00:10:244::61/64"), clusterIPs, []string{"10.244.0.60", "fd00:10:244::60"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			web, client := n.pod(t, "web"), n.pod(t, "client")
			n.configure("1.1.0", test.web)
			web.do(t, "status", "add", "check")
			n.configure("1.1.0", test.client)
			client.do(t, "add", "check")
			var got []string
			for _, ip := range web.ips() {
				got = append(got, ip.String())
			}
			if test.wantWeb != nil && !slices.Equal(got, test.wantWeb) {
				t.Errorf("addresses %v, want %v", got, test.wantWeb)
			}
			if len(got) != len(test.services) {
				t.Errorf("addresses %v for services %v", got, test.services)
			}
			if strings.HasPrefix(test.name, "static") && !slices.Equal(web.result.DNS.Nameservers, []string{"10.96.0.53"}) {
				t.Errorf("DNS %+v", web.result.DNS)
			}
			netns.HTTPEcho(t, web.NS, "[::]:8080", "web")
			serves(t, client, test.services...)
			client.do(t, "del")
			web.do(t, "del", "del")
			n.left(t)
		})
	}
}

const portmap = `{"type": "portmap", "capabilities": {"portMappings": true}}`
const bandwidth = `{"type": "bandwidth", "capabilities": {"bandwidth": true}}`

// The keys are as containerd sends them.
func TestPortmapLeadsToThePodFromTheNodeAndFromOutside(t *testing.T) {
	n := newNode(t)
	for _, version := range []string{"0.4.0", "1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			n.configure(version, "", portmap)
			web := n.pod(t, "web")
			web.capabilities = `{"portMappings": [{"HostPort": 8088, "ContainerPort": 8080, "Protocol": "tcp", "HostIP": ""}]}`
			web.do(t, "add", "check")
			netns.HTTPEcho(t, web.NS, "[::]:8080", "web")
			for _, from := range []*netns.NS{n.Outside.NS, n.NS} {
				for _, ip := range []netip.Addr{n.IP, n.IP6} {
					if body, err := from.Get(url(ip.String(), 8088)); err != nil || !strings.Contains(body, "web") {
						t.Errorf("host port from %s to %s: %q, %v", from.Name(), ip, body, err)
					}
				}
			}
			web.do(t, "del")
			n.left(t)
		})
	}
}

func TestBandwidthLimitsWhatThePodGets(t *testing.T) {
	n := newNode(t)
	n.configure("1.0.0", "", portmap, bandwidth)
	web := n.pod(t, "web")
	// A burst that does not fit 32 bits with a sign is what containerd sends for
	// a pod that has a rate alone.
	web.capabilities = `{"portMappings": [], "bandwidth": {"IngressRate": 10000000, "IngressBurst": 4294967295, "EgressRate": 10000000, "EgressBurst": 4294967295}}`
	web.do(t, "add", "check")
	netns.HTTPEcho(t, web.NS, "[::]:8080", "web")
	host := web.result.Interfaces[0].Name
	if qdiscs := n.Sh(t, "tc qdisc show dev "+host); !strings.Contains(qdiscs, "tbf") {
		t.Errorf("%s has no limit: %s", host, qdiscs)
	}
	for _, ip := range web.ips() {
		if _, err := n.Get(url(ip.String(), 8080)); err != nil {
			t.Error(err)
		}
	}
	web.do(t, "del", "del")
	n.left(t)

	// And with a burst that 2 MiB exceed, the rate of 1 MB/s is kept both ways.
	web = n.pod(t, "web")
	web.capabilities = `{"bandwidth": {"IngressRate": 8000000, "IngressBurst": 800000, "EgressRate": 8000000, "EgressBurst": 800000}}`
	web.do(t, "add")
	bulk := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, 2<<20)) })
	netns.HTTP(t, web.NS, "[::]:8080", bulk)
	netns.HTTP(t, n.NS, "[::]:8081", bulk)
	for what, fetch := range map[string]func() (string, error){
		"from the pod": func() (string, error) { return n.Get(url(web.ips()[0].String(), 8080)) },
		"to the pod":   func() (string, error) { return web.Get(url(n.IP.String(), 8081)) },
	} {
		begin := time.Now()
		if body, err := fetch(); err != nil || len(body) != 2<<20 {
			t.Errorf("2 MiB %s: %d bytes, %v", what, len(body), err)
		} else if took := time.Since(begin); took < time.Second {
			t.Errorf("2 MiB %s took %v, as if there were no limit", what, took)
		}
	}
	web.do(t, "del")
	n.left(t)
}

// mooring-ipam serves other plugins as well.
func TestBridgeGetsItsAddressesFromMooringIPAM(t *testing.T) {
	n := newNode(t)
	n.write("net.d/10-bridge.conflist", fmt.Sprintf(`{"cniVersion": "1.1.0", "name": %q, "plugins": [
		{"type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "ipam": {"type": "mooring-ipam", "socket": %q}}]}`, n.network, n.Socket))
	a, b := n.pod(t, "a"), n.pod(t, "b")
	a.do(t, "status", "add", "check")
	b.do(t, "add", "check")
	if ips := slices.Concat(a.ips(), b.ips()); len(ips) != 4 || !n.PodCIDRs[0].Contains(ips[0]) || ips[0] == ips[2] {
		t.Errorf("addresses %v", ips)
	}
	netns.HTTPEcho(t, a.NS, "[::]:8080", "a")
	for _, ip := range a.ips() {
		if _, err := b.Get(url(ip.String(), 8080)); err != nil {
			t.Error(err)
		}
	}
	a.do(t, "del", "del")
	b.do(t, "gc", "del")
	n.Sh(t, "ip link del cni0")
	n.left(t)
}

func TestVersionNamesAllThatIsSpoken(t *testing.T) {
	dir, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	for _, plugin := range []string{"mooring-cni", "mooring-ipam"} {
		cmd := exec.Command(filepath.Join(dir, plugin))
		cmd.Env = []string{"CNI_COMMAND=VERSION"}
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		var answer struct{ SupportedVersions []string }
		if err := json.Unmarshal(out, &answer); err != nil || !slices.Equal(answer.SupportedVersions, []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}) {
			t.Errorf("%s: %s", plugin, out)
		}
	}
}
