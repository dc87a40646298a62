// SPDX-License-Identifier: Apache-2.0

//go:build root

package fate

import (
	"fmt"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/scenario"
)

// TestAfterAChurnEntriesAreLiveFlows is the soak: connections of every kind, pods that
// come and go with their connections open, a daemon that is killed and restarted, with
// another hook at times. FATE_SOAK=10m is what the figures are given for.
func TestAfterAChurnEntriesAreLiveFlows(t *testing.T) {
	duration := 10 * time.Second
	if text := os.Getenv("FATE_SOAK"); text != "" {
		var err error
		if duration, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	n := newNode(t, 3)
	n.Write("idle.yaml", idleService)
	waitForService(t, n, idleAddress)
	client := n.Pod("client").NS
	servers := []*netns.NS{n.Pod("server0").NS, n.Pod("server1").NS, n.Pod("server2").NS}
	idle := Establish(t, client, idleAddress, 50, servers...)

	end := time.Now().Add(duration)
	all := []Kind{ServerCloses, ClientCloses, Reset, Refused, ConnectedUDP, UnconnectedUDP, LateFIN}
	flows := 0
	var churning sync.WaitGroup
	churning.Go(func() {
		for time.Now().Before(end) && !t.Failed() {
			if err := Churn(client, 4, 700, vips, all...); err != nil {
				t.Errorf("%v\n%s", err, knownOf(t, n, err))
			}
			flows += 700
		}
	})
	hooks := []string{"tracepoint", hookOf(t, n), "auto"}
	crashes, switches := 0, 0
	var samples []string
	for i := 0; time.Now().Before(end) && !t.Failed(); i++ {
		passing := n.AddPod("passing")
		var open []net.Conn
		for range 5 {
			c, err := passing.Dial("tcp", idleAddress.String())
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, c)
		}
		if err := Churn(passing.NS, 2, 70, vips, all...); err != nil {
			t.Error(err)
		}
		n.DeletePod("passing")
		for _, c := range open {
			c.Close()
		}
		switch i % 4 {
		case 1:
			n.Crash()
			crashes++
			n.Up()
		case 3:
			if err := n.Down(); err != nil {
				t.Errorf("mooringd ended: %v", err)
			}
			n.Flags[1] = hooks[switches%len(hooks)]
			switches++
			n.Up()
		default:
			s := stats(t, n)
			samples = append(samples, fmt.Sprintf("%d entries %d KiB", s.Entries, resident(t, n)))
		}
	}
	churning.Wait()
	// Refusals and what comes for a flow that was reset, if no flow failed.
	t.Logf("dropped:\n%s", n.Drops())
	began := time.Now()
	t.Logf("%d flows, %d crashes, %d changes of the hook; entries and the daemon's memory: %s", flows, crashes, switches, strings.Join(samples, ", "))

	// What nobody heard end is found by a roll call, one a minute, and is gone 10 s later.
	var wrong string
	for {
		if wrong = notLive(t, n, client, servers); wrong == "" {
			break
		}
		if time.Since(began) > 3*time.Minute {
			t.Fatalf("entries are not what lives:\n%s", wrong)
		}
		time.Sleep(time.Second)
	}
	t.Logf("the entries are the live flows after %.0f s: %+v", time.Since(began).Seconds(), stats(t, n))
	if broken := idle.Broken(); len(broken) > 0 {
		t.Errorf("%d idle connections are broken, the first: %v", len(broken), broken[0])
	}
}

// notLive tells how the entries differ from the flows that the pods' socket tables have.
func notLive(t *testing.T, n *scenario.Node, client *netns.NS, servers []*netns.NS) string {
	want := map[string]bool{}
	live, err := Flows(client)
	if err != nil {
		t.Fatal(err)
	}
	for f := range live {
		want["SVC "+f.Protocol+" "+f.Local+" "+f.Remote] = true
	}
	for _, server := range servers {
		live, err := Flows(server)
		if err != nil {
			t.Fatal(err)
		}
		for f := range live {
			for _, kind := range []string{"EGRESS", "INGRESS"} {
				want[kind+" "+f.Protocol+" "+f.Remote+" "+f.Local] = true
			}
		}
	}
	var b strings.Builder
	for _, c := range entries(t, n) {
		key := c.Type + " " + c.Protocol + " " + c.Source + " " + c.Destination
		if !want[key] || !c.Tethered {
			fmt.Fprintf(&b, "no socket has %+v\n", c)
		}
		delete(want, key)
	}
	for key := range want {
		fmt.Fprintf(&b, "no entry is there for %s\n", key)
	}
	return b.String()
}

var portInError = regexp.MustCompile(`from port (\d+)`)

// knownOf is what the table has of the ports that an error names.
func knownOf(t *testing.T, n *scenario.Node, failed error) string {
	var b strings.Builder
	for _, port := range portInError.FindAllStringSubmatch(failed.Error(), -1) {
		for c, err := range n.API().Connections(t.Context(), api.Filter{}) {
			if err != nil {
				return fmt.Sprintf("%sand the table could not be read: %v", b.String(), err)
			}
			if strings.HasSuffix(c.Source, ":"+port[1]) {
				fmt.Fprintf(&b, "%+v\n", c)
			}
		}
	}
	return b.String()
}

// resident is the daemon's memory in KiB.
func resident(t *testing.T, n *scenario.Node) int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.Daemon().Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
			if err != nil {
				t.Fatal(err)
			}
			return kib
		}
	}
	return 0
}
