// SPDX-License-Identifier: Apache-2.0

//go:build root

package packet

import (
	"net/netip"
	"testing"

	"github.com/mooring-cni/mooring/bpf"
)

func TestDatagramsThroughAService(t *testing.T) {
	n := NewNode(t)
	client, dns := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		from, vip, backend := client.At(v6, 5353), VIP(v6, 10, 53), dns.At(v6, 1053)
		n.Service(t, UDP, vip, backend)
		// Odd and even lengths, and a payload that brings the sum to every carry.
		for _, payload := range []string{"", "q", "query", string(make([]byte, 1400)), "\xff\xff\xff\xff"} {
			n.From(t, client, Datagram(from, vip, payload)).arrives(t, dns, from, backend)
			if answer := n.From(t, dns, Datagram(backend, from, payload)); string(answer.Payload) != payload {
				t.Errorf("the answer changed to %q", answer.Payload)
			} else {
				answer.arrives(t, client, vip, from)
			}
		}
		n.state(t, UDP, from, vip, backend, bpf.CTEstablished)
	})
}

func TestPacketsToAServicePassUnchangedButForTheirAddresses(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	from, vip, backend := client.At(false, 4000), VIP(false, 10, 80), web.At(false, 8080)
	n.Service(t, TCP, vip, backend)
	in := Segment(from, vip, SYN)
	in.Options = []byte{1, 1, 1, 0}
	out := n.From(t, client, in)
	out.arrives(t, web, from, backend)
	if string(out.Options) != string(in.Options) {
		t.Errorf("options of the header: % x, sent % x", out.Options, in.Options)
	}
}

func TestNewFlowsSpreadOverAllBackends(t *testing.T) {
	n := NewNode(t)
	client := n.Pod(t)
	webs := []*Pod{n.Pod(t), n.Pod(t), n.Pod(t)}
	families(t, func(t *testing.T, v6 bool) {
		vip := VIP(v6, 10, 80)
		n.Service(t, TCP, vip, webs[0].At(v6, 8080), webs[1].At(v6, 8080), webs[2].At(v6, 8080))
		seen := map[*Pod]int{}
		for port := range uint16(200) {
			from := client.At(v6, 10000+port)
			first := n.From(t, client, Segment(from, vip, SYN))
			seen[first.To]++
			// What follows, and the SYN again, go where the first one went.
			n.From(t, client, Segment(from, vip, SYN)).arrives(t, first.To, from, first.Dst)
			n.From(t, client, Segment(from, vip, ACK)).arrives(t, first.To, from, first.Dst)
		}
		for _, web := range webs {
			// 200 draws of a third: fewer than 20 is one in 10^14.
			if seen[web] < 20 {
				t.Errorf("%s got %d of 200 connections", web.Host, seen[web])
			}
		}
	})
}

func TestAffinityKeepsAClientWithItsBackendUntilItsTimeout(t *testing.T) {
	n := NewNode(t)
	client, other := n.Pod(t), n.Pod(t)
	webs := []*Pod{n.Pod(t), n.Pod(t), n.Pod(t)}
	families(t, func(t *testing.T, v6 bool) {
		vip := VIP(v6, 10, 80)
		s := n.Service(t, TCP, vip, webs[0].At(v6, 8080), webs[1].At(v6, 8080), webs[2].At(v6, 8080))
		s.Change(t, func(v *bpf.Service) { v.AffinitySeconds = 10800 })
		port := uint16(10000)
		open := func(pod *Pod) *Pod {
			port++
			return n.From(t, pod, Segment(pod.At(v6, port), vip, SYN)).To
		}
		first := open(client)
		for range 30 {
			if got := open(client); got != first {
				t.Fatalf("a later connection went to %s, the first to %s", got.Host, first.Host)
			}
		}
		spread := map[*Pod]bool{}
		for range 60 {
			n.forgetAffinity(t, other)
			spread[open(other)] = true
		}
		if len(spread) < 2 {
			t.Error("clients without affinity all went to one backend")
		}
		// The timeout has passed: a new draw each time.
		spread = map[*Pod]bool{}
		for range 60 {
			n.ageAffinity(t, client, 10801)
			spread[open(client)] = true
		}
		if len(spread) < 2 {
			t.Error("affinity outlived its timeout")
		}
		// Within it, also a second before its end.
		first = open(client)
		for range 10 {
			n.ageAffinity(t, client, 10799)
			if open(client) != first {
				t.Fatal("affinity ended before its timeout")
			}
		}
		// A backend that takes no new flows is left.
		for i, web := range webs {
			if web == first {
				b := n.BackendAt(t, s.Backends[i])
				b.State = bpf.BackendTerminating
				n.SetBackend(t, s.Backends[i], b)
				s.Choose(t, append(append([]uint32{}, s.Backends[:i]...), s.Backends[i+1:]...)...)
			}
		}
		second := open(client)
		if second == first {
			t.Error("affinity chose a terminating backend")
		}
		for range 10 {
			if open(client) != second {
				t.Fatal("affinity did not move to the new backend")
			}
		}
	})
}

// forgetAffinity forgets where a client was sent.
func (n *Node) forgetAffinity(t *testing.T, client *Pod) {
	t.Helper()
	n.affinities(t, client, func(k bpf.AffinityKey, _ bpf.Affinity) {
		if err := n.Affinity.Delete(k); err != nil {
			t.Fatal(err)
		}
	})
}

// ageAffinity lets seconds pass for a client's affinity.
func (n *Node) ageAffinity(t *testing.T, client *Pod, seconds uint64) {
	t.Helper()
	now, err := n.Jiffies()
	if err != nil {
		t.Fatal(err)
	}
	n.affinities(t, client, func(k bpf.AffinityKey, a bpf.Affinity) {
		a.Seen = now - seconds*n.JiffiesPerSecond
		put(t, n.Affinity, k, a)
	})
}

func (n *Node) affinities(t *testing.T, client *Pod, f func(bpf.AffinityKey, bpf.Affinity)) {
	t.Helper()
	found := map[bpf.AffinityKey]bpf.Affinity{}
	var k bpf.AffinityKey
	var a bpf.Affinity
	all := n.Affinity.Iterate()
	for all.Next(&k, &a) {
		if ip := k.Client.IP(); ip == client.V4 || ip == client.V6 {
			found[k] = a
		}
	}
	if err := all.Err(); err != nil {
		t.Fatal(err)
	}
	for k, a := range found {
		f(k, a)
	}
}

func TestLocalTrafficPolicyWithoutALocalBackendDrops(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		from, vip := client.At(v6, 4000), VIP(v6, 10, 80)
		s := n.Service(t, TCP, vip, web.At(v6, 8080))
		s.Change(t, func(v *bpf.Service) { v.Flags |= bpf.ServiceInternalLocal })
		n.From(t, client, Segment(from, vip, SYN)).arrives(t, web, from, web.At(v6, 8080))
		s.Choose(t)
		// No answer at all: as kube-proxy does it (KEP 2086).
		n.From(t, client, Segment(client.At(v6, 4001), vip, SYN)).dropped(t, "no_local_backend")
	})
}

func TestAFlowGoesOnToATerminatingBackend(t *testing.T) {
	n := NewNode(t)
	client, old, new := n.Pod(t), n.Pod(t), n.Pod(t)
	for _, proto := range []uint8{TCP, UDP} {
		families(t, func(t *testing.T, v6 bool) {
			vip := VIP(v6, 10, 80)
			s := n.Service(t, proto, vip, old.At(v6, 8080))
			from := client.At(v6, 4000)
			begin, next := Packet{Src: from, Dst: vip, Proto: proto, Flags: SYN}, Packet{Src: from, Dst: vip, Proto: proto, Flags: ACK}
			n.From(t, client, begin).arrives(t, old, from, old.At(v6, 8080))

			b := n.BackendAt(t, s.Backends[0])
			b.State = bpf.BackendTerminating
			n.SetBackend(t, s.Backends[0], b)
			s.Choose(t, n.backend(t, proto, new.At(v6, 8080)))
			n.From(t, client, next).arrives(t, old, from, old.At(v6, 8080))
			n.From(t, old, Packet{Src: old.At(v6, 8080), Dst: from, Proto: proto, Flags: ACK}).arrives(t, client, vip, from)

			fresh := client.At(v6, 4001)
			begin.Src = fresh
			n.From(t, client, begin).arrives(t, new, fresh, new.At(v6, 8080))
			n.Flush(t)
		})
	}
}

func TestAFlowOfARemovedBackendGetsAnother(t *testing.T) {
	n := NewNode(t)
	client, old, new := n.Pod(t), n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		from, vip := client.At(v6, 4000), VIP(v6, 10, 53)
		s := n.Service(t, UDP, vip, old.At(v6, 8080))
		n.From(t, client, Datagram(from, vip, "a")).arrives(t, old, from, old.At(v6, 8080))

		// The daemon frees the index; the next tenant has another generation.
		b := n.BackendAt(t, s.Backends[0])
		b.State = bpf.BackendFree
		n.SetBackend(t, s.Backends[0], b)
		s.Choose(t, n.backend(t, UDP, new.At(v6, 8080)))
		n.From(t, client, Datagram(from, vip, "b")).arrives(t, new, from, new.At(v6, 8080))
		n.From(t, new, Datagram(new.At(v6, 8080), from, "b")).arrives(t, client, vip, from)
	})
}

func TestAnEntryOfTheIndexsEarlierTenantIsVoid(t *testing.T) {
	n := NewNode(t)
	client, old, new := n.Pod(t), n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		from, vip := client.At(v6, 4000), VIP(v6, 10, 53)
		s := n.Service(t, UDP, vip, old.At(v6, 8080))
		n.From(t, client, Datagram(from, vip, "a")).arrives(t, old, from, old.At(v6, 8080))
		b := n.BackendAt(t, s.Backends[0])
		b.Generation++
		b.Addr = bpf.ToAddr(new.IP(v6))
		n.SetBackend(t, s.Backends[0], b)
		n.From(t, client, Datagram(from, vip, "b")).arrives(t, new, from, new.At(v6, 8080))
		e, ok := n.ServiceEntry(t, UDP, from, vip)
		if !ok || e.BackendGeneration != b.Generation || e.Nat.IP() != new.IP(v6) {
			t.Errorf("SVC entry %+v (%v)", e, ok)
		}
	})
}

func TestAPodReachesItselfThroughItsService(t *testing.T) {
	n := NewNode(t)
	web := n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		alias := netip.MustParseAddr("169.254.1.2")
		if v6 {
			alias = netip.MustParseAddr("fd6d:6f6f:7269:6e67::2")
		}
		from, vip, backend := web.At(v6, 4000), VIP(v6, 10, 80), web.At(v6, 8080)
		n.Service(t, TCP, vip, backend)
		n.Service(t, UDP, vip, backend)
		seen := netip.AddrPortFrom(alias, 4000)
		n.From(t, web, Segment(from, vip, SYN)).arrives(t, web, seen, backend)
		n.From(t, web, Segment(backend, seen, SYN|ACK)).arrives(t, web, vip, from)
		n.From(t, web, Segment(from, vip, ACK)).arrives(t, web, seen, backend)
		if e, ok := n.ServiceEntry(t, TCP, from, vip); !ok || e.State != bpf.CTEstablished {
			t.Errorf("SVC entry %+v (%v)", e, ok)
		}
		n.From(t, web, Segment(from, vip, FIN|ACK)).arrives(t, web, seen, backend)
		n.From(t, web, Segment(backend, seen, FIN|ACK)).arrives(t, web, vip, from)
		if e, ok := n.ServiceEntry(t, TCP, from, vip); !ok || e.State != bpf.CTTimeWait {
			t.Errorf("SVC entry at the end %+v (%v)", e, ok)
		}
		n.From(t, web, Datagram(from, vip, "me?")).arrives(t, web, seen, backend)
		n.From(t, web, Datagram(backend, seen, "me!")).arrives(t, web, vip, from)
	})
}

func TestAPortUsedAgainMayGetAnotherBackend(t *testing.T) {
	ends := map[string]func(n *Node, t *testing.T, client, web *Pod, from, vip, backend netip.AddrPort){
		"after both FINs": func(n *Node, t *testing.T, client, web *Pod, from, vip, backend netip.AddrPort) {
			n.From(t, client, Segment(from, vip, FIN|ACK))
			n.From(t, web, Segment(backend, from, FIN|ACK))
		},
		"after one FIN": func(n *Node, t *testing.T, client, web *Pod, from, vip, backend netip.AddrPort) {
			n.From(t, client, Segment(from, vip, FIN|ACK))
		},
		"after the backend's reset": func(n *Node, t *testing.T, client, web *Pod, from, vip, backend netip.AddrPort) {
			n.From(t, web, Segment(backend, from, RST|ACK))
		},
		"after nothing but silence": func(n *Node, t *testing.T, client, web *Pod, from, vip, backend netip.AddrPort) {},
	}
	n := NewNode(t)
	client := n.Pod(t)
	webs := []*Pod{n.Pod(t), n.Pod(t)}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			families(t, func(t *testing.T, v6 bool) {
				vip, from := VIP(v6, 10, 80), client.At(v6, 4000)
				n.Service(t, TCP, vip, webs[0].At(v6, 8080), webs[1].At(v6, 8080))
				seen := map[*Pod]bool{}
				for range 40 {
					first := n.From(t, client, Segment(from, vip, SYN))
					web := first.To
					seen[web] = true
					n.From(t, web, Segment(first.Dst, from, SYN|ACK)).arrives(t, client, vip, from)
					n.From(t, client, Segment(from, vip, ACK)).arrives(t, web, from, first.Dst)
					n.state(t, TCP, from, vip, first.Dst, bpf.CTEstablished)
					end(n, t, client, web, from, vip, first.Dst)
				}
				if len(seen) != 2 {
					t.Error("the port stuck to its first backend in 40 connections")
				}
				n.Flush(t)
			})
		})
	}
}

func TestTwoFlowsThatWouldBeOneOnTheWire(t *testing.T) {
	n := NewNode(t)
	client, web, other := n.Pod(t), n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		from, backend := client.At(v6, 4000), web.At(v6, 8080)
		vips := []netip.AddrPort{VIP(v6, 10, 80), VIP(v6, 11, 80), VIP(v6, 12, 80)}
		n.Service(t, TCP, vips[0], backend)
		n.Service(t, TCP, vips[1], backend)
		n.Service(t, TCP, vips[2], backend, other.At(v6, 8080))
		n.From(t, client, Segment(from, vips[0], SYN)).arrives(t, web, from, backend)
		n.From(t, web, Segment(backend, from, SYN|ACK)).arrives(t, client, vips[0], from)
		// The same ports to the same backend by another name: replies could not be told apart.
		n.From(t, client, Segment(from, vips[1], SYN)).dropped(t, "tuple_collision")
		// Where there is another backend it is taken, unless chance is 1 in 16.
		for range 8 {
			out := n.From(t, client, Segment(from, vips[2], SYN))
			if out.Verdict == Redirect {
				out.arrives(t, other, from, other.At(v6, 8080))
			} else {
				out.dropped(t, "tuple_collision")
			}
		}
		n.From(t, client, Segment(from, vips[0], ACK)).arrives(t, web, from, backend)
		n.From(t, web, Segment(backend, from, ACK)).arrives(t, client, vips[0], from)
		// Once the first is over, the ports are free.
		n.From(t, client, Segment(from, vips[0], RST))
		n.From(t, client, Segment(from, vips[1], SYN)).arrives(t, web, from, backend)
		n.From(t, web, Segment(backend, from, SYN|ACK)).arrives(t, client, vips[1], from)
	})
}

func TestEvictedEntriesDoNotLeadAstray(t *testing.T) {
	n := NewNode(t, Options{MaxEntries: 1024})
	client, web := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		vip, backend := VIP(v6, 10, 80), web.At(v6, 8080)
		n.Service(t, TCP, vip, backend)
		early := client.At(v6, 1000)
		n.From(t, client, Segment(early, vip, SYN)).arrives(t, web, early, backend)
		n.From(t, web, Segment(backend, early, SYN|ACK)).arrives(t, client, vip, early)
		// Four times what the table holds.
		for port := range uint16(2048) {
			from := client.At(v6, 2000+port)
			frame := Segment(from, vip, SYN)
			frame.From, frame.To = client.MAC, client.HostMAC
			verdict, _, err := n.RunRaw(n.FromContainer, client.Ifindex, frame.Bytes(), 0)
			if err != nil || verdict != Redirect {
				t.Fatalf("connection %d of a full table: verdict %d, %v", port, verdict, err)
			}
		}
		// The one backend is found again, and the entries are made anew.
		n.From(t, client, Segment(early, vip, ACK)).arrives(t, web, early, backend)
		n.From(t, web, Segment(backend, early, ACK)).arrives(t, client, vip, early)
	})
}

func TestAServiceThatComesAfterItsFirstPackets(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	for _, proto := range []uint8{TCP, UDP} {
		families(t, func(t *testing.T, v6 bool) {
			from, vip, backend := client.At(v6, 4000), VIP(v6, 10+int(proto), 80), web.At(v6, 8080)
			first := Packet{Src: from, Dst: vip, Proto: proto, Flags: SYN}
			for range 3 {
				n.From(t, client, first).passes(t, from, vip)
			}
			n.Service(t, proto, vip, backend)
			// The same socket tries again: a resolver, or TCP's next SYN.
			n.From(t, client, first).arrives(t, web, from, backend)
			n.From(t, web, Packet{Src: backend, Dst: from, Proto: proto, Flags: SYN | ACK}).arrives(t, client, vip, from)
			n.From(t, client, Packet{Src: from, Dst: vip, Proto: proto, Flags: ACK}).arrives(t, web, from, backend)
		})
	}
}
