// SPDX-License-Identifier: Apache-2.0

package fate

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/test/netns"
)

// sockDestroy is SOCK_DESTROY of linux/sock_diag.h.
const sockDestroy = 21

// Abort ends a pod's socket from outside its process, as `ss -K` does.
func Abort(p *netns.NS, proto uint8, local, remote netip.AddrPort) error {
	return p.Do(func() error {
		// struct inet_diag_req_v2: family, protocol, ext, pad, states, then the id.
		request := nl.NewNetlinkRequest(sockDestroy, unix.NLM_F_ACK)
		b := []byte{unix.AF_INET, proto, 0, 0}
		b = binary.NativeEndian.AppendUint32(b, ^uint32(0))
		b = binary.BigEndian.AppendUint16(b, local.Port())
		b = binary.BigEndian.AppendUint16(b, remote.Port())
		for _, a := range []netip.Addr{local.Addr(), remote.Addr()} {
			b = append(append(b, a.AsSlice()...), make([]byte, 12)...)
		}
		b = binary.NativeEndian.AppendUint32(b, 0)                    // any interface
		b = append(b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff) // any cookie
		request.AddRawData(b)
		if _, err := request.Execute(unix.NETLINK_INET_DIAG, 0); err != nil {
			return fmt.Errorf("abort the socket %s -> %s: %w", local, remote, err)
		}
		return nil
	})
}

// Flow is a connected socket as its namespace's tables have it.
type Flow struct {
	Protocol string
	Local    string
	Remote   string
}

// Flows are the connected sockets of a namespace that live, as sock_diag tells.
func Flows(p *netns.NS) (flows map[Flow]bool, err error) {
	flows = map[Flow]bool{}
	err = p.Do(func() error {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			tcp, err := netlink.SocketDiagTCP(family)
			if err != nil {
				return fmt.Errorf("list the TCP sockets of %s: %w", p.Name(), err)
			}
			udp, err := netlink.SocketDiagUDP(family)
			if err != nil {
				return fmt.Errorf("list the UDP sockets of %s: %w", p.Name(), err)
			}
			for proto, sockets := range map[string][]*netlink.Socket{"TCP": tcp, "UDP": udp} {
				for _, s := range sockets {
					if s.State != tcpEstablished {
						continue
					}
					flows[Flow{proto, end(s.ID.Source, s.ID.SourcePort), end(s.ID.Destination, s.ID.DestinationPort)}] = true
				}
			}
		}
		return nil
	})
	return flows, err
}

// Cookies are those of the TCP sockets of some namespaces, in whatever state.
func Cookies(pods ...*netns.NS) (map[uint64]bool, error) {
	cookies := map[uint64]bool{}
	for _, p := range pods {
		err := p.Do(func() error {
			for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
				sockets, err := netlink.SocketDiagTCP(family)
				if err != nil {
					return fmt.Errorf("list the TCP sockets of %s: %w", p.Name(), err)
				}
				for _, s := range sockets {
					cookies[uint64(s.ID.Cookie[1])<<32|uint64(s.ID.Cookie[0])] = true
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return cookies, nil
}

// tcpEstablished is TCP_ESTABLISHED of net/tcp_states.h, of connected UDP too.
const tcpEstablished = 1

func end(ip []byte, port uint16) string {
	a, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), port).String()
}
