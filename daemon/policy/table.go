// SPDX-License-Identifier: Apache-2.0

// Package policy says who may talk to whom. From policies, namespaces, pods and
// nodes it computes what the datapath's maps hold: an identity for every
// address, a ruleset in each direction for every endpoint of this node, and
// for every pair of them a profile of the ports that are allowed. It knows
// neither the kernel nor Kubernetes, and brings itself up to date with what
// changes.
package policy

import (
	"encoding/binary"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/mooring-cni/mooring/daemon/model"
)

// Mode is when policy is enforced.
type Mode string

// The modes. Default is the API's: a pod that nothing selects is open. With
// Always it is isolated in both directions; with Never everybody is open.
const (
	Default Mode = "default"
	Always  Mode = "always"
	Never   Mode = "never"
)

// Config is what does not change while the daemon runs.
type Config struct {
	Node string
	Mode Mode
	// Standalone says that what the source does not tell does not exist: a pod
	// without an object has no labels. From the API such a pod is only not
	// known yet, and stays closed until it is.
	Standalone bool
}

// Table holds the whole computation. It is not safe for concurrent use.
type Table struct {
	config Config
	synced bool

	pods       map[model.Name]*podState
	namespaces map[string]*model.Namespace
	inside     map[string]map[model.Name]bool // namespace -> pods
	nodes      map[string]*model.Node
	policies   map[string]map[string]*policyState // namespace, name
	cluster    map[string]*clusterState
	endpoints  map[uint32]*endpointState
	byPod      map[model.Name]map[uint32]bool
	host       map[netip.Addr]bool

	claims    map[netip.Addr]*claims
	addresses map[netip.Prefix]*identity

	numbers     *numbers
	identities  map[string]*identity
	byIndex     []*identity
	indices     pool
	terms       map[string]*term
	nearTerms   map[string]map[*term]bool // of one namespace's pods
	farTerms    map[*term]bool
	lists       map[string]*blockList
	listIndices pool
	redraw      bool // lists changed
	atlas       *atlas
	rulesets    map[string]*ruleset
	profiles    map[ID]*profileState

	update *Update
	dirty  struct {
		endpoints map[uint32]bool
		addresses map[netip.Addr]bool
	}
}

type podState struct {
	*model.Pod
	class *class // nil while not known
}

type policyState struct {
	*model.Policy
	source *source
}

type clusterState struct {
	*model.ClusterPolicy
	source *source
}

type endpointState struct {
	*model.Endpoint
	rulesets [2]*ruleset // nil: closed, as long as the pod is not known
}

type profileState struct {
	*Profile
	content string
	users   int
}

// claims are those who have an address. One of them is right: this node, then
// an endpoint of this node, then a pod, then another node.
type claims struct {
	endpoints map[uint32]bool
	pods      map[model.Name]bool
	nodes     map[string]bool
}

// Pair is a ruleset and who is on the other side.
type Pair struct{ Ruleset, Identity ID }

// EndpointPolicy is what holds for an endpoint: its rulesets by Direction.
type EndpointPolicy [2]ID

// Update is what a change made different. In the order of the fields it can be
// written without a moment in which anything is allowed that neither the state
// before nor the one after allows; the Gone lists come last.
type Update struct {
	Profiles  map[ID]*Profile
	Verdicts  map[Pair]ID // profiles; what is neither here nor common to its group is denied
	Addresses map[netip.Prefix]ID
	Endpoints map[uint32]EndpointPolicy

	GoneEndpoints []uint32
	GoneAddresses []netip.Prefix
	GoneVerdicts  []Pair
	GoneProfiles  []ID
}

// Empty tells that nothing differs.
func (u *Update) Empty() bool {
	return len(u.Profiles)+len(u.Verdicts)+len(u.Addresses)+len(u.Endpoints)+
		len(u.GoneEndpoints)+len(u.GoneAddresses)+len(u.GoneVerdicts)+len(u.GoneProfiles) == 0
}

func newUpdate() *Update {
	return &Update{
		Profiles:  make(map[ID]*Profile),
		Verdicts:  make(map[Pair]ID),
		Addresses: make(map[netip.Prefix]ID),
		Endpoints: make(map[uint32]EndpointPolicy),
	}
}

// NewTable makes an empty table.
func NewTable(config Config) *Table {
	t := &Table{
		config:     config,
		pods:       make(map[model.Name]*podState),
		namespaces: make(map[string]*model.Namespace),
		inside:     make(map[string]map[model.Name]bool),
		nodes:      make(map[string]*model.Node),
		policies:   make(map[string]map[string]*policyState),
		cluster:    make(map[string]*clusterState),
		endpoints:  make(map[uint32]*endpointState),
		byPod:      make(map[model.Name]map[uint32]bool),
		host:       make(map[netip.Addr]bool),
		claims:     make(map[netip.Addr]*claims),
		addresses:  make(map[netip.Prefix]*identity),
		numbers:    newNumbers(),
		identities: make(map[string]*identity),
		terms:      make(map[string]*term),
		nearTerms:  make(map[string]map[*term]bool),
		farTerms:   make(map[*term]bool),
		lists:      make(map[string]*blockList),
		redraw:     true,
		rulesets:   make(map[string]*ruleset),
		profiles:   make(map[ID]*profileState),
	}
	t.dirty.endpoints = make(map[uint32]bool)
	t.dirty.addresses = make(map[netip.Addr]bool)
	return t
}

// Apply takes what a source delivers. Until a delivery is marked Synced,
// nothing differs: what is not known yet may be what forbids.
func (t *Table) Apply(c model.Changes) *Update {
	t.synced = t.synced || c.Synced
	for name, n := range c.Namespaces {
		setOrDelete(t.namespaces, name, n)
		t.touchNamespace(name)
	}
	for name, p := range c.Pods {
		t.setPod(name, p)
	}
	for name, n := range c.Nodes {
		t.setNode(name, n)
	}
	for name, p := range c.Policies {
		in := t.policies[name.Namespace]
		if in == nil {
			in = make(map[string]*policyState)
			t.policies[name.Namespace] = in
		}
		before := in[name.Name]
		if p == nil {
			if delete(in, name.Name); len(in) == 0 {
				delete(t.policies, name.Namespace)
			}
		} else {
			in[name.Name] = &policyState{p, compile(p)}
		}
		for pod := range t.inside[name.Namespace] {
			labels := t.podLabels(pod)
			if before != nil && before.PodSelector.Matches(labels) || p != nil && p.PodSelector.Matches(labels) {
				t.touchPod(pod)
			}
		}
		t.touchUnknownPods(name.Namespace)
	}
	for name, p := range c.ClusterPolicies {
		if p == nil {
			delete(t.cluster, name)
		} else {
			t.cluster[name] = &clusterState{p, compileCluster(p)}
		}
		for id := range t.endpoints {
			t.dirty.endpoints[id] = true
		}
	}
	return t.settle()
}

// ApplyEndpoints takes the pods' interfaces of this node that became different,
// by id; nil where one is gone.
func (t *Table) ApplyEndpoints(changed map[uint32]*model.Endpoint) *Update {
	gone := []uint32{}
	for id, e := range changed {
		if before := t.endpoints[id]; before != nil {
			for _, addr := range before.IPs {
				t.unclaim(addr, func(c *claims) { delete(c.endpoints, id) })
			}
			if delete(t.byPod[before.Pod], id); len(t.byPod[before.Pod]) == 0 {
				delete(t.byPod, before.Pod)
			}
		}
		if e == nil {
			if before := t.endpoints[id]; before != nil {
				gone = append(gone, id)
				delete(t.endpoints, id)
				delete(t.dirty.endpoints, id)
				for d := range before.rulesets {
					t.releaseRuleset(before.rulesets[d])
				}
			}
			continue
		}
		if before := t.endpoints[id]; before != nil {
			before.Endpoint = e
		} else {
			t.endpoints[id] = &endpointState{Endpoint: e}
		}
		if t.byPod[e.Pod] == nil {
			t.byPod[e.Pod] = make(map[uint32]bool)
		}
		t.byPod[e.Pod][id] = true
		for _, addr := range e.IPs {
			t.claim(addr, func(c *claims) { c.endpoints[id] = true })
		}
		t.dirty.endpoints[id] = true
	}
	u := t.settle()
	u.GoneEndpoints = append(u.GoneEndpoints, gone...)
	slices.Sort(u.GoneEndpoints)
	return u
}

// SetHost tells this node's own addresses: all that its interfaces have.
func (t *Table) SetHost(addrs []netip.Addr) *Update {
	host := make(map[netip.Addr]bool, len(addrs))
	for _, addr := range addrs {
		addr = addr.Unmap().WithZone("")
		host[addr] = true
		if !t.host[addr] {
			t.dirty.addresses[addr] = true
		}
	}
	for addr := range t.host {
		if !host[addr] {
			t.dirty.addresses[addr] = true
		}
	}
	t.host = host
	return t.settle()
}

func setOrDelete[K comparable, V any](m map[K]*V, k K, v *V) {
	if v == nil {
		delete(m, k)
		return
	}
	m[k] = v
}

func (t *Table) setPod(name model.Name, p *model.Pod) {
	before := t.pods[name]
	if before != nil {
		for _, addr := range before.IPs {
			t.unclaim(addr, func(c *claims) { delete(c.pods, name) })
		}
	}
	if p == nil {
		delete(t.pods, name)
		if delete(t.inside[name.Namespace], name); len(t.inside[name.Namespace]) == 0 {
			delete(t.inside, name.Namespace)
		}
	} else {
		t.pods[name] = &podState{p, t.classOf(p)}
		if t.inside[name.Namespace] == nil {
			t.inside[name.Namespace] = make(map[model.Name]bool)
		}
		t.inside[name.Namespace][name] = true
		// Others than its node's processes are not told apart by the address.
		if !p.HostNetwork {
			for _, addr := range p.IPs {
				t.claim(addr, func(c *claims) { c.pods[name] = true })
			}
		}
	}
	t.touchPod(name)
}

func (t *Table) setNode(name string, n *model.Node) {
	if before := t.nodes[name]; before != nil {
		for _, addr := range before.Addresses {
			t.unclaim(addr, func(c *claims) { delete(c.nodes, name) })
		}
	}
	setOrDelete(t.nodes, name, n)
	if n != nil {
		for _, addr := range n.Addresses {
			t.claim(addr, func(c *claims) { c.nodes[name] = true })
		}
	}
}

func (t *Table) claim(addr netip.Addr, by func(*claims)) {
	c := t.claims[addr]
	if c == nil {
		c = &claims{endpoints: make(map[uint32]bool), pods: make(map[model.Name]bool), nodes: make(map[string]bool)}
		t.claims[addr] = c
	}
	by(c)
	t.dirty.addresses[addr] = true
}

func (t *Table) unclaim(addr netip.Addr, by func(*claims)) {
	c := t.claims[addr]
	if c == nil {
		return
	}
	by(c)
	if len(c.endpoints)+len(c.pods)+len(c.nodes) == 0 {
		delete(t.claims, addr)
	}
	t.dirty.addresses[addr] = true
}

func (t *Table) touchNamespace(name string) {
	for pod := range t.inside[name] {
		p := t.pods[pod]
		p.class = t.classOf(p.Pod)
		for _, addr := range p.IPs {
			t.dirty.addresses[addr] = true
		}
		t.touchPod(pod)
	}
	t.touchUnknownPods(name)
}

// touchPod marks the pod's own endpoints, if it is of this node.
func (t *Table) touchPod(name model.Name) {
	for id := range t.byPod[name] {
		t.dirty.endpoints[id] = true
		for _, addr := range t.endpoints[id].IPs {
			t.dirty.addresses[addr] = true
		}
	}
}

// touchUnknownPods marks endpoints whose pod has no object.
func (t *Table) touchUnknownPods(namespace string) {
	for id, e := range t.endpoints {
		if e.Pod.Namespace == namespace && t.pods[e.Pod] == nil {
			t.dirty.endpoints[id] = true
			for _, addr := range e.IPs {
				t.dirty.addresses[addr] = true
			}
		}
	}
}

func (t *Table) podLabels(name model.Name) map[string]string {
	if p := t.pods[name]; p != nil {
		return p.Labels
	}
	return nil
}

// namespaceLabels are those that the API server gives every namespace, for one
// that nobody has described.
func (t *Table) namespaceLabels(name string) (map[string]string, bool) {
	if n := t.namespaces[name]; n != nil {
		return n.Labels, true
	}
	return map[string]string{"kubernetes.io/metadata.name": name}, t.config.Standalone
}

func (t *Table) classOf(p *model.Pod) *class {
	labels, known := t.namespaceLabels(p.Namespace)
	if !known {
		return nil
	}
	return podClass(p.Namespace, labels, p.Labels, p.Ports)
}

// classOfEndpoint is nil while what would tell is not known.
func (t *Table) classOfEndpoint(e *model.Endpoint) *class {
	if p := t.pods[e.Pod]; p != nil {
		return p.class
	}
	labels, known := t.namespaceLabels(e.Pod.Namespace)
	// An interface that no runtime named a pod for is nobody's pod.
	if e.Pod == (model.Name{}) {
		labels, known = nil, true
	} else if !t.config.Standalone {
		known = false
	}
	if !known {
		return nil
	}
	return podClass(e.Pod.Namespace, labels, nil, nil)
}

// classAt says whose an address is.
func (t *Table) classAt(addr netip.Addr) *class {
	if t.host[addr] {
		return selfClass
	}
	c := t.claims[addr]
	if c == nil {
		return nil
	}
	own := t.nodes[t.config.Node]
	if own != nil && c.nodes[own.Name] {
		return selfClass
	}
	if len(c.endpoints) > 0 {
		id := slices.Min(slices.Collect(maps.Keys(c.endpoints)))
		if class := t.classOfEndpoint(t.endpoints[id].Endpoint); class != nil {
			return class
		}
		return worldClass
	}
	if len(c.pods) > 0 {
		name := slices.MinFunc(slices.Collect(maps.Keys(c.pods)), compareNames)
		if class := t.pods[name].class; class != nil {
			return class
		}
		return worldClass
	}
	return nodeClass(t.nodes[slices.Min(slices.Collect(maps.Keys(c.nodes)))])
}

func compareNames(a, b model.Name) int {
	if c := strings.Compare(a.Namespace, b.Namespace); c != 0 {
		return c
	}
	return strings.Compare(a.Name, b.Name)
}

// settle brings everything that is derived up to date.
func (t *Table) settle() *Update {
	u := newUpdate()
	if !t.synced {
		return u
	}
	t.update = u
	var old []*ruleset
	for id := range t.dirty.endpoints {
		e := t.endpoints[id]
		for d, fresh := range t.rulesetsOf(e.Endpoint) {
			if fresh != nil {
				fresh = t.useRuleset(fresh)
			}
			old = append(old, e.rulesets[d])
			e.rulesets[d] = fresh
		}
	}
	for _, s := range old {
		t.releaseRuleset(s)
	}
	t.dropRulesets()
	if t.redraw {
		t.draw()
	}
	for addr := range t.dirty.addresses {
		t.identify(netip.PrefixFrom(addr, addr.BitLen()), t.classAt(addr))
	}
	t.dropIdentities()
	for _, s := range t.rulesets {
		if !s.evaluated {
			t.evaluate(s)
		}
	}
	for id := range t.dirty.endpoints {
		u.Endpoints[id] = t.endpoints[id].policy()
	}
	t.dropProfiles()
	// What went and came back in one change did neither.
	u.GoneVerdicts = slices.DeleteFunc(u.GoneVerdicts, func(p Pair) bool { _, ok := u.Verdicts[p]; return ok })
	u.GoneAddresses = slices.DeleteFunc(u.GoneAddresses, func(p netip.Prefix) bool { return t.addresses[p] != nil })
	u.GoneProfiles = slices.DeleteFunc(u.GoneProfiles, func(id ID) bool { return t.profiles[id] != nil })
	clear(t.dirty.endpoints)
	clear(t.dirty.addresses)
	t.update = nil
	return u
}

func (e *endpointState) policy() EndpointPolicy {
	var p EndpointPolicy
	for d, s := range e.rulesets {
		if s != nil {
			p[d] = s.id
		}
	}
	return p
}

// rulesetsOf describes what holds for an endpoint; nil where its pod is not known.
func (t *Table) rulesetsOf(e *model.Endpoint) [2]*ruleset {
	if t.config.Mode == Never {
		return [2]*ruleset{describe(Ingress, nil, false, nil), describe(Egress, nil, false, nil)}
	}
	c := t.classOfEndpoint(e)
	if c == nil {
		return [2]*ruleset{}
	}
	sources := t.selecting(c)
	closed := t.config.Mode == Always
	return [2]*ruleset{
		describe(Ingress, sources, closed, c.named),
		describe(Egress, sources, closed, nil),
	}
}

// selecting lists the policies that select a pod.
func (t *Table) selecting(c *class) []*source {
	var sources []*source
	for _, p := range t.policies[c.namespace] {
		if p.PodSelector.Matches(c.labels) {
			sources = append(sources, p.source)
		}
	}
	for _, p := range t.cluster {
		if p.Subject.MatchesPod("", c.namespace, c.namespaceLabels, c.labels) {
			sources = append(sources, p.source)
		}
	}
	return sources
}

// useRuleset takes a described ruleset into use, or one that says the same.
func (t *Table) useRuleset(s *ruleset) *ruleset {
	if s.open() {
		return openRuleset
	}
	if known := t.rulesets[s.content]; known != nil {
		known.users++
		return known
	}
	s.users = 1
	s.id = t.numbers.of("ruleset " + s.content)
	s.verdicts = make(map[*identity]ID)
	s.profiles = make(map[string]ID)
	for _, source := range s.sources {
		for _, r := range source.rules[s.direction] {
			b := bound{rule: r}
			for i := range r.peers {
				b.terms = append(b.terms, t.useTerm(r.own, &r.peers[i]))
			}
			if len(r.blocks) > 0 {
				b.blocks = t.useList(r.blocks)
			}
			s.rules = append(s.rules, b)
		}
		switch source.tier {
		case model.AdminTier:
			s.admin, s.baseline = len(s.rules), len(s.rules)
		case "":
			s.baseline = len(s.rules)
		}
	}
	t.rulesets[s.content] = s
	return s
}

var openRuleset = &ruleset{id: Open}

func (t *Table) releaseRuleset(s *ruleset) {
	if s == nil || s == openRuleset {
		return
	}
	s.users--
}

// dropRulesets forgets those that no endpoint has any more.
func (t *Table) dropRulesets() {
	for content, s := range t.rulesets {
		if s.users > 0 {
			continue
		}
		delete(t.rulesets, content)
		for pair := range s.pairs() {
			t.update.GoneVerdicts = append(t.update.GoneVerdicts, pair)
		}
		for _, profile := range s.profiles {
			t.releaseProfile(profile)
		}
		for i := range s.rules {
			for _, term := range s.rules[i].terms {
				t.releaseTerm(term)
			}
			if list := s.rules[i].blocks; list != nil {
				if list.users--; list.users == 0 {
					delete(t.lists, list.content)
					t.listIndices.give(list.index)
					t.redraw = true
				}
			}
		}
		t.numbers.release(s.id)
	}
}

// dropIdentities forgets those that no address has any more.
func (t *Table) dropIdentities() {
	for key, i := range t.identities {
		if i.users > 0 {
			continue
		}
		delete(t.identities, key)
		for _, s := range t.rulesets {
			if _, ok := s.verdicts[i]; ok {
				delete(s.verdicts, i)
				t.update.GoneVerdicts = append(t.update.GoneVerdicts, Pair{s.id, i.id})
			}
		}
		for _, term := range t.terms {
			term.members.remove(i.index)
		}
		t.byIndex[i.index] = nil
		t.indices.give(i.index)
		if i.id != Host {
			t.numbers.release(i.id)
		}
	}
}

func (t *Table) useTerm(own string, peer *model.PolicyPeer) *term {
	content := termContent(own, peer)
	if known := t.terms[content]; known != nil {
		known.users++
		return known
	}
	n := &term{peer: *peer, own: own, content: content, users: 1}
	t.terms[content] = n
	if peer.NamespaceSelector == nil && peer.Nodes == nil {
		if t.nearTerms[own] == nil {
			t.nearTerms[own] = make(map[*term]bool)
		}
		t.nearTerms[own][n] = true
	} else {
		t.farTerms[n] = true
	}
	for _, i := range t.byIndex {
		if i != nil && n.matches(i.class) {
			n.members.add(i.index)
		}
	}
	return n
}

func (t *Table) releaseTerm(n *term) {
	if n.users--; n.users > 0 {
		return
	}
	delete(t.terms, n.content)
	delete(t.farTerms, n)
	if near := t.nearTerms[n.own]; near != nil {
		if delete(near, n); len(near) == 0 {
			delete(t.nearTerms, n.own)
		}
	}
}

func (t *Table) useList(blocks []*model.IPBlock) *blockList {
	content := blockContent(blocks)
	list := t.lists[content]
	if list == nil {
		list = &blockList{content: content, blocks: blocks, index: t.listIndices.take()}
		t.lists[content] = list
		t.redraw = true
	}
	list.users++
	return list
}

// draw divides the address space anew and places every address in it. Which
// lists hold a region of some name depends on nothing but these lists, so verdicts
// on identities that stay, stay.
func (t *Table) draw() {
	before := t.atlas
	t.atlas = newAtlas(t.lists)
	t.redraw = false
	if before != nil {
		for prefix := range before.regions {
			if t.atlas.regions[prefix] == nil {
				t.identify(prefix, nil)
			}
		}
	}
	for prefix := range t.atlas.regions {
		t.dirtyPrefix(prefix)
	}
	for addr := range t.claims {
		t.dirty.addresses[addr] = true
	}
	for addr := range t.host {
		t.dirty.addresses[addr] = true
	}
}

func (t *Table) dirtyPrefix(prefix netip.Prefix) {
	if prefix.IsSingleIP() {
		t.dirty.addresses[prefix.Addr()] = true
		return
	}
	t.identify(prefix, worldClass)
}

// identify gives a prefix the identity of a class; nil takes it away, unless a
// rule mentions the prefix.
func (t *Table) identify(prefix netip.Prefix, c *class) {
	before := t.addresses[prefix]
	r := t.atlas.regions[prefix]
	if c == nil && r != nil {
		c = worldClass
	}
	if c == nil {
		if before != nil {
			before.users--
			delete(t.addresses, prefix)
			delete(t.update.Addresses, prefix)
			t.update.GoneAddresses = append(t.update.GoneAddresses, prefix)
		}
		return
	}
	if r == nil {
		r = t.atlas.at(prefix.Addr())
	}
	now := t.useIdentity(c, r)
	if before != nil {
		before.users--
	}
	if before == now {
		return
	}
	t.addresses[prefix] = now
	t.update.Addresses[prefix] = now.id
}

func (t *Table) useIdentity(c *class, r *region) *identity {
	key := c.content + " " + r.name.String()
	i := t.identities[key]
	if i == nil {
		i = &identity{class: c, region: r, index: t.indices.take(), id: Host}
		if c.kind != self {
			i.id = t.numbers.in(groupOf(c, r), "identity "+key)
		}
		for len(t.byIndex) <= i.index {
			t.byIndex = append(t.byIndex, nil)
		}
		t.byIndex[i.index] = i
		t.identities[key] = i
		for n := range t.nearTerms[c.namespace] {
			if n.matches(c) {
				n.members.add(i.index)
			}
		}
		for n := range t.farTerms {
			if n.matches(c) {
				n.members.add(i.index)
			}
		}
		for _, s := range t.rulesets {
			if s.evaluated {
				t.judge(s, i)
			}
		}
	}
	i.region = r
	i.users++
	return i
}

// judge gives an identity that is new its verdict in a ruleset.
func (t *Table) judge(s *ruleset, i *identity) {
	if i.class.kind == self {
		return
	}
	t.setVerdict(s, i, t.profileFor(s, s.matching(i), i.class.named))
}

func (t *Table) setVerdict(s *ruleset, i *identity, profile ID) {
	before, explicit := s.verdicts[i]
	switch {
	case profile == s.common[i.id%groups]:
		if explicit {
			delete(s.verdicts, i)
			delete(t.update.Verdicts, Pair{s.id, i.id})
			t.update.GoneVerdicts = append(t.update.GoneVerdicts, Pair{s.id, i.id})
		}
	case !explicit || before != profile:
		s.verdicts[i] = profile
		t.update.Verdicts[Pair{s.id, i.id}] = profile
	}
}

// profileFor is the answer for all identities that the same rules match.
func (t *Table) profileFor(s *ruleset, matching []int, declared []model.ContainerPort) ID {
	var key []byte
	for _, n := range matching {
		key = binary.AppendUvarint(key, uint64(n))
	}
	if s.named && s.direction == Egress && slices.ContainsFunc(matching, func(n int) bool { return s.rules[n].names() }) {
		key = append(append(key, 0xff, 0xff, 0xff), portContent(declared)...)
	}
	if id, ok := s.profiles[string(key)]; ok {
		return id
	}
	id := t.useProfile(s.decide(matching, declared, nil))
	s.profiles[string(key)] = id
	return id
}

func (t *Table) useProfile(allowed ports) ID {
	content := allowed.content()
	var id ID
	switch content {
	case nothingContent:
		return None
	case everythingContent:
		return All
	default:
		id = t.numbers.of(content)
	}
	p := t.profiles[id]
	if p == nil {
		p = &profileState{newProfile(allowed), content, 0}
		t.profiles[id] = p
		t.update.Profiles[id] = p.Profile
	}
	p.users++
	return id
}

var (
	nothingContent    = ports{}.content()
	everythingContent = everything().content()
)

func (t *Table) releaseProfile(id ID) {
	if p := t.profiles[id]; p != nil {
		p.users--
	}
}

func (t *Table) dropProfiles() {
	for id, p := range t.profiles {
		if p.users > 0 {
			continue
		}
		delete(t.profiles, id)
		t.numbers.release(id)
		if _, unwritten := t.update.Profiles[id]; unwritten {
			delete(t.update.Profiles, id)
			continue
		}
		t.update.GoneProfiles = append(t.update.GoneProfiles, id)
	}
}

// pairs are all verdicts as they are written.
func (s *ruleset) pairs() iter.Seq2[Pair, ID] {
	return func(yield func(Pair, ID) bool) {
		for group, profile := range s.common {
			if profile != None && !yield(Pair{s.id, ID(group).Common()}, profile) {
				return
			}
		}
		for i, profile := range s.verdicts {
			if !yield(Pair{s.id, i.id}, profile) {
				return
			}
		}
	}
}

// evaluate computes a ruleset's verdicts for every identity, once. It walks the
// members of each rule, so rules that match few cost little.
func (t *Table) evaluate(s *ruleset) {
	// matched[i] is the set of rules that match identity i, as a node in a
	// tree of such sets.
	type edge struct{ set, rule int }
	matched := make([]int, len(t.byIndex))
	sets := [][]int{nil}
	next := make(map[edge]int)
	mark := func(i, rule int) {
		e := edge{matched[i], rule}
		if list := sets[e.set]; len(list) > 0 && list[len(list)-1] == rule {
			return
		}
		to, ok := next[e]
		if !ok {
			to = len(sets)
			sets = append(sets, append(slices.Clip(sets[e.set]), rule))
			next[e] = to
		}
		matched[i] = to
	}
	for n := range s.rules {
		r := &s.rules[n]
		for _, term := range r.terms {
			for i := range term.members.all() {
				mark(i, n)
			}
		}
		if r.allPeers || r.blocks != nil {
			for i, identity := range t.byIndex {
				if identity != nil && (r.allPeers || identity.region.blocks.has(r.blocks.index)) {
					mark(i, n)
				}
			}
		}
	}
	// Identities that the same rules match have one result, unless names of ports
	// are other ports in each.
	byName := s.named && s.direction == Egress
	results := make([]ID, len(t.byIndex))
	shared := make([]ID, len(sets))
	known := make([]bool, len(sets))
	tally := make([][groups]int, len(sets))
	count := [groups]map[ID]int{{}, {}, {}, {}}
	for i, identity := range t.byIndex {
		if identity == nil || identity.class.kind == self {
			continue
		}
		set := matched[i]
		if byName {
			results[i] = t.profileFor(s, sets[set], identity.class.named)
			count[identity.id%groups][results[i]]++
			continue
		}
		if !known[set] {
			shared[set], known[set] = t.profileFor(s, sets[set], nil), true
		}
		results[i] = shared[set]
		tally[set][identity.id%groups]++
	}
	for set := range tally {
		for group, n := range tally[set] {
			if n > 0 {
				count[group][shared[set]] += n
			}
		}
	}
	for group := range count {
		common := None
		for id, n := range count[group] {
			if n > count[group][common] || n == count[group][common] && id < common {
				common = id
			}
		}
		if common != None {
			s.common[group] = common
			t.update.Verdicts[Pair{s.id, ID(group).Common()}] = common
		}
	}
	for i, identity := range t.byIndex {
		if identity == nil || identity.class.kind == self || results[i] == s.common[identity.id%groups] {
			continue
		}
		s.verdicts[identity] = results[i]
		t.update.Verdicts[Pair{s.id, identity.id}] = results[i]
	}
	s.evaluated = true
}

// State is everything there is, as the update that writes it from nothing.
func (t *Table) State() *Update {
	u := newUpdate()
	for id, p := range t.profiles {
		u.Profiles[id] = p.Profile
	}
	for _, s := range t.rulesets {
		for pair, profile := range s.pairs() {
			u.Verdicts[pair] = profile
		}
	}
	for prefix, i := range t.addresses {
		u.Addresses[prefix] = i.id
	}
	for id, e := range t.endpoints {
		u.Endpoints[id] = e.policy()
	}
	return u
}
