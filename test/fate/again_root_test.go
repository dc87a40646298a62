// SPDX-License-Identifier: Apache-2.0

//go:build root

package fate

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSYNsSentAgainStayWithTheirNextBackend makes connections through a service from
// ports whose last connection, with one of the backends itself, that backend has in
// TIME_WAIT. Where the service comes out at the same backend, TIME_WAIT answers with an
// ACK unless the sequence number goes on from its own, and the client with a reset of that
// ACK. The SYN that it sends again, to another backend maybe, opens the connection: what
// follows has to get to that one.
func TestSYNsSentAgainStayWithTheirNextBackend(t *testing.T) {
	const servers = 4
	n := newNode(t, servers)
	client := n.Pod("client")
	each := func(f func(port uint16) error) {
		t.Helper()
		var all sync.WaitGroup
		for i := range connections(400) {
			all.Go(func() {
				if err := client.Do(func() error { return f(uint16(20000 + i)) }); err != nil {
					t.Errorf("from port %d: %v", 20000+i, err)
				}
			})
		}
		all.Wait()
	}
	each(func(port uint16) error {
		return oneFrom(port, netip.AddrPortFrom(n.Pod(fmt.Sprintf("server%d", port%servers)).IP, 8080))
	})
	each(func(port uint16) error { return oneFrom(port, netip.AddrPortFrom(vips[0], TCPPort)) })
}

// oneFrom makes a connection from a port, which the server ends.
func oneFrom(port uint16, to netip.AddrPort) error {
	fd, err := unix.Socket(domain(to.Addr()), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(port)}); err != nil {
		return err
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience); err != nil {
		return err
	}
	if err := unix.Connect(fd, sockaddr(to.Addr(), to.Port())); err != nil {
		return fmt.Errorf("connect to %s: %w", to, err)
	}
	if err := exchange(fd, byte(ServerCloses)); err != nil {
		return err
	}
	var b [1]byte
	if n, err := uninterrupted(func() (int, error) { return unix.Read(fd, b[:]) }); n != 0 || err != nil {
		return fmt.Errorf("wait for the FIN of %s: %d bytes, %w", to, n, err)
	}
	return nil
}
