// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/datapath"
	"github.com/mooring-cni/mooring/daemon/endpoint"
	"github.com/mooring-cni/mooring/daemon/health"
	"github.com/mooring-cni/mooring/daemon/model"
	"github.com/mooring-cni/mooring/daemon/node"
	"github.com/mooring-cni/mooring/daemon/policy"
	"github.com/mooring-cni/mooring/daemon/service"
)

// fakeKernel is a datapath that remembers what it was told.
type fakeKernel struct {
	mutex  sync.Mutex
	refuse error // of ApplyFrontends
	broken error // of Stats

	refusePolicy error
	policy       policy.Update // all that was written, as if nothing went
	frontends    map[model.Name][]model.Frontend
	endpoints    map[uint32]model.Endpoint
	adopted      []string
	synced       int
	closed       bool
	rows         []api.Connection
	events       []api.Event
	hook         api.HookStatus
}

func newFakeKernel() *fakeKernel {
	return &fakeKernel{
		frontends: map[model.Name][]model.Frontend{}, endpoints: map[uint32]model.Endpoint{},
		hook: api.HookStatus{Mode: "trampoline"},
	}
}

func (k *fakeKernel) Run(ctx context.Context) error { <-ctx.Done(); return nil }
func (k *fakeKernel) Close() error                  { k.closed = true; return nil }
func (k *fakeKernel) ApplyFrontends(changed map[model.Name][]model.Frontend) error {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	if k.refuse != nil {
		return k.refuse
	}
	for name, f := range changed {
		if f == nil {
			delete(k.frontends, name)
		} else {
			k.frontends[name] = f
		}
	}
	return nil
}
func (k *fakeKernel) ApplyPolicy(u *policy.Update) error { return k.SyncPolicy(u) }
func (k *fakeKernel) SyncPolicy(u *policy.Update) error {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	if k.refusePolicy != nil {
		return k.refusePolicy
	}
	if k.policy.Endpoints == nil {
		k.policy.Endpoints = map[uint32]policy.EndpointPolicy{}
	}
	maps.Copy(k.policy.Endpoints, u.Endpoints)
	return nil
}
func (k *fakeKernel) PolicyDrops() (map[policy.ID]uint64, error) { return nil, nil }
func (k *fakeKernel) ForgetPolicyDrops([]policy.ID) error        { return nil }
func (k *fakeKernel) TryPacket(policy.Query) (bool, error)       { return true, nil }
func (k *fakeKernel) Synced() error                              { k.synced++; return nil }
func (k *fakeKernel) AddEndpoint(e model.Endpoint) error {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	k.endpoints[e.ID] = e
	return nil
}
func (k *fakeKernel) Adopt(known []model.Endpoint) error {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	for _, e := range known {
		k.adopted = append(k.adopted, e.Interface)
	}
	return nil
}
func (k *fakeKernel) RemoveEndpoint(e model.Endpoint) error {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	delete(k.endpoints, e.ID)
	return nil
}
func (k *fakeKernel) Connections(yield func(api.Connection) bool) error {
	for _, c := range k.rows {
		if !yield(c) {
			break
		}
	}
	return nil
}
func (k *fakeKernel) Stats() (api.ConntrackStats, error) {
	return api.ConntrackStats{
		Entries: 3, MaxEntries: 8192, Tethered: 2, Created: 10, Deleted: api.Deleted{Socket: 5, Timewait: 1, Expired: 1},
		Sweep: api.SweepStats{Runs: 7, Scanned: 70, IntervalSeconds: 1.5, CPUSeconds: 0.25},
	}, k.broken
}
func (k *fakeKernel) Flush() (uint64, error) { return 3, nil }
func (k *fakeKernel) Drops() (map[api.Drop]api.DropCount, error) {
	return map[api.Drop]api.DropCount{{Reason: "SOURCE_ADDRESS", Direction: "from"}: {Packets: 4, Bytes: 240}}, nil
}
func (k *fakeKernel) Events(ctx context.Context) (<-chan api.Event, error) {
	events := make(chan api.Event)
	go func() {
		defer close(events)
		for _, e := range k.events {
			select {
			case events <- e:
			case <-ctx.Done():
				return
			}
		}
	}()
	return events, nil
}
func (k *fakeKernel) Hook() api.HookStatus                       { return k.hook }
func (k *fakeKernel) XDP() []api.XDPStatus                       { return nil }
func (k *fakeKernel) Problems() []string                         { return nil }
func (k *fakeKernel) SetNodeAddresses([]netip.Addr)              {}
func (k *fakeKernel) SetUplinks([]datapath.Uplink, []netip.Addr) {}
func (k *fakeKernel) SetNodes([]model.Node)                      {}
func (k *fakeKernel) SetTunnels(string, int, map[netip.Prefix]datapath.Tunnel) error {
	return nil
}

// names are the services in the datapath with their backends.
func (k *fakeKernel) names() map[string]string {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	out := map[string]string{}
	for name, frontends := range k.frontends {
		var text []string
		for _, f := range frontends {
			line := f.AddrPort.String() + " ->"
			for _, b := range f.Internal {
				line += " " + b.AddrPort.String()
			}
			text = append(text, line)
		}
		out[name.String()] = strings.Join(text, "; ")
	}
	return out
}

// everyLink is there.
type everyLink struct{}

func (everyLink) Exists(string, int) (bool, error) { return true, nil }

// assemble makes a daemon without its machine.
func assemble(t *testing.T, k *fakeKernel) *daemon {
	t.Helper()
	config := conf.Default()
	config.NodeName, config.Manifests, config.StateDir = "node-a", "/nowhere", t.TempDir()
	config.Socket = filepath.Join(t.TempDir(), "mooring.sock")
	config.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24")}
	log := slog.New(slog.DiscardHandler)
	machine := &node.Manager{}
	services := newServices(service.NewTable(nodeContext(config, nil)), k, func([]model.Node) {}, log)
	endpoints, err := endpoint.Open(config.StateDir, k, everyLink{}, log, services.endpointsChanged)
	if err != nil {
		t.Fatal(err)
	}
	policies := newPolicies(config, k, slog.New(slog.DiscardHandler))
	policies.follow(endpoints)
	d := &daemon{config: config, machine: machine, kernel: k, endpoints: endpoints, services: services, policies: policies}
	services.health = health.New(d.proxy, log)
	services.follow(endpoints)
	return d
}

func name(namespace, name string) model.Name { return model.Name{Namespace: namespace, Name: name} }

func web() model.Changes {
	return model.Changes{
		Synced: true,
		Services: map[model.Name]*model.Service{name("default", "web"): {
			Name: name("default", "web"), ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.10")}, Selector: map[string]string{"app": "web"},
			Ports: []model.ServicePort{{Protocol: model.TCP, Port: 80, TargetPort: 8080}},
		}},
		Pods: map[model.Name]*model.Pod{
			name("default", "web-1"): {Name: name("default", "web-1"), Labels: map[string]string{"app": "web"}},
			name("default", "web-2"): {Name: name("default", "web-2"), Labels: map[string]string{"app": "web"}},
		},
	}
}

func pod(n int, podName string) model.Endpoint {
	return model.Endpoint{
		ContainerID: fmt.Sprint("c", n), PodIfname: "eth0", Pod: name("default", podName), IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, 0, byte(n)})},
		Interface: fmt.Sprint("lxc", n), Ifindex: n, MAC: "02:00:00:00:00:01", HostMAC: "02:00:00:00:00:02",
	}
}

func equal(t *testing.T, what string, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func TestPodIsABackendWhenItsADDReturns(t *testing.T) {
	k := newFakeKernel()
	d := assemble(t, k)
	d.services.apply(web())
	equal(t, "before any pod", k.names(), map[string]string{"default/web": "10.96.0.10:80/TCP ->"})
	if _, err := d.AddEndpoint(pod(7, "web-1")); err != nil {
		t.Fatal(err)
	}
	if _, err := d.AddEndpoint(pod(8, "web-2")); err != nil {
		t.Fatal(err)
	}
	equal(t, "with two", k.names(), map[string]string{"default/web": "10.96.0.10:80/TCP -> 10.244.0.7:8080/TCP 10.244.0.8:8080/TCP"})
	if err := d.DeleteEndpoint("c7", "eth0"); err != nil {
		t.Fatal(err)
	}
	equal(t, "with one", k.names(), map[string]string{"default/web": "10.96.0.10:80/TCP -> 10.244.0.8:8080/TCP"})
	equal(t, "rows", d.Services(), []api.Service{{Namespace: "default", Name: "web", Frontends: []api.Frontend{{
		Address: "10.96.0.10", Port: 80, Protocol: "TCP", Kind: "ClusterIP", Backends: []api.Backend{{Address: "10.244.0.8", Port: 8080, State: "active"}},
	}}}})
	d.services.apply(model.Changes{Synced: true, Services: map[model.Name]*model.Service{name("default", "web"): nil}})
	equal(t, "without the service", k.names(), map[string]string{})
}

func TestServicesOfAnEarlierRunGoWhenAllAreKnown(t *testing.T) {
	k := newFakeKernel()
	d := assemble(t, k)
	if serious, _ := d.problems(); len(serious) != 1 || !strings.Contains(serious[0], "not known yet") || d.services.known() {
		t.Errorf("before anything was read: %q", serious)
	}
	d.services.apply(model.Changes{Problems: []model.Problem{{File: "/nowhere", Message: "there is no such directory"}}})
	if k.synced != 0 || d.services.known() {
		t.Error("an absent directory was taken for an empty one")
	}
	d.services.apply(web())
	d.services.apply(model.Changes{Synced: true})
	if k.synced != 1 || !d.services.known() {
		t.Errorf("Synced was called %d times, known is %v", k.synced, d.services.known())
	}
}

func TestWhatTheDatapathRefusesIsOwedAndNamed(t *testing.T) {
	k := newFakeKernel()
	k.refuse = errors.New("map backends: no space left")
	d := assemble(t, k)
	d.services.apply(web())
	serious, _ := d.problems()
	if len(serious) != 1 || !strings.Contains(serious[0], "no space left") || k.synced != 0 || d.services.known() {
		t.Errorf("problems %q, synced %d", serious, k.synced)
	}
	k.mutex.Lock()
	k.refuse = nil
	k.mutex.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { d.services.run(ctx); close(done) }()
	for end := time.Now().Add(5 * time.Second); !d.services.known() && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	<-done
	equal(t, "datapath", k.names(), map[string]string{"default/web": "10.96.0.10:80/TCP ->"})
	if serious, _ := d.problems(); len(serious) != 0 || k.synced != 1 {
		t.Errorf("problems %q, synced %d", serious, k.synced)
	}
}

func TestNodesReachTheMachineWhenAllAreKnown(t *testing.T) {
	var told [][]string
	s := newServices(service.NewTable(service.NodeContext{Name: "a"}), newFakeKernel(), func(nodes []model.Node) {
		var names []string
		for _, n := range nodes {
			names = append(names, n.Name)
		}
		told = append(told, names)
	}, slog.New(slog.DiscardHandler))
	s.health = health.New(s.proxy, slog.New(slog.DiscardHandler))
	s.apply(model.Changes{Nodes: map[string]*model.Node{"b": {Name: "b"}}})
	s.apply(model.Changes{Synced: true, Nodes: map[string]*model.Node{"a": {Name: "a"}}})
	s.apply(model.Changes{Synced: true})
	s.apply(model.Changes{Synced: true, Nodes: map[string]*model.Node{"b": nil}})
	equal(t, "nodes told", told, [][]string{{"a", "b"}, {"a"}})
}

func TestProblemsAreSeriousOrNot(t *testing.T) {
	k := newFakeKernel()
	d := assemble(t, k)
	changes := web()
	changes.Problems = []model.Problem{{File: "/m/web.yaml", Document: 2, Object: "Service default/x", Field: "spec.ports[0].port", Message: "0 is not a port"}}
	d.services.apply(changes)
	k.hook = api.HookStatus{Mode: "off", Reason: "the kernel has no BTF"}
	s, err := d.Status()
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "problems", s.Problems, []string{
		"connections end by timers only, not with their sockets: the kernel has no BTF",
		"/m/web.yaml document 2: Service default/x: spec.ports[0].port: 0 is not a port",
	})
	if !s.Healthy || s.Services != 1 || s.Backends != 0 || s.Mode != "standalone" || s.Conntrack != (api.TableStatus{Entries: 3, MaxEntries: 8192}) || s.Kernel == "" {
		t.Errorf("status %+v", s)
	}
	k.refusePolicy = errors.New("write mooring_verdicts: the map is full")
	d.policies.apply(model.Changes{Synced: true, Policies: map[model.Name]*model.Policy{name("default", "deny"): {}}})
	k.broken = errors.New("map conntrack_stats: bad file descriptor")
	if s, _ = d.Status(); s.Healthy || !strings.Contains(s.Problems[0], "network policies are not up to date in the datapath: write mooring_verdicts") {
		t.Errorf("status %+v", s)
	}
	many := model.Changes{Synced: true}
	for i := range 500 {
		many.Problems = append(many.Problems, model.Problem{File: fmt.Sprint(i), Message: "wrong"})
	}
	d.services.apply(many)
	if _, minor := d.problems(); len(minor) != maxProblems+2 || minor[len(minor)-1] != "and 400 more problems with objects" {
		t.Errorf("%d problems, the last is %q", len(minor), minor[len(minor)-1])
	}
}

func TestConnectionsAreFilteredByPodServiceAndProtocol(t *testing.T) {
	k := newFakeKernel()
	d := assemble(t, k)
	d.services.apply(web())
	client, err := d.AddEndpoint(pod(5, "client"))
	if err != nil {
		t.Fatal(err)
	}
	server, err := d.AddEndpoint(pod(7, "web-1"))
	if err != nil {
		t.Fatal(err)
	}
	k.rows = []api.Connection{
		{Type: "SVC", Protocol: "TCP", Source: "1", Destination: "10.96.0.10:80", Translation: "10.244.0.7:8080", Endpoint: client.ID},
		{Type: "EGRESS", Protocol: "TCP", Source: "2", Destination: "10.244.0.7:8080", Translation: "10.96.0.10:80", Endpoint: client.ID},
		{Type: "INGRESS", Protocol: "TCP", Source: "3", Destination: "10.244.0.7:8080", Endpoint: server.ID},
		{Type: "SVC", Protocol: "UDP", Source: "4", Destination: "10.96.0.10:80", Endpoint: client.ID},
	}
	for _, test := range []struct {
		filter api.Filter
		want   string
	}{
		{api.Filter{}, "1234"},
		{api.Filter{Pod: name("default", "client")}, "124"},
		{api.Filter{Pod: name("default", "web-1")}, "3"},
		{api.Filter{Pod: name("default", "nobody")}, ""},
		{api.Filter{Service: name("default", "web")}, "12"},
		{api.Filter{Service: name("default", "nothing")}, ""},
		{api.Filter{Protocol: "UDP"}, "4"},
		{api.Filter{Pod: name("default", "client"), Service: name("default", "web"), Protocol: "TCP"}, "12"},
	} {
		got := ""
		if err := d.Connections(test.filter, func(c api.Connection) bool { got += c.Source; return true }); err != nil {
			t.Fatal(err)
		}
		if got != test.want {
			t.Errorf("%+v: rows %q, want %q", test.filter, got, test.want)
		}
	}
}

func TestEventsNameTheirPod(t *testing.T) {
	k := newFakeKernel()
	d := assemble(t, k)
	e, err := d.AddEndpoint(pod(5, "client"))
	if err != nil {
		t.Fatal(err)
	}
	k.events = []api.Event{{Kind: "drop", Endpoint: e.ID}, {Kind: "drop", Endpoint: 999}, {Kind: "new"}}
	events, err := d.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var pods []string
	for e := range events {
		pods = append(pods, e.Pod)
	}
	equal(t, "pods", pods, []string{"default/client", "", ""})
}

func TestMetricsAreWellFormedAndComplete(t *testing.T) {
	k := newFakeKernel()
	d := assemble(t, k)
	d.services.apply(web())
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(&collector{d})
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if complaints, err := promlint.NewWithMetricFamilies(families).Lint(); err != nil || len(complaints) > 0 {
		t.Errorf("%v %v", complaints, err)
	}
	body := get(t, d, "/metrics", http.StatusOK)
	for _, line := range []string{
		`mooring_conntrack_deleted_total{reason="socket"} 5`, `mooring_conntrack_deleted_total{reason="flush"} 0`, `mooring_conntrack_entries 3`,
		`mooring_conntrack_sweep_cpu_seconds_total 0.25`, `mooring_dropped_packets_total{direction="from",reason="SOURCE_ADDRESS"} 4`,
		`mooring_dropped_bytes_total{direction="from",reason="SOURCE_ADDRESS"} 240`, `mooring_endpoints 0`, `mooring_services 1`, `mooring_healthy 1`,
		`mooring_conntrack_hook_mode{mode="trampoline"} 1`, `mooring_conntrack_hook_mode{mode="off"} 0`, `mooring_build_info{goversion="go`, "go_goroutines", "process_resident_memory_bytes",
	} {
		if !strings.Contains(body, "\n"+line) {
			t.Errorf("no line %q in\n%s", line, body)
		}
	}
	k.broken = errors.New("gone")
	if body := get(t, d, "/metrics", http.StatusOK); !strings.Contains(body, "mooring_datapath_unreadable 1") || strings.Contains(body, "mooring_conntrack_entries ") {
		t.Errorf("metrics of a datapath that cannot be read:\n%s", body)
	}
}

func TestReadyOnceServicesAreInTheDatapath(t *testing.T) {
	k := newFakeKernel()
	d := assemble(t, k)
	get(t, d, "/healthz", http.StatusOK)
	get(t, d, "/proxyMode", http.StatusOK)
	if body := get(t, d, "/readyz", http.StatusServiceUnavailable); !strings.Contains(body, "not known yet") {
		t.Errorf("readyz: %s", body)
	}
	d.services.apply(web())
	get(t, d, "/readyz", http.StatusOK)
}

func get(t *testing.T, d *daemon, path string, code int) string {
	t.Helper()
	server := httptest.NewServer(d.handler())
	defer server.Close()
	response, err := http.Get(server.URL + path)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(response.Body)
	if response.StatusCode != code {
		t.Errorf("GET %s: %s, want %d: %s", path, response.Status, code, body)
	}
	return string(body)
}

func TestLoadBalancersAreToldOfTheNodeAndItsServices(t *testing.T) {
	k := newFakeKernel()
	d := assemble(t, k)
	d.services.setNodes = d.nodesChanged
	if p := d.proxy(); p.Started || p.Eligible {
		t.Errorf("before anything is known: %+v", p)
	}
	d.services.apply(web())
	if p := d.proxy(); !p.Started || !p.Eligible || time.Since(p.Updated) > time.Minute || !p.Pending.IsZero() {
		t.Errorf("a node that nobody describes: %+v", p)
	}
	for _, leaving := range []bool{true, false} {
		d.services.apply(model.Changes{Synced: true, Nodes: map[string]*model.Node{"node-a": {Name: "node-a", Leaving: leaving}}})
		if p := d.proxy(); p.Eligible == leaving {
			t.Errorf("leaving %v: %+v", leaving, p)
		}
	}

	k.refuse = errors.New("no room")
	changed := web()
	for _, s := range changed.Services {
		s.Ports[0].Port++
	}
	d.services.apply(changed)
	if p := d.proxy(); p.Pending.IsZero() {
		t.Errorf("the datapath refuses: %+v", p)
	}
	since := d.proxy().Pending
	d.services.push(service.Update{})
	if p := d.proxy(); p.Pending != since {
		t.Errorf("the datapath refuses since %v, not %v", since, p.Pending)
	}
	k.refuse = &datapath.RefusedError{Services: map[model.Name]error{name("default", "web"): errors.New("too large")}}
	d.services.push(service.Update{})
	if p := d.proxy(); !p.Pending.IsZero() {
		t.Errorf("one service does not fit, the others do: %+v", p)
	}
	k.refuse = nil
	d.services.push(service.Update{})
	if p := d.proxy(); !p.Pending.IsZero() {
		t.Errorf("the datapath refuses no more: %+v", p)
	}
}

func TestMetricsAddressThatIsTakenIsAProblemUntilItIsFree(t *testing.T) {
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := assemble(t, newFakeKernel())
	d.services.apply(web())
	d.config.MetricsAddress = other.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { d.serveMetrics(ctx); close(done) }()
	until := func(what string, holds func([]string) bool) {
		t.Helper()
		var minor []string
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			if _, minor = d.problems(); holds(minor) {
				return
			}
		}
		t.Errorf("not %s: %q", what, minor)
	}
	until("named", func(p []string) bool { return len(p) == 1 && strings.Contains(p[0], "its own metricsAddress") })
	other.Close()
	until("gone", func(p []string) bool { return len(p) == 0 })
	cancel()
	<-done
}

func TestPartsStopInReverseAndFailuresAreNamed(t *testing.T) {
	p := newParts(slog.New(slog.DiscardHandler))
	var mutex sync.Mutex
	var stopped []string
	for _, part := range []string{"first", "second", "third"} {
		p.start(part, func(ctx context.Context) error {
			<-ctx.Done()
			mutex.Lock()
			stopped = append(stopped, part)
			mutex.Unlock()
			return ctx.Err()
		})
	}
	p.start("broken", func(context.Context) error { return errors.New("no luck") })
	if err := p.wait(t.Context()); err == nil || err.Error() != "broken: no luck" {
		t.Errorf("wait: %v", err)
	}
	p.stop()
	equal(t, "order", stopped, []string{"third", "second", "first"})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := newParts(nil).wait(ctx); err != nil {
		t.Errorf("wait after SIGTERM: %v", err)
	}
}

func TestSystemdIsTold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	if err := notify("READY=1"); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 64)
	n, err := l.Read(buffer)
	if err != nil || string(buffer[:n]) != "READY=1" {
		t.Errorf("systemd read %q, %v", buffer[:n], err)
	}
	t.Setenv("NOTIFY_SOCKET", "")
	if err := notify("READY=1"); err != nil {
		t.Errorf("without systemd: %v", err)
	}
}

func TestWhatCannotBeDoneTogetherIsRefused(t *testing.T) {
	for key, change := range map[string]func(*conf.Config){
		"nodePort.mode": func(c *conf.Config) { c.NodePort.Mode, c.Routing.Mode = "dsr", "vxlan" },
	} {
		config := conf.Default()
		config.Manifests = "/m"
		if err := unsupported(config); err != nil {
			t.Fatalf("the defaults: %v", err)
		}
		change(&config)
		if err := unsupported(config); err == nil || !strings.HasPrefix(err.Error(), key+": ") || !strings.Contains(err.Error(), "routing.mode") {
			t.Errorf("%s: %v", key, err)
		}
	}
}

// None of these may be a command line that is right: the daemon would run, on the
// machine itself.
func TestCommandLineErrors(t *testing.T) {
	file := filepath.Join(t.TempDir(), "mooringd.yaml")
	if err := os.WriteFile(file, []byte("manifests: /m\npodCIDRs: [10.244.0.0/24]\nconntrck: 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args []string
		code int
		text string
	}{
		{[]string{"--config", file}, 1, file + ":3: conntrck: unknown key"},
		{[]string{"--config", "/nowhere/x.yaml"}, 1, "/nowhere/x.yaml"},
		{[]string{"--no-such"}, 2, "--no-such"},
		{[]string{"serve"}, 2, `"serve": mooringd takes flags only`},
		{[]string{"--manifests", "/m", "--pod-cidrs", "10.244.0.0/99"}, 2, "--pod-cidrs"},
	} {
		var out, errs bytes.Buffer
		code := command(t.Context(), test.args, &out, &errs)
		if code != test.code || !strings.Contains(errs.String(), test.text) || strings.Count(errs.String(), "\n") != 1 {
			t.Errorf("mooringd %s: exit %d, %q; want %d with %q", strings.Join(test.args, " "), code, &errs, test.code, test.text)
		}
	}
	var out, errs bytes.Buffer
	if code := command(t.Context(), []string{"--help"}, &out, &errs); code != 0 || !strings.Contains(out.String(), "--conntrack-hook") {
		t.Errorf("--help: exit %d\n%s%s", code, &out, &errs)
	}
}

func TestLogIsTextOrJSONOfItsLevel(t *testing.T) {
	var b bytes.Buffer
	log := newLog(&b, conf.Log{Level: "warn", Format: "json"})
	log.Info("quiet")
	log.Warn("loud")
	if got := b.String(); !strings.HasPrefix(got, "{") || strings.Contains(got, "quiet") || !strings.Contains(got, `"msg":"loud"`) {
		t.Errorf("log %q", got)
	}
}

func TestNodeFileSurvivesTheDaemonNotReady(t *testing.T) {
	d := assemble(t, newFakeKernel())
	if err := d.leaveNodeFile(); err != nil {
		t.Fatal(err)
	}
	n, err := conf.ReadNode(d.config.Socket)
	if err != nil {
		t.Fatal(err)
	}
	if n.Ready || n.Reason == "" || n.StateDir != d.config.StateDir || n.Name != "node-a" || n.MTU != 1500 {
		t.Errorf("node file %+v", n)
	}
}

func TestTableFollowsTheMachinesMemory(t *testing.T) {
	for memory, want := range map[uint64]uint32{
		512 << 20: 1 << 16, 4 << 30: 1 << 16, 8 << 30: 1 << 17, 23 << 30: 1 << 18, 64 << 30: 1 << 20, 1 << 42: 1 << 22, 0: 1 << 16,
	} {
		if got := tableSize(memory); got != want {
			t.Errorf("%d MiB of memory: %d entries, want %d", memory>>20, got, want)
		}
	}
}
