// SPDX-License-Identifier: Apache-2.0

//go:build root

package node

import (
	"bytes"
	"context"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netns"

	"github.com/mooring-cni/mooring/daemon/model"
)

// The main thread stays in the test's network namespace, which /proc/self
// shows: a thread that enters another one cannot be the main one.
func init() { runtime.LockOSThread() }

// inOwnNetns tells whether the test runs in a network namespace of its own. If
// not, it has run the test in one, by starting the test binary once more: the
// machine's own namespace is never touched.
func inOwnNetns(t *testing.T) bool {
	t.Helper()
	if os.Getenv("MOORING_TEST_NETNS") == t.Name() {
		sh(t, "ip link set lo up")
		return true
	}
	command := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	command.Env = append(os.Environ(), "MOORING_TEST_NETNS="+t.Name())
	command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if out, err := command.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

// sh runs commands, one a line, and returns what they print.
func sh(t *testing.T, script string) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return strings.TrimSpace(string(out))
}

// uplink gives the namespace an uplink with addresses of both families and
// default routes.
const uplink = `
	ip link add up0 type veth peer name wire0
	ip link set up0 mtu 1480 up
	ip link set wire0 up
	ip address add 192.0.2.1/24 dev up0
	ip address add 2001:db8::1/64 dev up0 nodad
	ip route add default via 192.0.2.254
	ip -6 route add default via 2001:db8::fe`

func options(t *testing.T) Options {
	return Options{
		Name: "a", PodCIDRs: prefixes("10.244.0.0/24", "fd00:10:244::/64"), Masquerade: true,
		Log: slog.New(slog.NewTextHandler(testLog{t}, nil)),
	}
}

type testLog struct{ t *testing.T }

func (l testLog) Write(line []byte) (int, error) {
	l.t.Log(string(bytes.TrimSpace(line)))
	return len(line), nil
}

// start runs a manager; the result stops it.
func start(t *testing.T, o Options) (*Manager, func()) {
	t.Helper()
	m := New(o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { m.Run(ctx); close(done) }()
	return m, func() { cancel(); <-done }
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if holds() {
			return
		}
	}
	t.Errorf("after 5 s still not: %s", what)
}

func noProblems(t *testing.T, m *Manager) {
	t.Helper()
	if p := m.Problems(); len(p) != 0 {
		t.Errorf("problems: %q", p)
	}
}

func ourRoutes(t *testing.T) []string {
	t.Helper()
	list, err := ours(0)
	if err != nil {
		t.Fatal(err)
	}
	return texts(list)
}

func TestNodeForwardsAndKnowsItsUplink(t *testing.T) {
	if !inOwnNetns(t) {
		return
	}
	sh(t, uplink)
	sh(t, "sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0 net.ipv6.conf.up0.accept_ra=1")
	m := New(options(t))
	noProblems(t, m)
	if got := sh(t, "sysctl -n net.ipv4.ip_forward net.ipv6.conf.all.forwarding net.ipv6.conf.up0.accept_ra"); got != "1\n1\n2" {
		t.Errorf("ip_forward, forwarding and accept_ra are %q", got)
	}
	uplinks := m.Uplinks()
	if len(uplinks) != 1 || uplinks[0].Name != "up0" || MTU(uplinks) != 1480 {
		t.Fatalf("uplinks %+v", uplinks)
	}
	if diff := cmp.Diff([]string{"192.0.2.1", "2001:db8::1"}, texts(Addresses(uplinks))); diff != "" {
		t.Errorf("addresses (-want +got):\n%s", diff)
	}
	o := options(t)
	o.Devices = []string{"wire0", "nowhere0"}
	m = New(o)
	if p := m.Problems(); len(p) != 1 || !strings.Contains(p[0], "nowhere0") {
		t.Errorf("problems with a device that is not there: %q", p)
	}
	if uplinks := m.Uplinks(); len(uplinks) != 1 || uplinks[0].Name != "wire0" {
		t.Errorf("uplinks %+v, want wire0 alone", uplinks)
	}
}

func TestRoutesFollowTheNodesAndSpareOtherPeoples(t *testing.T) {
	if !inOwnNetns(t) {
		return
	}
	sh(t, uplink)
	// Left by an earlier run; and other people's, one of them in the way.
	sh(t, `ip route add 10.244.7.0/24 via 192.0.2.7 proto 77
		ip route add 10.99.0.0/16 via 192.0.2.9
		ip route add 10.244.5.0/24 via 192.0.2.9 proto static`)
	foreign := func() string {
		return sh(t, "ip route show | grep -v 'proto 77'; ip -6 route show | grep -v 'proto 77' | grep -v fe80")
	}
	before := foreign()
	m, stop := start(t, options(t))
	if diff := cmp.Diff([]string{"unreachable 10.244.0.0/24", "10.244.7.0/24 via 192.0.2.7", "unreachable fd00:10:244::/64"}, ourRoutes(t)); diff != "" {
		t.Errorf("before the nodes are known nothing may go (-want +got):\n%s", diff)
	}
	b := machine("b", []string{"192.0.2.2", "2001:db8::2"}, "10.244.1.0/24", "fd00:10:244:1::/64")
	m.SetNodes([]model.Node{
		machine("a", []string{"192.0.2.1"}, "10.244.0.0/24"), b,
		machine("f", []string{"192.0.2.6"}, "10.244.5.0/24"), machine("g", []string{"198.51.100.1"}, "10.244.6.0/24"),
	})
	want := []string{
		"unreachable 10.244.0.0/24", "10.244.1.0/24 via 192.0.2.2", "unreachable fd00:10:244::/64", "fd00:10:244:1::/64 via 2001:db8::2",
	}
	eventually(t, "routes to b", func() bool { return cmp.Equal(want, ourRoutes(t)) && len(m.Problems()) == 2 })
	if p := strings.Join(m.Problems(), "\n"); !strings.Contains(p, "10.244.5.0/24 via 192.0.2.6: somebody else has a route") {
		// A default route makes any gateway look reachable; the kernel still wants it on a link.
		t.Errorf("problems: %s", p)
	}
	b.Addresses[0] = netip.MustParseAddr("192.0.2.22")
	m.SetNodes([]model.Node{b})
	want[1] = "10.244.1.0/24 via 192.0.2.22"
	eventually(t, "b's new address", func() bool { return cmp.Equal(want, ourRoutes(t)) })
	eventually(t, "no problems", func() bool { return len(m.Problems()) == 0 })

	if diff := cmp.Diff(before, foreign()); diff != "" {
		t.Errorf("other people's routes (-want +got):\n%s", diff)
	}
	sh(t, "ip link set up0 down")
	eventually(t, "routes gone with the link", func() bool { return len(ourRoutes(t)) == 2 })
	sh(t, `ip link set up0 up
		ip address replace 2001:db8::1/64 dev up0 nodad
		ip route replace default via 192.0.2.254`)
	m.poke() // as the ticker does
	eventually(t, "routes back with the link", func() bool { return cmp.Equal(want, ourRoutes(t)) })

	stop()
	if diff := cmp.Diff(want, ourRoutes(t)); diff != "" {
		t.Errorf("routes after the daemon's end (-want +got):\n%s", diff)
	}
	if err := Cleanup(); err != nil {
		t.Fatal(err)
	}
	if got := ourRoutes(t); len(got) != 0 {
		t.Errorf("left by cleanup: %q", got)
	}
}

// What a tunnel lets in is answered by the route: without it the answer would leave
// the node as it is, by the default one.
func TestTunnelHasItsRouteAsLongAsItIsThere(t *testing.T) {
	if !inOwnNetns(t) {
		return
	}
	sh(t, uplink)
	o := options(t)
	o.Overlay = true
	m := New(o)
	var mutex sync.Mutex
	var last []netip.Prefix
	m.SetTunnelSetter(func(_ string, index int, tunnels map[netip.Prefix]Tunnel) error {
		there := sh(t, "ip route show proto 77 dev "+OverlayDevice+"; ip -6 route show proto 77 dev "+OverlayDevice)
		mutex.Lock()
		defer mutex.Unlock()
		// Of those that go, too: they are let in until this returns.
		for _, pods := range append(slices.Collect(maps.Keys(tunnels)), last...) {
			if !strings.Contains(there, pods.String()) {
				t.Errorf("there is a tunnel for %s and no route: %s", pods, there)
			}
		}
		last = slices.Collect(maps.Keys(tunnels))
		return nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { m.Run(ctx); close(done) }()
	defer func() { cancel(); <-done }()
	a := machine("a", []string{"192.0.2.1"}, "10.244.0.0/24", "fd00:10:244::/64")
	tunnels := func(want int) func() bool {
		return func() bool {
			mutex.Lock()
			defer mutex.Unlock()
			return len(last) == want
		}
	}
	m.SetNodes([]model.Node{
		a, machine("b", []string{"192.0.2.2"}, "10.244.1.0/24", "fd00:10:244:1::/64"), machine("c", []string{"192.0.2.3"}, "10.244.2.0/24"),
	})
	eventually(t, "tunnels to b and c", tunnels(3))
	m.SetNodes([]model.Node{a, machine("c", []string{"192.0.2.3"}, "10.244.2.0/24")})
	eventually(t, "only the tunnel to c", tunnels(1))
	eventually(t, "no route to b", func() bool { return !slices.Contains(ourRoutes(t), "10.244.1.0/24") })
}

const dump = "iptables-save -t nat; iptables-save -t raw; ip6tables-save -t nat; ip6tables-save -t raw"

// rulesOf is a dump without counters and comments, which change.
func rulesOf(t *testing.T) string {
	t.Helper()
	var out []string
	for _, line := range strings.Split(sh(t, dump), "\n") {
		if strings.HasPrefix(line, "-A") {
			out = append(out, line)
		}
	}
	return strings.Join(out, "\n")
}

func TestChainsAreThereOnceAndRepaired(t *testing.T) {
	if !inOwnNetns(t) {
		return
	}
	sh(t, uplink)
	sh(t, `iptables -t nat -A POSTROUTING -s 172.16.0.0/12 -j ACCEPT
		iptables -t raw -A PREROUTING -p udp --dport 9 -j DROP`)
	foreign := rulesOf(t)
	m, stop := start(t, options(t))
	noProblems(t, m)
	want := rulesOf(t)
	for rule, times := range map[string]int{
		"-j MOORING-MASQUERADE\n": 2, // a family each
		"-j MOORING-NOTRACK\n":    2,
		"-A MOORING-MASQUERADE -s 10.244.0.0/24 -j MASQUERADE --random-fully":        1,
		"-A MOORING-MASQUERADE -s fd00:10:244::/64 -j MASQUERADE --random-fully":     1,
		"-A MOORING-NOTRACK -s fd00:10:244::/64 -d fd00:10:244::/64 -j CT --notrack": 1,
	} {
		if got := strings.Count(want+"\n", rule); got != times {
			t.Errorf("%q is there %d times, want %d, in\n%s", rule, got, times, want)
		}
	}
	for what, script := range map[string]string{
		"nothing":             "true",
		"chain flushed":       "iptables -t nat -F MOORING-MASQUERADE",
		"everything flushed":  "iptables -t nat -F; iptables -t nat -X; ip6tables -t raw -F; ip6tables -t raw -X; iptables -t nat -A POSTROUTING -s 172.16.0.0/12 -j ACCEPT",
		"jump doubled":        "iptables -t nat -I POSTROUTING -m comment --comment 'mooring: source NAT for pods' -j MOORING-MASQUERADE",
		"rule added":          "ip6tables -t nat -I MOORING-MASQUERADE -j RETURN",
		"jump removed in raw": "iptables -t raw -D PREROUTING 1",
	} {
		sh(t, script)
		m.reconcile()
		if diff := cmp.Diff(want, rulesOf(t)); diff != "" {
			t.Errorf("%s: not repaired (-want +got):\n%s", what, diff)
		}
	}
	stop()
	_, stop = start(t, options(t))
	if diff := cmp.Diff(want, rulesOf(t)); diff != "" {
		t.Errorf("after a restart (-want +got):\n%s", diff)
	}
	stop()
	if err := Cleanup(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(foreign, rulesOf(t)); diff != "" {
		t.Errorf("after cleanup, other people's rules alone (-want +got):\n%s", diff)
	}
	if left := sh(t, dump); strings.Contains(left, "MOORING") {
		t.Errorf("left by cleanup:\n%s", left)
	}
}

func TestChainsOfAnEarlierRunStayUntilTheNodesAreKnown(t *testing.T) {
	if !inOwnNetns(t) {
		return
	}
	sh(t, uplink)
	nodes := []model.Node{machine("b", []string{"192.0.2.2", "2001:db8::2"}, "10.244.1.0/24", "fd00:10:244:1::/64")}
	earlier := New(options(t))
	earlier.SetNodes(nodes)
	earlier.reconcile()
	want := rulesOf(t)
	m := New(options(t))
	m.reconcile()
	if diff := cmp.Diff(want, rulesOf(t)); diff != "" {
		t.Errorf("the next run, which knows no nodes yet (-want +got):\n%s", diff)
	}
	m.SetNodes(nil)
	m.reconcile()
	if got := rulesOf(t); strings.Contains(got, "10.244.1.0") {
		t.Errorf("the node is gone, and there is\n%s", got)
	}
}

func TestMasqueradeOffRemovesWhatAnEarlierRunMade(t *testing.T) {
	if !inOwnNetns(t) {
		return
	}
	sh(t, uplink)
	o := options(t)
	o.PodCIDRs = prefixes("10.244.0.0/24")
	New(o)
	if got := rulesOf(t); strings.Contains(got, "fd00") || !strings.Contains(got, "10.244.0.0/24") {
		t.Errorf("a node with IPv4 pods alone has\n%s", got)
	}
	o.Masquerade = false
	noProblems(t, New(o))
	if left := sh(t, dump); strings.Contains(left, "MOORING") {
		t.Errorf("masquerade: false leaves\n%s", left)
	}
}

func TestMachineWithoutIptablesIsNamedNotCrashed(t *testing.T) {
	if !inOwnNetns(t) {
		return
	}
	t.Setenv("PATH", t.TempDir())
	m := New(options(t))
	problems := strings.Join(m.Problems(), "\n")
	for _, word := range []string{"masquerade (IPv4)", "masquerade (IPv6)", "apt-get install iptables"} {
		if !strings.Contains(problems, word) {
			t.Errorf("%q is not in the problems:\n%s", word, problems)
		}
	}
	if err := Cleanup(); err != nil {
		t.Errorf("cleanup: %v", err)
	}
}

// A pod, its node, and a server outside: what the server sees, and what
// nf_conntrack remembers.
func TestPodIsHiddenFromTheWorldButNotFromOtherPods(t *testing.T) {
	if !inOwnNetns(t) {
		return
	}
	pod, world := namespace(t), namespace(t)
	sh(t, `ip link add up0 type veth peer name eth0 netns `+strconv.Itoa(world)+`
		ip link add lxc0 type veth peer name eth0 netns `+strconv.Itoa(pod)+`
		ip address add 192.0.2.1/24 dev up0
		ip address add 2001:db8::1/64 dev up0 nodad
		ip link set up0 up
		ip link set lxc0 up
		sysctl -qw net.ipv4.conf.lxc0.proxy_arp=1
		ip route add 10.244.0.5/32 dev lxc0
		ip -6 route add fd00:10:244::5/128 dev lxc0
		ip address add fe80::1/64 dev lxc0 nodad`)
	in := func(pid int, script string) string {
		return sh(t, "nsenter -t "+strconv.Itoa(pid)+" -n sh -ec '"+script+"'")
	}
	in(pod, `ip address add 10.244.0.5/32 dev eth0
		ip address add fd00:10:244::5/128 dev eth0 nodad
		ip link set eth0 up
		ip route add default dev eth0
		ip -6 route add default via fe80::1 dev eth0`)
	in(world, `ip address add 192.0.2.254/24 dev eth0
		ip address add 2001:db8::fe/64 dev eth0 nodad
		ip address add 10.244.1.9/32 dev eth0
		ip link set eth0 up
		ip link set lo up
		ip route add 10.244.0.0/24 via 192.0.2.1`)
	m, stop := start(t, options(t))
	defer stop()
	m.SetNodes([]model.Node{machine("b", []string{"192.0.2.254"}, "10.244.1.0/24")})
	eventually(t, "route to b's pods", func() bool { return strings.Contains(strings.Join(ourRoutes(t), " "), "10.244.1.0/24 via 192.0.2.254") })
	// The rules come after the routes.
	eventually(t, "b is of the cluster to the rules", func() bool { return strings.Contains(rulesOf(t), "192.0.2.254") })
	noProblems(t, m)
	for _, test := range []struct{ to, want string }{
		{"192.0.2.254", "10.244.0.5"}, // a node of the cluster
		{"10.244.1.9", "10.244.0.5"},  // a pod of it
		{"2001:db8::fe", "2001:db8::1"},
	} {
		if got := seen(t, pod, world, test.to); got != test.want {
			t.Errorf("a pod that connects to %s is seen as %s, want %s", test.to, got, test.want)
		}
	}
	m.SetNodes([]model.Node{})
	eventually(t, "b forgotten", func() bool { return !strings.Contains(rulesOf(t), "192.0.2.254") })
	if got := seen(t, pod, world, "192.0.2.254"); got != "192.0.2.1" {
		t.Errorf("a pod that connects to the world is seen as %s, want the node's 192.0.2.1", got)
	}
	tracked, err := os.ReadFile("/proc/net/nf_conntrack")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(tracked), "dst=192.0.2.254") || strings.Contains(string(tracked), "dst=10.244.1.9") {
		t.Errorf("nf_conntrack should have the flows to the world, and none between pods:\n%s", tracked)
	}
}

// namespace makes one more network namespace and returns the pid of a process
// in it.
func namespace(t *testing.T) int {
	t.Helper()
	command := exec.Command("sleep", "120")
	command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { command.Process.Kill(); command.Wait() })
	return command.Process.Pid
}

// inside runs f on a thread in the network namespace of a process.
func inside(t *testing.T, pid int, f func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		ns, err := netns.GetFromPid(pid)
		if err == nil {
			err = netns.Set(ns)
			ns.Close()
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// seen connects from one namespace to a server in another and returns the
// client's address as the server sees it.
func seen(t *testing.T, from, at int, to string) (client string) {
	t.Helper()
	var l net.Listener
	inside(t, at, func() (err error) {
		l, err = net.Listen("tcp", net.JoinHostPort(to, "0"))
		return err
	})
	defer l.Close()
	inside(t, from, func() error {
		conn, err := net.DialTimeout("tcp", l.Addr().String(), 3*time.Second)
		if err == nil {
			defer conn.Close()
		}
		return err
	})
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client, _, err = net.SplitHostPort(conn.RemoteAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	return client
}
