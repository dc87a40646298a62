// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/test/fate"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/scenario"
)

func init() {
	Register(Set{
		Name: "fate",
		Title: "conntrack entries and the ends of their sockets: what a churn of mixed kinds leaves behind beside kernel nf_conntrack with\n" +
			"  DNAT rules, what the hook costs at each end (BPF_ENABLE_STATS, two clock readings included), and connections with it and without",
		Measure: measureFate,
	})
}

var fateVIP = netip.MustParseAddr("10.96.0.10")

const fateService = `
apiVersion: v1
kind: Service
metadata: {name: churn, namespace: default}
spec:
  clusterIP: 10.96.0.10
  selector: {app: churn}
  ports:
  - {name: tcp, protocol: TCP, port: 80, targetPort: 8080}
  - {name: refused, protocol: TCP, port: 81, targetPort: 8081}
  - {name: udp, protocol: UDP, port: 53, targetPort: 5353}
  - {name: bench, protocol: TCP, port: 8080, targetPort: 8090}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: default, labels: {app: churn}}
`

// fateDNAT are the same services as rules of the kernel's own NAT.
const fateDNAT = `table ip churn {
	chain services {
		type nat hook prerouting priority dstnat;
		ip daddr 10.96.0.10 tcp dport 80 dnat to %[1]s:8080
		ip daddr 10.96.0.10 tcp dport 81 dnat to %[1]s:8081
		ip daddr 10.96.0.10 udp dport 53 dnat to %[1]s:5353
	}
}
`

// fateKinds are those of a churn: each as often.
var fateKinds = []fate.Kind{fate.ServerCloses, fate.ClientCloses, fate.Reset, fate.Refused, fate.ConnectedUDP, fate.UnconnectedUDP}

func measureFate(b *B) {
	count, while := 50_000, time.Second/2
	if b.Quick {
		count, while = 60, time.Second/20
	}
	on, off := fateNode(b, "auto"), fateNode(b, "off")
	measureLeftovers(b, on, off, count)
	measureEnds(b, on, off, min(count, 1000), while)
}

func fateNode(b *B, hook string) *scenario.Node {
	n := scenario.NewNode(b)
	n.Flags = []string{"--conntrack-hook", hook}
	n.Write("churn.yaml", fateService)
	n.Up()
	// The hook at close() sees sockets of the node's cgroup only; each node has its own.
	n.EnterCgroup()
	client := n.AddPod("client")
	client.Sysctl(b, "net.ipv4.ip_local_port_range", "1024 65535")
	fate.Serve(b, n.AddPod("server").NS)
	netns.Eventually(b, 30*time.Second, "the service answers", func() bool {
		return client.Do(func() error { return fate.One(fate.ServerCloses, fateVIP) }) == nil
	})
	return n
}

// measureLeftovers makes as many flows in each of three ways, and counts five seconds later.
func measureLeftovers(b *B, on, off *scenario.Node, count int) {
	rows := func(n *scenario.Node) (left, timewait float64) {
		for c, err := range n.API().Connections(b.Context(), api.Filter{}) {
			if err != nil {
				b.Fatal(err)
			}
			if c.State == "timewait" {
				timewait++
			} else {
				left++
			}
		}
		return left, timewait
	}
	wait := 5 * time.Second
	most := map[*scenario.Node]float64{on: 0.1}
	add := func(name string, left float64, none bool) {
		b.Value(Contestant{Name: fmt.Sprintf("%d flows of 6 kinds, %s", count, name), Unit: "entries", Bound: Bound{None: none}}, left)
	}
	for _, one := range []struct {
		name string
		*scenario.Node
	}{{"hook", on}, {"no hook", off}} {
		one.EnterCgroup()
		began, before := time.Now(), reaperCPU(b, one.Node)
		churn(b, one.Pod("client").NS, count)
		took, during := time.Since(began), reaperCPU(b, one.Node)
		time.Sleep(wait)
		after := reaperCPU(b, one.Node)
		// What an hour of such a churn would show: what comes after it comes once.
		b.Value(Contestant{Name: fmt.Sprintf("%s: the reaper's CPU, of one, during a churn of %.0f s", one.name, took.Seconds()), Unit: "%",
			Bound: Bound{Most: most[one.Node]}}, 100*(during-before)/took.Seconds())
		b.Value(Contestant{Name: one.name + ": and after it", Unit: "ms"}, 1000*(after-during))
		left, timewait := rows(one.Node)
		add(one.name+": left after 5 s", left, one.Node == on)
		add(one.name+": and in TIME_WAIT", timewait, false)
	}
	plain := NewPlain(b)
	from, server := plain.Pod(b), plain.Pod(b)
	from.Sysctl(b, "net.ipv4.ip_local_port_range", "1024 65535")
	fate.Serve(b, server.NS)
	feed(b, plain.NS, fmt.Sprintf(fateDNAT, server.IP), "nft", "-f", "-")
	churn(b, from.NS, count)
	time.Sleep(wait)
	text, err := plain.Command("cat", "/proc/sys/net/netfilter/nf_conntrack_count").Output()
	left, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		b.Fatalf("count the entries of nf_conntrack: %v", err)
	}
	add("nf_conntrack: left after 5 s", float64(left), false)
}

// reaperCPU is in seconds.
func reaperCPU(b *B, n *scenario.Node) float64 {
	b.Helper()
	s, err := n.API().ConntrackStats(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	return s.Sweep.CPUSeconds
}

func churn(b *B, client *netns.NS, count int) {
	if err := fate.Churn(client, 8, count, []netip.Addr{fateVIP}, fateKinds...); err != nil {
		b.Errorf("churn: %v", err)
	}
}

// measureEnds has connections made by turns on both nodes, and reads what the hook's
// programs took of it.
func measureEnds(b *B, on, off *scenario.Node, count int, while time.Duration) {
	stats, err := ebpf.EnableStats(bpfStatsRunTime)
	if err != nil {
		b.Fatalf("have the kernel count programs' time: %v", err)
	}
	programs := fate.HookPrograms(b, on.BPFFS)
	var names []string
	for name := range programs {
		names = append(names, name)
	}
	slices.Sort(names)
	samples := map[string][]float64{}
	for range b.Rounds {
		before := map[string]*ebpf.ProgramStats{}
		for name, p := range programs {
			before[name] = programStats(b, p)
		}
		on.EnterCgroup()
		churn(b, on.Pod("client").NS, count)
		for name, p := range programs {
			after := programStats(b, p)
			if runs := after.RunCount - before[name].RunCount; runs > 0 {
				samples[name] = append(samples[name], float64(after.Runtime-before[name].Runtime)/float64(runs))
			}
		}
	}
	closeStats(b, stats)
	for _, name := range names {
		if len(samples[name]) > 0 {
			b.Add(Contestant{Name: "hook, each run: " + name, Unit: "ns"}, samples[name])
		}
	}
	var contestants []Contestant
	for _, c := range []struct {
		name string
		*scenario.Node
		against string
		bound   Bound
	}{
		{"no hook", off, "", Bound{}},
		{"hook", on, "connect-request-close: no hook", Bound{Ratio: true, Least: 0.98}},
	} {
		c.EnterCgroup()
		client, server := c.Pod("client"), c.Pod("server")
		client.Sysctl(b, "net.ipv4.tcp_tw_reuse", "1")
		serveAt(b, server.NS, 8090)
		contestants = append(contestants, Contestant{
			Name: "connect-request-close: " + c.name, Unit: "1/s", Against: c.against, Bound: c.bound,
			Once: func() float64 {
				c.EnterCgroup()
				return Rate(b, client.NS, ConnectRequestClose, netip.AddrPortFrom(fateVIP, TCPPort), while)
			},
		})
	}
	b.Compare(contestants...)
}

// serveAt is Serve for TCP only, at a port of one's choice.
func serveAt(b *B, ns *netns.NS, port uint16) {
	c, err := worker(ns, workerTask{Target: netip.AddrPortFrom(netip.IPv6Unspecified(), port), Server: unix.SOCK_STREAM})
	if err != nil {
		b.Fatalf("server in %s: %v", ns.Name(), err)
	}
	c.Background(b)
	netns.Eventually(b, 10*time.Second, "the server listens", func() bool {
		out, _ := ns.Command("ss", "-Hlnt").Output()
		return strings.Contains(string(out), fmt.Sprintf(":%d ", port))
	})
}
