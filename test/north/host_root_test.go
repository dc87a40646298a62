// SPDX-License-Identifier: Apache-2.0

//go:build root

package north

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/mooring-cni/mooring/test/packet"
)

// The backend is a process in the network of a node itself, as an API server or an
// ingress controller.
var processes = group{name: "processes of the nodes are backends", tests: []modeTest{
	{"of both nodes", func(t *testing.T, l *Lab) { l.Hosts(); l.thousands(t, "a-host", "b-host") }},
	{"fragments", func(t *testing.T, l *Lab) { l.Hosts(); l.fragments(t, "a-host") }},
	{"nobody listens", func(t *testing.T, l *Lab) { l.nobodyListens(t, "a-host") }},
	{"the node's own servers", ownServers},
	{"fragments that overtake their first", ownServersGetFragments},
	{"no hop is left", noHopLeftForHost},
	{"pods ask it", func(t *testing.T, l *Lab) {
		l.Hosts()
		for _, client := range []string{"a-1", "b-1"} {
			l.fromPod(t, client, "a-host")
		}
	}},
}}

// hostOnTheWire: what the node answers is the service's, in every packet.
func (l *Lab) hostOnTheWire(t *testing.T, backend string) {
	l.Service(Spec{Pods: []string{backend}})
	wire := l.Client.Capture(t, l.A.NodeName)
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		wire.Reset()
		c, err := l.Dial(f)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		text := []byte("text-" + f.String())
		a, err := AskOn(c, text, Patience)
		if err != nil {
			t.Fatal(err)
		}
		client := netip.MustParseAddrPort(c.LocalAddr().String())
		if a.Pod != backend || a.Client != client {
			t.Errorf("%s sees %s, want %s to see %s", a.Pod, a.Client, backend, client)
		}
		for _, h := range []hop{{wire, "the request", client, f.Address, 64}, {wire, "the answer", f.Address, client, 64}} {
			h.check(t, text)
		}
		c.Close()
		for _, p := range seen(t, wire, nil) {
			if p.Dst == client && p.Src != f.Address {
				t.Errorf("%s: the client gets a packet from %s", f, p.Src)
			}
		}
	})
}

// ownServers: what is asked without a service keeps its own name, even the server
// that services lead to.
func ownServers(t *testing.T, l *Lab) {
	l.Hosts()
	l.Service(Spec{Pods: []string{"a-host"}})
	for _, addr := range []netip.Addr{l.A.IP, l.A.IP6} {
		for i := range 20 {
			for _, f := range []Frontend{
				{"server", "tcp", netip.AddrPortFrom(addr, TCPTarget)}, {"server", "udp", netip.AddrPortFrom(addr, UDPTarget)},
			} {
				if a, err := l.Ask(f, Payload(i, 700)); err != nil || a.Pod != "a-host" {
					t.Errorf("%s: %v answers, %v", f, a, err)
				}
			}
		}
	}
}

// noHopLeftForHost: what goes no further needs no hop.
func noHopLeftForHost(t *testing.T, l *Lab) {
	l.Hosts()
	l.Service(Spec{Pods: []string{"a-host"}})
	for _, f := range l.Frontends() {
		if f.Network != "udp" {
			continue
		}
		c, client := l.listener(t, index(f))
		p := packet.Datagram(client, f.Address, "last hop "+f.String())
		p.TTL = 1
		l.forge(t, p)
		receive(t, c, "last hop "+f.String())
	}
}

// ownServersGetFragments: what is for the node's own server is the stack's to put together, in any order.
func ownServersGetFragments(t *testing.T, l *Lab) {
	l.Hosts()
	l.Service(Spec{Pods: []string{"a-1"}})
	for family, addr := range []netip.Addr{l.A.IP, l.A.IP6} {
		c, client := l.listener(t, family)
		text := string(Payload(family, 3000))
		parts := packet.Datagram(client, netip.AddrPortFrom(addr, UDPTarget), text).Fragments(0x4243, 1000)
		slices.Reverse(parts)
		l.forge(t, parts...)
		receive(t, c, text)
	}
}
