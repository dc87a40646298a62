// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/test/netns"
)

// Plain is a node without Mooring: pods behind veths with the same addresses,
// routes and neighbours as the plugin gives, and nothing attached.
type Plain struct {
	*netns.Node
	pods int
}

// PlainPod is a pod of such a node.
type PlainPod struct {
	*netns.NS
	IP, IP6 netip.Addr
	Host    string // the host's end of its veth
}

const (
	gateway  = "169.254.1.1"
	gateway6 = "fe80::1"
)

// NewPlain makes a plain node.
func NewPlain(t netns.T) *Plain {
	t.Helper()
	return &Plain{Node: netns.NewNode(t)}
}

// Pod adds a pod.
func (n *Plain) Pod(t netns.T) *PlainPod {
	t.Helper()
	n.pods++
	p := &PlainPod{
		NS: netns.New(t, fmt.Sprintf("plain%d", n.pods)), Host: fmt.Sprintf("lxc%d", n.pods),
		IP: netip.AddrFrom4([4]byte{10, 244, 0, byte(1 + n.pods)}), IP6: netip.MustParseAddr(fmt.Sprintf("fd00:10:244::%d", 1+n.pods)),
	}
	netns.Veth(t, n.NS, p.Host, p.NS, "eth0")
	n.Addr(t, p.Host, gateway+"/32", gateway6+"/128")
	p.Addr(t, "eth0", p.IP.String()+"/32", p.IP6.String()+"/128")
	p.Route(t, gateway+"/32", "", "eth0")
	p.Route(t, "default", gateway, "eth0")
	p.Route(t, "default6", gateway6, "eth0")
	n.Route(t, p.IP.String()+"/32", "", p.Host)
	n.Route(t, p.IP6.String()+"/128", "", p.Host)
	for _, address := range []string{gateway, gateway6} {
		neighbour(t, p.NS, "eth0", address, n.Link(t, p.Host))
	}
	for _, address := range []netip.Addr{p.IP, p.IP6} {
		neighbour(t, n.NS, p.Host, address.String(), p.Link(t, "eth0"))
	}
	return p
}

func neighbour(t netns.T, ns *netns.NS, dev, address string, owner netlink.Link) {
	t.Helper()
	ip := netip.MustParseAddr(address)
	n := &netlink.Neigh{LinkIndex: ns.Link(t, dev).Attrs().Index, Family: netlink.FAMILY_V4, State: unix.NUD_PERMANENT,
		IP: ip.AsSlice(), HardwareAddr: owner.Attrs().HardwareAddr}
	if ip.Is6() {
		n.Family = netlink.FAMILY_V6
	}
	if err := ns.Netlink().NeighSet(n); err != nil {
		t.Fatalf("add neighbour %s in %s: %v", address, ns.Name(), err)
	}
}

// Services gives a node services the way kube-proxy does.
type Services func(t netns.T, n *netns.NS, count int, backends []netip.AddrPort)

// serviceAddress is the i-th service's; the first is the one that is used.
func serviceAddress(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(10 + i&0xff)})
}

// NFTables lays services out as kube-proxy's nftables mode does: one verdict map
// from address, protocol and port to the service's chain, which picks an
// endpoint's by a random number; traffic that is to be masqueraded is marked.
func NFTables(t netns.T, n *netns.NS, count int, backends []netip.AddrPort) {
	t.Helper()
	var b, elements, addresses strings.Builder
	b.WriteString(`table ip proxy {
	set cluster-ips { type ipv4_addr; }
	map services { type ipv4_addr . inet_proto . inet_service : verdict; }
	map no-endpoints { type ipv4_addr . inet_proto . inet_service : verdict; }
	chain mark-for-masquerade { meta mark set meta mark or 0x4000; }
	chain masquerading {
		meta mark & 0x4000 == 0 return
		meta mark set meta mark xor 0x4000
		masquerade fully-random
	}
	chain reject-chain { reject; }
	chain services { ip daddr . meta l4proto . th dport vmap @services; }
	chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoints; }
	chain cluster-ips-check { ip daddr @cluster-ips reject; }
	chain filter-prerouting { type filter hook prerouting priority -110; ct state new jump service-endpoints-check; }
	chain filter-forward { type filter hook forward priority -110; ct state new jump cluster-ips-check; }
	chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
	chain nat-output { type nat hook output priority -100; jump services; }
	chain nat-postrouting { type nat hook postrouting priority srcnat; jump masquerading; }
`)
	for i := range count {
		for _, proto := range []string{"tcp", "udp"} {
			port := map[string]int{"tcp": TCPPort, "udp": UDPPort}[proto]
			var picks []string
			for j, backend := range backends {
				fmt.Fprintf(&b, "\tchain endpoint-%d-%s-%d { ip saddr %s jump mark-for-masquerade; meta l4proto %s dnat to %s:%d; }\n", i, proto, j, backend.Addr(), proto, backend.Addr(), port)
				picks = append(picks, fmt.Sprintf("%d : goto endpoint-%d-%s-%d", j, i, proto, j))
			}
			fmt.Fprintf(&b, "\tchain service-%d-%s { ip daddr %s %s dport %d ip saddr != 10.244.0.0/16 jump mark-for-masquerade; numgen random mod %d vmap { %s }; }\n",
				i, proto, serviceAddress(i), proto, port, len(backends), strings.Join(picks, ", "))
			fmt.Fprintf(&elements, "%s . %s . %d : goto service-%d-%s,", serviceAddress(i), proto, port, i, proto)
		}
		fmt.Fprintf(&addresses, "%s,", serviceAddress(i))
	}
	b.WriteString("}\n")
	fmt.Fprintf(&b, "add element ip proxy cluster-ips { %s }\nadd element ip proxy services { %s }\n", addresses.String(), elements.String())
	feed(t, n, b.String(), "nft", "-f", "-")
}

// IPTables lays services out as kube-proxy's iptables mode does: one rule after
// another compares the destination with each service's.
func IPTables(t netns.T, n *netns.NS, count int, backends []netip.AddrPort) {
	t.Helper()
	var heads, rules strings.Builder
	heads.WriteString("*nat\n:PREROUTING ACCEPT\n:INPUT ACCEPT\n:OUTPUT ACCEPT\n:POSTROUTING ACCEPT\n:PROXY-SERVICES -\n:PROXY-MARK -\n:PROXY-POSTROUTING -\n")
	rules.WriteString("-A PREROUTING -j PROXY-SERVICES\n-A OUTPUT -j PROXY-SERVICES\n-A POSTROUTING -j PROXY-POSTROUTING\n" +
		"-A PROXY-MARK -j MARK --or-mark 0x4000\n" +
		"-A PROXY-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n-A PROXY-POSTROUTING -j MARK --xor-mark 0x4000\n-A PROXY-POSTROUTING -j MASQUERADE --random-fully\n")
	// The one that is used is the last.
	for i := count - 1; i >= 0; i-- {
		for _, proto := range []string{"tcp", "udp"} {
			port := map[string]int{"tcp": TCPPort, "udp": UDPPort}[proto]
			service := fmt.Sprintf("PROXY-SVC-%d%s", i, proto)
			fmt.Fprintf(&heads, ":%s -\n", service)
			fmt.Fprintf(&rules, "-A PROXY-SERVICES -d %s/32 -p %s -m comment --comment \"default/service-%d:%s cluster IP\" -m %s --dport %d -j %s\n", serviceAddress(i), proto, i, proto, proto, port, service)
			fmt.Fprintf(&rules, "-A %s ! -s 10.244.0.0/16 -d %s/32 -p %s -m %s --dport %d -j PROXY-MARK\n", service, serviceAddress(i), proto, proto, port)
			for j, backend := range backends {
				endpoint := fmt.Sprintf("PROXY-SEP-%d%s%d", i, proto, j)
				fmt.Fprintf(&heads, ":%s -\n", endpoint)
				chance := ""
				if left := len(backends) - j; left > 1 {
					chance = fmt.Sprintf("-m statistic --mode random --probability %.8f ", 1/float64(left))
				}
				fmt.Fprintf(&rules, "-A %s %s-j %s\n-A %s -s %s/32 -j PROXY-MARK\n-A %s -p %s -m %s -j DNAT --to-destination %s:%d\n",
					service, chance, endpoint, endpoint, backend.Addr(), endpoint, proto, proto, backend.Addr(), port)
			}
		}
	}
	feed(t, n, heads.String()+rules.String()+"COMMIT\n", "iptables-restore")
	feed(t, n, "*filter\n:INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\n:PROXY-FORWARD -\n-A FORWARD -j PROXY-FORWARD\n"+
		"-A PROXY-FORWARD -m conntrack --ctstate INVALID -j DROP\n-A PROXY-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n"+
		"-A PROXY-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n", "iptables-restore")
}

func feed(t netns.T, n *netns.NS, text, name string, args ...string) {
	t.Helper()
	c := n.Command(name, args...)
	c.Stdin = strings.NewReader(text)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %.2000s", name, err, out)
	}
}
