// SPDX-License-Identifier: Apache-2.0

package source

import (
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	policyv1beta1 "sigs.k8s.io/network-policy-api/apis/v1beta1"

	"github.com/mooring-cni/mooring/daemon/model"
)

// convertClusterPolicy gives false where the policy as a whole cannot be
// understood. What is not understood in a rule fails closed, as the API asks:
// an Accept rule then matches nothing, a Deny or Pass rule denies everything.
func convertClusterPolicy(o *policyv1beta1.ClusterNetworkPolicy, r *report) (*model.ClusterPolicy, bool) {
	p := &model.ClusterPolicy{Name: o.Name, Tier: model.Tier(o.Spec.Tier), Priority: o.Spec.Priority}
	if p.Tier != model.AdminTier && p.Tier != model.BaselineTier {
		r.add("spec.tier", "%q is not a tier; want Admin or Baseline", o.Spec.Tier)
		return nil, false
	}
	if p.Priority < 0 || p.Priority > 1000 {
		r.add("spec.priority", "%d is not a priority; want 0 to 1000", p.Priority)
		return nil, false
	}
	subject, ok := clusterPods("spec.subject", o.Spec.Subject.Namespaces, o.Spec.Subject.Pods, r)
	if !ok {
		return nil, false
	}
	p.Subject = subject
	for i := range o.Spec.Ingress {
		from := &o.Spec.Ingress[i]
		b := clusterRule{field: at("spec.ingress", i), report: r}
		b.begin(from.Name, from.Action)
		for j := range from.From {
			b.pods(at(b.field+".from", j), from.From[j].Namespaces, from.From[j].Pods)
		}
		b.ports(from.Protocols)
		p.Ingress = append(p.Ingress, b.end("from"))
	}
	for i := range o.Spec.Egress {
		to := &o.Spec.Egress[i]
		b := clusterRule{field: at("spec.egress", i), report: r}
		b.begin(to.Name, to.Action)
		for j := range to.To {
			b.egressPeer(at(b.field+".to", j), &to.To[j])
		}
		b.ports(to.Protocols)
		p.Egress = append(p.Egress, b.end("to"))
	}
	return p, true
}

func clusterPods(field string, namespaces *metav1.LabelSelector, pods *policyv1beta1.NamespacedPod, r *report) (peer model.PolicyPeer, ok bool) {
	if (namespaces == nil) == (pods == nil) {
		r.add(field, "has to have either namespaces or pods")
		return peer, false
	}
	if namespaces != nil {
		selector, ok := r.selector(field+".namespaces", namespaces)
		return model.PolicyPeer{NamespaceSelector: &selector}, ok
	}
	outer, ok := r.selector(field+".pods.namespaceSelector", &pods.NamespaceSelector)
	if !ok {
		return peer, false
	}
	inner, ok := r.selector(field+".pods.podSelector", &pods.PodSelector)
	return model.PolicyPeer{NamespaceSelector: &outer, PodSelector: &inner}, ok
}

// clusterRule converts one rule and remembers whether all of it was understood.
type clusterRule struct {
	*report
	field   string
	rule    model.ClusterRule
	unsound bool
}

func (b *clusterRule) begin(name string, action policyv1beta1.ClusterNetworkPolicyRuleAction) {
	b.rule = model.ClusterRule{Name: name, Action: model.Action(action)}
	if !slices.Contains([]model.Action{model.Accept, model.Deny, model.Pass}, b.rule.Action) {
		b.add(b.field+".action", "%q is not an action; want Accept, Deny or Pass", action)
		b.rule.Action, b.unsound = model.Deny, true
	}
}

func (b *clusterRule) pods(field string, namespaces *metav1.LabelSelector, pods *policyv1beta1.NamespacedPod) {
	peer, ok := clusterPods(field, namespaces, pods, b.report)
	if !ok {
		b.unsound = true
		return
	}
	b.rule.Peers = append(b.rule.Peers, peer)
}

func (b *clusterRule) egressPeer(field string, o *policyv1beta1.ClusterNetworkPolicyEgressPeer) {
	set := 0
	for _, is := range []bool{o.Namespaces != nil, o.Pods != nil, o.Nodes != nil, len(o.Networks) > 0, len(o.DomainNames) > 0} {
		if is {
			set++
		}
	}
	switch {
	case set != 1:
		b.add(field, "has to have exactly one of namespaces, pods, nodes, networks and domainNames")
		b.unsound = true
	case len(o.DomainNames) > 0:
		b.add(field+".domainNames", "names are not resolved: write networks")
		b.unsound = true
	case o.Nodes != nil:
		selector, ok := b.selector(field+".nodes", o.Nodes)
		b.unsound = b.unsound || !ok
		if ok {
			b.rule.Peers = append(b.rule.Peers, model.PolicyPeer{Nodes: &selector})
		}
	case len(o.Networks) > 0:
		for k, text := range o.Networks {
			prefix, ok := b.prefix(at(field+".networks", k), string(text))
			b.unsound = b.unsound || !ok
			if ok {
				b.rule.Peers = append(b.rule.Peers, model.PolicyPeer{IPBlock: &model.IPBlock{CIDR: prefix}})
			}
		}
	default:
		b.pods(field, o.Namespaces, o.Pods)
	}
}

func (b *clusterRule) ports(protocols []policyv1beta1.ClusterNetworkPolicyProtocol) {
	b.rule.AllPorts = len(protocols) == 0
	for i := range protocols {
		port, ok := b.protocol(at(b.field+".protocols", i), &protocols[i])
		b.unsound = b.unsound || !ok
		if ok {
			b.rule.Ports = append(b.rule.Ports, port)
		}
	}
}

func (b *clusterRule) protocol(field string, o *policyv1beta1.ClusterNetworkPolicyProtocol) (port model.PolicyPort, ok bool) {
	var number *policyv1beta1.Port
	set := 0
	if o.TCP != nil {
		port.Protocol, number, field = model.TCP, o.TCP.DestinationPort, field+".tcp"
		set++
	}
	if o.UDP != nil {
		port.Protocol, number, field = model.UDP, o.UDP.DestinationPort, field+".udp"
		set++
	}
	if o.SCTP != nil {
		port.Protocol, number, field = model.SCTP, o.SCTP.DestinationPort, field+".sctp"
		set++
	}
	if o.DestinationNamedPort != "" {
		set++
	}
	if set != 1 {
		b.add(field, "has to have exactly one of tcp, udp, sctp and destinationNamedPort")
		return port, false
	}
	switch {
	case o.DestinationNamedPort != "":
		if errs := validation.IsValidPortName(o.DestinationNamedPort); len(errs) > 0 {
			b.add(field+".destinationNamedPort", "%q is not a port's name: %s", o.DestinationNamedPort, errs[0])
			return port, false
		}
		port.Name = intern(o.DestinationNamedPort)
		return port, true
	case number == nil:
		return port, true
	case (number.Number == 0) == (number.Range == nil):
		b.add(field+".destinationPort", "has to have either number or range")
		return port, false
	case number.Range != nil:
		start, startOK := b.port(field+".destinationPort.range.start", number.Range.Start)
		end, endOK := b.port(field+".destinationPort.range.end", number.Range.End)
		if startOK && endOK && end < start {
			b.add(field+".destinationPort.range", "%d to %d is no range", start, end)
			return port, false
		}
		port.Port, port.EndPort = start, end
		return port, startOK && endOK
	}
	port.Port, ok = b.port(field+".destinationPort.number", number.Number)
	port.EndPort = port.Port
	return port, ok
}

func (b *clusterRule) end(peers string) model.ClusterRule {
	if len(b.rule.Peers) == 0 && !b.unsound {
		b.add(b.field+"."+peers, "is empty; a rule names whom it is about")
		b.unsound = true
	}
	switch {
	case !b.unsound:
	case b.rule.Action == model.Accept:
		b.add(b.field, "is not understood as a whole and accepts nothing")
		b.rule.Peers = nil
	default:
		b.add(b.field, "is not understood as a whole and denies everything")
		b.rule.Action, b.rule.AllPeers, b.rule.AllPorts, b.rule.Peers, b.rule.Ports = model.Deny, true, true, nil, nil
	}
	return b.rule
}
