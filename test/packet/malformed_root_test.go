// SPDX-License-Identifier: Apache-2.0

//go:build root

package packet

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// frames of every kind that a pod sends, to a service where that makes sense.
func kinds(pod *Pod, v6 bool) map[string]Packet {
	from := pod.At(v6, 4000)
	k := map[string]Packet{
		"TCP":    Segment(from, VIP(v6, 10, 80), SYN),
		"UDP":    Datagram(from, VIP(v6, 10, 53), "query"),
		"echo":   Ping(from.Addr(), remotes[v6].Addr(), 9),
		"error":  icmpErrors[0].from(from.Addr(), Datagram(VIP(v6, 10, 53), from, "answer"), 16),
		"others": {Src: from, Dst: remotes[v6], Proto: 132, Payload: make([]byte, 16)},
	}
	if v6 {
		e := k["UDP"]
		e.Extensions = []Extension{{HopByHop, make([]byte, 6)}, {Destination, make([]byte, 14)}}
		k["extensions"] = e
	}
	for name, p := range k {
		p.From, p.To = pod.MAC, pod.HostMAC
		k[name] = p
	}
	return k
}

func serveAll(t *testing.T, n *Node, web *Pod) {
	t.Helper()
	for _, v6 := range []bool{false, true} {
		n.Service(t, TCP, VIP(v6, 10, 80), web.At(v6, 8080))
		n.Service(t, UDP, VIP(v6, 10, 53), web.At(v6, 1053))
	}
}

func TestTruncatedAtEveryByte(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	serveAll(t, n, web)
	families(t, func(t *testing.T, v6 bool) {
		// The error below speaks of a flow.
		n.From(t, client, kinds(client, v6)["UDP"])
		for name, p := range kinds(client, v6) {
			t.Run(name, func(t *testing.T) {
				frame := p.Bytes()
				for size := 14; size < len(frame); size++ {
					for hook, run := range map[string]func(testing.TB, *Pod, []byte) Result{"from": n.FromRaw, "to": n.ToRaw} {
						// Newer kernels run no program on less than an IP header; packet sockets send it all the same.
						_, _, err := n.RunRaw(n.ToContainer, client.Ifindex, frame[:size], 0)
						if errors.Is(err, unix.EINVAL) && size < len(frame)-len(p.Layer3())+header(v6) {
							continue
						}
						r := run(t, client, frame[:size])
						if r.Verdict != Drop || r.Reason != "truncated" && r.Reason != "malformed" {
							t.Fatalf("%s: %d of %d bytes: %v", hook, size, len(frame), r)
						}
					}
				}
				if r := n.FromRaw(t, client, frame); r.Verdict == Drop {
					t.Fatalf("whole: %v", r)
				}
			})
		}
	})
}

func header(v6 bool) int {
	if v6 {
		return 40
	}
	return 20
}

func TestHeadersThatContradictThemselves(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	serveAll(t, n, web)
	const l3 = 14
	for _, c := range []struct {
		name   string
		kind   string
		v6     bool
		change func(f []byte)
		reason string
	}{
		{"version 5", "TCP", false, func(f []byte) { f[l3] = 0x55 }, "malformed"},
		{"version 0", "TCP", true, func(f []byte) { f[l3] = 0 }, "malformed"},
		{"version 4 as IPv6", "TCP", true, func(f []byte) { f[l3] = 0x45 }, "malformed"},
		{"header of 16 bytes", "TCP", false, func(f []byte) { f[l3] = 0x44 }, "malformed"},
		{"header longer than the packet", "TCP", false, func(f []byte) { f[l3] = 0x4f }, "malformed"},
		{"length less than the header", "UDP", false, func(f []byte) { f[l3+3] = 19 }, "malformed"},
		{"length 0", "UDP", false, func(f []byte) { f[l3+3] = 0 }, "malformed"},
		{"length beyond the frame", "UDP", false, func(f []byte) { f[l3+3]++ }, "truncated"},
		{"length beyond the frame", "UDP", true, func(f []byte) { f[l3+5]++ }, "truncated"},
		{"data offset 4", "TCP", false, func(f []byte) { f[l3+20+12] = 4 << 4 }, "malformed"},
		{"data offset beyond the segment", "TCP", true, func(f []byte) { f[l3+40+12] = 6 << 4 }, "malformed"},
		{"UDP length 7", "UDP", false, func(f []byte) { f[l3+20+5] = 7 }, "malformed"},
		{"UDP length beyond the packet", "UDP", false, func(f []byte) { f[l3+20+5]++ }, "truncated"},
		{"UDP length beyond the packet", "UDP", true, func(f []byte) { f[l3+40+5]++ }, "truncated"},
		{"ICMPv6 over IPv4", "echo", false, func(f []byte) { f[l3+9] = ICMPv6 }, "malformed"},
		{"ICMP over IPv6", "echo", true, func(f []byte) { f[l3+6] = ICMP }, "malformed"},
		{"extension header beyond the packet", "extensions", true, func(f []byte) { f[l3+41] = 9 }, "malformed"},
		{"protocol 0 to a service", "UDP", false, func(f []byte) { f[l3+9] = 0 }, "protocol"},
		{"ethertype of PPPoE", "UDP", false, func(f []byte) { f[12], f[13] = 0x88, 0x64 }, "ethertype"},
		{"a length in place of the ethertype", "UDP", false, func(f []byte) { f[12], f[13] = 0, 46 }, "ethertype"},
	} {
		t.Run(c.name, func(t *testing.T) {
			frame := kinds(client, c.v6)[c.kind].Bytes()
			c.change(frame)
			n.FromRaw(t, client, frame).dropped(t, c.reason)
		})
	}
}

func TestExtensionHeadersAreReadUpToALimit(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	serveAll(t, n, web)
	from, vip := client.At(true, 4000), VIP(true, 10, 53)
	long := Extension{Destination, make([]byte, 254)}
	for count := range 8 {
		p := Datagram(from, vip, "query")
		for range count {
			p.Extensions = append(p.Extensions, Extension{Destination, make([]byte, 6)})
		}
		if r := n.From(t, client, p); count <= 5 {
			r.arrives(t, web, from, web.At(true, 1053))
			if len(r.Extensions) != count || string(r.Payload) != "query" {
				t.Errorf("%d headers came out as %d with %q", count, len(r.Extensions), r.Payload)
			}
		} else {
			r.dropped(t, "extension_headers")
		}
	}
	for _, header := range []uint8{HopByHop, Routing, Destination} {
		p := Segment(from, VIP(true, 10, 80), SYN)
		p.Extensions = []Extension{{header, make([]byte, 22)}, long}
		n.From(t, client, p).arrives(t, web, from, web.At(true, 8080))
	}
	// Beyond what is looked at.
	p := Datagram(from, vip, "query")
	p.Extensions = []Extension{long, long, long, long}
	if r := n.From(t, client, p); r.Verdict != Drop {
		t.Errorf("a header at 1 KiB: %v", r)
	}
	// Encrypted or unknown headers to a service say nothing that could be translated.
	for _, header := range []uint8{50, 51, 135, NoNext} {
		p := Packet{Src: from, Dst: vip, Proto: header, Payload: make([]byte, 32)}
		n.From(t, client, p).dropped(t, "protocol")
	}
}

func TestVLANTagsAreDropped(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	serveAll(t, n, web)
	families(t, func(t *testing.T, v6 bool) {
		p := kinds(client, v6)["UDP"]
		p.VLAN = 7
		n.From(t, client, p).dropped(t, "vlan_tag")
		n.To(t, client, p).dropped(t, "vlan_tag")
		frame := p.Bytes()
		frame[12], frame[13] = 0x88, 0xa8
		n.FromRaw(t, client, frame).dropped(t, "vlan_tag")
	})
}

func TestAPodSendsOnlyFromItsOwnAddresses(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	serveAll(t, n, web)
	families(t, func(t *testing.T, v6 bool) {
		for name, p := range kinds(client, v6) {
			t.Run(name, func(t *testing.T) {
				for _, src := range []netip.Addr{web.IP(v6), remotes[v6].Addr(), VIP(v6, 10, 80).Addr(), unspecified(v6)} {
					forged := p
					forged.Src = netip.AddrPortFrom(src, p.Src.Port())
					n.From(t, client, forged).dropped(t, "source_address")
				}
				forged := p
				forged.From = web.MAC
				n.From(t, client, forged).dropped(t, "source_mac")
				forged.From = client.HostMAC
				n.From(t, client, forged).dropped(t, "source_mac")
			})
		}
		n.Forget(t, client)
		n.From(t, client, kinds(client, v6)["UDP"]).dropped(t, "source_address")
		for _, address := range []netip.Addr{client.V4, client.V6} {
			n.register(t, client, address)
		}
		n.From(t, client, kinds(client, v6)["UDP"]).arrives(t, web, client.At(v6, 4000), web.At(v6, 1053))
	})
}

func unspecified(v6 bool) netip.Addr {
	if v6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// An IPv6 packet between IPv4-mapped addresses would be taken for an IPv4 flow
// (RFC 4038, 4.2: such addresses are never on the wire).
func TestMappedAddressesAreNotOnTheWire(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	serveAll(t, n, web)
	mapped := func(a netip.Addr) netip.Addr { return netip.AddrFrom16(a.As16()) }
	for name, addresses := range map[string][2]netip.Addr{
		"both":        {mapped(client.V4), mapped(VIP(false, 10, 80).Addr())},
		"source":      {mapped(client.V4), VIP(true, 10, 80).Addr()},
		"destination": {client.V6, mapped(VIP(false, 10, 80).Addr())},
	} {
		t.Run(name, func(t *testing.T) {
			p := Segment(netip.AddrPortFrom(addresses[0], 4000), netip.AddrPortFrom(addresses[1], 80), SYN)
			n.From(t, client, p).dropped(t, "malformed")
			n.To(t, web, p).dropped(t, "malformed")
		})
	}
}

func TestNeighbourDiscoveryIsTheStacksOnItsLinkOnly(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	serveAll(t, n, web)
	link := netip.MustParseAddr("fe80::1234")
	for typ := range 256 {
		p := Packet{
			Src: netip.AddrPortFrom(link, 0), Dst: netip.AddrPortFrom(netip.MustParseAddr("ff02::1"), 0),
			Proto: ICMPv6, Type: uint8(typ), TTL: 255, Payload: make([]byte, 16),
		}
		r := n.From(t, client, p)
		if typ >= 130 && typ <= 137 || typ == 143 {
			if r.Verdict != Pass {
				t.Errorf("type %d: %v", typ, r)
			}
			// To the gateway's link-local address, as when it is asked whether it is still there.
			p.Dst = netip.AddrPortFrom(netip.MustParseAddr(Gateway6), 0)
			if r := n.From(t, client, p); r.Verdict != Pass {
				t.Errorf("type %d to the gateway: %v", typ, r)
			}
			// Off the link it is a packet as any other: no other pod is to be deceived.
			p.Dst = netip.AddrPortFrom(web.V6, 0)
			n.From(t, client, p).dropped(t, "source_address")
			p.Src = client.At(true, 0)
			p.Dst = netip.AddrPortFrom(VIP(true, 10, 80).Addr(), 0)
			n.From(t, client, p).dropped(t, "protocol")
		} else if r.Verdict != Drop {
			t.Errorf("type %d from a link-local address: %v", typ, r)
		}
	}
	arp := append(append(append([]byte{}, client.HostMAC[:]...), client.MAC[:]...), 8, 6)
	if r := n.FromRaw(t, client, append(arp, make([]byte, 28)...)); r.Verdict != Pass {
		t.Errorf("ARP: %v", r)
	}
}

func TestDatagramsWithoutAChecksumStayWithout(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	serveAll(t, n, web)
	families(t, func(t *testing.T, v6 bool) {
		from, vip, backend := client.At(v6, 4000), VIP(v6, 10, 53), web.At(v6, 1053)
		p := Datagram(from, vip, "no sum")
		p.NoSum = true
		out := n.From(t, client, p)
		out.arrives(t, web, from, backend)
		if !out.NoSum {
			t.Error("a checksum was made up")
		}
		// A sum that comes out as 0 is written as ffff (RFC 768): 0 means none.
		for i := range 65536 / 251 {
			p := Datagram(from, vip, "..")
			binary.BigEndian.PutUint16(p.Payload, uint16(i*251))
			if out := n.From(t, client, p); out.NoSum {
				t.Fatalf("payload %04x lost its checksum", i*251)
			}
		}
		// The payload that makes it so.
		p = Datagram(from, backend, "..")
		p.Payload = []byte{0, 0}
		sum := binary.BigEndian.Uint16(p.layer4()[6:])
		p = Datagram(from, vip, "..")
		binary.BigEndian.PutUint16(p.Payload, sum)
		out = n.From(t, client, p)
		out.arrives(t, web, from, backend)
		l4 := len(out.Raw) - 10
		if got := binary.BigEndian.Uint16(out.Raw[l4+6:]); got != 0xffff {
			t.Errorf("a sum of zero became %04x", got)
		}
	})
}

func TestHopsAreCountedAndTheLastIsTheStacks(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		for ttl := 1; ttl < 256; ttl++ {
			p := Datagram(client.At(v6, 4000), web.At(v6, 53), strings.Repeat("x", ttl))
			p.TTL = uint8(ttl)
			out := n.From(t, client, p)
			if ttl == 1 {
				// The stack says that it went too far.
				out.passes(t, p.Src, p.Dst)
				continue
			}
			if out.arrives(t, web, p.Src, p.Dst); int(out.TTL) != ttl-1 {
				t.Fatalf("TTL %d came out as %d", ttl, out.TTL)
			}
		}
	})
}
