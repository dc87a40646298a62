// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/endpoint"
	"github.com/mooring-cni/mooring/daemon/model"
	"github.com/mooring-cni/mooring/daemon/policy"
)

// policies brings what the source says of policies, pods and namespaces into
// the datapath, a difference at a time. A pod that was never heard of is closed
// there: what is late here is never open.
type policies struct {
	kernel kernelSide
	log    *slog.Logger
	mode   policy.Mode

	mutex     sync.Mutex
	table     *policy.Table
	endpoints *endpoint.Registry
	applied   map[uint32]model.Endpoint // endpoints that the table knows
	host      []netip.Addr
	pods      map[model.Name]*model.Pod
	synced    bool  // the source has delivered all there is
	settled   bool  // and the datapath has it
	refusal   error // what the datapath refused: all is written again
	rulesets  map[policy.ID]denied
}

// denied is what the counter of a ruleset is about.
type denied struct {
	direction policy.Direction
	policies  []string
}

func newPolicies(config conf.Config, kernel kernelSide, log *slog.Logger) *policies {
	mode := policy.Mode(config.Policy)
	return &policies{
		kernel: kernel, log: log, mode: mode,
		table:   policy.NewTable(policy.Config{Node: config.NodeName, Mode: mode, Standalone: config.Standalone()}),
		applied: map[uint32]model.Endpoint{}, pods: map[model.Name]*model.Pod{}, rulesets: map[policy.ID]denied{},
	}
}

// follow makes the registry's endpoints known: all now, changes as they come.
func (p *policies) follow(endpoints *endpoint.Registry) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.endpoints = endpoints
	p.lookAtHost()
	p.applyEndpoints()
}

// apply takes what a source delivers, before the services do.
func (p *policies) apply(c model.Changes) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	for name, pod := range c.Pods {
		if pod == nil {
			delete(p.pods, name)
		} else {
			p.pods[name] = pod
		}
	}
	began := time.Now()
	update := p.table.Apply(c)
	p.synced = p.synced || c.Synced
	p.push(update)
	if !update.Empty() {
		p.log.Debug("policies applied", "endpoints", len(update.Endpoints), "verdicts", len(update.Verdicts), "addresses", len(update.Addresses), "took", time.Since(began))
	}
}

// endpointsChanged is called by the registry while an ADD waits: when it
// returns, the pod's policies are in place.
func (p *policies) endpointsChanged() {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.applyEndpoints()
}

func (p *policies) applyEndpoints() {
	if p.endpoints == nil {
		return
	}
	changed := map[uint32]*model.Endpoint{}
	now := map[uint32]model.Endpoint{}
	for _, e := range p.endpoints.List() {
		now[e.ID] = e
		if was, known := p.applied[e.ID]; !known || was.Pod != e.Pod || !slices.Equal(was.IPs, e.IPs) {
			changed[e.ID] = &e
		}
	}
	for id := range p.applied {
		if _, there := now[id]; !there {
			changed[id] = nil
		}
	}
	p.applied = now
	if len(changed) > 0 {
		p.push(p.table.ApplyEndpoints(changed))
	}
}

// lookAtHost tells the table which addresses are this node's own.
func (p *policies) lookAtHost() {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		p.log.Warn("read this node's addresses", "error", err)
		return
	}
	host := []netip.Addr{}
	for _, a := range addrs {
		if network, ok := a.(*net.IPNet); ok {
			if addr, ok := netip.AddrFromSlice(network.IP); ok && !addr.IsLoopback() {
				host = append(host, addr.Unmap())
			}
		}
	}
	slices.SortFunc(host, netip.Addr.Compare)
	if host = slices.Compact(host); slices.Equal(host, p.host) {
		return
	}
	p.host = host
	p.push(p.table.SetHost(host))
}

// push writes a difference; all there is, when that is the first or the last
// was refused. The mutex is held.
//
// Until the source has delivered all there is, only what closes is written: the
// policies of an earlier run go on.
func (p *policies) push(u *policy.Update) {
	if p.mode == policy.Never {
		p.settled = p.synced
		return
	}
	var err error
	switch {
	case p.synced && (!p.settled || p.refusal != nil):
		err = p.kernel.SyncPolicy(p.table.State())
		p.settled = p.settled || err == nil
	case !u.Empty():
		err = p.kernel.ApplyPolicy(u)
	}
	if err != nil && (p.refusal == nil || p.refusal.Error() != err.Error()) {
		p.log.Error("policies do not reach the datapath", "error", err)
	}
	p.refusal = err
	p.nameRulesets()
}

// nameRulesets remembers whose counters the datapath has, and has those
// forgotten that are nobody's any more.
func (p *policies) nameRulesets() {
	now := map[policy.ID]denied{}
	for id, r := range p.table.Rulesets() {
		now[id] = denied{r.Direction, r.Policies}
	}
	var gone []policy.ID
	for id := range p.rulesets {
		if _, there := now[id]; !there {
			gone = append(gone, id)
		}
	}
	p.rulesets = now
	if err := p.kernel.ForgetPolicyDrops(gone); err != nil {
		p.log.Warn("tidy counters of policies", "error", err)
	}
}

// run tries again what the datapath refused, and follows the node's addresses.
func (p *policies) run(ctx context.Context) error {
	tick := time.NewTicker(retryInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		p.mutex.Lock()
		p.lookAtHost()
		if p.refusal != nil {
			p.push(&policy.Update{})
		}
		p.mutex.Unlock()
	}
}

// report is what is seriously wrong.
func (p *policies) report() []string {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if p.refusal != nil {
		return []string{fmt.Sprintf("network policies are not up to date in the datapath: %v", p.refusal)}
	}
	return nil
}

// applying names the policies behind a drop.
func (p *policies) applying(endpoint uint32, reason string) []string {
	direction := policy.Ingress
	switch reason {
	case "policy_ingress":
	case "policy_egress":
		direction = policy.Egress
	default:
		return nil
	}
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.table.Applying(endpoint, direction)
}

// denials counts packets that policies denied.
func (p *policies) denials(visit func(direction string, policies string, packets uint64)) error {
	counts, err := p.kernel.PolicyDrops()
	if err != nil {
		return err
	}
	p.mutex.Lock()
	defer p.mutex.Unlock()
	type label struct{ direction, policies string }
	sums := map[label]uint64{}
	for id, packets := range counts {
		if r, known := p.rulesets[id]; known {
			sums[label{r.direction.String(), strings.Join(r.policies, ", ")}] += packets
		}
	}
	for l, packets := range sums {
		visit(l.direction, l.policies, packets)
	}
	return nil
}

// list is the rows of `mooring policy list`, in the order of evaluation.
func (p *policies) list() []api.Policy {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	var rows []api.Policy
	for _, l := range p.table.List() {
		row := api.Policy{
			Kind: l.Kind, Namespace: l.Namespace, Name: l.Name, Tier: string(l.Tier), Priority: l.Priority, Subject: l.Subject,
			Directions: []string{}, IngressRules: l.Rules[policy.Ingress], EgressRules: l.Rules[policy.Egress], Pods: []string{},
		}
		if l.Ingress {
			row.Directions = append(row.Directions, "ingress")
		}
		if l.Egress {
			row.Directions = append(row.Directions, "egress")
		}
		for _, pod := range l.Pods {
			row.Pods = append(row.Pods, pod.String())
		}
		rows = append(rows, row)
	}
	return rows
}

// addressesOf are a pod's or what is an address already.
func (p *policies) addressesOf(text string) ([]netip.Addr, error) {
	if addr, err := netip.ParseAddr(text); err == nil {
		return []netip.Addr{addr.Unmap()}, nil
	}
	namespace, name, ok := strings.Cut(text, "/")
	if !ok {
		return nil, api.Errorf(http.StatusBadRequest, "%q is neither NAMESPACE/POD nor an address", text)
	}
	pod := model.Name{Namespace: namespace, Name: name}
	var addrs []netip.Addr
	for _, e := range p.applied {
		if e.Pod == pod {
			addrs = append(addrs, e.IPs...)
		}
	}
	if known := p.pods[pod]; len(addrs) == 0 && known != nil {
		addrs = known.IPs
	}
	if len(addrs) == 0 {
		return nil, api.Errorf(http.StatusNotFound, "pod %s is not known, or has no address", pod)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs, nil
}

// explain answers `mooring policy explain`: what was computed, and what the
// programs do with a packet that was made for the question.
func (p *policies) explain(q api.PolicyQuestion) (api.Explanation, error) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	x := api.Explanation{From: q.From, To: q.To, Port: q.Port, Protocol: q.Protocol, Agrees: true, Answers: []api.PolicyAnswer{}}
	from, err := p.addressesOf(q.From)
	if err != nil {
		return x, err
	}
	to, err := p.addressesOf(q.To)
	if err != nil {
		return x, err
	}
	if !p.settled {
		return x, api.Errorf(http.StatusServiceUnavailable, "the policies are not all in the datapath yet")
	}
	for _, source := range from {
		for _, destination := range to {
			if source.Is4() != destination.Is4() {
				continue
			}
			protocol, err := protocolOf(q.Protocol, source.Is4())
			if err != nil {
				return x, err
			}
			a, err := p.answer(policy.Query{From: source, To: destination, Protocol: protocol, Port: q.Port})
			if err != nil {
				return x, err
			}
			x.Agrees = x.Agrees && a.Computed == a.Program
			x.Answers = append(x.Answers, a)
		}
	}
	if len(x.Answers) == 0 {
		return x, api.Errorf(http.StatusBadRequest, "%s and %s have no addresses of one family", q.From, q.To)
	}
	return x, nil
}

func protocolOf(name string, v4 bool) (model.Protocol, error) {
	switch strings.ToUpper(name) {
	case "", "TCP":
		return model.TCP, nil
	case "UDP":
		return model.UDP, nil
	case "SCTP":
		return model.SCTP, nil
	case "ICMP", "ICMPV6":
		if v4 {
			return model.ICMP, nil
		}
		return model.ICMPv6, nil
	}
	return 0, api.Errorf(http.StatusBadRequest, "%q is not a protocol; want TCP, UDP, SCTP or ICMP", name)
}

func (p *policies) answer(q policy.Query) (api.PolicyAnswer, error) {
	computed := p.table.Explain(q)
	a := api.PolicyAnswer{
		Source: q.From.String(), Destination: q.To.String(), Computed: verdict(computed.Allowed),
		Egress: p.side(computed.Egress), Ingress: p.side(computed.Ingress),
	}
	if computed.Egress == nil && computed.Ingress == nil {
		return a, api.Errorf(http.StatusNotFound, "neither %s nor %s is a pod of this node: ask the node of one of them", q.From, q.To)
	}
	passes, err := p.kernel.TryPacket(q)
	a.Program = verdict(passes)
	return a, err
}

func verdict(allowed bool) string {
	if allowed {
		return "allowed"
	}
	return "denied"
}

func (p *policies) side(s *policy.Side) *api.PolicySide {
	if s == nil {
		return nil
	}
	side := &api.PolicySide{Verdict: verdict(s.Allowed), Reason: s.Reason, Rules: []string{}, Policies: s.Policies}
	for _, rule := range s.Rules {
		side.Rules = append(side.Rules, rule.String())
	}
	if p.mode == policy.Never {
		side.Reason = "policy is never enforced on this node"
	}
	return side
}
