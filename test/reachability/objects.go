// SPDX-License-Identifier: Apache-2.0

// Package reachability holds what network policy is measured with: made-up
// clusters with policies, and a reference that says who reaches whom in them.
// The reference reads the API's text as it stands, rule by rule and packet by
// packet, and shares nothing with daemon/policy or daemon/source: its objects
// are the API's own, as far as a policy can see them, and reach the daemon as
// manifests.
package reachability

import (
	"encoding/json"
	"net/netip"
)

// Labels are an object's or a selector's.
type Labels map[string]string

// Meta is an object's metadata.
type Meta struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace,omitempty"`
	Labels    Labels `json:"labels,omitempty"`
}

// Namespace is a v1/Namespace.
type Namespace struct {
	Meta Meta `json:"metadata"`
}

// Node is a v1/Node.
type Node struct {
	Meta  Meta
	Addrs []netip.Addr
}

// Port is a container's port.
type Port struct {
	Name          string `json:"name,omitempty"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
}

// Pod is a v1/Pod.
type Pod struct {
	Meta  Meta
	Node  string
	Addrs []netip.Addr
	Ports []Port
}

// Expression is one of a selector's matchExpressions.
type Expression struct {
	Key      string   `json:"key"`
	Operator string   `json:"operator"`
	Values   []string `json:"values,omitempty"`
}

// Selector is a LabelSelector.
type Selector struct {
	MatchLabels      Labels       `json:"matchLabels,omitempty"`
	MatchExpressions []Expression `json:"matchExpressions,omitempty"`
}

// IPBlock is a NetworkPolicy's.
type IPBlock struct {
	CIDR   string   `json:"cidr"`
	Except []string `json:"except,omitempty"`
}

// Peer is a NetworkPolicyPeer.
type Peer struct {
	PodSelector       *Selector `json:"podSelector,omitempty"`
	NamespaceSelector *Selector `json:"namespaceSelector,omitempty"`
	IPBlock           *IPBlock  `json:"ipBlock,omitempty"`
}

// PolicyPort is a NetworkPolicyPort. Port is an int or a name.
type PolicyPort struct {
	Protocol string `json:"protocol,omitempty"`
	Port     any    `json:"port,omitempty"`
	EndPort  int    `json:"endPort,omitempty"`
}

// IngressRule is a NetworkPolicyIngressRule.
type IngressRule struct {
	From  []Peer       `json:"from,omitempty"`
	Ports []PolicyPort `json:"ports,omitempty"`
}

// EgressRule is a NetworkPolicyEgressRule.
type EgressRule struct {
	To    []Peer       `json:"to,omitempty"`
	Ports []PolicyPort `json:"ports,omitempty"`
}

// PolicySpec is a NetworkPolicySpec.
type PolicySpec struct {
	PodSelector Selector      `json:"podSelector"`
	PolicyTypes []string      `json:"policyTypes,omitempty"`
	Ingress     []IngressRule `json:"ingress,omitempty"`
	Egress      []EgressRule  `json:"egress,omitempty"`
}

// Policy is a networking.k8s.io/v1 NetworkPolicy.
type Policy struct {
	Meta Meta       `json:"metadata"`
	Spec PolicySpec `json:"spec"`
}

// NamespacedPods is a cluster policy's choice of pods in namespaces.
type NamespacedPods struct {
	NamespaceSelector Selector `json:"namespaceSelector"`
	PodSelector       Selector `json:"podSelector"`
}

// ClusterPeer is a ClusterNetworkPolicy's subject or peer: one field is set.
type ClusterPeer struct {
	Namespaces *Selector       `json:"namespaces,omitempty"`
	Pods       *NamespacedPods `json:"pods,omitempty"`
	Nodes      *Selector       `json:"nodes,omitempty"`
	Networks   []string        `json:"networks,omitempty"`
}

// PortRange is a range of ports.
type PortRange struct {
	Start int `json:"start"`
	End   int `json:"end"`
}

// ClusterPort is a number or a range.
type ClusterPort struct {
	Number int        `json:"number,omitempty"`
	Range  *PortRange `json:"range,omitempty"`
}

// ClusterMatch is what a protocol is matched on.
type ClusterMatch struct {
	DestinationPort *ClusterPort `json:"destinationPort,omitempty"`
}

// ClusterProtocol is a ClusterNetworkPolicyProtocol: one field is set.
type ClusterProtocol struct {
	TCP                  *ClusterMatch `json:"tcp,omitempty"`
	UDP                  *ClusterMatch `json:"udp,omitempty"`
	SCTP                 *ClusterMatch `json:"sctp,omitempty"`
	DestinationNamedPort string        `json:"destinationNamedPort,omitempty"`
}

// ClusterRule is a rule of a ClusterNetworkPolicy; From in ingress, To in egress.
type ClusterRule struct {
	Name      string            `json:"name,omitempty"`
	Action    string            `json:"action"`
	From      []ClusterPeer     `json:"from,omitempty"`
	To        []ClusterPeer     `json:"to,omitempty"`
	Protocols []ClusterProtocol `json:"protocols,omitempty"`
}

// ClusterSpec is a ClusterNetworkPolicySpec.
type ClusterSpec struct {
	Tier     string        `json:"tier"`
	Priority int           `json:"priority"`
	Subject  ClusterPeer   `json:"subject"`
	Ingress  []ClusterRule `json:"ingress,omitempty"`
	Egress   []ClusterRule `json:"egress,omitempty"`
}

// ClusterPolicy is a policy.networking.k8s.io ClusterNetworkPolicy.
type ClusterPolicy struct {
	Meta Meta        `json:"metadata"`
	Spec ClusterSpec `json:"spec"`
}

// World is a cluster as a policy sees it, from the node Here.
type World struct {
	Here            string
	Namespaces      []Namespace
	Nodes           []Node
	Pods            []Pod
	Policies        []Policy
	ClusterPolicies []ClusterPolicy
	Outside         []netip.Addr // addresses that are nobody's
}

type object map[string]any

// Manifests writes the world as a List, as `kubectl get -o json` would.
func (w *World) Manifests() []byte {
	var items []any
	for _, n := range w.Namespaces {
		items = append(items, object{"apiVersion": "v1", "kind": "Namespace", "metadata": n.Meta})
	}
	for _, n := range w.Nodes {
		var addrs []object
		for _, a := range n.Addrs {
			addrs = append(addrs, object{"type": "InternalIP", "address": a.String()})
		}
		items = append(items, object{"apiVersion": "v1", "kind": "Node", "metadata": n.Meta, "status": object{"addresses": addrs}})
	}
	for _, p := range w.Pods {
		var ips []object
		for _, a := range p.Addrs {
			ips = append(ips, object{"ip": a.String()})
		}
		items = append(items, object{
			"apiVersion": "v1", "kind": "Pod", "metadata": p.Meta,
			"spec":   object{"nodeName": p.Node, "containers": []object{{"name": "c", "ports": p.Ports}}},
			"status": object{"phase": "Running", "podIPs": ips},
		})
	}
	for _, p := range w.Policies {
		items = append(items, object{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": p.Meta, "spec": p.Spec})
	}
	for _, p := range w.ClusterPolicies {
		items = append(items, object{"apiVersion": "policy.networking.k8s.io/v1beta1", "kind": "ClusterNetworkPolicy", "metadata": p.Meta, "spec": p.Spec})
	}
	data, err := json.MarshalIndent(object{"apiVersion": "v1", "kind": "List", "items": items}, "", " ")
	if err != nil {
		panic(err)
	}
	return data
}
