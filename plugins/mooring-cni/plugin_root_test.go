// SPDX-License-Identifier: Apache-2.0

//go:build root

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/ipam"
	"github.com/mooring-cni/mooring/test/netns"
)

// Where a plugin that is a test fails or dies: "fail STEP" or "kill STEP".
const breakAfter = "MOORING_TEST_BREAK_AFTER"

// The test binary is the plugin, too: exec to exit, as a runtime has it.
func TestMain(m *testing.M) {
	if os.Getenv("CNI_COMMAND") == "" {
		os.Exit(m.Run())
	}
	if how, step, broken := strings.Cut(os.Getenv(breakAfter), " "); broken {
		afterStep = func(what string) error {
			switch {
			case what != step:
				return nil
			case how == "kill":
				syscall.Kill(os.Getpid(), syscall.SIGKILL)
			}
			return errors.New("the test wants it so")
		}
	}
	main()
}

// call is one call of the plugin.
type call struct {
	node      *netns.Node
	verb      string
	container string
	netns     string
	ifname    string // eth0
	args      string // CNI_ARGS
	stdin     string
	env       []string
}

// plugin calls the plugin. It answers what it printed, and its error.
func (c call) plugin(t *testing.T) (string, *types.Error) {
	t.Helper()
	if c.ifname == "" {
		c.ifname = "eth0"
	}
	cmd := c.node.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+c.verb, "CNI_CONTAINERID="+c.container, "CNI_NETNS="+c.netns,
		"CNI_IFNAME="+c.ifname, "CNI_ARGS="+c.args, "CNI_PATH="+c.node.Dir)
	cmd.Env = append(cmd.Env, c.env...)
	cmd.Stdin = strings.NewReader(c.stdin)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	err := cmd.Run()
	if complaint.Len() > 0 {
		t.Logf("%s %s: %s", c.verb, c.container, complaint.String())
	}
	if err == nil {
		return out.String(), nil
	}
	answer := new(types.Error)
	if json.Unmarshal(out.Bytes(), answer) != nil {
		answer.Msg = fmt.Sprintf("%v: %s", err, out.String())
	}
	return out.String(), answer
}

// must calls the plugin, which must succeed.
func (c call) must(t *testing.T) string {
	t.Helper()
	out, err := c.plugin(t)
	if err != nil {
		t.Fatalf("%s %s: code %d: %s", c.verb, c.container, err.Code, err.Msg)
	}
	return out
}

// add adds a pod's interface, and answers the result.
func (c call) add(t *testing.T) *current.Result {
	t.Helper()
	c.verb = "ADD"
	return parseResult(t, c.must(t))
}

func parseResult(t *testing.T, out string) *current.Result {
	t.Helper()
	raw, err := create.CreateFromBytes([]byte(out))
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	result, err := current.NewResultFromResult(raw)
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return result
}

// with is the call with a verb, and for CHECK with what ADD has answered.
func (c call) with(verb string, previous *current.Result) call {
	c.verb = verb
	if previous != nil {
		var stdin map[string]any
		if err := json.Unmarshal([]byte(c.stdin), &stdin); err != nil {
			panic(err)
		}
		as, err := previous.GetAsVersion(stdin["cniVersion"].(string))
		if err != nil {
			panic(err)
		}
		stdin["prevResult"] = as
		text, _ := json.Marshal(stdin)
		c.stdin = string(text)
	}
	return c
}

// netconf is the stanza for the node, with more keys.
func netconf(node *netns.Node, version, more string) string {
	return fmt.Sprintf(`{"cniVersion": %q, "name": "mooring", "type": "mooring-cni", "socket": %q%s}`, version, node.Socket, more)
}

// pod makes a namespace and the call that adds it.
func pod(t *testing.T, node *netns.Node, container string) (*netns.NS, call) {
	t.Helper()
	ns := netns.Empty(t, container)
	return ns, call{
		node: node, container: container, netns: ns.Path(), stdin: netconf(node, "1.1.0", ""),
		args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + container + ";K8S_POD_UID=f1d2;K8S_POD_INFRA_CONTAINER_ID=" + container,
	}
}

// machine is all that an ADD can change.
type machine struct {
	Links, Addresses, Routes, Neighbours []string
	Pins                                 []string
	Entries                              []netip.Addr
	Given                                []string
	Endpoints                            []string
}

func look(t *testing.T, d *fakeDaemon, namespaces ...*netns.NS) machine {
	t.Helper()
	var m machine
	fatal := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, ns := range append([]*netns.NS{d.node.NS}, namespaces...) {
		h := ns.Netlink()
		links, err := h.LinkList()
		fatal(err)
		for _, l := range links {
			m.Links = append(m.Links, fmt.Sprint(ns.Name(), " ", l.Attrs().Name))
			addresses, err := h.AddrList(l, unix.AF_UNSPEC)
			fatal(err)
			for _, a := range addresses {
				m.Addresses = append(m.Addresses, fmt.Sprint(ns.Name(), " ", a.IP))
			}
			neighbours, err := h.NeighList(l.Attrs().Index, unix.AF_UNSPEC)
			fatal(err)
			for _, n := range neighbours {
				if n.State&netlink.NUD_PERMANENT != 0 {
					m.Neighbours = append(m.Neighbours, fmt.Sprint(ns.Name(), " ", l.Attrs().Name, " ", n.IP))
				}
			}
		}
		routes, err := h.RouteList(nil, unix.AF_UNSPEC)
		fatal(err)
		for _, r := range routes {
			m.Routes = append(m.Routes, fmt.Sprint(ns.Name(), " ", r.Dst))
		}
	}
	pins, err := bpf.EndpointLinks(d.node.BPFFS)
	fatal(err)
	m.Pins = pins
	m.Entries = d.entries(t)
	for _, a := range allocations(t, d.node) {
		m.Given = append(m.Given, fmt.Sprint(a.Key, a.Addrs))
	}
	for _, e := range d.Registry.List() {
		m.Endpoints = append(m.Endpoints, e.ContainerID)
	}
	return m
}

func allocations(t *testing.T, node *netns.Node) []ipam.Allocation {
	t.Helper()
	pool, err := ipam.Open(node.StateDir, node.PodCIDRs)
	if err != nil {
		t.Fatal(err)
	}
	list, err := pool.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return list
}

var compareAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func unchanged(t *testing.T, what string, before, after machine) {
	t.Helper()
	if diff := cmp.Diff(before, after, compareAddr); diff != "" {
		t.Errorf("%s leaves something (-before +after):\n%s", what, diff)
	}
}

func TestAddedPodsReachTheNodeAndEachOtherInBothFamilies(t *testing.T) {
	node := netns.NewNode(t)
	d := startDaemon(t, node)
	before := look(t, d)
	a, callA := pod(t, node, "a")
	b, callB := pod(t, node, "b")
	resultA, resultB := callA.add(t), callB.add(t)
	netns.HTTPEcho(t, a, "[::]:8080", "a")
	netns.HTTPEcho(t, b, "[::]:8080", "b")
	for _, ip := range resultA.IPs {
		for _, from := range []*netns.NS{node.NS, b} {
			body, err := from.Get("http://" + netip.AddrPortFrom(netip.MustParseAddr(ip.Address.IP.String()), 8080).String() + "/")
			if err != nil || !strings.Contains(body, "a") {
				t.Errorf("from %s: %q, %v", from.Name(), body, err)
			}
		}
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		neighbours, err := a.Netlink().NeighList(a.Link(t, "eth0").Attrs().Index, family)
		neighbours = slices.DeleteFunc(neighbours, func(n netlink.Neigh) bool { return n.State == netlink.NUD_NOARP }) // multicast
		if err != nil || len(neighbours) != 1 || neighbours[0].State != netlink.NUD_PERMANENT {
			t.Errorf("after traffic the pod has the neighbours %+v, %v", neighbours, err)
		}
	}
	if mtu := a.Link(t, "eth0").Attrs().MTU; mtu != 1400 {
		t.Errorf("MTU %d, the node says 1400", mtu)
	}
	if e := d.Registry.List()[0]; e.Pod.String() != "default/a" || e.PodUID != "f1d2" || e.Network != "mooring" || e.Netns != a.Path() {
		t.Errorf("the daemon has %+v", e)
	}
	callA.with("CHECK", resultA).must(t)
	callB.with("CHECK", resultB).must(t)
	callA.with("DEL", nil).must(t)
	callB.with("DEL", nil).must(t)
	unchanged(t, "ADD and DEL of two pods", before, look(t, d))
}

func TestResultIsInTheVersionAskedFor(t *testing.T) {
	node := netns.NewNode(t)
	startDaemon(t, node)
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		ns, c := pod(t, node, "v"+version)
		c.stdin = netconf(node, version, `, "mtu": 1300, "dns": {"nameservers": ["10.96.0.10"]}`)
		out := c.with("ADD", nil).must(t)
		var got struct{ CNIVersion string }
		if json.Unmarshal([]byte(out), &got); got.CNIVersion != version {
			t.Errorf("asked for %s, answered %s", version, out)
		}
		r := parseResult(t, out)
		host := r.Interfaces[0].Name
		if len(host) > 15 || !strings.HasPrefix(host, "lxc") || !node.HasLink(host) {
			t.Errorf("%s: host interface %q", version, host)
		}
		allocated := allocations(t, node)
		addrs := allocated[len(allocated)-1].Addrs
		mtu := 0 // older versions have none
		if version == "1.1.0" {
			mtu = 1300
		}
		want := &current.Result{
			CNIVersion: current.ImplementedSpecVersion,
			Interfaces: []*current.Interface{
				{Name: host, Mac: node.Link(t, host).Attrs().HardwareAddr.String(), Mtu: r.Interfaces[0].Mtu},
				{Name: "eth0", Mac: ns.Link(t, "eth0").Attrs().HardwareAddr.String(), Mtu: r.Interfaces[1].Mtu, Sandbox: ns.Path()},
			},
			IPs: []*current.IPConfig{
				{Interface: current.Int(1), Address: *ipnet(only(addrs[0])), Gateway: gateway4.AsSlice()},
				{Interface: current.Int(1), Address: *ipnet(only(addrs[1])), Gateway: gateway6.AsSlice()},
			},
			Routes: []*types.Route{
				{Dst: *ipnet(defaultOf(gateway4)), GW: gateway4.AsSlice()},
				{Dst: *ipnet(defaultOf(gateway6)), GW: gateway6.AsSlice()},
			},
			DNS: types.DNS{Nameservers: []string{"10.96.0.10"}},
		}
		if got, want := asJSON(r), asJSON(want); got != want {
			t.Errorf("%s: %s\nwant %s", version, got, want)
		}
		if version == "1.1.0" && r.Interfaces[1].Mtu != mtu {
			t.Errorf("MTU %d in %s", r.Interfaces[1].Mtu, version)
		}
		if at := ns.Link(t, "eth0").Attrs().MTU; at != 1300 {
			t.Errorf("%s: MTU %d", version, at)
		}
		if version != "0.3.1" {
			c.with("CHECK", r).must(t)
		}
		c.with("DEL", r).must(t)
	}
}

func asJSON(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(text)
}

func TestRepeatedAddReplacesTheInterfaceAndKeepsTheAddresses(t *testing.T) {
	node := netns.NewNode(t)
	d := startDaemon(t, node)
	ns, c := pod(t, node, "a")
	first := c.add(t)
	again := c.add(t)
	if asJSON(first) != asJSON(again) {
		t.Errorf("first %s\nthen %s", asJSON(first), asJSON(again))
	}
	if links := ns.Links(t); !slices.Equal(links, []string{"eth0"}) {
		t.Errorf("the pod has %v", links)
	}
	if n := d.Registry.Len(); n != 1 {
		t.Errorf("%d endpoints", n)
	}
	c.with("CHECK", again).must(t)
	// The daemon hears late that the first one is gone.
	time.Sleep(50 * time.Millisecond)
	d.Registry.Resync()
	c.with("CHECK", again).must(t)
}

func TestFailedAddLeavesNothing(t *testing.T) {
	node := netns.NewNode(t)
	d := startDaemon(t, node)
	_, other := pod(t, node, "other")
	other.add(t)
	steps := []string{"make the pair", "get addresses", "configure the pod's end", "tell the daemon", "attach the programs", "set the host's end up", "wait for the pod's end", "answer"}
	for _, step := range steps {
		ns, c := pod(t, node, "a")
		before := look(t, d, ns)
		c.env = []string{breakAfter + "=fail " + step}
		_, err := c.with("ADD", nil).plugin(t)
		if err == nil || step != "answer" && (err.Msg != "the test wants it so" || err.Code != types.ErrIOFailure) {
			t.Errorf("ADD that fails after %q: %+v", step, err)
		}
		after := look(t, d, ns)
		after.onlyLo(ns, before)
		unchanged(t, fmt.Sprintf("ADD that fails after %q", step), before, after)
		// What runtimes do next.
		c.env = nil
		c.with("DEL", nil).must(t)

		// Nobody takes back what a killed one has done, but the DEL after it.
		c.env = []string{breakAfter + "=kill " + step}
		if out, err := c.with("ADD", nil).plugin(t); err == nil || step != "answer" && out != "" {
			t.Errorf("ADD that is killed after %q: %+v %s", step, err, out)
		}
		c.env = nil
		c.with("DEL", nil).must(t)
		after = look(t, d, ns)
		after.onlyLo(ns, before)
		unchanged(t, fmt.Sprintf("DEL of an ADD that is killed after %q", step), before, after)

		// And some try the same again.
		c.env = []string{breakAfter + "=kill " + step}
		c.with("ADD", nil).plugin(t)
		c.env = nil
		r := c.add(t)
		c.with("CHECK", r).must(t)
		c.with("DEL", nil).must(t)
		after = look(t, d, ns)
		after.onlyLo(ns, before)
		unchanged(t, fmt.Sprintf("DEL of an ADD after one that is killed after %q", step), before, after)
	}
}

// onlyLo takes lo's own addresses, routes and so on out, where the pod had none
// before: an ADD sets lo up, and that is of no consequence.
func (m *machine) onlyLo(ns *netns.NS, before machine) {
	lo := func(s string) bool {
		return s == ns.Name()+" 127.0.0.1" || s == ns.Name()+" ::1" || s == ns.Name()+" ::1/128"
	}
	m.Addresses = slices.DeleteFunc(m.Addresses, func(s string) bool { return lo(s) && !slices.Contains(before.Addresses, s) })
	m.Routes = slices.DeleteFunc(m.Routes, func(s string) bool { return lo(s) && !slices.Contains(before.Routes, s) })
}

func TestDelSucceedsWhateverIsGone(t *testing.T) {
	node := netns.NewNode(t)
	d := startDaemon(t, node)
	before := look(t, d)
	for name, damage := range map[string]func(*testing.T, *netns.NS, *call){
		"nothing":           func(*testing.T, *netns.NS, *call) {},
		"the namespace":     func(t *testing.T, ns *netns.NS, _ *call) { ns.Delete(t) },
		"CNI_NETNS":         func(_ *testing.T, _ *netns.NS, c *call) { c.netns = "" },
		"the pod's end":     func(t *testing.T, ns *netns.NS, _ *call) { ns.Sh(t, "ip link del eth0") },
		"the pins":          func(t *testing.T, _ *netns.NS, c *call) { node.Sh(t, "rm "+node.BPFFS+"/v*/links/*") },
		"the addresses":     func(t *testing.T, _ *netns.NS, c *call) { os.RemoveAll(filepath.Join(node.StateDir, "ipam")) },
		"the endpoint":      func(t *testing.T, _ *netns.NS, c *call) { d.Registry.Delete(c.container, "eth0") },
		"the node file":     func(t *testing.T, _ *netns.NS, c *call) { os.Rename(node.Dir+"/mooring.json", node.Dir+"/away") },
		"all, a DEL before": func(t *testing.T, _ *netns.NS, c *call) { c.with("DEL", nil).must(t) },
	} {
		ns, c := pod(t, node, "a")
		c.add(t)
		damage(t, ns, &c)
		c.with("DEL", nil).must(t)
		if name == "the node file" {
			// Without it nobody knows where the addresses are kept.
			os.Rename(node.Dir+"/away", node.Dir+"/mooring.json")
			c.with("DEL", nil).must(t)
		}
		unchanged(t, "DEL when "+name+" is gone", before, look(t, d))
	}
	_, c := pod(t, node, "never")
	c.with("DEL", nil).must(t)
	unchanged(t, "DEL of what never was", before, look(t, d))
}

func TestDelSucceedsWithTheDaemonDown(t *testing.T) {
	node := netns.NewNode(t)
	d := startDaemon(t, node)
	before := look(t, d)
	_, c := pod(t, node, "a")
	c.add(t)
	d.Stop()
	within(t, 5*time.Second, "DEL with the daemon down", func() { c.with("DEL", nil).must(t) })
	if len(allocations(t, node)) != 0 {
		t.Errorf("addresses are left: %v", allocations(t, node))
	}
	if pins, err := bpf.EndpointLinks(node.BPFFS); len(pins) != 0 || err != nil {
		t.Errorf("pins are left: %v, %v", pins, err)
	}
	// The entries go when the daemon starts.
	unchanged(t, "DEL with the daemon down", before, look(t, startDaemon(t, node)))
}

func TestDelOfAHangingDaemonSucceeds(t *testing.T) {
	node := netns.NewNode(t)
	d := startDaemon(t, node)
	_, c := pod(t, node, "a")
	r := c.add(t)
	d.hang.Store(true)
	within(t, 2*daemonLimit, "DEL with a daemon that hangs", func() { c.with("DEL", nil).must(t) })
	if node.HasLink(r.Interfaces[0].Name) || len(allocations(t, node)) != 0 {
		t.Error("interface or addresses are left")
	}
}

func TestAddWithoutADaemonIsToldToTryAgainWithinASecond(t *testing.T) {
	node := netns.NewNode(t)
	_, c := pod(t, node, "a")
	expect := func(what, word string, limit time.Duration) {
		t.Helper()
		within(t, limit, "ADD with a daemon that is "+what, func() {
			_, err := c.with("ADD", nil).plugin(t)
			if err == nil || err.Code != types.ErrTryAgainLater || !strings.Contains(err.Msg, word) {
				t.Errorf("ADD with a daemon that is %s: %+v", what, err)
			}
		})
		if links := node.Links(t); slices.ContainsFunc(links, func(l string) bool { return strings.HasPrefix(l, "lxc") }) {
			t.Errorf("left: %v", links)
		}
	}
	expect("never started", "is not running", time.Second)
	d := startDaemon(t, node)
	reason := "the Node object has no podCIDRs yet"
	d.notReady.Store(&reason)
	expect("not ready", reason, time.Second)
	d.notReady.Store(nil)
	d.hang.Store(true)
	expect("hanging", "did not answer in time", 2*daemonLimit)
	d.Stop()
	expect("stopped", "is not running", time.Second)
}

func TestDaemonThatRefusesLeavesNothing(t *testing.T) {
	node := netns.NewNode(t)
	d := startDaemon(t, node)
	ns, c := pod(t, node, "a")
	before := look(t, d, ns)
	refusal := errors.New("map endpoints: no space")
	d.refuse.Store(&refusal)
	if _, err := c.with("ADD", nil).plugin(t); err == nil || !strings.Contains(err.Msg, refusal.Error()) {
		t.Errorf("%+v", err)
	}
	after := look(t, d, ns)
	after.onlyLo(ns, before)
	unchanged(t, "refused ADD", before, after)
}

func TestStatusSaysWhetherAnAddCanBeServed(t *testing.T) {
	node := netns.NewNode(t)
	status := call{node: node, verb: "STATUS", stdin: netconf(node, "1.1.0", "")}
	expect := func(what string, code uint, word string) {
		t.Helper()
		_, err := status.plugin(t)
		if err == nil || err.Code != code || !strings.Contains(err.Msg, word) {
			t.Errorf("STATUS, %s: %+v", what, err)
		}
	}
	expect("no daemon has ever run", types.ErrLimitedConnectivity, "is not running")
	d := startDaemon(t, node)
	status.must(t)
	reason := "it has its reasons"
	d.notReady.Store(&reason)
	expect("the daemon is not ready", types.ErrPluginNotAvailable, reason)
	d.notReady.Store(nil)
	status.must(t)
	if err := os.MkdirAll(node.StateDir+"/ipam", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(node.StateDir+"/ipam/allocations", []byte("rubbish\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	expect("the allocations do not read back", types.ErrPluginNotAvailable, "damaged")
	os.RemoveAll(node.StateDir + "/ipam")
	status.must(t)
	d.Stop()
	expect("the daemon is down, the datapath goes on", types.ErrPluginNotAvailable, "is not running")
	if err := bpf.Remove(node.BPFFS); err != nil {
		t.Fatal(err)
	}
	expect("the datapath is gone", types.ErrLimitedConnectivity, "no datapath is loaded")
}

func TestGCRemovesWhatIsNotValidAndNothingElse(t *testing.T) {
	node := netns.NewNode(t)
	d := startDaemon(t, node)
	_, kept := pod(t, node, "kept")
	keptResult := kept.add(t)
	_, elsewhere := pod(t, node, "elsewhere")
	elsewhere.stdin = strings.Replace(elsewhere.stdin, `"name": "mooring"`, `"name": "other"`, 1)
	elsewhereResult := elsewhere.add(t)
	before := look(t, d)

	_, gone := pod(t, node, "gone")
	gone.add(t)
	_, second := pod(t, node, "kept")
	second.ifname = "eth1"
	second.add(t)
	vanished, withoutLink := pod(t, node, "vanished")
	r := withoutLink.add(t)
	vanished.Sh(t, "ip link del eth0")
	netns.Eventually(t, time.Second, "the host's end goes with the pod's", func() bool { return !node.HasLink(r.Interfaces[0].Name) })

	gc := call{node: node, verb: "GC", stdin: netconf(node, "1.1.0", `, "cni.dev/valid-attachments": [{"containerID": "kept", "ifname": "eth0"}]`)}
	gc.must(t)
	unchanged(t, "GC", before, look(t, d))
	kept.with("CHECK", keptResult).must(t)
	elsewhere.with("CHECK", elsewhereResult).must(t)

	gone.add(t)
	d.Stop()
	gc.must(t)
	unchanged(t, "GC with the daemon down", before, look(t, startDaemon(t, node)))
	gc.stdin = netconf(node, "1.1.0", "")
	gc.must(t)
	if given := allocations(t, node); len(given) != 1 || given[0].Network != "other" {
		t.Errorf("after a GC without valid attachments: %v", given)
	}
}

func TestCheckFindsWhatIsDamaged(t *testing.T) {
	node := netns.NewNode(t)
	d := startDaemon(t, node)
	i := 0
	for damage, word := range map[string]string{
		"pod ip link set eth0 down":                               "is down",
		"pod ip addr del IP4/32 dev eth0":                         "has lost its address",
		"pod ip -6 addr del IP6/128 dev eth0":                     "has lost its address",
		"pod ip route del default":                                "route to 0.0.0.0/0",
		"pod ip -6 route del default":                             "route to ::/0",
		"pod ip neigh del 169.254.1.1 dev eth0":                   "neighbour 169.254.1.1",
		"pod ip neigh del fe80::1 dev eth0":                       "neighbour fe80::1",
		"pod ip link set eth0 address 0a:00:00:00:00:99":          "has the MAC",
		"pod ip link del eth0":                                    "is gone",
		"node ip link set HOST alias mine":                        "alias",
		"node ip link set HOST down":                              "is down",
		"node ip route del IP4":                                   "route to IP4/32",
		"node ip -6 route del IP6":                                "route to IP6/128",
		"node ip neigh del IP4 dev HOST":                          "neighbour IP4",
		"node rm " + node.BPFFS + "/v1/links/HOST-from_container": "from_container is not attached",
		"node rm " + node.BPFFS + "/v1/links/HOST-to_container":   "to_container is not attached",
		"daemon": "does not know container",
		"ipam":   "has no addresses",
	} {
		ns, c := pod(t, node, fmt.Sprint("a", i))
		i++
		r := c.add(t)
		c.with("CHECK", r).must(t)
		words := strings.NewReplacer("HOST", r.Interfaces[0].Name, "IP4", r.IPs[0].Address.IP.String(), "IP6", r.IPs[1].Address.IP.String())
		where, script, _ := strings.Cut(words.Replace(damage), " ")
		switch where {
		case "pod":
			ns.Sh(t, script)
		case "node":
			node.Sh(t, script)
		case "daemon":
			d.Registry.Delete(c.container, "eth0")
		case "ipam":
			os.RemoveAll(node.StateDir + "/ipam")
		}
		_, err := c.with("CHECK", r).plugin(t)
		if err == nil || err.Code != differs || !strings.Contains(err.Msg, words.Replace(word)) {
			t.Errorf("%s: CHECK says %+v", damage, err)
		}
		c.with("DEL", nil).must(t)
		// The order of the damages is random: what one of them leaves known
		// would refuse its addresses to an ADD after "ipam".
		if known := d.Registry.List(); len(known) != 0 {
			t.Errorf("%s: known after DEL: %v", damage, known)
		}
	}
	_, c := pod(t, node, "a")
	if _, err := c.with("CHECK", nil).plugin(t); err == nil || err.Code != types.ErrInvalidNetworkConfig || !strings.Contains(err.Msg, "prevResult") {
		t.Errorf("CHECK without prevResult: %+v", err)
	}
}

func TestBadInputIsRefusedWithItsNameAndChangesNothing(t *testing.T) {
	node := netns.NewNode(t)
	d := startDaemon(t, node)
	ns, good := pod(t, node, "a")
	taken := netns.Empty(t, "taken")
	taken.Sh(t, "ip link add eth0 type veth peer name eth1")
	before := look(t, d, ns, taken)
	notAFile := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(notAFile, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	stdin := func(more string) func(*call) { return func(c *call) { c.stdin = netconf(node, "1.0.0", more) } }
	for name, test := range map[string]struct {
		change func(*call)
		code   uint
		words  string
	}{
		"stdin is empty":              {func(c *call) { c.stdin = "" }, types.ErrDecodingFailure, ""},
		"stdin is not JSON":           {func(c *call) { c.stdin = "cniVersion: 1.0.0" }, types.ErrDecodingFailure, ""},
		"stdin is a list":             {func(c *call) { c.stdin = "[]" }, types.ErrDecodingFailure, ""},
		"half of the stdin":           {func(c *call) { c.stdin = c.stdin[:40] }, types.ErrDecodingFailure, ""},
		"no name":                     {func(c *call) { c.stdin = `{"cniVersion": "1.0.0", "type": "mooring-cni"}` }, types.ErrInvalidNetworkConfig, "name"},
		"bad name":                    {func(c *call) { c.stdin = strings.Replace(c.stdin, `"mooring"`, `"moo ring"`, 1) }, types.ErrInvalidNetworkConfig, "name"},
		"unknown key":                 {stdin(`, "sokcet": "/x"`), types.ErrInvalidNetworkConfig, "sokcet"},
		"unknown key of ipam":         {stdin(`, "ipam": {"type": "mooring-ipam", "subnet": "10.0.0.0/8"}`), types.ErrInvalidNetworkConfig, "ipam.subnet"},
		"mtu is a string":             {stdin(`, "mtu": "1500"`), types.ErrDecodingFailure, "mtu"},
		"mtu below IPv6's":            {stdin(`, "mtu": 100`), types.ErrInvalidNetworkConfig, "mtu"},
		"socket is relative":          {stdin(`, "socket": "x"`), types.ErrInvalidNetworkConfig, "socket"},
		"another daemon's bpffs":      {stdin(`, "bpffs": "/sys/fs/bpf/else"`), types.ErrInvalidNetworkConfig, "bpffs"},
		"prevResult is not a result":  {stdin(`, "prevResult": {"cniVersion": "1.0.0", "ips": "x"}`), types.ErrDecodingFailure, "prevResult"},
		"runtimeConfig is no object":  {stdin(`, "runtimeConfig": 1`), types.ErrDecodingFailure, "runtimeConfig"},
		"IPAM plugin is missing":      {stdin(`, "ipam": {"type": "no-such"}`), types.ErrInvalidNetworkConfig, "no-such"},
		"IPAM plugin is a path":       {stdin(`, "ipam": {"type": "../x"}`), types.ErrInvalidNetworkConfig, "ipam.type"},
		"address outside the ranges":  {stdin(`, "runtimeConfig": {"ips": ["192.0.2.77"]}`), types.ErrInvalidNetworkConfig, "192.0.2.77"},
		"address that is none":        {stdin(`, "args": {"cni": {"ips": ["10.244.0.300"]}}`), types.ErrInvalidNetworkConfig, "args.cni.ips"},
		"IP in CNI_ARGS":              {func(c *call) { c.args += ";IP=10.244.0.x" }, types.ErrInvalidNetworkConfig, "10.244.0.x"},
		"MAC that is multicast":       {stdin(`, "runtimeConfig": {"mac": "01:00:5e:00:00:01"}`), types.ErrInvalidNetworkConfig, "01:00:5e"},
		"future CNI version":          {func(c *call) { c.stdin = netconf(node, "1.2.0", "") }, types.ErrIncompatibleCNIVersion, ""},
		"ancient CNI version":         {func(c *call) { c.stdin = netconf(node, "0.2.0", "") }, types.ErrIncompatibleCNIVersion, ""},
		"CNI version is no version":   {func(c *call) { c.stdin = netconf(node, "one", "") }, types.ErrIncompatibleCNIVersion, ""},
		"CNI version is missing":      {func(c *call) { c.stdin = strings.Replace(c.stdin, `"cniVersion": "1.1.0", `, "", 1) }, types.ErrIncompatibleCNIVersion, ""},
		"unknown CNI_ARGS":            {func(c *call) { c.args = "FOO=bar" }, types.ErrInvalidEnvironmentVariables, "FOO"},
		"CNI_ARGS without =":          {func(c *call) { c.args = "FOO" }, types.ErrInvalidEnvironmentVariables, "FOO"},
		"unknown command":             {func(c *call) { c.verb = "REMOVE" }, types.ErrInvalidEnvironmentVariables, "REMOVE"},
		"no container ID":             {func(c *call) { c.container = "" }, types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID"},
		"container ID with a slash":   {func(c *call) { c.container = "../a" }, types.ErrInvalidEnvironmentVariables, ""},
		"no CNI_NETNS":                {func(c *call) { c.netns = "" }, types.ErrInvalidEnvironmentVariables, "CNI_NETNS"},
		"missing namespace":           {func(c *call) { c.netns = "/run/netns/no-such" }, types.ErrInvalidEnvironmentVariables, "/run/netns/no-such"},
		"namespace that is a file":    {func(c *call) { c.netns = notAFile }, types.ErrInvalidEnvironmentVariables, "no network namespace"},
		"namespace of another kind":   {func(c *call) { c.netns = "/proc/self/ns/mnt" }, types.ErrInvalidEnvironmentVariables, "no network namespace"},
		"the node's own namespace":    {func(c *call) { c.netns = node.Path() }, types.ErrInvalidEnvironmentVariables, "node itself"},
		"interface name too long":     {func(c *call) { c.ifname = "eth0123456789abc" }, types.ErrInvalidEnvironmentVariables, "interface name is too long"},
		"interface name with a slash": {func(c *call) { c.ifname = "eth/0" }, types.ErrInvalidEnvironmentVariables, "interface name"},
		"interface name is ..":        {func(c *call) { c.ifname = ".." }, types.ErrInvalidEnvironmentVariables, "interface name"},
		"interface name is lo":        {func(c *call) { c.ifname = "lo" }, types.ErrInvalidEnvironmentVariables, "lo"},
		"interface name is taken":     {func(c *call) { c.netns = taken.Path() }, types.ErrInvalidEnvironmentVariables, "eth0"},
	} {
		c := good.with("ADD", nil)
		test.change(&c)
		_, err := c.plugin(t)
		if err == nil || err.Code != test.code || !strings.Contains(err.Msg+err.Details, test.words) {
			t.Errorf("%s: %+v", name, err)
		}
		after := look(t, d, ns, taken)
		after.onlyLo(ns, before)
		unchanged(t, name, before, after)
	}
}

func TestFiftyAddsAtOnceGiveFiftyAddresses(t *testing.T) {
	node := netns.NewNode(t)
	d := startDaemon(t, node)
	before := look(t, d)
	calls, pods := make([]call, 50), make([]*netns.NS, 50)
	for i := range calls {
		pods[i], calls[i] = pod(t, node, fmt.Sprint("p", i))
	}
	var wait sync.WaitGroup
	for i := range calls {
		wait.Go(func() {
			if out, err := calls[i].with("ADD", nil).plugin(t); err != nil {
				t.Errorf("%+v %s", err, out)
				return
			}
			// A list of all, as asking for the one makes the kernel look: until it has, what the pod sends is dropped.
			links, err := pods[i].Netlink().LinkList()
			if err != nil {
				t.Error(err)
			}
			for _, l := range links {
				if state := l.Attrs().OperState; l.Attrs().Name == "eth0" && state != netlink.OperUp {
					t.Errorf("%s: eth0 is %s when ADD has answered", pods[i].Name(), state)
				}
			}
		})
	}
	wait.Wait()
	seen := map[netip.Addr]bool{}
	for _, e := range d.Registry.List() {
		for _, ip := range e.IPs {
			seen[ip] = true
		}
	}
	if len(seen) != 100 || len(d.entries(t)) != 100 {
		t.Errorf("%d addresses, %d entries", len(seen), len(d.entries(t)))
	}
	for i := range calls {
		wait.Go(func() {
			if out, err := calls[i].with("DEL", nil).plugin(t); err != nil {
				t.Errorf("%+v %s", err, out)
			}
		})
	}
	wait.Wait()
	unchanged(t, "50 pods", before, look(t, d))
}

func TestAddressesMACAndPodsAreTakenAsAskedFor(t *testing.T) {
	node := netns.NewNode(t)
	startDaemon(t, node)
	ns, c := pod(t, node, "a")
	c.stdin = netconf(node, "1.0.0", `, "capabilities": {"ips": true, "mac": true},
		"runtimeConfig": {"ips": ["10.244.0.77/24"], "mac": "02:11:22:33:44:55", "portMappings": [{"HostPort": 80, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}],
			"bandwidth": {"IngressRate": 10000000, "IngressBurst": 4294967295}, "io.kubernetes.cri.pod-annotations": {"a": "b"}, "cgroupPath": "/x"}`)
	r := c.add(t)
	if r.IPs[0].Address.IP.String() != "10.244.0.77" || r.Interfaces[1].Mac != "02:11:22:33:44:55" || len(r.IPs) != 2 {
		t.Errorf("%s", asJSON(r))
	}
	if mac := ns.Link(t, "eth0").Attrs().HardwareAddr.String(); mac != "02:11:22:33:44:55" {
		t.Errorf("MAC %s", mac)
	}
	_, other := pod(t, node, "b")
	other.args += ";IP=10.244.0.77"
	if _, err := other.with("ADD", nil).plugin(t); err == nil || err.Code != types.ErrTryAgainLater || !strings.Contains(err.Msg, "in use by container a") {
		t.Errorf("address of another: %+v", err)
	}
}

func TestChainAfterAnotherPluginKeepsWhatThatMade(t *testing.T) {
	node := netns.NewNode(t)
	startDaemon(t, node)
	ns, c := pod(t, node, "a")
	ns.Sh(t, "ip link add net1 type veth peer name net2")
	c.ifname = "eth0"
	previous := &current.Result{
		CNIVersion: "1.0.0",
		Interfaces: []*current.Interface{{Name: "net1", Mac: "02:00:00:00:00:01", Sandbox: ns.Path()}},
		IPs:        []*current.IPConfig{{Interface: current.Int(0), Address: *ipnet(netip.MustParsePrefix("198.51.100.7/24"))}},
		DNS:        types.DNS{Search: []string{"example"}},
	}
	r := parseResult(t, c.with("ADD", previous).must(t))
	if len(r.Interfaces) != 3 || r.Interfaces[0].Name != "net1" || r.Interfaces[2].Name != "eth0" || len(r.IPs) != 3 ||
		*r.IPs[0].Interface != 0 || *r.IPs[1].Interface != 2 || *r.IPs[2].Interface != 2 || r.DNS.Search[0] != "example" {
		t.Errorf("%s", asJSON(r))
	}
	c.with("CHECK", r).must(t)
	c.with("DEL", r).must(t)
	if !ns.HasLink("net1") {
		t.Error("the other plugin's interface is gone")
	}
}

// An IPAM plugin that needs the interface, as dhcp does, finds it; one that
// refuses to give twice, as host-local does, is asked to take back first.
func TestAnotherIPAMPluginIsCalledAsItExpects(t *testing.T) {
	node := netns.NewNode(t)
	d := startDaemon(t, node)
	before := look(t, d)
	log := filepath.Join(node.Dir, "calls")
	script := `#!/bin/sh
stdin=$(cat)
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME" >>` + log + `
case $CNI_COMMAND in
ADD)
	nsenter --net=$CNI_NETNS ip link show $CNI_IFNAME >/dev/null || exit 1
	if test -e ` + node.Dir + `/given; then echo '{"code": 100, "msg": "given already"}'; exit 1; fi
	touch ` + node.Dir + `/given
	echo '{"cniVersion": "0.4.0", "ips": [{"version": "4", "address": "198.51.100.9/24", "gateway": "198.51.100.1"}], "dns": {"nameservers": ["198.51.100.1"]}}';;
DEL) rm -f ` + node.Dir + `/given;;
STATUS) echo '{"code": 50, "msg": "the fake has a cold"}'; exit 1;;
CHECK) test -e ` + node.Dir + `/given || { echo '{"code": 101, "msg": "not given"}'; exit 1; };;
esac
`
	if err := os.WriteFile(filepath.Join(node.Dir, "fake-ipam"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	_, c := pod(t, node, "a")
	c.stdin = netconf(node, "1.1.0", `, "ipam": {"type": "fake-ipam", "anything": 1}`)
	r := c.add(t)
	if len(r.IPs) != 1 || r.IPs[0].Address.String() != "198.51.100.9/32" || r.IPs[0].Gateway.String() != "169.254.1.1" || r.DNS.Nameservers[0] != "198.51.100.1" {
		t.Errorf("%s", asJSON(r))
	}
	c.with("CHECK", r).must(t)
	r = c.add(t) // again
	c.with("CHECK", r).must(t)
	if _, err := c.with("STATUS", nil).plugin(t); err == nil || err.Code != types.ErrPluginNotAvailable || !strings.Contains(err.Msg, "a cold") {
		t.Errorf("STATUS: %+v", err)
	}
	c.with("GC", nil).must(t) // no attachment is valid
	c.env = []string{breakAfter + "=fail answer"}
	c.with("ADD", nil).plugin(t)
	unchanged(t, "ADD, GC and a failed ADD with another IPAM plugin", before, look(t, d))
	if _, err := os.Stat(node.Dir + "/given"); !os.IsNotExist(err) {
		t.Errorf("the address is still given: %v", err)
	}
	got, _ := os.ReadFile(log)
	want := "ADD a eth0\nCHECK a eth0\nDEL a eth0\nADD a eth0\nCHECK a eth0\nSTATUS  \nDEL a eth0\nGC  \nADD a eth0\nDEL a eth0\n"
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
}
