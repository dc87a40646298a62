// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/model"
)

var update = flag.Bool("update", false, "write the goldens anew")

// daemon is a node with a client and a service, or an empty one.
type daemon struct{ empty bool }

func (d daemon) Node() api.Node { return api.Node{Name: "node-a"} }

func (d daemon) Status() (api.Status, error) {
	if d.empty {
		return api.Status{
			Node: "node-a", Version: "v0.1.0", Kernel: "6.1.0", Mode: "standalone", Healthy: true,
			Hook: api.HookStatus{Mode: "trampoline"}, Conntrack: api.TableStatus{MaxEntries: 8192},
		}, nil
	}
	return api.Status{
		Node: "node-a", Version: "v0.1.0", Kernel: "6.18.44", Mode: "standalone",
		Hook: api.HookStatus{Mode: "tracepoint", Reason: "this kernel loads no trampoline (operation not permitted)"},
		XDP:  []api.XDPStatus{{Device: "eth0", Mode: "native"}, {Device: "eth1", Mode: "generic"}}, Endpoints: 4, Services: 2, Backends: 5,
		Conntrack: api.TableStatus{Entries: 3277, MaxEntries: 131072},
		Problems: []string{
			"/etc/mooring/web.yaml document 2: Service default/web: spec.ports[0].port: 0 is not a port",
			"masquerade (IPv6): ip6tables-restore is not installed (apt-get install iptables); pods of this node do not reach the world",
		},
	}, nil
}

func (d daemon) Connections(f api.Filter, yield func(api.Connection) bool) error {
	if d.empty || f.Pod.Name == "nobody" {
		return nil
	}
	for _, c := range []api.Connection{
		{Type: "SVC", Protocol: "TCP", Source: "10.244.0.5:40000", Destination: "10.96.0.10:80", Translation: "10.244.0.7:8080", State: "established", Tethered: true, SocketCookie: 4711, Packets: 12, Bytes: 3456, Endpoint: 1},
		{Type: "EGRESS", Protocol: "TCP", Source: "10.244.0.5:40000", Destination: "10.244.0.7:8080", Translation: "10.96.0.10:80", State: "established", Tethered: true, SocketCookie: 4711, Packets: 12, Bytes: 3456, Endpoint: 1},
		{Type: "INGRESS", Protocol: "UDP", Source: "[fd00:10:244:0:aaaa:bbbb:cccc:5]:53124", Destination: "[fd00:10:244:0:aaaa:bbbb:cccc:7]:53", State: "new", ExpiresInSeconds: 29, Packets: 1, Bytes: 88, Endpoint: 2},
		{Type: "EGRESS", Protocol: "ICMPv6", Source: "[fd00:10:244::5]:7", Destination: "[2001:db8::1]:0", State: "established", ExpiresInSeconds: 3, Packets: 1 << 40, Bytes: 1 << 60, Endpoint: 65535},
	} {
		if f.Protocol != "" && f.Protocol != c.Protocol {
			continue
		}
		if !yield(c) {
			break
		}
	}
	return nil
}

func (d daemon) ConntrackStats() (api.ConntrackStats, error) {
	return api.ConntrackStats{
		Entries: 3277, MaxEntries: 131072, Tethered: 3000, Created: 50000,
		Deleted: api.Deleted{Socket: 40000, Timewait: 5000, Expired: 1700, Endpoint: 20, Backend: 3}, Evicted: 1, DeleteFailed: 2,
		Sweep: api.SweepStats{Runs: 100, Scanned: 327700, IntervalSeconds: 30, CPUSeconds: 0.0421},
	}, nil
}

func (d daemon) FlushConntrack() (uint64, error) { return 3277, nil }

func (d daemon) Policies() []api.Policy {
	if d.empty {
		return nil
	}
	return []api.Policy{
		{Kind: "ClusterNetworkPolicy", Name: "no-ssh", Tier: "Admin", Priority: 10, Subject: "namespaces: all", Directions: []string{"ingress"}, IngressRules: 1, Pods: []string{"default/client", "default/web"}},
		{Kind: "NetworkPolicy", Namespace: "default", Name: "web", Subject: "pods: app=web", Directions: []string{"ingress", "egress"}, IngressRules: 2, Pods: []string{"default/web"}},
	}
}

func (d daemon) ExplainPolicy(q api.PolicyQuestion) (api.Explanation, error) {
	x := api.Explanation{From: q.From, To: q.To, Port: q.Port, Protocol: q.Protocol, Agrees: q.Port != 81, Answers: []api.PolicyAnswer{{
		Source: "10.244.0.6", Destination: "10.244.0.5", Computed: "denied", Program: "denied",
		Ingress: &api.PolicySide{Verdict: "denied", Reason: "no rule allows it, and the pod is isolated by NetworkPolicy default/web", Rules: []string{}, Policies: []string{"NetworkPolicy default/web"}},
	}}}
	if !x.Agrees {
		x.Answers[0].Program = "allowed"
	}
	return x, nil
}

func (d daemon) Services() []api.Service {
	if d.empty {
		return nil
	}
	many := []api.Backend{{Address: "10.244.0.7", Port: 8080, State: "active"}, {Address: "10.244.0.8", Port: 8080, State: "terminating"}}
	for i := range 10 {
		many = append(many, api.Backend{Address: fmt.Sprintf("10.244.1.%d", i+1), Port: 8080, State: "active"})
	}
	return []api.Service{
		{Namespace: "default", Name: "headless"},
		{Namespace: "default", Name: "web", Frontends: []api.Frontend{
			{Address: "10.96.0.10", Port: 80, Protocol: "TCP", Kind: "ClusterIP", Backends: many},
			{Address: "fd00:10:96::10", Port: 80, Protocol: "TCP", Kind: "ClusterIP"},
			{Address: "192.0.2.1", Port: 30080, Protocol: "TCP", Kind: "NodePort", Backends: many[:1]},
		}},
	}
}

func (d daemon) Attachments() []model.Endpoint {
	if d.empty {
		return nil
	}
	return []model.Endpoint{
		{ID: 1, ContainerID: "4a1f0c2b9d3e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60", PodIfname: "eth0", Pod: model.Name{Namespace: "default", Name: "client"},
			IPs: []netip.Addr{netip.MustParseAddr("10.244.0.5"), netip.MustParseAddr("fd00:10:244::5")}, Interface: "lxc4a1f0c2b9d3e", MAC: "02:00:00:00:00:05", Netns: "/var/run/netns/cni-1"},
		{ID: 65535, ContainerID: "cnitool-77", PodIfname: "net1", IPs: []netip.Addr{netip.MustParseAddr("10.244.0.6")}, Interface: "lxc77", MAC: "02:00:00:00:00:06"},
	}
}

func (d daemon) AddEndpoint(e model.Endpoint) (model.Endpoint, error) { return e, nil }
func (d daemon) DeleteEndpoint(string, string) error                  { return nil }

func (d daemon) Events(context.Context) (<-chan api.Event, error) {
	events := make(chan api.Event, 3)
	events <- api.Event{Time: "2026-03-01T12:00:00.123456789Z", Kind: "new", Endpoint: 1, Pod: "default/client", Direction: "from", Protocol: "TCP", Source: "10.244.0.5:40000", Destination: "10.96.0.10:80", Translation: "10.244.0.7:8080"}
	events <- api.Event{Time: "2026-03-01T12:00:00.5Z", Kind: "drop", Reason: "SOURCE_ADDRESS", Endpoint: 2, Direction: "from", Protocol: "UDP", Source: "203.0.113.9:1", Destination: "10.96.0.10:53", Bytes: 60}
	events <- api.Event{Time: "2026-03-01T12:00:01.000000001Z", Kind: "end", Direction: "wire", Protocol: "TCP", Source: "203.0.113.9:5000", Destination: "192.0.2.1:30080"}
	close(events)
	return events, nil
}

func serve(t *testing.T, d api.Daemon) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "mooring.sock")
	l, err := api.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { api.Serve(ctx, l, d, slog.New(slog.DiscardHandler)); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	return socket
}

// mooring runs one command line.
func mooring(t *testing.T, socket string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, &out, &errs, func(key string) string {
		if key == "MOORING_SOCKET" {
			return socket
		}
		return ""
	})
	return code, out.String(), errs.String()
}

func TestCommandsPrintWhatTheGoldensShow(t *testing.T) {
	time.Local = time.UTC
	version = "v0.1.0"
	full, empty := serve(t, daemon{}), serve(t, daemon{empty: true})
	for _, command := range []string{
		"status", "status -o json", "status -o yaml",
		"ct list", "ct list -o json", "ct list -o yaml", "ct list --pod default/nobody", "ct list --proto udp",
		"ct stats", "ct stats -o json", "ct flush",
		"service list", "service list -o json", "service list -o yaml",
		"policy list", "policy list -o json", "policy list -o yaml",
		"policy explain --from default/client --to default/web --port 80/TCP", "policy explain --from default/client --to default/web --port 80 -o json",
		"policy explain --from default/client --to default/web --port 81/TCP", "policy explain --from default/client --to default/web",
		"policy explain --from default/client --to default/web --port 0/TCP", "policy explain --help",
		"endpoint list", "endpoint list -o json", "endpoint list -o yaml",
		"monitor", "monitor -o json", "monitor -o yaml", "monitor --kind drop,end",
		"--help", "status --help", "ct --help", "ct list --help", "cleanup --help", "monitor --help",
	} {
		for name, socket := range map[string]string{"full": full, "empty": empty} {
			if name == "empty" && (strings.Contains(command, "--") || strings.HasPrefix(command, "monitor") || strings.HasPrefix(command, "ct stats") || command == "ct flush") {
				continue
			}
			t.Run(name+" "+command, func(t *testing.T) {
				code, stdout, stderr := mooring(t, socket, strings.Fields(command)...)
				got := fmt.Sprintf("$ mooring %s\n%s", command, stdout)
				if stderr != "" {
					got += "-- stderr\n" + stderr
				}
				if code != 0 {
					got += fmt.Sprintf("-- exit %d\n", code)
				}
				golden(t, name+" "+command, strings.ReplaceAll(got, socket, "SOCKET"))
			})
		}
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", strings.NewReplacer(" ", "_", "/", "-", ",", "-").Replace(name)+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("(-want +got, go test -update writes it anew)\n%s", diff)
	}
}

func TestWrongUsageIsTwoAndOneLine(t *testing.T) {
	socket := serve(t, daemon{})
	for command, word := range map[string]string{
		"":                            "status",
		"stauts":                      `"stauts" is not a command`,
		"ct":                          "flush, list, stats",
		"ct lst":                      `"lst" is not a command of mooring ct`,
		"ct list --pod web":           `--pod: "web" is not NAMESPACE/NAME`,
		"ct list --service a/b/c":     "--service",
		"ct list --proto sctp":        "TCP, UDP, ICMP or ICMPv6",
		"ct list -o xml":              "table, json and yaml",
		"ct list --nope":              "--nope",
		"ct list more":                `no argument "more"`,
		"status --socket":             "--socket",
		"monitor --kind birth":        "drop, new or end",
		"version 1":                   "no argument",
		"completion klingon":          "klingon",
		"service list extra argument": "extra",
	} {
		code, stdout, stderr := mooring(t, socket, strings.Fields(command)...)
		if code != 2 || stdout != "" || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, word) {
			t.Errorf("mooring %s: exit %d, stdout %q, stderr %q; want 2 and one line with %q", command, code, stdout, stderr, word)
		}
	}
}

func TestDeadDaemonIsOneLineWithTheRemedy(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "none.sock")
	for _, command := range []string{"status", "ct list", "ct list -o json", "ct stats", "ct flush", "service list", "endpoint list -o yaml", "monitor"} {
		code, stdout, stderr := mooring(t, "", append([]string{"--socket", socket}, strings.Fields(command)...)...)
		if code != 1 || stdout != "" || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, socket) || !strings.Contains(stderr, "systemctl start mooringd") {
			t.Errorf("mooring %s: exit %d, stdout %q, stderr %q", command, code, stdout, stderr)
		}
	}
}

// failing breaks off in the middle of the table.
type failing struct{ daemon }

func (failing) Connections(_ api.Filter, yield func(api.Connection) bool) error {
	yield(api.Connection{Type: "SVC"})
	return errors.New("read map conntrack:\nno buffer space")
}

func TestListThatBreaksOffFails(t *testing.T) {
	socket := serve(t, failing{})
	for _, output := range []string{"table", "json", "yaml"} {
		code, stdout, stderr := mooring(t, socket, "ct", "list", "-o", output)
		if code != 1 || !strings.Contains(stdout, "SVC") || !strings.HasSuffix(stderr, "no buffer space\n") || strings.Count(stderr, "\n") != 1 {
			t.Errorf("-o %s: exit %d, stdout %q, stderr %q", output, code, stdout, stderr)
		}
	}
}

func TestYAMLListIsOneDocument(t *testing.T) {
	_, stdout, _ := mooring(t, serve(t, daemon{}), "ct", "list", "-o", "yaml")
	var rows []api.Connection
	if err := yaml.UnmarshalStrict([]byte(stdout), &rows); err != nil || len(rows) != 4 {
		t.Errorf("%d rows, %v", len(rows), err)
	}
}

func TestTableFitsTheTerminal(t *testing.T) {
	rows := func() iter.Seq2[api.Connection, error] {
		var list []api.Connection
		daemon{}.Connections(api.Filter{}, func(c api.Connection) bool { list = append(list, c); return true })
		return sequence(list, nil)
	}
	for _, width := range []int{0, 200, 120, 80} {
		var text bytes.Buffer
		out := bufio.NewWriter(&text)
		if err := listTable(out, io.Discard, rows(), connectionColumns, width, ""); err != nil {
			t.Fatal(err)
		}
		out.Flush()
		golden(t, fmt.Sprintf("width %d", width), text.String())
		for line := range strings.Lines(text.String()) {
			if n := len([]rune(strings.TrimSpace(line))); width > 0 && n > width {
				t.Errorf("%d columns on a terminal of %d: %s", n, width, line)
			}
		}
	}
}

func TestLongTableIsPrintedBeforeItEnds(t *testing.T) {
	var text bytes.Buffer
	out := bufio.NewWriter(&text)
	i := 0
	err := listTable(out, io.Discard, func(yield func(int, error) bool) {
		for i = range 100_000 {
			if !yield(i, nil) {
				return
			}
			if i == 50_000 && text.Len() == 0 {
				t.Error("half of the rows have come, and none is printed")
			}
		}
	}, []column[int]{{title: "N", cell: func(i int) string { return number(i) }}}, 0, "")
	out.Flush()
	if lines := strings.Count(text.String(), "\n"); err != nil || lines != 100_001 {
		t.Errorf("%d lines, %v", lines, err)
	}
}

func TestCompletionWorksForEveryShell(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if code, stdout, stderr := mooring(t, "", "completion", shell); code != 0 || !strings.Contains(stdout, "mooring") || stderr != "" {
			t.Errorf("completion %s: exit %d, %d bytes, stderr %q", shell, code, len(stdout), stderr)
		}
	}
}

func TestInterruptedMonitorIsDone(t *testing.T) {
	socket := serve(t, daemon{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var errs bytes.Buffer
	if code := run(ctx, []string{"--socket", socket, "monitor"}, io.Discard, &errs, func(string) string { return "" }); code != 0 {
		t.Errorf("exit %d: %s", code, &errs)
	}
}

func TestCleanupSparesARunningDaemon(t *testing.T) {
	if os.Geteuid() != 0 {
		code, _, stderr := mooring(t, serve(t, daemon{}), "cleanup")
		if code != 1 || !strings.Contains(stderr, "run it as root") {
			t.Errorf("exit %d, %s", code, stderr)
		}
		return
	}
	code, _, stderr := mooring(t, serve(t, daemon{}), "cleanup")
	if code != 1 || !strings.Contains(stderr, "systemctl stop mooringd") || !strings.Contains(stderr, "--force") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	socket := filepath.Join(t.TempDir(), "mooring.sock")
	l, err := api.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(300*time.Millisecond, func() { l.Close() })
	if err := (&client{socket: socket}).refuseWhileRunning(t.Context(), time.Minute); err != nil {
		t.Errorf("of a daemon that is being stopped: %v", err)
	}
	if err := removePins(t.TempDir()); err == nil || !strings.Contains(err.Error(), "not in a BPF file system") {
		t.Errorf("pins in a directory that is none: %v", err)
	}
}
