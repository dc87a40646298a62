// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/mooring-cni/mooring/daemon/model"
)

// Direction is a policy's, seen from the pod.
type Direction int

// The directions, as indices.
const (
	Ingress Direction = iota
	Egress
)

func (d Direction) String() string {
	if d == Egress {
		return "egress"
	}
	return "ingress"
}

// Origin is where a rule was written.
type Origin struct {
	Policy string // "NetworkPolicy default/web" or "ClusterNetworkPolicy deny-all"
	Rule   string // "ingress[0]", with the rule's name where it has one
}

func (o Origin) String() string { return o.Policy + " " + o.Rule }

// rule is one rule as written, with what it names not yet looked up.
type rule struct {
	origin   Origin
	action   model.Action
	own      string // namespace of selectors without a namespace
	allPeers bool
	peers    []model.PolicyPeer // pods and nodes
	blocks   []*model.IPBlock
	allPorts bool
	ports    []model.PolicyPort
	content  string
}

func newRule(r rule, peers []model.PolicyPeer) *rule {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %s %t %t", strconv.Quote(r.origin.Policy), strconv.Quote(r.origin.Rule), r.action, r.allPeers, r.allPorts)
	for i := range peers {
		if peers[i].IPBlock != nil {
			r.blocks = append(r.blocks, peers[i].IPBlock)
			continue
		}
		r.peers = append(r.peers, peers[i])
		b.WriteString(" " + termContent(r.own, &peers[i]))
	}
	b.WriteString(" " + blockContent(r.blocks))
	for _, p := range r.ports {
		b.WriteString(" " + p.String())
	}
	r.content = b.String()
	return &r
}

func (r *rule) names() bool {
	return slices.ContainsFunc(r.ports, func(p model.PolicyPort) bool { return p.Name != "" })
}

// source is a policy, ready to be put into rulesets.
type source struct {
	name     string
	tier     model.Tier // "" for a NetworkPolicy
	priority int32
	isolates [2]bool
	rules    [2][]*rule
}

func compile(p *model.Policy) *source {
	s := &source{name: "NetworkPolicy " + p.Name.String(), isolates: [2]bool{p.Ingress, p.Egress}}
	for d, rules := range [2][]model.PolicyRule{p.IngressRules, p.EgressRules} {
		if !s.isolates[d] {
			continue
		}
		for i := range rules {
			s.rules[d] = append(s.rules[d], newRule(rule{
				origin:   Origin{s.name, fmt.Sprintf("%s[%d]", Direction(d), i)},
				action:   model.Accept,
				own:      p.Namespace,
				allPeers: rules[i].AllPeers,
				allPorts: rules[i].AllPorts,
				ports:    rules[i].Ports,
			}, rules[i].Peers))
		}
	}
	return s
}

func compileCluster(p *model.ClusterPolicy) *source {
	s := &source{name: "ClusterNetworkPolicy " + p.Name, tier: p.Tier, priority: p.Priority}
	for d, rules := range [2][]model.ClusterRule{p.Ingress, p.Egress} {
		for i := range rules {
			where := fmt.Sprintf("%s[%d]", Direction(d), i)
			if rules[i].Name != "" {
				where += " " + strconv.Quote(rules[i].Name)
			}
			s.rules[d] = append(s.rules[d], newRule(rule{
				origin:   Origin{s.name, where},
				action:   rules[i].Action,
				allPeers: rules[i].AllPeers,
				allPorts: rules[i].AllPorts,
				ports:    rules[i].Ports,
			}, rules[i].Peers))
		}
	}
	return s
}

// bound is a rule in a ruleset, with what it names looked up.
type bound struct {
	*rule
	terms  []*term
	blocks *blockList
}

func (b *bound) matches(i *identity) bool {
	if b.allPeers || b.blocks != nil && i.region.blocks.has(b.blocks.index) {
		return true
	}
	return slices.ContainsFunc(b.terms, func(t *term) bool { return t.members.has(i.index) })
}

// ruleset is what holds for an endpoint in one direction; endpoints that the
// same policies select share it.
type ruleset struct {
	id        ID
	content   string
	direction Direction
	sources   []*source // that select the endpoint, in the order of their evaluation
	isolated  bool      // by a NetworkPolicy
	closed    bool      // what nobody decides is denied
	declared  []model.ContainerPort
	named     bool // some rule has ports by name: then profiles differ by identity (egress)

	rules    []bound // Admin, then NetworkPolicy, then Baseline
	admin    int     // rules[:admin]
	baseline int     // rules[baseline:]

	evaluated bool
	common    [groups]ID       // the profile of most identities when it was first evaluated
	verdicts  map[*identity]ID // profiles of those that have another
	profiles  map[string]ID    // by the rules that match and, for names, the ports declared
	users     int
}

// describe says what a ruleset would be without making it.
func describe(d Direction, sources []*source, closed bool, declared []model.ContainerPort) *ruleset {
	s := &ruleset{direction: d, closed: closed}
	for _, source := range sources {
		if source.isolates[d] || len(source.rules[d]) > 0 {
			s.sources = append(s.sources, source)
		}
	}
	if len(s.sources) == 0 && !closed {
		return s
	}
	slices.SortFunc(s.sources, func(a, b *source) int {
		return cmp.Or(cmp.Compare(rank(a.tier), rank(b.tier)), cmp.Compare(a.priority, b.priority), strings.Compare(a.name, b.name))
	})
	var b strings.Builder
	fmt.Fprintf(&b, "%s closed=%t\n", d, closed)
	for _, source := range s.sources {
		s.isolated = s.isolated || source.isolates[d]
		fmt.Fprintf(&b, "%s %q %d %t\n", source.tier, source.name, source.priority, source.isolates[d])
		for _, r := range source.rules[d] {
			s.named = s.named || r.names()
			b.WriteString(r.content)
			b.WriteByte('\n')
		}
	}
	if s.named && d == Ingress {
		s.declared = namedPorts(declared)
		b.WriteString(portContent(s.declared))
	}
	s.content = b.String()
	return s
}

func rank(t model.Tier) int {
	switch t {
	case model.AdminTier:
		return 0
	case "":
		return 1
	}
	return 2
}

// open tells that nothing is enforced.
func (s *ruleset) open() bool { return len(s.sources) == 0 && !s.closed }

// decide is the order in which tiers and rules are read. visit is told what
// each of the matching rules settles, and what is left to the default.
func (s *ruleset) decide(matching []int, declared []model.ContainerPort, visit func(*bound, ports)) ports {
	if s.direction == Ingress {
		declared = s.declared
	}
	var allowed ports
	left := everything()
	tier := func(first, last int) {
		var passed ports
		for _, i := range matching {
			if i < first || i >= last {
				continue
			}
			r := &s.rules[i]
			settles := left
			if !r.allPorts {
				settles = left.intersect(resolve(r.ports, declared))
			}
			if visit != nil {
				visit(r, settles)
			}
			switch r.action {
			case model.Accept:
				allowed = allowed.union(settles)
			case model.Pass:
				passed = passed.union(settles)
			}
			left = left.without(settles)
		}
		left = left.union(passed)
	}
	tier(0, s.admin)
	if s.isolated {
		tier(s.admin, s.baseline)
		left = ports{}
	} else {
		tier(s.baseline, len(s.rules))
	}
	if !s.closed {
		allowed = allowed.union(left)
	}
	return allowed
}

// matching lists the rules that match an identity.
func (s *ruleset) matching(i *identity) []int {
	var list []int
	for n := range s.rules {
		if s.rules[n].matches(i) {
			list = append(list, n)
		}
	}
	return list
}
