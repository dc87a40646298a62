// SPDX-License-Identifier: Apache-2.0

package node

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mooring-cni/mooring/daemon/model"
)

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func machine(name string, addresses []string, cidrs ...string) model.Node {
	n := model.Node{Name: name, PodCIDRs: prefixes(cidrs...)}
	for _, a := range addresses {
		n.Addresses = append(n.Addresses, netip.MustParseAddr(a))
	}
	return n
}

func texts[E interface{ String() string }](list []E) (out []string) {
	for _, e := range list {
		out = append(out, e.String())
	}
	return out
}

func TestRoutesLeadToTheOtherNodesPods(t *testing.T) {
	own := prefixes("10.244.0.0/24", "fd00:10:244::/64")
	nodes := []model.Node{
		machine("c", []string{"192.0.2.3"}, "10.244.2.0/24", "fd00:10:244:2::/64"),
		machine("b", []string{"192.0.2.2", "192.0.2.22", "2001:db8::2"}, "10.244.1.0/24", "fd00:10:244:1::/64"),
		machine("a", []string{"192.0.2.1", "2001:db8::1"}, "10.244.0.0/24", "fd00:10:244::/64"),
		machine("d", []string{"192.0.2.4"}, "10.244.1.0/24"),
		machine("e", []string{"192.0.2.5"}, "10.244.0.128/25"),
		machine("f", nil),
	}
	wanted, problems := routes("a", own, nodes, native)
	if diff := cmp.Diff([]string{
		"unreachable 10.244.0.0/24", "10.244.1.0/24 via 192.0.2.2", "10.244.2.0/24 via 192.0.2.3",
		"unreachable fd00:10:244::/64", "fd00:10:244:1::/64 via 2001:db8::2",
	}, texts(wanted)); diff != "" {
		t.Errorf("routes (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{
		"node c: no address of the family of its pod CIDR fd00:10:244:2::/64: no route to it",
		"node d: its pod CIDR 10.244.1.0/24 is node b's as well: no route to it",
		"node e: its pod CIDR 10.244.0.128/25 overlaps this node's 10.244.0.0/24: no route to it",
	}, problems); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
}

func TestTunnelsLeadToTheOtherNodesPods(t *testing.T) {
	uplinks := []Uplink{{Addresses: addresses("192.0.2.5", "192.0.2.1", "2001:db8::1")}}
	nodes := []model.Node{
		machine("a", []string{"192.0.2.1", "198.51.100.1"}, "10.244.0.0/24"), // this one; the second address is no uplink's
		machine("b", []string{"2001:db8::2", "192.0.2.2"}, "10.244.1.0/24", "fd00:10:244:1::/64"),
		machine("c", []string{"2001:db8::3"}, "10.244.2.0/24"),
		machine("d", nil, "10.244.3.0/24"),
	}
	own := prefixes("10.244.0.0/24", "fd00:10:244::/64")
	tunnels := map[netip.Prefix]Tunnel{}
	wanted, problems := routes("a", own, nodes, tunnelled(own, tunnelAddresses("a", nodes, uplinks), tunnels))
	if diff := cmp.Diff([]string{
		"unreachable 10.244.0.0/24", "10.244.1.0/24 dev mooring_vxlan", "10.244.2.0/24 dev mooring_vxlan",
		"unreachable fd00:10:244::/64", "fd00:10:244:1::/64 dev mooring_vxlan",
	}, texts(wanted)); diff != "" {
		t.Errorf("routes (-want +got):\n%s", diff)
	}
	for _, r := range wanted {
		if r.Overlay && r.Source != nodeAddress(own[0]) && r.Source != nodeAddress(own[1]) {
			t.Errorf("%s is used from %s", r, r.Source)
		}
	}
	if diff := cmp.Diff([]string{"node d: no address of a family that this node has one of: no route to it"}, problems); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
	got := map[string]string{}
	for pods, tunnel := range tunnels {
		got[pods.String()] = tunnel.Local.String() + " " + tunnel.Remote.String()
	}
	if diff := cmp.Diff(map[string]string{
		"10.244.1.0/24": "192.0.2.1 192.0.2.2", "fd00:10:244:1::/64": "192.0.2.1 192.0.2.2", "10.244.2.0/24": "2001:db8::1 2001:db8::3",
	}, got); diff != "" {
		t.Errorf("tunnels (-want +got):\n%s", diff)
	}

	if got := overhead(tunnels, uplinks); got != 70 {
		t.Errorf("one node over IPv6 costs %d", got)
	}
	delete(tunnels, prefixes("10.244.2.0/24")[0])
	if got := overhead(tunnels, uplinks); got != 50 {
		t.Errorf("all over IPv4 costs %d", got)
	}
	if got := overhead(nil, []Uplink{{Addresses: addresses("2001:db8::1")}}); got != 70 {
		t.Errorf("a node without IPv4 costs %d", got)
	}
}

func addresses(list ...string) (out []netip.Addr) {
	for _, a := range list {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func TestDifferenceIsWhatIsLeftToDo(t *testing.T) {
	route := func(to, via string) Route {
		r := Route{Destination: netip.MustParsePrefix(to)}
		if via != "" {
			r.Gateway = netip.MustParseAddr(via)
		}
		return r
	}
	there := []Route{route("10.244.0.0/24", ""), route("10.244.1.0/24", "192.0.2.2"), route("10.244.2.0/24", "192.0.2.3"), route("10.244.9.0/24", "192.0.2.9")}
	wanted := []Route{route("10.244.0.0/24", ""), route("10.244.1.0/24", "192.0.2.7"), route("10.244.2.0/24", "192.0.2.3"), route("10.244.3.0/24", "192.0.2.4")}
	add, change, remove := difference(there, wanted)
	got := map[string][]string{"add": texts(add), "change": texts(change), "remove": texts(remove)}
	want := map[string][]string{"add": {"10.244.3.0/24 via 192.0.2.4"}, "change": {"10.244.1.0/24 via 192.0.2.7"}, "remove": {"10.244.9.0/24 via 192.0.2.9"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if add, change, remove := difference(wanted, wanted); len(add)+len(change)+len(remove) != 0 {
		t.Errorf("nothing differs, but: add %v change %v remove %v", add, change, remove)
	}
}

func TestAggregateHoldsTheSameAddresses(t *testing.T) {
	for _, test := range []struct{ in, want []netip.Prefix }{
		{nil, nil},
		{prefixes("10.244.3.0/24", "10.244.0.0/24", "10.244.2.0/24", "10.244.1.0/24"), prefixes("10.244.0.0/22")},
		{prefixes("10.244.1.0/24", "10.244.2.0/24"), prefixes("10.244.1.0/24", "10.244.2.0/24")},
		{prefixes("10.244.0.0/16", "10.244.2.0/24", "10.244.2.0/24"), prefixes("10.244.0.0/16")},
		{prefixes("10.244.0.7/24", "10.244.1.0/24"), prefixes("10.244.0.0/23")},
		{prefixes("fd00:10:244:1::/64", "fd00:10:244::/64"), prefixes("fd00:10:244::/63")},
		{prefixes("0.0.0.0/1", "128.0.0.0/1"), prefixes("0.0.0.0/0")},
		{prefixes("192.0.2.1/32", "192.0.2.2/32", "192.0.2.3/32"), prefixes("192.0.2.1/32", "192.0.2.2/31")},
	} {
		if diff := cmp.Diff(texts(test.want), texts(aggregate(test.in))); diff != "" {
			t.Errorf("aggregate(%v) (-want +got):\n%s", test.in, diff)
		}
	}
	var many []netip.Prefix
	for i := range 4096 {
		many = append(many, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24))
	}
	if got := aggregate(many); len(got) != 1 || got[0].String() != "10.0.0.0/12" {
		t.Errorf("4096 ranges in order became %v", got)
	}
}

func TestChainsOfBothFamilies(t *testing.T) {
	nodes := []model.Node{
		machine("a", []string{"192.0.2.1", "2001:db8::1"}, "10.244.0.0/24", "fd00:10:244::/64"),
		machine("b", []string{"192.0.2.2", "2001:db8::2"}, "10.244.1.0/24", "fd00:10:244:1::/64"),
	}
	render := func(list []chain) string {
		var b strings.Builder
		for _, c := range list {
			b.WriteString(c.table + " " + c.parent + " -> " + c.name + "\n")
			for _, r := range c.rules {
				b.WriteString(r + "\n")
			}
		}
		return b.String()
	}
	for _, test := range []struct {
		own   string
		nodes []model.Node
		want  string
	}{
		{"10.244.0.0/24", nodes, `nat POSTROUTING -> MOORING-MASQUERADE
-s 10.244.0.0/23 -d 10.244.0.0/24 -m conntrack --ctstate DNAT -j MASQUERADE --random-fully
-s 10.244.0.0/24 -d 10.244.0.0/23 -j RETURN
-s 10.244.0.0/24 -d 192.0.2.1/32 -j RETURN
-s 10.244.0.0/24 -d 192.0.2.2/32 -j RETURN
-s 10.244.0.0/24 -d 224.0.0.0/4 -j RETURN
-s 10.244.0.0/24 -j MASQUERADE --random-fully
raw PREROUTING -> MOORING-NOTRACK
-s 10.244.0.0/23 -d 10.244.0.0/24 -j CT --notrack
-s 10.244.0.0/24 -d 10.244.0.0/23 -j CT --notrack
`},
		{"fd00:10:244::/64", nil, `nat POSTROUTING -> MOORING-MASQUERADE
-s fd00:10:244::/64 -d fd00:10:244::/64 -m conntrack --ctstate DNAT -j MASQUERADE --random-fully
-s fd00:10:244::/64 -d fd00:10:244::/64 -j RETURN
-s fd00:10:244::/64 -d ff00::/8 -j RETURN
-s fd00:10:244::/64 -j MASQUERADE --random-fully
raw PREROUTING -> MOORING-NOTRACK
-s fd00:10:244::/64 -d fd00:10:244::/64 -j CT --notrack
`},
	} {
		if diff := cmp.Diff(test.want, render(chains(prefixes(test.own), test.nodes, false, true))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.own, diff)
		}
	}
}

func TestSmallestUplinkDecidesTheMTU(t *testing.T) {
	if got := MTU([]Uplink{{MTU: 9000}, {MTU: 1450}, {MTU: 1500}}); got != 1450 {
		t.Errorf("MTU %d, want 1450", got)
	}
	if got := MTU(nil); got != 1500 {
		t.Errorf("MTU without uplink %d, want 1500", got)
	}
}
