//go:build root

// SPDX-License-Identifier: Apache-2.0

package reachability

import (
	"os"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/datapath"
	"github.com/mooring-cni/mooring/daemon/model"
	"github.com/mooring-cni/mooring/daemon/policy"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/scenario"
)

// stage is a node with the datapath and the computation, without a daemon.
// Its pods are endpoints that share one interface: nothing is sent.
type stage struct {
	*netns.Node
	*datapath.Manager
	table *policy.Table
}

func newStage(t testing.TB) *stage {
	t.Helper()
	s := &stage{Node: netns.NewNode(t)}
	if err := s.Do(func() (err error) {
		s.Manager, err = datapath.New(datapath.Options{BPFFS: s.BPFFS, MaxEntries: 65536, Timeouts: conf.Default().Conntrack.Timeouts, Hook: "off", Policy: true})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Manager.Close() })
	return s
}

// show brings a world onto the stage, from whatever was there before.
func (s *stage) show(t testing.TB, w *World) {
	t.Helper()
	c, err := w.Changes(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	s.table = policy.NewTable(policy.Config{Node: w.Here, Mode: policy.Default, Standalone: true})
	s.table.ApplyEndpoints(w.Endpoints())
	s.table.Apply(c)
	for _, e := range w.Endpoints() {
		s.add(t, *e)
	}
	if err := s.SyncPolicy(s.table.State()); err != nil {
		t.Fatal(err)
	}
}

func (s *stage) add(t testing.TB, e model.Endpoint) {
	t.Helper()
	e.MAC, e.HostMAC, e.Ifindex, e.Interface = "02:00:00:00:00:01", "02:00:00:00:00:02", 1, "lo"
	if err := s.AddEndpoint(e); err != nil {
		t.Fatal(err)
	}
}

func (s *stage) passes(t testing.TB, k Packet) bool {
	t.Helper()
	var passes bool
	if err := s.Do(func() (err error) {
		passes, err = s.TryPacket(k.Query())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return passes
}

func TestMain(m *testing.M) {
	code := m.Run()
	scenario.RemovePrograms()
	os.Exit(code)
}

func TestProgramsAgreeWithTheReference(t *testing.T) {
	seeds, sample, least := uint64(3), 1, 20000
	if os.Getenv("MOORING_KERNEL") != "" { // emulated, which is slow
		seeds, sample, least = 1, 11, 2000
	}
	total := 0
	for name, shape := range shapes {
		s := newStage(t)
		checks, allowed := 0, 0
		began := time.Now()
		for seed := uint64(1); seed <= seeds; seed++ {
			w := Generate(seed, shape)
			s.show(t, w)
			for i, k := range w.Packets("TCP", "UDP", "SCTP", "ICMP") {
				if i%sample != 0 {
					continue
				}
				want := w.Allowed(k)
				checks++
				if want {
					allowed++
				}
				if got := s.passes(t, k); got != want {
					t.Errorf("%s, seed %d: %s: passes %v, the reference says %v\n%s", name, seed, k, got, want, describe(s.table.Explain(k.Query())))
					if checks > 200 {
						t.FailNow()
					}
				}
			}
		}
		t.Logf("%s, seeds 1 to %d: %d checks, %d allowed, in %v", name, seeds, checks, allowed, time.Since(began))
		total += checks
	}
	t.Logf("%d checks", total)
	if total < least {
		t.Errorf("%d checks, want %d", total, least)
	}
}
