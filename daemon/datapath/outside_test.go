// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/maglev"
	"github.com/mooring-cni/mooring/daemon/model"
)

func TestSourceRangesReachTheMaps(t *testing.T) {
	w := newWorld(t, roomy)
	all := loadBalancer("198.51.100.1:80", nil, "10.244.0.1:80")
	some := loadBalancer("198.51.100.1:81", []string{"203.0.113.0/24", "203.0.113.7/24", "10.0.0.0/8", "0.0.0.0/0"}, "10.244.0.1:80")
	// An IPv6 prefix may well have the IPv4-mapped addresses in it.
	other := loadBalancer("198.51.100.1:82", []string{"::/0"}, "10.244.0.1:80")
	six := loadBalancer("[2001:db8::1]:80", []string{"203.0.113.0/24", "2001:db8:203::/64"}, "[fd00:10:244::1]:80")
	w.set("a", all, some, other, six)
	w.want("ranges", `
198.51.100.1:80/TCP -> 10.244.0.1:80
198.51.100.1:81/TCP from 0.0.0.0/0,10.0.0.0/8,203.0.113.0/24 -> 10.244.0.1:80
198.51.100.1:82/TCP from  -> 10.244.0.1:80
2001:db8::1:80/TCP from 2001:db8:203::/64 -> fd00:10:244::1:80`)
	w.restart(roomy)
	before := w.maps.wrote
	w.set("a", all, some, other, six)
	w.settleAll()
	if w.maps.wrote != before {
		t.Errorf("after a restart, %d elements were written again", w.maps.wrote-before)
	}
	some.SourceRanges = nil
	w.set("a", some)
	w.want("without", "198.51.100.1:81/TCP -> 10.244.0.1:80")
	if len(w.maps.ranges) != 0 {
		t.Errorf("ranges are left: %v", w.maps.ranges)
	}
}

func TestAnotherServicesSourceRangesDoNotHold(t *testing.T) {
	w := newWorld(t, roomy)
	w.set("a", loadBalancer("198.51.100.1:80", []string{"203.0.113.0/24"}, "10.244.0.1:80"))
	for _, name := range []string{"b", "a"} {
		var wanted []model.Frontend
		if name == "b" {
			wanted = append(wanted, loadBalancer("198.51.100.1:80", []string{"10.0.0.0/8"}, "10.244.0.2:80"))
		}
		if err := w.apply(model.Name{Name: name}, wanted, w.now); err != nil {
			t.Fatal(err)
		}
	}
	w.maps.take(&w.writes)
	w.want("after the move", "198.51.100.1:80/TCP from 10.0.0.0/8 -> 10.244.0.2:80")
	if len(w.maps.ranges) != 1 {
		t.Errorf("ranges are left: %v", w.maps.ranges)
	}
}

// A daemon that was killed between two writes leaves ranges without a frontend.
// The next one neither keeps them nor gives their id to somebody else.
func TestSourceRangesWithoutAFrontendGo(t *testing.T) {
	w := newWorld(t, roomy)
	w.maps.ranges[bpf.SourceRangeKey{Prefixlen: 32, Service: 9}] = 1
	w.restart(roomy)
	w.set("a", loadBalancer("198.51.100.1:80", []string{"203.0.113.0/24"}, "10.244.0.1:80"))
	w.want("ranges", "198.51.100.1:80/TCP from 203.0.113.0/24 -> 10.244.0.1:80")
	if len(w.maps.ranges) != 1 {
		t.Errorf("ranges are left: %v", w.maps.ranges)
	}
	if id := w.maps.frontends[serviceKey(addrPort("198.51.100.1:80"))].Id; id <= 9 {
		t.Errorf("id %d is given again", id)
	}
}

func TestServiceWhoseSourceRangesDoNotFitIsRefused(t *testing.T) {
	l := roomy
	l.ranges = 2
	w := newWorld(t, l)
	w.set("a", loadBalancer("198.51.100.1:80", []string{"203.0.113.0/24"}, "10.244.0.1:80"))
	err := w.apply(model.Name{Name: "b"}, []model.Frontend{loadBalancer("198.51.100.2:80", []string{"10.0.0.0/8", "172.16.0.0/12"}, "10.244.0.2:80")}, w.now)
	if !errors.Is(err, errFull) || !strings.Contains(err.Error(), "mooring_source_ranges is full") {
		t.Fatalf("got error %v", err)
	}
	w.maps.take(&w.writes)
	w.want("the other", "198.51.100.1:80/TCP from 203.0.113.0/24 -> 10.244.0.1:80")
	w.set("b", loadBalancer("198.51.100.2:80", []string{"10.0.0.0/8"}, "10.244.0.2:80"))
}

func TestClientsFromOutsideGetATable(t *testing.T) {
	l := limits{services: 64, slots: 1 << 16, backends: 64, ranges: 64}
	w := newWorld(t, l)
	w.maglev = true
	outside := loadBalancer("198.51.100.1:80", nil, "10.244.0.1:80", "10.244.0.2:80", "-10.244.0.3:80")
	inside := clusterIP("10.96.0.1:80")
	inside.Internal, inside.External = outside.Internal, outside.External
	alone := clusterIP("10.96.0.2:80", "10.244.0.4:80", "10.244.0.5:80")
	w.set("a", inside, outside)
	w.set("b", alone)
	w.set("c", loadBalancer("198.51.100.2:80", nil, "10.244.0.6:80"))
	w.set("d", loadBalancer("198.51.100.3:80", nil))
	const tables = `
10.96.0.1:0/? is a service's
10.96.0.1:80/TCP -> 10.244.0.1:80 10.244.0.2:80 10.244.0.3:80(drains) | maglev 10.244.0.1:80*1020 10.244.0.2:80*1019 10.244.0.3:80(drains)
10.96.0.2:0/? is a service's
10.96.0.2:80/TCP -> 10.244.0.4:80 10.244.0.5:80
198.51.100.1:80/TCP -> 10.244.0.1:80 10.244.0.2:80 10.244.0.3:80(drains) | maglev 10.244.0.1:80*1020 10.244.0.2:80*1019 10.244.0.3:80(drains)
198.51.100.2:80/TCP -> 10.244.0.6:80
198.51.100.3:80/TCP ->`
	w.want("tables", tables)
	before := w.maps.wrote
	w.tables = true
	w.restart(l)
	w.set("a", inside, outside)
	w.set("b", alone)
	w.set("c", loadBalancer("198.51.100.2:80", nil, "10.244.0.6:80"))
	w.set("d", loadBalancer("198.51.100.3:80", nil))
	w.settleAll()
	if w.maps.wrote != before {
		t.Errorf("after a restart, %d elements were written again", w.maps.wrote-before)
	}

	// Another algorithm takes hold with the next start.
	w.tables = false
	w.restart(l)
	w.set("a", inside, outside)
	w.settleAll()
	w.want("at random", `
10.96.0.1:0/? is a service's
10.96.0.1:80/TCP -> 10.244.0.1:80 10.244.0.2:80 10.244.0.3:80(drains)
198.51.100.1:80/TCP -> 10.244.0.1:80 10.244.0.2:80 10.244.0.3:80(drains)`)
}

// Two nodes have their backends at different indices, and agree all the same.
func TestTwoNodesHaveTheSameTable(t *testing.T) {
	l := limits{services: 64, slots: 1 << 16, backends: 64, ranges: 64}
	f := loadBalancer("198.51.100.1:80", nil, "10.244.0.1:80", "10.244.0.2:80", "10.244.0.3:80", "[fd00:10:244::1]:80")
	chosen := func(earlier ...string) (backends []string) {
		w := newWorld(t, l)
		w.maglev = true
		for i, other := range earlier {
			w.set(fmt.Sprint("earlier", i), loadBalancer(fmt.Sprintf("198.51.100.2:%d", i+1), nil, other, "10.244.9.9:80"))
		}
		w.set("a", f)
		s := w.maps.frontends[serviceKey(f.AddrPort)].External
		for _, index := range w.maps.runs[s.First : s.First+s.Count] {
			backends = append(backends, w.maps.tenants[index].Addr.IP().String())
		}
		return backends
	}
	a, b := chosen(), chosen("10.244.0.3:80", "10.244.0.7:80")
	if len(a) != maglev.Size(4, 1<<13) || strings.Join(a, " ") != strings.Join(b, " ") {
		t.Errorf("tables of %d and %d slots differ", len(a), len(b))
	}
}

func TestServiceWithoutRoomForItsTableChoosesAtRandom(t *testing.T) {
	l := limits{services: 64, slots: 8 * 2039, backends: 64, ranges: 64}
	w := newWorld(t, l)
	w.maglev = true
	for i := range 8 {
		w.set(fmt.Sprint(i), loadBalancer(fmt.Sprintf("198.51.100.1:%d", i+1), nil, "10.244.0.1:80", "10.244.0.2:80"))
	}
	if len(w.untabled) != 1 {
		t.Errorf("of 8 services %d have no table, want 1", len(w.untabled))
	}
	if got := w.maps.show(); strings.Count(got, "\n198.51.100.1:8/TCP -> 10.244.0.1:80 10.244.0.2:80") != 1 || strings.Count(got, "maglev") != 7 {
		t.Errorf("got\n%s", got)
	}
	// With room again, the one that came too late has its table.
	made := func() bool {
		t.Helper()
		made, err := w.plan.tables(w.now)
		if err != nil {
			t.Fatal(err)
		}
		w.maps.take(&w.writes)
		return made
	}
	if made() {
		t.Error("a table was made where there is no room")
	}
	w.set("3")
	if made() {
		t.Error("a table was made where another still rests")
	}
	w.now = w.now.Add(rest)
	if !made() || len(w.untabled) != 0 || strings.Count(w.maps.show(), "maglev") != 7 {
		t.Errorf("got\n%s", w.maps.show())
	}
}

// One backend of a service changes, of which clients outside get one by a table:
// what it costs, and how many slots are written.
func BenchmarkOneBackendMoreInATable(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			p := newPlan(limits{services: 64, slots: 1 << 22, backends: 1 << 16, ranges: 64})
			p.maglev = true
			var lists [2][]model.Frontend
			for i := range lists {
				var texts []string
				for j := range n - i {
					texts = append(texts, fmt.Sprintf("10.244.%d.%d:80", j/250, 1+j%250))
				}
				lists[i] = []model.Frontend{loadBalancer("198.51.100.1:80", nil, texts...)}
			}
			now := time.Unix(1000, 0)
			slots := 0
			for i := 0; b.Loop(); i++ {
				now = now.Add(rest)
				if err := p.apply(model.Name{Name: "a"}, lists[i%2], now); err != nil {
					b.Fatal(err)
				}
				slots = len(p.writes.slotKeys)
				p.writes = writes{}
			}
			b.ReportMetric(float64(slots), "slots/op")
		})
	}
}
