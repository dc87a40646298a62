// SPDX-License-Identifier: Apache-2.0

//go:build root

package north

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/scenario"
)

func TestMain(m *testing.M) {
	netns.OnInterrupt()
	code := m.Run()
	scenario.RemovePrograms()
	os.Exit(code)
}

// inGuest says that the machine is emulated, and slow.
func inGuest() bool { return os.Getenv("MOORING_KERNEL") != "" }

// connections is how many of each kind are made.
func connections() int {
	if inGuest() {
		return 20
	}
	return 1000
}

// with is the lab for a subtest.
func (l *Lab) with(t *testing.T) *Lab {
	own := *l
	own.T = t
	return &own
}

// A group of tests is what is proved of one matter, in a lab with two pods on either node.
type group struct {
	name  string
	mode  string // nodePort.mode; empty: of either
	tests []modeTest
}

type modeTest struct {
	name string
	run  func(t *testing.T, l *Lab)
}

// capacity is how many entries the nodes' tables have: few enough for a flood to fill them.
func capacity() int {
	if inGuest() {
		return 2048
	}
	return 32768
}

func TestServicesFromOutside(t *testing.T) {
	for _, mode := range Modes {
		t.Run(mode.String(), func(t *testing.T) {
			l := New(t, mode, "--conntrack-max-entries", fmt.Sprint(capacity()))
			l.Pods("a-1", "a-2", "b-1", "b-2")
			for _, g := range []group{
				reach, captured, who, inside, errorsAndMTU, processes, onePort, direct, networkPolicies, ends, restarts, floods,
				onTheWire, answersThemselves, // which turn offloads off
			} {
				if g.mode != "" && g.mode != mode.NodePort {
					continue
				}
				t.Run(g.name, func(t *testing.T) {
					for _, test := range g.tests {
						t.Run(test.name, func(t *testing.T) { test.run(t, l.with(t)) })
					}
				})
			}
		})
	}
}

// driven is how many packets the program of a node's driver has finished with.
func driven(t *testing.T, n *scenario.Node) (packets uint64) {
	t.Helper()
	pins, err := filepath.Glob(filepath.Join(n.BPFFS, "v*", "maps", "mooring_counters"))
	if err != nil || len(pins) != 1 {
		t.Fatalf("the counters of %s are pinned as %q (%v)", n.NodeName, pins, err)
	}
	counters, err := ebpf.LoadPinnedMap(pins[0], nil)
	if err != nil {
		t.Fatalf("open the counters of %s: %v", n.NodeName, err)
	}
	defer counters.Close()
	var perCPU []bpf.Counter
	if err := counters.Lookup(uint32(bpf.FromDriver), &perCPU); err != nil {
		t.Fatalf("read the counters of %s: %v", n.NodeName, err)
	}
	for _, c := range perCPU {
		packets += c.Packets
	}
	return packets
}

// parallel calls f with every number below count, several at a time, and gives
// the errors.
func parallel(count int, f func(i int) error) (failed []error) {
	const width = 8
	var mutex sync.Mutex
	var wait sync.WaitGroup
	next := make(chan int)
	for range width {
		wait.Go(func() {
			for i := range next {
				if err := f(i); err != nil {
					mutex.Lock()
					failed = append(failed, fmt.Errorf("%d: %w", i, err))
					mutex.Unlock()
				}
			}
		})
	}
	for i := range count {
		next <- i
	}
	close(next)
	wait.Wait()
	return failed
}

func report(t *testing.T, what string, count int, failed []error) {
	t.Helper()
	for _, err := range failed[:min(len(failed), 5)] {
		t.Errorf("%s: %v", what, err)
	}
	if len(failed) > 0 {
		t.Errorf("%s: %d of %d failed", what, len(failed), count)
	}
}

// check is that somebody answers, and sees the client that it has to see.
func (l *Lab) check(f Frontend, payload []byte) (pod string, err error) {
	a, err := l.Ask(f, payload)
	if err != nil {
		return "", err
	}
	if want := l.seenBy(a.Pod, f); !slices.Contains(want, a.Client.Addr()) {
		return "", fmt.Errorf("%s sees %s, want one of %v", a.Pod, a.Client, want)
	}
	return a.Pod, nil
}

// seenBy tells whom a pod sees that the client asked through node-a: the client
// itself, or, where the answer must come back by the node, that.
func (l *Lab) seenBy(pod string, f Frontend) []netip.Addr {
	if l.NodeOf(pod) == l.A || l.Mode.NodePort == "dsr" {
		return []netip.Addr{l.ClientFor(f)}
	}
	return []netip.Addr{l.A.IP, l.A.IP6}
}

// dropped is how many packets a node has dropped from outside for a reason.
func dropped(t *testing.T, n *scenario.Node, reason string) (sum int) {
	t.Helper()
	return droppedAt(t, n, "from_wire", reason) + droppedAt(t, n, "from_driver", reason)
}

func droppedAt(t *testing.T, n *scenario.Node, direction, reason string) (sum int) {
	t.Helper()
	for line := range strings.Lines(n.Drops()) {
		if strings.Contains(line, `direction="`+direction+`"`) && strings.Contains(line, `reason="`+reason+`"`) {
			words := strings.Fields(line)
			count, err := strconv.ParseFloat(words[len(words)-1], 64)
			if err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			sum += int(count)
		}
	}
	return sum
}

// eachFrontend runs a test for every frontend. UDP flows of the client's ports to
// the pods by other frontends are forgotten before each.
func (l *Lab) eachFrontend(t *testing.T, test func(t *testing.T, f Frontend)) {
	t.Helper()
	for _, f := range l.Frontends() {
		t.Run(f.String(), func(t *testing.T) {
			l.flush()
			test(t, f)
		})
	}
}

var reach = group{name: "clients reach services", tests: []modeTest{
	{"pods of the node that is asked", func(t *testing.T, l *Lab) { l.thousands(t, "a-1", "a-2") }},
	{"pods of another node", func(t *testing.T, l *Lab) { l.thousands(t, "b-1", "b-2") }},
	{"pods of both", func(t *testing.T, l *Lab) { l.thousands(t, "a-1", "b-1") }},
}}

// Who listens on the uplink as well, as tcpdump does, changes nothing for anybody.
var captured = group{name: "a capture on the uplink changes nothing", tests: []modeTest{{"capture", func(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"a-1", "b-1"}})
	finished := map[bool]uint64{}
	for _, listening := range []bool{false, true} {
		if listening {
			l.A.Capture(t, netns.Uplink)
		}
		start := driven(t, l.A)
		l.eachFrontend(t, func(t *testing.T, f Frontend) {
			report(t, f.String(), 20, parallel(20, func(i int) error { _, err := l.check(f, Payload(i, 300)); return err }))
		})
		finished[listening] = driven(t, l.A) - start
	}
	// Not even for the driver's program: its flows stay its own.
	if finished[true] < finished[false]/2 {
		t.Errorf("the driver's program has finished with %d packets, and with %d while somebody listened", finished[false], finished[true])
	}
}}}}

// thousands of new connections all get their answer, through every frontend.
func (l *Lab) thousands(t *testing.T, backends ...string) {
	l.Service(Spec{Pods: backends})
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		var mutex sync.Mutex
		before := driven(t, l.A)
		answered := map[string]int{}
		count := connections()
		if l.Mode.XDP == "generic" {
			count = min(count, 100) // it does what native does
		}
		report(t, f.String(), count, parallel(count, func(i int) error {
			pod, err := l.check(f, Payload(i, 1+i%1200))
			mutex.Lock()
			defer mutex.Unlock()
			answered[pod]++
			return err
		}))
		least := 0 // that the driver's program has to do: what the stack or tc has to be in is theirs
		for pod, answers := range answered {
			if l.Mode.XDP == "off" || strings.HasSuffix(pod, "-host") {
				continue
			}
			// With dsr tc begins each flow, and goes on with those that other nodes answer.
			if l.Mode.NodePort == "snat" || l.NodeOf(pod) == l.A && f.Network == "tcp" {
				least += answers
			}
		}
		// One in 65,536 looks as if its sum were still to be filled in: that three of a thousand do is out of question.
		least -= min(least, 2)
		if fast := driven(t, l.A) - before; fast < uint64(least) || l.Mode.XDP == "off" && fast != 0 {
			t.Errorf("the driver's program did %d packets, want %d", fast, least)
		}
		for _, pod := range backends {
			// Even with 20 it is less likely than 1 in 100,000 that one of two gets none; with 1000
			// a share below a third is out of question.
			if answered[pod] == 0 || count >= 1000 && answered[pod] < count/3 {
				t.Errorf("%s was chosen %d times: %v", pod, answered[pod], answered)
			}
		}
	})
}

func netAddr(a netip.AddrPort) net.Addr { return net.UDPAddrFromAddrPort(a) }
