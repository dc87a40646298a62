// SPDX-License-Identifier: Apache-2.0

//go:build root

package north

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/test/fate"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
	"github.com/mooring-cni/mooring/test/scenario"
)

// As lib/tell.h has it.
const (
	tellPort  = 717
	tellMagic = 0x4d6f4472
	tellSize  = 24
)

// tell is what a node says about a packet to the backend's node.
func tell(from, to netip.Addr, frontend netip.AddrPort, about []byte) packet.Packet {
	header := binary.BigEndian.AppendUint32(nil, tellMagic)
	header = binary.BigEndian.AppendUint16(header, frontend.Port())
	header = append(header, 0, 0)
	address := frontend.Addr().As16()
	header = append(header, address[:]...)
	return packet.Datagram(netip.AddrPortFrom(from, tellPort), netip.AddrPortFrom(to, tellPort), string(append(header, about...)))
}

func isTell(p packet.Packet) bool {
	return p.Proto == packet.UDP && p.Dst.Port() == tellPort && len(p.Payload) > tellSize && binary.BigEndian.Uint32(p.Payload) == tellMagic
}

var answersThemselves = group{name: "backends answer clients themselves", mode: "dsr", tests: []modeTest{
	{"told with the first packet, answered directly", toldOnce},
	{"told again to a node that forgot", toldAgain},
	{"told by who is no node", toldByStrangers},
	{"told by a pod", toldByPods},
	{"a backend outside of the cluster", foreignBackend},
	{"two frontends of one backend", twoFrontends},
}}

func toldOnce(t *testing.T, l *Lab) {
	l.withoutOffloads()
	l.Service(Spec{Pods: []string{"b-1"}})
	wireA, wireB := l.Client.Capture(t, l.A.NodeName), l.Client.Capture(t, l.B.NodeName)
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		wireA.Reset()
		wireB.Reset()
		began := time.Now()
		c, err := l.Dial(f)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		text := []byte("told-" + f.String())
		if _, err := AskOn(c, text, Patience); err != nil {
			t.Fatal(err)
		}
		client := netip.MustParseAddrPort(c.LocalAddr().String())
		server := l.podAddr("b-1", f)
		hop{wireB, "the answer, from node-b", f.Address, client, 63}.check(t, text)
		tells, plain := 0, 0
		for _, p := range seen(t, wireB, nil) {
			switch {
			case isTell(p):
				if p.Src != netip.AddrPortFrom(l.nodeAddr(f), tellPort) || p.Dst.Addr() != server.Addr() {
					t.Errorf("told from %s to %s, want from %s to %s", p.Src, p.Dst, l.nodeAddr(f), server.Addr())
				}
				tells++
			case p.Src == client && p.Dst == server:
				plain++
			}
		}
		if tells < 1 || tells > 1+int(time.Since(began)/time.Second) || f.Network == "tcp" && plain == 0 {
			t.Errorf("%d packets to the backend's node were told with, %d went as they are", tells, plain)
		}
		for _, p := range seen(t, wireA, nil) {
			if p.Dst == client {
				t.Errorf("an answer passes node-a: %s -> %s", p.Src, p.Dst)
			}
		}
	})
}

// toldAgain: a node that has lost what it was told learns it again, from the same flow.
func toldAgain(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"b-1"}})
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		if f.Network != "udp" {
			return
		}
		c, err := l.Dial(f)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := AskOn(c, []byte("before"), Patience); err != nil {
			t.Fatal(err)
		}
		if _, err := l.B.API().FlushConntrack(t.Context()); err != nil {
			t.Fatal(err)
		}
		netns.Eventually(t, Patience, "the flow is answered again", func() bool {
			_, err := AskOn(c, []byte("after"), short)
			return err == nil
		})
	})
}

// forgeTo sends frames of the client to a node, whatever their addresses say.
func (l *Lab) forgeTo(t *testing.T, n *scenario.Node, p packet.Packet) {
	t.Helper()
	gateway := n.IP.String()
	if p.Is6() {
		gateway = n.IP6.String()
	}
	c, err := l.Client.Dial("udp", net.JoinHostPort(gateway, "9"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	netns.Eventually(t, Patience, "the node is a neighbour", func() bool {
		c.Write([]byte("x"))
		return fate.Forge(l.Client, l.wire, gateway, 0, nil) == nil
	})
	if err := fate.Forge(l.Client, l.wire, gateway, 1, func(int) packet.Packet { return p }); err != nil {
		t.Fatal(err)
	}
}

func toldByStrangers(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"b-1"}})
	pod := l.Pod("b-1").Capture(t, "eth0")
	for _, f := range l.Frontends() {
		if f.Network != "udp" || f.Kind != "NodePort" {
			continue
		}
		client, server := netip.AddrPortFrom(l.ClientFor(f), 4242), l.podAddr("b-1", f)
		good := packet.Datagram(client, server, "forged").Layer3()
		martian := packet.Datagram(netip.AddrPortFrom(server.Addr(), 4242), server, "forged").Layer3()
		other := packet.Datagram(client, l.podAddr("b-2", f), "forged").Layer3()
		wrong := netip.MustParseAddrPort("[2001:db8::1]:80")
		if f.V6() {
			wrong = netip.MustParseAddrPort("192.0.2.99:80")
		}
		node := l.nodeAddr(f)
		for _, test := range []struct {
			what, reason string
			p            packet.Packet
		}{
			{"by the client", "dsr_option", tell(client.Addr(), server.Addr(), f.Address, good)},
			{"as by the node itself", "dsr_option", tell([2]netip.Addr{l.B.IP, l.B.IP6}[index(f)], server.Addr(), f.Address, good)},
			{"about a frontend of the other family", "dsr_option", tell(node, server.Addr(), wrong, good)},
			{"about a frontend without a port", "dsr_option", tell(node, server.Addr(), netip.AddrPortFrom(f.Address.Addr(), 0), good)},
			{"about another pod's packet", "dsr_option", tell(node, server.Addr(), f.Address, other)},
			{"about no packet", "dsr_option", tell(node, server.Addr(), f.Address, []byte("no"))},
			{"about a packet that is not whole", "truncated", tell(node, server.Addr(), f.Address, good[:len(good)-3])},
			{"about a packet from the pod itself", "martian", tell(node, server.Addr(), f.Address, martian)},
		} {
			before := dropped(t, l.B, test.reason)
			l.forgeTo(t, l.B, test.p)
			netns.Eventually(t, Patience, fmt.Sprintf("what is told %s is dropped: %s", test.what, f), func() bool { return dropped(t, l.B, test.reason) > before })
		}
	}
	if got := seen(t, pod, []byte("forged")); len(got) > 0 {
		t.Errorf("the pod got %v", got)
	}
}

// toldByPods: a pod's datagram is not passed on even where nobody would believe it.
func toldByPods(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"b-1"}})
	for i, to := range []netip.Addr{l.Pod("b-1").IP, l.Pod("b-1").IP6} {
		f := Frontend{"NodePort", "udp", netip.AddrPortFrom([2]netip.Addr{l.A.IP, l.A.IP6}[i], UDPNodePort)}
		p := tell(to, to, f.Address, packet.Datagram(netip.AddrPortFrom(l.ClientFor(f), 4242), l.podAddr("b-1", f), "forged").Layer3())
		c, err := l.Pod("a-1").NS.ListenPacket("udp", fmt.Sprintf(":%d", tellPort))
		if err != nil {
			t.Fatal(err)
		}
		before := droppedAt(t, l.A, "from_endpoint", "dsr_option")
		if _, err := c.WriteTo(p.Payload, netAddr(netip.AddrPortFrom(to, tellPort))); err != nil {
			t.Error(err)
		}
		netns.Eventually(t, Patience, "what a pod tells is dropped", func() bool { return droppedAt(t, l.A, "from_endpoint", "dsr_option") > before })
		c.Close()
	}
}

// foreignBackend: whoever is no node of the cluster cannot be told, and is asked by this node.
func foreignBackend(t *testing.T, l *Lab) {
	Serve(t, l.Client, "foreign")
	manifest := `
apiVersion: v1
kind: Service
metadata: {name: foreign, namespace: default}
spec: {type: NodePort, ipFamilyPolicy: RequireDualStack, clusterIPs: [10.96.0.12, "fd00:10:96::12"], ports: [
  {name: tcp, protocol: TCP, port: 80, nodePort: 30082}]}
`
	for i, addr := range []string{netns.Router, netns.Router6} {
		manifest += fmt.Sprintf(`---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: foreign-%d, namespace: default, labels: {kubernetes.io/service-name: foreign}}
addressType: %s
ports: [{name: tcp, protocol: TCP, port: %d}]
endpoints: [{addresses: [%q]}]
`, i, []string{"IPv4", "IPv6"}[i], TCPTarget, addr)
	}
	l.Apply("foreign.yaml", manifest)
	for _, node := range []netip.Addr{l.A.IP, l.A.IP6} {
		f := Frontend{"NodePort", "tcp", netip.AddrPortFrom(node, 30082)}
		for i := range 20 {
			if a, err := l.Ask(f, Payload(i, 900)); err != nil || a.Client.Addr() != node {
				t.Errorf("%s: the backend sees %v, %v, want %s", f, a.Client, err, node)
			}
		}
	}
}

// twoFrontends: of one client's port only one flow to a backend can be answered; the other is dropped with a reason.
func twoFrontends(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"b-1"}})
	l.flush()
	for family := range 2 {
		c, client := l.listener(t, family)
		external, balancer := netip.AddrPortFrom(External[family], UDPPort), netip.AddrPortFrom(Balancer[family], UDPPort)
		if _, err := c.WriteTo([]byte("one"), netAddr(external)); err != nil {
			t.Fatal(err)
		}
		receive(t, c, "one")
		before := dropped(t, l.B, "tuple_collision")
		if _, err := c.WriteTo([]byte("two"), netAddr(balancer)); err != nil {
			t.Fatal(err)
		}
		netns.Eventually(t, Patience, fmt.Sprintf("the second flow of %s is dropped with a reason", client), func() bool { return dropped(t, l.B, "tuple_collision") > before })
		if _, err := c.WriteTo([]byte("three"), netAddr(external)); err != nil {
			t.Fatal(err)
		}
		receive(t, c, "three")
	}
}
