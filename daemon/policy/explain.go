// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/mooring-cni/mooring/daemon/model"
)

// Query asks whether a packet that begins a flow may pass. The destination is
// what the packet is after service translation.
type Query struct {
	From, To netip.Addr
	Protocol model.Protocol
	Port     uint16
}

// Answer is what holds for a query. Egress is decided where the source is,
// Ingress where the destination is; nil is not decided on this node.
type Answer struct {
	Allowed         bool
	Egress, Ingress *Side
}

// Side is one direction's answer.
type Side struct {
	Endpoint uint32
	Allowed  bool
	// Reason says it in words.
	Reason string
	// Rules decided: those that match in the deciding tier.
	Rules []Origin
	// Policies apply to the endpoint in this direction.
	Policies []string
}

// Explain answers from what the datapath's maps are filled from.
func (t *Table) Explain(q Query) Answer {
	a := Answer{Allowed: true}
	from, to := t.endpointAt(q.From), t.endpointAt(q.To)
	own := from != nil && from == to
	if from != nil {
		a.Egress = t.explain(from, Egress, q.To, own, q)
	}
	if to != nil {
		a.Ingress = t.explain(to, Ingress, q.From, own, q)
	}
	for _, side := range []*Side{a.Egress, a.Ingress} {
		if side != nil && !side.Allowed {
			a.Allowed = false
		}
	}
	return a
}

func (t *Table) endpointAt(addr netip.Addr) *endpointState {
	c := t.claims[addr]
	if c == nil || len(c.endpoints) == 0 {
		return nil
	}
	least := ^uint32(0)
	for id := range c.endpoints {
		least = min(least, id)
	}
	return t.endpoints[least]
}

func (t *Table) explain(e *endpointState, d Direction, peer netip.Addr, own bool, q Query) *Side {
	side := &Side{Endpoint: e.ID, Allowed: true}
	s := e.rulesets[d]
	if s != nil {
		side.Policies = s.names()
	}
	i := t.identityAt(peer)
	switch {
	case own:
		side.Reason = "a pod always reaches itself"
	case i != nil && i.id == Host:
		side.Reason = "a node and its own pods always reach each other"
	case s == openRuleset:
		side.Reason = "no policy applies to the pod in this direction"
	case s == nil || i == nil:
		side.Allowed, side.Reason = false, "the pod's labels and policies are not known yet"
	default:
		t.decided(s, i, q, side)
	}
	return side
}

// decided takes the answer from the profile that the datapath has, and the
// rules that explain it.
func (t *Table) decided(s *ruleset, i *identity, q Query, side *Side) {
	id, ok := s.verdicts[i]
	if !ok {
		id = s.common[i.id%groups]
	}
	switch id {
	case None:
		side.Allowed = false
	case All:
	default:
		side.Allowed = t.profiles[id].Allows(q.Protocol, q.Port)
	}
	passed := false
	s.decide(s.matching(i), i.class.named, func(r *bound, settles ports) {
		if !settles.contains(q.Protocol, q.Port) {
			return
		}
		side.Rules = append(side.Rules, r.origin)
		passed = r.action == model.Pass
	})
	verb := "allowed"
	if !side.Allowed {
		verb = "denied"
	}
	switch {
	case len(side.Rules) > 0 && !passed:
		texts := make([]string, len(side.Rules))
		for n, origin := range side.Rules {
			texts[n] = origin.String()
		}
		side.Reason = verb + " by " + strings.Join(texts, ", then ")
	case s.isolated:
		side.Reason = "no rule allows it, and the pod is isolated by " + strings.Join(s.isolating(), ", ")
	case s.closed:
		side.Reason = "no rule allows it, and policy is enforced always"
	default:
		side.Reason = "no rule denies it"
	}
}

func (t *Table) identityAt(addr netip.Addr) *identity {
	if i := t.addresses[netip.PrefixFrom(addr, addr.BitLen())]; i != nil {
		return i
	}
	if t.atlas == nil {
		return nil
	}
	for _, length := range t.atlas.lengths[family(addr)] {
		prefix, _ := addr.Prefix(length)
		if i := t.addresses[prefix]; i != nil && t.atlas.regions[prefix] != nil {
			return i
		}
	}
	return nil
}

func (s *ruleset) names() []string {
	names := make([]string, len(s.sources))
	for i, source := range s.sources {
		names[i] = source.name
	}
	return names
}

func (s *ruleset) isolating() []string {
	var names []string
	for _, source := range s.sources {
		if source.isolates[s.direction] {
			names = append(names, source.name)
		}
	}
	return names
}

// Applying names the policies that apply to an endpoint in a direction.
func (t *Table) Applying(endpoint uint32, d Direction) []string {
	e := t.endpoints[endpoint]
	if e == nil || e.rulesets[d] == nil {
		return nil
	}
	return e.rulesets[d].names()
}

// Ruleset tells what a ruleset's number stands for.
type Ruleset struct {
	Direction Direction
	Policies  []string
}

// Rulesets are those in use, by number.
func (t *Table) Rulesets() map[ID]Ruleset {
	all := make(map[ID]Ruleset, len(t.rulesets))
	for _, s := range t.rulesets {
		all[s.id] = Ruleset{s.direction, s.names()}
	}
	return all
}

// Listed is one policy as `mooring policy list` shows it.
type Listed struct {
	Kind      string // NetworkPolicy or ClusterNetworkPolicy
	Namespace string // of a NetworkPolicy
	Name      string
	Tier      model.Tier // of a ClusterNetworkPolicy
	Priority  int32
	Subject   string
	Ingress   bool
	Egress    bool
	Rules     [2]int
	Pods      []model.Name // of this node, sorted
}

// List gives all policies in the order of their evaluation.
func (t *Table) List() []Listed {
	selected := make(map[*source][]model.Name)
	for _, e := range t.endpoints {
		if c := t.classOfEndpoint(e.Endpoint); c != nil {
			for _, s := range t.selecting(c) {
				selected[s] = append(selected[s], e.Pod)
			}
		}
	}
	var list []Listed
	add := func(s *source, l Listed) {
		l.Rules = [2]int{len(s.rules[Ingress]), len(s.rules[Egress])}
		l.Pods = selected[s]
		slices.SortFunc(l.Pods, compareNames)
		l.Pods = slices.Compact(l.Pods)
		list = append(list, l)
	}
	for _, in := range t.policies {
		for _, p := range in {
			add(p.source, Listed{Kind: "NetworkPolicy", Namespace: p.Namespace, Name: p.Name.Name,
				Subject: subject(&model.PolicyPeer{PodSelector: &p.PodSelector}), Ingress: p.Ingress, Egress: p.Egress})
		}
	}
	for _, p := range t.cluster {
		add(p.source, Listed{Kind: "ClusterNetworkPolicy", Name: p.Name, Tier: p.Tier, Priority: p.Priority,
			Subject: subject(&p.Subject), Ingress: len(p.Ingress) > 0, Egress: len(p.Egress) > 0})
	}
	slices.SortFunc(list, func(a, b Listed) int {
		return cmp.Or(cmp.Compare(rank(a.Tier), rank(b.Tier)), cmp.Compare(a.Priority, b.Priority),
			strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	return list
}

func subject(p *model.PolicyPeer) string {
	var parts []string
	for _, part := range []struct {
		name     string
		selector *model.Selector
	}{{"namespaces", p.NamespaceSelector}, {"pods", p.PodSelector}} {
		if part.selector == nil {
			continue
		}
		text := part.selector.String()
		if text == "" {
			text = "all"
		}
		parts = append(parts, fmt.Sprintf("%s: %s", part.name, text))
	}
	return strings.Join(parts, "; ")
}
