// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// defaultMTU is for pods of a node that has no uplink.
const defaultMTU = 1500

// Uplink is a device by which the node reaches the world.
type Uplink struct {
	Name      string
	Index     int
	MTU       int
	MAC       [6]byte // 0: it has none
	Veth      bool
	Addresses []netip.Addr // global ones
}

// Uplinks finds the devices of these names or, without any, those of the
// default routes. A device that is not there is a problem, not an error: it
// may come.
func Uplinks(devices []string) (uplinks []Uplink, problems []string, err error) {
	if len(devices) == 0 {
		if devices, err = defaultDevices(); err != nil {
			return nil, nil, err
		}
	}
	for _, name := range devices {
		link, err := netlink.LinkByName(name)
		var missing netlink.LinkNotFoundError
		if errors.As(err, &missing) {
			problems = append(problems, fmt.Sprintf("device %s (devices) is not in this network namespace", name))
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("look for device %s: %w", name, err)
		}
		addresses, err := globalAddresses(link)
		if err != nil {
			return nil, nil, err
		}
		u := Uplink{Name: name, Index: link.Attrs().Index, MTU: link.Attrs().MTU, Veth: link.Type() == "veth", Addresses: addresses}
		copy(u.MAC[:], link.Attrs().HardwareAddr)
		uplinks = append(uplinks, u)
	}
	return uplinks, problems, nil
}

// MTU is the largest that every uplink carries.
func MTU(uplinks []Uplink) int {
	if len(uplinks) == 0 {
		return defaultMTU
	}
	return slices.MinFunc(uplinks, func(a, b Uplink) int { return a.MTU - b.MTU }).MTU
}

// Addresses are those of the uplinks.
func Addresses(uplinks []Uplink) (all []netip.Addr) {
	for _, u := range uplinks {
		all = append(all, u.Addresses...)
	}
	return all
}

// AddressesIn are those of this network namespace, on whatever interface, that
// are in one of the ranges, sorted.
func AddressesIn(ranges []netip.Prefix) (list []netip.Addr, err error) {
	addresses, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addresses {
		ip, ok := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		if !ok || ip.IsLoopback() || ip.IsLinkLocalUnicast() || slices.Contains(list, ip) {
			continue
		}
		if slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(ip) }) {
			list = append(list, ip)
		}
	}
	slices.SortFunc(list, netip.Addr.Compare)
	return list, nil
}

// defaultDevices are the devices of the default routes with the best metric,
// of either family; several where the route is a multipath one.
func defaultDevices() (names []string, err error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
		if err != nil {
			if errors.Is(err, unix.EAFNOSUPPORT) {
				continue
			}
			return nil, fmt.Errorf("list default routes: %w", err)
		}
		var best []int
		metric := 0
		for _, r := range routes {
			if r.Type != unix.RTN_UNICAST || best != nil && r.Priority > metric {
				continue
			}
			if best != nil && r.Priority < metric {
				best = nil
			}
			metric = r.Priority
			if len(r.MultiPath) == 0 {
				best = append(best, r.LinkIndex)
			}
			for _, hop := range r.MultiPath {
				best = append(best, hop.LinkIndex)
			}
		}
		for _, index := range best {
			link, err := netlink.LinkByIndex(index)
			if err != nil {
				continue // gone since
			}
			if name := link.Attrs().Name; !slices.Contains(names, name) && link.Attrs().Flags&unix.IFF_LOOPBACK == 0 {
				names = append(names, name)
			}
		}
	}
	return names, nil
}

func globalAddresses(link netlink.Link) (list []netip.Addr, err error) {
	addresses, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses of %s: %w", link.Attrs().Name, err)
	}
	for _, a := range addresses {
		ip, ok := netip.AddrFromSlice(a.IP)
		if ip = ip.Unmap(); ok && a.Scope == unix.RT_SCOPE_UNIVERSE && !ip.IsLinkLocalUnicast() {
			list = append(list, ip)
		}
	}
	return list, nil
}
