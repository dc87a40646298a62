// SPDX-License-Identifier: Apache-2.0

//go:build root

package fate

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
)

// TestSYNsSentAgainStayWithTheirNextBackend makes connections through a service from
// ports whose last connection, with one of the backends itself, that backend has in
// TIME_WAIT. Where the service comes out at the same backend, TIME_WAIT answers with an
// ACK unless the sequence number goes on from its own, and the client with a reset of that
// ACK. The SYN that it sends again, to another backend maybe, opens the connection: what
// follows has to get to that one.
func TestSYNsSentAgainStayWithTheirNextBackend(t *testing.T) {
	client, servers := againPods(t, 4)
	synsAgain(t, client, servers...)
}

func synsAgain(t *testing.T, client *packet.Pod, servers ...*packet.Pod) {
	t.Helper()
	for _, to := range []func(i int) netip.AddrPort{
		func(i int) netip.AddrPort { return servers[i%len(servers)].At(false, 8080) },
		func(int) netip.AddrPort { return netip.AddrPortFrom(vips[0], TCPPort) },
	} {
		var all sync.WaitGroup
		for i := range connections(400) {
			all.Go(func() {
				if err := client.Do(func() error { return oneFrom(uint16(20000+i), to(i)) }); err != nil {
					t.Errorf("from port %d: %v", 20000+i, err)
				}
			})
		}
		all.Wait()
	}
}

// againPods are a client, and servers behind the service that is asked, on a node without a daemon.
func againPods(t *testing.T, count int) (client *packet.Pod, servers []*packet.Pod) {
	cgroup := netns.NewCgroup(t, "node")
	n := packet.NewNode(t, packet.Options{MaxEntries: 16384, Hook: bpf.HookAuto, Cgroup: cgroup.Path})
	cgroup.Enter(t)
	client = n.Pod(t)
	for range count {
		servers = append(servers, n.Pod(t))
		Serve(t, servers[len(servers)-1].NS)
	}
	for _, vip := range vips {
		var backends []netip.AddrPort
		for _, s := range servers {
			backends = append(backends, s.At(vip.Is6(), 8080))
		}
		n.Service(t, packet.TCP, netip.AddrPortFrom(vip, TCPPort), backends...)
	}
	return client, servers
}

// oneFrom makes a connection from a port, which the server ends.
func oneFrom(port uint16, to netip.AddrPort) error {
	fd, err := connectFrom(port, to)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := exchange(fd, byte(ServerCloses)); err != nil {
		return err
	}
	var b [1]byte
	if n, err := uninterrupted(func() (int, error) { return unix.Read(fd, b[:]) }); n != 0 || err != nil {
		return fmt.Errorf("wait for the FIN of %s: %d bytes, %w", to, n, err)
	}
	return nil
}

// connectFrom makes a connection from a port of this thread's network namespace.
func connectFrom(port uint16, to netip.AddrPort) (fd int, err error) {
	if fd, err = unix.Socket(domain(to.Addr()), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return -1, err
	}
	var from unix.Sockaddr = &unix.SockaddrInet4{Port: int(port)}
	if to.Addr().Is6() {
		from = &unix.SockaddrInet6{Port: int(port)}
	}
	if err = unix.Bind(fd, from); err != nil {
		return -1, err
	}
	if err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience); err != nil {
		return -1, err
	}
	// By which a connect() gives up, too.
	if err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &patience); err != nil {
		return -1, err
	}
	if err = unix.Connect(fd, sockaddr(to.Addr(), to.Port())); err != nil {
		return -1, fmt.Errorf("connect to %s: %w", to, err)
	}
	return fd, nil
}

// TestAClientMayForgetAConnection has servers with connections whose client knows nothing of
// them any more, as after a reset that was lost, or a crash of the client's node. A new connection from
// such a port is answered by the old one's server with an ACK; what the client's kernel says to
// that ends the old one, and the SYN sent again opens the new one.
func TestAClientMayForgetAConnection(t *testing.T) {
	client, _ := againPods(t, 4)
	forgetful(t, client)
}

func forgetful(t *testing.T, client *packet.Pod) {
	t.Helper()
	for _, vip := range vips {
		var all sync.WaitGroup
		for i := range 20 {
			port, to := uint16(21000+i), netip.AddrPortFrom(vip, TCPPort)
			all.Go(func() {
				err := client.Do(func() error { return errors.Join(forgotten(port, to), oneFrom(port, to)) })
				if err != nil {
					t.Errorf("from port %d: %v", port, err)
				}
			})
		}
		all.Wait()
	}
}

// forgotten makes a connection from a port, and ends it without a packet.
func forgotten(port uint16, to netip.AddrPort) error {
	fd, err := connectFrom(port, to)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := exchange(fd, byte(ClientCloses)); err != nil {
		return err
	}
	return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 1)
}
