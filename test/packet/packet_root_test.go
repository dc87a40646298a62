// SPDX-License-Identifier: Apache-2.0

//go:build root

package packet

import (
	"net/netip"
	"testing"

	"github.com/mooring-cni/mooring/bpf"
)

// families runs a test once in each family.
func families(t *testing.T, f func(t *testing.T, v6 bool)) {
	t.Helper()
	t.Run("IPv4", func(t *testing.T) { f(t, false) })
	t.Run("IPv6", func(t *testing.T) { f(t, true) })
}

// arrives checks that a packet goes to a pod without the host's stack, between these ends.
func (r Result) arrives(t *testing.T, at *Pod, src, dst netip.AddrPort) {
	t.Helper()
	if r.Verdict != Redirect || r.To != at || r.Src != src || r.Dst != dst {
		t.Fatalf("got %v\nwant redirect to %s: %s -> %s", r, at.Host, src, dst)
	}
	if r.From != at.HostMAC {
		t.Errorf("it comes from MAC %x, the pod's gateway is %x", r.From, at.HostMAC)
	}
}

// passes checks that the host's stack gets a packet, between these ends.
func (r Result) passes(t *testing.T, src, dst netip.AddrPort) {
	t.Helper()
	if r.Verdict != Pass || r.Src != src || r.Dst != dst {
		t.Fatalf("got %v\nwant pass: %s -> %s", r, src, dst)
	}
}

// dropped checks that a packet is dropped for a reason.
func (r Result) dropped(t *testing.T, reason string) {
	t.Helper()
	if r.Verdict != Drop || r.Reason != reason {
		t.Fatalf("got %v\nwant drop (%s)", r, reason)
	}
}

// state checks the state of both entries of a flow through a frontend.
func (n *Node) state(t *testing.T, proto uint8, client, frontend, backend netip.AddrPort, want uint8) {
	t.Helper()
	svc, ok := n.ServiceEntry(t, proto, client, frontend)
	if !ok {
		t.Fatalf("no SVC entry %s -> %s", client, frontend)
	}
	flow, ok := n.FlowEntry(t, proto, client, backend)
	if !ok {
		t.Fatalf("no flow entry %s -> %s", client, backend)
	}
	if svc.State != want || flow.State != want {
		t.Errorf("states: SVC %d, flow %d, want %d", svc.State, flow.State, want)
	}
}

func TestConnectionThroughAService(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		from, vip, backend := client.At(v6, 4000), VIP(v6, 10, 80), web.At(v6, 8080)
		n.Service(t, TCP, vip, backend)

		out := n.From(t, client, Segment(from, vip, SYN))
		out.arrives(t, web, from, backend)
		if out.TTL != 63 {
			t.Errorf("TTL %d after one hop", out.TTL)
		}
		n.state(t, TCP, from, vip, backend, bpf.CTNew)
		svc, _ := n.ServiceEntry(t, TCP, from, vip)
		if svc.Nat.IP() != backend.Addr() || bpf.Port(svc.NatPort) != backend.Port() || svc.Endpoint[0] != client.ID {
			t.Errorf("SVC entry %+v", svc)
		}
		flow, _ := n.FlowEntry(t, TCP, from, backend)
		if flow.Nat.IP() != vip.Addr() || bpf.Port(flow.NatPort) != vip.Port() || flow.Endpoint != [2]uint16{client.ID, web.ID} {
			t.Errorf("flow entry %+v", flow)
		}

		n.From(t, web, Segment(backend, from, SYN|ACK)).arrives(t, client, vip, from)
		n.state(t, TCP, from, vip, backend, bpf.CTNew)
		n.From(t, client, Segment(from, vip, ACK)).arrives(t, web, from, backend)
		n.state(t, TCP, from, vip, backend, bpf.CTEstablished)

		data := Segment(from, vip, ACK|PSH)
		data.Payload = []byte("GET / HTTP/1.0\r\n\r\n")
		got := n.From(t, client, data)
		got.arrives(t, web, from, backend)
		if string(got.Payload) != string(data.Payload) || got.Seq != data.Seq || got.Ack != data.Ack {
			t.Errorf("the segment changed: %+v", got.Packet)
		}
		n.From(t, web, Segment(backend, from, ACK)).arrives(t, client, vip, from)

		n.From(t, client, Segment(from, vip, FIN|ACK)).arrives(t, web, from, backend)
		n.state(t, TCP, from, vip, backend, bpf.CTClosing)
		n.From(t, web, Segment(backend, from, FIN|ACK)).arrives(t, client, vip, from)
		n.state(t, TCP, from, vip, backend, bpf.CTTimeWait)
		n.From(t, client, Segment(from, vip, ACK)).arrives(t, web, from, backend)
		n.state(t, TCP, from, vip, backend, bpf.CTTimeWait)
		// The peer did not hear that and says it again.
		n.From(t, web, Segment(backend, from, FIN|ACK)).arrives(t, client, vip, from)

		flow, _ = n.FlowEntry(t, TCP, from, backend)
		if flow.Packets != [2]uint64{5, 4} {
			t.Errorf("counted %d packets", flow.Packets)
		}
		if flow.Cookie != [2]uint64{} {
			t.Errorf("tethered to %d: a test run's socket is closed and has no port", flow.Cookie)
		}
	})
}
