// SPDX-License-Identifier: Apache-2.0

//go:build root

package north

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
)

var errorsAndMTU = group{name: "errors and path MTU", tests: []modeTest{
	{"nobody listens in a pod of the node", func(t *testing.T, l *Lab) { l.nobodyListens(t, "a-1") }},
	{"nobody listens in a pod of another node", func(t *testing.T, l *Lab) { l.nobodyListens(t, "b-1") }},
	{"the client is gone, of a pod of the node", func(t *testing.T, l *Lab) { l.clientIsGone(t, "a-1") }},
	{"the client is gone, of a pod of another node", func(t *testing.T, l *Lab) { l.clientIsGone(t, "b-1") }},
	{"a packet that has no hop left", noHopLeft},
	{"a narrow way to the client, from a pod of the node", func(t *testing.T, l *Lab) { l.narrowClient(t, "a-1") }},
	{"a narrow way to the client, from a pod of another node", func(t *testing.T, l *Lab) { l.narrowClient(t, "b-1") }},
	{"a narrow way to the pod", narrowPod},
}}

// nobodyListens: what the pod's kernel says reaches the client, about what it sent.
func (l *Lab) nobodyListens(t *testing.T, backend string) {
	p := l.Pod(backend)
	manifest := `
apiVersion: v1
kind: Service
metadata: {name: closed, namespace: default}
spec: {type: NodePort, ipFamilyPolicy: RequireDualStack, clusterIPs: [10.96.0.11, "fd00:10:96::11"], ports: [
  {name: tcp, protocol: TCP, port: 80, nodePort: 30081}, {name: udp, protocol: UDP, port: 80, nodePort: 30081}]}
`
	for i, addr := range []netip.Addr{p.IP, p.IP6} {
		manifest += fmt.Sprintf(`---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: closed-%d, namespace: default, labels: {kubernetes.io/service-name: closed}}
addressType: %s
ports: [{name: tcp, protocol: TCP, port: 9999}, {name: udp, protocol: UDP, port: 9999}]
endpoints: [{addresses: [%q], nodeName: %s}]
`, i, []string{"IPv4", "IPv6"}[i], addr, l.NodeOf(backend).NodeName)
	}
	l.Apply("closed.yaml", manifest)
	for _, addr := range []netip.Addr{l.A.IP, l.A.IP6} {
		for _, network := range []string{"tcp", "udp"} {
			f := Frontend{"NodePort", network, netip.AddrPortFrom(addr, 30081)}
			if _, err := l.Ask(f, []byte("x")); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: got %v, want a refusal", f, err)
			}
		}
	}
}

// clientIsGone: what the client's kernel says of an answer reaches the pod, about
// what the pod sent.
func (l *Lab) clientIsGone(t *testing.T, backend string) {
	l.Service(Spec{Pods: []string{backend}})
	capture := l.Pod(backend).Capture(t, "eth0")
	for _, f := range l.Frontends() {
		if f.Network != "udp" {
			continue
		}
		capture.Reset()
		c, client := l.listener(t, index(f))
		// The answer comes to a socket that is gone.
		if _, err := c.WriteTo([]byte("bye"), netAddr(f.Address)); err != nil {
			t.Fatal(err)
		}
		c.Close()
		l.forge(t, packet.Datagram(client, f.Address, "once more"))
		pod := l.podAddr(backend, f)
		var errs []string
		for end := time.Now().Add(Patience); ; time.Sleep(time.Millisecond) {
			errs = nil
			found := false
			for _, raw := range capture.Packets(func(p netns.Packet) bool { return !p.Outgoing }) {
				p, err := packet.Read(raw.Data)
				if err != nil || p.Proto != packet.ICMP && p.Proto != packet.ICMPv6 {
					continue
				}
				quoted, err := p.Quoted()
				errs = append(errs, fmt.Sprintf("type %d code %d about %s -> %s (%v)", p.Type, p.Code, quoted.Src, quoted.Dst, err))
				found = found || quoted.Src == pod && (p.Type == packet.Unreachable && !f.V6() || p.Type == packet.Unreachable6 && f.V6())
			}
			if found {
				break
			}
			if time.Now().After(end) {
				t.Errorf("%s: no error about what the pod sent reaches it; there are %v", f, errs)
				break
			}
		}
	}
}

// noHopLeft: the node says so as a router does, also where the frontend is its own address, and nobody else answers.
func noHopLeft(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"a-1", "b-1"}})
	for _, f := range l.Frontends() {
		d := net.Dialer{Timeout: short, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(l.ClientFor(f), 0)), Control: func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) {
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, 1)
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, 1)
			})
		}}
		if f.Network != "tcp" {
			continue
		}
		wire := l.Client.Capture(t, l.A.NodeName)
		err := l.Client.Do(func() error {
			c, err := d.Dial("tcp", f.Address.String())
			if err == nil {
				c.Close()
			}
			return err
		})
		if err == nil {
			t.Errorf("%s is reached", f)
		} else if errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: %v, want that the time is exceeded", f, err)
		}
		exceeded := false
		netns.Eventually(t, Patience, fmt.Sprintf("node-a says that the time is exceeded, for %s", f), func() bool {
			for _, raw := range wire.Packets(nil) {
				p, err := packet.Read(raw.Data)
				exceeded = exceeded || err == nil && (p.Proto == packet.ICMP && p.Type == packet.TimeExceeded || p.Proto == packet.ICMPv6 && p.Type == packet.TimeExceeded6)
			}
			return exceeded
		})
		wire.Stop()
	}
}

const narrow = 1300 // bytes: more than the least of IPv6

// narrowClient: the client is behind a link that carries less than the pods think,
// and says so to the service's address.
func (l *Lab) narrowClient(t *testing.T, backend string) {
	l.Service(Spec{Pods: []string{backend}})
	// The way to the client's addresses is narrow for what the router passes on:
	// a namespace beyond it has them.
	far := netns.New(t, "far")
	netns.Veth(t, l.Client, "far", far, "eth0")
	far.Addr(t, "eth0", "198.18.0.2/24", "2001:db8:18::2/64")
	l.Client.Addr(t, "far", "198.18.0.1/24", "2001:db8:18::1/64")
	far.Route(t, "default", "198.18.0.1", "eth0")
	far.Route(t, "default6", "2001:db8:18::1", "eth0")
	link := l.Client.Link(t, "far")
	if err := l.Client.Netlink().LinkSetMTU(link, narrow); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Client.Netlink().LinkDel(link) })
	for _, f := range l.Frontends() {
		if f.Network != "tcp" {
			continue
		}
		// The far end would say in its SYN how much it takes; it believes that it takes more.
		c, err := Dial(far, netip.Addr{}, f, Patience)
		if err != nil {
			t.Errorf("%s: %v", f, err)
			continue
		}
		// The echo of much, of which each request is small enough for the narrow link.
		got := make(chan error, 1)
		const size = 1 << 17
		c.SetDeadline(time.Now().Add(2 * Patience))
		go func() {
			n, err := io.CopyN(io.Discard, c, size)
			got <- errors.Join(err, map[bool]error{true: nil, false: fmt.Errorf("%d bytes came", n)}[n >= size])
		}()
		for i := range size / 1024 {
			if _, err := c.Write(Payload(i, 1024)); err != nil {
				t.Errorf("%s: %v", f, err)
				break
			}
		}
		if err := <-got; err != nil {
			t.Errorf("%s: the answers of pod %s do not pass the narrow way to the client: %v", f, backend, err)
		}
		c.Close()
	}
}

// narrowPod: between the nodes less passes than between the client and node-a,
// which says so to the client.
func narrowPod(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"b-1"}})
	for i, to := range []string{l.B.PodCIDRs[0].String() + " via " + l.B.IP.String(), l.B.PodCIDRs[1].String() + " via " + l.B.IP6.String()} {
		family := []string{"-4", "-6"}[i]
		was := l.A.Sh(t, "ip "+family+" route show "+l.B.PodCIDRs[i].String())
		l.A.Sh(t, fmt.Sprintf("ip %s route change %s dev %s mtu %d proto %s", family, to, netns.Uplink, narrow, protoOf(was)))
		t.Cleanup(func() {
			l.A.Sh(t, fmt.Sprintf("ip %s route change %s dev %s proto %s", family, to, netns.Uplink, protoOf(was)))
		})
	}
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		c, err := l.Dial(f)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if f.Network == "tcp" {
			if _, err := AskOn(c, Payload(1, 1<<17), 2*Patience); err != nil {
				t.Errorf("much does not pass: %v", err)
			}
			return
		}
		// The first is too big and is lost; from then on the client's kernel knows.
		c.SetDeadline(time.Now().Add(Patience))
		big := Payload(1, 1400)
		netns.Eventually(t, Patience, "a datagram passes once the client knows the path's MTU", func() bool {
			if _, err := c.Write(big); err != nil && !errors.Is(err, unix.EMSGSIZE) {
				t.Fatal(err)
			}
			c.SetReadDeadline(time.Now().Add(short))
			n, err := c.Read(make([]byte, 1<<16))
			return err == nil && n > len(big)
		})
	})
}

// protoOf is who made a route.
func protoOf(route string) string {
	words := strings.Fields(route)
	if at := slices.Index(words, "proto"); at >= 0 && at+1 < len(words) {
		return words[at+1]
	}
	return "boot"
}
