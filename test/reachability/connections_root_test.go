//go:build root

// SPDX-License-Identifier: Apache-2.0

package reachability

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/scenario"
)

// cluster is two nodes with real pods and what is outside, where somebody
// listens on all of Ports by TCP and UDP.
type cluster struct {
	nodes  []*scenario.Node
	places Places
	owners map[netip.Addr]*netns.NS
}

func newCluster(t *testing.T, pods int) *cluster {
	t.Helper()
	c := &cluster{nodes: scenario.NewNodes(t, 2), owners: map[netip.Addr]*netns.NS{}}
	outside := c.nodes[0].Outside
	outside.Addr(t, "lo", "203.0.113.129/32", "203.0.113.200/32", "2001:db8:0:1::1/128")
	for _, n := range c.nodes {
		for _, prefix := range n.PodCIDRs {
			via := n.IP
			if prefix.Addr().Is6() {
				via = n.IP6
			}
			outside.Route(t, prefix.String(), via.String(), "nodes")
		}
		c.places.Nodes = append(c.places.Nodes, Node{Meta{Name: n.NodeName}, []netip.Addr{n.IP, n.IP6}})
		c.serve(t, n.NS, n.IP, n.IP6)
		n.Up()
	}
	for _, a := range []string{netns.Remote, netns.Remote6, "203.0.113.129", "203.0.113.200", "2001:db8:0:1::1"} {
		addr := netip.MustParseAddr(a)
		c.places.Outside = append(c.places.Outside, addr)
		c.owners[addr] = outside.NS
	}
	c.serve(t, outside.NS)
	for i := range pods {
		n := c.nodes[i%len(c.nodes)]
		meta := Meta{Name: fmt.Sprintf("pod%d", i), Namespace: NamespaceName(i % 3)}
		p := n.AddPod(meta.Namespace + "/" + meta.Name)
		c.places.Pods = append(c.places.Pods, Pod{Meta: meta, Node: n.NodeName, Addrs: []netip.Addr{p.IP, p.IP6}})
		c.serve(t, p.NS, p.IP, p.IP6)
	}
	return c
}

func (c *cluster) serve(t *testing.T, ns *netns.NS, addrs ...netip.Addr) {
	t.Helper()
	for _, addr := range addrs {
		c.owners[addr] = ns
	}
	for _, port := range Ports {
		netns.TCPEcho(t, ns, fmt.Sprintf("[::]:%d", port))
		netns.UDPEcho(t, ns, fmt.Sprintf("[::]:%d", port))
	}
}

// show has both nodes enforce a world, and returns when they do.
func (c *cluster) show(t *testing.T, w *World, name string) {
	t.Helper()
	marked := *w
	marked.Policies = append(slices.Clone(w.Policies), Policy{Meta: Meta{Name: name, Namespace: "nobody"}})
	for _, n := range c.nodes {
		n.Write("world.json", string(marked.Manifests()))
	}
	for _, n := range c.nodes {
		enforces(t, n, name)
	}
}

// enforces waits until a node does what a manifest says that has a policy of
// that name, which is about nobody.
func enforces(t *testing.T, n *scenario.Node, name string) {
	t.Helper()
	c := n.API()
	defer c.Close()
	netns.Eventually(t, 30*time.Second, n.NodeName+" enforces "+name, func() bool {
		list, err := c.Policies(context.Background())
		return err == nil && slices.ContainsFunc(list, func(p api.Policy) bool { return p.Name == name })
	})
}

// attempt is one connection, or one question by UDP.
type attempt struct {
	Packet
	fd      int
	want    bool
	reached bool
	err     error // what came back instead
}

// begin makes the socket, in the namespace of the caller's thread.
func (a *attempt) begin() error {
	family, typ := unix.AF_INET, unix.SOCK_DGRAM
	if a.From.Is6() {
		family = unix.AF_INET6
	}
	if a.Protocol == "TCP" {
		typ = unix.SOCK_STREAM
	}
	var err error
	if a.fd, err = unix.Socket(family, typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	if typ == unix.SOCK_STREAM {
		// Nothing is left of it when it is closed.
		if err := unix.SetsockoptLinger(a.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return err
		}
	}
	if err := unix.Bind(a.fd, sockaddr(a.From, 0)); err != nil {
		return fmt.Errorf("bind to %s: %w", a.From, err)
	}
	if err := unix.Connect(a.fd, sockaddr(a.To, a.Port)); err != nil && err != unix.EINPROGRESS {
		return fmt.Errorf("connect to %s: %w", a.To, err)
	}
	return a.ask()
}

// ask sends a datagram; what is lost on the way is not lost to policy.
func (a *attempt) ask() error {
	if a.Protocol != "UDP" {
		return nil
	}
	if _, err := unix.Write(a.fd, []byte("?")); err != nil && err != unix.EAGAIN {
		return fmt.Errorf("ask %s: %w", a.To, err)
	}
	return nil
}

func sockaddr(a netip.Addr, port int) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4(), Port: port}
	}
	return &unix.SockaddrInet6{Addr: a.As16(), Port: port}
}

// look takes what has come back.
func (a *attempt) look(revents int16) {
	code, err := unix.GetsockoptInt(a.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	switch {
	case err != nil:
		a.err = err
	case code != 0:
		a.err = unix.Errno(code)
	case a.Protocol == "TCP":
		a.reached = revents&unix.POLLOUT != 0
	default:
		a.reached = revents&unix.POLLIN != 0
	}
}

// connect makes every connection at once, waits until those have come through
// that are expected to, and then a while for those that are not.
func (c *cluster) connect(t *testing.T, attempts []*attempt) {
	t.Helper()
	began := time.Now()
	bySource := map[*netns.NS][]*attempt{}
	for _, a := range attempts {
		ns := c.owners[a.From]
		bySource[ns] = append(bySource[ns], a)
	}
	for ns, list := range bySource {
		if err := ns.Do(func() error {
			for _, a := range list {
				if err := a.begin(); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatalf("connect from %s: %v", ns.Name(), err)
		}
	}
	defer func() {
		for _, a := range attempts {
			unix.Close(a.fd)
		}
	}()
	const patience, while = 20 * time.Second, 700 * time.Millisecond
	asked := began
	var satisfied time.Time
	for {
		var polled []unix.PollFd
		var pending []*attempt
		waiting := 0
		for _, a := range attempts {
			if a.reached || a.err != nil {
				continue
			}
			if a.want {
				waiting++
			}
			events := int16(unix.POLLIN)
			if a.Protocol == "TCP" {
				events = unix.POLLOUT
			}
			polled = append(polled, unix.PollFd{Fd: int32(a.fd), Events: events})
			pending = append(pending, a)
		}
		if waiting == 0 && satisfied.IsZero() {
			satisfied = time.Now()
		}
		if len(pending) == 0 || time.Since(began) > patience ||
			waiting == 0 && time.Since(satisfied) > while && time.Since(began) > 2*while {
			return
		}
		if time.Since(asked) > while {
			asked = time.Now()
			for _, a := range pending {
				if err := a.ask(); err != nil {
					a.err = err
				}
			}
		}
		if _, err := unix.Poll(polled, 50); err != nil && err != unix.EINTR {
			t.Fatalf("wait for connections: %v", err)
		}
		for i, p := range polled {
			if p.Revents != 0 {
				pending[i].look(p.Revents)
			}
		}
	}
}

// allowed is what both nodes together let through.
func (c *cluster) allowed(w *World, k Packet) bool {
	for _, n := range c.nodes {
		view := *w
		view.Here = n.NodeName
		if !view.Allowed(k) {
			return false
		}
	}
	return true
}

// packets are between all that there are, of which one is a pod, on any node.
func (c *cluster) packets(w *World) (packets []Packet) {
	pods := map[netip.Addr]bool{}
	var addrs []netip.Addr
	for _, p := range w.Pods {
		for _, a := range p.Addrs {
			pods[a] = true
			addrs = append(addrs, a)
		}
	}
	for _, n := range w.Nodes {
		addrs = append(addrs, n.Addrs...)
	}
	addrs = append(addrs, w.Outside...)
	for _, from := range addrs {
		for _, to := range addrs {
			if from.Is4() != to.Is4() || from == to || !pods[from] && !pods[to] {
				continue
			}
			for _, protocol := range []string{"TCP", "UDP"} {
				for _, port := range Ports {
					packets = append(packets, Packet{from, to, protocol, port})
				}
			}
		}
	}
	return packets
}

func TestConnectionsAgreeWithTheReference(t *testing.T) {
	c := newCluster(t, 9)
	total := 0
	for seed := uint64(1); seed <= 8; seed++ {
		shape := Shape{Namespaces: 3, Policies: 7, Places: &c.places}
		if seed%2 == 0 {
			shape.ClusterPolicies = 3
		}
		w := Generate(seed, shape)
		c.show(t, w, fmt.Sprintf("seed-%d", seed))
		began := time.Now()
		checks, allowed, wrong := 0, 0, 0
		for batch := range slices.Chunk(c.packets(w), 1500) {
			var attempts []*attempt
			for _, k := range batch {
				a := &attempt{Packet: k, want: c.allowed(w, k)}
				attempts = append(attempts, a)
				if a.want {
					allowed++
				}
			}
			checks += len(attempts)
			c.connect(t, attempts)
			for _, a := range attempts {
				if a.err != nil || a.reached != a.want {
					wrong++
					t.Errorf("seed %d: %s: reached %v (%v), the reference says %v", seed, a, a.reached, a.err, a.want)
				}
			}
			if wrong > 20 {
				t.FailNow()
			}
		}
		t.Logf("seed %d: %d connections, %d allowed, in %v", seed, checks, allowed, time.Since(began))
		if allowed == 0 || allowed == checks {
			t.Errorf("seed %d: the world is of one answer", seed)
		}
		total += checks
	}
	t.Logf("%d connections", total)
	if total < 10000 {
		t.Errorf("%d connections, want 10,000", total)
	}
}
