// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/ipam"
)

// cmdCheck says what is not as ADD has left it. Other plugins of the chain may
// have added to it.
func cmdCheck(args *skel.CmdArgs) error {
	a, err := parse(args)
	if err != nil {
		return err
	}
	result, err := a.previous()
	if err != nil {
		return err
	}
	if result == nil {
		return failed(types.ErrInvalidNetworkConfig, "CHECK: prevResult is missing")
	}
	if err := a.ask(); err != nil {
		return err
	}
	if err := a.openHandles(); err != nil {
		return err
	}
	for _, check := range []func() error{
		func() error { return a.readResult(result) },
		a.checkAddresses,
		a.checkHost,
		a.checkPod,
		a.checkDaemon,
		a.checkPrograms,
	} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

// difference is an error that says what is not as it was.
func difference(format string, args ...any) error {
	return failed(differs, "CHECK: "+format, args...)
}

// readResult takes from what ADD has answered what is to be there.
func (a *attachment) readResult(result *current.Result) error {
	host, pod := -1, -1
	for i, made := range result.Interfaces {
		switch {
		case made.Sandbox == "" && made.Name == a.host.name:
			host = i
		case made.Sandbox == a.netns && made.Name == a.ifname:
			pod = i
		}
	}
	if host < 0 || pod < 0 {
		return difference("prevResult does not have both %s and %s in %s", a.host.name, a.ifname, a.netns)
	}
	for _, want := range []struct {
		of  *current.Interface
		mac *net.HardwareAddr
	}{{result.Interfaces[host], &a.host.mac}, {result.Interfaces[pod], &a.mac}} {
		mac, err := net.ParseMAC(want.of.Mac)
		if err != nil {
			return failed(types.ErrDecodingFailure, "prevResult: %s: %q is no MAC", want.of.Name, want.of.Mac)
		}
		*want.mac = mac
	}
	for _, ip := range result.IPs {
		if ip.Interface != nil && *ip.Interface != pod {
			continue
		}
		addr, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return failed(types.ErrDecodingFailure, "prevResult: %q is no IP address", ip.Address.IP)
		}
		a.ips = append(a.ips, addr.Unmap())
	}
	if len(a.ips) == 0 {
		return difference("prevResult has no address for %s", a.ifname)
	}
	return nil
}

// checkAddresses compares with what the addresses' keeper knows.
func (a *attachment) checkAddresses() error {
	ctx, cancel := a.addressContext()
	defer cancel()
	given, err := a.addresses.Check(ctx)
	var none *ipam.NotFoundError
	if errors.As(err, &none) {
		return difference("%v", none)
	}
	if err != nil || !a.conf.IPAM.Own() {
		return err
	}
	if !sameAddresses(given, a.ips) {
		return difference("addresses %v were given, but prevResult has %v", given, a.ips)
	}
	return nil
}

func (a *attachment) checkHost() error {
	link, err := a.hostside.LinkByName(a.host.name)
	if gone(err) {
		return difference("%s is gone", a.host.name)
	}
	if err != nil {
		return fmt.Errorf("look at %s: %w", a.host.name, err)
	}
	a.host.index = link.Attrs().Index
	if link.Attrs().Alias != a.host.alias {
		return difference("%s has the alias %q, not %q", a.host.name, link.Attrs().Alias, a.host.alias)
	}
	if err := checkLink(link, a.host.mac); err != nil {
		return err
	}
	for _, ip := range a.ips {
		if err := checkRoute(a.hostside, toPod(a.host.index, ip), a.host.name); err != nil {
			return err
		}
		if err := checkNeighbour(a.hostside, link, ip, a.mac); err != nil {
			return err
		}
	}
	return nil
}

func (a *attachment) checkPod() error {
	link, err := a.podside.LinkByName(a.ifname)
	if gone(err) {
		return difference("%s is gone from %s", a.ifname, a.netns)
	}
	if err != nil {
		return fmt.Errorf("look at %s in %s: %w", a.ifname, a.netns, err)
	}
	if err := checkLink(link, a.mac); err != nil {
		return err
	}
	addresses, err := a.podside.AddrList(link, unix.AF_UNSPEC)
	if err != nil {
		return fmt.Errorf("list addresses of %s in %s: %w", a.ifname, a.netns, err)
	}
	for _, ip := range a.ips {
		if !slices.ContainsFunc(addresses, func(has netlink.Addr) bool { return has.IP.Equal(ip.AsSlice()) }) {
			return difference("%s in %s has lost its address %s", a.ifname, a.netns, ip)
		}
	}
	for _, gateway := range a.gateways() {
		for _, r := range wayOut(link, gateway) {
			if err := checkRoute(a.podside, r, a.ifname); err != nil {
				return err
			}
		}
		if err := checkNeighbour(a.podside, link, gateway, a.host.mac); err != nil {
			return err
		}
	}
	return nil
}

// checkDaemon asks the daemon whether it forwards for the pod.
func (a *attachment) checkDaemon() error {
	ctx, cancel := context.WithTimeout(context.Background(), daemonLimit)
	defer cancel()
	known, err := a.daemon.Attachments(ctx)
	if err != nil {
		return err
	}
	for _, e := range known {
		if e.ContainerID != a.containerID || e.PodIfname != a.ifname {
			continue
		}
		if e.Ifindex != a.host.index || !sameAddresses(e.IPs, a.ips) {
			return difference("mooringd has the endpoint on interface %d with %v, not on %d with %v", e.Ifindex, e.IPs, a.host.index, a.ips)
		}
		return nil
	}
	return difference("mooringd does not know container %s, interface %s", a.containerID, a.ifname)
}

func (a *attachment) checkPrograms() error {
	if err := bpf.CheckEndpoint(a.bpffs, a.host.name, a.host.index); err != nil {
		return difference("%v", err)
	}
	return nil
}

func checkLink(link netlink.Link, mac net.HardwareAddr) error {
	at := link.Attrs()
	if link.Type() != "veth" {
		return difference("%s is no veth, but %s", at.Name, link.Type())
	}
	if at.Flags&net.FlagUp == 0 {
		return difference("%s is down", at.Name)
	}
	if !bytes.Equal(at.HardwareAddr, mac) {
		return difference("%s has the MAC %s, not %s", at.Name, at.HardwareAddr, mac)
	}
	return nil
}

func checkRoute(h *netlink.Handle, want netlink.Route, name string) error {
	family := netlink.FAMILY_V6
	if want.Dst.IP.To4() != nil {
		family = netlink.FAMILY_V4
	}
	// A filter for the default route asks for a nil destination.
	routes, err := h.RouteListFiltered(family, &netlink.Route{LinkIndex: want.LinkIndex, Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Errorf("list routes on %s: %w", name, err)
	}
	if !slices.ContainsFunc(routes, func(r netlink.Route) bool {
		return r.Dst != nil && r.Dst.String() == want.Dst.String() && r.Gw.Equal(want.Gw)
	}) {
		return difference("the route to %s on %s is gone", want.Dst, name)
	}
	return nil
}

func checkNeighbour(h *netlink.Handle, link netlink.Link, ip netip.Addr, mac net.HardwareAddr) error {
	name := link.Attrs().Name
	family := netlink.FAMILY_V6
	if ip.Is4() {
		family = netlink.FAMILY_V4
	}
	neighbours, err := h.NeighList(link.Attrs().Index, family)
	if err != nil {
		return fmt.Errorf("list neighbours on %s: %w", name, err)
	}
	if !slices.ContainsFunc(neighbours, func(n netlink.Neigh) bool {
		return n.IP.Equal(ip.AsSlice()) && bytes.Equal(n.HardwareAddr, mac) && n.State&netlink.NUD_PERMANENT != 0
	}) {
		return difference("the neighbour %s on %s is gone", ip, name)
	}
	return nil
}

func sameAddresses(a, b []netip.Addr) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.SortFunc(a, netip.Addr.Compare)
	slices.SortFunc(b, netip.Addr.Compare)
	return slices.Equal(a, b)
}
