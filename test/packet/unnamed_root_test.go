// SPDX-License-Identifier: Apache-2.0

//go:build root

package packet

import (
	"net/netip"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/test/netns"
)

// What a pod forwards for a namespace nested in it has no socket; nor has, before Linux
// 6.13, what a mini-socket sends over IPv6 when its entries are gone. An ACK is then not
// enough to make an entry; data is.
func TestAnACKWithoutASocket(t *testing.T) {
	cgroup := netns.NewCgroup(t, "node")
	n := NewNode(t, Options{MaxEntries: 4096, Hook: bpf.HookTracepoint, Cgroup: cgroup.Path})
	client, web := n.Pod(t), n.Pod(t)
	nested := &Pod{NS: netns.New(t, "nested"), V6: netip.MustParseAddr("fd00:10:244::77")}
	netns.Veth(t, client.NS, "inner", nested.NS, "eth0")
	copy(nested.MAC[:], nested.Link(t, "eth0").Attrs().HardwareAddr)
	copy(nested.HostMAC[:], client.Link(t, "inner").Attrs().HardwareAddr)
	client.Sysctl(t, "net.ipv6.conf.all.forwarding", "1")
	n.register(t, client, nested.V6)
	from, vip, backend := nested.At(true, 4000), VIP(true, 10, 80), web.At(true, 8080)
	n.Service(t, TCP, vip, backend)
	arrivals := web.Capture(t, "eth0")

	// send has the nested namespace send a segment, and says whether it arrives at the backend.
	send := func(to netip.AddrPort, flags uint8, payload string) (arrived bool) {
		t.Helper()
		arrivals.Reset()
		before := n.Dropped(t)["no_flow"]
		p := Segment(from, to, flags)
		p.From, p.To, p.Payload = nested.MAC, nested.HostMAC, []byte(payload)
		nested.send(t, "eth0", p.Bytes())
		netns.Eventually(t, 10*time.Second, "a segment to arrive, or to be dropped", func() bool {
			arrived = len(arrivals.Packets(func(p netns.Packet) bool {
				read, err := Read(p.Data)
				return err == nil && !p.Outgoing && read.Src == from && read.Dst == backend && read.Flags == flags
			})) > 0
			return arrived || n.Dropped(t)["no_flow"] > before
		})
		return arrived
	}
	unnamed := n.Hook.UnnamedACKs()
	t.Logf("an ACK without a socket may be a mini-socket's: %v", unnamed)
	flow := func() bool {
		_, there := n.FlowEntry(t, TCP, from, backend)
		return there
	}

	if !send(backend, ACK, "") {
		t.Error("an ACK between pods does not arrive")
	}
	if flow() == unnamed {
		t.Errorf("an ACK between pods has made an entry: %v", flow())
	}
	n.Flush(t)
	for _, s := range []struct {
		flags   uint8
		payload string
	}{{SYN, ""}, {ACK, "x"}, {ACK | PSH, "x"}, {FIN | ACK, ""}} {
		if !send(backend, s.flags, s.payload) || !flow() {
			t.Errorf("flags %#x, %d bytes: made an entry: %v", s.flags, len(s.payload), flow())
		}
		n.Flush(t)
	}

	// Through a service: with nothing of it in the tables, and with the decision alone.
	if arrived := send(vip, ACK, ""); arrived == unnamed || flow() == unnamed {
		t.Errorf("an ACK to a service arrived: %v, and made an entry: %v", arrived, flow())
	}
	n.Flush(t)
	send(vip, SYN, "")
	for key := range n.Entries(t) {
		for _, table := range n.tables {
			if key.Type == bpf.CTFlow {
				table.Delete(key) // in one of them it is
			}
		}
	}
	if !send(vip, ACK, "") {
		t.Error("an ACK to a service does not arrive where the decision is known")
	}
	if flow() == unnamed {
		t.Errorf("an ACK whose decision is known has made an entry: %v", flow())
	}
	if !send(vip, ACK|PSH, "x") || !flow() {
		t.Errorf("data whose decision is known: made an entry: %v", flow())
	}
}
