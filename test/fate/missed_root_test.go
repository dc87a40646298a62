// SPDX-License-Identifier: Apache-2.0

//go:build root

package fate

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
)

// TestSocketsWhoseEndIsNotHeardLeaveNothing takes the tracepoints of TCP away, as a
// kernel does that does not call them: TIME_WAIT itself tells of the socket before it,
// and of what says nothing more the roll call.
func TestSocketsWhoseEndIsNotHeardLeaveNothing(t *testing.T) {
	cgroup := netns.NewCgroup(t, "node")
	n := packet.NewNode(t, packet.Options{MaxEntries: 4096, Hook: bpf.HookTracepoint, Cgroup: cgroup.Path})
	cgroup.Enter(t)
	for _, name := range []string{"on_tcp_destroy", "on_set_state"} {
		pins, err := filepath.Glob(filepath.Join(n.BPFFS, "v*", "links", "hook-"+name+"*"))
		if err != nil || len(pins) != 2 {
			t.Fatalf("%s is pinned as %q (%v)", name, pins, err)
		}
		for _, pin := range pins {
			if err := os.Remove(pin); err != nil {
				t.Fatal(err)
			}
		}
	}
	client, server := n.Pod(t), n.Pod(t)
	Serve(t, server.NS)
	n.Service(t, packet.TCP, netip.AddrPortFrom(vips[0], TCPPort), server.At(false, 8080))
	const count = 20
	if err := Churn(client.NS, 4, count, vips[:1], LateFIN); err != nil {
		t.Fatal(err)
	}
	held := func(side int) (flows, decisions int) {
		for k, e := range n.Entries(t) {
			switch {
			case k.Type == bpf.CTService && e.Cookie[0] != 0:
				decisions++
			case k.Type != bpf.CTService && e.Cookie[side] != 0:
				flows++
			}
		}
		return flows, decisions
	}
	if timeWaitHasCookie(t) {
		netns.Eventually(t, 10*time.Second, "TIME_WAIT to let the clients' flows go", func() bool {
			flows, decisions := held(0)
			return flows == 0 && decisions == 0
		})
	}
	if flows, _ := held(1); flows != count {
		t.Fatalf("%d of %d flows are held by their servers' sockets, whose ends were not heard", flows, count)
	}
	roll, _, err := n.RollCall([]string{client.Path(), server.Path()})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond)
	hour := 3600 * n.JiffiesPerSecond
	pass := bpf.Sweep{RollCall: roll, MissingTimeout: n.JiffiesPerSecond}
	for i := range pass.Timeout {
		pass.Timeout[i] = [3]uint64{hour, hour, hour}
	}
	if err := n.RunSweep(&pass); err != nil {
		t.Fatal(err)
	}
	if left := n.Entries(t); len(left) > 0 || pass.Socket != 2*count {
		t.Errorf("the sweep deleted %d entries for sockets that did not answer the roll call, %d are left", pass.Socket, len(left))
	}
}

// timeWaitHasCookie tells whether this kernel's mini-sockets are the sockets of what
// they send.
func timeWaitHasCookie(t *testing.T) bool {
	t.Helper()
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return major > 6 || major == 6 && minor >= 13
}
