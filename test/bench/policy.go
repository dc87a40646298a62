// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/datapath"
	"github.com/mooring-cni/mooring/daemon/model"
	"github.com/mooring-cni/mooring/daemon/policy"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
	"github.com/mooring-cni/mooring/test/reachability"
)

func init() {
	Register(Set{
		Name: "policy",
		Title: "ns/packet of network policy at a pod's interface, measured as in packet: between two pods of a node,\n" +
			"  with as many rules on the egress of the one as on the ingress of the other, of which the last allows the packet",
		Measure: measurePolicy,
	})
	Register(Set{
		Name:    "policies",
		Title:   "1,000 policies, 5,000 pods, 200 namespaces, 250 of the pods on this node: until everything, or what one change\n  makes different, is computed and in the maps; and what the maps take",
		Measure: measurePolicies,
	})
}

func measurePolicy(b *B) {
	repeat := 50_000
	if b.Quick {
		repeat = 1000
	}
	never := newPair(b, false)
	open, one, many := newPair(b, true), newPair(b, true), newPair(b, true)
	open.enforce(b, 0)
	one.enforce(b, 1)
	many.enforce(b, 500)

	var contestants []Contestant
	for _, v6 := range []bool{false, true} {
		family := map[bool]string{false: "IPv4", true: "IPv6"}[v6]
		add := func(kind string, begin bool) {
			for _, c := range []struct {
				name string
				*pair
				to    string
				bound float64
			}{
				{"policy: never", never, "", 0},
				{"no policy selects the pods", open, "policy: never", 0},
				{"1 rule", one, "policy: never", 0},
				{"500 rules", many, "1 rule", 1.2},
			} {
				if !begin && c.to != "" {
					c.to, c.bound = "policy: never", 1.1
				}
				name := family + " " + kind + ", "
				f := Frame{Data: c.segment(c.client.At(v6, 20000), c.server.At(v6, 8080), packet.ACK|packet.PSH)}
				runner := &Runner{T: b, NS: c.Node.NS, Context: skbContext{Ifindex: uint32(c.client.Ifindex)}, Repeat: repeat}
				if begin {
					f = Frame{Data: c.segment(c.client.At(v6, 20000), c.server.At(v6, 8080), packet.SYN), Flows: portMask + 1, PortAt: 34}
					if v6 {
						f.PortAt = 54
					}
					runner.Repeat = portMask + 1
				}
				one := Contestant{Name: name + c.name, Unit: "ns", Bound: Bound{Ratio: c.bound > 0, Most: c.bound}, Once: func() float64 {
					c.Flush(b)
					if !begin {
						from, to := c.client.At(v6, 20000), c.server.At(v6, 8080)
						c.From(b, c.client, packet.Segment(from, to, packet.SYN))
						c.From(b, c.server, packet.Segment(to, from, packet.SYN|packet.ACK))
						c.From(b, c.client, packet.Segment(from, to, packet.ACK))
					}
					took := runner.Nanoseconds(c.FromContainer, f)
					if verdict := runner.Verdict(c.FromContainer, f); verdict != packet.Redirect {
						b.Fatalf("%s: the verdict on the packet is %d", name+c.name, verdict)
					}
					return took
				}}
				if c.to != "" {
					one.Against = name + c.to
				}
				contestants = append(contestants, one)
			}
		}
		add("SYN of a new flow", true)
		add("established TCP", false)
	}
	b.Compare(contestants...)
}

// pair is a client and a server, on a node of their own.
type pair struct {
	*packet.Node
	client, server *packet.Pod
}

func newPair(b *B, policies bool) *pair {
	n := packet.NewNode(b, packet.Options{MaxEntries: 1 << 17, Policy: policies})
	return &pair{n, n.Pod(b), n.Pod(b)}
}

func (p *pair) segment(from, to netip.AddrPort, flags uint8) []byte {
	s := packet.Segment(from, to, flags)
	s.From, s.To = p.client.MAC, p.client.HostMAC
	return s.Bytes()
}

// enforce writes policies the way that the daemon does: as many rules for what
// the client sends, and as many for what the server receives. They are by
// selectors and by blocks in turn, and of single ports; the last one allows the
// packet that is measured.
func (p *pair) enforce(b *B, rules int) {
	b.Helper()
	c := model.Changes{Synced: true, Pods: map[model.Name]*model.Pod{}, Policies: map[model.Name]*model.Policy{}}
	endpoints := map[uint32]*model.Endpoint{}
	for role, pod := range map[string]*packet.Pod{"client": p.client, "server": p.server} {
		name := model.Name{Namespace: "default", Name: role}
		c.Pods[name] = &model.Pod{Name: name, Labels: map[string]string{"role": role}, IPs: []netip.Addr{pod.V4, pod.V6}}
		endpoints[uint32(pod.ID)] = &model.Endpoint{ID: uint32(pod.ID), Pod: name, IPs: c.Pods[name].IPs}
	}
	role := func(name string) model.PolicyPeer {
		return model.PolicyPeer{PodSelector: &model.Selector{{Key: "role", Operator: model.In, Values: []string{name}}}}
	}
	rule := func(peer model.PolicyPeer, port int) model.PolicyRule {
		return model.PolicyRule{Peers: []model.PolicyPeer{peer}, Ports: []model.PolicyPort{{Protocol: model.TCP, Port: uint16(port), EndPort: uint16(port)}}}
	}
	var both model.Policy
	both.Name = model.Name{Namespace: "default", Name: "both"}
	both.Ingress, both.Egress = true, true
	for i := range rules - 1 {
		peer := role(fmt.Sprintf("role-%d", i))
		if i%2 == 1 {
			peer = model.PolicyPeer{IPBlock: &model.IPBlock{CIDR: netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}), 32)}}
		}
		both.IngressRules = append(both.IngressRules, rule(peer, i+1))
		both.EgressRules = append(both.EgressRules, rule(peer, i+1))
	}
	if rules > 0 {
		both.IngressRules = append(both.IngressRules, rule(role("client"), 8080))
		both.EgressRules = append(both.EgressRules, rule(role("server"), 8080))
		c.Policies[both.Name] = &both
	}
	table := policy.NewTable(policy.Config{Node: "here", Mode: policy.Default, Standalone: true})
	table.ApplyEndpoints(endpoints)
	table.Apply(c)
	manager := manage(b, p.Node.Node, p.CT.MaxEntries())
	defer manager.Close()
	if err := manager.SyncPolicy(table.State()); err != nil {
		b.Fatalf("write policies: %v", err)
	}
}

// manage has a node's datapath managed as by the daemon.
func manage(b *B, n *netns.Node, entries uint32) *datapath.Manager {
	b.Helper()
	var manager *datapath.Manager
	err := n.Do(func() (err error) {
		manager, err = datapath.New(datapath.Options{BPFFS: n.BPFFS, MaxEntries: entries, Timeouts: conf.Default().Conntrack.Timeouts, Hook: "off", Policy: true})
		return err
	})
	if err != nil {
		b.Fatalf("open the datapath of %s: %v", n.Name(), err)
	}
	return manager
}

func measurePolicies(b *B) {
	c, endpoints := reachability.Large()
	var table *policy.Table
	var manager *datapath.Manager
	var bpffs string
	memory := func() float64 {
		bytes, err := reachability.MapMemory(bpffs)
		if err != nil {
			b.Fatal(err)
		}
		return float64(bytes) / (1 << 20)
	}
	var computed, written, full, empty []float64
	for range min(b.Rounds, 5) {
		if manager != nil {
			manager.Close()
		}
		n := netns.NewNode(b)
		manager, bpffs = manage(b, n, 4096), n.BPFFS
		empty = append(empty, memory())
		began := time.Now()
		table = policy.NewTable(policy.Config{Node: "here", Mode: policy.Default, Standalone: true})
		table.ApplyEndpoints(endpoints)
		table.Apply(c)
		computed = append(computed, time.Since(began).Seconds())
		if err := manager.SyncPolicy(table.State()); err != nil {
			b.Fatal(err)
		}
		written = append(written, time.Since(began).Seconds())
		full = append(full, memory())
	}
	defer func() { manager.Close() }()
	b.Add(Contestant{Name: "everything computed", Unit: "s"}, computed)
	b.Add(Contestant{Name: "everything computed and written", Unit: "s", Bound: Bound{Most: 5, InsteadOfBest: true}}, written)
	changes := reachability.LargeChanges(c)
	var contestants []Contestant
	turn := make([]int, len(changes))
	for i, change := range changes {
		one := Contestant{Name: change.Name + " computed and written", Unit: "ms", Once: func() float64 {
			turn[i]++
			next := change.Turn(turn[i])
			began := time.Now()
			if err := manager.ApplyPolicy(table.Apply(next)); err != nil {
				b.Fatal(err)
			}
			return float64(time.Since(began)) / float64(time.Millisecond)
		}}
		if strings.HasPrefix(change.Name, "a label") {
			one.Bound = Bound{Most: 100, InsteadOfBest: true}
		}
		contestants = append(contestants, one)
	}
	b.Compare(contestants...)
	b.Add(Contestant{Name: "memory of the five maps", Unit: "MiB"}, full)
	b.Add(Contestant{Name: "memory of the five maps when empty", Unit: "MiB"}, empty)
}
