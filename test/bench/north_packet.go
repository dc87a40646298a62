// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
)

func init() {
	Register(Set{
		Name: "north-packet",
		Title: "ns/packet at an uplink by BPF_PROG_TEST_RUN, the empty program's floor included: at the driver (xdp), and at tc where\n" +
			"  that is beside it. Restored before each run as in \"packet\". The flows are many clients' in scattered order",
		Measure: measureNorthPackets,
	})
}

// By flows: what Katran needs on these machines, which only encapsulates.
var northBounds = map[uint32]float64{1: 136, 1 << 14: 303, 1 << 19: 520}

// batch is how many flows are on their way at once when a table is filled.
const batch = 1 << 12

// north measures at the uplink of a node.
type north struct {
	b *B
	*packet.Node
	server *packet.Pod
	door   netip.AddrPort
	index  uint32
	repeat int
}

func newNorth(b *B, maxEntries uint32) *north {
	n := packet.NewNode(b, packet.Options{MaxEntries: maxEntries, XDP: true})
	m := &north{b: b, Node: n, server: n.Pod(b), door: netip.AddrPortFrom(n.IP, 30080), repeat: 100_000}
	if b.Quick {
		m.repeat = 1000
	}
	m.index = uint32(n.Link(b, netns.Uplink).Attrs().Index)
	n.OpenDoors(b, n.IP, n.IP6, m.server.V4, m.server.V6)
	return m
}

// port is one of the node's.
func (m *north) port(v6 bool, port uint16) netip.AddrPort {
	if v6 {
		return netip.AddrPortFrom(m.IP6, port)
	}
	return netip.AddrPortFrom(m.IP, port)
}

// elsewhere is a pod of another node, visitor a client beyond the uplink.
func elsewhere(v6 bool, port uint16) netip.AddrPort {
	return either(v6, "10.244.1.5", "fd00:10:244:1::5", port)
}
func visitor(v6 bool, port uint16) netip.AddrPort {
	return either(v6, "198.18.0.1", "2001:db8:203::1", port)
}

func either(v6 bool, v4Address, v6Address string, port uint16) netip.AddrPort {
	if v6 {
		return netip.AddrPortFrom(netip.MustParseAddr(v6Address), port)
	}
	return netip.AddrPortFrom(netip.MustParseAddr(v4Address), port)
}

// frame is one that comes in, or the first of as many flows'.
func (m *north) frame(p packet.Packet, flows uint32) Frame {
	// So that all headers are restored, whatever their length.
	if p.Proto == packet.TCP {
		p.Payload = []byte("a request, or a reply")
	}
	p.From = packet.MAC{2, 0, 0, 0, 0, 1}
	copy(p.To[:], m.Link(m.b, netns.Uplink).Attrs().HardwareAddr)
	f := Frame{Data: p.Bytes(), Flows: flows, PortAt: 34, AddressAt: 28}
	if p.Src.Addr().Is6() {
		f.PortAt, f.AddressAt = 54, 36
	}
	return f
}

// at runs a frame's program as the uplink does.
func (m *north) at(p *ebpf.Program, f Frame) *Runner {
	r := &Runner{T: m.b, NS: m.NS, Repeat: m.repeat, Context: skbContext{Ifindex: m.index}}
	if p.Type() == ebpf.XDP {
		r.Context = packet.DriverContext{End: uint32(len(f.Data)), Ifindex: m.index}
	}
	return r
}

// establish makes connections of as many clients through the node port to the pod.
func (m *north) establish(client netip.AddrPort, flows uint32) {
	backend := m.server.At(false, 8080)
	answer := packet.Segment(backend, client, packet.SYN|packet.ACK)
	answer.From, answer.To = m.server.MAC, m.server.HostMAC
	back := Frame{Data: answer.Bytes(), Flows: flows, PortAt: 36, AddressAt: 32}
	steps := []struct {
		p *ebpf.Program
		f Frame
		r *Runner
	}{
		{p: m.FromWire, f: m.frame(packet.Segment(client, m.door, packet.SYN), flows)},
		{p: m.FromContainer, f: back, r: &Runner{T: m.b, NS: m.NS, Context: skbContext{Ifindex: uint32(m.server.Ifindex)}}},
		{p: m.FromWire, f: m.frame(packet.Segment(client, m.door, packet.ACK), flows)},
	}
	for done := uint32(0); done < flows; done += batch {
		for i := range steps {
			s := &steps[i]
			if s.r == nil {
				s.r = m.at(s.p, s.f)
			}
			s.r.repeat(s.r.caller(s.p, s.f), s.f.Data, int(min(flows, batch)))
		}
	}
}

func (m *north) contestant(name string, p *ebpf.Program, f Frame, bound float64, peer string, before func()) Contestant {
	r := m.at(p, f)
	return Contestant{Name: name, Unit: "ns", Bound: Bound{Most: bound}, Peer: peer, Once: func() float64 {
		if before != nil {
			before()
		}
		return r.Nanoseconds(p, f)
	}}
}

func measureNorthPackets(b *B) {
	measureNorthEstablished(b)
	measureNorthNew(b)
}

func measureNorthEstablished(b *B) {
	sizes := []uint32{1, 1 << 14, 1 << 19}
	if b.Quick {
		sizes = []uint32{1, 1 << 13}
	}
	var contestants []Contestant
	for i, flows := range sizes {
		m := newNorth(b, max(1<<14, 4*flows))
		backend := m.server.At(false, 8080)
		m.Service(b, packet.TCP, m.door, backend)
		client := netip.MustParseAddrPort("198.18.0.1:16384")
		m.establish(client, flows)
		data := m.frame(packet.Segment(client, m.door, packet.ACK|packet.PSH), flows)
		if flows > 1 {
			// Each flow is heard once in a while, as its clients speak.
			m.repeat = max(m.repeat, int(flows))
		}
		if i == 0 {
			r := m.at(m.Driver(), data)
			contestants = append(contestants, Contestant{Name: "empty XDP program", Unit: "ns", Once: func() float64 {
				return r.run(r.Empty(ebpf.XDP), data)
			}})
		}
		name := fmt.Sprintf("established TCP to a pod of the node, %d flows", flows)
		contestants = append(contestants,
			m.contestant("xdp: "+name, m.Driver(), data, northBounds[flows], "", nil),
			m.contestant("tc: "+name, m.FromWire, data, 0, "", nil))
		if i > 0 {
			continue
		}
		contestants = append(contestants, m.oneFlow()...)
	}
	b.Compare(contestants...)
}

// oneFlow are packets of one flow of each kind.
func (m *north) oneFlow() (list []Contestant) {
	for _, v6 := range []bool{false, true} {
		family := map[bool]string{false: "IPv4", true: "IPv6"}[v6]
		client, dns := visitor(v6, 4000), m.port(v6, 30053)
		m.Service(m.b, packet.UDP, dns, m.server.At(v6, 5353))
		question := packet.Datagram(client, dns, "a question, long enough to be restored")
		m.Wire(m.b, question)
		m.From(m.b, m.server, packet.Datagram(m.server.At(v6, 5353), client, "answer"))
		far, backend := m.port(v6, 30081), elsewhere(v6, 8080)
		m.Service(m.b, packet.TCP, far, backend)
		as := m.Wire(m.b, packet.Segment(client, far, packet.SYN)).Src
		answer := packet.Segment(backend, as, packet.ACK|packet.PSH)
		m.Wire(m.b, packet.Segment(backend, as, packet.SYN|packet.ACK))
		m.Wire(m.b, packet.Segment(client, far, packet.ACK))
		vip := packet.VIP(v6, 10, 80)
		m.Service(m.b, packet.TCP, vip, backend)
		pod := m.server.At(v6, 4000)
		m.From(m.b, m.server, packet.Segment(pod, vip, packet.SYN))
		reply := packet.Segment(backend, pod, packet.ACK|packet.PSH)
		m.Wire(m.b, packet.Segment(backend, pod, packet.SYN|packet.ACK))
		m.From(m.b, m.server, packet.Segment(pod, vip, packet.ACK))
		nobody := elsewhere(v6, 9)
		for _, c := range []struct {
			name  string
			p     packet.Packet
			bound float64
		}{
			{"established UDP to a pod of the node", question, 150},
			{"established TCP to a pod of another node, out again", packet.Segment(client, far, packet.ACK|packet.PSH), 0},
			{"its answer, out to the client", answer, 0},
			{"answer to a pod's own connection through a ClusterIP", reply, 0},
			{"to an address that no service concerns", packet.Segment(client, nobody, packet.ACK), 69},
			{"to the node itself, a port that no service has", packet.Segment(client, m.port(v6, 22), packet.ACK), 0},
		} {
			f := m.frame(c.p, 1)
			list = append(list,
				m.contestant("xdp: "+family+" "+c.name, m.Driver(), f, c.bound, "", nil),
				m.contestant("tc: "+family+" "+c.name, m.FromWire, f, 0, "", nil))
		}
	}
	return list
}

// measureNorthNew makes flows: the table empty before each round, or full of others.
func measureNorthNew(b *B) {
	var contestants []Contestant
	for _, far := range []bool{false, true} {
		where := map[bool]string{false: "a pod of the node", true: "a pod of another node"}[far]
		for _, full := range []bool{false, true} {
			m := newNorth(b, 1<<17)
			backends := []netip.AddrPort{m.server.At(false, 8080)}
			if far {
				// To one alone the node's ports are used up before a table is full.
				backends = nil
				for port := range uint16(16) {
					backends = append(backends, elsewhere(false, 8080+port))
				}
			}
			m.Service(b, packet.TCP, m.door, backends...)
			// By the time that a flow comes again, its entries are long gone.
			syn := m.frame(packet.Segment(netip.MustParseAddrPort("198.18.0.1:16384"), m.door, packet.SYN), 1<<19)
			m.repeat = 1 << 14
			before, bound := func() { m.Flush(b) }, 600.0
			state := "not full"
			if full {
				state, bound = "full", 900
				r := m.at(m.FromWire, syn)
				r.repeat(r.caller(m.FromWire, syn), syn.Data, map[bool]int{false: 1 << 18, true: 1 << 12}[b.Quick])
				before = nil
			}
			contestants = append(contestants, m.contestant(fmt.Sprintf("xdp: SYN of a new flow to %s, table %s", where, state), m.Driver(), syn, bound, "", before))
		}
	}
	b.Compare(contestants...)
}
