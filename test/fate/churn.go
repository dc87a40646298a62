// SPDX-License-Identifier: Apache-2.0

// Package fate proves what the project is for: a conntrack entry lives exactly
// as long as its socket. churn.go makes connections that end in every way there
// is; the tests look at what is left of them.
package fate

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/test/netns"
)

// Kind is a way in which a flow lives and ends.
type Kind int

// The kinds of flow that churn makes.
const (
	ServerCloses   Kind = iota // TCP, the pod closes second
	ClientCloses               // TCP, the pod closes first: TIME_WAIT
	Reset                      // TCP, aborted by the client (SO_LINGER 0)
	Refused                    // TCP, nobody listens at the backend
	ConnectedUDP               // a request and its answer
	UnconnectedUDP             // the same by sendto and recvfrom
	LateFIN                    // TCP, the pod closes first and the peer's FIN comes later
	kinds
)

var kindNames = [...]string{"server closes", "client closes", "reset", "refused", "connected UDP", "unconnected UDP", "late FIN"}

func (k Kind) String() string { return kindNames[k] }

// The ports of the service that churn talks to.
const (
	TCPPort     = 80
	RefusedPort = 81
	UDPPort     = 53
)

// Served counts what a pod's peers have been asked.
type Served struct{ TCP, UDP atomic.Int64 }

// Serve runs the peers of every kind in a pod.
func Serve(t netns.T, p *netns.NS) *Served {
	t.Helper()
	served := &Served{}
	netns.TCP(t, p, "[::]:8080", func(c net.Conn) {
		served.TCP.Add(1)
		var command [1]byte
		if _, err := c.Read(command[:]); err != nil {
			return
		}
		if _, err := c.Write(command[:]); err != nil {
			return
		}
		switch command[0] {
		case byte(ServerCloses):
			return
		case byte(LateFIN):
			c.Read(command[:])
			time.Sleep(60 * time.Millisecond)
		default:
			c.Read(command[:])
		}
	})
	netns.UDP(t, p, "[::]:5353", func(request []byte, _ net.Addr) []byte {
		served.UDP.Add(1)
		return request
	})
	return served
}

func sockaddr(a netip.Addr, port uint16) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4(), Port: int(port)}
	}
	return &unix.SockaddrInet6{Addr: a.As16(), Port: int(port)}
}

func domain(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// patience is how long a peer may take to answer.
var patience = unix.Timeval{Sec: 10}

// One makes one flow of a kind to the service at vip, from this thread's network
// namespace, and ends it.
func One(k Kind, vip netip.Addr) error {
	switch k {
	case ConnectedUDP, UnconnectedUDP:
		return datagram(k, vip)
	}
	fd, err := unix.Socket(domain(vip), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience); err != nil {
		return err
	}
	port := uint16(TCPPort)
	if k == Refused {
		port = RefusedPort
	}
	err = unix.Connect(fd, sockaddr(vip, port))
	if k == Refused {
		if !errors.Is(err, unix.ECONNREFUSED) {
			return fmt.Errorf("connect where nobody listens: %v", err)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("connect%s: %w", from(fd), err)
	}
	if err := exchange(fd, byte(k)); err != nil {
		return fmt.Errorf("%w%s", err, from(fd))
	}
	switch k {
	case Reset:
		return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	case ServerCloses:
		var b [1]byte
		if n, err := uninterrupted(func() (int, error) { return unix.Read(fd, b[:]) }); n != 0 || err != nil {
			return fmt.Errorf("wait for the server's FIN: %d bytes, %v", n, err)
		}
	}
	return nil
}

// from tells a socket's port, by which its entries are found.
func from(fd int) string {
	local, err := unix.Getsockname(fd)
	if err != nil {
		return ""
	}
	return fmt.Sprintf(" from port %d", addrPort(local).Port())
}

func exchange(fd int, command byte) error {
	b := [1]byte{command}
	if _, err := unix.Write(fd, b[:]); err != nil {
		return fmt.Errorf("request: %w", err)
	}
	b[0] = ^command
	n, err := uninterrupted(func() (int, error) { return unix.Read(fd, b[:]) })
	if err != nil || n != 1 || b[0] != command {
		return fmt.Errorf("answer: %d bytes, %d instead of %d: %w", n, b[0], command, err)
	}
	return nil
}

// uninterrupted calls again what a signal has interrupted, as the runtime's own do:
// the kernel does not, where a socket's patience has an end.
func uninterrupted(call func() (int, error)) (n int, err error) {
	for {
		if n, err = call(); err != unix.EINTR {
			return n, err
		}
	}
}

func datagram(k Kind, vip netip.Addr) error {
	fd, err := unix.Socket(domain(vip), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience); err != nil {
		return err
	}
	to := sockaddr(vip, UDPPort)
	if k == ConnectedUDP {
		if err := unix.Connect(fd, to); err != nil {
			return err
		}
		return exchange(fd, byte(k))
	}
	b := [1]byte{byte(k)}
	if err := unix.Sendto(fd, b[:], 0, to); err != nil {
		return err
	}
	var from unix.Sockaddr
	n, err := uninterrupted(func() (n int, err error) {
		n, from, err = unix.Recvfrom(fd, b[:], 0)
		return n, err
	})
	if err != nil || n != 1 {
		return fmt.Errorf("answer: %d bytes: %w", n, err)
	}
	if want, got := addrPort(to), addrPort(from); got != want {
		return fmt.Errorf("answer from %s, not from %s", got, want)
	}
	return nil
}

func addrPort(s unix.Sockaddr) netip.AddrPort {
	switch s := s.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(s.Addr), uint16(s.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(s.Addr), uint16(s.Port))
	}
	return netip.AddrPort{}
}

// Churn makes count flows of the given kinds, turn by turn to each address, by
// some threads at once in a pod, and returns the first errors.
func Churn(p *netns.NS, threads, count int, vips []netip.Addr, which ...Kind) error {
	var next, failures atomic.Int64
	var wait sync.WaitGroup
	var mutex sync.Mutex
	var all error
	for range threads {
		wait.Go(func() {
			err := p.Do(func() error {
				for {
					i := int(next.Add(1)) - 1
					if i >= count {
						return nil
					}
					k := which[i%len(which)]
					vip := vips[i/len(which)%len(vips)]
					if err := One(k, vip); err != nil {
						mutex.Lock()
						all = errors.Join(all, fmt.Errorf("flow %d (%s to %s): %w", i, k, vip, err))
						mutex.Unlock()
						if failures.Add(1) > 5 {
							return nil
						}
					}
				}
			})
			if err != nil {
				mutex.Lock()
				all = errors.Join(all, err)
				mutex.Unlock()
			}
		})
	}
	wait.Wait()
	return all
}
