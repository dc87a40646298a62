// SPDX-License-Identifier: Apache-2.0

//go:build root

package packet

import (
	"net/netip"
	"testing"
)

// quotes checks whom an ICMP error is from and to, and what packet it speaks of.
func (r Result) quotes(t *testing.T, src, dst netip.Addr, quotedSrc, quotedDst netip.AddrPort) {
	t.Helper()
	q, err := r.Quoted()
	if err != nil {
		t.Fatalf("the quote: %v", err)
	}
	if r.Src.Addr() != src || r.Dst.Addr() != dst || q.Src != quotedSrc || q.Dst != quotedDst {
		t.Fatalf("got %v\n about %s -> %s\nwant %s -> %s\n about %s -> %s", r, q.Src, q.Dst, src, dst, quotedSrc, quotedDst)
	}
}

// An icmpError is a kind of error in both families.
type icmpError struct {
	name  string
	types [2]uint8
	codes [2]uint8
	rest  uint32
}

var icmpErrors = []icmpError{
	{"port unreachable", [2]uint8{Unreachable, Unreachable6}, [2]uint8{PortCode, PortCode6}, 0},
	{"packet too big", [2]uint8{Unreachable, PacketTooBig6}, [2]uint8{FragNeeded, 0}, 1400},
	{"time exceeded", [2]uint8{TimeExceeded, TimeExceeded6}, [2]uint8{0, 0}, 0},
	{"parameter problem", [2]uint8{12, 4}, [2]uint8{0, 1}, 0},
}

func (e icmpError) from(addr netip.Addr, about Packet, quoted int) Packet {
	i := 0
	if addr.Is6() {
		i = 1
	}
	return Quote(addr, e.types[i], e.codes[i], e.rest, about, quoted)
}

var routers = map[bool]netip.Addr{
	false: netip.MustParseAddr("198.51.100.1"),
	true:  netip.MustParseAddr("2001:db8:ffff::1"),
}

var remotes = map[bool]netip.AddrPort{
	false: netip.MustParseAddrPort("203.0.113.1:8080"),
	true:  netip.MustParseAddrPort("[2001:db8:203::1]:8080"),
}

func TestErrorsAboutATranslatedFlowSpeakOfTheFrontend(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	for _, e := range icmpErrors {
		t.Run(e.name, func(t *testing.T) {
			families(t, func(t *testing.T, v6 bool) {
				for _, proto := range []uint8{TCP, UDP} {
					from, vip, backend := client.At(v6, 4000), VIP(v6, 10, 80), web.At(v6, 8080)
					n.Service(t, proto, vip, backend)
					in := Packet{Src: from, Dst: vip, Proto: proto, Flags: SYN, Payload: []byte("some payload")}
					out := n.From(t, client, in)
					out.arrives(t, web, from, backend)
					for _, quoted := range []int{8, 20, 32} {
						// The backend says it: from the frontend, for all that the client knows.
						r := n.From(t, web, e.from(backend.Addr(), out.Packet, quoted))
						if r.Verdict != Redirect || r.To != client {
							t.Fatalf("got %v, want it to reach the client", r)
						}
						r.quotes(t, vip.Addr(), from.Addr(), from, vip)
						if r.Rest != e.rest {
							t.Errorf("the error's own field changed from %d to %d", e.rest, r.Rest)
						}
					}

					// The other way: the client says it about an answer.
					answer := n.From(t, web, Packet{Src: backend, Dst: from, Proto: proto, Flags: SYN | ACK, Payload: []byte("the answer")})
					answer.arrives(t, client, vip, from)
					for _, quoted := range []int{8, 20, 30} {
						r := n.From(t, client, e.from(from.Addr(), answer.Packet, quoted))
						if r.Verdict != Redirect || r.To != web {
							t.Fatalf("got %v, want it to reach the backend", r)
						}
						r.quotes(t, from.Addr(), backend.Addr(), backend, from)
					}
					n.Flush(t)
				}
			})
		})
	}
}

func TestErrorsFromARouterOnTheWayKeepItsAddress(t *testing.T) {
	n := NewNode(t)
	client := n.Pod(t)
	for _, e := range icmpErrors {
		t.Run(e.name, func(t *testing.T) {
			families(t, func(t *testing.T, v6 bool) {
				from, vip, backend, router := client.At(v6, 4000), VIP(v6, 10, 80), remotes[v6], routers[v6]
				n.Service(t, TCP, vip, backend)
				out := n.From(t, client, Segment(from, vip, SYN))
				out.passes(t, from, backend)
				r := n.To(t, client, e.from(router, out.Packet, 8))
				if r.Verdict != Pass {
					t.Fatalf("got %v", r)
				}
				r.quotes(t, router, from.Addr(), from, vip)
				// And from the backend itself.
				r = n.To(t, client, e.from(backend.Addr(), out.Packet, 8))
				r.quotes(t, vip.Addr(), from.Addr(), from, vip)
			})
		})
	}
}

func TestErrorsOfAPodThatIsItsOwnBackend(t *testing.T) {
	n := NewNode(t)
	web := n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		from, vip, backend := web.At(v6, 4000), VIP(v6, 10, 53), web.At(v6, 1053)
		n.Service(t, UDP, vip, backend)
		out := n.From(t, web, Datagram(from, vip, "me?"))
		alias := out.Src
		out.arrives(t, web, alias, backend)
		// Nobody listens on the backend's port.
		r := n.From(t, web, icmpErrors[0].from(backend.Addr(), out.Packet, 8))
		if r.Verdict != Redirect || r.To != web {
			t.Fatalf("got %v, want it to reach the pod", r)
		}
		r.quotes(t, vip.Addr(), from.Addr(), from, vip)
		// The client's port was closed before the answer came.
		answer := n.From(t, web, Datagram(backend, alias, "me!"))
		answer.arrives(t, web, vip, from)
		r = n.From(t, web, icmpErrors[0].from(from.Addr(), answer.Packet, 8))
		if r.Verdict != Redirect || r.To != web {
			t.Fatalf("got %v, want it to reach the pod", r)
		}
		r.quotes(t, alias.Addr(), backend.Addr(), backend, alias)
	})
}

func TestErrorsAboutAPlainFlowPassUnchanged(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		from, to := client.At(v6, 4000), web.At(v6, 8080)
		for _, e := range icmpErrors {
			out := n.From(t, client, Datagram(from, to, "direct"))
			out.arrives(t, web, from, to)
			r := n.From(t, web, e.from(to.Addr(), out.Packet, 8))
			if r.Verdict != Redirect || r.To != client {
				t.Fatalf("got %v, want it to reach the client", r)
			}
			r.quotes(t, to.Addr(), from.Addr(), from, to)
			// About no flow at all: a router may know more than the table.
			r = n.To(t, client, e.from(routers[v6], Datagram(client.At(v6, 9999), remotes[v6], "x"), 8))
			if r.Verdict != Pass {
				t.Fatalf("got %v", r)
			}
		}
	})
}

func TestAnErrorToAServiceAboutNoFlowIsDropped(t *testing.T) {
	n := NewNode(t)
	client := n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		vip := VIP(v6, 10, 80)
		n.Service(t, TCP, vip)
		for _, e := range icmpErrors {
			e := e.from(client.IP(v6), Segment(vip, client.At(v6, 4000), ACK), 8)
			n.From(t, client, e).dropped(t, "icmp_unrelated")
		}
	})
}

func TestErrorsThatQuoteTooLittleOrNonsense(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		from, vip, backend := client.At(v6, 4000), VIP(v6, 10, 80), web.At(v6, 8080)
		n.Service(t, TCP, vip, backend)
		out := n.From(t, client, Segment(from, vip, SYN))
		whole := icmpErrors[0].from(backend.Addr(), out.Packet, 8)
		for size := range len(whole.Payload) {
			cut := whole
			cut.Payload = whole.Payload[:size]
			if r := n.From(t, web, cut); r.Verdict != Drop || r.Reason != "truncated" && r.Reason != "malformed" {
				t.Errorf("quote of %d bytes: %v", size, r)
			}
		}
		strange := whole
		strange.Payload = append([]byte{}, whole.Payload...)
		strange.Payload[0] = 0x11 // version 1, 4 bytes of header
		n.From(t, web, strange).dropped(t, "malformed")
	})
}

func TestEchoBetweenPodsAndOutside(t *testing.T) {
	n := NewNode(t)
	a, b := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		there := Ping(a.IP(v6), b.IP(v6), 77)
		n.From(t, a, there).arrives(t, b, there.Src, there.Dst)
		back := Pong(there)
		n.From(t, b, back).arrives(t, a, back.Src, back.Dst)
		if e, ok := n.FlowEntry(t, there.Proto, there.Src, there.Dst); !ok || e.Packets != [2]uint64{1, 1} {
			t.Errorf("entry %+v (%v)", e, ok)
		}
		out := Ping(a.IP(v6), remotes[v6].Addr(), 78)
		n.From(t, a, out).passes(t, out.Src, out.Dst)
		n.To(t, a, Pong(out)).passes(t, out.Dst, out.Src)
		in := Ping(routers[v6], a.IP(v6), 79)
		n.To(t, a, in).passes(t, in.Src, in.Dst)
		n.From(t, a, Pong(in)).passes(t, in.Dst, in.Src)
		// An error about an echo.
		r := n.To(t, a, icmpErrors[2].from(routers[v6], out, 8))
		r.quotes(t, routers[v6], a.IP(v6), out.Src, out.Dst)
		n.Service(t, TCP, VIP(v6, 10, 80), b.At(v6, 80))
		n.From(t, a, Ping(a.IP(v6), VIP(v6, 10, 80).Addr(), 80)).dropped(t, "protocol")
	})
}
