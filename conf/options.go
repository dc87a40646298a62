// SPDX-License-Identifier: Apache-2.0

package conf

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// option is one key of the configuration: the file, the flags, the checks and
// the messages all come from this table.
type option struct {
	key      string // as in the file, with dots
	usage    string
	accepted string // the accepted values, for people
	list     bool
	get      func(*Config) []string
	set      func(*Config, []string) error // one value unless list
}

// maxSocketPath is what sockaddr_un.sun_path holds besides its final zero.
const maxSocketPath = 107

// Bounds of what can be set. A table below 256 entries would be smaller than
// the kernel's own per-CPU free lists of an LRU map; a timeout below 100 ms
// would end entries between two packets of a busy connection.
const (
	minEntries, maxEntries = 256, 1 << 26
	minTimeout, maxTimeout = 100 * time.Millisecond, 720 * time.Hour
)

var options = []option{
	text("nodeName", "name of this node; empty: the hostname", "a lower-case DNS name of at most 253 characters, or empty for the hostname",
		func(c *Config) *string { return &c.NodeName }, orEmpty(nodeName)),
	text("manifests", "standalone: directory of Kubernetes manifests to watch", "a path, or empty for the Kubernetes API",
		func(c *Config) *string { return &c.Manifests }, anyText),
	text("kubeconfig", "file that says how to reach the Kubernetes API; empty: in-cluster", "a path, or empty for the in-cluster configuration",
		func(c *Config) *string { return &c.Kubeconfig }, anyText),
	{
		key: "podCIDRs", usage: "address ranges of this node's pods, one per family; required with manifests", list: true,
		accepted: "at most one IPv4 CIDR up to /30 and one IPv6 CIDR up to /126, each without host bits",
		get:      func(c *Config) []string { return texts(c.PodCIDRs) },
		set: func(c *Config, values []string) error {
			var cidrs []netip.Prefix
			for _, v := range values {
				cidr, err := netip.ParsePrefix(v)
				if err != nil {
					return fmt.Errorf("%q is no CIDR", v)
				}
				cidrs = append(cidrs, cidr)
			}
			if err := CheckPodCIDRs(cidrs); err != nil {
				return err
			}
			c.PodCIDRs = cidrs
			return nil
		},
	},
	{
		key: "devices", usage: "uplinks for XDP and north-south traffic; empty: the default route's", list: true,
		accepted: "names of network interfaces, each once",
		get:      func(c *Config) []string { return c.Devices },
		set: func(c *Config, values []string) error {
			for i, v := range values {
				if !isInterface(v) {
					return fmt.Errorf("%q is no name of a network interface", v)
				}
				if slices.Contains(values[:i], v) {
					return fmt.Errorf("%q is named twice", v)
				}
			}
			c.Devices = values
			return nil
		},
	},
	text("socket", "unix socket of the local API", fmt.Sprintf("an absolute path of at most %d bytes", maxSocketPath),
		func(c *Config) *string { return &c.Socket }, CheckSocket),
	text("bpffs", "directory on a BPF file system for the pins", "an absolute path",
		func(c *Config) *string { return &c.BPFFS }, absolute),
	text("stateDir", "directory for allocations and endpoints", "an absolute path",
		func(c *Config) *string { return &c.StateDir }, absolute),
	text("cgroup", "where cgroup programs attach; empty: the root of the cgroup2 hierarchy", "an absolute path, or empty for the root of the cgroup2 hierarchy",
		func(c *Config) *string { return &c.Cgroup }, orEmpty(absolute)),
	text("metricsAddress", "address for /metrics, /healthz, /readyz and /proxyMode; empty: off", "HOST:PORT with a port of 0 to 65535, or empty for off",
		func(c *Config) *string { return &c.MetricsAddress }, orEmpty(hostPort)),
	text("healthzAddress", "address for /healthz and /livez as load balancers ask a service proxy; empty: off", "HOST:PORT with a port of 0 to 65535, or empty for off",
		func(c *Config) *string { return &c.HealthzAddress }, orEmpty(hostPort)),
	enum("routing.mode", "how pods of other nodes are reached",
		func(c *Config) *string { return &c.Routing.Mode }, "native", "vxlan"),
	{
		key: "masquerade", usage: "source NAT for pod traffic that leaves the cluster", accepted: "true or false",
		get: func(c *Config) []string { return []string{strconv.FormatBool(c.Masquerade)} },
		set: func(c *Config, values []string) error {
			switch values[0] {
			case "true":
				c.Masquerade = true
			case "false":
				c.Masquerade = false
			default:
				return refused(values[0])
			}
			return nil
		},
	},
	{
		key: "conntrack.maxEntries", usage: "size of the connection table; 0: from memory",
		accepted: fmt.Sprintf("0, or %d to %d", minEntries, maxEntries),
		get:      func(c *Config) []string { return []string{strconv.FormatUint(uint64(c.Conntrack.MaxEntries), 10)} },
		set: func(c *Config, values []string) error {
			n, err := strconv.ParseUint(values[0], 10, 32)
			if err != nil || n != 0 && (n < minEntries || n > maxEntries) {
				return refused(values[0])
			}
			c.Conntrack.MaxEntries = uint32(n)
			return nil
		},
	},
	enum("conntrack.hook", "how the end of a socket is noticed",
		func(c *Config) *string { return &c.Conntrack.Hook }, "auto", "trampoline", "tracepoint", "off"),
	timeout("tcpNew", "a TCP connection that is not established", func(t *Timeouts) *time.Duration { return &t.TCPNew }),
	timeout("tcpEstablished", "an established TCP connection", func(t *Timeouts) *time.Duration { return &t.TCPEstablished }),
	timeout("tcpClosing", "a TCP connection after FIN or RST", func(t *Timeouts) *time.Duration { return &t.TCPClosing }),
	timeout("tcpTimeWait", "a TCP connection whose socket is in TIME_WAIT", func(t *Timeouts) *time.Duration { return &t.TCPTimeWait }),
	timeout("udpNew", "a UDP flow seen in one direction", func(t *Timeouts) *time.Duration { return &t.UDPNew }),
	timeout("udpEstablished", "a UDP flow seen in both directions", func(t *Timeouts) *time.Duration { return &t.UDPEstablished }),
	timeout("icmp", "an ICMP or ICMPv6 echo", func(t *Timeouts) *time.Duration { return &t.ICMP }),
	timeout("service", "the choice of a backend whose flow is gone or was not seen", func(t *Timeouts) *time.Duration { return &t.Service }),
	{
		key: "nodePort.range", usage: "ports of NodePort services", accepted: "FIRST-LAST within 1 to 65535",
		get: func(c *Config) []string { return []string{c.NodePort.Range.String()} },
		set: func(c *Config, values []string) error {
			var r PortRange
			if r.UnmarshalText([]byte(values[0])) != nil {
				return refused(values[0])
			}
			c.NodePort.Range = r
			return nil
		},
	},
	enum("nodePort.mode", "how the reply of a backend on another node comes back",
		func(c *Config) *string { return &c.NodePort.Mode }, "snat", "dsr"),
	{
		key: "nodePort.addresses", usage: "addresses of this node that node ports are served on; empty: all of the uplinks", list: true,
		accepted: "CIDRs, or primary alone for the Node object's first address of each family",
		get:      func(c *Config) []string { return c.NodePort.Addresses },
		set: func(c *Config, values []string) error {
			for i, v := range values {
				if v == PrimaryAddresses && len(values) == 1 {
					continue
				}
				if cidr, err := netip.ParsePrefix(v); err != nil || cidr.Addr().Is4In6() {
					return fmt.Errorf("%q is no CIDR", v)
				}
				if slices.Contains(values[:i], v) {
					return fmt.Errorf("%q is named twice", v)
				}
			}
			c.NodePort.Addresses = values
			return nil
		},
	},
	enum("xdp", "where north-south traffic is handled",
		func(c *Config) *string { return &c.XDP }, "auto", "native", "generic", "off"),
	enum("loadBalancing.algorithm", "how a backend is chosen",
		func(c *Config) *string { return &c.LoadBalancing.Algorithm }, "random", "maglev"),
	enum("policy", "when network policy is enforced",
		func(c *Config) *string { return &c.Policy }, "default", "always", "never"),
	enum("log.level", "lowest level that is logged",
		func(c *Config) *string { return &c.Log.Level }, "debug", "info", "warn", "error"),
	enum("log.format", "format of the log",
		func(c *Config) *string { return &c.Log.Format }, "text", "json"),
}

// flagName is the flag of a key: podCIDRs -> pod-cidrs, conntrack.hook ->
// conntrack-hook.
func flagName(key string) string {
	var b strings.Builder
	lower := false
	for _, r := range key {
		switch {
		case r == '.':
			r, lower = '-', false
		case unicode.IsUpper(r):
			if lower {
				b.WriteByte('-')
			}
			r, lower = unicode.ToLower(r), false
		default:
			lower = true
		}
		b.WriteRune(r)
	}
	return b.String()
}

func text(key, usage, accepted string, field func(*Config) *string, check func(string) error) option {
	return option{
		key: key, usage: usage, accepted: accepted,
		get: func(c *Config) []string { return []string{*field(c)} },
		set: func(c *Config, values []string) error {
			if strings.ContainsFunc(values[0], unicode.IsControl) {
				return refused(values[0])
			}
			if err := check(values[0]); err != nil {
				return err
			}
			*field(c) = values[0]
			return nil
		},
	}
}

func enum(key, usage string, field func(*Config) *string, accepted ...string) option {
	last := len(accepted) - 1
	return option{
		key: key, usage: usage + ": " + strings.Join(accepted, "|"), accepted: strings.Join(accepted[:last], ", ") + " or " + accepted[last],
		get: func(c *Config) []string { return []string{*field(c)} },
		set: func(c *Config, values []string) error {
			if !slices.Contains(accepted, values[0]) {
				return refused(values[0])
			}
			*field(c) = values[0]
			return nil
		},
	}
}

func timeout(key, of string, field func(*Timeouts) *time.Duration) option {
	return option{
		key: "conntrack.timeouts." + key, usage: "when the entry of " + of + " ends without its socket",
		accepted: "a duration from 100ms to 720h, like 30s or 1h30m",
		get:      func(c *Config) []string { return []string{field(&c.Conntrack.Timeouts).String()} },
		set: func(c *Config, values []string) error {
			d, err := time.ParseDuration(values[0])
			if err != nil || d < minTimeout || d > maxTimeout {
				return refused(values[0])
			}
			*field(&c.Conntrack.Timeouts) = d
			return nil
		},
	}
}

func refused(value string) error { return fmt.Errorf("%q is not accepted", value) }

func anyText(string) error { return nil }

func orEmpty(check func(string) error) func(string) error {
	return func(s string) error {
		if s == "" {
			return nil
		}
		return check(s)
	}
}

func absolute(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%q is no absolute path", path)
	}
	return nil
}

// CheckSocket says why path cannot be the path of a unix socket of ours.
func CheckSocket(path string) error {
	if err := absolute(path); err != nil {
		return err
	}
	if len(path) > maxSocketPath {
		return fmt.Errorf("%q has %d bytes", path, len(path))
	}
	return nil
}

func hostPort(s string) error {
	_, port, err := net.SplitHostPort(s)
	if err != nil {
		return refused(s)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("%q has no port of 0 to 65535", s)
	}
	return nil
}

// nodeName follows Kubernetes: RFC 1123 labels with dots between them.
func nodeName(s string) error {
	if len(s) > 253 {
		return fmt.Errorf("the name has %d characters", len(s))
	}
	for label := range strings.SplitSeq(s, ".") {
		bad := strings.ContainsFunc(label, func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' })
		if label == "" || len(label) > 63 || bad || label[0] == '-' || label[len(label)-1] == '-' {
			return refused(s)
		}
	}
	return nil
}

// isInterface follows the kernel's dev_valid_name.
func isInterface(s string) bool {
	return s != "" && len(s) <= 15 && s != "." && s != ".." &&
		!strings.ContainsFunc(s, func(r rune) bool { return r == '/' || r == ':' || unicode.IsSpace(r) || unicode.IsControl(r) })
}

// CheckPodCIDRs says why cidrs cannot be the pod ranges of one node: at most
// one per family, in canonical form, and large enough for a pod besides the
// addresses that are never given (see package ipam).
func CheckPodCIDRs(cidrs []netip.Prefix) error {
	for i, c := range cidrs {
		addr := c.Addr()
		switch {
		case !c.IsValid():
			return fmt.Errorf("%q is no CIDR", c)
		case addr.Is4In6():
			return fmt.Errorf("%s is an IPv4 range written as IPv6", c)
		case c != c.Masked():
			return fmt.Errorf("%s has host bits: write %s", c, c.Masked())
		case addr.IsUnspecified(), addr.IsMulticast(), addr.IsLoopback(), addr.IsLinkLocalUnicast():
			return fmt.Errorf("%s is no range for pods", c)
		case addr.BitLen()-c.Bits() < 2:
			return fmt.Errorf("%s has no room for a pod", c)
		}
		for _, other := range cidrs[:i] {
			if other.Overlaps(c) {
				return fmt.Errorf("%s and %s overlap", other, c)
			}
			if other.Addr().Is4() == addr.Is4() {
				return fmt.Errorf("%s and %s are of one family", other, c)
			}
		}
	}
	return nil
}

func texts[T fmt.Stringer](values []T) []string {
	out := make([]string, len(values))
	for i, v := range values {
		out[i] = v.String()
	}
	return out
}
