// SPDX-License-Identifier: Apache-2.0

//go:build root

package packet

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/test/netns"
)

// The packets of a flow that its socket has by heart meet no table. What the table
// says of the flow is not far behind, and where a timer could end its entry, not at all.
func TestTheTableHasNewsOfWhatASocketKnows(t *testing.T) {
	n := NewNode(t, Options{Hook: bpf.HookAuto})
	client, server := n.Pod(t), n.Pod(t)
	vip := netip.MustParseAddrPort("10.96.0.10:53")
	n.Service(t, UDP, vip, server.At(false, 5353))
	netns.UDP(t, server.NS, "0.0.0.0:5353", func(request []byte, _ net.Addr) []byte { return request })

	for _, connected := range []bool{true, false} {
		name := map[bool]string{true: "a connected socket's", false: "another's"}[connected]
		t.Run(name, func(t *testing.T) {
			c, err := client.ListenPacket("udp", "0.0.0.0:0")
			if connected {
				var d net.Conn
				if d, err = client.Dial("udp", vip.String()); err == nil {
					c = d.(*net.UDPConn)
				}
			}
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			udp, sent := c.(*net.UDPConn), uint64(0)
			ask := func(times int) {
				t.Helper()
				for range times {
					udp.SetDeadline(time.Now().Add(5 * time.Second))
					var err error
					if connected {
						_, err = udp.Write([]byte("news"))
					} else {
						_, err = udp.WriteToUDPAddrPort([]byte("news"), vip)
					}
					if err == nil {
						_, _, err = udp.ReadFromUDPAddrPort(make([]byte, 16))
					}
					if err != nil {
						t.Fatalf("after %d datagrams: %v", sent, err)
					}
					sent++
				}
			}
			known := func() uint64 {
				t.Helper()
				from := netip.AddrPortFrom(client.IP(false), udp.LocalAddr().(*net.UDPAddr).AddrPort().Port())
				e, there := n.FlowEntry(t, UDP, from, server.At(false, 5353))
				if !there {
					t.Fatal("there is no entry")
				}
				return e.Packets[0]
			}
			ask(20)
			time.Sleep(1100 * time.Millisecond)
			behind := uint64(1) // the news are of the packets before this one
			if connected {
				behind += 16
			}
			ask(int(behind))
			if got := known(); got+behind < sent {
				t.Errorf("the table knows of %d packets, want %d, at most %d less", got, sent, behind)
			}
		})
	}
}
