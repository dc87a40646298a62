// SPDX-License-Identifier: Apache-2.0

//go:build root

package packet

import (
	"bytes"
	"strings"
	"testing"
)

// whole puts fragments together again and reads the packet: its checksum covers all of them.
func whole(t *testing.T, fragments []Packet) Packet {
	t.Helper()
	var payload []byte
	for _, f := range fragments {
		if f.Offset != len(payload) {
			t.Fatalf("a fragment at %d follows %d bytes", f.Offset, len(payload))
		}
		payload = append(payload, f.Payload...)
	}
	p := fragments[0]
	p.Offset, p.More, p.Payload = 0, false, nil
	raw := p.frame(payload)
	read, err := Read(raw)
	if err != nil {
		t.Fatalf("the fragments together: %v", err)
	}
	return read
}

func TestFragmentsFollowTheirFlow(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	payload := strings.Repeat("a datagram longer than the wire takes ", 100)
	families(t, func(t *testing.T, v6 bool) {
		from, vip, backend := client.At(v6, 4000), VIP(v6, 10, 53), web.At(v6, 1053)
		n.Service(t, UDP, vip, backend)
		var out []Packet
		for _, f := range Datagram(from, vip, payload).Fragments(100, 1000) {
			r := n.From(t, client, f)
			if r.Verdict != Redirect || r.To != web || r.Src.Addr() != from.Addr() || r.Dst.Addr() != backend.Addr() {
				t.Fatalf("fragment at %d: %v", f.Offset, r)
			}
			out = append(out, r.Packet)
		}
		if got := whole(t, out); got.Dst != backend || string(got.Payload) != payload {
			t.Fatalf("arrived as %s -> %s, %d bytes", got.Src, got.Dst, len(got.Payload))
		}
		out = nil
		for _, f := range Datagram(backend, from, payload).Fragments(200, 1000) {
			r := n.From(t, web, f)
			if r.Verdict != Redirect || r.To != client || r.Src.Addr() != vip.Addr() {
				t.Fatalf("fragment of the answer at %d: %v", f.Offset, r)
			}
			out = append(out, r.Packet)
		}
		if got := whole(t, out); got.Src != vip || got.Dst != from || string(got.Payload) != payload {
			t.Fatalf("answered as %s -> %s, %d bytes", got.Src, got.Dst, len(got.Payload))
		}
		if e, ok := n.FlowEntry(t, UDP, from, backend); !ok || e.Packets[0] != 4 || e.Packets[1] != 4 {
			t.Errorf("counted %v (%v)", e.Packets, ok)
		}
	})
}

func TestFragmentsWithoutTheirFirst(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	payload := strings.Repeat("0123456789abcdef", 200)
	families(t, func(t *testing.T, v6 bool) {
		from, vip, backend := client.At(v6, 4000), VIP(v6, 10, 53), web.At(v6, 1053)
		n.Service(t, UDP, vip, backend)
		f := Datagram(from, vip, payload).Fragments(300, 1000)
		// It came before its first, or that was lost.
		n.From(t, client, f[1]).dropped(t, "fragment_unknown")
		n.From(t, client, f[0])
		// After it the order does not matter.
		for _, i := range []int{3, 1, 2, 2} {
			if r := n.From(t, client, f[i]); r.Verdict != Redirect || r.To != web || r.Dst.Addr() != backend.Addr() {
				t.Fatalf("fragment %d: %v", i, r)
			}
		}
		// Another datagram's, another sender's, another protocol's.
		other := f[1]
		other.ID++
		n.From(t, client, other).dropped(t, "fragment_unknown")
		other = f[1]
		other.Src = web.At(v6, 0)
		n.From(t, web, other).dropped(t, "fragment_unknown")
		other = f[1]
		other.Proto = TCP
		n.From(t, client, other).dropped(t, "fragment_unknown")
		// The same identification again, by another flow.
		again := Datagram(client.At(v6, 4001), vip, payload).Fragments(300, 1000)
		n.From(t, client, again[0])
		n.From(t, client, again[1])
		if e, ok := n.FlowEntry(t, UDP, client.At(v6, 4001), backend); !ok || e.Packets[0] != 2 {
			t.Errorf("the second datagram's flow counted %v (%v)", e.Packets, ok)
		}
	})
}

func TestOnlyItsOwnPodNamesAFragmentsPorts(t *testing.T) {
	n := NewNode(t)
	client, web, thief := n.Pod(t), n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		from, vip, backend := client.At(v6, 4000), VIP(v6, 10, 53), web.At(v6, 1053)
		n.Service(t, UDP, vip, backend)
		f := Datagram(from, vip, strings.Repeat("x", 3000)).Fragments(400, 1000)
		n.From(t, client, f[0])
		// A pod that sends under another's address.
		forged := Datagram(client.At(v6, 9), vip, strings.Repeat("y", 3000)).Fragments(400, 1000)
		n.From(t, thief, forged[0]).dropped(t, "source_address")
		if r := n.From(t, client, f[1]); r.Verdict != Redirect || r.To != web {
			t.Errorf("the fragment after a forged one: %v", r)
		}
		if _, ok := n.FlowEntry(t, UDP, client.At(v6, 9), backend); ok {
			t.Error("the client's fragment took the forged ports")
		}
	})
}

func TestAFragmentThatIsTheWholePacket(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	from, vip, backend := client.At(true, 4000), VIP(true, 10, 53), web.At(true, 1053)
	n.Service(t, UDP, vip, backend)
	// RFC 6946: a fragment header without fragments.
	atomic := Datagram(from, vip, "atomic")
	atomic.Extensions = []Extension{{Fragment, make([]byte, 6)}}
	out := n.From(t, client, atomic)
	out.arrives(t, web, from, backend)
	if string(out.Payload) != "atomic" {
		t.Errorf("payload %q", out.Payload)
	}
}

func TestFragmentsOfAnEcho(t *testing.T) {
	n := NewNode(t)
	a, b := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		ping := Ping(a.IP(v6), b.IP(v6), 5)
		ping.Payload = bytes.Repeat([]byte("ping"), 800)
		var out []Packet
		for _, f := range ping.Fragments(500, 1400) {
			r := n.From(t, a, f)
			if r.Verdict != Redirect || r.To != b {
				t.Fatalf("fragment at %d: %v", f.Offset, r)
			}
			out = append(out, r.Packet)
		}
		if got := whole(t, out); got.Src != ping.Src || !bytes.Equal(got.Payload, ping.Payload) {
			t.Errorf("arrived as %v, %d bytes", got.Src, len(got.Payload))
		}
	})
}
