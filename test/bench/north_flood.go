// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/test/packet"
)

func init() {
	Register(Set{
		Name: "north-flood",
		Title: "ns/packet of the driver's program (XDP) at an uplink under a flood of SYNs, the tables full, by BPF_PROG_TEST_RUN as in\n" +
			"  \"north-packet\": each SYN more, of a flow of its own, and beside it a packet of a connection from before",
		Measure: measureNorthFlood,
	})
}

// measureNorthFlood is a node whose tables a flood of SYNs has filled: what each SYN more
// costs, and what a packet of a connection does that was there before, while the flood goes on.
func measureNorthFlood(b *B) {
	established, flood, between := uint32(1<<14), 1<<18, 1<<13
	if b.Quick {
		established, flood, between = 1<<10, 1<<12, 1<<6
	}
	const empty = "empty XDP program"
	var contestants []Contestant
	for _, far := range []bool{false, true} {
		m := newNorth(b, 1<<17)
		backend := m.server.At(false, 8080)
		where := "a pod of the node"
		if far {
			backend, where = elsewhere(false, 8080), "a pod of another node"
		}
		m.Service(b, packet.TCP, m.door, backend)
		client := netip.MustParseAddrPort("198.18.0.1:16384")
		syn := m.frame(packet.Segment(client, m.door, packet.SYN), 1<<19)
		m.repeat = 1 << 14
		if !far {
			m.establish(netip.MustParseAddrPort("198.19.0.1:16384"), established)
		}
		r := m.at(m.Driver(), syn)
		r.repeat(r.caller(m.Driver(), syn), syn.Data, flood)
		if !far {
			old := m.frame(packet.Segment(netip.MustParseAddrPort("198.19.0.1:16384"), m.door, packet.ACK|packet.PSH), established)
			contestants = append(contestants,
				Contestant{Name: empty, Unit: "ns", Once: func() float64 { return r.run(r.Empty(ebpf.XDP), syn) }},
				// So much of the flood comes between two looks at it.
				m.contestant(fmt.Sprintf("established TCP to %s, one of %d flows", where, established), m.Driver(), old, 0, "",
					func() { r.repeat(r.caller(m.Driver(), syn), syn.Data, between) }))
		}
		contestants = append(contestants, m.contestant("one more SYN, to "+where, m.Driver(), syn, 900, "", nil))
	}
	b.Compare(contestants...)
}
