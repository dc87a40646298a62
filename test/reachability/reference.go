// SPDX-License-Identifier: Apache-2.0

package reachability

import (
	"net/netip"
	"slices"
)

// Packet begins a flow, as it is after service translation.
type Packet struct {
	From, To netip.Addr
	Protocol string // "TCP", "UDP", "SCTP", or another for what policies cannot name
	Port     int
}

// Allowed says whether the packet passes what the node Here enforces: egress
// policy of a source pod of this node, ingress policy of a destination pod of
// this node.
func (w *World) Allowed(k Packet) bool {
	from, to := w.podAt(k.From), w.podAt(k.To)
	// "A Pod cannot block access to itself."
	if from != nil && from == to {
		return true
	}
	if from != nil && from.Node == w.Here && !w.egressAllowed(from, k) {
		return false
	}
	if to != nil && to.Node == w.Here && !w.ingressAllowed(to, k) {
		return false
	}
	return true
}

func (w *World) podAt(a netip.Addr) *Pod {
	for i := range w.Pods {
		if slices.Contains(w.Pods[i].Addrs, a) {
			return &w.Pods[i]
		}
	}
	return nil
}

func (w *World) nodeAt(a netip.Addr) *Node {
	for i := range w.Nodes {
		if slices.Contains(w.Nodes[i].Addrs, a) {
			return &w.Nodes[i]
		}
	}
	return nil
}

// "Traffic to and from the node where a Pod is running is always allowed,
// regardless of the IP address of the Pod or the node."
func (w *World) isOwnNode(a netip.Addr) bool {
	n := w.nodeAt(a)
	return n != nil && n.Meta.Name == w.Here
}

func (w *World) ingressAllowed(to *Pod, k Packet) bool {
	if w.isOwnNode(k.From) {
		return true
	}
	switch w.tier("Admin", to, k, true) {
	case "Accept":
		return true
	case "Deny":
		return false
	}
	isolated := false
	for _, p := range w.Policies {
		if p.Meta.Namespace != to.Meta.Namespace || !selects(p.Spec.PodSelector, to.Meta.Labels) {
			continue
		}
		// "If no policyTypes are specified on a NetworkPolicy then by default
		// Ingress will always be set."
		if len(p.Spec.PolicyTypes) > 0 && !slices.Contains(p.Spec.PolicyTypes, "Ingress") {
			continue
		}
		isolated = true
		for _, rule := range p.Spec.Ingress {
			if w.peersMatch(rule.From, p.Meta.Namespace, k.From) && portsMatch(rule.Ports, k, to) {
				return true
			}
		}
	}
	if isolated {
		return false
	}
	return w.tier("Baseline", to, k, true) != "Deny"
}

func (w *World) egressAllowed(from *Pod, k Packet) bool {
	if w.isOwnNode(k.To) {
		return true
	}
	switch w.tier("Admin", from, k, false) {
	case "Accept":
		return true
	case "Deny":
		return false
	}
	isolated := false
	for _, p := range w.Policies {
		if p.Meta.Namespace != from.Meta.Namespace || !selects(p.Spec.PodSelector, from.Meta.Labels) {
			continue
		}
		// "... and Egress will be set if the NetworkPolicy has any egress rules."
		if len(p.Spec.PolicyTypes) > 0 && !slices.Contains(p.Spec.PolicyTypes, "Egress") ||
			len(p.Spec.PolicyTypes) == 0 && len(p.Spec.Egress) == 0 {
			continue
		}
		isolated = true
		for _, rule := range p.Spec.Egress {
			if w.peersMatch(rule.To, p.Meta.Namespace, k.To) && portsMatch(rule.Ports, k, w.podAt(k.To)) {
				return true
			}
		}
	}
	if isolated {
		return false
	}
	return w.tier("Baseline", from, k, false) != "Deny"
}

// peersMatch: "If this field is empty or missing, this rule matches all
// sources (traffic not restricted by source). If this field is present and
// contains at least one item, this rule allows traffic only if the traffic
// matches at least one item."
func (w *World) peersMatch(peers []Peer, policyNamespace string, other netip.Addr) bool {
	if len(peers) == 0 {
		return true
	}
	for _, peer := range peers {
		if peer.IPBlock != nil {
			if inBlock(*peer.IPBlock, other) {
				return true
			}
			continue
		}
		pod := w.podAt(other)
		if pod == nil {
			continue
		}
		inNamespace := pod.Meta.Namespace == policyNamespace
		if peer.NamespaceSelector != nil {
			inNamespace = selects(*peer.NamespaceSelector, w.namespaceLabels(pod.Meta.Namespace))
		}
		if inNamespace && (peer.PodSelector == nil || selects(*peer.PodSelector, pod.Meta.Labels)) {
			return true
		}
	}
	return false
}

func inBlock(b IPBlock, a netip.Addr) bool {
	if !netip.MustParsePrefix(b.CIDR).Contains(a) {
		return false
	}
	for _, except := range b.Except {
		if netip.MustParsePrefix(except).Contains(a) {
			return false
		}
	}
	return true
}

// namespaceLabels has the label that the control plane sets on all namespaces.
func (w *World) namespaceLabels(name string) Labels {
	labels := Labels{"kubernetes.io/metadata.name": name}
	for _, n := range w.Namespaces {
		if n.Meta.Name == name {
			for k, v := range n.Meta.Labels {
				labels[k] = v
			}
		}
	}
	return labels
}

// portsMatch: "If this field is empty or missing, this rule matches all ports
// (traffic not restricted by port)."
func portsMatch(ports []PolicyPort, k Packet, to *Pod) bool {
	if len(ports) == 0 {
		return true
	}
	for _, p := range ports {
		protocol := p.Protocol
		if protocol == "" {
			protocol = "TCP"
		}
		if protocol != k.Protocol {
			continue
		}
		switch port := p.Port.(type) {
		case nil:
			return true
		case int:
			last := port
			if p.EndPort != 0 {
				last = p.EndPort
			}
			if port <= k.Port && k.Port <= last {
				return true
			}
		case string:
			if to == nil {
				continue
			}
			for _, declared := range to.Ports {
				if declared.Name == port && declared.Protocol == protocol && declared.ContainerPort == k.Port {
					return true
				}
			}
		}
	}
	return false
}

func selects(s Selector, labels Labels) bool {
	for key, value := range s.MatchLabels {
		if got, ok := labels[key]; !ok || got != value {
			return false
		}
	}
	for _, e := range s.MatchExpressions {
		value, has := labels[e.Key]
		switch e.Operator {
		case "In":
			if !has || !slices.Contains(e.Values, value) {
				return false
			}
		case "NotIn":
			if has && slices.Contains(e.Values, value) {
				return false
			}
		case "Exists":
			if !has {
				return false
			}
		case "DoesNotExist":
			if has {
				return false
			}
		}
	}
	return true
}

// tier gives the action that a tier of cluster policies takes, "" for none:
// "Policies with lower priority values have higher precedence"; "a rule that
// appears at the top of the ingress rules would take the highest precedence".
func (w *World) tier(tier string, subject *Pod, k Packet, ingress bool) string {
	var policies []ClusterPolicy
	for _, p := range w.ClusterPolicies {
		if p.Spec.Tier == tier && w.clusterPeerMatches(p.Spec.Subject, subject.Addrs[0]) {
			policies = append(policies, p)
		}
	}
	slices.SortStableFunc(policies, func(a, b ClusterPolicy) int { return a.Spec.Priority - b.Spec.Priority })
	for _, p := range policies {
		rules, other, to := p.Spec.Egress, k.To, w.podAt(k.To)
		if ingress {
			rules, other, to = p.Spec.Ingress, k.From, subject
		}
		for _, rule := range rules {
			peers := rule.To
			if ingress {
				peers = rule.From
			}
			matches := slices.ContainsFunc(peers, func(peer ClusterPeer) bool { return w.clusterPeerMatches(peer, other) })
			if matches && protocolsMatch(rule.Protocols, k, to) {
				return rule.Action
			}
		}
	}
	return ""
}

func (w *World) clusterPeerMatches(peer ClusterPeer, other netip.Addr) bool {
	pod := w.podAt(other)
	switch {
	case peer.Namespaces != nil:
		return pod != nil && selects(*peer.Namespaces, w.namespaceLabels(pod.Meta.Namespace))
	case peer.Pods != nil:
		return pod != nil && selects(peer.Pods.NamespaceSelector, w.namespaceLabels(pod.Meta.Namespace)) &&
			selects(peer.Pods.PodSelector, pod.Meta.Labels)
	case peer.Nodes != nil:
		node := w.nodeAt(other)
		return node != nil && selects(*peer.Nodes, node.Meta.Labels)
	}
	return slices.ContainsFunc(peer.Networks, func(cidr string) bool { return netip.MustParsePrefix(cidr).Contains(other) })
}

func protocolsMatch(protocols []ClusterProtocol, k Packet, to *Pod) bool {
	if len(protocols) == 0 {
		return true
	}
	for _, p := range protocols {
		if p.DestinationNamedPort != "" {
			if to == nil {
				continue
			}
			for _, declared := range to.Ports {
				if declared.Name == p.DestinationNamedPort && declared.Protocol == k.Protocol && declared.ContainerPort == k.Port {
					return true
				}
			}
			continue
		}
		match := map[string]*ClusterMatch{"TCP": p.TCP, "UDP": p.UDP, "SCTP": p.SCTP}[k.Protocol]
		if match == nil {
			continue
		}
		port := match.DestinationPort
		if port == nil || port.Range == nil && port.Number == k.Port ||
			port.Range != nil && port.Range.Start <= k.Port && k.Port <= port.Range.End {
			return true
		}
	}
	return false
}
