// SPDX-License-Identifier: Apache-2.0

package fate

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
)

// Forge puts frames on a namespace's wire that no socket vouches for: next gives
// each packet, to which the MACs of the interface and of its gateway are added.
func Forge(ns *netns.NS, dev, gateway string, count int, next func(i int) packet.Packet) error {
	return ns.Do(func() error {
		i, err := net.InterfaceByName(dev)
		if err != nil {
			return err
		}
		to, err := neighbourOf(ns, i.Index, gateway)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("make a packet socket: %w", err)
		}
		defer unix.Close(fd)
		wire := &unix.SockaddrLinklayer{Ifindex: i.Index}
		for n := range count {
			p := next(n)
			copy(p.From[:], i.HardwareAddr)
			copy(p.To[:], to)
			for {
				err := unix.Sendto(fd, p.Bytes(), 0, wire)
				if err == nil {
					break
				}
				if err != unix.ENOBUFS {
					return fmt.Errorf("send frame %d: %w", n, err)
				}
			}
		}
		return nil
	})
}

// neighbourOf is the MAC that a namespace knows for an address.
func neighbourOf(ns *netns.NS, ifindex int, address string) (net.HardwareAddr, error) {
	family := unix.AF_INET
	if netip.MustParseAddr(address).Is6() {
		family = unix.AF_INET6
	}
	all, err := ns.Netlink().NeighList(ifindex, family)
	if err != nil {
		return nil, fmt.Errorf("list neighbours: %w", err)
	}
	for _, n := range all {
		if n.IP.String() == address && len(n.HardwareAddr) == 6 {
			return n.HardwareAddr, nil
		}
	}
	return nil, fmt.Errorf("the neighbour %s is not known in %s", address, ns.Name())
}

// scattered is the n-th of many numbers that look random and do not repeat.
func scattered(n int) uint32 { return uint32(n) * 0x9e3779b1 }

// somePort is a port for the n-th packet, and never 0.
func somePort(n int) uint16 { return uint16(1024 + scattered(n)%64000) }

// foreign is a source address for the n-th packet, of a network that nobody has.
func foreign(n int) netip.Addr {
	a := [4]byte{198, 18}
	binary.BigEndian.PutUint16(a[2:], uint16(n/64000))
	return netip.AddrFrom4(a)
}
