// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"net/netip"
	"testing"

	"github.com/mooring-cni/mooring/bpf"
)

// A flow whose decision has no entry of its own has the same rows as one with it.
func TestAFlowWithoutASVCEntryHasItsRow(t *testing.T) {
	client, backend, frontend := netip.MustParseAddrPort("10.244.0.2:40000"), netip.MustParseAddrPort("10.244.0.3:8080"), netip.MustParseAddrPort("10.96.0.10:80")
	for name, c := range map[string]struct {
		initiator netip.AddrPort // on the wire
		change    func(*bpf.CTEntry)
	}{
		"to another pod": {client, func(*bpf.CTEntry) {}},
		"to itself": {netip.MustParseAddrPort("169.254.169.1:40000"), func(e *bpf.CTEntry) {
			e.Flags |= bpf.CTHairpin
			e.Origin, e.OriginPort = bpf.ToAddr(client.Addr()), bpf.Port(client.Port())
		}},
	} {
		t.Run(name, func(t *testing.T) {
			k := bpf.FlowKey(6, c.initiator, backend)
			e := bpf.CTEntry{
				Nat: bpf.ToAddr(frontend.Addr()), NatPort: bpf.Port(frontend.Port()), State: bpf.CTEstablished,
				Flags: bpf.CTAlone | bpf.CTEgress, Cookie: [2]uint64{7, 8}, Tether: [2]uint8{bpf.TetherHeld, bpf.TetherHeld}, Endpoint: [2]uint16{2, 3},
				Packets: [2]uint64{5, 4}, Bytes: [2]uint64{500, 400},
			}
			if k.Addr[1] == bpf.ToAddr(c.initiator.Addr()) {
				e.Flags |= bpf.CTInitiatorHigh
			}
			c.change(&e)
			rows := (&Manager{}).rows(&k, &e, 0)
			if len(rows) != 2 || rows[1].Type != "EGRESS" {
				t.Fatalf("the rows are %+v", rows)
			}
			svc := rows[0]
			if svc.Type != "SVC" || svc.Source != client.String() || svc.Destination != frontend.String() || svc.Translation != backend.String() {
				t.Errorf("the decision's row is %+v", svc)
			}
			if svc.Endpoint != 2 || svc.SocketCookie != 7 || !svc.Tethered || svc.Packets != 5 || svc.Bytes != 500 || svc.State != "established" {
				t.Errorf("the decision's row is %+v", svc)
			}
		})
	}
}
