// SPDX-License-Identifier: Apache-2.0

package node

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/daemon/model"
)

// Protocol marks our routes in the kernel (`ip route show proto 77`): what
// bears it is ours to change, what does not is nobody's business here.
const Protocol = 77

// Route is one of our routes: to a node's pods by the node's address (Gateway)
// or by the overlay's device, from an address of this node (Source); with neither
// the unreachable rest of our own pods' range.
type Route struct {
	Destination netip.Prefix
	Gateway     netip.Addr
	Source      netip.Addr
	Overlay     bool
}

func (r Route) String() string {
	switch {
	case r.Overlay:
		return r.Destination.String() + " dev " + OverlayDevice
	case !r.Gateway.IsValid():
		return "unreachable " + r.Destination.String()
	}
	return r.Destination.String() + " via " + r.Gateway.String()
}

func compareRoutes(a, b Route) int {
	return cmp.Or(a.Destination.Compare(b.Destination), a.Gateway.Compare(b.Gateway), a.Source.Compare(b.Source))
}

// way finds how a node's range of pods is reached, or says why it is not.
type way func(n model.Node, pods netip.Prefix) (r Route, problem string)

// native leads by the nodes' addresses.
func native(n model.Node, pods netip.Prefix) (Route, string) {
	i := slices.IndexFunc(n.Addresses, func(a netip.Addr) bool { return a.Is4() == pods.Addr().Is4() })
	if i < 0 {
		return Route{}, fmt.Sprintf("no address of the family of its pod CIDR %s", pods)
	}
	return Route{Destination: pods, Gateway: n.Addresses[i]}, ""
}

// tunnelled leads by tunnels from local, which are noted.
func tunnelled(own []netip.Prefix, local []netip.Addr, tunnels map[netip.Prefix]Tunnel) way {
	return func(n model.Node, pods netip.Prefix) (Route, string) {
		tunnel, found := tunnelTo(n, local)
		if !found {
			return Route{}, "no address of a family that this node has one of"
		}
		tunnels[pods] = tunnel
		r := Route{Destination: pods, Overlay: true}
		for _, prefix := range own {
			if prefix.Addr().Is4() == pods.Addr().Is4() {
				r.Source = nodeAddress(prefix)
			}
		}
		return r, ""
	}
}

// routes says which routes the node self with the pod ranges own should have
// so that it reaches the pods of nodes. The ranges of its own that no pod has
// are unreachable: a packet to one must not go to the default route, whose
// router would send it back.
func routes(self string, own []netip.Prefix, nodes []model.Node, find way) (wanted []Route, problems []string) {
	owner := map[netip.Prefix]string{}
	for _, prefix := range own {
		wanted = append(wanted, Route{Destination: prefix})
		owner[prefix] = self
	}
	nodes = slices.Clone(nodes)
	slices.SortFunc(nodes, func(a, b model.Node) int { return cmp.Compare(a.Name, b.Name) })
	for _, n := range nodes {
		if n.Name == self {
			continue
		}
		for _, prefix := range n.PodCIDRs {
			if i := slices.IndexFunc(own, prefix.Overlaps); i >= 0 {
				problems = append(problems, fmt.Sprintf("node %s: its pod CIDR %s overlaps this node's %s: no route to it", n.Name, prefix, own[i]))
				continue
			}
			if other, taken := owner[prefix]; taken {
				problems = append(problems, fmt.Sprintf("node %s: its pod CIDR %s is node %s's as well: no route to it", n.Name, prefix, other))
				continue
			}
			route, problem := find(n, prefix)
			if problem != "" {
				problems = append(problems, fmt.Sprintf("node %s: %s: no route to it", n.Name, problem))
				continue
			}
			owner[prefix] = n.Name
			wanted = append(wanted, route)
		}
	}
	slices.SortFunc(wanted, compareRoutes)
	return wanted, problems
}

// difference says what turns the routes that are there into the wanted ones.
// A route whose gateway changed is changed in place.
func difference(there, wanted []Route) (add, change, remove []Route) {
	old := map[netip.Prefix]Route{}
	for _, r := range there {
		if _, twice := old[r.Destination]; twice {
			remove = append(remove, r)
			continue
		}
		old[r.Destination] = r
	}
	for _, r := range wanted {
		was, known := old[r.Destination]
		delete(old, r.Destination)
		switch {
		case !known:
			add = append(add, r)
		case was != r:
			change = append(change, r)
		}
	}
	for _, r := range old {
		remove = append(remove, r)
	}
	slices.SortFunc(remove, compareRoutes)
	return add, change, remove
}

// ours lists the routes that bear our protocol number; overlay is the index of
// the overlay's device.
func ours(overlay int) (list []Route, err error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		found, err := netlink.RouteListFiltered(family, &netlink.Route{Protocol: Protocol, Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range found {
			if destination, ok := prefixOf(r.Dst, family); ok {
				gateway, _ := netip.AddrFromSlice(r.Gw)
				route := Route{Destination: destination, Gateway: gateway.Unmap()}
				if overlay != 0 && r.LinkIndex == overlay {
					source, _ := netip.AddrFromSlice(r.Src)
					route.Overlay, route.Source = true, source.Unmap()
				}
				list = append(list, route)
			}
		}
	}
	return list, nil
}

// apply gives the kernel the wanted routes that it lacks; remove takes away those
// that are not wanted.
func apply(wanted []Route, overlay int) (problems []string, remove func() []string, err error) {
	there, err := ours(overlay)
	if err != nil {
		return nil, func() []string { return nil }, err
	}
	add, change, unwanted := difference(there, wanted)
	for _, r := range change {
		if err := netlink.RouteReplace(kernelRoute(r, overlay)); err != nil {
			problems = append(problems, explain(r, err))
		}
	}
	for _, r := range add {
		if err := netlink.RouteAdd(kernelRoute(r, overlay)); err != nil {
			problems = append(problems, explain(r, err))
		}
	}
	return problems, func() (problems []string) {
		for _, r := range unwanted {
			if err := netlink.RouteDel(kernelRoute(r, overlay)); err != nil && !errors.Is(err, unix.ESRCH) {
				problems = append(problems, fmt.Sprintf("remove route %s: %v", r, err))
			}
		}
		return problems
	}, nil
}

// explain says what an errno of a route means here.
func explain(r Route, err error) string {
	switch {
	case errors.Is(err, unix.EEXIST):
		return fmt.Sprintf("route %s: somebody else has a route to it, which stays: remove that one", r)
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EINVAL) && r.Gateway.IsValid():
		return fmt.Sprintf("route %s: the gateway is on none of this node's links, as routing.mode native needs it", r)
	}
	return fmt.Sprintf("route %s: %v", r, err)
}

func kernelRoute(r Route, overlay int) *netlink.Route {
	route := &netlink.Route{
		Dst:      &net.IPNet{IP: r.Destination.Addr().AsSlice(), Mask: net.CIDRMask(r.Destination.Bits(), r.Destination.Addr().BitLen())},
		Protocol: Protocol,
		Table:    unix.RT_TABLE_MAIN,
	}
	switch {
	case r.Overlay:
		route.LinkIndex, route.Scope = overlay, netlink.SCOPE_LINK
		if r.Source.IsValid() {
			route.Src = r.Source.AsSlice()
		}
	case r.Gateway.IsValid():
		route.Gw = r.Gateway.AsSlice()
	default:
		route.Type = unix.RTN_UNREACHABLE
	}
	return route
}

func prefixOf(n *net.IPNet, family int) (netip.Prefix, bool) {
	if n == nil {
		if family == netlink.FAMILY_V4 {
			return netip.PrefixFrom(netip.IPv4Unspecified(), 0), true
		}
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0), true
	}
	address, ok := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(address.Unmap(), bits), ok
}

// removeRoutes takes all of our routes away.
func removeRoutes() error {
	there, err := ours(0)
	if err != nil {
		return err
	}
	for _, r := range there {
		if err := netlink.RouteDel(kernelRoute(r, 0)); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove route %s: %w", r, err)
		}
	}
	return nil
}
