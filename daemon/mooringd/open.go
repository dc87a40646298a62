// SPDX-License-Identifier: Apache-2.0

package main

import (
	"log/slog"
	"math/bits"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/datapath"
	"github.com/mooring-cni/mooring/daemon/node"
)

// openDatapath loads the datapath that the configuration wants, or adopts what
// an earlier run left.
func openDatapath(config conf.Config, uplinks []node.Uplink, log *slog.Logger) (kernelSide, error) {
	size := config.Conntrack.MaxEntries
	if size == 0 {
		var info unix.Sysinfo_t
		if err := unix.Sysinfo(&info); err == nil {
			size = tableSize(uint64(info.Totalram) * uint64(info.Unit))
		}
	}
	manager, err := datapath.New(datapath.Options{
		BPFFS: config.BPFFS, MaxEntries: size, Timeouts: config.Conntrack.Timeouts,
		Hook: config.Conntrack.Hook, Policy: config.Policy != "never", XDP: config.XDP, Cgroup: config.Cgroup, Maglev: config.LoadBalancing.Algorithm == "maglev", DSR: config.NodePort.Mode == "dsr",
		NodePortFirst: config.NodePort.Range.First, NodePortLast: config.NodePort.Range.Last, Log: log,
	})
	if err != nil {
		return nil, err
	}
	manager.SetNodeAddresses(nodeContext(config, uplinks).Addresses)
	manager.SetUplinks(wires(config, uplinks))
	return manager, nil
}

// wires are the devices that services are reached by from outside, and all
// addresses of the node. The device of tunnels is one: backends on other nodes answer by it.
func wires(config conf.Config, uplinks []node.Uplink) (list []datapath.Uplink, addresses []netip.Addr) {
	for _, u := range uplinks {
		list = append(list, datapath.Uplink{Name: u.Name, Index: u.Index, MAC: u.MAC, Veth: u.Veth, Virtual: u.MAC == [6]byte{}, Addresses: u.Addresses})
	}
	if config.Routing.Mode == "vxlan" {
		if u, there := node.OverlayUplink(); there {
			list = append(list, datapath.Uplink{Name: u.Name, Index: u.Index, Virtual: true, Addresses: u.Addresses})
		}
	}
	addresses, _ = node.AddressesIn([]netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)})
	return list, addresses
}

// tableSize is how many connections a machine with this much memory gets room
// for: about 0.4 % of it, as the kernel takes it at once and for good. A power
// of two, so that a machine whose memory is counted a little differently after a
// reboot has the same.
func tableSize(memory uint64) uint32 {
	const (
		perEntry = 256 // key, value and the hash table's own
		least    = 1 << 16
		most     = 1 << 22
	)
	entries := memory / 256 / perEntry
	return uint32(min(max(uint64(1)<<bits.Len64(entries)>>1, least), most))
}
