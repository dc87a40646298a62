// SPDX-License-Identifier: Apache-2.0

//go:build root

package scenario

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/daemon/node"
	"github.com/mooring-cni/mooring/test/netns"
)

// apart makes nodes that reach each other by their router alone, which knows
// nothing of pods and lets nothing pass that comes from where it would not send.
func apart(t *testing.T, count int) []*Node {
	t.Helper()
	nodes := NewNodes(t, count)
	for _, n := range nodes {
		n.Sh(t, fmt.Sprintf(`
			ip address del %[1]s/24 dev %[3]s
			ip address add %[1]s/32 dev %[3]s
			ip route add %[4]s dev %[3]s
			ip route add default via %[4]s
			ip -6 address del %[2]s/64 dev %[3]s
			ip -6 address add %[2]s/128 dev %[3]s nodad
			ip -6 route add %[5]s dev %[3]s
			ip -6 route replace default via %[5]s`, n.IP, n.IP6, netns.Uplink, netns.Router, netns.Router6))
	}
	nodes[0].Outside.Sh(t, `
		sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.nodes.send_redirects=0
		ip6tables -t raw -A PREROUTING -m rpfilter --invert -j DROP
		ip6tables -A OUTPUT -p icmpv6 --icmpv6-type redirect -j DROP`)
	return nodes
}

// describe writes the nodes' manifest anew, on all nodes, with these addresses.
func describe(nodes []*Node, addresses func(n *Node) []netip.Addr) {
	manifest := ""
	for _, n := range nodes {
		var list []string
		for _, a := range addresses(n) {
			list = append(list, fmt.Sprintf("{type: InternalIP, address: %q}", a))
		}
		manifest += fmt.Sprintf("---\napiVersion: v1\nkind: Node\nmetadata: {name: %s}\nspec: {podCIDRs: [%q, %q]}\nstatus: {addresses: [%s]}\n",
			n.NodeName, n.PodCIDRs[0], n.PodCIDRs[1], strings.Join(list, ", "))
	}
	for _, n := range nodes {
		n.Write("nodes.yaml", manifest)
	}
}

// ends are the addresses of a frame.
func ends(p netns.Packet) (from, to netip.Addr) {
	switch {
	case len(p.Data) >= 34 && p.Data[12] == 0x08 && p.Data[13] == 0:
		from, _ = netip.AddrFromSlice(p.Data[26:30])
		to, _ = netip.AddrFromSlice(p.Data[30:34])
	case len(p.Data) >= 54 && p.Data[12] == 0x86 && p.Data[13] == 0xdd:
		from, _ = netip.AddrFromSlice(p.Data[22:38])
		to, _ = netip.AddrFromSlice(p.Data[38:54])
	}
	return from, to
}

func TestPodsOfOtherNodesAreReachedByTunnels(t *testing.T) {
	nodes := tricklersOn(t, apart(t, 2), "--routing-mode", "vxlan")
	a, b := nodes[0], nodes[1]
	client, server := a.Pod("client"), b.Pod("server")
	wire := a.Outside.Capture(t, "nodes")
	large := strings.Repeat("0123456789abcdef", 1<<16) // a mebibyte
	netns.HTTP(t, server.NS, "[::]:8081", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintln(w, host)
		fmt.Fprint(w, large)
	}))
	fetch := func(from *netns.NS, to netip.Addr, source ...netip.Addr) error {
		body, err := from.Get("http://" + netip.AddrPortFrom(to, 8081).String() + "/")
		if err != nil {
			return err
		}
		host, rest, _ := strings.Cut(body, "\n")
		seen, err := netip.ParseAddr(host)
		if err != nil || rest != large {
			return fmt.Errorf("from %s: %d bytes, %v", host, len(rest), err)
		}
		for _, s := range source {
			if seen.Unmap() == s {
				return nil
			}
		}
		return fmt.Errorf("comes from %s, want %v", seen, source)
	}
	works := func(what string) {
		t.Helper()
		for _, to := range []netip.Addr{server.IP, server.IP6} {
			var err error
			for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
				if err = fetch(client.NS, to, client.IP, client.IP6); err == nil {
					break
				}
			}
			if err != nil {
				t.Errorf("%s: from pod to pod %s: %v", what, to, err)
			}
			// The node's own processes come from its address among its pods.
			if err := fetch(a.NS, to, a.PodCIDRs[0].Addr().Next(), a.PodCIDRs[1].Addr().Next()); err != nil {
				t.Errorf("%s: from the node to pod %s: %v", what, to, err)
			}
		}
		if err := newConnections(a); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	works("IPv4 tunnels")
	if got := client.Link(t, "eth0").Attrs().MTU; got != 1450 {
		t.Errorf("the pod's MTU is %d", got)
	}
	// A node's own server is reached from its pods' other node, and the answer arrives.
	netns.HTTPEcho(t, b.NS, "[::]:8090", "host")
	for _, to := range []netip.Addr{b.IP, b.IP6} {
		if _, err := client.Get("http://" + netip.AddrPortFrom(to, 8090).String() + "/"); err != nil {
			t.Errorf("from pod to node %s: %v", to, err)
		}
	}
	wire.Stop()
	bare := wire.Packets(func(p netns.Packet) bool {
		for _, n := range nodes {
			for _, prefix := range n.PodCIDRs {
				if from, to := ends(p); prefix.Contains(from) || prefix.Contains(to) {
					return true
				}
			}
		}
		return false
	})
	if len(bare) > 0 {
		t.Errorf("%d packets of pods were on the nodes' network, the first %+v", len(bare), bare[0])
	}

	heard := listen(t, a)
	for _, n := range nodes {
		n.Crash()
		n.Up()
	}
	if err := heard(); err != nil {
		t.Errorf("both nodes were restarted: %v", err)
	}

	// Somebody who is no node has made up a packet of a pod's.
	a.Outside.Sh(t, fmt.Sprintf(`
		ip link add forged type vxlan id 1 remote %s dstport 8472 dev nodes
		ip link set forged address 02:6d:6f:6f:72:02 up
		ip address add 10.244.1.99/32 dev forged
		ip route add 10.244.0.0/24 dev forged src 10.244.1.99
		ip neighbour add %s lladdr 02:6d:6f:6f:72:01 dev forged`, a.IP, client.IP))
	got := make(chan struct{}, 1)
	netns.UDP(t, client.NS, "[::]:9000", func([]byte, net.Addr) []byte { got <- struct{}{}; return nil })
	forge, err := a.Outside.Dial("udp", netip.AddrPortFrom(client.IP, 9000).String())
	if err != nil {
		t.Fatal(err)
	}
	forge.Write([]byte("let me in"))
	netns.Eventually(t, 5*time.Second, "the forged packet is counted", func() bool {
		return strings.Contains(a.Drops(), `direction="from_overlay",reason="tunnel_source"`)
	})
	select {
	case <-got:
		t.Error("a packet of who is no node arrived")
	default:
	}
	a.Outside.Sh(t, "ip link del forged")

	// A node changes its address, and connections go on.
	moved := netip.MustParseAddr("192.0.2.77")
	b.Sh(t, fmt.Sprintf("ip address add %s/32 dev %s; ip address del %s/32 dev %s", moved, netns.Uplink, b.IP, netns.Uplink))
	describe(nodes, func(n *Node) []netip.Addr {
		if n == b {
			return []netip.Addr{moved, n.IP6}
		}
		return []netip.Addr{n.IP, n.IP6}
	})
	works("another address")
	if err := heard(); err != nil {
		t.Errorf("the server's node has another address: %v", err)
	}

	// IPv6 tunnels cost 20 bytes more.
	describe(nodes, func(n *Node) []netip.Addr { return []netip.Addr{n.IP6} })
	works("IPv6 tunnels")
	netns.Eventually(t, 10*time.Second, "the device's MTU is 1430", func() bool { return a.Link(t, node.OverlayDevice).Attrs().MTU == 1430 })

	// A node that is gone leaves nothing.
	describe(nodes[:1], func(n *Node) []netip.Addr { return []netip.Addr{n.IP, n.IP6} })
	netns.Eventually(t, 10*time.Second, "no route to a node that is gone", func() bool {
		return !strings.Contains(a.Sh(t, "ip route; ip -6 route"), node.OverlayDevice+" proto 77")
	})
	describe(nodes, func(n *Node) []netip.Addr { return []netip.Addr{n.IP, n.IP6} })

	// Nor does the mode, when it is another one; nor cleanup.
	foreign := "10.99.0.0/24 via 192.0.2.1 dev uplink"
	a.Sh(t, "ip route add "+foreign+"; ip link add foreign type vxlan id 7 dstport 4789 dev uplink")
	if err := errors.Join(a.Down(), b.Down()); err != nil {
		t.Error(err)
	}
	a.Flags = nil
	a.Up()
	netns.Eventually(t, 10*time.Second, "the device goes", func() bool { return !a.HasLink(node.OverlayDevice) })
	if err := a.Down(); err != nil {
		t.Error(err)
	}
	for _, n := range nodes {
		if out, err := n.Mooring("cleanup"); err != nil {
			t.Errorf("cleanup: %v\n%s", err, out)
		}
		if left := n.Sh(t, "ip route show proto 77; ip -6 route show proto 77; ip -6 neighbour show dev "+node.OverlayDevice+" 2>/dev/null || true"); left != "" {
			t.Errorf("%s is left with %s", n.NodeName, left)
		}
		if n.HasLink(node.OverlayDevice) {
			t.Errorf("%s is left with the device", n.NodeName)
		}
	}
	if !strings.Contains(a.Sh(t, "ip route"), foreign) || !a.HasLink("foreign") {
		t.Errorf("what is not ours is gone: %s", a.Sh(t, "ip route; ip link"))
	}
}
