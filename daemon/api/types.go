// SPDX-License-Identifier: Apache-2.0

// Package api is the daemon's local API: JSON over HTTP on a unix socket. The
// types here are what `mooring -o json` prints; their keys are stable.
package api

import (
	"net/netip"

	"github.com/mooring-cni/mooring/daemon/model"
)

// Status answers `mooring status`.
type Status struct {
	Node      string      `json:"node"`
	Version   string      `json:"version"`
	Kernel    string      `json:"kernel"`
	Mode      string      `json:"mode"` // standalone or kubernetes
	Hook      HookStatus  `json:"hook"`
	XDP       []XDPStatus `json:"xdp"`
	Endpoints int         `json:"endpoints"`
	Services  int         `json:"services"`
	Backends  int         `json:"backends"`
	Conntrack TableStatus `json:"conntrack"`
	Healthy   bool        `json:"healthy"`
	Problems  []string    `json:"problems"`
}

// HookStatus says how socket ends are noticed, and why that way.
type HookStatus struct {
	Mode   string `json:"mode"` // trampoline, tracepoint or off
	Reason string `json:"reason"`
}

// XDPStatus is the XDP mode of one uplink.
type XDPStatus struct {
	Device string `json:"device"`
	Mode   string `json:"mode"`             // native, generic or off
	Reason string `json:"reason,omitempty"` // why not the one before it in this order
}

// TableStatus is the fill of the conntrack table.
type TableStatus struct {
	Entries    uint64 `json:"entries"`
	MaxEntries uint64 `json:"maxEntries"`
}

// Connection is one row of `mooring ct list`.
type Connection struct {
	Type             string `json:"type"`     // SVC, EGRESS or INGRESS
	Protocol         string `json:"protocol"` // TCP, UDP, ICMP or ICMPv6
	Source           string `json:"source"`
	Destination      string `json:"destination"`
	Translation      string `json:"translation"` // the backend for SVC, the service address for EGRESS and INGRESS; empty without service
	State            string `json:"state"`       // new, established, closing or timewait
	Tethered         bool   `json:"tethered"`
	SocketCookie     uint64 `json:"socketCookie"`
	ExpiresInSeconds int64  `json:"expiresInSeconds"` // without its owner; 0 while a socket owns it
	Packets          uint64 `json:"packets"`
	Bytes            uint64 `json:"bytes"`
	Endpoint         uint32 `json:"endpoint"`
}

// ConntrackStats answers `mooring ct stats`.
type ConntrackStats struct {
	Entries      uint64     `json:"entries"`
	MaxEntries   uint64     `json:"maxEntries"`
	Tethered     uint64     `json:"tethered"`
	Created      uint64     `json:"created"`
	Deleted      Deleted    `json:"deleted"`
	Evicted      uint64     `json:"evicted"`
	InsertFailed uint64     `json:"insertFailed"`
	DeleteFailed uint64     `json:"deleteFailed"`
	Sweep        SweepStats `json:"sweep"`
}

// Deleted counts deleted entries by what ended them.
type Deleted struct {
	Socket   uint64 `json:"socket"`
	Timewait uint64 `json:"timewait"`
	Expired  uint64 `json:"expired"`
	Endpoint uint64 `json:"endpoint"`
	Backend  uint64 `json:"backend"`
	Flush    uint64 `json:"flush"`
}

// SweepStats is the reaper's work.
type SweepStats struct {
	Runs            uint64  `json:"runs"`
	Scanned         uint64  `json:"scanned"`
	IntervalSeconds float64 `json:"intervalSeconds"`
	CPUSeconds      float64 `json:"cpuSeconds"`
}

// Service is one row of `mooring service list`.
type Service struct {
	Namespace string     `json:"namespace"`
	Name      string     `json:"name"`
	Frontends []Frontend `json:"frontends"`
}

// Frontend is one address of a Service.
type Frontend struct {
	Address  string    `json:"address"`
	Port     uint16    `json:"port"`
	Protocol string    `json:"protocol"`
	Kind     string    `json:"kind"`
	Backends []Backend `json:"backends"`
}

// Backend is one backend of a frontend.
type Backend struct {
	Address string `json:"address"`
	Port    uint16 `json:"port"`
	State   string `json:"state"` // active or terminating
}

// Endpoint is one row of `mooring endpoint list`.
type Endpoint struct {
	ID          uint32       `json:"id"`
	ContainerID string       `json:"containerID"`
	Ifname      string       `json:"ifname"` // in the pod
	Namespace   string       `json:"namespace"`
	Pod         string       `json:"pod"`
	IPs         []netip.Addr `json:"ips"`
	Interface   string       `json:"interface"` // on the host
	MAC         string       `json:"mac"`
	Netns       string       `json:"netns"`
}

// Event is one line of `mooring monitor`.
type Event struct {
	Time        string `json:"time"` // RFC 3339, nanoseconds
	Kind        string `json:"kind"` // drop, new or end
	Reason      string `json:"reason,omitempty"`
	Endpoint    uint32 `json:"endpoint"`
	Pod         string `json:"pod,omitempty"`
	Direction   string `json:"direction"` // from or to the endpoint, or wire
	Protocol    string `json:"protocol"`
	Source      string `json:"source"`
	Destination string `json:"destination"`
	Translation string `json:"translation,omitempty"`
	Bytes       uint32 `json:"bytes,omitempty"`

	// Policies apply to the endpoint, where the reason is policy_ingress or policy_egress.
	Policies []string `json:"policies,omitempty"`
}

// Policy is one row of `mooring policy list`.
type Policy struct {
	Kind         string   `json:"kind"` // NetworkPolicy or ClusterNetworkPolicy
	Namespace    string   `json:"namespace,omitempty"`
	Name         string   `json:"name"`
	Tier         string   `json:"tier,omitempty"` // of a ClusterNetworkPolicy: Admin or Baseline
	Priority     int32    `json:"priority"`
	Subject      string   `json:"subject"`
	Directions   []string `json:"directions"` // ingress, egress
	IngressRules int      `json:"ingressRules"`
	EgressRules  int      `json:"egressRules"`
	Pods         []string `json:"pods"` // that it selects, of this node
}

// PolicyQuestion is what `mooring policy explain` asks. From and To are
// NAMESPACE/POD or addresses.
type PolicyQuestion struct {
	From, To string
	Port     uint16
	Protocol string // TCP, UDP, SCTP or ICMP
}

// Explanation answers a PolicyQuestion for every pair of addresses.
type Explanation struct {
	From     string         `json:"from"`
	To       string         `json:"to"`
	Port     uint16         `json:"port"`
	Protocol string         `json:"protocol"`
	Agrees   bool           `json:"agrees"` // computation and program, everywhere
	Answers  []PolicyAnswer `json:"answers"`
}

// PolicyAnswer is the answer for two addresses. A direction that is not
// decided on this node is left out.
type PolicyAnswer struct {
	Source      string      `json:"source"`
	Destination string      `json:"destination"`
	Computed    string      `json:"computed"` // allowed or denied: from what the maps are filled from
	Program     string      `json:"program"`  // what the programs did with a made packet
	Egress      *PolicySide `json:"egress,omitempty"`
	Ingress     *PolicySide `json:"ingress,omitempty"`
}

// PolicySide is what one end's policies say.
type PolicySide struct {
	Verdict  string   `json:"verdict"`
	Reason   string   `json:"reason"`
	Rules    []string `json:"rules"`    // that decided
	Policies []string `json:"policies"` // that apply
}

// Drop is why and where packets were dropped, as metrics label it.
type Drop struct{ Reason, Direction string }

// DropCount counts dropped packets.
type DropCount struct{ Packets, Bytes uint64 }

// AddEndpoint is what the CNI plugin sends when it has made a pod's interface,
// before the link comes up. PUT /v1/endpoints/{containerID}/{ifname}. It is
// idempotent: the same request again answers the same endpoint.
type AddEndpoint = model.Endpoint

// Node is what the plugin needs of the daemon before it makes anything.
// GET /v1/node.
type Node struct {
	Name     string         `json:"name"`
	MTU      int            `json:"mtu"` // for pod interfaces: the uplink's, less encapsulation
	BPFFS    string         `json:"bpffs"`
	StateDir string         `json:"stateDir"`
	PodCIDRs []netip.Prefix `json:"podCIDRs"`
	Ready    bool           `json:"ready"`
	Reason   string         `json:"reason"` // why not ready
}

// Error is the body of every answer that is not 2xx.
type Error struct {
	Message string `json:"error"`
}
