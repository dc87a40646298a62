// SPDX-License-Identifier: Apache-2.0

package conf

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// standalone is the least that a configuration needs outside a cluster.
const standalone = "nodeName: n1\nmanifests: /m\npodCIDRs: [10.244.0.0/24]\n"

var samePrefix = cmp.Options{cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmpopts.EquateEmpty()}

func outsideCluster(t testing.TB) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	t.Setenv("KUBERNETES_SERVICE_PORT", "")
}

func file(t testing.TB, content string) string {
	path := filepath.Join(t.TempDir(), "mooringd.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func flags(t testing.TB, args ...string) *pflag.FlagSet {
	fs := pflag.NewFlagSet("mooringd", pflag.ContinueOnError)
	fs.SetOutput(io.Discard)
	RegisterFlags(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	return fs
}

func TestEmptyFileIsDefaults(t *testing.T) {
	outsideCluster(t)
	for _, content := range []string{"", "# nothing\n", "---\n", "{}\n", "conntrack:\n  timeouts:\nlog:\n"} {
		got := Default()
		if err := got.decode("f", []byte(content), map[string]Error{}); err != nil {
			t.Errorf("%q: %v", content, err)
		}
		if diff := cmp.Diff(Default(), got, samePrefix); diff != "" {
			t.Errorf("%q: %s", content, diff)
		}
	}
}

func TestExampleHasEveryKeyWithItsDefaultAndASentence(t *testing.T) {
	data, err := os.ReadFile("mooringd.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, origin := Default(), map[string]Error{}
	// What the example does not set would stay at these.
	for _, o := range options {
		if o.key == "masquerade" {
			got.Masquerade = false
		}
	}
	got.Conntrack.Timeouts = Timeouts{}
	got.Socket, got.NodePort, got.Log, got.XDP = "", NodePort{}, Log{}, ""
	if err := got.decode("mooringd.yaml", data, origin); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), got, samePrefix); diff != "" {
		t.Errorf("the example differs from the defaults (-defaults +example):\n%s", diff)
	}
	lines := strings.Split(string(data), "\n")
	for _, o := range options {
		at, present := origin[o.key]
		if !present {
			t.Errorf("%s is missing in the example", o.key)
			continue
		}
		if above := strings.TrimSpace(lines[at.Line-2]); !strings.HasPrefix(above, "#") || !strings.HasSuffix(above, ".") && !strings.HasSuffix(above, ")") {
			t.Errorf("%s has no sentence above it, but %q", o.key, above)
		}
	}
	outsideCluster(t)
	if _, err := Load("mooringd.yaml", flags(t, "--manifests=/m", "--pod-cidrs=10.244.0.0/24,fd00:10:244::/64")); err != nil {
		t.Error(err)
	}
}

// Every field of Config must be in the table, else neither file nor flag could
// set it; and every key must be spelt as the struct's tags are.
func TestEveryFieldHasAKeyAndAFlag(t *testing.T) {
	var want []string
	var walk func(prefix string, typ reflect.Type)
	walk = func(prefix string, typ reflect.Type) {
		for i := range typ.NumField() {
			field := typ.Field(i)
			key := prefix + field.Tag.Get("json")
			if field.Type.Kind() == reflect.Struct && field.Type != reflect.TypeFor[PortRange]() {
				walk(key+".", field.Type)
			} else {
				want = append(want, key)
			}
		}
	}
	walk("", reflect.TypeFor[Config]())
	var got []string
	fs := flags(t)
	for _, o := range options {
		got = append(got, o.key)
		if f := fs.Lookup(flagName(o.key)); f == nil || f.Usage == "" {
			t.Errorf("%s has no flag with a usage", o.key)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestFlagNames(t *testing.T) {
	for key, want := range map[string]string{
		"nodeName": "node-name", "manifests": "manifests", "podCIDRs": "pod-cidrs", "bpffs": "bpffs", "stateDir": "state-dir",
		"metricsAddress": "metrics-address", "routing.mode": "routing-mode", "conntrack.maxEntries": "conntrack-max-entries",
		"conntrack.hook": "conntrack-hook", "conntrack.timeouts.tcpTimeWait": "conntrack-timeouts-tcp-time-wait",
		"nodePort.range": "node-port-range", "xdp": "xdp", "loadBalancing.algorithm": "load-balancing-algorithm", "log.level": "log-level",
	} {
		if got := flagName(key); got != want {
			t.Errorf("%s: --%s, want --%s", key, got, want)
		}
	}
}

func TestFileSetsEveryKindOfValue(t *testing.T) {
	outsideCluster(t)
	got, err := Load(file(t, `
nodeName: node-1.example
manifests: manifests
podCIDRs:
- 10.244.1.0/24
- "fd00:10:244:1::/64"
devices: eth0, eth1
socket: /tmp/m.sock
cgroup: /sys/fs/cgroup/test
metricsAddress: ""
masquerade: false
conntrack: {maxEntries: 8192, hook: off, timeouts: {tcpNew: 1m30s, icmp: 500ms}}
nodePort:
  range: 31000-31999
  mode: dsr
xdp: off
`), nil)
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.NodeName, want.Manifests = "node-1.example", "manifests"
	want.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:10:244:1::/64")}
	want.Devices = []string{"eth0", "eth1"}
	want.Socket, want.Cgroup, want.MetricsAddress, want.Masquerade = "/tmp/m.sock", "/sys/fs/cgroup/test", "", false
	want.Conntrack.MaxEntries, want.Conntrack.Hook = 8192, "off"
	want.Conntrack.Timeouts.TCPNew, want.Conntrack.Timeouts.ICMP = 90*time.Second, 500*time.Millisecond
	want.NodePort = NodePort{Range: PortRange{31000, 31999}, Mode: "dsr"}
	want.XDP = "off"
	if diff := cmp.Diff(want, got, samePrefix); diff != "" {
		t.Error(diff)
	}
}

func TestFlagWinsOverFile(t *testing.T) {
	outsideCluster(t)
	got, err := Load(file(t, standalone+"xdp: native\nmasquerade: true\nlog: {level: debug, format: json}\n"),
		flags(t, "--pod-cidrs=10.244.9.0/24,fd00:10:244:9::/64", "--xdp", "off", "--masquerade=false", "--log-level=warn",
			"--conntrack-timeouts-udp-new=5s", "--devices=eth0", "--devices=eth1", "--metrics-address="))
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.NodeName, want.Manifests = "n1", "/m"
	want.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.9.0/24"), netip.MustParsePrefix("fd00:10:244:9::/64")}
	want.XDP, want.Masquerade, want.MetricsAddress = "off", false, ""
	want.Log = Log{Level: "warn", Format: "json"}
	want.Conntrack.Timeouts.UDPNew = 5 * time.Second
	want.Devices = []string{"eth0", "eth1"}
	if diff := cmp.Diff(want, got, samePrefix); diff != "" {
		t.Error(diff)
	}
}

func TestNodeNameIsTheHostnameUnlessSet(t *testing.T) {
	outsideCluster(t)
	hostname, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Load("", flags(t, "--manifests=/m", "--pod-cidrs=10.244.0.0/24"))
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.ToLower(hostname); got.NodeName != want {
		t.Errorf("%q, want %q", got.NodeName, want)
	}
}

func TestInClusterNeedsNoSource(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "443")
	for _, args := range [][]string{
		{"--node-name=n1"},
		{"--node-name=n1", "--kubeconfig=/k"},
		{"--node-name=n1", "--manifests=/m", "--pod-cidrs=10.244.0.0/24"}, // said so, although a pod
	} {
		if _, err := Load("", flags(t, args...)); err != nil {
			t.Errorf("%q: %v", args, err)
		}
	}
}

// Each case names line (0: none), key and what the message must say.
func TestBadFileIsRefusedWithFileLineKeyAndAcceptedValues(t *testing.T) {
	outsideCluster(t)
	for _, test := range []struct {
		name, content string
		line          int
		key, says     string
	}{
		{"unknown key", standalone + "podCIDR: 10.0.0.0/8\n", 4, "podCIDR", "accepted keys: nodeName, manifests"},
		{"unknown key in a section", standalone + "conntrack:\n  max: 5\n", 5, "conntrack.max", "accepted keys: maxEntries, hook, timeouts"},
		{"unknown timeout", standalone + "conntrack:\n  timeouts:\n    sctp: 5s\n", 6, "conntrack.timeouts.sctp", "accepted keys: tcpNew"},
		{"key with dots", standalone + "conntrack.hook: auto\n", 4, "conntrack.hook", "unknown key"},
		{"key in another case", standalone + "XDP: auto\n", 4, "XDP", "unknown key"},
		{"merge key", standalone + "<<: {xdp: auto}\n", 4, "<<", "unknown key"},
		{"key that is a list", standalone + "? [a]\n: b\n", 4, "", "unknown key"},
		{"key twice", standalone + "xdp: auto\nxdp: off\n", 5, "xdp", "first in line 4"},
		{"enumeration", standalone + "xdp: fast\n", 4, "xdp", `"fast" is not accepted; accepted: auto, native, generic or off`},
		{"hook", standalone + "conntrack: {hook: fentry}\n", 4, "conntrack.hook", "accepted: auto, trampoline, tracepoint or off"},
		{"algorithm", standalone + "loadBalancing:\n  algorithm: rr\n", 5, "loadBalancing.algorithm", "random or maglev"},
		{"policy", standalone + "policy: true\n", 4, "policy", "default, always or never"},
		{"level", standalone + "log: {level: loud}\n", 4, "log.level", "debug, info, warn or error"},
		{"format", standalone + "log: {format: xml}\n", 4, "log.format", "text or json"},
		{"routing", standalone + "routing: {mode: bgp}\n", 4, "routing.mode", "native or vxlan"},
		{"node port mode", standalone + "nodePort: {mode: nat}\n", 4, "nodePort.mode", "snat or dsr"},
		{"no value", standalone + "xdp:\n", 4, "xdp", "no value; accepted: auto"},
		{"no list", standalone + "devices:\n", 4, "devices", "no value"},
		{"scalar for a section", standalone + "conntrack: auto\n", 4, "conntrack", "not a mapping; accepted keys: maxEntries, hook, timeouts"},
		{"list for a scalar", standalone + "xdp: [auto]\n", 4, "xdp", "a list; accepted: auto"},
		{"mapping for a scalar", standalone + "xdp: {a: b}\n", 4, "xdp", "a mapping; accepted: auto"},
		{"mapping in a list", standalone + "devices: [{a: b}]\n", 4, "devices", "line 4 holds no single value"},
		{"boolean", standalone + "masquerade: yes\n", 4, "masquerade", `"yes" is not accepted; accepted: true or false`},
		{"entries not a number", standalone + "conntrack: {maxEntries: many}\n", 4, "conntrack.maxEntries", "accepted: 0, or 256 to 67108864"},
		{"entries negative", standalone + "conntrack: {maxEntries: -1}\n", 4, "conntrack.maxEntries", "accepted: 0, or 256"},
		{"entries below", standalone + "conntrack: {maxEntries: 255}\n", 4, "conntrack.maxEntries", "256"},
		{"entries above", standalone + "conntrack: {maxEntries: 67108865}\n", 4, "conntrack.maxEntries", "67108864"},
		{"entries beyond 32 bits", standalone + "conntrack: {maxEntries: 4294967296}\n", 4, "conntrack.maxEntries", "67108864"},
		{"duration without unit", standalone + "conntrack: {timeouts: {icmp: 30}}\n", 4, "conntrack.timeouts.icmp", "a duration from 100ms to 720h"},
		{"duration zero", standalone + "conntrack: {timeouts: {icmp: 0s}}\n", 4, "conntrack.timeouts.icmp", `"0s" is not accepted`},
		{"duration negative", standalone + "conntrack: {timeouts: {tcpNew: -5s}}\n", 4, "conntrack.timeouts.tcpNew", "accepted"},
		{"duration too long", standalone + "conntrack: {timeouts: {tcpNew: 721h}}\n", 4, "conntrack.timeouts.tcpNew", "720h"},
		{"range without end", standalone + "nodePort: {range: 30000}\n", 4, "nodePort.range", "accepted: FIRST-LAST within 1 to 65535"},
		{"range backwards", standalone + "nodePort: {range: 2-1}\n", 4, "nodePort.range", "accepted"},
		{"range from 0", standalone + "nodePort: {range: 0-1}\n", 4, "nodePort.range", "accepted"},
		{"range beyond", standalone + "nodePort: {range: 1-65536}\n", 4, "nodePort.range", "accepted"},
		{"relative socket", standalone + "socket: m.sock\n", 4, "socket", "no absolute path; accepted: an absolute path of at most 107 bytes"},
		{"long socket", standalone + "socket: /" + strings.Repeat("s", 107) + "\n", 4, "socket", "has 108 bytes"},
		{"relative bpffs", standalone + "bpffs: mooring\n", 4, "bpffs", "no absolute path"},
		{"empty state directory", standalone + "stateDir: \"\"\n", 4, "stateDir", "no absolute path"},
		{"relative cgroup", standalone + "cgroup: mine\n", 4, "cgroup", "no absolute path"},
		{"control character", "nodeName: n1\nkubeconfig: \"a\\0b\"\n", 2, "kubeconfig", "not accepted; accepted: a path"},
		{"metrics without port", standalone + "metricsAddress: 127.0.0.1\n", 4, "metricsAddress", "accepted: HOST:PORT"},
		{"metrics with a wrong port", standalone + "metricsAddress: 127.0.0.1:65536\n", 4, "metricsAddress", "0 to 65535"},
		{"node name", "nodeName: Node_1\nmanifests: /m\npodCIDRs: [10.244.0.0/24]\n", 1, "nodeName", "lower-case DNS name"},
		{"device name", standalone + "devices: [eth0, a/b]\n", 4, "devices", `"a/b" is no name of a network interface`},
		{"device name too long", standalone + "devices: [abcdefghijklmnop]\n", 4, "devices", "no name"},
		{"device twice", standalone + "devices: [eth0, eth0]\n", 4, "devices", "twice"},
		{"both sources", standalone + "kubeconfig: /k\n", 2, "manifests", "exactly one of manifests and kubeconfig"},
		{"no source", "nodeName: n1\n", 0, "manifests", "exactly one of manifests (a directory) and kubeconfig (a file)"},
		{"manifests without pod ranges", "nodeName: n1\nmanifests: /m\n", 0, "podCIDRs", "no Node object"},
		{"not YAML", standalone + "xdp: [\n", 4, "", "not YAML"},
		{"tabs", standalone + "log:\n\tlevel: info\n", 5, "", "not YAML"},
		{"binary", "\x00\x01", 0, "", "not YAML"},
		{"a list", "- a\n", 1, "", "not a mapping"},
		{"two documents", standalone + "---\nxdp: off\n", 4, "", "a second YAML document"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := file(t, test.content)
			_, err := Load(path, nil)
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("error %v, want an *Error", err)
			}
			if e.File != path || e.Line != test.line || e.Key != test.key {
				t.Errorf("%s line %d key %q, want line %d key %q", e.File, e.Line, e.Key, test.line, test.key)
			}
			if !strings.HasPrefix(err.Error(), path) || !strings.Contains(err.Error(), test.says) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%q does not say %q on one line", err, test.says)
			}
		})
	}
}

func TestBadPodCIDRsAreRefused(t *testing.T) {
	outsideCluster(t)
	for value, says := range map[string]string{
		"[10.244.0.0]":                         "no CIDR",
		"[10.244.0.0/33]":                      "no CIDR",
		"[10.244.0.1/24]":                      "10.244.0.1/24 has host bits: write 10.244.0.0/24",
		"[\"fd00:10:244::1/56\"]":              "write fd00:10:244::/56",
		"[10.244.0.0/16, 10.244.1.0/24]":       "10.244.0.0/16 and 10.244.1.0/24 overlap",
		"[10.244.0.0/24, 10.244.1.0/24]":       "of one family",
		"[\"fd00::/64\", \"fd00::/48\"]":       "overlap",
		"[10.244.0.0/31]":                      "no room",
		"[10.244.0.0/32]":                      "no room",
		"[\"fd00::/127\"]":                     "no room",
		"[\"::ffff:10.244.0.0/120\"]":          "IPv4 range written as IPv6",
		"[127.0.0.0/8]":                        "no range for pods",
		"[0.0.0.0/0]":                          "no range for pods",
		"[169.254.0.0/16]":                     "no range for pods",
		"[\"ff00::/8\"]":                       "no range for pods",
		"[\"fe80::%eth0/64\"]":                 "no CIDR",
		"10.244.0.0/24;fd00::/64":              "no CIDR",
		"[10.244.0.0/24, [\"fd00:10::/64\"]]":  "no single value",
		"[10.244.0.0/24, \"\"]":                "no CIDR",
		"[10.244.0.0/24, fd00:10:244::/64, ~]": "no single value",
	} {
		_, err := Load(file(t, "nodeName: n1\nmanifests: /m\npodCIDRs: "+value+"\n"), nil)
		if err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), ":3: podCIDRs: ") {
			t.Errorf("%s: %v, want line 3, podCIDRs and %q", value, err, says)
		}
	}
}

func TestBadFlagIsWrongUsage(t *testing.T) {
	for arg, says := range map[string]string{
		"--xdp=fast":                         "accepted: auto, native, generic or off",
		"--pod-cidrs=10.0.0.1/8":             "has host bits",
		"--pod-cidrs=10.0.0.0/8,10.1.0.0/16": "overlap",
		"--masquerade=maybe":                 "true or false",
		"--conntrack-timeouts-icmp=0":        "accepted: a duration",
		"--nodename=x":                       "unknown flag",
	} {
		fs := pflag.NewFlagSet("mooringd", pflag.ContinueOnError)
		fs.SetOutput(io.Discard)
		RegisterFlags(fs)
		if err := fs.Parse([]string{arg}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", arg, err, says)
		}
	}
}

func TestFlagsThatClashAreNamed(t *testing.T) {
	outsideCluster(t)
	_, err := Load(file(t, standalone), flags(t, "--manifests=/other", "--kubeconfig=/k"))
	if err == nil || !strings.HasPrefix(err.Error(), "--manifests: kubeconfig is set too") {
		t.Error(err)
	}
}

func TestMissingFileIsNamed(t *testing.T) {
	_, err := Load("/nowhere/mooringd.yaml", nil)
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "/nowhere/mooringd.yaml") {
		t.Error(err)
	}
}

func TestPortRange(t *testing.T) {
	r := PortRange{30000, 32767}
	for port, want := range map[uint16]bool{29999: false, 30000: true, 32767: true, 32768: false} {
		if r.Contains(port) != want {
			t.Errorf("%d: %v, want %v", port, !want, want)
		}
	}
}

// The shipped files must be what our own readers accept; conf/kubernetes has its
// own tests.
func TestShippedFilesParse(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (path == "kubernetes" || path == "testdata") {
			return filepath.SkipDir
		}
		// Those that are no manifests have tests of their own.
		own := []string{"mooringd.yaml", "10-mooring.conflist", "install.sh", "mooringd.service"}
		if d.IsDir() || slices.Contains(own, path) || filepath.Ext(path) == ".go" {
			return nil
		}
		if !strings.HasSuffix(path, ".yaml") {
			t.Errorf("%s: no test knows what this is", path)
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		decoder, documents := yaml.NewDecoder(strings.NewReader(string(data))), 0
		for {
			var object struct {
				APIVersion string `yaml:"apiVersion"`
				Kind       string
				Metadata   struct{ Name, Namespace string }
			}
			if err := decoder.Decode(&object); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Errorf("%s: document %d: %v", path, documents+1, err)
				break
			}
			documents++
			if object.APIVersion == "" || object.Kind == "" || object.Metadata.Name == "" {
				t.Errorf("%s: document %d has no apiVersion, kind or name: %+v", path, documents, object)
			}
		}
		if documents == 0 {
			t.Errorf("%s is empty", path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func FuzzConfig(f *testing.F) {
	for _, name := range []string{"mooringd.yaml", "examples/web.yaml"} {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(standalone))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("conntrack: &c {timeouts: *c}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c := Default()
		err := c.decode("f.yaml", data, map[string]Error{})
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || e.File != "f.yaml" || e.Msg == "" {
				t.Errorf("%#v is no error with a file and a message", err)
			}
			return
		}
		// What the file may say, each key accepts by itself.
		for _, o := range options {
			if err := o.set(&c, o.get(&c)); err != nil {
				t.Errorf("%s: %v", o.key, err)
			}
		}
	})
}
