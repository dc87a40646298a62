// SPDX-License-Identifier: Apache-2.0

package reachability

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
)

// Shape says how large a made-up world is.
type Shape struct {
	Namespaces, Pods, Policies, ClusterPolicies int
	// Places, where given, are what there really is: Pods without labels and
	// ports, in namespaces that NamespaceName names. Here is the first node.
	Places *Places
}

// Places are addresses that are somebody's.
type Places struct {
	Pods    []Pod
	Nodes   []Node
	Outside []netip.Addr
}

// NamespaceName is that of a world's i-th namespace.
func NamespaceName(i int) string { return fmt.Sprintf("ns%d", i) }

// Ports are what generated packets go to; generated policies name some of
// them, their neighbours and ranges around them.
var Ports = []int{53, 80, 81, 443, 8080, 9000}

// generator makes the choices for one world: few names and values, so that
// selectors meet pods and rules overlap.
type generator struct{ *rand.Rand }

// Generate makes a world from a seed: the same one for the same seed.
func Generate(seed uint64, shape Shape) *World {
	g := generator{rand.New(rand.NewPCG(seed, 0x6d6f6f72))}
	w := &World{}
	for i := range shape.Namespaces {
		w.Namespaces = append(w.Namespaces, Namespace{Meta{Name: NamespaceName(i), Labels: g.labels()}})
	}
	places := shape.Places
	if places == nil {
		places = g.places(w, shape.Pods)
	}
	w.Here, w.Outside = places.Nodes[0].Meta.Name, places.Outside
	for i, n := range places.Nodes {
		if i > 0 {
			n.Meta.Labels = g.labels()
		}
		w.Nodes = append(w.Nodes, n)
	}
	for _, p := range places.Pods {
		p.Meta.Labels = g.labels()
		// The same name is another port, or another protocol, in another pod.
		for _, name := range []string{"http", "dns"} {
			if g.IntN(3) > 0 {
				p.Ports = append(p.Ports, Port{Name: name, ContainerPort: g.port(), Protocol: pick(g, "TCP", "UDP", "TCP")})
			}
		}
		w.Pods = append(w.Pods, p)
	}
	for i := range shape.Policies {
		w.Policies = append(w.Policies, g.policy(w, fmt.Sprintf("policy%d", i)))
	}
	for i := range shape.ClusterPolicies {
		w.ClusterPolicies = append(w.ClusterPolicies, g.clusterPolicy(w, i))
	}
	return w
}

// places makes addresses up: of three pods in four on the first node.
func (g generator) places(w *World, pods int) *Places {
	p := &Places{Nodes: []Node{
		{Meta{Name: "here"}, []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8:2::1")}},
		{Meta{Name: "there"}, []netip.Addr{netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8:2::2")}},
		{Meta{Name: "elsewhere"}, []netip.Addr{netip.MustParseAddr("192.0.2.3"), netip.MustParseAddr("2001:db8:2::3")}},
	}}
	for _, a := range []string{"203.0.113.1", "203.0.113.129", "203.0.113.200", "198.51.100.7", "2001:db8::1", "2001:db8:0:1::1", "2001:db8:f::1"} {
		p.Outside = append(p.Outside, netip.MustParseAddr(a))
	}
	for i := range pods {
		p.Pods = append(p.Pods, Pod{
			Meta: Meta{Name: fmt.Sprintf("pod%d", i), Namespace: pick(g, w.Namespaces...).Meta.Name},
			Node: p.Nodes[i%4/3].Meta.Name,
			Addrs: []netip.Addr{
				netip.AddrFrom4([4]byte{10, 244, byte(i / 200), byte(10 + i%200)}),
				netip.AddrFrom16([16]byte{0xfd, 0, 0, 0x10, 0x02, 0x44, 14: byte(i / 200), 15: byte(10 + i%200)}),
			},
		})
	}
	return p
}

// Packets lists one packet for each pair of addresses of a family, of which one
// is a pod's of this node, to each of Ports of each protocol.
func (w *World) Packets(protocols ...string) []Packet {
	var addrs []netip.Addr
	here := make(map[netip.Addr]bool)
	for _, p := range w.Pods {
		addrs = append(addrs, p.Addrs...)
		for _, a := range p.Addrs {
			here[a] = p.Node == w.Here
		}
	}
	for _, n := range w.Nodes {
		addrs = append(addrs, n.Addrs...)
	}
	addrs = append(addrs, w.Outside...)
	var packets []Packet
	for _, from := range addrs {
		for _, to := range addrs {
			if from.Is4() != to.Is4() || from == to || !here[from] && !here[to] {
				continue
			}
			for _, protocol := range protocols {
				for _, port := range Ports {
					packets = append(packets, Packet{from, to, protocol, port})
					if protocol == "ICMP" {
						break
					}
				}
			}
		}
	}
	return packets
}

func pick[T any](g generator, choices ...T) T { return choices[g.IntN(len(choices))] }

func (g generator) chance(percent int) bool { return g.IntN(100) < percent }

func (g generator) port() int { return pick(g, Ports...) }

func (g generator) labels() Labels {
	labels := Labels{}
	for _, key := range []string{"app", "tier", "team"} {
		if g.chance(60) {
			labels[key] = pick(g, "red", "green", "blue")
		}
	}
	return labels
}

func (g generator) selector(w *World, ofNamespace bool) *Selector {
	s := &Selector{}
	if g.chance(20) {
		return s
	}
	if ofNamespace && g.chance(20) {
		s.MatchLabels = Labels{"kubernetes.io/metadata.name": pick(g, w.Namespaces...).Meta.Name}
		return s
	}
	key := pick(g, "app", "tier", "team")
	if g.chance(50) {
		s.MatchLabels = Labels{key: pick(g, "red", "green", "blue")}
	}
	if len(s.MatchLabels) == 0 || g.chance(25) {
		e := Expression{Key: pick(g, "app", "tier", "team"), Operator: pick(g, "In", "NotIn", "Exists", "DoesNotExist")}
		if e.Operator == "In" || e.Operator == "NotIn" {
			e.Values = []string{pick(g, "red", "green", "blue")}
			if g.chance(50) {
				e.Values = append(e.Values, pick(g, "yellow", "red", "green"))
			}
			slices.Sort(e.Values)
			e.Values = slices.Compact(e.Values)
		}
		s.MatchExpressions = []Expression{e}
	}
	return s
}

func (g generator) block(w *World) *IPBlock {
	pod := pick(g, w.Pods...)
	pool := []IPBlock{
		{"0.0.0.0/0", nil}, {"::/0", nil},
		{"0.0.0.0/0", []string{"10.244.0.0/16"}}, {"::/0", []string{"fd00:10:244::/48"}},
		{"203.0.113.0/24", nil}, {"203.0.113.0/24", []string{"203.0.113.128/25"}},
		{"203.0.113.0/24", []string{"203.0.113.128/25", "203.0.113.0/30"}},
		{"203.0.113.128/25", []string{"203.0.113.192/26"}}, {"203.0.113.200/32", nil},
		{"2001:db8::/32", nil}, {"2001:db8::/32", []string{"2001:db8:0:1::/64"}}, {"2001:db8::1/128", nil},
		{"10.244.0.0/16", nil}, {"10.244.0.0/16", []string{"10.244.0.0/28"}}, {"fd00:10:244::/48", nil},
		{pod.Addrs[0].String() + "/32", nil}, {pod.Addrs[1].String() + "/128", nil},
		{"10.244.0.0/16", []string{pod.Addrs[0].String() + "/32"}},
		{"192.0.2.0/24", nil}, {"192.0.2.2/32", nil}, {"2001:db8:2::/64", []string{"2001:db8:2::2/127"}},
	}
	block := pick(g, pool...)
	return &block
}

func (g generator) peers(w *World) []Peer {
	var peers []Peer
	for range pick(g, 0, 1, 1, 2, 3) {
		switch g.IntN(4) {
		case 0:
			peers = append(peers, Peer{PodSelector: g.selector(w, false)})
		case 1:
			peers = append(peers, Peer{NamespaceSelector: g.selector(w, true)})
		case 2:
			peers = append(peers, Peer{NamespaceSelector: g.selector(w, true), PodSelector: g.selector(w, false)})
		case 3:
			peers = append(peers, Peer{IPBlock: g.block(w)})
		}
	}
	return peers
}

func (g generator) policyPorts() []PolicyPort {
	var ports []PolicyPort
	for range pick(g, 0, 0, 1, 1, 2, 3) {
		p := PolicyPort{Protocol: pick(g, "", "TCP", "TCP", "UDP", "SCTP")}
		switch g.IntN(6) {
		case 0:
		case 1:
			p.Port = pick(g, "http", "dns", "none")
		case 2:
			first := g.port() - g.IntN(3)
			p.Port, p.EndPort = first, first+g.IntN(1000)
		default:
			p.Port = g.port()
		}
		ports = append(ports, p)
	}
	return ports
}

func (g generator) policy(w *World, name string) Policy {
	p := Policy{Meta: Meta{Name: name, Namespace: pick(g, w.Namespaces...).Meta.Name}}
	p.Spec.PodSelector = *g.selector(w, false)
	for range pick(g, 0, 1, 1, 2, 3) {
		p.Spec.Ingress = append(p.Spec.Ingress, IngressRule{From: g.peers(w), Ports: g.policyPorts()})
	}
	for range pick(g, 0, 0, 1, 2, 3) {
		p.Spec.Egress = append(p.Spec.Egress, EgressRule{To: g.peers(w), Ports: g.policyPorts()})
	}
	p.Spec.PolicyTypes = pick(g, nil, []string{"Ingress"}, []string{"Egress"}, []string{"Ingress", "Egress"}, []string{"Egress", "Ingress"})
	return p
}

func (g generator) clusterPods(w *World) ClusterPeer {
	if g.chance(50) {
		return ClusterPeer{Namespaces: g.selector(w, true)}
	}
	return ClusterPeer{Pods: &NamespacedPods{NamespaceSelector: *g.selector(w, true), PodSelector: *g.selector(w, false)}}
}

func (g generator) clusterPolicy(w *World, i int) ClusterPolicy {
	// Equal priorities leave the order open: none are.
	p := ClusterPolicy{Meta: Meta{Name: fmt.Sprintf("cluster%d", i)}}
	p.Spec = ClusterSpec{Tier: pick(g, "Admin", "Baseline"), Priority: (i*37 + 11) % 1001, Subject: g.clusterPods(w)}
	rule := func(ingress bool) ClusterRule {
		r := ClusterRule{Action: pick(g, "Accept", "Deny", "Pass")}
		named := g.chance(15)
		for range pick(g, 1, 1, 2) {
			peer := g.clusterPods(w)
			if !ingress && !named && g.chance(40) {
				peer = ClusterPeer{Networks: []string{g.block(w).CIDR}}
				if g.chance(40) {
					peer = ClusterPeer{Nodes: g.selector(w, false)}
				}
			}
			if ingress {
				r.From = append(r.From, peer)
			} else {
				r.To = append(r.To, peer)
			}
		}
		for range pick(g, 0, 0, 1, 2) {
			match := &ClusterMatch{}
			switch g.IntN(3) {
			case 0:
				match.DestinationPort = &ClusterPort{Number: g.port()}
			case 1:
				first := g.port()
				match.DestinationPort = &ClusterPort{Range: &PortRange{first, first + 1 + g.IntN(500)}}
			}
			r.Protocols = append(r.Protocols, pick(g, ClusterProtocol{TCP: match}, ClusterProtocol{UDP: match}, ClusterProtocol{SCTP: match}))
		}
		if named {
			r.Protocols = append(r.Protocols, ClusterProtocol{DestinationNamedPort: pick(g, "http", "dns")})
		}
		return r
	}
	for range g.IntN(4) {
		p.Spec.Ingress = append(p.Spec.Ingress, rule(true))
	}
	for range g.IntN(4) {
		p.Spec.Egress = append(p.Spec.Egress, rule(false))
	}
	return p
}
