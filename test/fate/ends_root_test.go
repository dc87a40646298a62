// SPDX-License-Identifier: Apache-2.0

//go:build root

package fate

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
)

// TestEveryEndOfASocketEndsItsEntries is the short form of TestFate, for kernels that
// are emulated: no daemon, one load of the programs for each mode of the hook, and the
// modes wait for TIME_WAIT together.
func TestEveryEndOfASocketEndsItsEntries(t *testing.T) {
	modes := []string{bpf.HookTrampoline, bpf.HookTracepoint}
	if hook := os.Getenv("MOORING_HOOK"); hook != "" {
		modes = []string{hook}
	} else if os.Getenv("MOORING_KERNEL") == "" {
		// The machine's own kernel need not have trampolines.
		modes = []string{bpf.HookAuto}
	}
	cgroup := netns.NewCgroup(t, "node")
	cgroup.Enter(t)
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			everyEnd(t, mode, cgroup.Path)
		})
	}
}

func everyEnd(t *testing.T, hook, cgroup string) {
	n := packet.NewNode(t, packet.Options{MaxEntries: 16384, Hook: hook, Cgroup: cgroup})
	hook = n.Hook.Mode
	if hook == bpf.HookOff {
		t.Fatalf("no hook: %s", n.Hook.Reason)
	}
	client, server := n.Pod(t), n.Pod(t)
	Serve(t, server.NS)
	for i, vip := range vips {
		n.Service(t, packet.TCP, netip.AddrPortFrom(vip, TCPPort), server.At(i == 1, 8080))
		n.Service(t, packet.TCP, netip.AddrPortFrom(vip, RefusedPort), server.At(i == 1, 8081))
		n.Service(t, packet.UDP, netip.AddrPortFrom(vip, UDPPort), server.At(i == 1, 5353))
	}

	// As the daemon does.
	burying, stop := context.WithCancel(context.Background())
	var buried sync.WaitGroup
	buried.Go(func() {
		for tick := time.NewTicker(250 * time.Millisecond); burying.Err() == nil; <-tick.C {
			if _, _, err := n.Bury(); err != nil {
				t.Error(err)
				return
			}
		}
	})
	t.Cleanup(func() {
		stop()
		buried.Wait()
	})
	gone := func(t *testing.T, within time.Duration, expected func(bpf.CTEntry) bool) {
		t.Helper()
		var left []string
		began := time.Now()
		for {
			left = left[:0]
			for k, e := range n.Entries(t) {
				if !expected(e) {
					left = append(left, fmt.Sprintf("\t%+v %+v\n", k, e))
				}
			}
			if len(left) == 0 {
				return
			}
			if time.Since(began) > within {
				t.Fatalf("%d entries are left after %v:\n%s", len(left), within, strings.Join(left[:min(len(left), 10)], ""))
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	waits := func(e bpf.CTEntry) bool { return e.State == bpf.CTTimeWait }
	none := func(bpf.CTEntry) bool { return false }

	count := connections(700)
	for kind := range kinds {
		t.Run(kind.String(), func(t *testing.T) {
			if err := Churn(client.NS, 4, count/7, vips, kind); err != nil {
				t.Fatal(err)
			}
			gone(t, grace(hook), waits)
		})
	}
	// What the kernel says in place of a socket is named differently from version to version.
	t.Run("SYNs that are sent again", func(t *testing.T) {
		synsAgain(t, client, server)
		gone(t, grace(hook), waits)
	})
	t.Run("a client that forgets", func(t *testing.T) {
		forgetful(t, client)
		gone(t, grace(hook), waits)
	})
	inTimeWait := func(t *testing.T) (count int) {
		for _, e := range n.Entries(t) {
			if waits(e) {
				count++
			}
		}
		return count
	}
	waiting := inTimeWait(t)
	t.Logf("%s: %d entries wait with TIME_WAIT", hook, waiting)
	// With tracepoints they end with the server's socket, which has heard all.
	if waiting == 0 && hook == bpf.HookTrampoline {
		t.Error("no entry is there for what is in TIME_WAIT")
	}

	// Beyond net.ipv4.tcp_max_tw_buckets a socket just closes: nothing is there to take its flow over.
	t.Run("no room for TIME_WAIT", func(t *testing.T) {
		for _, ns := range []*netns.NS{client.NS, server.NS} {
			ns.Sysctl(t, "net.ipv4.tcp_max_tw_buckets", "0")
		}
		waiting := inTimeWait(t)
		for _, kind := range []Kind{ClientCloses, ServerCloses, LateFIN} {
			if err := Churn(client.NS, 4, count/7, vips, kind); err != nil {
				t.Fatal(err)
			}
		}
		gone(t, grace(hook), waits)
		// A tracepoint does not hear whether there is room: these wait with the others.
		if hook == bpf.HookTrampoline {
			if now := inTimeWait(t); now > waiting {
				t.Errorf("%d entries waited with TIME_WAIT, and %d do where there is none", waiting, now)
			}
		}
	})

	t.Run("a socket with many flows", func(t *testing.T) {
		flows := connections(1000)
		err := client.Do(func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			for i := range flows {
				if err := unix.Sendto(fd, []byte{1}, 0, sockaddr(server.V4, uint16(10000+i))); err != nil && err != unix.ECONNREFUSED {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		hour := 3600 * n.JiffiesPerSecond
		pass := bpf.Sweep{GoneCrowds: 1}
		for i := range pass.Timeout {
			pass.Timeout[i] = [3]uint64{hour, hour, hour}
		}
		// Its last datagrams may still hold the socket: the daemon waits for its end to be counted.
		netns.Eventually(t, 30*time.Second, "the end of the socket", func() bool {
			var ended []uint64
			if err := n.CTStats.Lookup(bpf.StatCrowds, &ended); err != nil {
				t.Fatal(err)
			}
			sum := uint64(0)
			for _, e := range ended {
				sum += e
			}
			return sum > 0
		})
		if err := n.RunSweep(&pass); err != nil {
			t.Fatal(err)
		}
		t.Logf("%d flows of one socket, %d entries found by its cookie", flows, pass.Socket)
		gone(t, grace(hook), waits)
	})

	t.Run("TIME_WAIT", func(t *testing.T) { gone(t, 65*time.Second+grace(hook), none) })
	var failed []uint64
	for _, stat := range []any{bpf.StatInsertFailed, bpf.StatDeleteFailed, bpf.StatDeletedExpired, bpf.StatGraceFull} {
		if err := n.CTStats.Lookup(stat, &failed); err != nil {
			t.Fatal(err)
		}
		for cpu, f := range failed {
			if f > 0 {
				t.Errorf("statistic %v counts %d on processor %d", stat, f, cpu)
			}
		}
	}
}
