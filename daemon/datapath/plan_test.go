// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/model"
)

// fakeMaps are the service maps, written one element at a time.
type fakeMaps struct {
	frontends map[bpf.ServiceKey]bpf.Service
	runs      []uint32
	tenants   []bpf.Backend
	ranges    map[bpf.SourceRangeKey]uint32
	wrote     int
	step      func() // called after each element; nil: not at all
}

func newFakeMaps(l limits) *fakeMaps {
	return &fakeMaps{
		frontends: map[bpf.ServiceKey]bpf.Service{}, runs: make([]uint32, l.slots), tenants: make([]bpf.Backend, l.backends),
		ranges: map[bpf.SourceRangeKey]uint32{},
	}
}

func (m *fakeMaps) services(visit func(bpf.ServiceKey, bpf.Service)) error {
	for key, value := range m.frontends {
		visit(key, value)
	}
	return nil
}

func (m *fakeMaps) slots(visit func([]uint32) bool) error {
	for part := range slices.Chunk(m.runs, 7) {
		if !visit(part) {
			break
		}
	}
	return nil
}

func (m *fakeMaps) backends(visit func([]bpf.Backend) bool) error {
	for part := range slices.Chunk(m.tenants, 7) {
		if !visit(part) {
			break
		}
	}
	return nil
}

func (m *fakeMaps) sourceRanges(visit func(bpf.SourceRangeKey)) error {
	for key := range m.ranges {
		visit(key)
	}
	return nil
}

// take writes what a plan has queued, in the order of services.flush.
func (m *fakeMaps) take(w *writes) {
	done := func() {
		m.wrote++
		if m.step != nil {
			m.step()
		}
	}
	for i, at := range w.backendKeys {
		m.tenants[at] = w.backendValues[i]
		done()
	}
	for i, at := range w.slotKeys {
		m.runs[at] = w.slotValues[i]
		done()
	}
	for i, key := range w.rangeKeys {
		m.ranges[key] = w.rangeValues[i]
		done()
	}
	for i, key := range w.serviceKeys {
		m.frontends[key] = w.serviceValues[i]
		done()
	}
	for key := range w.removals {
		delete(m.frontends, key)
		done()
	}
	for key := range w.rangeRemovals {
		delete(m.ranges, key)
		done()
	}
	for i, at := range w.freeKeys {
		m.tenants[at] = w.freeValues[i]
		done()
	}
	*w = writes{}
}

// show renders what a program finds: frontends, what they choose, what drains.
func (m *fakeMaps) show() string {
	var lines []string
	for key, value := range m.frontends {
		line := fmt.Sprintf("%s:%d/%s", key.Addr.IP(), bpf.Port(key.Port), model.Protocol(key.Proto))
		if value.Flags&bpf.ServiceAddress != 0 {
			lines = append(lines, line+" is a service's")
			continue
		}
		for _, flag := range []struct {
			is   uint32
			text string
		}{{bpf.ServiceInternalLocal, " internal-local"}, {bpf.ServiceExternalLocal, " external-local"}} {
			if value.Flags&flag.is != 0 {
				line += flag.text
			}
		}
		if value.AffinitySeconds > 0 {
			line += fmt.Sprintf(" affinity=%d", value.AffinitySeconds)
		}
		if value.Flags&bpf.ServiceSourceRanges != 0 {
			line += " from " + strings.Join(m.rangesOf(value.Id), ",")
		}
		line += m.showRun(" ->", value.Internal)
		if value.External != value.Internal {
			title := " | external"
			if value.Flags&bpf.ServiceMaglev != 0 {
				title = " | maglev"
			}
			line += m.showRun(title, value.External)
		}
		lines = append(lines, line)
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// showRun renders what is in a run, and of what is in it more than once how often.
func (m *fakeMaps) showRun(title string, s bpf.Slots) string {
	var found []string
	times := map[string]int{}
	for i := uint32(0); s.First > 0; i++ {
		index := m.runs[s.First+i]
		if index == 0 {
			break
		}
		b := &m.tenants[index]
		one := fmt.Sprintf("%s:%d", b.Addr.IP(), bpf.Port(b.Port))
		if i >= s.Count {
			one += "(drains)"
		} else if b.State == bpf.BackendTerminating {
			one += "(last)"
		}
		if times[one]++; times[one] == 1 {
			found = append(found, one)
		}
	}
	text := title
	if s.Count > 0 && times[found[0]] > 1 {
		slices.Sort(found) // a table has no order to show
	}
	for _, one := range found {
		if text += " " + one; times[one] > 1 {
			text += fmt.Sprintf("*%d", times[one])
		}
	}
	return text
}

// rangesOf are the clients that a frontend takes.
func (m *fakeMaps) rangesOf(id uint32) (texts []string) {
	for key := range m.ranges {
		if key.Service != id {
			continue
		}
		addr, bits := netip.AddrFrom16(key.Addr), int(key.Prefixlen)-32
		if addr.Is4In6() {
			addr, bits = addr.Unmap(), bits-96
		}
		texts = append(texts, netip.PrefixFrom(addr, bits).String())
	}
	slices.Sort(texts)
	return texts
}

func addrPort(text string) model.AddrPort {
	a := netip.MustParseAddrPort(text)
	return model.AddrPort{Addr: a.Addr(), Port: a.Port(), Protocol: model.TCP}
}

// list makes backends: "10.244.0.1:80", with "-" before those that drain and
// "~" before terminating ones that are chosen for want of others.
func list(texts ...string) (backends []model.Backend) {
	for _, text := range texts {
		b := model.Backend{Selectable: true}
		if rest, is := strings.CutPrefix(text, "-"); is {
			b.Selectable, b.State, text = false, model.Terminating, rest
		}
		if rest, is := strings.CutPrefix(text, "~"); is {
			b.State, text = model.Terminating, rest
		}
		b.AddrPort = addrPort(text)
		backends = append(backends, b)
	}
	return backends
}

func clusterIP(at string, backends ...string) model.Frontend {
	l := list(backends...)
	return model.Frontend{AddrPort: addrPort(at), Kind: model.ClusterIP, Internal: l, External: l, HasEndpoints: len(l) > 0}
}

// loadBalancer is a frontend of a service that is reached from outside by some clients.
func loadBalancer(at string, ranges []string, backends ...string) model.Frontend {
	f := clusterIP(at, backends...)
	f.Kind = model.LoadBalancer
	for _, r := range ranges {
		f.SourceRanges = append(f.SourceRanges, netip.MustParsePrefix(r))
	}
	return f
}

// world is a plan over fake maps with a clock.
type world struct {
	t      *testing.T
	tables bool // choose by maglev
	*plan
	maps *fakeMaps
	now  time.Time
}

func newWorld(t *testing.T, l limits) *world {
	w := &world{t: t, maps: newFakeMaps(l), now: time.Unix(1000, 0)}
	w.restart(l)
	w.settleAll()
	return w
}

func (w *world) restart(l limits) {
	w.t.Helper()
	w.plan = newPlan(l)
	w.maglev = w.tables
	if err := w.adopt(w.maps); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) set(service string, frontends ...model.Frontend) {
	w.t.Helper()
	if err := w.apply(model.Name{Name: service}, frontends, w.now); err != nil {
		w.t.Fatal(err)
	}
	w.maps.take(&w.writes)
}

func (w *world) settleAll() {
	w.settle(w.now)
	w.maps.take(&w.writes)
}

func (w *world) want(what, text string) {
	w.t.Helper()
	if diff := cmp.Diff(strings.TrimSpace(text), w.maps.show()); diff != "" {
		w.t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

var roomy = limits{services: 64, slots: 256, backends: 64, ranges: 64}

func TestFrontendsReachTheMaps(t *testing.T) {
	w := newWorld(t, roomy)
	node := clusterIP("192.0.2.11:30080", "10.244.0.1:80", "10.244.1.1:80")
	node.Kind, node.ExternalLocal, node.External = model.NodePort, true, list("10.244.0.1:80")
	local := clusterIP("10.96.0.2:80")
	local.InternalLocal, local.HasEndpoints, local.AffinityTimeout = true, true, 90*time.Second
	nothing := clusterIP("10.96.0.3:80")
	nothing.InternalLocal = true
	drains := clusterIP("[fd00:10:96::4]:80", "[fd00:10:244::1]:80", "-[fd00:10:244::2]:80")
	drains.Keep = list("[fd00:10:244::3]:80")
	w.set("a", clusterIP("10.96.0.1:80", "10.244.0.1:80", "10.244.1.1:80"), clusterIP("10.96.0.1:81", "10.244.0.1:81"), node)
	w.set("b", local)
	w.set("c", nothing)
	w.set("d", drains)
	w.set("e", clusterIP("10.96.0.5:80", "~10.244.0.9:80"))
	w.want("all", `
10.96.0.1:0/? is a service's
10.96.0.1:80/TCP -> 10.244.0.1:80 10.244.1.1:80
10.96.0.1:81/TCP -> 10.244.0.1:81
10.96.0.2:0/? is a service's
10.96.0.2:80/TCP internal-local external-local affinity=90 ->
10.96.0.3:0/? is a service's
10.96.0.3:80/TCP ->
10.96.0.5:0/? is a service's
10.96.0.5:80/TCP -> 10.244.0.9:80(last)
192.0.2.11:30080/TCP external-local -> 10.244.0.1:80 10.244.1.1:80 | external 10.244.0.1:80
fd00:10:96::4:0/? is a service's
fd00:10:96::4:80/TCP -> fd00:10:244::1:80 fd00:10:244::2:80(drains) fd00:10:244::3:80(drains)`)
	w.set("a", clusterIP("10.96.0.1:81", "10.244.0.1:81"))
	w.set("b")
	w.set("c")
	w.set("d")
	w.set("e", clusterIP("10.96.0.5:80", "-10.244.0.9:80", "10.244.0.8:80"))
	w.want("less", `
10.96.0.1:0/? is a service's
10.96.0.1:81/TCP -> 10.244.0.1:81
10.96.0.5:0/? is a service's
10.96.0.5:80/TCP -> 10.244.0.8:80 10.244.0.9:80(drains)`)
	w.set("a")
	w.set("e")
	w.want("nothing", "")
	for i, b := range w.maps.tenants {
		if b.State != bpf.BackendFree {
			t.Errorf("backend %d is left: %+v", i, b)
		}
	}
}

func TestSameAgainWritesNothing(t *testing.T) {
	w := newWorld(t, roomy)
	make := func() []model.Frontend {
		f := clusterIP("10.96.0.1:80", "10.244.0.1:80", "10.244.1.1:80")
		f.Keep = list("10.244.0.7:80")
		g := f
		g.AddrPort, g.Kind = addrPort("192.0.2.11:30080"), model.NodePort
		return []model.Frontend{f, g, clusterIP("10.96.0.1:81")}
	}
	w.set("a", make()...)
	before := w.maps.wrote
	w.set("a", make()...)
	w.restart(roomy)
	w.set("a", make()...)
	w.settleAll()
	w.set("a", make()...)
	if w.maps.wrote != before {
		t.Errorf("%d elements were written again", w.maps.wrote-before)
	}
}

func TestOneEndpointMoreWritesOneRunAndOneBackend(t *testing.T) {
	w := newWorld(t, roomy)
	w.set("a", clusterIP("10.96.0.1:80", "10.244.0.1:80", "10.244.0.2:80"))
	first := slices.Clone(w.maps.tenants)
	before := w.maps.wrote
	w.set("a", clusterIP("10.96.0.1:80", "10.244.0.1:80", "10.244.0.15:80", "10.244.0.2:80"))
	if got := w.maps.wrote - before; got != 1+4+1 {
		t.Errorf("%d elements were written, want one backend, four slots and the frontend", got)
	}
	for i, b := range first {
		if b.State == bpf.BackendActive && w.maps.tenants[i] != b {
			t.Errorf("backend %d was %+v and is %+v", i, b, w.maps.tenants[i])
		}
	}
}

func TestIndexOfANewTenantHasANewGeneration(t *testing.T) {
	w := newWorld(t, roomy)
	w.set("a", clusterIP("10.96.0.1:80", "10.244.0.1:80"))
	old := w.maps.tenants[1]
	w.set("a", clusterIP("10.96.0.1:80", "10.244.0.2:80"))
	if freed := w.maps.tenants[1]; freed.State != bpf.BackendFree || freed.Generation != old.Generation {
		t.Errorf("the removed backend is %+v", freed)
	}
	w.set("b", clusterIP("10.96.0.2:80", "10.244.0.3:80"))
	if again := w.maps.tenants[1]; again.State != bpf.BackendFree {
		t.Errorf("an index just freed is used: %+v", again)
	}
	w.now = w.now.Add(rest)
	w.set("c", clusterIP("10.96.0.3:80", "10.244.0.1:80"))
	if again := w.maps.tenants[1]; again.State != bpf.BackendActive || again.Generation != old.Generation+1 {
		t.Errorf("the index's next tenant is %+v after %+v", again, old)
	}
	w.set("c")
	w.restart(roomy)
	w.set("d", clusterIP("10.96.0.4:80", "10.244.0.1:80", "10.244.0.2:80", "10.244.0.3:80", "10.244.0.4:80"))
	if again := w.maps.tenants[1]; again.Generation != old.Generation+2 {
		t.Errorf("after a restart the index's next tenant is %+v after %+v", again, old)
	}
}

func TestBackendOfTwoServicesEndsInOne(t *testing.T) {
	w := newWorld(t, roomy)
	w.set("a", clusterIP("10.96.0.1:80", "10.244.0.1:80"))
	w.set("b", clusterIP("10.96.0.2:80", "10.244.0.1:80"))
	w.set("a", clusterIP("10.96.0.1:80"))
	free, active := 0, 0
	for _, b := range w.maps.tenants[1:3] {
		switch b.State {
		case bpf.BackendFree:
			free++
		case bpf.BackendActive:
			active++
		}
	}
	if free != 1 || active != 1 {
		t.Errorf("%d free and %d active, want one each", free, active)
	}
}

func TestAddressMovesToAnotherService(t *testing.T) {
	for _, order := range [][2]string{{"a", "b"}, {"b", "a"}} {
		w := newWorld(t, roomy)
		w.set("a", clusterIP("10.96.0.1:80", "10.244.0.1:80"))
		key := serviceKey(addrPort("10.96.0.1:80"))
		before := w.maps.frontends[key].Id
		w.maps.step = func() {
			if w.maps.frontends[key].Id == 0 {
				t.Error("the frontend was away")
			}
		}
		for _, name := range order {
			var wanted []model.Frontend
			if name == "b" {
				wanted = []model.Frontend{clusterIP("10.96.0.1:80", "10.244.0.2:80")}
			}
			if err := w.apply(model.Name{Name: name}, wanted, w.now); err != nil {
				t.Fatal(err)
			}
		}
		w.maps.take(&w.writes)
		w.want("after the move", "10.96.0.1:0/? is a service's\n10.96.0.1:80/TCP -> 10.244.0.2:80")
		if w.maps.frontends[key].Id == before {
			t.Error("the new service's frontend has the old one's id, and so its clients' affinity")
		}
	}
}

func TestEarlierRunsServicesGoWhenAllAreKnown(t *testing.T) {
	w := newWorld(t, roomy)
	w.set("a", clusterIP("10.96.0.1:80", "10.244.0.1:80"))
	w.set("b", clusterIP("10.96.0.2:80", "10.244.0.2:80", "10.244.0.3:80"))
	w.restart(roomy)
	w.set("b", clusterIP("10.96.0.2:80", "10.244.0.3:80"))
	w.want("before", `
10.96.0.1:0/? is a service's
10.96.0.1:80/TCP -> 10.244.0.1:80
10.96.0.2:0/? is a service's
10.96.0.2:80/TCP -> 10.244.0.3:80`)
	w.settleAll()
	w.want("after", "10.96.0.2:0/? is a service's\n10.96.0.2:80/TCP -> 10.244.0.3:80")
	active := 0
	for _, b := range w.maps.tenants {
		if b.State != bpf.BackendFree {
			active++
		}
	}
	if active != 1 {
		t.Errorf("%d backends are left, want 1", active)
	}
}

func TestDrainingBackendIsKnownAfterARestart(t *testing.T) {
	w := newWorld(t, roomy)
	f := clusterIP("10.96.0.1:80", "10.244.0.1:80", "-10.244.0.2:80")
	f.Keep = list("10.244.0.3:80")
	w.set("a", f)
	before := slices.Clone(w.maps.tenants)
	w.restart(roomy)
	f.Internal = list("10.244.0.1:80", "-10.244.0.2:80", "10.244.0.4:80")
	f.External = f.Internal
	w.set("a", f)
	w.settleAll()
	for i, b := range before {
		if b.State != bpf.BackendFree && w.maps.tenants[i] != b {
			t.Errorf("backend %d was %+v and is %+v", i, b, w.maps.tenants[i])
		}
	}
}

func TestWhatDoesNotFitIsRefusedWhole(t *testing.T) {
	for name, c := range map[string]struct {
		limits limits
		says   string
	}{
		"backends": {limits{services: 64, slots: 256, backends: 4, ranges: 64}, "mooring_backends is full"},
		"slots":    {limits{services: 64, slots: 6, backends: 64, ranges: 64}, "mooring_slots is full"},
		"services": {limits{services: 3, slots: 256, backends: 64, ranges: 64}, "mooring_services is full"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, c.limits)
			w.set("a", clusterIP("10.96.0.1:80", "10.244.0.1:80", "10.244.0.2:80"))
			shown, wrote := w.maps.show(), w.maps.wrote
			err := w.apply(model.Name{Name: "b"}, []model.Frontend{clusterIP("10.96.0.2:80", "10.244.0.3:80", "10.244.0.4:80", "10.244.0.5:80")}, w.now)
			if !errors.Is(err, errFull) || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("got error %v, want %q", err, c.says)
			}
			w.maps.take(&w.writes)
			if w.maps.wrote != wrote || w.maps.show() != shown {
				t.Errorf("a refused service was written: %s", w.maps.show())
			}
			// When there is room, it comes in.
			w.set("a")
			w.now = w.now.Add(rest)
			if name != "slots" {
				w.set("b", clusterIP("10.96.0.2:80", "10.244.0.3:80", "10.244.0.4:80", "10.244.0.5:80"))
			}
		})
	}
}

func TestDamagedSlotsAreReplaced(t *testing.T) {
	w := newWorld(t, roomy)
	w.set("a", clusterIP("10.96.0.1:80", "10.244.0.1:80", "10.244.0.2:80"))
	w.set("b", clusterIP("10.96.0.2:80", "10.244.0.3:80"))
	key := serviceKey(addrPort("10.96.0.2:80"))
	broken := w.maps.frontends[key]
	broken.Internal = bpf.Slots{First: 2, Count: 200}
	broken.External = bpf.Slots{First: 1 << 30, Count: 1}
	w.maps.frontends[key] = broken
	w.maps.runs[3] = 5000
	w.restart(roomy)
	w.set("a", clusterIP("10.96.0.1:80", "10.244.0.1:80", "10.244.0.2:80"))
	w.set("b", clusterIP("10.96.0.2:80", "10.244.0.3:80"))
	w.settleAll()
	w.want("mended", `
10.96.0.1:0/? is a service's
10.96.0.1:80/TCP -> 10.244.0.1:80 10.244.0.2:80
10.96.0.2:0/? is a service's
10.96.0.2:80/TCP -> 10.244.0.3:80`)
}

// Whatever changes in whatever order, with the daemon killed between any two
// writes: each frontend always leads to live backends of its own service, one
// that stays a backend stays at its index, and in the end the maps hold what is
// wanted and nothing else.
func TestProgramsNeverSeeATornService(t *testing.T) {
	l := limits{services: 64, slots: 1 << 18, backends: 256, ranges: 256}
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 1))
		w := newWorld(t, l)
		desired := map[string][]model.Frontend{}
		// What each frontend's ranges may be while they change: all that were
		// wanted since the maps held what is wanted.
		wishes := map[bpf.ServiceKey][][]netip.Prefix{}
		check := func() {
			for key, value := range w.maps.frontends {
				if err := w.maps.window(value, wishes[key]); value.Flags&bpf.ServiceAddress == 0 && err != nil {
					t.Fatalf("seed %d: %s: %v", seed, key.Addr.IP(), err)
				}
			}
			for key, value := range w.maps.frontends {
				if value.Flags&bpf.ServiceAddress != 0 {
					continue
				}
				for _, s := range []bpf.Slots{value.Internal, value.External} {
					for i := range s.Count {
						b := &w.maps.tenants[w.maps.runs[s.First+i]]
						// The address tells the service: 10.244.SERVICE.x.
						if b.State == bpf.BackendFree || b.Addr.B[14] != key.Addr.B[15] {
							t.Fatalf("seed %d: %s leads to %+v", seed, key.Addr.IP(), b)
						}
					}
				}
			}
		}
		w.maps.step = check
		make := func(id int) []model.Frontend {
			if r.IntN(8) == 0 {
				return nil
			}
			var texts []string
			for i := range 6 {
				switch r.IntN(4) {
				case 0:
					texts = append(texts, fmt.Sprintf("10.244.%d.%d:80", id, i))
				case 1:
					texts = append(texts, fmt.Sprintf("-10.244.%d.%d:80", id, i))
				}
			}
			f := clusterIP(fmt.Sprintf("10.96.0.%d:80", id), texts...)
			all := []model.Frontend{f}
			if r.IntN(2) == 0 {
				g := f
				g.Port = 81
				g.External = g.Internal[:len(g.Internal)/2]
				if r.IntN(2) == 0 {
					g.Kind = model.LoadBalancer
				}
				for i := range 4 {
					if g.Kind == model.LoadBalancer && r.IntN(2) == 0 {
						g.SourceRanges = append(g.SourceRanges, netip.MustParsePrefix(fmt.Sprintf("203.0.%d.0/24", i)))
					}
				}
				all = append(all, g)
			}
			return all
		}
		for range 60 {
			before := w.maps.places()
			killed := r.IntN(10) == 0
			stop := r.IntN(20)
			w.maps.step = func() {
				check()
				if stop--; killed && stop < 0 {
					panic("killed")
				}
			}
			func() {
				defer func() {
					if p := recover(); p != nil && p != "killed" {
						panic(p)
					}
				}()
				for _, n := range r.Perm(5)[:1+r.IntN(3)] {
					id := 1 + n
					name := fmt.Sprint(id)
					desired[name] = make(id)
					for _, f := range desired[name] {
						key := serviceKey(f.AddrPort)
						wishes[key] = append(wishes[key], f.SourceRanges)
					}
					if err := w.apply(model.Name{Name: name}, desired[name], w.now); err != nil {
						t.Fatalf("seed %d: %v", seed, err)
					}
				}
				w.maps.take(&w.writes)
			}()
			w.maps.step = check
			if killed || r.IntN(10) == 0 {
				w.tables = r.IntN(2) == 0
				w.restart(l)
				for name, wanted := range desired {
					w.set(name, wanted...)
				}
				w.settleAll()
			}
			clear(wishes)
			for _, wanted := range desired {
				for _, f := range wanted {
					wishes[serviceKey(f.AddrPort)] = [][]netip.Prefix{f.SourceRanges}
				}
			}
			for place, was := range before {
				if is, still := w.maps.places()[place]; still && is != was {
					t.Fatalf("seed %d: %s was at %v and is at %v", seed, place, was, is)
				}
			}
			w.now = w.now.Add(time.Duration(r.IntN(2000)) * time.Millisecond)
		}
		expected := newWorld(t, l)
		expected.maglev = w.maglev
		for name, wanted := range desired {
			expected.set(name, wanted...)
		}
		if diff := cmp.Diff(expected.maps.show(), w.maps.show()); diff != "" {
			t.Fatalf("seed %d (-want +got):\n%s", seed, diff)
		}
		want, got := slices.Sorted(maps.Keys(expected.maps.places())), slices.Sorted(maps.Keys(w.maps.places()))
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("seed %d: backends (-want +got):\n%s", seed, diff)
		}
		w.now = w.now.Add(rest)
		for name := range desired {
			w.set(name)
		}
		w.now = w.now.Add(rest)
		w.slots.take(1, w.now)
		if len(w.maps.ranges) > 0 || w.rangeSum != 0 || len(w.ranges) > 0 {
			t.Fatalf("seed %d: source ranges are left: %v, %d", seed, w.maps.ranges, w.rangeSum)
		}
		if len(w.slots.free) != 1 || w.backends.available(w.now) != int(l.backends)-1 {
			t.Fatalf("seed %d: space is lost: %v, %d backends", seed, w.slots.free, w.backends.available(w.now))
		}
	}
}

// places tells where each backend in use is, with its generation.
func (m *fakeMaps) places() map[string]string {
	all := map[string]string{}
	for i, b := range m.tenants {
		if b.State != bpf.BackendFree {
			all[fmt.Sprintf("%s:%d", b.Addr.IP(), bpf.Port(b.Port))] = fmt.Sprintf("%d, generation %d", i, b.Generation)
		}
	}
	return all
}

// window tells whom a frontend lets in that none of its wishes does, or keeps out
// whom all of them let in.
func (m *fakeMaps) window(value bpf.Service, wishes [][]netip.Prefix) error {
	lets := m.rangesOf(value.Id)
	if value.Flags&bpf.ServiceSourceRanges == 0 {
		if slices.ContainsFunc(wishes, func(wish []netip.Prefix) bool { return len(wish) == 0 }) || len(wishes) == 0 {
			return nil
		}
		return fmt.Errorf("it lets everybody in, wanted was %v", wishes)
	}
	for _, prefix := range lets {
		if !slices.ContainsFunc(wishes, func(wish []netip.Prefix) bool { return slices.Contains(wish, netip.MustParsePrefix(prefix)) }) {
			return fmt.Errorf("it lets %s in, wanted was %v", prefix, wishes)
		}
	}
	for _, prefix := range wishes[0] {
		everywhere := !slices.ContainsFunc(wishes, func(wish []netip.Prefix) bool { return !slices.Contains(wish, prefix) })
		if everywhere && !slices.Contains(lets, prefix.String()) {
			return fmt.Errorf("it keeps %s out, wanted was %v", prefix, wishes)
		}
	}
	return nil
}
