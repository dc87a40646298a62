// SPDX-License-Identifier: Apache-2.0

// Package conf says what can be configured, with which defaults, and what a
// valid value is. It is a leaf: it imports nothing else of Mooring.
package conf

import (
	"net/netip"
	"time"
)

// Defaults that more than one binary needs.
const (
	DefaultSocket   = "/run/mooring/mooring.sock"
	DefaultBPFFS    = "/sys/fs/bpf/mooring"
	DefaultStateDir = "/var/lib/mooring"
	DefaultConfig   = "/etc/mooring/mooringd.yaml"
	DefaultMetrics  = "127.0.0.1:9964"
)

// Config is the node daemon's configuration. The tags are the keys of the YAML
// file; a flag of the same name (podCIDRs -> --pod-cidrs) wins over the file.
type Config struct {
	NodeName       string         `json:"nodeName"`
	Manifests      string         `json:"manifests"`
	Kubeconfig     string         `json:"kubeconfig"`
	PodCIDRs       []netip.Prefix `json:"podCIDRs"`
	Devices        []string       `json:"devices"`
	Socket         string         `json:"socket"`
	BPFFS          string         `json:"bpffs"`
	StateDir       string         `json:"stateDir"`
	Cgroup         string         `json:"cgroup"`
	MetricsAddress string         `json:"metricsAddress"`
	Routing        Routing        `json:"routing"`
	Masquerade     bool           `json:"masquerade"`
	Conntrack      Conntrack      `json:"conntrack"`
	NodePort       NodePort       `json:"nodePort"`
	XDP            string         `json:"xdp"`
	LoadBalancing  LoadBalancing  `json:"loadBalancing"`
	Policy         string         `json:"policy"`
	Log            Log            `json:"log"`
}

// Routing says how pods of other nodes are reached: "native" or "vxlan".
type Routing struct {
	Mode string `json:"mode"`
}

// Conntrack sizes the connection table and says when its entries end.
type Conntrack struct {
	// MaxEntries is the size of the LRU map; 0 derives it from memory.
	MaxEntries uint32 `json:"maxEntries"`
	// Hook is "auto", "trampoline", "tracepoint" or "off".
	Hook     string   `json:"hook"`
	Timeouts Timeouts `json:"timeouts"`
}

// Timeouts end entries that no socket owns.
type Timeouts struct {
	TCPNew         time.Duration `json:"tcpNew"`         // SYN seen, handshake not done
	TCPEstablished time.Duration `json:"tcpEstablished"` // handshake done
	TCPClosing     time.Duration `json:"tcpClosing"`     // FIN from one or both sides, or RST
	TCPTimeWait    time.Duration `json:"tcpTimeWait"`    // the owner's socket is in TIME_WAIT
	UDPNew         time.Duration `json:"udpNew"`         // one direction seen
	UDPEstablished time.Duration `json:"udpEstablished"` // both directions seen
	ICMP           time.Duration `json:"icmp"`           // echo and its reply
	Service        time.Duration `json:"service"`        // SVC entry whose flow entry is gone or not seen
}

// NodePort configures north-south services. Range is inclusive.
type NodePort struct {
	Range PortRange `json:"range"`
	Mode  string    `json:"mode"` // "snat" or "dsr"
}

// PortRange is an inclusive range of ports, written "30000-32767".
type PortRange struct{ First, Last uint16 }

// LoadBalancing chooses the algorithm: "random" or "maglev".
type LoadBalancing struct {
	Algorithm string `json:"algorithm"`
}

// Log configures the daemon's log: level debug, info, warn or error; format text or json.
type Log struct {
	Level  string `json:"level"`
	Format string `json:"format"`
}
