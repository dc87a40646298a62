// SPDX-License-Identifier: Apache-2.0

// Package model holds the nouns that the daemon's parts exchange. It knows
// neither Kubernetes' Go types nor the kernel's maps: netip and stdlib only.
package model

import (
	"net/netip"
	"time"
)

// Name is the identity of a namespaced object.
type Name struct{ Namespace, Name string }

func (n Name) String() string { return n.Namespace + "/" + n.Name }

// Protocol is an IP protocol number (IANA): TCP 6, UDP 17, SCTP 132.
type Protocol uint8

// The protocols that a Service or a policy can name.
const (
	ICMP   Protocol = 1
	TCP    Protocol = 6
	UDP    Protocol = 17
	ICMPv6 Protocol = 58
	SCTP   Protocol = 132
)

func (p Protocol) String() string {
	switch p {
	case ICMP:
		return "ICMP"
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	case ICMPv6:
		return "ICMPv6"
	case SCTP:
		return "SCTP"
	}
	return "?"
}

// Service is what Mooring needs of a v1/Service.
type Service struct {
	Name
	UID                 string
	File                string // the manifest that defines it, for problems; empty from the API
	ClusterIPs          []netip.Addr
	ExternalIPs         []netip.Addr
	LoadBalancerIPs     []netip.Addr // status.loadBalancer.ingress, ipMode VIP only
	SourceRanges        []netip.Prefix
	Ports               []ServicePort
	Selector            map[string]string
	NodePorts           bool          // type NodePort, or LoadBalancer with allocated node ports
	AffinityTimeout     time.Duration // 0: no session affinity
	InternalLocal       bool          // internalTrafficPolicy: Local
	ExternalLocal       bool          // externalTrafficPolicy: Local
	HealthCheckNodePort uint16
	PublishNotReady     bool
	TrafficDistribution string // "", "PreferClose", "PreferSameZone", "PreferSameNode"
}

// ServicePort is one port of a Service. TargetName is set where the target
// port is a name, which each pod resolves for itself.
type ServicePort struct {
	Name       string
	Protocol   Protocol
	Port       uint16
	NodePort   uint16
	TargetPort uint16
	TargetName string
}

// EndpointSlice is what Mooring needs of a discovery.k8s.io/v1 EndpointSlice.
type EndpointSlice struct {
	Name
	Service   Name // from the label kubernetes.io/service-name
	Ports     []EndpointPort
	Endpoints []SliceEndpoint
}

// EndpointPort names a port of every endpoint in a slice.
type EndpointPort struct {
	Name     string
	Protocol Protocol
	Port     uint16
}

// SliceEndpoint is one endpoint of a slice with its conditions, nil resolved
// to the API's defaults (ready true, serving = ready, terminating false).
type SliceEndpoint struct {
	Addresses                   []netip.Addr
	NodeName                    string
	Zone                        string
	HintZones                   []string
	HintNodes                   []string
	Pod                         Name
	Ready, Serving, Terminating bool
}

// Pod is what Mooring needs of a v1/Pod.
type Pod struct {
	Name
	UID         string
	Labels      map[string]string
	NodeName    string
	HostNetwork bool
	IPs         []netip.Addr
	Ports       []ContainerPort
}

// ContainerPort is a named or numbered port that a pod's container declares.
type ContainerPort struct {
	Name     string
	Protocol Protocol
	Port     uint16
	HostPort uint16
}

// Namespace carries the labels that policies select on.
type Namespace struct {
	Name   string
	Labels map[string]string
}

// Node is a node of the cluster.
type Node struct {
	Name      string
	Labels    map[string]string
	Zone      string
	Addresses []netip.Addr // InternalIPs first, then ExternalIPs
	PodCIDRs  []netip.Prefix
	Leaving   bool // it is being deleted: load balancers are not to send to it
}

// Endpoint is a pod's interface on this node, as the CNI plugin made it.
type Endpoint struct {
	ID          uint32       `json:"id"` // given by the daemon, 1..65535
	ContainerID string       `json:"containerID"`
	PodIfname   string       `json:"podIfname"` // CNI_IFNAME
	Network     string       `json:"network"`   // CNI network name
	Pod         Name         `json:"pod"`
	PodUID      string       `json:"podUID"`
	IPs         []netip.Addr `json:"ips"`
	Interface   string       `json:"interface"` // host end, lxc...
	Ifindex     int          `json:"ifindex"`   // of the host end, in the node's network namespace
	MAC         string       `json:"mac"`       // the pod's end
	HostMAC     string       `json:"hostMAC"`   // the host's end: the pod's gateway
	Netns       string       `json:"netns"`     // CNI_NETNS
}

// FrontendKind says where a frontend's address comes from.
type FrontendKind string

// The kinds of frontend, as the client prints them.
const (
	ClusterIP    FrontendKind = "ClusterIP"
	NodePort     FrontendKind = "NodePort"
	ExternalIP   FrontendKind = "ExternalIP"
	LoadBalancer FrontendKind = "LoadBalancer"
)

// AddrPort is an address, port and protocol: the key of a frontend or backend.
type AddrPort struct {
	Addr     netip.Addr
	Port     uint16
	Protocol Protocol
}

// Frontend is one address and port under which a service is reached, and the
// backends that serve it from this node's point of view. It is what
// daemon/service computes and daemon/datapath writes.
type Frontend struct {
	AddrPort
	Kind            FrontendKind
	Service         Name
	PortName        string
	AffinityTimeout time.Duration
	// Internal are the backends for pods and processes of this node; External
	// those for clients that arrive at an uplink. Sorted, without duplicates.
	// The frontends of a service share these slices: read them only.
	Internal, External []Backend
	// Keep are endpoints that get no new connection and that nobody lists, but
	// whose established flows go on, as kube-proxy leaves them alone: ready
	// elsewhere in the topology, or (not UDP) not ready without terminating.
	Keep          []Backend
	InternalLocal bool // internalTrafficPolicy: Local, for "dropped, not refused"
	ExternalLocal bool
	// HasEndpoints says that somewhere in the cluster an endpoint is usable.
	// With it, a policy Local that leaves this node no backend drops; without
	// it, and for every other empty list, the connection is refused.
	HasEndpoints bool
	SourceRanges []netip.Prefix // LoadBalancer only; empty allows all
}

// BackendState tells whether new connections may go to a backend.
type BackendState uint8

// Terminating backends keep their established flows and get new ones only
// when no active backend is left (KEP-1672).
const (
	Active BackendState = iota
	Terminating
)

func (s BackendState) String() string {
	if s == Terminating {
		return "terminating"
	}
	return "active"
}

// Backend is one address and port that serves a frontend. Selectable is false
// for a terminating backend that only drains.
type Backend struct {
	AddrPort
	State      BackendState
	Selectable bool
	NodeName   string
	Local      bool // on this node
}

// String is the address as people write it: 10.96.0.10:80/TCP.
func (a AddrPort) String() string {
	return netip.AddrPortFrom(a.Addr, a.Port).String() + "/" + a.Protocol.String()
}
