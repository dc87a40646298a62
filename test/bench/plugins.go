// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"time"

	"github.com/mooring-cni/mooring/test/bench/cni"
	"github.com/mooring-cni/mooring/test/cnitool"
	"github.com/mooring-cni/mooring/test/scenario"
)

func init() {
	Register(Set{
		Name:    "cni",
		Title:   "ADD and DEL of the plugin, exec to exit, beside bridge with host-local of containernetworking/plugins, by turns;\n  the p50 is what was promised",
		Measure: measurePlugins,
	})
}

func measurePlugins(b *B) {
	references, err := cnitool.References()
	if err != nil {
		b.Fatal(err)
	}
	rounds := 4 * b.Rounds
	if b.Quick {
		rounds = 3
	}
	n := scenario.NewNode(b)
	n.Up()
	r := cni.Measure(b, n.Node, n.Programs, references, rounds)
	for _, verb := range []struct {
		name       string
		ours, them cni.Times
		peer       string
	}{
		{"ADD", r.Mooring.ADD, r.Reference.ADD, "min 9.7 p50 20 p99 97"},
		{"DEL", r.Mooring.DEL, r.Reference.DEL, "min 16 p50 28 p99 52"},
	} {
		b.Add(Contestant{Name: verb.name + ": bridge, host-local", Unit: "ms", Peer: verb.peer}, milliseconds(verb.them))
		b.Add(Contestant{Name: verb.name + ": mooring-cni, mooring-ipam", Unit: "ms", Against: verb.name + ": bridge, host-local",
			Bound: Bound{Ratio: true, Most: 1, InsteadOfBest: true}}, milliseconds(verb.ours))
	}
}

// milliseconds keeps of the samples what a row shows: their minimum and median
// (and, as the rest, their p99).
func milliseconds(t cni.Times) []float64 {
	ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	return []float64{ms(t.Min), ms(t.P50), ms(t.P99)}
}
