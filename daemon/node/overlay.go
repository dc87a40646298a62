// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/daemon/model"
)

// OverlayDevice is the VXLAN device that leads to the pods of other nodes. Its
// name makes it ours.
const OverlayDevice = "mooring_vxlan"

const (
	overlayPort = 8472 // Linux' own; overlays of others on the node must use another
	// What a tunnel adds to a packet: the outer IP header, 8 bytes of UDP, 8 of
	// VXLAN and the inner Ethernet header of 14.
	overheadIPv4, overheadIPv6 = 50, 70

	addrGenModeNone = 1 // IN6_ADDR_GEN_MODE_NONE
)

// overlayMAC is that of every node's device: what a node sends to its own
// address, as no neighbour is asked for, the other node takes as its own.
var overlayMAC = net.HardwareAddr{0x02, 'm', 'o', 'o', 'r', 0x01}

// Tunnel is how a node's pods are reached: by which of its addresses, from
// which of this node's (not valid: as the route has it).
type Tunnel struct{ Remote, Local netip.Addr }

// TunnelSetter gives the datapath the tunnels, by the range of pods that each
// leads to, and the device that they begin at; index 0: there is none.
type TunnelSetter func(device string, index int, tunnels map[netip.Prefix]Tunnel) error

// tunnelTo chooses the tunnel to a node: IPv4, which costs less, where both have it.
func tunnelTo(n model.Node, local []netip.Addr) (Tunnel, bool) {
	for _, v4 := range []bool{true, false} {
		is := func(a netip.Addr) bool { return a.Is4() == v4 }
		remote, mine := slices.IndexFunc(n.Addresses, is), slices.IndexFunc(local, is)
		if remote >= 0 && mine >= 0 {
			return Tunnel{Remote: n.Addresses[remote], Local: local[mine]}, true
		}
	}
	return Tunnel{}, false
}

// tunnelAddresses are this node's, those of its object first: by these the
// other nodes know it. An address that no uplink has cannot be sent from.
func tunnelAddresses(self string, nodes []model.Node, uplinks []Uplink) (list []netip.Addr) {
	here := Addresses(uplinks)
	for _, n := range nodes {
		if n.Name != self {
			continue
		}
		for _, a := range n.Addresses {
			if slices.Contains(here, a) {
				list = append(list, a)
			}
		}
	}
	return append(list, here...)
}

// overhead is what the tunnels add at most.
func overhead(tunnels map[netip.Prefix]Tunnel, uplinks []Uplink) int {
	if !slices.ContainsFunc(Addresses(uplinks), netip.Addr.Is4) && len(Addresses(uplinks)) > 0 {
		return overheadIPv6
	}
	for _, t := range tunnels {
		if !t.Remote.Is4() {
			return overheadIPv6
		}
	}
	return overheadIPv4
}

// nodeAddress is that of a range of pods which is the node's own: no pod gets it.
func nodeAddress(pods netip.Prefix) netip.Addr { return pods.Masked().Addr().Next() }

// ensureOverlay makes the device what it should be and returns its index.
func ensureOverlay(own []netip.Prefix, mtu int) (index int, err error) {
	link, err := overlayLink()
	if err != nil {
		return 0, err
	}
	if link != nil && !soundOverlay(link) {
		if err := netlink.LinkDel(link); err != nil {
			return 0, fmt.Errorf("replace device %s: %w", OverlayDevice, err)
		}
		link = nil
	}
	if link == nil {
		made := &netlink.Vxlan{
			LinkAttrs: netlink.LinkAttrs{Name: OverlayDevice, MTU: mtu, HardwareAddr: overlayMAC},
			FlowBased: true, Port: overlayPort,
		}
		if err := netlink.LinkAdd(made); err != nil {
			return 0, fmt.Errorf("make device %s on UDP port %d: %w", OverlayDevice, overlayPort, err)
		}
		if link, err = overlayLink(); err != nil || link == nil {
			return 0, fmt.Errorf("device %s is gone again (%w)", OverlayDevice, err)
		}
	}
	attributes := link.Attrs()
	if attributes.MTU != mtu {
		if err := netlink.LinkSetMTU(link, mtu); err != nil {
			return 0, fmt.Errorf("set the MTU of %s to %d: %w", OverlayDevice, mtu, err)
		}
	}
	if attributes.RawFlags&unix.IFF_NOARP == 0 {
		if err := netlink.LinkSetARPOff(link); err != nil {
			return 0, fmt.Errorf("turn ARP off on %s: %w", OverlayDevice, err)
		}
	}
	if attributes.RawFlags&unix.IFF_UP == 0 {
		if err := netlink.LinkSetIP6AddrGenMode(link, addrGenModeNone); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return 0, fmt.Errorf("set %s up without an address of its own: %w", OverlayDevice, err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return 0, fmt.Errorf("set %s up: %w", OverlayDevice, err)
		}
	}
	return attributes.Index, ensureOverlayAddresses(link, own)
}

// ensureOverlayAddresses gives the node an address among its pods, so that what
// it sends to other nodes' pods is answered through the tunnel. For nothing else
// is it ever chosen.
func ensureOverlayAddresses(link netlink.Link, own []netip.Prefix) error {
	there, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", OverlayDevice, err)
	}
	wanted := map[netip.Addr]bool{}
	for _, prefix := range own {
		wanted[nodeAddress(prefix)] = true
	}
	for _, a := range there {
		ip, _ := netip.AddrFromSlice(a.IP)
		if ip = ip.Unmap(); wanted[ip] {
			delete(wanted, ip)
			continue
		}
		if err := netlink.AddrDel(link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s of %s: %w", ip, OverlayDevice, err)
		}
	}
	for ip := range wanted {
		address := &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())}}
		if ip.Is4() {
			address.Scope = unix.RT_SCOPE_LINK
		} else {
			// Deprecated from the start, and for ever.
			address.ValidLft, address.PreferedLft, address.Flags = math.MaxUint32, 0, unix.IFA_F_NODAD
		}
		if err := netlink.AddrReplace(link, address); err != nil {
			return fmt.Errorf("give %s the address %s: %w", OverlayDevice, ip, err)
		}
	}
	return nil
}

// OverlayUplink is the device, and the node's own addresses among the pods', as
// far as they are there.
func OverlayUplink() (u Uplink, there bool) {
	link, err := overlayLink()
	if err != nil || link == nil {
		return u, false
	}
	u = Uplink{Name: OverlayDevice, Index: link.Attrs().Index, MTU: link.Attrs().MTU}
	addresses, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return u, false
	}
	for _, a := range addresses {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && !ip.IsLinkLocalUnicast() {
			u.Addresses = append(u.Addresses, ip.Unmap())
		}
	}
	return u, true
}

// overlayLink is the device, or nil.
func overlayLink() (netlink.Link, error) {
	link, err := netlink.LinkByName(OverlayDevice)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for device %s: %w", OverlayDevice, err)
	}
	return link, nil
}

func soundOverlay(link netlink.Link) bool {
	vxlan, ok := link.(*netlink.Vxlan)
	return ok && vxlan.FlowBased && !vxlan.Learning && vxlan.Port == overlayPort && slices.Equal(link.Attrs().HardwareAddr, overlayMAC)
}

// removeOverlay takes the device away, and with it its routes and addresses.
func removeOverlay() error {
	link, err := overlayLink()
	if err != nil || link == nil {
		return err
	}
	if err := netlink.LinkDel(link); err != nil {
		return fmt.Errorf("remove device %s: %w", OverlayDevice, err)
	}
	return nil
}
