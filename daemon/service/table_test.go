// SPDX-License-Identifier: Apache-2.0

package service

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/mooring-cni/mooring/daemon/model"
)

var comparers = gocmp.Options{
	gocmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	gocmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

var here = NodeContext{Name: "node-a", Zone: "a", Addresses: addrs("192.0.2.1", "2001:db8::1"), Standalone: true}

func addrs(texts ...string) []netip.Addr {
	var list []netip.Addr
	for _, text := range texts {
		list = append(list, netip.MustParseAddr(text))
	}
	return list
}

func named(name string) model.Name { return model.Name{Namespace: "default", Name: name} }

func web(name, clusterIP string) *model.Service {
	return &model.Service{
		Name:       named(name),
		ClusterIPs: addrs(clusterIP),
		Selector:   map[string]string{"app": name},
		Ports:      []model.ServicePort{{Name: "http", Protocol: model.TCP, Port: 80, TargetPort: 8080}},
	}
}

func sliceOf(name, service string, texts ...string) *model.EndpointSlice {
	s := &model.EndpointSlice{Name: named(name), Service: named(service), Ports: []model.EndpointPort{{Name: "http", Protocol: model.TCP, Port: 8080}}}
	for _, text := range texts {
		s.Endpoints = append(s.Endpoints, model.SliceEndpoint{Addresses: addrs(text), NodeName: "node-a", Ready: true, Serving: true})
	}
	return s
}

func services(list ...*model.Service) model.Changes {
	c := model.Changes{Services: make(map[model.Name]*model.Service)}
	for _, s := range list {
		c.Services[s.Name] = s
	}
	return c
}

func slicesOf(list ...*model.EndpointSlice) model.Changes {
	c := model.Changes{Slices: make(map[model.Name]*model.EndpointSlice)}
	for _, s := range list {
		c.Slices[s.Name] = s
	}
	return c
}

// summary is an update in words: service -> its frontends and backends.
func summary(u Update) map[string]string {
	m := make(map[string]string)
	for name, frontends := range u.Frontends {
		text := "gone"
		if frontends != nil {
			text = frontendsText(frontends)
		}
		m[name.Name] = text
	}
	return m
}

func frontendsText(frontends []model.Frontend) string {
	var parts []string
	for _, f := range frontends {
		part := f.AddrPort.String()
		for _, b := range f.Internal {
			part += " " + b.Addr.String()
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, ", ")
}

func expect(t *testing.T, what string, u Update, want map[string]string) {
	t.Helper()
	if diff := gocmp.Diff(want, summary(u)); diff != "" {
		t.Errorf("%s: what changed (-want +got):\n%s", what, diff)
	}
}

func TestOnlyTheServiceOfAChangedSliceIsUpdated(t *testing.T) {
	table := NewTable(here)
	expect(t, "slice before its service", table.Apply(slicesOf(sliceOf("a-1", "a", "10.244.0.5"))), map[string]string{})
	expect(t, "services", table.Apply(services(web("a", "10.96.0.10"), web("b", "10.96.0.11"))),
		map[string]string{"a": "10.96.0.10:80/TCP 10.244.0.5", "b": "10.96.0.11:80/TCP"})
	expect(t, "second slice", table.Apply(slicesOf(sliceOf("a-2", "a", "10.244.0.6"))), map[string]string{"a": "10.96.0.10:80/TCP 10.244.0.5 10.244.0.6"})
	expect(t, "the same slice again", table.Apply(slicesOf(sliceOf("a-2", "a", "10.244.0.6"))), map[string]string{})
	expect(t, "slice that moves to another service", table.Apply(slicesOf(sliceOf("a-2", "b", "10.244.0.6"))),
		map[string]string{"a": "10.96.0.10:80/TCP 10.244.0.5", "b": "10.96.0.11:80/TCP 10.244.0.6"})
	expect(t, "slice gone", table.Apply(model.Changes{Slices: map[model.Name]*model.EndpointSlice{named("a-1"): nil}}), map[string]string{"a": "10.96.0.10:80/TCP"})
	expect(t, "service gone", table.Apply(model.Changes{Services: map[model.Name]*model.Service{named("a"): nil, named("never-was"): nil}}), map[string]string{"a": "gone"})
	expect(t, "service back", table.Apply(services(web("a", "10.96.0.12"))), map[string]string{"a": "10.96.0.12:80/TCP"})
}

func TestAServiceWithoutFrontendsIsNotGone(t *testing.T) {
	table := NewTable(here)
	s := web("a", "10.96.0.10")
	s.Ports = nil
	if got := table.Apply(services(s)).Frontends[named("a")]; got == nil || len(got) != 0 {
		t.Errorf("frontends are %#v, want an empty list", got)
	}
}

func endpoint(id uint32, pod, addr string) *model.Endpoint {
	return &model.Endpoint{ID: id, Pod: named(pod), PodIfname: "eth0", IPs: addrs(addr)}
}

func pod(name string, labels map[string]string) model.Changes {
	return model.Changes{Pods: map[model.Name]*model.Pod{named(name): {Name: named(name), Labels: labels}}}
}

func TestPodsAndTheirInterfacesUpdateTheServicesThatSelectThem(t *testing.T) {
	table := NewTable(here)
	table.Apply(services(web("a", "10.96.0.10"), web("b", "10.96.0.11")))
	endpoints := func(m map[uint32]*model.Endpoint) Update { return table.ApplyEndpoints(m) }
	expect(t, "interface of an unknown pod", endpoints(map[uint32]*model.Endpoint{1: endpoint(1, "pod-1", "10.244.0.5")}), map[string]string{})
	expect(t, "pod that is known then", table.Apply(pod("pod-1", map[string]string{"app": "a"})), map[string]string{"a": "10.96.0.10:80/TCP 10.244.0.5"})
	expect(t, "pod without interface", table.Apply(pod("pod-2", map[string]string{"app": "a"})), map[string]string{})
	expect(t, "its interface", endpoints(map[uint32]*model.Endpoint{2: endpoint(2, "pod-2", "10.244.0.6")}), map[string]string{"a": "10.96.0.10:80/TCP 10.244.0.5 10.244.0.6"})
	expect(t, "label that changes", table.Apply(pod("pod-1", map[string]string{"app": "b"})),
		map[string]string{"a": "10.96.0.10:80/TCP 10.244.0.6", "b": "10.96.0.11:80/TCP 10.244.0.5"})
	expect(t, "slice for the service", table.Apply(slicesOf(sliceOf("b-1", "b"))), map[string]string{"b": "10.96.0.11:80/TCP"})
	expect(t, "interface gone", endpoints(map[uint32]*model.Endpoint{1: nil, 2: nil}), map[string]string{"a": "10.96.0.10:80/TCP"})
	expect(t, "id used again", endpoints(map[uint32]*model.Endpoint{1: endpoint(1, "pod-2", "10.244.0.7")}), map[string]string{"a": "10.96.0.10:80/TCP 10.244.0.7"})
	expect(t, "pod gone", table.Apply(model.Changes{Pods: map[model.Name]*model.Pod{named("pod-2"): nil}}), map[string]string{"a": "10.96.0.10:80/TCP"})
}

func TestWithControllersPodsAreNotChosenHere(t *testing.T) {
	node := here
	node.Standalone = false
	table := NewTable(node)
	table.Apply(services(web("a", "10.96.0.10")))
	table.Apply(pod("pod-1", map[string]string{"app": "a"}))
	expect(t, "interface", table.ApplyEndpoints(map[uint32]*model.Endpoint{1: endpoint(1, "pod-1", "10.244.0.5")}), map[string]string{})
}

func TestTheFirstByNameHasAnAddressUntilItGoes(t *testing.T) {
	table := NewTable(here)
	expect(t, "second by name, alone", table.Apply(services(web("b", "10.96.0.10"))), map[string]string{"b": "10.96.0.10:80/TCP"})
	u := table.Apply(services(web("a", "10.96.0.10"), web("c", "10.96.0.10")))
	expect(t, "first by name", u, map[string]string{"a": "10.96.0.10:80/TCP", "b": "", "c": ""})
	if len(u.Problems) != 2 || !strings.Contains(u.Problems[0].String(), "Service default/b: spec.clusterIPs: 10.96.0.10:80/TCP is served for Service default/a") {
		t.Errorf("problems are %v", u.Problems)
	}
	u = table.Apply(model.Changes{Services: map[model.Name]*model.Service{named("a"): nil}})
	expect(t, "first one gone", u, map[string]string{"a": "gone", "b": "10.96.0.10:80/TCP"})
	if len(u.Problems) != 1 {
		t.Errorf("problems are %v", u.Problems)
	}
	u = table.Apply(services(web("b", "10.96.0.11")))
	expect(t, "next one moved", u, map[string]string{"b": "10.96.0.11:80/TCP", "c": "10.96.0.10:80/TCP"})
	if len(u.Problems) != 0 {
		t.Errorf("problems are %v", u.Problems)
	}
}

func TestAnExternalAddressNeverTakesAClusterIP(t *testing.T) {
	table := NewTable(here)
	thief := web("a-thief", "10.96.0.66")
	thief.ExternalIPs = addrs("10.96.0.10")
	table.Apply(services(thief))
	expect(t, "its owner", table.Apply(services(web("z", "10.96.0.10"))), map[string]string{"z": "10.96.0.10:80/TCP", "a-thief": "10.96.0.66:80/TCP"})
}

func TestTheNodesObjectMovesItsServices(t *testing.T) {
	table := NewTable(NodeContext{Name: "node-a"})
	s := web("a", "10.96.0.10")
	s.NodePorts, s.Ports[0].NodePort = true, 30080
	u := table.Apply(services(s))
	if len(u.Problems) != 1 || !strings.Contains(u.Problems[0].Message, "no address of this node is known") {
		t.Errorf("problems are %v", u.Problems)
	}
	node := func(name string, addresses ...string) model.Changes {
		return model.Changes{Nodes: map[string]*model.Node{name: {Name: name, Zone: "a", Addresses: addrs(addresses...)}}}
	}
	expect(t, "another node", table.Apply(node("node-b", "192.0.2.2")), map[string]string{})
	expect(t, "this node", table.Apply(node("node-a", "192.0.2.1")), map[string]string{"a": "10.96.0.10:80/TCP, 192.0.2.1:30080/TCP"})
	expect(t, "nothing new", table.Apply(node("node-a", "192.0.2.1")), map[string]string{})
	expect(t, "address that changes", table.Apply(node("node-a", "192.0.2.9")), map[string]string{"a": "10.96.0.10:80/TCP, 192.0.2.9:30080/TCP"})
	expect(t, "addresses by configuration", table.SetNode(NodeContext{Name: "node-a", Addresses: addrs("192.0.2.7")}), map[string]string{"a": "10.96.0.10:80/TCP, 192.0.2.7:30080/TCP"})
}

func TestHealthChecksCountReadyEndpointsOfThisNode(t *testing.T) {
	table := NewTable(here)
	s := web("a", "10.96.0.10")
	s.ExternalLocal, s.HealthCheckNodePort = true, 32000
	s.Ports = append(s.Ports, model.ServicePort{Name: "more", Protocol: model.TCP, Port: 81})
	table.Apply(services(s))
	slice := sliceOf("a-1", "a", "10.244.0.5", "10.244.0.6", "10.244.1.5", "10.244.0.7")
	slice.Ports = append(slice.Ports, model.EndpointPort{Name: "more", Protocol: model.TCP, Port: 8081})
	slice.Endpoints[2].NodeName = "node-b"
	slice.Endpoints[3].Ready, slice.Endpoints[3].Terminating = false, true
	table.Apply(slicesOf(slice))
	want := []HealthCheck{{Service: named("a"), Port: 32000, LocalReady: 2}}
	if diff := gocmp.Diff(want, table.HealthChecks()); diff != "" {
		t.Errorf("health checks (-want +got):\n%s", diff)
	}
	table.Apply(slicesOf(sliceOf("a-1", "a")))
	if got := table.HealthChecks(); len(got) != 1 || got[0].LocalReady != 0 {
		t.Errorf("health checks without endpoints: %v, want one of 0", got)
	}
	table.Apply(model.Changes{Services: map[model.Name]*model.Service{named("a"): nil}})
	if got := table.HealthChecks(); len(got) != 0 {
		t.Errorf("health checks without service: %v", got)
	}
}

// world is a random state that changes come from.
type world struct {
	random    *rand.Rand
	changes   model.Changes // all that there is
	endpoints map[uint32]*model.Endpoint
}

func newWorld(seed uint64) *world {
	return &world{
		random: rand.New(rand.NewPCG(seed, 1)),
		changes: model.Changes{
			Services: make(map[model.Name]*model.Service), Slices: make(map[model.Name]*model.EndpointSlice),
			Pods: make(map[model.Name]*model.Pod), Nodes: make(map[string]*model.Node),
		},
		endpoints: make(map[uint32]*model.Endpoint),
	}
}

func (w *world) maybe() bool { return w.random.IntN(2) == 0 }

func (w *world) addr(format string) netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf(format, 1+w.random.IntN(6)))
}

func (w *world) service(name model.Name) *model.Service {
	s := &model.Service{Name: name, Selector: map[string]string{"app": fmt.Sprint(w.random.IntN(3))}}
	s.ClusterIPs = []netip.Addr{w.addr("10.96.0.%d")}
	if w.maybe() {
		s.ClusterIPs = append(s.ClusterIPs, w.addr("fd00:10:96::%d"))
	}
	if w.maybe() {
		s.ExternalIPs = []netip.Addr{w.addr("10.96.0.%d"), w.addr("203.0.113.%d")}
	}
	if w.maybe() {
		s.LoadBalancerIPs = []netip.Addr{w.addr("203.0.113.%d")}
		s.HealthCheckNodePort = uint16(32000 + w.random.IntN(3))
	}
	if w.maybe() {
		s.Selector["tier"] = fmt.Sprint(w.random.IntN(2))
	}
	s.NodePorts, s.InternalLocal, s.ExternalLocal, s.PublishNotReady = w.maybe(), w.maybe(), w.maybe(), w.random.IntN(5) == 0
	for i := range 1 + w.random.IntN(2) {
		s.Ports = append(s.Ports, model.ServicePort{
			Name: fmt.Sprint("port-", i), Protocol: []model.Protocol{model.TCP, model.UDP}[w.random.IntN(2)],
			Port: uint16(80 + i), TargetPort: 8080, NodePort: uint16(w.random.IntN(2) * (30000 + w.random.IntN(3))),
		})
	}
	s.TrafficDistribution = []string{"", "PreferClose", "PreferSameNode"}[w.random.IntN(3)]
	if w.maybe() {
		s.AffinityTimeout = time.Hour
	}
	return s
}

func (w *world) slice(name model.Name) *model.EndpointSlice {
	s := &model.EndpointSlice{Name: name, Service: named(fmt.Sprint("service-", w.random.IntN(8)))}
	for i := range 2 {
		for _, protocol := range []model.Protocol{model.TCP, model.UDP} {
			s.Ports = append(s.Ports, model.EndpointPort{Name: fmt.Sprint("port-", i), Protocol: protocol, Port: 8080})
		}
	}
	for range w.random.IntN(5) {
		e := model.SliceEndpoint{Addresses: []netip.Addr{w.addr("10.244.0.%d")}, NodeName: []string{"node-a", "node-b", ""}[w.random.IntN(3)], Zone: []string{"a", "b", ""}[w.random.IntN(3)]}
		e.Ready = w.maybe()
		e.Serving = e.Ready || w.maybe()
		e.Terminating = !e.Ready && w.maybe()
		if w.random.IntN(4) == 0 {
			e.HintZones = []string{"a"}
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

// step makes one to three random changes of the world and gives them.
func (w *world) step() (model.Changes, map[uint32]*model.Endpoint) {
	c := model.Changes{
		Services: make(map[model.Name]*model.Service), Slices: make(map[model.Name]*model.EndpointSlice),
		Pods: make(map[model.Name]*model.Pod), Nodes: make(map[string]*model.Node),
	}
	endpoints := make(map[uint32]*model.Endpoint)
	for range 1 + w.random.IntN(3) {
		gone := w.random.IntN(3) == 0
		switch w.random.IntN(9) {
		case 0, 1, 2:
			name := named(fmt.Sprint("service-", w.random.IntN(8)))
			change(c.Services, w.changes.Services, name, gone, func() *model.Service { return w.service(name) })
		case 3, 4, 5:
			name := named(fmt.Sprint("slice-", w.random.IntN(8)))
			change(c.Slices, w.changes.Slices, name, gone, func() *model.EndpointSlice { return w.slice(name) })
		case 6:
			name := named(fmt.Sprint("pod-", w.random.IntN(5)))
			change(c.Pods, w.changes.Pods, name, gone, func() *model.Pod {
				return &model.Pod{Name: name, Labels: map[string]string{"app": fmt.Sprint(w.random.IntN(3)), "tier": fmt.Sprint(w.random.IntN(2))}}
			})
		case 7:
			id := uint32(1 + w.random.IntN(6))
			change(endpoints, w.endpoints, id, gone, func() *model.Endpoint {
				return &model.Endpoint{ID: id, Pod: named(fmt.Sprint("pod-", w.random.IntN(5))), PodIfname: fmt.Sprint("eth", w.random.IntN(2)), IPs: []netip.Addr{w.addr("10.244.0.1%d")}}
			})
		case 8:
			change(c.Nodes, w.changes.Nodes, "node-a", gone, func() *model.Node {
				return &model.Node{Name: "node-a", Zone: []string{"a", "b"}[w.random.IntN(2)], Addresses: []netip.Addr{w.addr("192.0.2.%d")}}
			})
		}
	}
	return c, endpoints
}

func change[K comparable, V any](delta, all map[K]*V, name K, gone bool, make func() *V) {
	if gone {
		delta[name] = nil
		delete(all, name)
		return
	}
	v := make()
	delta[name], all[name] = v, v
}

// However a state came about, the table says of it what one that is told all at
// once says, and the updates add up to it.
func TestChangesAddUpToTheWhole(t *testing.T) {
	for seed := range uint64(20) {
		w := newWorld(seed)
		table := NewTable(NodeContext{Name: "node-a", Standalone: true})
		told := make(map[model.Name][]model.Frontend)
		for step := range 150 {
			c, endpoints := w.step()
			for _, u := range []Update{table.Apply(c), table.ApplyEndpoints(endpoints)} {
				for name, frontends := range u.Frontends {
					if gocmp.Equal(told[name], frontends, comparers) && told[name] != nil {
						t.Errorf("seed %d, step %d: %s is told again without difference", seed, step, name)
					}
					if told[name] = frontends; frontends == nil {
						delete(told, name)
					}
				}
			}
			if step%10 != 9 {
				continue
			}
			whole := NewTable(NodeContext{Name: "node-a", Standalone: true})
			whole.ApplyEndpoints(w.endpoints)
			whole.Apply(w.changes)
			want := maps.Collect(whole.All())
			for what, got := range map[string]map[model.Name][]model.Frontend{"table": maps.Collect(table.All()), "sum of updates": told} {
				if diff := gocmp.Diff(want, got, comparers); diff != "" {
					t.Fatalf("seed %d, step %d: %s (-whole +%s):\n%s", seed, step, what, what, diff)
				}
			}
			if diff := gocmp.Diff(whole.Problems(), table.Problems()); diff != "" {
				t.Fatalf("seed %d, step %d: problems (-whole +table):\n%s", seed, step, diff)
			}
			if diff := gocmp.Diff(whole.HealthChecks(), table.HealthChecks()); diff != "" {
				t.Fatalf("seed %d, step %d: health checks (-whole +table):\n%s", seed, step, diff)
			}
			checkInvariants(t, want)
		}
		if len(table.claims)+len(table.contested) > 0 {
			gone := model.Changes{Services: make(map[model.Name]*model.Service)}
			for name := range w.changes.Services {
				gone.Services[name] = nil
			}
			table.Apply(gone)
			if len(table.claims)+len(table.contested)+len(table.ailing)+len(table.checked)+len(table.selectors) > 0 {
				t.Errorf("seed %d: without services there are claims %v, contested %v, problems %v", seed, table.claims, table.contested, table.Problems())
			}
		}
	}
}

// checkInvariants states what a datapath may rely on.
func checkInvariants(t *testing.T, all map[model.Name][]model.Frontend) {
	t.Helper()
	owners := make(map[model.AddrPort]model.Name)
	for name, frontends := range all {
		for _, f := range frontends {
			if other, taken := owners[f.AddrPort]; taken {
				t.Errorf("%s is %s's and %s's", f.AddrPort, other, name)
			}
			owners[f.AddrPort] = name
			for _, list := range [][]model.Backend{f.Internal, f.External, f.Keep} {
				if !slices.IsSortedFunc(list, func(a, b model.Backend) int {
					if c := compareAddrPorts(a.AddrPort, b.AddrPort); c != 0 {
						return c
					}
					return 1 // twice
				}) {
					t.Errorf("%s: backends are not sorted or there twice: %v", f.AddrPort, list)
				}
				for _, b := range list {
					if b.Addr.Is4() != f.Addr.Is4() || b.Protocol != f.Protocol {
						t.Errorf("%s has the backend %s", f.AddrPort, b.AddrPort)
					}
				}
			}
			selectable := slices.ContainsFunc(f.Internal, func(b model.Backend) bool { return b.Selectable })
			if selectable && !f.HasEndpoints {
				t.Errorf("%s has selectable backends but says that there are none", f.AddrPort)
			}
			if !selectable && f.HasEndpoints && !f.InternalLocal {
				t.Errorf("%s has no selectable backend though there are some: %v", f.AddrPort, f.Internal)
			}
		}
	}
}

func thousands(n int) model.Changes {
	c := model.Changes{Services: make(map[model.Name]*model.Service, n), Slices: make(map[model.Name]*model.EndpointSlice, n)}
	for i := range n {
		name := fmt.Sprint("service-", i)
		c.Services[named(name)] = web(name, fmt.Sprintf("10.96.%d.%d", i/250, i%250+1))
		slice := sliceOf(name+"-1", name)
		for j := range 10 {
			slice.Endpoints = append(slice.Endpoints, model.SliceEndpoint{
				Addresses: addrs(fmt.Sprintf("10.244.%d.%d", i/250, (i+j)%250+1)),
				NodeName:  fmt.Sprint("node-", j), Ready: true, Serving: true,
			})
		}
		c.Slices[slice.Name] = slice
	}
	return c
}

// BenchmarkTableOf10000Services translates 10,000 services of 10 endpoints.
func BenchmarkTableOf10000Services(b *testing.B) {
	c := thousands(10_000)
	b.ReportAllocs()
	for b.Loop() {
		if u := NewTable(here).Apply(c); len(u.Frontends) != 10_000 || len(u.Problems) != 0 {
			b.Fatalf("%d services, problems %v", len(u.Frontends), u.Problems)
		}
	}
}

// BenchmarkOneEndpointAmong10000Services translates what one change concerns.
func BenchmarkOneEndpointAmong10000Services(b *testing.B) {
	table := NewTable(here)
	all := thousands(10_000)
	table.Apply(all)
	states := []model.Changes{slicesOf(sliceOf("service-77-1", "service-77", "10.244.0.5")), slicesOf(all.Slices[named("service-77-1")])}
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		if u := table.Apply(states[i%2]); len(u.Frontends) != 1 {
			b.Fatalf("%d services changed, want 1", len(u.Frontends))
		}
		i++
	}
}

// BenchmarkOneLocalPodAmong10000Services is a pod that comes and goes where
// services select pods of this node.
func BenchmarkOneLocalPodAmong10000Services(b *testing.B) {
	table := NewTable(here)
	all := thousands(10_000)
	all.Slices = nil
	table.Apply(all)
	for i := range 200 {
		name := fmt.Sprint("pod-", i)
		table.Apply(pod(name, map[string]string{"app": fmt.Sprint("service-", i)}))
		table.ApplyEndpoints(map[uint32]*model.Endpoint{uint32(i + 1): endpoint(uint32(i+1), name, fmt.Sprintf("10.244.0.%d", i+1))})
	}
	states := []map[uint32]*model.Endpoint{{7: nil}, {7: endpoint(7, "pod-6", "10.244.0.7")}}
	i := 0
	for b.Loop() {
		if u := table.ApplyEndpoints(states[i%2]); len(u.Frontends) != 1 {
			b.Fatalf("%d services changed, want 1", len(u.Frontends))
		}
		i++
	}
}

func TestAServiceOf5000EndpointsAndOneOf300Ports(t *testing.T) {
	table := NewTable(here)
	large := sliceOf("large-1", "large")
	for i := range 5000 {
		large.Endpoints = append(large.Endpoints, model.SliceEndpoint{Addresses: addrs(fmt.Sprintf("10.244.%d.%d", i/250, i%250+1)), Ready: true, Serving: true})
	}
	wide := web("wide", "10.96.0.11")
	wide.Ports = nil
	for i := range 300 {
		wide.Ports = append(wide.Ports, model.ServicePort{Name: fmt.Sprint("p", i), Protocol: model.TCP, Port: uint16(1000 + i), TargetPort: uint16(1000 + i)})
	}
	c := services(web("large", "10.96.0.10"), wide)
	c.Slices = slicesOf(large).Slices
	u := table.Apply(c)
	if got := u.Frontends[named("large")]; len(got) != 1 || len(got[0].Internal) != 5000 {
		t.Errorf("large service: %d frontends", len(got))
	}
	got := u.Frontends[named("wide")]
	if len(got) != 300 || !slices.IsSortedFunc(got, func(a, b model.Frontend) int { return cmp.Compare(a.Port, b.Port) }) {
		t.Errorf("wide service: %d frontends, want 300 in the order of their ports", len(got))
	}
}
