// SPDX-License-Identifier: Apache-2.0

//go:build root

package packet

import (
	"encoding/hex"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// refused checks that the pod gets an answer from where it sent to, for a reason.
func (r Result) refused(t *testing.T, pod *Pod, to Packet, reason string) {
	t.Helper()
	if r.Verdict != Redirect || r.To != pod || r.Reason != reason || r.From != pod.HostMAC ||
		r.Src.Addr() != to.Dst.Addr() || r.Dst.Addr() != to.Src.Addr() {
		t.Fatalf("got %v\nwant an answer from %s to %s (%s)", r, to.Dst, to.Src, reason)
	}
	if r.TTL != 64 {
		t.Errorf("the answer's TTL is %d", r.TTL)
	}
}

func TestAConnectionThatNobodyAnswersIsReset(t *testing.T) {
	n := NewNode(t)
	client := n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		empty, unknown := VIP(v6, 10, 80), VIP(v6, 10, 81)
		n.Service(t, TCP, empty)
		for vip, reason := range map[uint16]string{empty.Port(): "no_backend", unknown.Port(): "no_port"} {
			to := VIP(v6, 10, vip)
			segment := func(flags uint8, payload string) Packet {
				s := Segment(client.At(v6, 4000), to, flags)
				s.Payload = []byte(payload)
				return s
			}
			for _, c := range []struct {
				in       Packet
				flags    uint8
				seq, ack uint32
			}{
				// RFC 9293, 3.10.7.1: what the sender expects next, or its own acknowledgement.
				{segment(SYN, ""), RST | ACK, 0, 1001},
				{segment(SYN, "fast open"), RST | ACK, 0, 1010},
				{segment(FIN, ""), RST | ACK, 0, 1001},
				{segment(0, "data"), RST | ACK, 0, 1004},
				{segment(ACK, "data"), RST, 2000, 0},
				{segment(SYN|ACK, ""), RST, 2000, 0},
				{segment(FIN|ACK, ""), RST, 2000, 0},
			} {
				out := n.From(t, client, c.in)
				out.refused(t, client, c.in, reason)
				if out.Src != c.in.Dst || out.Dst != c.in.Src || out.Flags != c.flags || out.Seq != c.seq || out.Ack != c.ack || len(out.Payload) != 0 {
					t.Errorf("flags %#x, payload %q: answered %+v", c.in.Flags, c.in.Payload, out.Packet)
				}
			}
			// Options do not come back, nor does what a short frame is padded with.
			long := Segment(client.At(v6, 4000), to, SYN)
			long.From, long.To = client.MAC, client.HostMAC
			frame := append(long.Bytes(), make([]byte, 6)...)
			if out := n.FromRaw(t, client, frame); out.Ack != 1001 {
				t.Errorf("a SYN with 6 bytes of padding is acknowledged up to %d", out.Ack)
			}
			// A reset is never answered by a reset.
			if out := n.From(t, client, segment(RST, "")); out.Verdict != Drop {
				t.Errorf("a reset got %v", out)
			}
		}
		if entries := n.Entries(t); len(entries) != 0 {
			t.Errorf("refused connections left %d entries", len(entries))
		}
	})
}

func TestADatagramThatNobodyAnswersIsUnreachable(t *testing.T) {
	n := NewNode(t)
	client := n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		n.Service(t, UDP, VIP(v6, 10, 53))
		for port, reason := range map[uint16]string{53: "no_backend", 54: "no_port"} {
			for _, payload := range []string{"", "x", "question", strings.Repeat("long", 300)} {
				in := Datagram(client.At(v6, 4000), VIP(v6, 10, port), payload)
				out := n.From(t, client, in)
				out.refused(t, client, in, reason)
				want := Quote(in.Dst.Addr(), Unreachable, PortCode, 0, in, 8)
				if v6 {
					want = Quote(in.Dst.Addr(), Unreachable6, PortCode6, 0, in, 8)
				}
				if out.Type != want.Type || out.Code != want.Code || out.Rest != 0 {
					t.Errorf("type %d code %d rest %#x", out.Type, out.Code, out.Rest)
				}
				if diff := cmp.Diff(hex.Dump(want.Payload), hex.Dump(out.Payload)); diff != "" {
					t.Errorf("the quote of %d bytes differs: %s", len(payload), diff)
				}
			}
		}
		if entries := n.Entries(t); len(entries) != 0 {
			t.Errorf("refused datagrams left %d entries", len(entries))
		}
	})
}

// The bytes themselves, so that a mistake made twice does not pass.
func TestRefusalsAreTheseBytes(t *testing.T) {
	n := NewNode(t)
	client := n.Pod(t)
	n.Service(t, TCP, VIP(false, 10, 80))
	n.Service(t, TCP, VIP(true, 10, 80))
	ethernet := hex.EncodeToString(client.MAC[:]) + hex.EncodeToString(client.HostMAC[:])
	for _, c := range []struct {
		name string
		in   Packet
		want string
	}{
		{"IPv4 TCP", Segment(client.At(false, 4000), VIP(false, 10, 80), SYN), "0800" +
			"45000028000040004006256e" + "0a60000a0af40005" +
			"00500fa000000000000003e95014000086950000"},
		{"IPv4 UDP", Datagram(client.At(false, 4000), VIP(false, 10, 53), "q"), "0800" +
			"450000380000000040016563" + "0a60000a0af40005" + "0303837a00000000" +
			"4500001d000040004011256e" + "0af400050a60000a" + "0fa00035000969a4"},
		{"IPv6 TCP", Segment(client.At(true, 4000), VIP(true, 10, 80), SYN), "86dd" +
			"6000000000140640" + "fd00001000960000000000000000000a" + "fd000010024400000000000000000005" +
			"00500fa000000000000003e9501400009eed0000"},
		{"IPv6 UDP", Datagram(client.At(true, 4000), VIP(true, 10, 53), "q"), "86dd" +
			"6000000000383a40" + "fd00001000960000000000000000000a" + "fd000010024400000000000000000005" + "0104015000000000" +
			"6000000000091140" + "fd000010024400000000000000000005" + "fd00001000960000000000000000000a" + "0fa00035000981fc"},
	} {
		out := n.From(t, client, c.in)
		if got := hex.EncodeToString(out.Raw); got != ethernet+c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, ethernet+c.want)
		}
	}
}

func TestLaterFragmentsAreNotRefused(t *testing.T) {
	n := NewNode(t)
	client := n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		for _, proto := range []uint8{TCP, UDP} {
			whole := Packet{
				Src: client.At(v6, 4000), Dst: VIP(v6, 10, 80), Proto: proto, Flags: ACK,
				Payload: []byte(strings.Repeat("sixteen bytes...", 10)),
			}
			n.Service(t, proto, whole.Dst)
			for i, f := range whole.Fragments(7, 64) {
				out := n.From(t, client, f)
				if i > 0 {
					out.dropped(t, "no_backend")
				}
			}
		}
	})
}
