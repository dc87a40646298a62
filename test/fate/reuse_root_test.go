// SPDX-License-Identifier: Apache-2.0

//go:build root

package fate

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
	"github.com/mooring-cni/mooring/test/scenario"
)

// TestTuplesAreReusedUnderTheReaper makes connections of the same few tuples as fast
// as it can, while pass follows pass of the reaper. A deletion of what lives breaks a
// connection, or takes an idle one's entry.
func TestTuplesAreReusedUnderTheReaper(t *testing.T) {
	count, established := connections(40_000), 200
	hook := os.Getenv("MOORING_HOOK")
	if hook == "" {
		hook = "auto"
	}
	cgroup := netns.NewCgroup(t, "node")
	n := packet.NewNode(t, packet.Options{MaxEntries: 65536, Hook: hook, Cgroup: cgroup.Path})
	cgroup.Enter(t)
	client := n.Pod(t)
	var backends []netip.AddrPort
	var idles []netip.AddrPort
	var servers []*netns.NS
	for range 4 {
		server := n.Pod(t)
		Serve(t, server.NS)
		servers = append(servers, server.NS)
		backends = append(backends, server.At(false, 8080))
		idles = append(idles, server.At(false, idlePort))
	}
	n.Service(t, packet.TCP, netip.AddrPortFrom(vips[0], TCPPort), backends...)
	n.Service(t, packet.TCP, idleAddress, idles...)
	idle := Establish(t, client.NS, idleAddress, established, servers...)

	hour := 3600 * n.JiffiesPerSecond
	reap, stop := context.WithCancel(t.Context())
	var reaping sync.WaitGroup
	passes, missing := 0, uint64(0)
	reaping.Go(func() {
		for reap.Err() == nil {
			if _, _, err := n.Bury(); err != nil {
				t.Error(err)
				return
			}
			namespaces := []string{client.Path()}
			for _, s := range servers {
				namespaces = append(namespaces, s.Path())
			}
			called := jiffies(t, n)
			roll, _, err := n.RollCall(namespaces)
			if err != nil {
				t.Error(err)
				return
			}
			suspects := unconfirmed(t, n, roll)
			// What has been heard since the roll was called need not have answered it.
			pass := bpf.Sweep{RollCall: roll, MissingTimeout: n.JiffiesPerSecond + jiffies(t, n) - called}
			for i := range pass.Timeout {
				pass.Timeout[i] = [3]uint64{hour, hour, hour}
			}
			// What is over goes at once.
			pass.Timeout[bpf.CTClosing] = [3]uint64{1, hour, hour}
			pass.Timeout[bpf.CTTimeWait] = [3]uint64{1, hour, hour}
			if err := n.RunSweep(&pass); err != nil {
				t.Error(err)
				return
			}
			if pass.Socket > 0 {
				tellOrphans(t, pass.Socket, suspects, append([]*netns.NS{client.NS}, servers...))
			}
			missing += pass.Socket
			passes++
		}
	})
	began := time.Now()
	err := reuse(client.NS, count, 4, 16, func(port uint16) string {
		return ofPort(t, n, port, append([]*netns.NS{client.NS}, servers...))
	})
	took := time.Since(began)
	stop()
	reaping.Wait()
	if err != nil {
		t.Error(err)
	}
	t.Logf("%s: %d connections on %d tuples in %.1f s (%.0f/s), %d passes of the reaper, %d entries whose end was missed",
		n.Hook.Mode, count, 4*16, took.Seconds(), float64(count)/took.Seconds(), passes, missing)
	if dropped := n.Dropped(t); len(dropped) > 0 {
		t.Logf("dropped: %v", dropped)
	}
	// A kernel that calls no tracepoint is rare, and never does so where it has trampolines.
	if limit := uint64(count / 10_000); missing > limit || n.Hook.Mode == bpf.HookTrampoline && missing > 0 {
		t.Errorf("the ends of %d entries' sockets were missed", missing)
	}
	live := 0
	for k, e := range n.Entries(t) {
		remembered := k.Type == bpf.CTService && k.Port[1] == bpf.Port(idleAddress.Port()) ||
			e.Flags&bpf.CTAlone != 0 && e.NatPort == bpf.Port(idleAddress.Port())
		if remembered && e.State == bpf.CTEstablished {
			live++
		}
	}
	if live != established {
		t.Errorf("%d of %d idle connections have an entry", live, established)
	}
	if broken := idle.Broken(); len(broken) > 0 {
		t.Errorf("%d idle connections are broken, the first: %v", len(broken), broken[0])
	}
	var failed []uint64
	if err := n.CTStats.Lookup(bpf.StatInsertFailed, &failed); err != nil || failed[0] != 0 {
		t.Errorf("insertions failed: %v (%v)", failed, err)
	}
}

// jiffies is what entries are stamped with now.
func jiffies(t *testing.T, n *packet.Node) uint64 {
	now, err := n.Jiffies()
	if err != nil {
		t.Error(err)
	}
	return now
}

// A suspect is an entry that a pass may hold for an orphan.
type suspect struct {
	key   bpf.CTKey
	entry bpf.CTEntry
	quiet uint64 // jiffies without a packet
}

// unconfirmed are the entries that no socket has confirmed, or that somebody is
// deleting, and that were not heard of for long.
func unconfirmed(t *testing.T, n *packet.Node, roll uint32) (suspects []suspect) {
	now := jiffies(t, n)
	for k, e := range n.Entries(t) {
		claimed, owned := e.Life&1 != 0, e.Cookie != [2]uint64{}
		if quiet := now - e.Seen; (owned && e.Confirmed != roll || claimed) && int64(quiet) > int64(n.JiffiesPerSecond)/2 {
			suspects = append(suspects, suspect{k, e, quiet})
		}
	}
	return suspects
}

// tellOrphans tells what a pass took for orphans. That of a living socket is never one.
// Of others the end was missed, as kernels do that do not call their tracepoints: that is
// what the pass is for, and no end is missed where trampolines tell of it.
func tellOrphans(t *testing.T, deleted uint64, suspects []suspect, pods []*netns.NS) {
	cookies, err := Cookies(pods...)
	if err != nil {
		t.Error(err)
	}
	for _, s := range suspects {
		t.Logf("of %d orphans: %d jiffies without a packet, key %+v, entry %+v", deleted, s.quiet, s.key, s.entry)
		for side, cookie := range s.entry.Cookie {
			if cookies[cookie] {
				t.Errorf("it is no orphan: the socket of side %d lives", side)
			}
		}
	}
}

// ofPort is what the tables and the kernel know of a port.
func ofPort(t *testing.T, n *packet.Node, port uint16, pods []*netns.NS) string {
	var b strings.Builder
	now := jiffies(t, n)
	for k, e := range n.Entries(t) {
		if k.Port[0] == bpf.Port(port) || k.Port[1] == bpf.Port(port) {
			fmt.Fprintf(&b, "\t%d jiffies without a packet: %+v %+v\n", now-e.Seen, k, e)
		}
	}
	for _, pod := range pods {
		err := pod.Do(func() error {
			for _, file := range []string{"tcp", "tcp6"} {
				all, err := os.ReadFile("/proc/thread-self/net/" + file)
				if err != nil {
					return err
				}
				for line := range strings.Lines(string(all)) {
					if strings.Contains(line, fmt.Sprintf(":%04X ", port)) {
						fmt.Fprintf(&b, "\t%s: %s", pod.Name(), line)
					}
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	return b.String()
}

// reuse makes connections from a pod, each thread from a few ports of its own turn
// by turn. Each is aborted, so that its tuple is free at once.
func reuse(client *netns.NS, count, threads, ports int, witness func(port uint16) string) error {
	var wait sync.WaitGroup
	var next atomic.Int64
	errs := make([]error, threads)
	for thread := range threads {
		wait.Go(func() {
			errs[thread] = client.Do(func() error {
				for i := 0; next.Add(1) <= int64(count); i++ {
					if err := fromPort("tcp", uint16(20000+thread*ports+i%ports), witness); err != nil {
						return fmt.Errorf("connection %d of thread %d: %w", i, thread, err)
					}
				}
				return nil
			})
		})
	}
	wait.Wait()
	return errors.Join(errs...)
}

// TestLiveConnectionsOutliveAChurnInASmallTable makes many times more flows than
// the table has room for, beside connections that live.
func TestLiveConnectionsOutliveAChurnInASmallTable(t *testing.T) {
	const capacity = 8192
	count, established := connections(50_000), 1000
	if os.Getenv("MOORING_KERNEL") != "" {
		established = 100
	}
	n := newNode(t, 2, "--conntrack-max-entries", fmt.Sprint(capacity))
	n.Write("idle.yaml", idleService)
	waitForService(t, n, idleAddress)
	idle := Establish(t, n.Pod("client").NS, idleAddress, established, n.Pod("server0").NS, n.Pod("server1").NS)
	before := stats(t, n)
	began := time.Now()
	if err := Churn(n.Pod("client").NS, 8, count, vips, ServerCloses, ClientCloses, Reset, Refused, ConnectedUDP, UnconnectedUDP); err != nil {
		t.Error(err)
	}
	took := time.Since(began)
	after := stats(t, n)
	t.Logf("%s: %d flows in %.1f s (%.0f/s): %+v", hookOf(t, n), count, took.Seconds(), float64(count)/took.Seconds(), after)
	if after.InsertFailed != before.InsertFailed {
		t.Errorf("%d insertions failed", after.InsertFailed-before.InsertFailed)
	}
	if broken := idle.Broken(); len(broken) > 0 {
		t.Errorf("%d of %d live connections are broken, the first: %v", len(broken), idle.Len(), broken[0])
	}
}

// spread makes flows from one port, one after the other, and counts where each went.
func spread(t *testing.T, n *scenario.Node, served []*Served, network string, count int) (hits []int) {
	t.Helper()
	asked := func() (so []int) {
		for _, s := range served {
			so = append(so, int(map[string]*atomic.Int64{"tcp": &s.TCP, "udp": &s.UDP}[network].Load()))
		}
		return so
	}
	before := asked()
	err := n.Pod("client").Do(func() error {
		for range count {
			if err := fromPort(network, fixedPort); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sum := 0
	for i, n := range asked() {
		hits = append(hits, n-before[i])
		sum += n - before[i]
	}
	if sum != count {
		t.Errorf("%d of %d flows reached servers: %v", sum, count, hits)
	}
	return hits
}

// uneven is chi-square of the hits against equal shares: of 3 degrees of freedom
// with 4 servers.
func uneven(hits []int, count int) (chi2 float64) {
	share := float64(count) / float64(len(hits))
	for _, n := range hits {
		chi2 += (float64(n) - share) * (float64(n) - share) / share
	}
	return chi2
}

// tooUneven is what chi-square with 3 degrees of freedom exceeds once in a million
// runs of fair dice. Of four shares one or the other is off by 3 sigma once in a
// hundred runs, and a test that fails so often proves nothing; what is looked for, a
// port that sticks to a backend or two, has a chi-square of a thousand.
const tooUneven = 30.66

func sigma(count int) float64 { return math.Sqrt(float64(count) * (1.0 / servers) * (1 - 1.0/servers)) }

// TestWithoutHookEverythingWorks is what is told beside the figures of
// the hook: timers only, and everything still correct.
func TestWithoutHookEverythingWorks(t *testing.T) {
	t.Setenv("MOORING_HOOK", "off")
	n, served := newServedNode(t, servers)
	if hook := hookOf(t, n); hook != "off" {
		t.Fatalf("hook mode %s", hook)
	}
	count := connections(3500)
	if err := Churn(n.Pod("client").NS, 4, count, vips, ServerCloses, ClientCloses, Reset, Refused, ConnectedUDP, UnconnectedUDP, LateFIN); err != nil {
		t.Error(err)
	}
	for _, c := range entries(t, n) {
		if c.Tethered || c.SocketCookie != 0 {
			t.Fatalf("an entry is tethered though nobody would notice the end of its socket: %+v", c)
		}
	}
	t.Logf("off: %d rows are left of %d flows", len(entries(t, n)), count)
	for _, network := range []string{"tcp", "udp"} {
		hits := spread(t, n, served, network, connections(1000))
		t.Logf("off: %s flows from one port: %v, chi-square %.1f", network, hits, uneven(hits, connections(1000)))
	}
	idle := netip.AddrPortFrom(vips[0], TCPPort)
	c, err := n.Pod("client").Dial("tcp", idle.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// Timers do not cut what is used.
	if err := ask(c, byte(ClientCloses)); err != nil {
		t.Error(err)
	}
}
