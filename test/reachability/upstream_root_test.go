//go:build root

// SPDX-License-Identifier: Apache-2.0

package reachability

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// The behaviours that the Kubernetes end-to-end suite asks of network policy, by
// the names of its tests, on the cluster that it uses: three namespaces x, y and z
// with three pods a, b and c each, which serve ports 80 and 81. Who reaches whom
// is said here a third time, by hand: the reference is held to it too.

type end struct{ ns, pod string }

type way struct {
	from, to end
	protocol string
	port     int
}

// state of a case: what there is, and what is then reached.
type state struct {
	policies []Policy
	change   func(*World)
	reached  func(way) bool
}

var (
	everybody = Selector{}
	ingress   = []string{"Ingress"}
	egress    = []string{"Egress"}
)

func is(key, value string) *Selector { return &Selector{MatchLabels: Labels{key: value}} }

func among(key, operator string, values ...string) *Selector {
	return &Selector{MatchExpressions: []Expression{{key, operator, values}}}
}

func pods(s *Selector) Peer          { return Peer{PodSelector: s} }
func spaces(s *Selector) Peer        { return Peer{NamespaceSelector: s} }
func both(space, pod *Selector) Peer { return Peer{NamespaceSelector: space, PodSelector: pod} }
func on(protocol string, port any) []PolicyPort {
	return []PolicyPort{{Protocol: protocol, Port: port}}
}

// inX is a policy of namespace x.
func inX(name string, subject Selector, types []string) Policy {
	return Policy{Meta{Name: name, Namespace: NamespaceName(0)}, PolicySpec{PodSelector: subject, PolicyTypes: types}}
}

// toA allows pod a of namespace x what the rules say.
func toA(name string, rules ...IngressRule) Policy {
	p := inX(name, *is("pod", "a"), ingress)
	p.Spec.Ingress = rules
	return p
}

func fromA(name string, rules ...EgressRule) Policy {
	p := inX(name, *is("pod", "a"), egress)
	p.Spec.Egress = rules
	return p
}

func from(peers ...Peer) IngressRule { return IngressRule{From: peers} }

var xa = end{"x", "a"}

// onlyTo restricts who reaches x/a, onlyFrom whom x/a reaches; all else is open.
func onlyTo(f func(way) bool) func(way) bool { return func(w way) bool { return w.to != xa || f(w) } }
func onlyFrom(f func(way) bool) func(way) bool {
	return func(w way) bool { return w.from != xa || f(w) }
}

func everything(way) bool { return true }

func upstreamCases(addrs map[end][]netip.Addr) map[string][]state {
	block := func(e end, bits4, bits6 int, except ...end) []Peer {
		var peers []Peer
		for i, a := range addrs[e] {
			p, _ := a.Prefix([]int{bits4, bits6}[i])
			b := &IPBlock{CIDR: p.String()}
			for _, x := range except {
				b.Except = append(b.Except, netip.PrefixFrom(addrs[x][i], addrs[x][i].BitLen()).String())
			}
			peers = append(peers, Peer{IPBlock: b})
		}
		return peers
	}
	one := func(reached func(way) bool, policies ...Policy) []state { return []state{{policies, nil, reached}} }
	metadata := "kubernetes.io/metadata.name"
	nsName := map[string]string{"x": NamespaceName(0), "y": NamespaceName(1), "z": NamespaceName(2)}
	denyX := inX("deny-ingress", everybody, ingress)
	fromY80 := toA("from-y-80", IngressRule{From: []Peer{spaces(is("ns", "y"))}, Ports: on("TCP", 80)})
	fromY81 := toA("from-y-81", IngressRule{From: []Peer{spaces(is("ns", "y"))}, Ports: on("TCP", 81)})
	yb := end{"y", "b"}
	allowFromXA := func(pod string) Policy {
		p := Policy{Meta{Name: "allow-" + pod, Namespace: NamespaceName(1)}, PolicySpec{PodSelector: *is("pod", pod), PolicyTypes: ingress}}
		p.Spec.Ingress = []IngressRule{from(both(is("ns", "x"), is("pod", "a")))}
		return p
	}
	together := inX("together", *is("pod", "a"), []string{"Ingress", "Egress"})
	together.Spec.Ingress = []IngressRule{from(pods(is("pod", "b")))}
	together.Spec.Egress = []EgressRule{{Ports: on("TCP", 80)}}
	allowAll := toA("allow-all", IngressRule{})
	allowAllOut := fromA("allow-all-out", EgressRule{})

	return map[string][]state{
		"should support a 'default-deny-ingress' policy":                                                     one(func(w way) bool { return w.to.ns != "x" }, denyX),
		"should support a 'default-deny-all' policy":                                                         one(func(w way) bool { return w.to.ns != "x" && w.from.ns != "x" }, inX("deny-all", everybody, []string{"Ingress", "Egress"})),
		"should enforce policy to allow ingress traffic from pods in all namespaces":                         one(everything, toA("p", from(spaces(&everybody)))),
		"should enforce policy to allow traffic only from a different namespace, based on NamespaceSelector": one(onlyTo(func(w way) bool { return w.from.ns == "y" }), toA("p", from(spaces(is("ns", "y"))))),
		"should enforce policy to allow traffic from pods within server namespace based on PodSelector":      one(onlyTo(func(w way) bool { return w.from == end{"x", "b"} }), toA("p", from(pods(is("pod", "b"))))),
		"should enforce policy based on PodSelector with MatchExpressions":                                   one(onlyTo(func(w way) bool { return w.from == end{"x", "b"} }), toA("p", from(pods(among("pod", "In", "b"))))),
		"should enforce policy based on NamespaceSelector with MatchExpressions":                             one(onlyTo(func(w way) bool { return w.from.ns == "y" }), toA("p", from(spaces(among("ns", "In", "y"))))),
		"should enforce policy based on NamespaceSelector with MatchExpressions using default ns label": one(onlyTo(func(w way) bool { return w.from.ns != "x" }),
			toA("p", from(spaces(among(metadata, "NotIn", nsName["x"]))))),
		"should enforce policy to allow traffic based on NamespaceSelector with MatchLabels using default ns label": one(onlyTo(func(w way) bool { return w.from.ns == "y" }),
			toA("p", from(spaces(is(metadata, nsName["y"]))))),
		"should enforce policy based on PodSelector or NamespaceSelector": one(onlyTo(func(w way) bool { return w.from.ns != "x" || w.from.pod == "b" }),
			toA("p", from(spaces(among("ns", "NotIn", "x")), pods(is("pod", "b"))))),
		"should enforce policy based on PodSelector and NamespaceSelector": one(onlyTo(func(w way) bool { return w.from.ns != "x" && w.from.pod == "b" }),
			toA("p", from(both(among("ns", "NotIn", "x"), is("pod", "b"))))),
		"should enforce policy based on Multiple PodSelectors and NamespaceSelectors": one(onlyTo(func(w way) bool { return w.from.ns != "x" && w.from.pod != "a" }),
			toA("p", from(both(among("ns", "NotIn", "x"), among("pod", "In", "b", "c"))))),
		"should enforce policy based on any PodSelectors": one(onlyTo(func(w way) bool { return w.from.ns == "x" }),
			toA("p", from(pods(is("pod", "b")), pods(is("pod", "c"))))),
		"should enforce policy to allow traffic only from a pod in a different namespace based on PodSelector and NamespaceSelector": one(onlyTo(func(w way) bool { return w.from == end{"y", "a"} }),
			toA("p", from(both(is("ns", "y"), is("pod", "a"))))),
		"should enforce policy based on Ports": one(onlyTo(func(w way) bool { return w.from.ns == "y" && w.port == 81 && w.protocol == "TCP" }), fromY81),
		"should enforce multiple, stacked policies with overlapping podSelectors": {
			{[]Policy{fromY81}, nil, onlyTo(func(w way) bool { return w.from.ns == "y" && w.port == 81 && w.protocol == "TCP" })},
			{[]Policy{fromY81, fromY80}, nil, onlyTo(func(w way) bool { return w.from.ns == "y" && w.protocol == "TCP" })},
		},
		"should support allow-all policy": one(everything, allowAll),
		"should allow ingress access on one named port": one(onlyTo(func(w way) bool { return w.port == 81 && w.protocol == "TCP" }),
			toA("p", IngressRule{Ports: on("TCP", "serve-81-tcp")})),
		"should allow ingress access from namespace on one named port": one(onlyTo(func(w way) bool { return w.from.ns == "y" && w.port == 80 && w.protocol == "TCP" }),
			toA("p", IngressRule{From: []Peer{spaces(is("ns", "y"))}, Ports: on("TCP", "serve-80-tcp")})),
		"should allow egress access on one named port": one(onlyFrom(func(w way) bool { return w.port == 80 && w.protocol == "TCP" }),
			fromA("p", EgressRule{Ports: on("TCP", "serve-80-tcp")})),
		"should enforce updated policy": {
			{[]Policy{toA("p", IngressRule{})}, nil, everything},
			{[]Policy{toA("p")}, nil, onlyTo(func(way) bool { return false })},
		},
		"should allow ingress access from updated namespace": {
			{[]Policy{toA("p", from(spaces(is("ns2", "updated"))))}, nil, onlyTo(func(way) bool { return false })},
			{[]Policy{toA("p", from(spaces(is("ns2", "updated"))))}, func(w *World) { w.Namespaces[1].Meta.Labels["ns2"] = "updated" }, onlyTo(func(w way) bool { return w.from.ns == "y" })},
		},
		"should allow ingress access from updated pod": {
			{[]Policy{toA("p", from(pods(is("pod2", "updated"))))}, nil, onlyTo(func(way) bool { return false })},
			{[]Policy{toA("p", from(pods(is("pod2", "updated"))))}, label("x", "b", "pod2", "updated"), onlyTo(func(w way) bool { return w.from == end{"x", "b"} })},
		},
		"should deny ingress access to updated pod": {
			{[]Policy{inX("p", *is("target", "isolated"), ingress)}, nil, everything},
			{[]Policy{inX("p", *is("target", "isolated"), ingress)}, label("x", "a", "target", "isolated"), onlyTo(func(way) bool { return false })},
		},
		"should deny egress from pods based on PodSelector": one(onlyFrom(func(way) bool { return false }), fromA("p")),
		"should deny egress from all pods in a namespace":   one(func(w way) bool { return w.from.ns != "x" }, inX("p", everybody, egress)),
		"should work with Ingress, Egress specified together": one(func(w way) bool {
			return (w.to != xa || w.from == end{"x", "b"}) && (w.from != xa || w.port == 80 && w.protocol == "TCP")
		}, together),
		"should support denying of egress traffic on the client side (even if the server explicitly allows this traffic)": one(func(w way) bool {
			return (w.from != xa || w.to == yb) && (w.to.ns != "y" || w.to.pod == "c" || w.from == xa)
		}, fromA("p", EgressRule{To: []Peer{both(is("ns", "y"), is("pod", "b"))}}), allowFromXA("a"), allowFromXA("b")),
		"should enforce egress policy allowing traffic to a server in a different namespace based on PodSelector and NamespaceSelector": one(onlyFrom(func(w way) bool { return w.to == end{"y", "a"} }),
			fromA("p", EgressRule{To: []Peer{both(is("ns", "y"), is("pod", "a"))}})),
		"should enforce multiple ingress policies with ingress allow-all policy taking precedence": {
			{[]Policy{fromY80}, nil, onlyTo(func(w way) bool { return w.from.ns == "y" && w.port == 80 && w.protocol == "TCP" })},
			{[]Policy{fromY80, allowAll}, nil, everything},
		},
		"should enforce multiple egress policies with egress allow-all policy taking precedence": {
			{[]Policy{fromA("p", EgressRule{Ports: on("TCP", 80)})}, nil, onlyFrom(func(w way) bool { return w.port == 80 && w.protocol == "TCP" })},
			{[]Policy{fromA("p", EgressRule{Ports: on("TCP", 80)}), allowAllOut}, nil, everything},
		},
		"should stop enforcing policies after they are deleted": {
			{[]Policy{inX("p", everybody, []string{"Ingress", "Egress"})}, nil, func(w way) bool { return w.to.ns != "x" && w.from.ns != "x" }},
			{nil, nil, everything},
		},
		"should allow egress access to server in CIDR block": one(onlyFrom(func(w way) bool { return w.to == yb }),
			fromA("p", EgressRule{To: block(yb, 32, 128)})),
		// The block holds the pods of one node.
		"should enforce except clause while egress access to server in CIDR block": one(onlyFrom(func(w way) bool { return w.to != yb && sameBlock(addrs, w.to, yb) }),
			fromA("p", EgressRule{To: block(yb, 24, 64, yb)})),
		"should ensure an IP overlapping both IPBlock.CIDR and IPBlock.Except is allowed": {
			{[]Policy{fromA("except", EgressRule{To: block(yb, 24, 64, yb)})}, nil, onlyFrom(func(w way) bool { return w.to != yb && sameBlock(addrs, w.to, yb) })},
			{[]Policy{fromA("except", EgressRule{To: block(yb, 24, 64, yb)}), fromA("exactly", EgressRule{To: block(yb, 32, 128)})}, nil, onlyFrom(func(w way) bool { return sameBlock(addrs, w.to, yb) })},
		},
		"should enforce policies to check ingress and egress policies can be controlled independently based on PodSelector": {
			{[]Policy{fromA("out")}, nil, onlyFrom(func(way) bool { return false })},
			{[]Policy{fromA("out"), allowAll}, nil, onlyFrom(func(way) bool { return false })},
			{[]Policy{allowAllOut, toA("in")}, nil, onlyTo(func(way) bool { return false })},
		},
		"should not mistakenly treat 'protocol: SCTP' as 'protocol: TCP', even if the plugin doesn't support SCTP": one(onlyTo(func(w way) bool { return w.protocol == "TCP" && w.port == 80 }),
			toA("sctp", IngressRule{Ports: on("SCTP", 81)}), toA("tcp", IngressRule{Ports: on("TCP", 80)})),
		"should properly isolate pods that are selected by a policy allowing SCTP, even if the plugin doesn't support SCTP": one(onlyTo(func(way) bool { return false }),
			toA("p", IngressRule{Ports: on("SCTP", 80)})),
		"should not allow access by TCP when a policy specifies only UDP": one(onlyTo(func(w way) bool { return w.protocol == "UDP" && w.port == 81 }),
			toA("p", IngressRule{Ports: on("UDP", 81)})),
		"should enforce policy to allow ingress traffic for a target": one(func(w way) bool { return w.to.ns != "x" || w.to == xa }, denyX, allowAll),
		"should deny ingress from pods on other namespaces": one(func(w way) bool { return w.to.ns != "x" || w.from.ns == "x" }, func() Policy {
			p := inX("p", everybody, ingress)
			p.Spec.Ingress = []IngressRule{from(pods(&everybody))}
			return p
		}()),
		"should enforce ingress policy allowing any port traffic to a server on a specific protocol": {
			{[]Policy{toA("p", IngressRule{Ports: on("TCP", nil)})}, nil, onlyTo(func(w way) bool { return w.protocol == "TCP" })},
			{[]Policy{toA("p", IngressRule{Ports: on("UDP", nil)})}, nil, onlyTo(func(w way) bool { return w.protocol == "UDP" })},
		},
		"should not allow all ports if it cannot limit to the requested port": {
			{[]Policy{toA("p", IngressRule{Ports: on("TCP", 80)})}, nil, onlyTo(func(w way) bool { return w.protocol == "TCP" && w.port == 80 })},
			{[]Policy{toA("p", IngressRule{Ports: on("TCP", "nobody-has-it")})}, nil, onlyTo(func(way) bool { return false })},
		},
		"[LinuxOnly] using UDP should support a 'default-deny-ingress' policy": one(func(w way) bool { return w.to.ns != "x" }, denyX),
		"[LinuxOnly] using UDP should enforce policy based on Ports": one(onlyTo(func(w way) bool { return w.protocol == "UDP" && w.port == 81 && w.from.ns == "y" }),
			toA("p", IngressRule{From: []Peer{spaces(is("ns", "y"))}, Ports: on("UDP", 81)})),
		"[LinuxOnly] using UDP should enforce policy to allow traffic only from a pod in a different namespace based on PodSelector and NamespaceSelector": one(
			onlyTo(func(w way) bool { return w.from == end{"y", "a"} && w.protocol == "UDP" }),
			toA("p", IngressRule{From: []Peer{both(is("ns", "y"), is("pod", "a"))}, Ports: on("UDP", nil)})),
		// Names that the API has had since.
		"should enforce policy on ranges of ports (endPort)": one(onlyTo(func(w way) bool { return w.protocol == "TCP" && w.port == 81 }),
			toA("p", IngressRule{Ports: []PolicyPort{{Protocol: "TCP", Port: 81, EndPort: 90}}})),
	}
}

func sameBlock(addrs map[end][]netip.Addr, a, b end) bool {
	p, _ := addrs[b][0].Prefix(24)
	return p.Contains(addrs[a][0])
}

func label(ns, pod, key, value string) func(*World) {
	return func(w *World) {
		for i := range w.Pods {
			if l := w.Pods[i].Meta.Labels; l["pod"] == pod && w.Pods[i].Meta.Namespace == NamespaceName(strings.Index("xyz", ns)) {
				l[key] = value
			}
		}
	}
}

func TestTheUpstreamSuitesCases(t *testing.T) {
	c := newCluster(t, 9)
	addrs := map[end][]netip.Addr{}
	owners := map[netip.Addr]end{}
	for i, p := range c.places.Pods {
		e := end{string("xyz"[i%3]), string("abc"[i/3])}
		addrs[e] = p.Addrs
		for _, a := range p.Addrs {
			owners[a] = e
		}
	}
	cases := upstreamCases(addrs)
	names := []string{}
	for name := range cases {
		names = append(names, name)
	}
	slices.Sort(names)
	if len(names) < 46 {
		t.Errorf("%d cases, want the suite's 46", len(names))
	}
	shown := 0
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			for i, s := range cases[name] {
				w := &World{Here: c.nodes[0].NodeName, Nodes: c.places.Nodes, Policies: s.policies}
				for n, letter := range "xyz" {
					w.Namespaces = append(w.Namespaces, Namespace{Meta{Name: NamespaceName(n), Labels: Labels{"ns": string(letter)}}})
				}
				for _, p := range c.places.Pods {
					p.Meta.Labels = Labels{"pod": owners[p.Addrs[0]].pod}
					for _, port := range []int{80, 81} {
						p.Ports = append(p.Ports, Port{fmt.Sprintf("serve-%d-tcp", port), port, "TCP"}, Port{fmt.Sprintf("serve-%d-udp", port), port, "UDP"})
					}
					w.Pods = append(w.Pods, p)
				}
				if s.change != nil {
					s.change(w)
				}
				shown++
				c.show(t, w, fmt.Sprintf("case-%d", shown))
				var attempts []*attempt
				for _, k := range c.packets(w) {
					f, to := owners[k.From], owners[k.To]
					if f == (end{}) || to == (end{}) || k.Port != 80 && k.Port != 81 {
						continue
					}
					a := &attempt{Packet: k, want: s.reached(way{f, to, k.Protocol, k.Port})}
					if c.allowed(w, k) != a.want {
						t.Errorf("state %d: the reference says %v of %s/%s -> %s/%s %d/%s", i, !a.want, f.ns, f.pod, to.ns, to.pod, k.Port, k.Protocol)
					}
					attempts = append(attempts, a)
				}
				c.connect(t, attempts)
				for _, a := range attempts {
					if a.err != nil || a.reached != a.want {
						f, to := owners[a.From], owners[a.To]
						t.Errorf("state %d: %s/%s -> %s/%s %d/%s: reached %v (%v), want %v", i, f.ns, f.pod, to.ns, to.pod, a.Port, a.Protocol, a.reached, a.err, a.want)
					}
				}
			}
		})
	}
}
