// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"time"

	"github.com/mooring-cni/mooring/test/bench/scale"
)

func init() {
	Register(Set{
		Name:    "scale",
		Title:   "the real daemon with 10,000 services of 10 backends: from its start until the maps hold all, one endpoint\n  changed at a time from the manifest's rename to the map, and memory",
		Measure: measureScale,
	})
}

func measureScale(b *B) {
	o := scale.Options{Services: 10_000, Backends: 10, PerFile: 1, Changes: 40}
	if b.Quick {
		o = scale.Options{Services: 100, Backends: 10, PerFile: 1, Changes: 2}
	}
	r := scale.Measure(b, o)
	changes := make([]float64, len(r.Changes))
	for i, d := range r.Changes {
		changes[i] = float64(d) / float64(time.Millisecond)
	}
	b.Value(Contestant{Name: "everything loaded", Unit: "s", Bound: Bound{Most: 3}}, r.Load.Seconds())
	b.Value(Contestant{Name: "CPU time of that", Unit: "s"}, r.LoadCPU.Seconds())
	b.Value(Contestant{Name: "started again with everything pinned", Unit: "s"}, r.Restart.Seconds())
	b.Add(Contestant{Name: "one endpoint changed", Unit: "ms", Bound: Bound{Most: 100, InsteadOfBest: true}}, changes)
	b.Value(Contestant{Name: "resident memory", Unit: "MiB", Bound: Bound{Most: 150}}, float64(r.RSS)/(1<<20))
}
