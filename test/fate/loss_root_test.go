// SPDX-License-Identifier: Apache-2.0

//go:build root

package fate

import (
	"os"
	"sync"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/test/netns"
)

// TestLostPacketsCostTimeAndNoConnection loses packets behind the programs, which then know
// of some that nobody got, as where a queue overflows: resets and last acknowledgements of
// connections whose ports are used again soon.
func TestLostPacketsCostTimeAndNoConnection(t *testing.T) {
	duration := 15 * time.Second
	if text := os.Getenv("FATE_LOSS"); text != "" {
		var err error
		if duration, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	n := newNode(t, 3)
	client := n.Pod("client")
	// Few ports, so that each is used again before what the last connection left has ended.
	client.NS.Sysctl(t, "net.ipv4.ip_local_port_range", "32768 33767")
	for _, ns := range []*netns.NS{client.NS, n.Pod("server0").NS, n.Pod("server1").NS, n.Pod("server2").NS} {
		ns.Sh(t, `nft -f - <<'EOF'
table inet loss {
	chain lost {
		type filter hook prerouting priority -400
		meta l4proto tcp numgen random mod 50 == 0 drop
	}
}
EOF`)
	}
	end := time.Now().Add(duration)
	var all sync.WaitGroup
	var mutex sync.Mutex
	flows := 0
	for range 4 {
		all.Go(func() {
			for time.Now().Before(end) && !t.Failed() {
				if err := Churn(client.NS, 25, 250, vips, ServerCloses, Reset, Refused); err != nil {
					t.Error(err)
				}
				mutex.Lock()
				flows += 250
				mutex.Unlock()
			}
		})
	}
	all.Wait()
	t.Logf("%d flows; dropped:\n%s", flows, n.Drops())
}
