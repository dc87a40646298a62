// SPDX-License-Identifier: Apache-2.0

// Package conf says what can be configured, with which defaults, and what a
// valid value is. It is a leaf: it imports nothing else of Mooring.
package conf

import (
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
)

// Defaults that more than one binary needs.
const (
	DefaultSocket   = "/run/mooring/mooring.sock"
	DefaultBPFFS    = "/sys/fs/bpf/mooring"
	DefaultStateDir = "/var/lib/mooring"
	DefaultConfig   = "/etc/mooring/mooringd.yaml"
	DefaultMetrics  = "127.0.0.1:9964"
	DefaultHealthz  = ":10256" // where load balancers look for a service proxy
)

// Config is the node daemon's configuration. The tags are the keys of the YAML
// file; a flag of the same name (podCIDRs -> --pod-cidrs) wins over the file.
// What each key accepts is in options.go, what each means in mooringd.yaml.
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
	HealthzAddress string         `json:"healthzAddress"`
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
	// Addresses are the CIDRs of those node addresses that node ports are served
	// on, or PrimaryAddresses alone; empty: all of the uplinks.
	Addresses []string `json:"addresses"`
}

// PrimaryAddresses as nodePort.addresses: the Node object's first of each family.
const PrimaryAddresses = "primary"

// PortRange is an inclusive range of ports, written "30000-32767".
type PortRange struct{ First, Last uint16 }

func (r PortRange) String() string { return fmt.Sprintf("%d-%d", r.First, r.Last) }

// Contains says whether port is one of the range.
func (r PortRange) Contains(port uint16) bool { return r.First <= port && port <= r.Last }

// MarshalText writes the range as the configuration has it.
func (r PortRange) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads what MarshalText writes.
func (r *PortRange) UnmarshalText(text []byte) error {
	first, last, found := strings.Cut(string(text), "-")
	if !found {
		return fmt.Errorf("%q is not FIRST-LAST", text)
	}
	a, err := strconv.ParseUint(first, 10, 16)
	if err != nil {
		return fmt.Errorf("first port %q: %w", first, err)
	}
	b, err := strconv.ParseUint(last, 10, 16)
	if err != nil {
		return fmt.Errorf("last port %q: %w", last, err)
	}
	if a == 0 || a > b {
		return fmt.Errorf("%q is no range of ports", text)
	}
	*r = PortRange{First: uint16(a), Last: uint16(b)}
	return nil
}

// LoadBalancing chooses the algorithm: "random" or "maglev".
type LoadBalancing struct {
	Algorithm string `json:"algorithm"`
}

// Log configures the daemon's log: level debug, info, warn or error; format text or json.
type Log struct {
	Level  string `json:"level"`
	Format string `json:"format"`
}

// Default is the configuration of an empty file. What depends on the machine is
// empty in it: nodeName is the hostname, devices the default route's.
func Default() Config {
	return Config{
		Socket:         DefaultSocket,
		BPFFS:          DefaultBPFFS,
		StateDir:       DefaultStateDir,
		MetricsAddress: DefaultMetrics,
		HealthzAddress: DefaultHealthz,
		Routing:        Routing{Mode: "native"},
		Masquerade:     true,
		Conntrack: Conntrack{
			Hook: "auto",
			Timeouts: Timeouts{
				TCPNew:         60 * time.Second,
				TCPEstablished: 6 * time.Hour,
				TCPClosing:     10 * time.Second,
				TCPTimeWait:    60 * time.Second,
				UDPNew:         30 * time.Second,
				UDPEstablished: 180 * time.Second,
				ICMP:           30 * time.Second,
				Service:        60 * time.Second,
			},
		},
		NodePort:      NodePort{Range: PortRange{First: 30000, Last: 32767}, Mode: "snat"},
		XDP:           "auto",
		LoadBalancing: LoadBalancing{Algorithm: "random"},
		Policy:        "default",
		Log:           Log{Level: "info", Format: "text"},
	}
}

// Standalone says that a directory of manifests is the source of objects, and
// not the Kubernetes API.
func (c Config) Standalone() bool { return c.Manifests != "" }

// InCluster says whether this process runs in a pod that knows its API server.
// These are the variables by which client-go decides it.
func InCluster() bool {
	return os.Getenv("KUBERNETES_SERVICE_HOST") != "" && os.Getenv("KUBERNETES_SERVICE_PORT") != ""
}
