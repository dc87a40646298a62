// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
)

func init() {
	Register(Set{
		Name: "packet",
		Title: "ns/packet at a pod's interface by BPF_PROG_TEST_RUN, the empty program's floor included. The packet is\n" +
			"  restored before each run, which is measured with an empty program and taken off. No socket is on such packets",
		Measure: measureHooks,
	})
	Register(Set{
		Name: "live",
		Title: "ns/packet as the kernel counts it (BPF_ENABLE_STATS, two clock readings included) on real sockets' packets,\n" +
			"  over all packets of a kind of traffic through a ClusterIP: requests, replies, and those that begin and end a flow",
		Measure: measureLive,
	})
}

// skbContext is struct __sk_buff up to ifindex.
type skbContext struct {
	_              [9]uint32
	IngressIfindex uint32
	Ifindex        uint32
}

func measureHooks(b *B) {
	n := packet.NewNode(b, packet.Options{MaxEntries: 1 << 17})
	clientPod, server := n.Pod(b), n.Pod(b)
	repeat := 50_000
	if b.Quick {
		repeat = 1000
	}
	at := func(p *packet.Pod) *Runner {
		return &Runner{T: b, NS: n.NS, Context: skbContext{Ifindex: uint32(p.Ifindex)}, Repeat: repeat}
	}
	client, reply := at(clientPod), at(server)
	frame := func(from *packet.Pod, to packet.MAC, p packet.Packet) Frame {
		p.From, p.To = from.MAC, to
		return Frame{Data: p.Bytes()}
	}

	contestants := []Contestant{{Name: "empty tc program", Unit: "ns", Peer: "27", Once: func() float64 {
		f := frame(clientPod, clientPod.HostMAC, packet.Segment(clientPod.At(false, 4000), server.At(false, 8080), packet.ACK))
		return client.run(client.Empty(ebpf.SchedCLS), f)
	}}}
	add := func(name string, r *Runner, p *ebpf.Program, f Frame, bound float64, peer string, before func()) {
		contestants = append(contestants, Contestant{Name: name, Unit: "ns", Bound: Bound{Most: bound}, Peer: peer, Once: func() float64 {
			if before != nil {
				before()
			}
			return r.Nanoseconds(p, f)
		}})
	}
	for _, v6 := range []bool{false, true} {
		family := map[bool]string{false: "IPv4", true: "IPv6"}[v6]
		tcp, udp := packet.VIP(v6, 10, 80), packet.VIP(v6, 10, 53)
		backend, dns := server.At(v6, 8080), server.At(v6, 5353)
		n.Service(b, packet.TCP, tcp, backend)
		n.Service(b, packet.UDP, udp, dns)
		from := clientPod.At(v6, 4000)

		// The life of a connection, up to its data.
		flush := func() {
			n.Flush(b)
			n.From(b, clientPod, packet.Segment(from, tcp, packet.SYN))
			n.From(b, server, packet.Segment(backend, from, packet.SYN|packet.ACK))
			n.From(b, clientPod, packet.Segment(from, tcp, packet.ACK))
			n.From(b, clientPod, packet.Datagram(from, udp, "question"))
			n.From(b, server, packet.Datagram(dns, from, "answer"))
			direct := clientPod.At(v6, 4001)
			n.From(b, clientPod, packet.Segment(direct, backend, packet.SYN))
			n.From(b, server, packet.Segment(backend, direct, packet.SYN|packet.ACK))
			n.From(b, clientPod, packet.Segment(direct, backend, packet.ACK))
		}
		syn := frame(clientPod, clientPod.HostMAC, packet.Segment(clientPod.At(v6, 20000), tcp, packet.SYN))
		syn.Flows, syn.PortAt = portMask+1, 34
		if v6 {
			syn.PortAt = 54
		}
		question := frame(clientPod, clientPod.HostMAC, packet.Datagram(clientPod.At(v6, 20000), udp, "a question, long enough to be restored"))
		question.Flows, question.PortAt = syn.Flows, syn.PortAt
		each := at(clientPod)
		each.Repeat = int(syn.Flows)
		data := packet.Segment(from, tcp, packet.ACK|packet.PSH)
		answer := packet.Segment(backend, from, packet.ACK|packet.PSH)
		ask := packet.Datagram(from, udp, "a question, long enough to be restored")
		plain := packet.Segment(clientPod.At(v6, 4001), backend, packet.ACK|packet.PSH)

		add(family+" from_container: established TCP to a ClusterIP", client, n.FromContainer, frame(clientPod, clientPod.HostMAC, data), 200, "Calico 383", flush)
		add(family+" from_container: its reply, from the backend", reply, n.FromContainer, frame(server, server.HostMAC, answer), 0, "", flush)
		add(family+" from_container: established UDP to a ClusterIP", client, n.FromContainer, frame(clientPod, clientPod.HostMAC, ask), 0, "", flush)
		add(family+" from_container: established TCP to a pod", client, n.FromContainer, frame(clientPod, clientPod.HostMAC, plain), 0, "", flush)
		add(family+" from_container: SYN of a new flow to a ClusterIP", each, n.FromContainer, syn, 1200, "Calico 1478", flush)
		add(family+" from_container: first datagram to a ClusterIP", each, n.FromContainer, question, 0, "", flush)
		add(family+" to_container: established TCP from a pod", reply, n.ToContainer, frame(clientPod, server.MAC, plain), 0, "", flush)
	}
	b.Compare(contestants...)
}

// measureLive reads what the kernel says of the programs that real packets run.
func measureLive(b *B) {
	while := time.Second / 2
	if b.Quick {
		while = time.Second / 20
	}
	plain := NewPlain(b)
	var empty *ebpf.Program
	emptyClient := plainClient(b, "empty", plain, func(n *Plain, b *B, from, server *PlainPod) netip.Addr {
		empty = (&Runner{T: b, NS: n.NS}).Empty(ebpf.SchedCLS)
		n.attach(b, empty, from)
		n.attach(b, empty, server)
		return netip.Addr{}
	})
	mooring, bpffs := mooringNode(b, "mooring", 1)
	pins, err := filepath.Glob(filepath.Join(bpffs, "v*", "programs", "from_container"))
	if err != nil || len(pins) != 1 {
		b.Fatalf("from_container is pinned below %s as %q (%v)", bpffs, pins, err)
	}
	ours, err := ebpf.LoadPinnedProgram(pins[0], nil)
	if err != nil {
		b.Fatalf("open %s: %v", pins[0], err)
	}
	b.Cleanup(func() { ours.Close() })
	stats, err := ebpf.EnableStats(bpfStatsRunTime)
	if err != nil {
		b.Fatalf("have the kernel count programs' time: %v", err)
	}
	b.Cleanup(func() { closeStats(b, stats) })

	var contestants []Contestant
	for _, kind := range Kinds {
		port := uint16(TCPPort)
		if kind == UDPNewSocket {
			port = UDPPort
		}
		one := func(name string, c client, p *ebpf.Program) Contestant {
			return Contestant{Name: fmt.Sprintf("%s: %s", kind, name), Unit: "ns", Once: func() float64 {
				before := programStats(b, p)
				Rate(b, c.ns, kind, netip.AddrPortFrom(c.to, port), while)
				after := programStats(b, p)
				if after.RunCount == before.RunCount {
					b.Fatalf("%s has not run", p)
				}
				return float64(after.Runtime-before.Runtime) / float64(after.RunCount-before.RunCount)
			}}
		}
		contestants = append(contestants, one("empty program", emptyClient, empty), one("from_container", mooring, ours))
	}
	b.Compare(contestants...)
}

// bpfStatsRunTime is BPF_STATS_RUN_TIME.
const bpfStatsRunTime = 0

func closeStats(t netns.T, stats io.Closer) {
	if err := stats.Close(); err != nil {
		t.Errorf("have the kernel count no more: %v", err)
	}
}

func programStats(t netns.T, p *ebpf.Program) *ebpf.ProgramStats {
	t.Helper()
	s, err := p.Stats()
	if err != nil {
		t.Fatalf("read the time of %s: %v", p, err)
	}
	return s
}
