// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Veth connects two namespaces by a pair of interfaces, which are up.
func Veth(t T, a *NS, nameA string, b *NS, nameB string) {
	t.Helper()
	link := netlink.NewVeth(netlink.LinkAttrs{Name: nameA})
	link.PeerName = nameB
	link.PeerNamespace = netlink.NsFd(b.file.Fd())
	if err := a.handle.LinkAdd(link); err != nil {
		t.Fatalf("make veth %s in %s to %s in %s: %v", nameA, a.name, nameB, b.name, err)
	}
	a.up(t, nameA)
	b.up(t, nameB)
}

func (n *NS) up(t T, name string) {
	t.Helper()
	if err := n.handle.LinkSetUp(n.Link(t, name)); err != nil {
		t.Fatalf("set %s of %s up: %v", name, n.name, err)
	}
}

// Link is an interface of the namespace.
func (n *NS) Link(t T, name string) netlink.Link {
	t.Helper()
	link, err := n.handle.LinkByName(name)
	if err != nil {
		t.Fatalf("interface %s of %s: %v", name, n.name, err)
	}
	return link
}

// HasLink says whether there is an interface of that name.
func (n *NS) HasLink(name string) bool {
	_, err := n.handle.LinkByName(name)
	return err == nil
}

// Links are the names of the namespace's interfaces, lo left out.
func (n *NS) Links(t T) (names []string) {
	t.Helper()
	links, err := n.handle.LinkList()
	if err != nil {
		t.Fatalf("list interfaces of %s: %v", n.name, err)
	}
	for _, link := range links {
		if name := link.Attrs().Name; name != "lo" {
			names = append(names, name)
		}
	}
	return names
}

// Addr gives an interface addresses with their prefix: "192.0.2.11/24". They
// are usable at once, without duplicate address detection.
func (n *NS) Addr(t T, dev string, addresses ...string) {
	t.Helper()
	link := n.Link(t, dev)
	for _, text := range addresses {
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			t.Fatalf("address of %s in %s: %v", dev, n.name, err)
		}
		a := &netlink.Addr{IPNet: ipnet(prefix)}
		if prefix.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := n.handle.AddrReplace(link, a); err != nil {
			t.Fatalf("add address %s to %s in %s: %v", text, dev, n.name, err)
		}
		// An IPv6 address gets its local route by a work queue, some milliseconds later.
		if prefix.Addr().Is6() && link.Attrs().Flags&net.FlagUp != 0 {
			Eventually(t, 5*time.Second, text+" is usable in "+n.name, func() bool {
				return n.isLocal(prefix.Addr())
			})
		}
	}
}

// isLocal says whether the kernel takes packets to an address.
func (n *NS) isLocal(a netip.Addr) bool {
	routes, err := n.handle.RouteListFiltered(netlink.FAMILY_V6,
		&netlink.Route{Table: unix.RT_TABLE_LOCAL, Dst: ipnet(netip.PrefixFrom(a, a.BitLen()))},
		netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
	return err == nil && len(routes) > 0
}

// Route adds a route to a prefix ("default" and "default6" are all of a
// family) by a gateway; without one ("") the destination is on dev's link.
func (n *NS) Route(t T, to, via, dev string) {
	t.Helper()
	switch to {
	case "default":
		to = "0.0.0.0/0"
	case "default6":
		to = "::/0"
	}
	prefix, err := netip.ParsePrefix(to)
	if err != nil {
		t.Fatalf("route in %s: %v", n.name, err)
	}
	r := &netlink.Route{LinkIndex: n.Link(t, dev).Attrs().Index, Dst: ipnet(prefix)}
	if via != "" {
		r.Gw = net.ParseIP(via)
	} else if prefix.Addr().Is4() {
		r.Scope = netlink.SCOPE_LINK
	}
	if err := n.handle.RouteReplace(r); err != nil {
		t.Fatalf("add route to %s via %q dev %s in %s: %v", to, via, dev, n.name, err)
	}
}

func ipnet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Sysctl sets a kernel parameter of the namespace: "net.ipv4.ip_forward".
// Dots in an interface's name are written as slashes, as sysctl(8) has it.
func (n *NS) Sysctl(t T, key, value string) {
	t.Helper()
	err := n.Do(func() error { return os.WriteFile(sysctlPath(key), []byte(value), 0) })
	if err != nil {
		t.Fatalf("set %s in %s: %v", key, n.name, err)
	}
}

// SysctlValue reads a kernel parameter of the namespace.
func (n *NS) SysctlValue(t T, key string) (value string) {
	t.Helper()
	err := n.Do(func() error {
		text, err := os.ReadFile(sysctlPath(key))
		value = strings.TrimSpace(string(text))
		return err
	})
	if err != nil {
		t.Fatalf("read %s in %s: %v", key, n.name, err)
	}
	return value
}

func sysctlPath(key string) string {
	swap := strings.NewReplacer(".", "/", "/", ".")
	return "/proc/sys/" + swap.Replace(key)
}
