// SPDX-License-Identifier: Apache-2.0

//go:build root

package north

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// A port from which a frontend was asked is used for the backend itself: by the
// next socket that gets it, or by the same. The answers have the name that was asked last.
var direct = group{name: "a port that asked a frontend asks its backend", tests: []modeTest{
	{"a server of the node", func(t *testing.T, l *Lab) { l.Hosts(); l.direct(t, "a-host", 200) }},
	{"a pod of the node", func(t *testing.T, l *Lab) { l.direct(t, "a-1", 300) }},
	{"a server of another node", func(t *testing.T, l *Lab) { l.Hosts(); l.direct(t, "b-host", 400) }},
	{"a pod of another node", func(t *testing.T, l *Lab) { l.direct(t, "b-1", 500) }},
}}

// direct uses ports from first on: none twice with a frontend, where the client's end of
// the last connection would still be in TIME_WAIT.
func (l *Lab) direct(t *testing.T, backend string, first int) {
	l.Service(Spec{Pods: []string{backend}})
	l.routeToPods(t)
	l.flush()
	for i, f := range l.Frontends() {
		t.Run(f.String(), func(t *testing.T) {
			from := netip.AddrPortFrom(l.ClientFor(f), ownPort(first+3*i))
			itself := Frontend{"server", f.Network, l.podAddr(backend, f)}
			if f.Network == "udp" {
				if l.Mode.NodePort == "dsr" && l.NodeOf(backend) == l.B {
					l.directWhereTold(t, from, f, itself)
				} else {
					l.directUDP(t, from, f, itself)
				}
				return
			}
			for n, end := range []string{"it was closed", "it was reset", "the client forgot it"} {
				if end == "the client forgot it" && f.Kind != "NodePort" { // which costs a second
					continue
				}
				from := netip.AddrPortFrom(from.Addr(), ownPort(first+3*i+n))
				c, err := l.dialFrom(from, f)
				if err != nil {
					t.Fatalf("%s from %s: %v", f, from, err)
				}
				if _, err := AskOn(c, []byte("by the frontend"), Patience); err != nil {
					t.Fatalf("%s from %s: %v", f, from, err)
				}
				switch end {
				case "it was reset":
					c.(*net.TCPConn).SetLinger(0)
				case "the client forgot it":
					forget(t, c)
				}
				c.Close()
				if c, err = l.dialFrom(from, itself); err != nil {
					t.Fatalf("%s from %s, where a connection to %s was, and %s: %v", itself, from, f, end, err)
				}
				if a, err := AskOn(c, []byte("itself"), Patience); err != nil || a.Client != from {
					t.Errorf("%s from %s sees %s, %v", itself, from, a.Client, err)
				}
				c.(*net.TCPConn).SetLinger(0)
				c.Close()
			}
		})
	}
}

// directUDP asks a frontend and its backend in turns, by sockets one after the other and by one.
func (l *Lab) directUDP(t *testing.T, from netip.AddrPort, f, itself Frontend) {
	for round := range 3 {
		for _, to := range []Frontend{f, itself} {
			c, err := l.dialFrom(from, to)
			if err != nil {
				t.Fatal(err)
			}
			for i := range 2 {
				a, err := AskOn(c, fmt.Appendf(nil, "round %d, %d, %s", round, i, to), Patience)
				if err != nil {
					t.Fatalf("round %d: %s from %s: %v", round, to, from, err)
				}
				if to == itself && a.Client != from {
					t.Errorf("%s sees %s, want %s", to, a.Client, from)
				}
			}
			c.Close()
		}
	}
	c, err := l.Client.ListenPacket("udp", from.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for round := range 3 {
		for _, to := range []Frontend{f, itself} {
			text := fmt.Sprintf("by one socket, round %d, %s", round, to)
			if _, err := c.WriteTo([]byte(text), netAddr(to.Address)); err != nil {
				t.Fatal(err)
			}
			if source := receive(t, c, text); source != to.Address {
				t.Errorf("%s answers as %s", to, source)
			}
		}
	}
}

// directWhereTold: a node that was told of a frontend (docs/dsr.md) cannot know
// whether the next datagram that nobody tells of is for that.
func (l *Lab) directWhereTold(t *testing.T, from netip.AddrPort, f, itself Frontend) {
	c, err := l.Client.ListenPacket("udp", from.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, to := range []Frontend{f, itself} {
		if _, err := c.WriteTo([]byte(to.String()), netAddr(to.Address)); err != nil {
			t.Fatal(err)
		}
		if source := receive(t, c, to.String()); source != f.Address {
			t.Errorf("%s answers as %s, want %s", to, source, f.Address)
		}
	}
}

// routeToPods lets the client reach the pods without a service.
func (l *Lab) routeToPods(t *testing.T) {
	t.Helper()
	for _, n := range l.Nodes() {
		l.Client.Route(t, n.PodCIDRs[0].String(), n.IP.String(), l.wire)
		l.Client.Route(t, n.PodCIDRs[1].String(), n.IP6.String(), l.wire)
	}
}

// forget has the connection end without a packet.
func forget(t *testing.T, c net.Conn) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if e := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1) }); e != nil || err != nil {
		t.Fatalf("TCP_REPAIR: %v, %v", e, err)
	}
}
