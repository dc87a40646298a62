// SPDX-License-Identifier: Apache-2.0

//go:build root

package packet

import (
	"testing"

	"github.com/mooring-cni/mooring/bpf"
)

// Protocols as the reaper's timeouts are given (enum sweep_proto).
var sweepProtocols = map[uint8]int{TCP: 0, UDP: 1, ICMP: 2, ICMPv6: 2}

// sweep reaps with one second as the timeout of one state and protocol, an hour for all others.
func (n *Node) sweep(t *testing.T, state, proto uint8) *bpf.Sweep {
	t.Helper()
	s := &bpf.Sweep{}
	for i := range s.Timeout {
		for j := range s.Timeout[i] {
			s.Timeout[i][j] = 3600 * n.JiffiesPerSecond
		}
	}
	s.Timeout[state][sweepProtocols[proto]] = n.JiffiesPerSecond
	if err := n.RunSweep(s); err != nil {
		t.Fatal(err)
	}
	return s
}

// age lets seconds pass for all entries.
func (n *Node) age(t *testing.T, seconds uint64) {
	t.Helper()
	n.SetEntries(t, func(_ bpf.CTKey, e *bpf.CTEntry) { e.Seen -= seconds * n.JiffiesPerSecond })
}

func TestEachStateHasItsTimeout(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	type step struct {
		fromClient bool
		flags      uint8
	}
	handshake := []step{{true, SYN}, {false, SYN | ACK}, {true, ACK}}
	for _, c := range []struct {
		name  string
		proto uint8
		steps []step
		state uint8
	}{
		{"SYN", TCP, handshake[:1], bpf.CTNew},
		{"SYN answered", TCP, handshake[:2], bpf.CTNew},
		{"handshake", TCP, handshake, bpf.CTEstablished},
		{"half closed", TCP, append(handshake[:3:3], step{true, FIN | ACK}), bpf.CTEstablished},
		{"reset", TCP, append(handshake[:3:3], step{false, RST}), bpf.CTClosing},
		{"both FINs", TCP, append(handshake[:3:3], step{true, FIN | ACK}, step{false, FIN | ACK}), bpf.CTTimeWait},
		{"question", UDP, []step{{true, 0}}, bpf.CTNew},
		{"question and answer", UDP, []step{{true, 0}, {false, 0}}, bpf.CTEstablished},
	} {
		t.Run(c.name, func(t *testing.T) {
			families(t, func(t *testing.T, v6 bool) {
				from, vip, backend := client.At(v6, 4000), VIP(v6, 10, 80), web.At(v6, 8080)
				n.Service(t, c.proto, vip, backend)
				t.Cleanup(func() { n.Flush(t) })
				for _, s := range c.steps {
					if s.fromClient {
						n.From(t, client, Packet{Src: from, Dst: vip, Proto: c.proto, Flags: s.flags}).arrives(t, web, from, backend)
					} else {
						n.From(t, web, Packet{Src: backend, Dst: from, Proto: c.proto, Flags: s.flags}).arrives(t, client, vip, from)
					}
				}
				n.sweep(t, c.state, c.proto)
				if got := len(n.Entries(t)); got != 2 {
					t.Fatalf("%d entries are left of one just made", got)
				}
				// Longer than the timeout under test, shorter than any other.
				n.age(t, 60)
				for state := range uint8(4) {
					if state != c.state {
						n.sweep(t, state, c.proto)
					}
				}
				if got := len(n.Entries(t)); got != 2 {
					t.Fatalf("another state's timeout left %d entries", got)
				}
				if s := n.sweep(t, c.state, c.proto); len(n.Entries(t)) != 0 || s.Expired != 2 {
					t.Errorf("its own timeout left %d entries and reaped %d", len(n.Entries(t)), s.Expired)
				}
			})
		})
	}
}

func TestAPacketRenewsItsFlow(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		from, vip, backend := client.At(v6, 4000), VIP(v6, 10, 53), web.At(v6, 1053)
		n.Service(t, UDP, vip, backend)
		n.From(t, client, Datagram(from, vip, "question"))
		n.From(t, web, Datagram(backend, from, "answer"))
		n.age(t, 60)
		n.From(t, client, Datagram(from, vip, "question"))
		n.sweep(t, bpf.CTEstablished, UDP)
		if got := len(n.Entries(t)); got != 2 {
			t.Errorf("%d entries are left", got)
		}
		n.Flush(t)
	})
}

func TestEntriesOfGoneEndpointsAndBackendsAreSwept(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		from, vip, backend := client.At(v6, 4000), VIP(v6, 10, 53), web.At(v6, 1053)
		s := n.Service(t, UDP, vip, backend)
		n.From(t, client, Datagram(from, vip, "question"))
		n.From(t, client, Datagram(from, web.At(v6, 9), "direct"))
		b := n.BackendAt(t, s.Backends[0])
		b.State = bpf.BackendFree
		n.SetBackend(t, s.Backends[0], b)
		hour := 3600 * n.JiffiesPerSecond
		pass := bpf.Sweep{GoneBackends: 1, Timeout: [4][3]uint64{{hour, hour, hour}, {hour, hour, hour}, {hour, hour, hour}, {hour, hour, hour}}}
		gone := pass
		if err := n.RunSweep(&gone); err != nil || gone.Backend != 2 || gone.Entries != 1 {
			t.Errorf("of a gone backend: %+v, %v", gone, err)
		}
		n.Forget(t, web)
		gone = pass
		gone.GoneBackends, gone.GoneEndpoints = 0, 1
		if err := n.RunSweep(&gone); err != nil || gone.Endpoint != 1 || gone.Entries != 0 {
			t.Errorf("of a gone endpoint: %+v, %v", gone, err)
		}
		n.register(t, web, web.V4)
		n.register(t, web, web.V6)
	})
}

func TestAFlowInThePlaceOfAnAnsweredOneEndsToo(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		from, vip, backend := client.At(v6, 4000), VIP(v6, 10, 80), web.At(v6, 8080)
		n.Service(t, TCP, vip, backend)
		for range 3 {
			// Answered, and so in the table that a flood does not reach; then over; then its ports are used again.
			for range 2 {
				n.From(t, client, Segment(from, vip, SYN)).arrives(t, web, from, backend)
				n.From(t, web, Segment(backend, from, SYN|ACK)).arrives(t, client, vip, from)
				n.From(t, client, Segment(from, vip, FIN|ACK)).arrives(t, web, from, backend)
				n.From(t, web, Segment(backend, from, FIN|ACK)).arrives(t, client, vip, from)
			}
			n.age(t, 60)
			if s := n.sweep(t, bpf.CTTimeWait, TCP); s.Expired != 2 || s.Failed != 0 || len(n.Entries(t)) != 0 {
				t.Fatalf("%d entries are left, %d were reaped, %d deletes failed", len(n.Entries(t)), s.Expired, s.Failed)
			}
		}
	})
}

func TestAClaimThatWasLeftBehindIsSwept(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		from, backend := client.At(v6, 4000), web.At(v6, 8080)
		n.From(t, client, Segment(from, backend, SYN))
		n.SetEntries(t, func(_ bpf.CTKey, e *bpf.CTEntry) { e.Life |= 1 })
		if n.sweep(t, bpf.CTNew, TCP); len(n.Entries(t)) != 1 {
			t.Error("a claim of this moment was not left to who made it")
		}
		// Claimed just now, and not heard of for long before: who did may be about to delete.
		n.age(t, 60)
		if n.sweep(t, bpf.CTNew, TCP); len(n.Entries(t)) != 1 {
			t.Error("a claim of this moment on an old entry was not left to who made it")
		}
		n.age(t, 60)
		if n.sweep(t, bpf.CTNew, TCP); len(n.Entries(t)) != 0 {
			t.Error("the entry is left")
		}
		n.From(t, client, Segment(from, backend, SYN)).arrives(t, web, from, backend)
		n.Flush(t)
	})
}
