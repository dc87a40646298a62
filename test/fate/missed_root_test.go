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
	deaf(t, n.BPFFS)
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

// deaf lets nobody hear the ends of TCP sockets of the daemon whose pins are below bpffs.
func deaf(t *testing.T, bpffs string) {
	t.Helper()
	for _, name := range []string{"on_tcp_destroy", "on_set_state"} {
		pins, err := filepath.Glob(filepath.Join(bpffs, "v*", "links", "hook-"+name+"*"))
		if err != nil || len(pins) != 2 {
			t.Fatalf("%s is pinned as %q (%v)", name, pins, err)
		}
		for _, pin := range pins {
			if err := os.Remove(pin); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestUnheardEndsAreFoundInTime has a daemon look for them that has little to do else, and
// whose backends change at times: passes for which it was asked make it no lazier.
func TestUnheardEndsAreFoundInTime(t *testing.T) {
	n := newNode(t, 2, "--conntrack-hook", "tracepoint")
	for i := range 12 {
		n.Write("changing.yaml", fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: changing, namespace: default}\nspec: {clusterIP: 10.96.0.99, ports: [{port: 80}]}\n"+
			"---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: changing, namespace: default, labels: {kubernetes.io/service-name: changing}}\naddressType: IPv4\nports: [{port: 80}]\n"+
			"endpoints: [{addresses: [10.244.9.%d]}]\n", i+1))
		time.Sleep(300 * time.Millisecond) // or several changes have one pass
	}
	deaf(t, n.BPFFS)
	if err := Churn(n.Pod("client").NS, 4, 20, vips[:1], LateFIN); err != nil {
		t.Fatal(err)
	}
	if found := entries(t, n); len(found) < 20 {
		t.Fatalf("%d entries are left of 20 flows whose ends were not heard:\n%s", len(found), show(found))
	}
	left(t, n, unheard, nothing)
}

// unheard is how long an entry may be left: until the next roll call, and the one after it where
// the flow had ended just before.
const unheard = 140 * time.Second

// TestWhoEndsBuriesWhoEndedBefore has nobody who takes out what sockets left: others' ends do.
func TestWhoEndsBuriesWhoEndedBefore(t *testing.T) {
	cgroup := netns.NewCgroup(t, "node")
	n := packet.NewNode(t, packet.Options{MaxEntries: 4096, Hook: bpf.HookAuto, Cgroup: cgroup.Path})
	cgroup.Enter(t)
	if n.Hook.Mode == bpf.HookOff {
		t.Fatalf("no hook: %s", n.Hook.Reason)
	}
	client, server := n.Pod(t), n.Pod(t)
	Serve(t, server.NS)
	n.Service(t, packet.UDP, netip.AddrPortFrom(vips[0], UDPPort), server.At(false, 5353))
	one := func() {
		if err := client.Do(func() error { return One(ConnectedUDP, vips[0]) }); err != nil {
			t.Fatal(err)
		}
	}
	const count = 20
	for range count {
		one()
	}
	first := n.Entries(t)
	if len(first) == 0 {
		t.Fatalf("no entry is there of %d flows that have just ended", count)
	}
	left := func() (left int) {
		now := n.Entries(t)
		for k, e := range first {
			// Not one that another flow has taken over.
			if later, there := now[k]; there && later.Life == e.Life {
				left++
			}
		}
		return left
	}
	// Without others they stay, however long their grace is over.
	time.Sleep(2500 * time.Millisecond)
	if left := left(); left != len(first) {
		t.Fatalf("%d of %d entries are left though nothing has ended since", left, len(first))
	}
	// Each takes out two.
	for range count/2 + 1 {
		one()
	}
	if left := left(); left != 0 {
		t.Errorf("%d of %d entries are left", left, len(first))
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

// TestDroppedPacketsLeaveNoDecision looks at connections that may not begin: their
// sockets know of no flow, so that what is held for them nobody would end.
func TestDroppedPacketsLeaveNoDecision(t *testing.T) {
	cgroup := netns.NewCgroup(t, "node")
	n := packet.NewNode(t, packet.Options{MaxEntries: 4096, Policy: true, Hook: bpf.HookAuto, Cgroup: cgroup.Path})
	cgroup.Enter(t)
	client, server := n.Pod(t), n.Pod(t)
	Serve(t, server.NS)
	n.Service(t, packet.TCP, netip.AddrPortFrom(vips[0], TCPPort), server.At(false, 8080))
	rulesets := func(ofServer bpf.EndpointPolicy) {
		open := bpf.EndpointPolicy{Ruleset: [2]uint64{bpf.RulesetOpen, bpf.RulesetOpen}}
		for id, p := range map[uint16]bpf.EndpointPolicy{client.ID: open, server.ID: ofServer} {
			if err := n.Policies.Put(uint32(id), p); err != nil {
				t.Fatal(err)
			}
		}
		if err := n.Invalidate(); err != nil {
			t.Fatal(err)
		}
	}
	decisions := func() (held []string) {
		for k, e := range n.Entries(t) {
			if k.Type == bpf.CTService && e.Cookie[0] != 0 {
				held = append(held, fmt.Sprintf("%+v %+v", k, e))
			}
		}
		return held
	}
	connect := func() chan error {
		done := make(chan error, 1)
		go func() { done <- client.Do(func() error { return fromPort("tcp", 20000) }) }()
		return done
	}
	dropped := func(reason string) func() bool {
		before := n.Dropped(t)[reason]
		return func() bool { return n.Dropped(t)[reason] > before }
	}

	rulesets(bpf.EndpointPolicy{Ruleset: [2]uint64{99, 99}})
	denied := dropped("policy_unknown")
	done := connect()
	netns.Eventually(t, 10*time.Second, "a policy to drop a SYN", denied)
	if held := decisions(); len(held) > 0 {
		t.Errorf("a SYN that a policy has dropped left %q", held)
	}
	rulesets(bpf.EndpointPolicy{Ruleset: [2]uint64{bpf.RulesetOpen, bpf.RulesetOpen}})
	if err := <-done; err != nil {
		t.Fatalf("a SYN that was sent again: %v", err)
	}

	// Somebody has begun to delete the last flow's entry, and goes on later.
	claim := func(life uint32) {
		n.SetEntries(t, func(k bpf.CTKey, e *bpf.CTEntry) {
			if k.Type == bpf.CTFlow {
				e.Life = e.Life&^1 | life
			}
		})
	}
	netns.Eventually(t, 10*time.Second, "both sockets to let go of their flow", func() bool {
		for _, e := range n.Entries(t) {
			if e.Cookie != [2]uint64{} {
				return false
			}
		}
		return true
	})
	claim(1)
	busy := dropped("tuple_busy")
	done = connect()
	netns.Eventually(t, 10*time.Second, "a SYN to meet an entry that is being deleted", busy)
	if held := decisions(); len(held) > 0 {
		t.Errorf("a SYN whose tuple was busy left %q", held)
	}
	claim(0)
	if err := <-done; err != nil {
		t.Fatalf("a SYN that was sent again: %v", err)
	}
}
