// SPDX-License-Identifier: Apache-2.0

// Package service turns services, their endpoint slices and the node into
// frontends and backends, as kube-proxy would. It is pure: no clock, no
// goroutine, no kernel, and the same objects give the same result in whatever
// order they came.
package service

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/mooring-cni/mooring/daemon/model"
)

// NodeContext is what a service's translation depends on besides the service:
// where this node is.
type NodeContext struct {
	Name string
	// Zone, Addresses (those that NodePorts are reached under) and PodCIDRs are
	// taken from the Node object where they are left empty.
	Zone      string
	Addresses []netip.Addr
	PodCIDRs  []netip.Prefix
	// Chosen says that Addresses are a choice: where it is empty, no node port is served.
	Chosen bool
	// Own are all addresses of the node, known from its uplinks or its object.
	Own []netip.Addr
	// Primary takes, of Addresses, the Node object's first of each family.
	Primary bool
	// A node port outside of these is not served; 0 allows all.
	NodePortFirst, NodePortLast uint16
	// Standalone nodes have no controllers beside them: a service with a
	// selector and no slice takes this node's pods, and a traffic distribution
	// needs no hints.
	Standalone bool
}

// LocalPod is a pod of this node that a service selects.
type LocalPod struct {
	Name  model.Name
	IPs   []netip.Addr
	Ports []model.ContainerPort
}

// Translate gives the frontends of a service as this node should serve them, in
// order of kind, port and address, and what of the service cannot be served.
// Pods are those that the service selects on this node; they serve it only
// while it has no slice.
func Translate(s *model.Service, parts []*model.EndpointSlice, pods []LocalPod, node *NodeContext) ([]model.Frontend, []model.Problem) {
	t := translate(s, parts, pods, node)
	return t.frontends, t.problems
}

// translation is the making of a service's frontends.
type translation struct {
	service  *model.Service
	slices   []*model.EndpointSlice
	pods     []LocalPod
	node     *NodeContext
	families [2]bool // IPv4, IPv6
	taken    map[model.AddrPort]bool

	frontends  []model.Frontend
	problems   []model.Problem
	localReady map[netip.Addr]bool // addresses of ready endpoints on this node
}

func translate(s *model.Service, parts []*model.EndpointSlice, pods []LocalPod, node *NodeContext) *translation {
	t := &translation{service: s, slices: parts, pods: pods, node: node, taken: make(map[model.AddrPort]bool)}
	for _, addr := range s.ClusterIPs {
		t.families[family(addr)] = true
	}
	if len(s.ClusterIPs) == 0 {
		t.families = [2]bool{true, true}
	}
	for i := range s.Ports {
		t.port(&s.Ports[i])
	}
	if len(s.ClusterIPs) > 0 {
		t.foreign("spec.externalIPs", s.ExternalIPs)
		t.foreign("status.loadBalancer.ingress", s.LoadBalancerIPs)
	}
	t.misplaced("spec.externalIPs", s.ExternalIPs)
	t.misplaced("status.loadBalancer.ingress", s.LoadBalancerIPs)
	slices.SortStableFunc(t.frontends, func(a, b model.Frontend) int { return cmp.Compare(rank(a.Kind), rank(b.Kind)) })
	return t
}

// rank orders kinds by who gives way where two want one address: what the
// cluster allocates goes before what anybody may write into a service.
func rank(k model.FrontendKind) int {
	switch k {
	case model.ClusterIP:
		return 0
	case model.NodePort:
		return 1
	case model.LoadBalancer:
		return 2
	}
	return 3
}

func family(addr netip.Addr) int {
	if addr.Is4() {
		return 0
	}
	return 1
}

func (t *translation) problem(field, format string, args ...any) {
	t.problems = append(t.problems, problem(t.service, field, format, args...))
}

func problem(s *model.Service, field, format string, args ...any) model.Problem {
	return model.Problem{File: s.File, Object: "Service " + s.Name.String(), Field: field, Message: fmt.Sprintf(format, args...)}
}

// foreign reports addresses of a family that the service does not have.
func (t *translation) foreign(field string, addrs []netip.Addr) {
	for _, addr := range addrs {
		if !t.families[family(addr)] {
			t.problem(field, "%s is not served: the service has no ClusterIP of its family", addr)
		}
	}
}

// misplaced reports addresses that somebody else has already. They are served:
// that is what the API has accepted, and what kube-proxy does.
func (t *translation) misplaced(field string, addrs []netip.Addr) {
	for _, addr := range addrs {
		if !t.families[family(addr)] {
			continue
		}
		if slices.ContainsFunc(t.node.PodCIDRs, func(p netip.Prefix) bool { return p.Contains(addr) }) {
			t.problem(field, "%s is an address for pods: a pod that gets it is not reached on the ports of the service", addr)
		}
		// A load balancer may well be the nodes themselves.
		if field == "spec.externalIPs" && slices.Contains(t.node.Own, addr) {
			t.problem(field, "%s is the address of node %s itself, whose own servers are not reached on the ports of the service", addr, t.node.Name)
		}
	}
}

// port makes the frontends of one port.
func (t *translation) port(p *model.ServicePort) {
	s := t.service
	field := func(name string) string { return fmt.Sprintf("spec.ports[%s].%s", portText(p), name) }
	if p.Protocol == model.SCTP {
		t.problem(field("protocol"), "SCTP is not translated; the port is not served")
		return
	}
	var served [2]*backends
	get := func(addr netip.Addr) *backends {
		i := family(addr)
		if served[i] == nil {
			served[i] = t.backends(p, addr.Is4(), field)
		}
		return served[i]
	}
	for _, addr := range s.ClusterIPs {
		b := get(addr)
		f := t.frontend(model.ClusterIP, addr, p.Port, p, b)
		f.Internal, f.Keep = b.cluster, b.keepCluster
		if s.InternalLocal {
			f.Internal, f.Keep = b.local, b.keepLocal
		}
		// From outside, an address of the cluster is used as from inside.
		f.External = f.Internal
		t.add(f)
	}
	outside := func(kind model.FrontendKind, addr netip.Addr, port uint16) {
		if !t.families[family(addr)] {
			return
		}
		b := get(addr)
		f := t.frontend(kind, addr, port, p, b)
		// Pods and processes of the cluster need no detour over the right
		// node: for them the policy Local does not hold, as in kube-proxy.
		f.Internal, f.External, f.Keep = b.cluster, b.cluster, b.keepCluster
		if s.ExternalLocal {
			f.External = b.local
		}
		f.InternalLocal = false
		if kind == model.LoadBalancer {
			f.SourceRanges = s.SourceRanges
		}
		t.add(f)
	}
	if p.NodePort != 0 && s.NodePorts {
		switch {
		case p.NodePort < t.node.NodePortFirst || t.node.NodePortLast != 0 && p.NodePort > t.node.NodePortLast:
			t.problem(field("nodePort"), "%d is outside of nodePort.range %d-%d and not served", p.NodePort, t.node.NodePortFirst, t.node.NodePortLast)
		case len(t.node.Addresses) == 0:
			why := "no address of this node is known"
			if t.node.Chosen {
				why = "this node has no address that nodePort.addresses names"
			}
			t.problem(field("nodePort"), "%d is not served: %s", p.NodePort, why)
		default:
			for _, addr := range t.node.Addresses {
				outside(model.NodePort, addr, p.NodePort)
			}
		}
	}
	for _, addr := range s.LoadBalancerIPs {
		outside(model.LoadBalancer, addr, p.Port)
	}
	for _, addr := range s.ExternalIPs {
		outside(model.ExternalIP, addr, p.Port)
	}
}

func portText(p *model.ServicePort) string {
	if p.Name != "" {
		return p.Name
	}
	return fmt.Sprint(p.Port)
}

func (t *translation) frontend(kind model.FrontendKind, addr netip.Addr, port uint16, p *model.ServicePort, b *backends) model.Frontend {
	return model.Frontend{
		AddrPort:        model.AddrPort{Addr: addr, Port: port, Protocol: p.Protocol},
		Kind:            kind,
		Service:         t.service.Name,
		PortName:        p.Name,
		AffinityTimeout: t.service.AffinityTimeout,
		InternalLocal:   t.service.InternalLocal,
		ExternalLocal:   t.service.ExternalLocal && kind != model.ClusterIP,
		HasEndpoints:    b.any,
	}
}

func (t *translation) add(f model.Frontend) {
	if t.taken[f.AddrPort] {
		// An address is often both an external and a load balancer's.
		if f.Kind == model.NodePort {
			t.problem("spec.ports.nodePort", "%s is another port's of this service, which keeps it", f.AddrPort)
		}
		return
	}
	t.taken[f.AddrPort] = true
	t.frontends = append(t.frontends, f)
}

// candidate is an endpoint that may serve a port.
type candidate struct {
	backend                     model.Backend
	ready, serving, terminating bool
	zone                        string
	zones, nodes                []string // hints
}

// backends are those of one port and family, under either traffic policy.
type backends struct {
	cluster, local         []model.Backend
	keepCluster, keepLocal []model.Backend
	any                    bool // somewhere in the cluster one is usable
}

func (t *translation) backends(p *model.ServicePort, v4 bool, field func(string) string) *backends {
	candidates := t.candidates(p, v4, field)
	inTopology := t.topology(candidates)
	b := &backends{}
	hasReady, localReady := false, false
	for i := range candidates {
		c := &candidates[i]
		b.any = b.any || c.ready || c.serving && c.terminating
		hasReady = hasReady || c.ready
		if c.ready && c.backend.Local {
			localReady = true
			if t.service.HealthCheckNodePort != 0 {
				if t.localReady == nil {
					t.localReady = make(map[netip.Addr]bool)
				}
				t.localReady[c.backend.Addr] = true
			}
		}
	}
	b.cluster = slices.Grow(b.cluster, len(candidates))
	useLocal := t.service.InternalLocal || t.service.ExternalLocal
	for i := range candidates {
		c := &candidates[i]
		place(c, p.Protocol, hasReady, inTopology == nil || inTopology(c), &b.cluster, &b.keepCluster)
		if useLocal && c.backend.Local {
			place(c, p.Protocol, localReady, true, &b.local, &b.keepLocal)
		}
	}
	if len(b.cluster) == 0 {
		b.cluster = nil
	}
	return b
}

// place puts an endpoint where its conditions say (KEP-1672): ready ones serve;
// without any, those that terminate but still serve do; terminating ones
// otherwise drain. An endpoint that is ready for other parts of the topology
// keeps its flows, and so does one that is not ready, except UDP's, whose
// clients would not notice that nobody answers.
func place(c *candidate, protocol model.Protocol, hasReady, inTopology bool, to, keep *[]model.Backend) {
	backend := c.backend
	switch {
	case c.ready && inTopology:
		backend.Selectable = true
		*to = append(*to, backend)
	case c.ready:
		*keep = append(*keep, backend)
	case c.terminating:
		backend.State = model.Terminating
		backend.Selectable = c.serving && !hasReady
		*to = append(*to, backend)
	case protocol != model.UDP:
		*keep = append(*keep, backend)
	}
}

// candidates are sorted by address and each there once.
func (t *translation) candidates(p *model.ServicePort, v4 bool, field func(string) string) []candidate {
	var candidates []candidate
	for _, slice := range t.slices {
		i := slices.IndexFunc(slice.Ports, func(e model.EndpointPort) bool { return e.Name == p.Name && e.Protocol == p.Protocol })
		if i < 0 {
			continue
		}
		candidates = slices.Grow(candidates, len(slice.Endpoints))
		for j := range slice.Endpoints {
			e := &slice.Endpoints[j]
			if len(e.Addresses) == 0 || e.Addresses[0].Is4() != v4 {
				continue
			}
			candidates = append(candidates, candidate{
				backend: model.Backend{
					AddrPort: model.AddrPort{Addr: e.Addresses[0], Port: slice.Ports[i].Port, Protocol: p.Protocol},
					NodeName: e.NodeName,
					Local:    t.isLocal(e),
				},
				ready:       e.Ready || t.service.PublishNotReady,
				serving:     e.Serving,
				terminating: e.Terminating,
				zone:        e.Zone,
				zones:       e.HintZones,
				nodes:       e.HintNodes,
			})
		}
	}
	if len(t.slices) == 0 {
		candidates = t.podCandidates(p, v4, field)
	}
	// Of two that tell different things about one address, the better one
	// holds: an address moves from slice to slice, and is in both for a while.
	slices.SortStableFunc(candidates, func(a, b candidate) int {
		return cmp.Or(compareAddrPorts(a.backend.AddrPort, b.backend.AddrPort), cmp.Compare(b.quality(), a.quality()))
	})
	return slices.CompactFunc(candidates, func(a, b candidate) bool { return a.backend.AddrPort == b.backend.AddrPort })
}

func (c *candidate) quality() int {
	q := 0
	switch {
	case c.ready:
		q = 6
	case c.serving && c.terminating:
		q = 4
	case c.terminating:
		q = 2
	}
	if c.backend.Local {
		q++
	}
	return q
}

func compareAddrPorts(a, b model.AddrPort) int {
	return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol))
}

// isLocal goes by the node's name; a slice written by hand may leave it out.
func (t *translation) isLocal(e *model.SliceEndpoint) bool {
	if e.NodeName != "" {
		return e.NodeName == t.node.Name
	}
	return slices.ContainsFunc(t.node.PodCIDRs, func(p netip.Prefix) bool { return p.Contains(e.Addresses[0]) })
}

func (t *translation) podCandidates(p *model.ServicePort, v4 bool, field func(string) string) []candidate {
	var candidates []candidate
	for i := range t.pods {
		pod := &t.pods[i]
		port := p.TargetPort
		if p.TargetName != "" {
			at := slices.IndexFunc(pod.Ports, func(c model.ContainerPort) bool { return c.Name == p.TargetName && c.Protocol == p.Protocol })
			if at < 0 {
				if !v4 && t.families[0] {
					continue // said already
				}
				t.problem(field("targetPort"), "pod %s declares no %s port named %q and does not serve", pod.Name, p.Protocol, p.TargetName)
				continue
			}
			port = pod.Ports[at].Port
		}
		for _, addr := range pod.IPs {
			if addr.Is4() != v4 {
				continue
			}
			candidates = append(candidates, candidate{
				backend: model.Backend{
					AddrPort: model.AddrPort{Addr: addr, Port: port, Protocol: p.Protocol},
					NodeName: t.node.Name,
					Local:    true,
				},
				ready:   true,
				serving: true,
			})
		}
	}
	return candidates
}

// topology tells which ready endpoints are near enough; nil: all are. As in
// kube-proxy, hints count only where every ready endpoint has one and one of
// them is for here, so that a mistake in them leaves nobody unserved.
func (t *translation) topology(candidates []candidate) func(*candidate) bool {
	t.derive(candidates)
	ready, allNodes, allZones, thisNode, thisZone := false, true, true, false, false
	for i := range candidates {
		c := &candidates[i]
		if !c.ready {
			continue
		}
		ready = true
		allNodes = allNodes && len(c.nodes) > 0
		allZones = allZones && len(c.zones) > 0
		thisNode = thisNode || slices.Contains(c.nodes, t.node.Name)
		thisZone = thisZone || slices.Contains(c.zones, t.node.Zone)
	}
	switch {
	case ready && allNodes && thisNode:
		return func(c *candidate) bool { return slices.Contains(c.nodes, t.node.Name) }
	case ready && allZones && thisZone && t.node.Zone != "":
		return func(c *candidate) bool { return slices.Contains(c.zones, t.node.Zone) }
	}
	return nil
}

// derive gives hints where no controller does: as the EndpointSlice controller
// for the service's trafficDistribution.
func (t *translation) derive(candidates []candidate) {
	if t.service.TrafficDistribution == "" || !t.node.Standalone ||
		slices.ContainsFunc(candidates, func(c candidate) bool { return len(c.zones)+len(c.nodes) > 0 }) {
		return
	}
	for i := range candidates {
		c := &candidates[i]
		if c.zone != "" {
			c.zones = []string{c.zone}
		}
		if c.backend.NodeName != "" && t.service.TrafficDistribution == "PreferSameNode" {
			c.nodes = []string{c.backend.NodeName}
		}
	}
}
