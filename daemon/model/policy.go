// SPDX-License-Identifier: Apache-2.0

package model

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Policy is a networking.k8s.io/v1 NetworkPolicy. It selects pods of its own
// namespace and isolates them in the directions that it names; what its rules
// allow adds up with what other policies allow.
type Policy struct {
	Name
	PodSelector     Selector
	Ingress, Egress bool // the directions it isolates (policyTypes, defaults resolved)
	IngressRules    []PolicyRule
	EgressRules     []PolicyRule
}

// PolicyRule allows what comes from or goes to any of Peers on any of Ports.
// "All" is said apart from the lists, so that a list that lost an unsound
// element allows less, never everything.
type PolicyRule struct {
	AllPeers bool
	Peers    []PolicyPeer
	AllPorts bool
	Ports    []PolicyPort
}

// PolicyPeer is an address block, nodes (cluster policies only), or pods: those
// that PodSelector selects (nil: all) in the namespaces that NamespaceSelector
// selects (nil: the policy's own).
type PolicyPeer struct {
	PodSelector       *Selector
	NamespaceSelector *Selector
	IPBlock           *IPBlock
	Nodes             *Selector
}

// MatchesPod tells whether the peer, in a policy of the namespace own, names a
// pod by its own and its namespace's labels. Pods are never named by IPBlock.
func (p *PolicyPeer) MatchesPod(own, namespace string, namespaceLabels, podLabels map[string]string) bool {
	if p.IPBlock != nil || p.Nodes != nil || p.PodSelector == nil && p.NamespaceSelector == nil {
		return false
	}
	if p.NamespaceSelector == nil {
		if own != namespace {
			return false
		}
	} else if !p.NamespaceSelector.Matches(namespaceLabels) {
		return false
	}
	return p.PodSelector == nil || p.PodSelector.Matches(podLabels)
}

// IPBlock is a range of addresses without some of its parts.
type IPBlock struct {
	CIDR   netip.Prefix
	Except []netip.Prefix
}

// Contains tells whether the block holds an address.
func (b *IPBlock) Contains(addr netip.Addr) bool {
	if !b.CIDR.Contains(addr) {
		return false
	}
	for _, except := range b.Except {
		if except.Contains(addr) {
			return false
		}
	}
	return true
}

// Tier is where a ClusterPolicy stands to NetworkPolicies: before or after.
type Tier string

// The tiers of cluster policies, as the API spells them.
const (
	AdminTier    Tier = "Admin"
	BaselineTier Tier = "Baseline"
)

// Action is what a rule of a ClusterPolicy does with what it matches.
type Action string

// The actions, as the API spells them. Pass leaves the rest of its tier out.
const (
	Accept Action = "Accept"
	Deny   Action = "Deny"
	Pass   Action = "Pass"
)

// ClusterPolicy is a policy.networking.k8s.io ClusterNetworkPolicy: an
// administrator's, over the pods of all namespaces. The first rule that
// matches decides, in the order of priority (low first), then of the list.
type ClusterPolicy struct {
	Name            string
	Tier            Tier
	Priority        int32
	Subject         PolicyPeer // pods, by selectors
	Ingress, Egress []ClusterRule
}

// ClusterRule is one rule of a ClusterPolicy. AllPeers is only ever set to
// refuse: a Deny or Pass that was not understood denies everybody.
type ClusterRule struct {
	Name     string
	Action   Action
	AllPeers bool
	Peers    []PolicyPeer
	AllPorts bool
	Ports    []PolicyPort
}

// PolicyPort is a port by number (EndPort equals Port), a range Port to
// EndPort, a name that each destination pod resolves for itself, or, with
// neither, every port of the protocol.
type PolicyPort struct {
	Protocol Protocol // 0: whatever protocol the pod declares for the name
	Port     uint16   // 0: all ports, or a name
	EndPort  uint16
	Name     string
}

// Matches tells whether the port names a destination. Declared are the ports of
// the destination pod, for names; nil where the destination is not a pod.
func (p *PolicyPort) Matches(protocol Protocol, port uint16, declared []ContainerPort) bool {
	switch {
	case protocol != p.Protocol && (p.Protocol != 0 || p.Name == ""):
		return false
	case p.Name != "":
		return slices.ContainsFunc(declared, func(d ContainerPort) bool {
			return d.Name == p.Name && d.Protocol == protocol && d.Port == port
		})
	case p.Port == 0:
		return true
	}
	return p.Port <= port && port <= p.EndPort
}

// Operator is how a Requirement compares.
type Operator string

// The operators of a label selector, as the API spells them.
const (
	In           Operator = "In"
	NotIn        Operator = "NotIn"
	Exists       Operator = "Exists"
	DoesNotExist Operator = "DoesNotExist"
)

// Requirement is one condition on a label.
type Requirement struct {
	Key      string
	Operator Operator
	Values   []string // sorted; of In and NotIn
}

// Selector is a label selector as data: all requirements hold. Matching labels
// are requirements with one value. Without requirements it selects everything.
type Selector []Requirement

// Matches tells whether a set of labels fulfils every requirement. As in the
// API, NotIn and DoesNotExist hold where the label is absent.
func (s Selector) Matches(labels map[string]string) bool {
	for i := range s {
		value, present := labels[s[i].Key]
		var holds bool
		switch s[i].Operator {
		case In:
			holds = present && slices.Contains(s[i].Values, value)
		case NotIn:
			holds = !present || !slices.Contains(s[i].Values, value)
		case Exists:
			holds = present
		case DoesNotExist:
			holds = !present
		}
		if !holds {
			return false
		}
	}
	return true
}

// String is the selector as kubectl writes one; equal selectors (Sorted) have
// equal strings, so it serves as a key too.
func (s Selector) String() string {
	var b strings.Builder
	for i, r := range s {
		if i > 0 {
			b.WriteByte(',')
		}
		switch r.Operator {
		case Exists:
			b.WriteString(r.Key)
		case DoesNotExist:
			b.WriteString("!" + r.Key)
		case In:
			if len(r.Values) == 1 {
				b.WriteString(r.Key + "=" + r.Values[0])
				break
			}
			b.WriteString(r.Key + " in (" + strings.Join(r.Values, ",") + ")")
		case NotIn:
			b.WriteString(r.Key + " notin (" + strings.Join(r.Values, ",") + ")")
		}
	}
	return b.String()
}

// Sorted puts requirements and their values into the order that makes equal
// selectors equal, in place.
func (s Selector) Sorted() Selector {
	for i := range s {
		slices.Sort(s[i].Values)
		s[i].Values = slices.Compact(s[i].Values)
	}
	slices.SortFunc(s, func(a, b Requirement) int {
		if c := strings.Compare(a.Key, b.Key); c != 0 {
			return c
		}
		if c := strings.Compare(string(a.Operator), string(b.Operator)); c != 0 {
			return c
		}
		return slices.Compare(a.Values, b.Values)
	})
	return slices.CompactFunc(s, func(a, b Requirement) bool {
		return a.Key == b.Key && a.Operator == b.Operator && slices.Equal(a.Values, b.Values)
	})
}

func (p PolicyPort) String() string {
	protocol := "/" + p.Protocol.String()
	if p.Protocol == 0 {
		protocol = ""
	}
	switch {
	case p.Name != "":
		return p.Name + protocol
	case p.Port == 0:
		return "*" + protocol
	case p.EndPort > p.Port:
		return strconv.Itoa(int(p.Port)) + "-" + strconv.Itoa(int(p.EndPort)) + protocol
	}
	return strconv.Itoa(int(p.Port)) + protocol
}
