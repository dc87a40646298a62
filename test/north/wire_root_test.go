// SPDX-License-Identifier: Apache-2.0

//go:build root

package north

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/test/fate"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
	"github.com/mooring-cni/mooring/test/scenario"
)

var onTheWire = group{name: "packets are right on the wire", tests: []modeTest{
	{"without offloads", func(_ *testing.T, l *Lab) { l.withoutOffloads() }},
	{"to a pod of the node that is asked", func(t *testing.T, l *Lab) { l.onTheWire(t, "a-1") }},
	{"to a pod of another node", func(t *testing.T, l *Lab) { l.onTheWire(t, "b-1") }},
	{"to a process of the node", func(t *testing.T, l *Lab) { l.Hosts(); l.hostOnTheWire(t, "a-host") }},
	{"UDP without a checksum, to a pod of the node", func(t *testing.T, l *Lab) { l.withoutChecksum(t, "a-1") }},
	{"UDP without a checksum, to a pod of another node", func(t *testing.T, l *Lab) { l.withoutChecksum(t, "b-1") }},
	{"UDP whose checksum becomes zero", checksumBecomesZero},
	{"fragments, to a pod of the node", func(t *testing.T, l *Lab) { l.fragments(t, "a-1") }},
	{"fragments, to a pod of another node", func(t *testing.T, l *Lab) { l.fragments(t, "b-1") }},
	{"a source that nobody outside has", martians},
	{"what is for no service passes", passes},
}}

// withoutOffloads makes all interfaces carry what is on a real wire, so that what
// is captured is whole.
func (l *Lab) withoutOffloads() {
	l.Client.WithoutOffloads(l.T, l.wire)
	for _, n := range l.Nodes() {
		l.Client.WithoutOffloads(l.T, n.NodeName)
		n.WithoutOffloads(l.T, netns.Uplink)
		for _, dev := range n.Links(l.T) {
			if strings.HasPrefix(dev, "lxc") {
				n.WithoutOffloads(l.T, dev)
			}
		}
	}
	for _, name := range []string{"a-1", "a-2", "b-1", "b-2"} {
		l.Pod(name).WithoutOffloads(l.T, "eth0")
	}
}

// seen are the packets of a capture that carry a text; what is broken is an error
// of the test. Captures on a bridge's port see each frame in one direction.
func seen(t *testing.T, c *netns.Capture, text []byte) (found []packet.Packet) {
	t.Helper()
	for _, raw := range c.Packets(func(p netns.Packet) bool { return isIP(p.Data) && bytes.Contains(p.Data, text) }) {
		p, err := packet.Read(raw.Data)
		if err != nil {
			t.Errorf("a packet on the wire: %v: %x", err, raw.Data)
		}
		found = append(found, p)
	}
	return found
}

func isIP(frame []byte) bool {
	return len(frame) > 14 && (frame[12] == 0x08 && frame[13] == 0 || frame[12] == 0x86 && frame[13] == 0xdd)
}

// hop is what a packet has to be somewhere.
type hop struct {
	where    *netns.Capture
	what     string
	src, dst netip.AddrPort // without a port: any that node-a takes for others
	ttl      uint8
}

func (h hop) check(t *testing.T, text []byte) (found packet.Packet) {
	t.Helper()
	// A capture may be read a moment after the answer has arrived.
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		for _, p := range seen(t, h.where, text) {
			if matches(p.Src, h.src) && matches(p.Dst, h.dst) {
				found = p
			}
		}
		if found.Proto != 0 || time.Now().After(end) {
			break
		}
	}
	switch {
	case found.Proto == 0:
		var all []string
		for _, p := range seen(t, h.where, text) {
			all = append(all, fmt.Sprintf("%s -> %s", p.Src, p.Dst))
		}
		t.Errorf("%s: no packet %s -> %s; there are %v", h.what, h.src, h.dst, all)
	case found.TTL != h.ttl:
		t.Errorf("%s: TTL %d, want %d", h.what, found.TTL, h.ttl)
	}
	return found
}

// snatPorts are those that a node gives to flows that it stands in for.
const snatFirst, snatLast = 1024, 29999

func matches(got, want netip.AddrPort) bool {
	if want.Port() == 0 {
		return got.Addr() == want.Addr() && got.Port() >= snatFirst && got.Port() <= snatLast
	}
	return got == want
}

func (l *Lab) podAddr(name string, f Frontend) netip.AddrPort {
	p := l.Pod(name)
	port := uint16(TCPTarget)
	if f.Network == "udp" {
		port = UDPTarget
	}
	if f.V6() {
		return netip.AddrPortFrom(p.IP6, port)
	}
	return netip.AddrPortFrom(p.IP, port)
}

func (l *Lab) nodeAddr(f Frontend) netip.Addr {
	if f.V6() {
		return l.A.IP6
	}
	return l.A.IP
}

func (l *Lab) onTheWire(t *testing.T, backend string) {
	l.Service(Spec{Pods: []string{backend}})
	remote := l.NodeOf(backend) == l.B
	wireA, wireB := l.Client.Capture(t, l.A.NodeName), l.Client.Capture(t, l.B.NodeName)
	pod := l.Pod(backend).Capture(t, "eth0")
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		for _, c := range []*netns.Capture{wireA, wireB, pod} {
			c.Reset()
		}
		c, err := l.Dial(f)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		text := []byte("text-" + f.String())
		if _, err := AskOn(c, text, Patience); err != nil {
			t.Fatal(err)
		}
		client := netip.MustParseAddrPort(c.LocalAddr().String())
		server := l.podAddr(backend, f)
		seenAs := client
		hops := []hop{{wireA, "the request, to node-a", client, f.Address, 64}}
		ttl := uint8(64 - 1) // the client is a router's own address
		switch {
		case remote && l.Mode.NodePort == "snat":
			seenAs = netip.AddrPortFrom(l.nodeAddr(f), 0)
			hops = append(hops, hop{wireB, "the request, to node-b", seenAs, server, ttl}, hop{wireB, "the answer, from node-b", server, seenAs, 63})
			ttl--
			hops = append(hops, hop{wireA, "the answer, from node-a", f.Address, client, 62})
		case remote:
			ttl--
			hops = append(hops, hop{wireB, "the answer, from node-b", f.Address, client, 63})
		default:
			hops = append(hops, hop{wireA, "the answer, from node-a", f.Address, client, 63})
		}
		hops = append(hops, hop{pod, "the request, in the pod", seenAs, server, ttl}, hop{pod, "the answer, in the pod", server, seenAs, 64})
		for _, h := range hops {
			h.check(t, text)
		}
		if f.Network == "tcp" {
			sent, got := options(t, wireA, client, f.Address), options(t, pod, seenAs, server)
			if len(sent) == 0 || !bytes.Equal(sent, got) {
				t.Errorf("TCP options of the SYN were %x and are %x", sent, got)
			}
		}
		// Whatever was captured of the flow is whole.
		for _, c := range []*netns.Capture{wireA, wireB, pod} {
			seen(t, c, nil)
		}
	})
}

// options are those of the SYN from one end to the other.
func options(t *testing.T, c *netns.Capture, src, dst netip.AddrPort) []byte {
	t.Helper()
	for _, raw := range c.Packets(nil) {
		p, err := packet.Read(raw.Data)
		if err != nil || p.Proto != packet.TCP || p.Flags != packet.SYN || !matches(p.Src, src) || !matches(p.Dst, dst) {
			continue
		}
		header := 14 + 20
		if p.Is6() {
			header = 14 + 40
		}
		return raw.Data[header+20 : header+int(raw.Data[header+12]>>4)*4]
	}
	return nil
}

// forge sends frames of the client that no socket vouches for to node-a.
func (l *Lab) forge(t *testing.T, packets ...packet.Packet) {
	t.Helper()
	gateway := l.A.IP.String()
	if len(packets) > 0 && packets[0].Is6() {
		gateway = l.A.IP6.String()
	}
	// Its neighbour is known once it was spoken to.
	network, family := "udp4", 0
	if packets[0].Is6() {
		network, family = "udp6", 1
	}
	c, err := l.Client.Dial(network, netip.AddrPortFrom([2]netip.Addr{l.A.IP, l.A.IP6}[family], 9).String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	netns.Eventually(t, Patience, "node-a is a neighbour", func() bool {
		c.Write([]byte("x"))
		return fate.Forge(l.Client, l.wire, gateway, 0, nil) == nil
	})
	if err := fate.Forge(l.Client, l.wire, gateway, len(packets), func(i int) packet.Packet { return packets[i] }); err != nil {
		t.Fatal(err)
	}
}

// listener is a UDP socket of the client, and its address.
func (l *Lab) listener(t *testing.T, family int) (net.PacketConn, netip.AddrPort) {
	t.Helper()
	c, err := l.Client.ListenPacket("udp", netip.AddrPortFrom(Client[family], 0).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, netip.MustParseAddrPort(c.LocalAddr().String())
}

func receive(t *testing.T, c net.PacketConn, want string) (from netip.AddrPort) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(Patience))
	buffer := make([]byte, 1<<16)
	n, source, err := c.ReadFrom(buffer)
	if err != nil || !strings.HasSuffix(string(buffer[:n]), want) {
		t.Fatalf("the client got %q, %v, want %q", buffer[:n], err, want)
	}
	return source.(*net.UDPAddr).AddrPort()
}

// RFC 768: a checksum of zero says that there is none, on both sides of a translation.
func (l *Lab) withoutChecksum(t *testing.T, backend string) {
	l.Service(Spec{Pods: []string{backend}})
	pod := l.Pod(backend).Capture(t, "eth0")
	for _, f := range l.Frontends() {
		if f.Network != "udp" || f.V6() { // RFC 8200, 8.1: in IPv6 it has to be there
			continue
		}
		c, client := l.listener(t, 0)
		p := packet.Datagram(client, f.Address, "no sum "+f.String())
		p.NoSum = true
		l.forge(t, p)
		receive(t, c, "no sum "+f.String())
		found := hop{pod, "in the pod", netip.AddrPortFrom(l.seenBy(backend, f)[0], 0), l.podAddr(backend, f), 0}
		for _, got := range seen(t, pod, []byte("no sum "+f.String())) {
			if got.Dst == found.dst && !got.NoSum {
				t.Errorf("%s: the pod gets a checksum that the client did not send", f)
			}
		}
	}
}

// A translated sum of zero is sent as 0xffff: zero would say that there is none.
func checksumBecomesZero(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"a-1"}})
	pod := l.Pod("a-1").Capture(t, "eth0")
	for _, f := range l.Frontends() {
		if f.Network != "udp" {
			continue
		}
		c, client := l.listener(t, index(f))
		payload := []byte("zero sum..")
		payload = append(payload, f.Kind...)
		if len(payload)%2 == 1 {
			payload = append(payload, '.')
		}
		inPod := packet.Datagram(client, l.podAddr("a-1", f), string(payload))
		header := 14 + 20
		if f.V6() {
			header = 14 + 40
		}
		// The sum over all is to be what it is now and the last word's change.
		sum := binary.BigEndian.Uint16(inPod.Bytes()[header+6:])
		word := payload[8:10]
		changed := uint32(binary.BigEndian.Uint16(word)) + uint32(sum)
		binary.BigEndian.PutUint16(word, uint16(changed&0xffff+changed>>16))
		inPod.Payload = payload
		if got := binary.BigEndian.Uint16(inPod.Bytes()[header+6:]); got != 0xffff && got != 0 {
			t.Fatalf("the test's checksum is %#04x", got)
		}
		l.forge(t, packet.Datagram(client, f.Address, string(payload)))
		receive(t, c, string(payload))
		for _, raw := range pod.Packets(func(p netns.Packet) bool { return bytes.Contains(p.Data, payload) && !p.Outgoing }) {
			if got := binary.BigEndian.Uint16(raw.Data[header+6:]); got != 0xffff {
				t.Errorf("%s: the pod gets checksum %#04x, want 0xffff", f, got)
			}
		}
	}
}

// Datagrams that are longer than the wire carries, there and back.
func (l *Lab) fragments(t *testing.T, backend string) {
	l.Service(Spec{Pods: []string{backend}})
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		if f.Network != "udp" {
			t.Log("TCP is not fragmented")
			return
		}
		for i := range 20 {
			if _, err := l.check(f, Payload(i, 1300+377*i)); err != nil {
				t.Errorf("%d bytes: %v", 1300+377*i, err)
			}
		}
		if f.Kind != "ClusterIP" { // other addresses may be used for other things as well
			return
		}
		// Later fragments name no ports; without the first they are nobody's.
		before := dropped(t, l.A, "fragment_unknown")
		_, client := l.listener(t, index(f))
		whole := packet.Datagram(client, f.Address, string(Payload(1, 2000)))
		parts := whole.Fragments(0x4242, 1000)
		l.forge(t, parts[len(parts)-1])
		netns.Eventually(t, Patience, "a later fragment alone is dropped with a reason", func() bool { return dropped(t, l.A, "fragment_unknown") > before })
	})
}

func martians(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"a-1"}})
	for _, f := range l.Frontends() {
		sources := []netip.Addr{l.A.IP, l.Pod("a-1").IP, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("224.0.0.1")}
		if f.V6() {
			sources = []netip.Addr{l.A.IP6, l.Pod("a-1").IP6, netip.MustParseAddr("::1"), netip.MustParseAddr("ff02::1")}
		}
		for _, source := range sources {
			before := dropped(t, l.A, "martian")
			p := packet.Datagram(netip.AddrPortFrom(source, 4000), f.Address, "x")
			if f.Network == "tcp" {
				p = packet.Segment(netip.AddrPortFrom(source, 4000), f.Address, packet.SYN)
			}
			l.forge(t, p)
			netns.Eventually(t, Patience, fmt.Sprintf("a packet from %s to %s is dropped as martian", source, f), func() bool { return dropped(t, l.A, "martian") > before })
		}
	}
}

// The node's own servers, pings and unserved ports are as without us.
func passes(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"a-1"}})
	netns.TCPEcho(t, l.A.NS, "[::]:2222")
	netns.UDPEcho(t, l.A.NS, "[::]:2222")
	for _, n := range []*scenario.Node{l.A} {
		for _, addr := range []netip.Addr{n.IP, n.IP6} {
			for _, network := range []string{"tcp", "udp"} {
				if err := l.Client.Echo(network, netip.AddrPortFrom(addr, 2222).String(), strings.Repeat("x", 1200)); err != nil {
					t.Errorf("a server of the node: %v", err)
				}
			}
			wire := l.Client.Capture(t, n.NodeName)
			ping := packet.Ping(Client[slices.Index([]netip.Addr{n.IP, n.IP6}, addr)], addr, 77)
			l.forge(t, ping)
			netns.Eventually(t, Patience, "the node answers a ping", func() bool {
				for _, raw := range wire.Packets(nil) {
					if p, err := packet.Read(raw.Data); err == nil && p.Src.Addr() == addr && (p.Proto == packet.ICMP && p.Type == packet.EchoReply || p.Proto == packet.ICMPv6 && p.Type == packet.EchoReply6) {
						return true
					}
				}
				return false
			})
		}
	}
}
