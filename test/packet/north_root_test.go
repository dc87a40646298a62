// SPDX-License-Identifier: Apache-2.0

//go:build root

package packet

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/mooring-cni/mooring/bpf"
)

// hooks runs a test with tc alone, and with the driver's program in front of it,
// which has to do its part.
func hooks(t *testing.T, options Options, f func(t *testing.T, n *Node)) {
	t.Helper()
	eachHook(t, options, func(t *testing.T, n *Node) {
		f(t, n)
		if n.driver != nil && n.fast == 0 {
			t.Error("the driver's program did nothing")
		}
	})
}

// eachHook is hooks for packets that the driver's program leaves to tc.
func eachHook(t *testing.T, options Options, f func(t *testing.T, n *Node)) {
	t.Helper()
	if options.MaxEntries == 0 {
		options.MaxEntries = 4096
	}
	for _, driven := range []bool{false, true} {
		t.Run(map[bool]string{false: "tc", true: "driver"}[driven], func(t *testing.T) {
			options.XDP = driven
			f(t, NewNode(t, options))
		})
	}
}

// NodePort is a port of the node.
func (n *Node) NodePort(v6 bool, port uint16) netip.AddrPort {
	if v6 {
		return netip.AddrPortFrom(n.IP6, port)
	}
	return netip.AddrPortFrom(n.IP, port)
}

func outside(v6 bool, host, port uint16) netip.AddrPort {
	if v6 {
		return netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf("2001:db8:203::%x", host)), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(host)}), port)
}

// elsewhere is a pod of another node.
func elsewhere(v6 bool, port uint16) netip.AddrPort {
	if v6 {
		return netip.MustParseAddrPort(fmt.Sprintf("[fd00:10:244:1::5]:%d", port))
	}
	return netip.MustParseAddrPort(fmt.Sprintf("10.244.1.5:%d", port))
}

// leaves checks that a packet goes out of an uplink without the host's stack, between these ends.
func (r Result) leaves(t *testing.T, src, dst netip.AddrPort) {
	t.Helper()
	if r.Verdict != Redirect || !r.Leaves || r.Src != src || r.Dst != dst {
		t.Fatalf("got %v\nwant redirect out of an uplink: %s -> %s", r, src, dst)
	}
}

func TestAClientOutsideReachesAPodOfThisNode(t *testing.T) {
	hooks(t, Options{}, func(t *testing.T, n *Node) {
		web := n.Pod(t)
		families(t, func(t *testing.T, v6 bool) {
			from, door, backend := outside(v6, 1, 4000), n.NodePort(v6, 30080), web.At(v6, 8080)
			n.Service(t, TCP, door, backend)

			in := n.Wire(t, Segment(from, door, SYN))
			in.arrives(t, web, from, backend)
			if in.TTL != 63 {
				t.Errorf("it has %d hops left of 64", in.TTL)
			}
			n.Wire(t, Segment(from, door, SYN)).arrives(t, web, from, backend)
			out := n.From(t, web, Segment(backend, from, SYN|ACK))
			out.leaves(t, door, from)
			if out.TTL != 63 {
				t.Errorf("the answer has %d hops left of 64", out.TTL)
			}
			n.state(t, TCP, from, door, backend, bpf.CTNew)
			for range 5 {
				n.Wire(t, Segment(from, door, ACK)).arrives(t, web, from, backend)
				n.From(t, web, Segment(backend, from, ACK)).leaves(t, door, from)
			}
			n.state(t, TCP, from, door, backend, bpf.CTEstablished)
			svc, _ := n.ServiceEntry(t, TCP, from, door)
			if svc.Packets[0] != 7 {
				t.Errorf("the service's entry counts %d packets of 7", svc.Packets[0])
			}
			flow, _ := n.FlowEntry(t, TCP, from, backend)
			if flow.Flags&bpf.CTIngress == 0 || flow.Endpoint != [2]uint16{0, web.ID} {
				t.Errorf("the flow's entry: flags %#x, endpoints %v", flow.Flags, flow.Endpoint)
			}
			n.Wire(t, Segment(from, door, FIN|ACK)).arrives(t, web, from, backend)
			n.From(t, web, Segment(backend, from, FIN|ACK)).leaves(t, door, from)
			n.state(t, TCP, from, door, backend, bpf.CTTimeWait)
			// Another connection on the same ports.
			n.Wire(t, Segment(from, door, SYN)).arrives(t, web, from, backend)
			n.From(t, web, Segment(backend, from, SYN|ACK)).leaves(t, door, from)
			n.state(t, TCP, from, door, backend, bpf.CTNew)

			n.Service(t, UDP, door, backend)
			for _, payload := range []string{"", "q", "query", string(make([]byte, 1400)), "\xff\xff\xff\xff"} {
				n.Wire(t, Datagram(from, door, payload)).arrives(t, web, from, backend)
				n.From(t, web, Datagram(backend, from, payload)).leaves(t, door, from)
			}
			n.state(t, UDP, from, door, backend, bpf.CTEstablished)
			bare := Datagram(from, door, "no checksum")
			bare.NoSum = true
			if !v6 && !n.Wire(t, bare).NoSum {
				t.Error("a datagram without a checksum got one")
			}
		})
	})
}

func TestAnswersToAPodFromAnotherNodeComeWithoutTheStack(t *testing.T) {
	hooks(t, Options{}, func(t *testing.T, n *Node) {
		client := n.Pod(t)
		families(t, func(t *testing.T, v6 bool) {
			from, vip, backend := client.At(v6, 4000), VIP(v6, 10, 80), elsewhere(v6, 8080)
			n.Service(t, TCP, vip, backend)
			n.From(t, client, Segment(from, vip, SYN)).passes(t, from, backend)
			n.Wire(t, Segment(backend, from, SYN|ACK)).arrives(t, client, vip, from)
			n.From(t, client, Segment(from, vip, ACK)).passes(t, from, backend)
			n.Wire(t, Segment(backend, from, ACK)).arrives(t, client, vip, from)
			n.state(t, TCP, from, vip, backend, bpf.CTEstablished)
			// What is no service's is the stack's.
			n.Wire(t, Segment(elsewhere(v6, 9), client.At(v6, 9), SYN)).passes(t, elsewhere(v6, 9), client.At(v6, 9))
		})
	})
}

func TestABackendOnAnotherNodeSeesThisOne(t *testing.T) {
	hooks(t, Options{}, func(t *testing.T, n *Node) {
		families(t, func(t *testing.T, v6 bool) {
			for _, proto := range []uint8{TCP, UDP} {
				from, door, backend := outside(v6, 1, 4000), n.NodePort(v6, 30080), elsewhere(v6, 8080)
				n.Service(t, proto, door, backend)
				send := func(src, dst netip.AddrPort, flags uint8) Packet {
					if proto == UDP {
						return Datagram(src, dst, "payload")
					}
					return Segment(src, dst, flags)
				}
				in := n.Wire(t, send(from, door, SYN))
				source := in.Src
				if source.Addr() != door.Addr() || source.Port() < 1024 || source.Port() > 29999 {
					t.Fatalf("got %v\nwant a port of the node's between 1024 and 29999", in)
				}
				in.leaves(t, source, backend)
				if in.TTL != 63 {
					t.Errorf("it has %d hops left of 64", in.TTL)
				}
				n.Wire(t, send(from, door, SYN)).leaves(t, source, backend)
				back := n.Wire(t, send(backend, source, SYN|ACK))
				back.leaves(t, door, from)
				if back.TTL != 63 {
					t.Errorf("the answer has %d hops left of 64", back.TTL)
				}
				for range 3 {
					n.Wire(t, send(from, door, ACK)).leaves(t, source, backend)
					n.Wire(t, send(backend, source, ACK)).leaves(t, door, from)
				}
				svc, _ := n.ServiceEntry(t, proto, from, door)
				flow, _ := n.FlowEntry(t, proto, source, backend)
				if svc.State != bpf.CTEstablished || flow.State != bpf.CTEstablished {
					t.Errorf("states: SVC %d, flow %d", svc.State, flow.State)
				}
				// Another client from the same port has another port of the node.
				other := n.Wire(t, send(outside(v6, 2, 4000), door, SYN))
				if other.Src == source {
					t.Errorf("two clients are both %s to the backend", source)
				}
				n.Flush(t)
				// An answer to nobody is nothing that a service is asked about.
				n.Wire(t, send(backend, source, ACK)).passes(t, backend, source)
			}
		})
	})
}

// A client may begin anew while the backend still knows the port that this node took for
// it before: what becomes of that port's flow is nothing to the connection that lives.
func TestTheNodesLastPortForAClientIsNotTheNext(t *testing.T) {
	hooks(t, Options{}, func(t *testing.T, n *Node) {
		families(t, func(t *testing.T, v6 bool) {
			from, door, backend := outside(v6, 1, 4000), n.NodePort(v6, 30080), elsewhere(v6, 8080)
			n.Service(t, TCP, door, backend)
			last := n.Wire(t, Segment(from, door, SYN)).Src
			// The backend's answer is to an earlier client of that port, and is refused.
			n.Wire(t, Segment(backend, last, ACK)).leaves(t, door, from)
			n.Wire(t, Segment(from, door, RST)).leaves(t, last, backend)

			source := n.Wire(t, Segment(from, door, SYN)).Src
			n.Wire(t, Segment(backend, source, SYN|ACK)).leaves(t, door, from)
			n.Wire(t, Segment(from, door, ACK)).leaves(t, source, backend)
			svc, _ := n.ServiceEntry(t, TCP, from, door)
			if source == last || svc.State != bpf.CTEstablished || svc.Flags&bpf.CTEmbryonic != 0 {
				t.Fatalf("%s after %s: state %d, flags %#x", source, last, svc.State, svc.Flags)
			}
			// What is still on its way says nothing of the one that lives.
			n.Wire(t, Segment(backend, last, FIN|ACK)).leaves(t, door, from)
			n.Wire(t, Segment(backend, last, RST)).leaves(t, door, from)
			if svc, _ := n.ServiceEntry(t, TCP, from, door); svc.State != bpf.CTEstablished || svc.Flags&bpf.CTReset != 0 {
				t.Errorf("what came for %s made it state %d, flags %#x", last, svc.State, svc.Flags)
			}
			n.age(t, 60)
			n.sweep(t, bpf.CTClosing, TCP)
			if _, there := n.FlowEntry(t, TCP, last, backend); there {
				t.Errorf("the flow from %s stays", last)
			}
			for range 3 {
				n.Wire(t, Segment(from, door, ACK)).leaves(t, source, backend)
			}
		})
	})
}

// A decision that was lost is made again in the middle of its flow, which is where no flood
// reaches it: so is the decision then.
func TestADecisionThatIsMadeAgainIsKeptWithItsFlow(t *testing.T) {
	hooks(t, Options{}, func(t *testing.T, n *Node) {
		web := n.Pod(t)
		families(t, func(t *testing.T, v6 bool) {
			from, door, backend := outside(v6, 1, 4000), n.NodePort(v6, 30080), web.At(v6, 8080)
			n.Service(t, TCP, door, backend)
			n.Wire(t, Segment(from, door, SYN)).arrives(t, web, from, backend)
			n.From(t, web, Segment(backend, from, SYN|ACK)).leaves(t, door, from)
			n.Wire(t, Segment(from, door, ACK)).arrives(t, web, from, backend)
			if err := n.CT.Delete(ServiceKey(TCP, from, door)); err != nil {
				t.Fatalf("the service's entry is not where established flows are: %v", err)
			}
			n.Wire(t, Segment(from, door, ACK)).arrives(t, web, from, backend)
			if svc, there := n.ServiceEntry(t, TCP, from, door); !there || svc.State != bpf.CTEstablished || svc.Flags&bpf.CTEmbryonic != 0 {
				t.Errorf("made again (%v) it has state %d, flags %#x", there, svc.State, svc.Flags)
			}
		})
	})
}

func TestWhenTheNodesPortsAreUsedUpItIsCounted(t *testing.T) {
	fewPorts(t, func(t *testing.T, n *Node, v6 bool) {
		door, backend := n.NodePort(v6, 30080), elsewhere(v6, 8080)
		n.Service(t, TCP, door, backend)
		sources := map[netip.AddrPort]bool{}
		for i := range uint16(8) {
			from := outside(v6, 1, 4000+i)
			r := n.Wire(t, Segment(from, door, SYN))
			if !r.Leaves {
				t.Fatalf("connection %d of 8: %v", i+1, r)
			}
			sources[r.Src] = true
			n.Wire(t, Segment(backend, r.Src, SYN|ACK)).leaves(t, door, from)
			n.Wire(t, Segment(from, door, ACK)).leaves(t, r.Src, backend)
		}
		if len(sources) != 8 {
			t.Errorf("8 connections have %d ports", len(sources))
		}
		n.age(t, 60)
		n.Wire(t, Segment(outside(v6, 1, 4999), door, SYN)).dropped(t, "snat_ports")
		// To another backend each port may be used once more.
		n.Service(t, TCP, n.NodePort(v6, 30081), elsewhere(v6, 8081))
		if r := n.Wire(t, Segment(outside(v6, 1, 4999), n.NodePort(v6, 30081), SYN)); !r.Leaves {
			t.Errorf("to another backend: %v", r)
		}
	})
}

// fewPorts is hooks for a node that has eight ports to stand in for clients.
func fewPorts(t *testing.T, f func(t *testing.T, n *Node, v6 bool)) {
	hooks(t, Options{MaxEntries: 4096, SNATPorts: bpf.PortRange{First: 5000, Last: 5007}}, func(t *testing.T, n *Node) {
		families(t, func(t *testing.T, v6 bool) { f(t, n, v6) })
	})
}

// A flood's SYNs keep no port from who is answered, whose own may be another's when its handshake stands still.
func TestAPortOfTheNodeIsKeptByWhoIsAnswered(t *testing.T) {
	fewPorts(t, func(t *testing.T, n *Node, v6 bool) {
		n.Flush(t)
		door, backend := n.NodePort(v6, 30080), elsewhere(v6, 8080)
		n.Service(t, TCP, door, backend)
		for i := range uint16(100) {
			if r := n.Wire(t, Segment(outside(v6, 1, 4000+i), door, SYN)); !r.Leaves {
				t.Fatalf("SYN %d of a flood: %v", i+1, r)
			}
		}
		kept := map[netip.AddrPort]netip.AddrPort{}
		for i := range uint16(8) {
			from := outside(v6, 2, 4000+i)
			r := n.Wire(t, Segment(from, door, SYN))
			if _, taken := kept[r.Src]; taken || !r.Leaves {
				t.Fatalf("client %d of 8: %v", i+1, r)
			}
			kept[r.Src] = from
			n.Wire(t, Segment(backend, r.Src, SYN|ACK)).leaves(t, door, from)
		}
		for range 2 {
			n.Wire(t, Segment(outside(v6, 1, 4999), door, SYN)).dropped(t, "snat_ports")
			n.age(t, 1)
		}
		n.age(t, 2)
		r := n.Wire(t, Segment(outside(v6, 3, 4999), door, SYN))
		if !r.Leaves {
			t.Fatalf("when handshakes have stood still: %v", r)
		}
		svc := 0
		for k, e := range n.Entries(t) {
			if k.Type == bpf.CTService {
				svc++
				if e.OriginPort == bpf.Port(r.Src.Port()) {
					t.Errorf("the port has another client's decision still: %+v %+v", k, e)
				}
			}
		}
		if svc != 7 {
			t.Errorf("%d clients of 8 have a decision where one has lost its port", svc)
		}
	})
}

func TestWhoMayNotReachAFrontendFromOutside(t *testing.T) {
	hooks(t, Options{}, func(t *testing.T, n *Node) {
		web, other := n.Pod(t), n.Pod(t)
		n.OpenDoors(t, n.IP, n.IP6, web.V4, web.V6, other.V4, other.V6)
		families(t, func(t *testing.T, v6 bool) {
			door := n.NodePort(v6, 30080)
			s := n.Service(t, TCP, door, web.At(v6, 8080))
			n.Wire(t, Segment(other.At(v6, 4000), door, SYN)).dropped(t, "martian")
			n.Wire(t, Segment(n.NodePort(v6, 4000), door, SYN)).dropped(t, "martian")
			loopback := netip.MustParseAddrPort("127.0.0.1:4000")
			if v6 {
				loopback = netip.MustParseAddrPort("[::1]:4000")
			}
			n.Wire(t, Segment(loopback, door, SYN)).dropped(t, "martian")
			n.Wire(t, Segment(outside(v6, 1, 4000), door, RST)).dropped(t, "no_flow")

			s.Change(t, func(v *bpf.Service) { v.Flags |= bpf.ServiceSourceRanges })
			n.Wire(t, Segment(outside(v6, 1, 4001), door, SYN)).dropped(t, "source_range")
			client := outside(v6, 1, 4002)
			key := bpf.SourceRangeKey{Prefixlen: 32 + 128 - 4, Service: s.value.Id, Addr: client.Addr().As16()}
			put(t, n.SourceRanges, key, uint32(1))
			n.Wire(t, Segment(client, door, SYN)).arrives(t, web, client, web.At(v6, 8080))
			n.Wire(t, Segment(outside(v6, 200, 4002), door, SYN)).dropped(t, "source_range")
			s.Change(t, func(v *bpf.Service) { v.Flags &^= bpf.ServiceSourceRanges })

			// A service that may not be reached from outside is nobody's.
			s.Change(t, func(v *bpf.Service) { v.Flags &^= bpf.ServiceExternal })
			n.Wire(t, Segment(outside(v6, 1, 4003), door, SYN)).passes(t, outside(v6, 1, 4003), door)
			s.Change(t, func(v *bpf.Service) { v.Flags |= bpf.ServiceExternal })

			// The spoofed packet of a pod's own flow.
			mine := other.At(v6, 4004)
			n.From(t, other, Segment(mine, door, SYN)).arrives(t, web, mine, web.At(v6, 8080))
			n.Wire(t, Segment(mine, door, ACK)).dropped(t, "martian")
		})
	})
}

func TestAServiceWithoutBackendsRefusesClientsOutside(t *testing.T) {
	eachHook(t, Options{}, func(t *testing.T, n *Node) {
		families(t, func(t *testing.T, v6 bool) {
			from, door := outside(v6, 1, 4000), n.NodePort(v6, 30080)
			s := n.Service(t, TCP, door)
			syn := Segment(from, door, SYN)
			r := n.Wire(t, syn)
			r.leaves(t, door, from)
			if r.Flags != RST|ACK || r.Ack != syn.Seq+1 || r.Reason != "no_backend" || r.Packet.To != routerMAC {
				t.Errorf("refused with %v, ack %d, to %x", r, r.Ack, r.Packet.To)
			}
			s.Change(t, func(v *bpf.Service) { v.Flags |= bpf.ServiceExternalLocal })
			n.Wire(t, syn).dropped(t, "no_local_backend")

			n.Service(t, UDP, door)
			datagram := Datagram(from, door, "hello")
			r = n.Wire(t, datagram)
			if r.Reason != "no_backend" || !r.Leaves {
				t.Errorf("a datagram: %v", r)
			}
			r.quotes(t, door.Addr(), from.Addr(), from, door)
			// Of the node's other ports nothing is known here.
			n.Wire(t, Segment(from, n.NodePort(v6, 22), SYN)).passes(t, from, n.NodePort(v6, 22))
		})
	})
}

func TestErrorsAboutFlowsFromOutside(t *testing.T) {
	hooks(t, Options{}, func(t *testing.T, n *Node) {
		web := n.Pod(t)
		for _, e := range icmpErrors {
			t.Run(e.name, func(t *testing.T) {
				families(t, func(t *testing.T, v6 bool) {
					from, door, backend, router := outside(v6, 1, 4000), n.NodePort(v6, 30080), web.At(v6, 8080), routers[v6]
					n.Service(t, UDP, door, backend)
					n.Wire(t, Datagram(from, door, "hello")).arrives(t, web, from, backend)
					answer := n.From(t, web, Datagram(backend, from, "hello"))
					answer.leaves(t, door, from)
					// A router outside, and the client itself, about the pod's answer.
					for _, who := range []netip.Addr{router, from.Addr()} {
						r := n.Wire(t, e.from(who, answer.Packet, 8))
						if r.To != web {
							t.Fatalf("an error about the answer: %v", r)
						}
						r.quotes(t, who, backend.Addr(), backend, from)
					}
					// The pod about the client's packet.
					r := n.From(t, web, e.from(backend.Addr(), Datagram(from, backend, "hello"), 8))
					if !r.Leaves {
						t.Fatalf("an error of the pod: %v", r)
					}
					r.quotes(t, door.Addr(), from.Addr(), from, door)

					// The same with the backend on another node.
					far, door2 := elsewhere(v6, 8080), n.NodePort(v6, 30081)
					n.Service(t, UDP, door2, far)
					in := n.Wire(t, Datagram(from, door2, "hello"))
					in.leaves(t, in.Src, far)
					answer = n.Wire(t, Datagram(far, in.Src, "hello"))
					answer.leaves(t, door2, from)
					r = n.Wire(t, e.from(router, answer.Packet, 8))
					if !r.Leaves {
						t.Fatalf("an error about the answer from elsewhere: %v", r)
					}
					r.quotes(t, router, far.Addr(), far, in.Src)
					r = n.Wire(t, e.from(from.Addr(), answer.Packet, 8))
					r.quotes(t, in.Src.Addr(), far.Addr(), far, in.Src)
					r = n.Wire(t, e.from(router, in.Packet, 8))
					if !r.Leaves {
						t.Fatalf("an error about the packet that left: %v", r)
					}
					r.quotes(t, router, from.Addr(), from, door2)
					r = n.Wire(t, e.from(far.Addr(), in.Packet, 8))
					r.quotes(t, door2.Addr(), from.Addr(), from, door2)
				})
			})
		}
	})
}

func TestFragmentsFromOutsideFollowTheirFlow(t *testing.T) {
	eachHook(t, Options{}, func(t *testing.T, n *Node) {
		web := n.Pod(t)
		families(t, func(t *testing.T, v6 bool) {
			for i, backend := range []netip.AddrPort{web.At(v6, 8080), elsewhere(v6, 8080)} {
				from, door := outside(v6, 1, 4000), n.NodePort(v6, 30080+uint16(i))
				n.Service(t, UDP, door, backend)
				whole := Datagram(from, door, string(make([]byte, 3000)))
				for j, f := range whole.Fragments(77+uint32(i), 1400) {
					r := n.Wire(t, f)
					if r.Verdict != Redirect || r.Dst.Addr() != backend.Addr() || j == 0 && r.Dst != backend {
						t.Fatalf("fragment %d: %v", j, r)
					}
				}
				// What begins in the middle is of no flow; the node's own are its stack's.
				f := whole.Fragments(99, 1400)[1]
				n.Wire(t, f).passes(t, netip.AddrPortFrom(from.Addr(), 0), netip.AddrPortFrom(door.Addr(), 0))
			}
		})
	})
}

func TestMaglevChoosesByTheEndsOfTheFlow(t *testing.T) {
	n, twin := NewNode(t), NewNode(t)
	families(t, func(t *testing.T, v6 bool) {
		vip := VIP(v6, 50, 80)
		nodes := []*Node{n, twin}
		for _, node := range nodes {
			s := node.Service(t, TCP, vip, elsewhere(v6, 1), elsewhere(v6, 2), elsewhere(v6, 3))
			s.Change(t, func(v *bpf.Service) { v.Flags |= bpf.ServiceExternal | bpf.ServiceMaglev })
		}
		counts := map[netip.AddrPort]int{}
		for port := range uint16(300) {
			syn := Segment(outside(v6, 1, 10000+port), vip, SYN)
			a, b := n.Wire(t, syn), twin.Wire(t, syn)
			if a.Dst != b.Dst {
				t.Fatalf("one node chose %s for %s, the other %s", a.Dst, syn.Src, b.Dst)
			}
			counts[a.Dst]++
		}
		for backend, count := range counts {
			// 300 draws of a third.
			if count < 50 {
				t.Errorf("%s has %d of 300", backend, count)
			}
		}
	})
}

func TestPolicyHoldsForClientsOutside(t *testing.T) {
	hooks(t, Options{MaxEntries: 4096, Policy: true}, func(t *testing.T, n *Node) {
		web := n.Pod(t)
		families(t, func(t *testing.T, v6 bool) {
			from, door, backend := outside(v6, 1, 4000), n.NodePort(v6, 30080), web.At(v6, 8080)
			n.Service(t, TCP, door, backend)
			put(t, n.Policies, uint32(web.ID), bpf.EndpointPolicy{})
			n.changed(t)
			n.Wire(t, Segment(from, door, SYN)).dropped(t, "policy_unknown")
			put(t, n.Policies, uint32(web.ID), bpf.EndpointPolicy{Ruleset: [2]uint64{bpf.RulesetOpen, bpf.RulesetOpen}})
			n.changed(t)
			n.Wire(t, Segment(from, door, SYN)).arrives(t, web, from, backend)
			n.From(t, web, Segment(backend, from, SYN|ACK)).leaves(t, door, from)
			for range 3 {
				n.Wire(t, Segment(from, door, ACK)).arrives(t, web, from, backend)
			}
			// A change of policy is heard by the next packet, though the flow is established.
			put(t, n.Policies, uint32(web.ID), bpf.EndpointPolicy{Ruleset: [2]uint64{99, 99}})
			n.changed(t)
			if r := n.Wire(t, Segment(from, door, ACK)); r.Verdict != Drop {
				t.Errorf("after the policy closed: %v", r)
			}
		})
	})
}

// everyBackend checks that of connections on one port each backend got some.
func everyBackend(t *testing.T, chosen []int) {
	t.Helper()
	for i, count := range chosen {
		if count == 0 {
			t.Errorf("the connections never went to backend %d: %v", i, chosen)
		}
	}
}

// A SYN that nobody answers costs one entry; the answer makes the service's.
func TestASYNFromOutsideIsOneEntryUntilItIsAnswered(t *testing.T) {
	hooks(t, Options{}, func(t *testing.T, n *Node) {
		pods := []*Pod{n.Pod(t), n.Pod(t), n.Pod(t)}
		families(t, func(t *testing.T, v6 bool) {
			door := n.NodePort(v6, 30080)
			var backends []netip.AddrPort
			for _, p := range pods {
				backends = append(backends, p.At(v6, 8080))
			}
			n.Service(t, TCP, door, backends...)
			var chosen [3]int
			for i := range uint32(30) {
				n.Flush(t)
				from := outside(v6, 1, 4000)
				syn := Segment(from, door, SYN)
				syn.Seq = i * 2_654_435_761
				first := n.Wire(t, syn)
				at := slices.Index(backends, first.Dst)
				if at < 0 {
					t.Fatalf("got %v\nwant it to arrive at one of %v", first, backends)
				}
				chosen[at]++
				for range 3 {
					n.Wire(t, syn).arrives(t, pods[at], from, backends[at])
				}
				if entries := n.Entries(t); len(entries) != 1 {
					t.Fatalf("four SYNs that nobody answered have made %d entries", len(entries))
				}
				if i%3 == 0 {
					n.From(t, pods[at], Segment(backends[at], from, RST|ACK)).leaves(t, door, from)
					if _, there := n.ServiceEntry(t, TCP, from, door); there {
						t.Fatal("a refusal has made the service's entry")
					}
					continue
				}
				n.From(t, pods[at], Segment(backends[at], from, SYN|ACK)).leaves(t, door, from)
				if svc, there := n.ServiceEntry(t, TCP, from, door); !there || svc.Nat != bpf.ToAddr(backends[at].Addr()) {
					t.Fatalf("the answer has made the service's entry %v, %+v", there, svc)
				}
				// Its number does not matter from now on.
				n.Wire(t, Segment(from, door, ACK)).arrives(t, pods[at], from, backends[at])
				n.state(t, TCP, from, door, backends[at], bpf.CTEstablished)
			}
			everyBackend(t, chosen[:])
		})
	})
}

// A SYN with the ends of a connection that lives may be anybody's: the connection goes on,
// and its own backend is asked. Once that has been told that its client knows of none, the
// new one begins.
func TestASYNOnALivingConnectionFromOutsideAsksItsBackend(t *testing.T) {
	hooks(t, Options{}, func(t *testing.T, n *Node) {
		pods := []*Pod{n.Pod(t), n.Pod(t)}
		families(t, func(t *testing.T, v6 bool) {
			backends := []netip.AddrPort{pods[0].At(v6, 8080), pods[1].At(v6, 8080), elsewhere(v6, 8081), elsewhere(v6, 8082)}
			door, from := n.NodePort(v6, 30080), outside(v6, 1, 4000)
			n.Service(t, TCP, door, backends...)
			answer := func(client, backend netip.AddrPort, flags uint8) Result {
				if at := slices.Index(backends, backend); at < len(pods) {
					return n.From(t, pods[at], Segment(backend, client, flags))
				}
				return n.Wire(t, Segment(backend, client, flags))
			}
			send := func(flags uint8, seq uint32) (client, backend netip.AddrPort) {
				t.Helper()
				segment := Segment(from, door, flags)
				segment.Seq = seq
				r := n.Wire(t, segment)
				if slices.Index(backends, r.Dst) < 0 {
					t.Fatalf("got %v\nwant it to arrive at one of %v", r, backends)
				}
				return r.Src, r.Dst
			}
			goes := func(client, backend netip.AddrPort, flags uint8, seq uint32) {
				t.Helper()
				if c, b := send(flags, seq); c != client || b != backend {
					t.Fatalf("it goes from %s to %s, and not from %s to %s", c, b, client, backend)
				}
			}
			lives := func(client, backend netip.AddrPort) {
				t.Helper()
				for range 3 {
					goes(client, backend, ACK, 5)
					answer(client, backend, ACK).leaves(t, door, from)
				}
				svc, _ := n.ServiceEntry(t, TCP, from, door)
				flow, _ := n.FlowEntry(t, TCP, client, backend)
				if svc.State != bpf.CTEstablished || flow.State != bpf.CTEstablished || svc.Nat != bpf.ToAddr(backend.Addr()) {
					t.Fatalf("SVC: state %d, to %v; flow: state %d; want it to %s", svc.State, svc.Nat, flow.State, backend)
				}
			}
			client, backend := send(SYN, 1)
			answer(client, backend, SYN|ACK).leaves(t, door, from)
			lives(client, backend)
			pairs := map[[2]bool]int{} // whether the old and the new backend are of this node
			for i := range uint32(60) {
				// The same number comes to the same backend.
				seq := 100 + i*2_654_435_761
				other, next := send(SYN, seq)
				if next == backend && other == client {
					answer(client, backend, ACK).leaves(t, door, from)
					lives(client, backend)
					continue
				}
				pairs[[2]bool{slices.Index(backends, backend) < 2, slices.Index(backends, next) < 2}]++
				answer(other, next, SYN|ACK).dropped(t, "tuple_collision")
				lives(client, backend)
				goes(client, backend, SYN, seq)
				answer(client, backend, ACK).leaves(t, door, from)
				lives(client, backend)
				if i%2 == 0 {
					continue
				}
				// Its client resets it.
				goes(other, next, SYN, seq)
				answer(other, next, SYN|ACK).dropped(t, "tuple_collision")
				goes(client, backend, SYN, seq)
				goes(client, backend, RST, 9)
				goes(other, next, SYN, seq)
				answer(other, next, SYN|ACK).leaves(t, door, from)
				client, backend = other, next
				lives(client, backend)
			}
			if len(pairs) != 4 {
				t.Errorf("not every kind of backend came after every other: %v", pairs)
			}
		})
	})
}

// The same with a backend on another node, where the port that this node takes for the
// client follows from the SYN as well.
func TestASYNToAnotherNodeIsOneEntryUntilItIsAnswered(t *testing.T) {
	hooks(t, Options{}, func(t *testing.T, n *Node) {
		families(t, func(t *testing.T, v6 bool) {
			door := n.NodePort(v6, 30080)
			backends := []netip.AddrPort{elsewhere(v6, 8080), elsewhere(v6, 8081), elsewhere(v6, 8082)}
			n.Service(t, TCP, door, backends...)
			var chosen [3]int
			sources := map[netip.AddrPort]bool{}
			for i := range uint32(30) {
				n.Flush(t)
				from := outside(v6, 1, 4000)
				syn := Segment(from, door, SYN)
				syn.Seq = i * 2_654_435_761
				first := n.Wire(t, syn)
				source, backend := first.Src, first.Dst
				at := slices.Index(backends, backend)
				if at < 0 {
					t.Fatalf("got %v\nwant it to leave to one of %v", first, backends)
				}
				chosen[at]++
				sources[source] = true
				for range 3 {
					n.Wire(t, syn).leaves(t, source, backend)
				}
				if entries := n.Entries(t); len(entries) != 1 {
					t.Fatalf("four SYNs that nobody answered have made %d entries", len(entries))
				}
				// Another client is somebody else there, whatever it sends.
				other := Segment(outside(v6, 2, 4000), door, SYN)
				other.Seq = syn.Seq
				if r := n.Wire(t, other); r.Src == source && r.Dst == backend {
					t.Fatalf("two clients are both %s to the backend", source)
				}
				if i%3 == 0 {
					n.Wire(t, Segment(backend, source, RST|ACK)).leaves(t, door, from)
					if _, there := n.ServiceEntry(t, TCP, from, door); there {
						t.Fatal("a refusal has made the service's entry")
					}
					// The next connection has another number, and another port.
					syn.Seq++
					if r := n.Wire(t, syn); r.Src == source && r.Dst == backend {
						t.Fatalf("the next connection is %s to the backend again", source)
					}
					continue
				}
				n.Wire(t, Segment(backend, source, SYN|ACK)).leaves(t, door, from)
				svc, there := n.ServiceEntry(t, TCP, from, door)
				if !there || svc.Nat != bpf.ToAddr(backend.Addr()) || svc.Origin != bpf.ToAddr(source.Addr()) {
					t.Fatalf("the answer has made the service's entry %v, %+v", there, svc)
				}
				// Its number does not matter from now on.
				for range 3 {
					n.Wire(t, Segment(from, door, ACK)).leaves(t, source, backend)
					n.Wire(t, Segment(backend, source, ACK)).leaves(t, door, from)
				}
				established := func() {
					t.Helper()
					svc, _ := n.ServiceEntry(t, TCP, from, door)
					flow, _ := n.FlowEntry(t, TCP, source, backend)
					if svc.State != bpf.CTEstablished || flow.State != bpf.CTEstablished || (svc.Flags|flow.Flags)&bpf.CTEmbryonic != 0 {
						t.Fatalf("SVC: state %d, flags %#x; flow: state %d, flags %#x", svc.State, svc.Flags, flow.State, flow.Flags)
					}
				}
				established()
				// The SYN comes once more, late: the backend says what it thinks of it, and nothing changes.
				n.Wire(t, syn).leaves(t, source, backend)
				n.Wire(t, Segment(backend, source, ACK)).leaves(t, door, from)
				n.Wire(t, Segment(from, door, ACK)).leaves(t, source, backend)
				established()
			}
			everyBackend(t, chosen[:])
			if len(sources) < 25 {
				t.Errorf("30 connections had %d ports of the node", len(sources))
			}
		})
	})
}
