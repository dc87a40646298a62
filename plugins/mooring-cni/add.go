// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/model"
)

// cmdAdd connects a container. The same again, as runtimes do when they have
// lost an answer, replaces the interface and keeps the addresses.
func cmdAdd(args *skel.CmdArgs) error {
	a, err := parse(args)
	if err != nil {
		return err
	}
	if a.chained, err = a.previous(); err != nil {
		return err
	}
	if err := a.ask(); err != nil {
		return err
	}
	if err := a.openHandles(); err != nil {
		return err
	}
	return a.add()
}

// afterStep is where tests let an ADD fail.
var afterStep = func(string) error { return nil }

func (a *attachment) add() (err error) {
	var undo undo
	defer undo.unwind(&err)
	for _, s := range []struct {
		what     string
		do, back func() error
	}{
		{"make the pair", a.makePair, a.removePair},
		{"get addresses", a.getAddresses, a.releaseAddresses},
		{"configure the pod's end", a.configurePod, nil}, // goes with the pair
		// The daemon first: when it replaces an earlier life of the same
		// attachment, it removes the pins of that, which have the same names.
		{"tell the daemon", a.tellDaemon, a.untellDaemon},
		{"attach the programs", a.attachPrograms, a.detachPrograms},
		{"set the host's end up", a.raiseHost, nil},
		{"wait for the pod's end", a.awaitCarrier, nil},
		{"answer", a.answer, nil},
	} {
		undo.push(s.what, s.back)
		if err := s.do(); err != nil {
			return err
		}
		if err := afterStep(s.what); err != nil {
			return err
		}
	}
	return nil
}

func (a *attachment) getAddresses() error {
	ctx, cancel := a.addressContext()
	defer cancel()
	result, err := a.addresses.Add(ctx)
	if err != nil {
		return err
	}
	for _, ip := range result.IPs {
		addr, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return fmt.Errorf("IPAM plugin %s: ADD: %q is no IP address", a.conf.IPAM.Type, ip.Address.IP)
		}
		if addr = addr.Unmap(); !slices.Contains(a.ips, addr) {
			a.ips = append(a.ips, addr)
		}
	}
	if len(a.ips) == 0 {
		return failed(types.ErrInvalidNetworkConfig, "IPAM plugin %s: ADD: it gave no address", a.conf.IPAM.Type)
	}
	a.dns = result.DNS
	return nil
}

func (a *attachment) releaseAddresses() error {
	ctx, cancel := a.addressContext()
	defer cancel()
	return a.addresses.Del(ctx)
}

// addressContext limits the wait for our own allocations. Another IPAM plugin
// may take its time, as dhcp does; the runtime ends what takes too long.
func (a *attachment) addressContext() (context.Context, context.CancelFunc) {
	if !a.conf.IPAM.Own() {
		return context.WithCancel(context.Background())
	}
	return context.WithTimeout(context.Background(), addressLimit)
}

func (a *attachment) attachPrograms() error {
	return bpf.AttachEndpoint(a.bpffs, a.host.name, a.host.index)
}

func (a *attachment) detachPrograms() error { return bpf.DetachEndpoint(a.bpffs, a.host.name) }

func (a *attachment) tellDaemon() error {
	ctx, cancel := context.WithTimeout(context.Background(), daemonLimit)
	defer cancel()
	_, err := a.daemon.AddEndpoint(ctx, model.Endpoint{
		ContainerID: a.containerID, PodIfname: a.ifname, Network: a.conf.Name, Pod: a.pod, PodUID: a.podUID, IPs: a.ips,
		Interface: a.host.name, Ifindex: a.host.index, MAC: a.mac.String(), HostMAC: a.host.mac.String(), Netns: a.netns,
	})
	return err
}

func (a *attachment) untellDaemon() error {
	ctx, cancel := context.WithTimeout(context.Background(), daemonLimit)
	defer cancel()
	return a.daemon.DeleteEndpoint(ctx, a.containerID, a.ifname)
}

// answer prints the result: what earlier plugins of the chain have made, and
// after it what this one has.
func (a *attachment) answer() error {
	r := a.chained
	if r == nil {
		r = &current.Result{CNIVersion: current.ImplementedSpecVersion}
	}
	r.Interfaces = append(r.Interfaces,
		&current.Interface{Name: a.host.name, Mac: a.host.mac.String(), Mtu: a.mtu},
		&current.Interface{Name: a.ifname, Mac: a.mac.String(), Mtu: a.mtu, Sandbox: a.netns})
	for _, ip := range a.ips {
		r.IPs = append(r.IPs, &current.IPConfig{
			Interface: current.Int(len(r.Interfaces) - 1), Address: *ipnet(only(ip)), Gateway: gatewayOf(ip).AsSlice(),
		})
	}
	for _, gateway := range a.gateways() {
		r.Routes = append(r.Routes, &types.Route{Dst: *ipnet(defaultOf(gateway)), GW: gateway.AsSlice()})
	}
	if !a.conf.DNS.IsEmpty() {
		r.DNS = a.conf.DNS
	} else if !a.dns.IsEmpty() {
		r.DNS = a.dns
	}
	if err := types.PrintResult(r, a.conf.CNIVersion); err != nil {
		return fmt.Errorf("print the result: %w", err)
	}
	return nil
}
