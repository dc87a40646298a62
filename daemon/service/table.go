// SPDX-License-Identifier: Apache-2.0

package service

import (
	"cmp"
	"iter"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/mooring-cni/mooring/daemon/model"
)

// Table holds every service's frontends and brings them up to date with what
// changes: it translates only the services that a change concerns. It is not
// safe for concurrent use.
type Table struct {
	given NodeContext // as set
	node  NodeContext // with what the Node object adds
	self  *model.Node // this node's object

	services map[model.Name]*entry
	slices   map[model.Name]*model.EndpointSlice
	parts    map[model.Name][]*model.EndpointSlice // by service, sorted by name

	// Standalone only.
	pods      map[model.Name]*model.Pod
	endpoints map[uint32]*model.Endpoint
	byPod     map[model.Name][]*model.Endpoint
	local     map[string]map[model.Name]bool // namespace -> pods with endpoints
	selectors map[label]map[model.Name]bool  // services by one label that they select
	chosen    map[model.Name]label           // that label
	claims    map[model.AddrPort]claim       // who wants an address, while it is one ...
	contested map[model.AddrPort][]claim     // ... and while they are several; the first has it
	ailing    map[model.Name]bool            // services with problems
	checked   map[model.Name]bool            // services with a health check port
	listed    []model.Problem                // the list, while it is right
}

type entry struct {
	service    *model.Service
	all        []model.Frontend // as translated
	won        []model.Frontend // without those that another service has
	problems   []model.Problem
	lost       []model.Problem
	localReady int
}

type label struct{ namespace, key, value string }

type claim struct {
	service model.Name
	rank    int
}

func (a claim) compare(b claim) int {
	return cmp.Or(cmp.Compare(a.rank, b.rank), compareNames(a.service, b.service))
}

func compareNames(a, b model.Name) int {
	return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
}

// Update is what a change made different.
type Update struct {
	// Frontends are all frontends of each service that differs; nil where the
	// service is gone, empty where it has none.
	Frontends map[model.Name][]model.Frontend
	// Problems are all of the table's, not only new ones.
	Problems []model.Problem
}

// HealthCheck is what a load balancer wants to know of a service: whether this
// node has a ready endpoint of its own.
type HealthCheck struct {
	Service    model.Name
	Port       uint16
	LocalReady int
}

// NewTable makes an empty table for a node.
func NewTable(node NodeContext) *Table {
	t := &Table{
		given:     node,
		services:  make(map[model.Name]*entry),
		slices:    make(map[model.Name]*model.EndpointSlice),
		parts:     make(map[model.Name][]*model.EndpointSlice),
		pods:      make(map[model.Name]*model.Pod),
		endpoints: make(map[uint32]*model.Endpoint),
		byPod:     make(map[model.Name][]*model.Endpoint),
		local:     make(map[string]map[model.Name]bool),
		selectors: make(map[label]map[model.Name]bool),
		chosen:    make(map[model.Name]label),
		claims:    make(map[model.AddrPort]claim),
		contested: make(map[model.AddrPort][]claim),
		ailing:    make(map[model.Name]bool),
		checked:   make(map[model.Name]bool),
	}
	t.locate()
	return t
}

// All gives every service and its frontends, in no order.
func (t *Table) All() iter.Seq2[model.Name, []model.Frontend] {
	return func(yield func(model.Name, []model.Frontend) bool) {
		for name, e := range t.services {
			if !yield(name, e.won) {
				return
			}
		}
	}
}

// Frontends gives one service's frontends.
func (t *Table) Frontends(name model.Name) ([]model.Frontend, bool) {
	e := t.services[name]
	if e == nil {
		return nil, false
	}
	return e.won, true
}

// Apply takes what a source delivers.
func (t *Table) Apply(c model.Changes) Update {
	dirty := make(map[model.Name]bool, len(c.Services))
	if len(t.services) == 0 && len(t.slices) == 0 {
		// Maps that grow are filled twice over.
		t.services, t.claims = make(map[model.Name]*entry, len(c.Services)), make(map[model.AddrPort]claim, len(c.Services))
		t.slices, t.parts = make(map[model.Name]*model.EndpointSlice, len(c.Slices)), make(map[model.Name][]*model.EndpointSlice, len(c.Slices))
	}
	if node, changed := c.Nodes[t.given.Name]; changed {
		t.self = node
		t.relocate(dirty)
	}
	for name, s := range c.Services {
		t.setService(name, s)
		dirty[name] = true
	}
	for name, slice := range c.Slices {
		t.setSlice(name, slice, dirty)
	}
	if t.given.Standalone {
		for name, pod := range c.Pods {
			t.setPod(name, pod, dirty)
		}
	}
	return t.update(dirty)
}

// ApplyEndpoints takes the pods' interfaces of this node that became different,
// by id; nil where one is gone.
func (t *Table) ApplyEndpoints(changed map[uint32]*model.Endpoint) Update {
	dirty := make(map[model.Name]bool)
	if t.given.Standalone {
		for id, e := range changed {
			if before := t.endpoints[id]; before != nil {
				t.selecting(before.Pod, t.pods[before.Pod], dirty)
				t.drop(before)
			}
			if e != nil {
				t.add(e)
				t.selecting(e.Pod, t.pods[e.Pod], dirty)
			}
		}
	}
	return t.update(dirty)
}

// SetNode tells where the node is now.
func (t *Table) SetNode(node NodeContext) Update {
	dirty := make(map[model.Name]bool)
	if t.self != nil && t.self.Name != node.Name {
		t.self = nil
	}
	t.given = node
	t.relocate(dirty)
	return t.update(dirty)
}

func (t *Table) relocate(dirty map[model.Name]bool) {
	before := t.node
	t.locate()
	if reflect.DeepEqual(before, t.node) {
		return
	}
	for name := range t.services {
		dirty[name] = true
	}
}

func (t *Table) locate() {
	t.node = t.given
	if t.node.Primary {
		t.node.Addresses = firstOfEachFamily(t.node.Addresses)
	}
	if t.self == nil {
		return
	}
	if t.node.Zone == "" {
		t.node.Zone = t.self.Zone
	}
	if t.node.Primary {
		t.node.Addresses = firstOfEachFamily(t.self.Addresses)
	} else if len(t.node.Addresses) == 0 && !t.node.Chosen {
		t.node.Addresses = t.self.Addresses
	}
	for _, addr := range t.self.Addresses {
		if !slices.Contains(t.node.Own, addr) {
			t.node.Own = append(slices.Clip(t.node.Own), addr)
		}
	}
	if len(t.node.PodCIDRs) == 0 {
		t.node.PodCIDRs = t.self.PodCIDRs
	}
}

func firstOfEachFamily(addrs []netip.Addr) (first []netip.Addr) {
	for _, v4 := range []bool{true, false} {
		if i := slices.IndexFunc(addrs, func(a netip.Addr) bool { return a.Is4() == v4 }); i >= 0 {
			first = append(first, addrs[i])
		}
	}
	return first
}

// NodeAddresses are those that node ports are served on.
func (t *Table) NodeAddresses() []netip.Addr { return t.node.Addresses }

// NodeAddressesChosen tells whether NodeAddresses are a choice among the node's.
func (t *Table) NodeAddressesChosen() bool { return t.node.Chosen || t.node.Primary }

func (t *Table) setService(name model.Name, s *model.Service) {
	if at, ok := t.chosen[name]; ok {
		delete(t.selectors[at], name)
		if len(t.selectors[at]) == 0 {
			delete(t.selectors, at)
		}
		delete(t.chosen, name)
	}
	if s == nil {
		if e := t.services[name]; e != nil {
			e.service = nil
		}
		return
	}
	if e := t.services[name]; e != nil {
		e.service = s
	} else {
		t.services[name] = &entry{service: s}
	}
	if !t.given.Standalone || len(s.Selector) == 0 {
		return
	}
	// The label that the fewest services share finds a pod's services fastest.
	var best label
	for _, key := range sortedKeys(s.Selector) {
		l := label{name.Namespace, key, s.Selector[key]}
		if best.key == "" || len(t.selectors[l]) < len(t.selectors[best]) {
			best = l
		}
	}
	if t.selectors[best] == nil {
		t.selectors[best] = make(map[model.Name]bool)
	}
	t.selectors[best][name] = true
	t.chosen[name] = best
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

func (t *Table) setSlice(name model.Name, slice *model.EndpointSlice, dirty map[model.Name]bool) {
	if before := t.slices[name]; before != nil {
		// The list may be a translation's: it is replaced, not changed.
		parts := slices.DeleteFunc(slices.Clone(t.parts[before.Service]), func(s *model.EndpointSlice) bool { return s == before })
		if t.parts[before.Service] = parts; len(parts) == 0 {
			delete(t.parts, before.Service)
		}
		dirty[before.Service] = true
	}
	if slice == nil {
		delete(t.slices, name)
		return
	}
	t.slices[name] = slice
	parts := append(slices.Clip(t.parts[slice.Service]), slice)
	slices.SortFunc(parts, func(a, b *model.EndpointSlice) int { return compareNames(a.Name, b.Name) })
	t.parts[slice.Service] = parts
	dirty[slice.Service] = true
}

func (t *Table) setPod(name model.Name, pod *model.Pod, dirty map[model.Name]bool) {
	if len(t.byPod[name]) > 0 {
		t.selecting(name, t.pods[name], dirty)
		t.selecting(name, pod, dirty)
	}
	if pod == nil {
		delete(t.pods, name)
	} else {
		t.pods[name] = pod
	}
}

func (t *Table) add(e *model.Endpoint) {
	t.endpoints[e.ID] = e
	t.byPod[e.Pod] = append(t.byPod[e.Pod], e)
	if t.local[e.Pod.Namespace] == nil {
		t.local[e.Pod.Namespace] = make(map[model.Name]bool)
	}
	t.local[e.Pod.Namespace][e.Pod] = true
}

func (t *Table) drop(e *model.Endpoint) {
	delete(t.endpoints, e.ID)
	t.byPod[e.Pod] = slices.DeleteFunc(t.byPod[e.Pod], func(other *model.Endpoint) bool { return other == e })
	if len(t.byPod[e.Pod]) == 0 {
		delete(t.byPod, e.Pod)
		if delete(t.local[e.Pod.Namespace], e.Pod); len(t.local[e.Pod.Namespace]) == 0 {
			delete(t.local, e.Pod.Namespace)
		}
	}
}

// selecting notes the services that take a pod of this node as a backend.
func (t *Table) selecting(name model.Name, pod *model.Pod, dirty map[model.Name]bool) {
	if pod == nil {
		return
	}
	for key, value := range pod.Labels {
		for service := range t.selectors[label{name.Namespace, key, value}] {
			if len(t.parts[service]) == 0 && selects(t.services[service].service.Selector, pod.Labels) {
				dirty[service] = true
			}
		}
	}
}

func selects(selector, labels map[string]string) bool {
	for key, value := range selector {
		if got, ok := labels[key]; !ok || got != value {
			return false
		}
	}
	return true
}

// localPods are the pods of this node that a service selects.
func (t *Table) localPods(s *model.Service) []LocalPod {
	if !t.given.Standalone || len(s.Selector) == 0 || len(t.parts[s.Name]) > 0 {
		return nil
	}
	var pods []LocalPod
	for name := range t.local[s.Namespace] {
		pod := t.pods[name]
		if pod == nil || !selects(s.Selector, pod.Labels) {
			continue
		}
		pods = append(pods, LocalPod{Name: name, IPs: podIPs(t.byPod[name]), Ports: pod.Ports})
	}
	slices.SortFunc(pods, func(a, b LocalPod) int { return compareNames(a.Name, b.Name) })
	return pods
}

// podIPs are a pod's own addresses: those of its first interface, not of others
// that further networks give it.
func podIPs(endpoints []*model.Endpoint) []netip.Addr {
	first := slices.MinFunc(endpoints, func(a, b *model.Endpoint) int {
		return cmp.Or(cmp.Compare(interfaceRank(a), interfaceRank(b)), strings.Compare(a.PodIfname, b.PodIfname))
	}).PodIfname
	var ips []netip.Addr
	for _, e := range endpoints {
		if e.PodIfname == first {
			ips = append(ips, e.IPs...)
		}
	}
	return ips
}

func interfaceRank(e *model.Endpoint) int {
	if e.PodIfname == "eth0" {
		return 0
	}
	return 1
}

// update translates the services that changed and settles who has an address.
func (t *Table) update(dirty map[model.Name]bool) Update {
	if len(dirty) == 0 {
		return Update{Problems: t.Problems()}
	}
	unsettled := make(map[model.Name]bool, len(dirty))
	for name := range dirty {
		e := t.services[name]
		if e == nil {
			continue // a slice of a service that is not known, or not ours
		}
		unsettled[name] = true
		t.translate(name, e, unsettled)
	}
	u := Update{Frontends: make(map[model.Name][]model.Frontend, len(unsettled))}
	for name := range unsettled {
		e := t.services[name]
		if e.service == nil {
			delete(t.services, name)
			delete(t.ailing, name)
			delete(t.checked, name)
			u.Frontends[name] = nil
			continue
		}
		if t.settle(name, e) {
			u.Frontends[name] = e.won
		}
		if len(e.problems)+len(e.lost) > 0 {
			t.ailing[name] = true
		} else {
			delete(t.ailing, name)
		}
	}
	t.listed = nil
	u.Problems = t.Problems()
	return u
}

// translate brings a service's frontends and its claims up to date, and notes
// the others whose claims this touches.
func (t *Table) translate(name model.Name, e *entry, touched map[model.Name]bool) {
	before := e.all
	e.all, e.problems = nil, nil
	if e.service != nil {
		made := translate(e.service, t.parts[name], t.localPods(e.service), &t.node)
		e.all, e.problems, e.localReady = made.frontends, made.problems, len(made.localReady)
		if e.service.HealthCheckNodePort != 0 {
			t.checked[name] = true
		} else {
			delete(t.checked, name)
		}
	}
	if slices.EqualFunc(before, e.all, func(a, b model.Frontend) bool { return a.AddrPort == b.AddrPort && a.Kind == b.Kind }) {
		return
	}
	for i := range before {
		t.release(before[i].AddrPort, name, touched)
	}
	for i := range e.all {
		t.claim(e.all[i].AddrPort, claim{name, rank(e.all[i].Kind)}, touched)
	}
}

func (t *Table) claim(addr model.AddrPort, c claim, touched map[model.Name]bool) {
	if several := t.contested[addr]; several != nil {
		at, _ := slices.BinarySearchFunc(several, c, claim.compare)
		t.contested[addr] = slices.Insert(several, at, c)
	} else if other, ok := t.claims[addr]; ok {
		delete(t.claims, addr)
		both := []claim{other, c}
		slices.SortFunc(both, claim.compare)
		t.contested[addr] = both
	} else {
		t.claims[addr] = c
		return
	}
	for _, other := range t.contested[addr] {
		touched[other.service] = true
	}
}

func (t *Table) release(addr model.AddrPort, name model.Name, touched map[model.Name]bool) {
	several := t.contested[addr]
	if several == nil {
		delete(t.claims, addr)
		return
	}
	several = slices.DeleteFunc(several, func(c claim) bool { return c.service == name })
	for _, other := range several {
		touched[other.service] = true
	}
	if t.contested[addr] = several; len(several) == 1 {
		t.claims[addr] = several[0]
		delete(t.contested, addr)
	}
}

// settle leaves a service the frontends that no other has; true: they differ.
func (t *Table) settle(name model.Name, e *entry) bool {
	won := e.all
	e.lost = nil
	for i := range e.all {
		several := t.contested[e.all[i].AddrPort]
		if several == nil || several[0].service == name {
			if e.lost != nil {
				won = append(won, e.all[i])
			}
			continue
		}
		if e.lost == nil {
			won = slices.Clone(e.all[:i])
		}
		e.lost = append(e.lost, problem(e.service, fieldOf(e.all[i].Kind), "%s is served for Service %s%s, which comes first; not for this one",
			e.all[i].AddrPort, several[0].service, t.fileOf(several[0].service)))
	}
	if won == nil {
		won = []model.Frontend{}
	}
	same := e.won != nil && slices.EqualFunc(e.won, won, equalFrontends)
	e.won = won
	return !same
}

func (t *Table) fileOf(name model.Name) string {
	if e := t.services[name]; e != nil && e.service != nil && e.service.File != "" {
		return " (" + e.service.File + ")"
	}
	return ""
}

func fieldOf(k model.FrontendKind) string {
	switch k {
	case model.NodePort:
		return "spec.ports.nodePort"
	case model.LoadBalancer:
		return "status.loadBalancer.ingress"
	case model.ExternalIP:
		return "spec.externalIPs"
	}
	return "spec.clusterIPs"
}

func equalFrontends(a, b model.Frontend) bool {
	return a.AddrPort == b.AddrPort && a.Kind == b.Kind && a.Service == b.Service && a.PortName == b.PortName &&
		a.AffinityTimeout == b.AffinityTimeout && a.InternalLocal == b.InternalLocal && a.ExternalLocal == b.ExternalLocal &&
		a.HasEndpoints == b.HasEndpoints && slices.Equal(a.SourceRanges, b.SourceRanges) &&
		slices.Equal(a.Internal, b.Internal) && slices.Equal(a.External, b.External) && slices.Equal(a.Keep, b.Keep)
}

// HealthChecks gives every health check port of this node, sorted by service.
// A port that two services name is the first one's.
func (t *Table) HealthChecks() []HealthCheck {
	checks, _ := t.healthChecks()
	return checks
}

func (t *Table) healthChecks() (checks []HealthCheck, problems []model.Problem) {
	for name := range t.checked {
		checks = append(checks, HealthCheck{name, t.services[name].service.HealthCheckNodePort, t.services[name].localReady})
	}
	slices.SortFunc(checks, func(a, b HealthCheck) int { return compareNames(a.Service, b.Service) })
	owners := make(map[uint16]model.Name, len(checks))
	checks = slices.DeleteFunc(checks, func(c HealthCheck) bool {
		owner, taken := owners[c.Port]
		if !taken {
			owners[c.Port] = c.Service
			return false
		}
		problems = append(problems, problem(t.services[c.Service].service, "spec.healthCheckNodePort", "%d is answered for Service %s%s, which comes first; not for this one",
			c.Port, owner, t.fileOf(owner)))
		return true
	})
	return checks, problems
}

// Problems gives all problems as they stand, sorted. Nobody writes to the list.
func (t *Table) Problems() []model.Problem {
	if t.listed != nil {
		return t.listed
	}
	t.listed = []model.Problem{}
	for name := range t.ailing {
		t.listed = append(append(t.listed, t.services[name].problems...), t.services[name].lost...)
	}
	_, checks := t.healthChecks()
	t.listed = append(t.listed, checks...)
	slices.SortFunc(t.listed, model.CompareProblems)
	return t.listed
}
