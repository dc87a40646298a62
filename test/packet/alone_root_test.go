// SPDX-License-Identifier: Apache-2.0

//go:build root

package packet

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/test/netns"
)

// A socket's only flow needs no entry for the decision: the socket knows, whatever
// else changes, and when the socket has gone an answer makes the entry for its successor.
func TestASocketsOnlyFlowHasOneEntry(t *testing.T) {
	n := hooked(t)
	client := n.Pod(t)
	webs := []*Pod{n.Pod(t), n.Pod(t), n.Pod(t), n.Pod(t)}
	families(t, func(t *testing.T, v6 bool) {
		for _, network := range []string{"tcp", "udp"} {
			t.Run(network, func(t *testing.T) {
				proto := map[string]uint8{"tcp": TCP, "udp": UDP}[network]
				vip, other := VIP(v6, 20, 80), VIP(v6, 21, 80)
				var backends []netip.AddrPort
				for _, web := range webs {
					at := web.At(v6, 8080)
					backends = append(backends, at)
					if network == "tcp" {
						netns.TCPEcho(t, web.NS, at.String())
					} else {
						netns.UDPEcho(t, web.NS, at.String())
					}
				}
				service := n.Service(t, proto, vip, backends...)
				for round := range 8 {
					c, err := client.Dial(network, vip.String())
					if err != nil {
						t.Fatal(err)
					}
					if err := netns.EchoOn(c, "first"); err != nil {
						t.Fatal(err)
					}
					from := netip.MustParseAddrPort(c.LocalAddr().String())
					from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
					chosen := n.only(t, proto, from, vip, backends)
					// What changes elsewhere makes the socket ask again, and get the same answer.
					n.Service(t, proto, other, backends[0])
					service.Choose(t, service.Backends...)
					for range 3 {
						if err := netns.EchoOn(c, "again"); err != nil {
							t.Fatalf("after a change: %v", err)
						}
						if now := n.only(t, proto, from, vip, backends); now != chosen {
							t.Fatalf("round %d: the flow went to %s, and goes to %s", round, backends[chosen], backends[now])
						}
					}
					c.Close()
				}
			})
		}
	})
}

// only is the backend of a client's flow, which has one entry and no more.
func (n *Node) only(t *testing.T, proto uint8, from, vip netip.AddrPort, backends []netip.AddrPort) int {
	t.Helper()
	if svc, there := n.ServiceEntry(t, proto, from, vip); there {
		t.Fatalf("there is an entry of the decision, too: %+v", svc)
	}
	chosen := -1
	for i, b := range backends {
		e, there := n.FlowEntry(t, proto, from, b)
		if !there {
			continue
		}
		if chosen >= 0 {
			t.Fatalf("the flow has entries to %s and %s", backends[chosen], b)
		}
		if e.Flags&bpf.CTAlone == 0 || e.Cookie[0] == 0 {
			t.Fatalf("the entry's flags are %#x, its client's cookie is %d", e.Flags, e.Cookie[0])
		}
		chosen = i
	}
	if chosen < 0 {
		t.Fatal("the flow has no entry")
	}
	return chosen
}

// What a pod's kernel says about an answer that came too late names the service, and
// reaches the backend about the flow that it knows.
func TestARefusedLateAnswerIsTranslated(t *testing.T) {
	n := hooked(t)
	client, web := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		vip, at := VIP(v6, 20, 53), web.At(v6, 5353)
		server, err := web.ListenPacket("udp", at.String())
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		server.SetDeadline(time.Now().Add(10 * time.Second))
		n.Service(t, UDP, vip, at)
		capture := web.Capture(t, "eth0")
		c, err := client.Dial("udp", vip.String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("question")); err != nil {
			t.Fatal(err)
		}
		request := make([]byte, 16)
		_, from, err := server.ReadFrom(request)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		if _, err := server.WriteTo([]byte("too late"), from); err != nil {
			t.Fatal(err)
		}
		netns.Eventually(t, 10*time.Second, "the refusal", func() bool {
			return len(capture.Packets(func(p netns.Packet) bool {
				read, err := Read(p.Data)
				// It quotes the answer, addresses and all.
				return err == nil && !p.Outgoing && (read.Proto == ICMP || read.Proto == ICMPv6) &&
					read.Src.Addr() == client.IP(v6) && strings.Contains(string(p.Data), string(at.Addr().AsSlice())+string(client.IP(v6).AsSlice()))
			})) > 0
		})
	})
}
