// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mooring-cni/mooring/daemon/model"
)

// longest looks a port up as a longest-prefix trie does.
func longest(p *Profile, protocol model.Protocol, port uint16) bool {
	best, allow := -1, false
	for _, e := range p.Entries {
		length := 0
		if !e.Any {
			if e.Protocol != protocol || e.Port>>(16-e.Bits) != port>>(16-e.Bits) {
				continue
			}
			length = 8 + e.Bits
		}
		if length > best {
			best, allow = length, e.Allow
		}
	}
	return allow
}

func TestProfilesArePrefixesWithTheSameAnswers(t *testing.T) {
	g := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var allowed ports
		for i := range allowed {
			if i == otherProtocols {
				if g.IntN(2) == 0 {
					allowed[i] = everyPort
				}
				continue
			}
			for range g.IntN(5) {
				first := uint16(g.IntN(65536))
				last := min(int(first)+1<<g.IntN(17)-1, 65535)
				allowed[i] = allowed[i].union(spans{{first, uint16(last)}})
			}
		}
		p := newProfile(allowed)
		for range 500 {
			protocol := []model.Protocol{model.TCP, model.UDP, model.SCTP, model.ICMP, 47}[g.IntN(5)]
			port := uint16(g.IntN(65536))
			if spans := allowed[protocolIndex(protocol)]; len(spans) > 0 && g.IntN(2) == 0 {
				port = spans[0].Last + uint16(g.IntN(2))
			}
			if got, want := longest(p, protocol, port), p.Allows(protocol, port); got != want {
				t.Fatalf("%d/%s by prefix: %v, want %v (%v)", port, protocol, got, want, allowed)
			}
		}
	}
}

func TestSpansAreSets(t *testing.T) {
	g := rand.New(rand.NewPCG(3, 4))
	random := func() (spans, map[int]bool) {
		var s spans
		in := make(map[int]bool)
		for range g.IntN(4) {
			first := g.IntN(40)
			last := first + g.IntN(8)
			s = s.union(spans{{uint16(first), uint16(last)}})
			for i := first; i <= last; i++ {
				in[i] = true
			}
		}
		return s, in
	}
	for range 500 {
		a, inA := random()
		b, inB := random()
		union, both, rest := a.union(b), a.intersect(b), a.without(b)
		for i := range 60 {
			port := uint16(i)
			if union.contains(port) != (inA[i] || inB[i]) || both.contains(port) != (inA[i] && inB[i]) || rest.contains(port) != (inA[i] && !inB[i]) {
				t.Fatalf("%v and %v at %d: union %v, both %v, without %v", a, b, i, union, both, rest)
			}
		}
	}
	if got := (spans{{0, 65535}}).complement(); len(got) != 0 {
		t.Errorf("nothing is outside of everything, got %v", got)
	}
}

func podNamed(name, addr string, labels map[string]string) *model.Pod {
	return &model.Pod{Name: model.Name{Namespace: "default", Name: name}, Labels: labels, IPs: []netip.Addr{netip.MustParseAddr(addr)}}
}

func endpoint(id uint32, p *model.Pod) map[uint32]*model.Endpoint {
	return map[uint32]*model.Endpoint{id: {ID: id, Pod: p.Name, IPs: p.IPs}}
}

func pods(list ...*model.Pod) map[model.Name]*model.Pod {
	m := make(map[model.Name]*model.Pod)
	for _, p := range list {
		m[p.Name] = p
	}
	return m
}

func asks(from, to string) Query {
	return Query{From: netip.MustParseAddr(from), To: netip.MustParseAddr(to), Protocol: model.TCP, Port: 80}
}

func TestNothingIsSaidBeforeTheSourceHasSaidAll(t *testing.T) {
	table := NewTable(Config{Node: "here", Mode: Default})
	web := podNamed("web", "10.244.0.5", nil)
	if u := table.Apply(model.Changes{Pods: pods(web)}); !u.Empty() {
		t.Errorf("an unfinished list gives %+v, want nothing", u)
	}
	if u := table.ApplyEndpoints(endpoint(1, web)); !u.Empty() {
		t.Errorf("an endpoint before the list is known gives %+v, want nothing: its maps are closed", u)
	}
	u := table.Apply(model.Changes{Synced: true, Namespaces: map[string]*model.Namespace{"default": {Name: "default"}}})
	if diff := cmp.Diff(map[uint32]EndpointPolicy{1: {Open, Open}}, u.Endpoints); diff != "" {
		t.Error(diff)
	}
}

func TestAPodOfTheAPIIsClosedUntilItIsKnown(t *testing.T) {
	table := NewTable(Config{Node: "here", Mode: Default})
	table.Apply(model.Changes{Synced: true, Namespaces: map[string]*model.Namespace{"default": {Name: "default"}}})
	web := podNamed("web", "10.244.0.5", nil)
	u := table.ApplyEndpoints(endpoint(1, web))
	if diff := cmp.Diff(map[uint32]EndpointPolicy{1: {None, None}}, u.Endpoints); diff != "" {
		t.Error(diff)
	}
	if a := table.Explain(asks("203.0.113.1", "10.244.0.5")); a.Allowed || a.Ingress.Reason != "the pod's labels and policies are not known yet" {
		t.Errorf("an unknown pod is reached: %+v", a)
	}
	u = table.Apply(model.Changes{Pods: pods(web)})
	if diff := cmp.Diff(map[uint32]EndpointPolicy{1: {Open, Open}}, u.Endpoints); diff != "" {
		t.Error(diff)
	}
	if u = table.ApplyEndpoints(map[uint32]*model.Endpoint{1: nil}); !cmp.Equal(u.GoneEndpoints, []uint32{1}) {
		t.Errorf("the endpoint that went is not taken away: %+v", u)
	}
}

func TestStandalonePodsWithoutAManifestHaveNoLabels(t *testing.T) {
	table := NewTable(Config{Node: "here", Mode: Default, Standalone: true})
	table.Apply(model.Changes{Synced: true, Policies: map[model.Name]*model.Policy{
		{Namespace: "default", Name: "isolate"}: {Name: model.Name{Namespace: "default", Name: "isolate"}, Ingress: true},
	}})
	table.ApplyEndpoints(endpoint(1, podNamed("bare", "10.244.0.5", nil)))
	a := table.Explain(asks("203.0.113.1", "10.244.0.5"))
	if a.Allowed || a.Ingress.Reason != "no rule allows it, and the pod is isolated by NetworkPolicy default/isolate" {
		t.Errorf("got %+v %+v", a, a.Ingress)
	}
}

func TestModesAlwaysAndNever(t *testing.T) {
	web, client := podNamed("web", "10.244.0.5", nil), podNamed("client", "10.244.0.6", nil)
	open := &model.Policy{Name: model.Name{Namespace: "default", Name: "open"}, Ingress: true, IngressRules: []model.PolicyRule{{AllPeers: true, AllPorts: true}}}
	closed := &model.Policy{Name: model.Name{Namespace: "default", Name: "closed"}, Ingress: true, Egress: true}
	for _, c := range []struct {
		mode    Mode
		policy  *model.Policy
		from    string
		allowed bool
	}{
		{Default, nil, "203.0.113.1", true},
		{Default, closed, "203.0.113.1", false},
		{Always, nil, "203.0.113.1", false},
		{Always, open, "203.0.113.1", true},
		{Always, open, "10.244.0.6", false}, // egress of the client is not allowed
		{Never, closed, "203.0.113.1", true},
	} {
		table := NewTable(Config{Node: "here", Mode: c.mode, Standalone: true})
		changes := model.Changes{Synced: true, Pods: pods(web, client)}
		if c.policy != nil {
			changes.Policies = map[model.Name]*model.Policy{c.policy.Name: c.policy}
		}
		table.Apply(changes)
		table.ApplyEndpoints(endpoint(1, web))
		table.ApplyEndpoints(endpoint(2, client))
		if a := table.Explain(asks(c.from, "10.244.0.5")); a.Allowed != c.allowed {
			t.Errorf("mode %s, policy %v, from %s: allowed %v, want %v", c.mode, c.policy, c.from, a.Allowed, c.allowed)
		}
	}
}

func TestANodeAndItsPodsAndAPodAndItselfAlwaysReachEachOther(t *testing.T) {
	table := NewTable(Config{Node: "here", Mode: Always, Standalone: true})
	web := podNamed("web", "10.244.0.5", nil)
	table.Apply(model.Changes{Synced: true, Pods: pods(web), Nodes: map[string]*model.Node{
		"here":  {Name: "here", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")}},
		"there": {Name: "there", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.2")}},
	}})
	table.SetHost([]netip.Addr{netip.MustParseAddr("10.244.0.1")})
	table.ApplyEndpoints(endpoint(1, web))
	for _, c := range []struct {
		from, to string
		allowed  bool
	}{
		{"192.0.2.1", "10.244.0.5", true},
		{"10.244.0.5", "192.0.2.1", true},
		{"10.244.0.1", "10.244.0.5", true},
		{"10.244.0.5", "10.244.0.5", true},
		{"192.0.2.2", "10.244.0.5", false},
		{"10.244.0.5", "192.0.2.2", false},
	} {
		if a := table.Explain(asks(c.from, c.to)); a.Allowed != c.allowed {
			t.Errorf("%s to %s: allowed %v, want %v", c.from, c.to, a.Allowed, c.allowed)
		}
	}
	u := table.SetHost(nil)
	if diff := cmp.Diff([]netip.Prefix{netip.MustParsePrefix("10.244.0.1/32")}, u.GoneAddresses, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

func TestTenThousandAddressesOfOneRuleAreOneIdentity(t *testing.T) {
	var peers []model.PolicyPeer
	for i := range 10000 {
		a := netip.AddrFrom4([4]byte{100, 64 + byte(i>>16), byte(i >> 8), byte(i) | 1})
		peers = append(peers, model.PolicyPeer{IPBlock: &model.IPBlock{CIDR: netip.PrefixFrom(a, 32)}})
	}
	web := podNamed("web", "10.244.0.5", nil)
	table := NewTable(Config{Node: "here", Mode: Default, Standalone: true})
	table.ApplyEndpoints(endpoint(1, web))
	u := table.Apply(model.Changes{Synced: true, Pods: pods(web), Policies: map[model.Name]*model.Policy{
		{Namespace: "default", Name: "list"}: {Name: model.Name{Namespace: "default", Name: "list"}, Ingress: true, IngressRules: []model.PolicyRule{{Peers: peers, AllPorts: true}}},
	}})
	if len(u.Verdicts) > 4 || len(u.Addresses) != 5000+3 {
		t.Errorf("%d verdicts and %d addresses, want few and 5003 (half are doubles)", len(u.Verdicts), len(u.Addresses))
	}
	for from, want := range map[string]bool{"100.64.0.1": true, "100.64.39.15": true, "100.64.39.14": false, "100.64.39.17": false} {
		if a := table.Explain(asks(from, "10.244.0.5")); a.Allowed != want {
			t.Errorf("from %s: allowed %v, want %v", from, a.Allowed, want)
		}
	}
}

func TestRulesThatComeAndGoLeaveIdentitiesTheirNumbers(t *testing.T) {
	web := podNamed("web", "10.244.0.5", nil)
	everywhere := func(name string) *model.Policy {
		return &model.Policy{Name: model.Name{Namespace: "default", Name: name}, Ingress: true, IngressRules: []model.PolicyRule{{
			Peers: []model.PolicyPeer{{IPBlock: &model.IPBlock{CIDR: netip.MustParsePrefix("0.0.0.0/0")}}}, Ports: []model.PolicyPort{{Protocol: model.TCP, Port: 80, EndPort: 80}}}}}
	}
	table := NewTable(Config{Node: "here", Mode: Default, Standalone: true})
	table.ApplyEndpoints(endpoint(1, web))
	table.Apply(model.Changes{Synced: true, Pods: pods(web)})
	p := everywhere("web")
	if u := table.Apply(model.Changes{Policies: map[model.Name]*model.Policy{p.Name: p}}); len(u.Addresses) > 0 || len(u.Endpoints) != 1 {
		t.Errorf("a block that divides nothing renumbers %v", u.Addresses)
	}
	if a := table.Explain(asks("203.0.113.1", "10.244.0.5")); !a.Allowed {
		t.Error("the block is not allowed")
	}
	if u := table.Apply(model.Changes{Policies: map[model.Name]*model.Policy{p.Name: nil}}); len(u.Addresses) > 0 || len(u.GoneVerdicts) == 0 || len(u.GoneProfiles) != 1 {
		t.Errorf("the policy leaves something behind: %+v", u)
	}
}

func TestExplainNamesTheRule(t *testing.T) {
	web, client := podNamed("web", "10.244.0.5", map[string]string{"app": "web"}), podNamed("client", "10.244.0.6", map[string]string{"app": "client"})
	selector := model.Selector{{Key: "app", Operator: model.In, Values: []string{"client"}}}
	all := &model.Selector{}
	table := NewTable(Config{Node: "here", Mode: Default, Standalone: true})
	table.ApplyEndpoints(endpoint(1, web))
	table.Apply(model.Changes{Synced: true, Pods: pods(web, client),
		Policies: map[model.Name]*model.Policy{
			{Namespace: "default", Name: "web"}: {Name: model.Name{Namespace: "default", Name: "web"}, Ingress: true, IngressRules: []model.PolicyRule{
				{Peers: []model.PolicyPeer{{PodSelector: &selector}}, AllPorts: true}}},
		},
		ClusterPolicies: map[string]*model.ClusterPolicy{"ssh": {Name: "ssh", Tier: model.AdminTier, Subject: model.PolicyPeer{NamespaceSelector: all}, Ingress: []model.ClusterRule{
			{Name: "no ssh", Action: model.Deny, Peers: []model.PolicyPeer{{NamespaceSelector: all}}, Ports: []model.PolicyPort{{Protocol: model.TCP, Port: 22, EndPort: 22}}},
			{Action: model.Pass, Peers: []model.PolicyPeer{{NamespaceSelector: all}}, AllPorts: true},
		}}},
	})
	for port, want := range map[uint16]string{
		22: `denied by ClusterNetworkPolicy ssh ingress[0] "no ssh"`,
		80: `allowed by ClusterNetworkPolicy ssh ingress[1], then NetworkPolicy default/web ingress[0]`,
	} {
		q := asks("10.244.0.6", "10.244.0.5")
		q.Port = port
		a := table.Explain(q)
		if a.Egress != nil || a.Ingress.Reason != want {
			t.Errorf("port %d: %q, want %q", port, a.Ingress.Reason, want)
		}
	}
	want := []Listed{
		{Kind: "ClusterNetworkPolicy", Name: "ssh", Tier: model.AdminTier, Subject: "namespaces: all", Ingress: true, Rules: [2]int{2, 0}, Pods: []model.Name{web.Name}},
		{Kind: "NetworkPolicy", Namespace: "default", Name: "web", Subject: "pods: all", Ingress: true, Rules: [2]int{1, 0}, Pods: []model.Name{web.Name}},
	}
	if diff := cmp.Diff(want, table.List()); diff != "" {
		t.Error(diff)
	}
}
