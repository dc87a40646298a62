// SPDX-License-Identifier: Apache-2.0

//go:build root

package north

import (
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A client may ask several frontends from one port, even where one backend is
// behind them all: that sees other ports of the client's.
var onePort = group{name: "one port asks several frontends", mode: "snat", tests: []modeTest{
	{"of a pod of the node", func(t *testing.T, l *Lab) { l.onePort(t, "a-1", 100) }},
	{"of a pod of another node", func(t *testing.T, l *Lab) { l.onePort(t, "b-1", 101) }},
	{"of the node's own network", func(t *testing.T, l *Lab) { l.Hosts(); l.onePort(t, "a-host", 102) }},
}}

// ownPort is one of the client's that no socket gets by itself and no node stands in
// by: below the ephemeral ones, and above those that nodes have for clients.
func ownPort(n int) uint16 { return uint16(30000 + n) }

// dialFrom is Dial from a port of the client.
func (l *Lab) dialFrom(from netip.AddrPort, f Frontend) (c net.Conn, err error) {
	d := net.Dialer{Timeout: Patience, LocalAddr: net.TCPAddrFromAddrPort(from), Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	if f.Network == "udp" {
		d.LocalAddr = net.UDPAddrFromAddrPort(from)
	}
	err = l.Client.Do(func() error {
		c, err = d.Dial(f.Network, f.Address.String())
		return err
	})
	return c, err
}

func (l *Lab) onePort(t *testing.T, backend string, number int) {
	l.Service(Spec{Pods: []string{backend}})
	l.flush()
	var open []net.Conn
	for _, f := range l.Frontends() {
		port := ownPort(number)
		from := netip.AddrPortFrom(l.ClientFor(f), port)
		c, err := l.dialFrom(from, f)
		if err != nil {
			t.Errorf("%s from port %d: %v", f, port, err)
			continue
		}
		defer c.Close()
		a, err := AskOn(c, []byte("first "+f.String()), Patience)
		if err != nil {
			t.Errorf("%s from port %d: %v", f, port, err)
			continue
		}
		if l.NodeOf(backend) == l.A && a.Client.Addr() != from.Addr() {
			t.Errorf("%s: %s sees %s, want an address of the client", f, backend, a.Client)
		}
		open = append(open, c)
	}
	if len(open) != len(l.Frontends()) {
		t.Fatalf("%d of %d flows began", len(open), len(l.Frontends()))
	}
	// All of them go on beside each other.
	for round := range 3 {
		for _, c := range open {
			payload := []byte(fmt.Sprintf("round %d of %s", round, c.RemoteAddr()))
			if c.LocalAddr().Network() == "udp" {
				if _, err := AskOn(c, payload, Patience); err != nil {
					t.Errorf("%s: %v", c.RemoteAddr(), err)
				}
			} else if err := echoOn(c, payload); err != nil {
				t.Errorf("%s: %v", c.RemoteAddr(), err)
			}
		}
	}
}
