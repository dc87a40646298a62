// SPDX-License-Identifier: Apache-2.0

// Package bench measures what Mooring costs, beside what else is done in its
// place, in one run: machines differ and drift, ratios less so.
//
//	make bench                              everything: a table, and bench.json
//	make bench ROWS="packet service"        some sets
//
// A set of rows is a file that registers itself:
//
//	func init() {
//		Register(Set{Name: "packet", Title: "...", Measure: func(b *B) {
//			b.Compare(Contestant{Name: "empty program", Unit: "ns", Once: ...}, Contestant{...})
//		}})
//	}
//
// Contestants take turns, round by round, and the rounds' minimum and median are
// kept; for rates, the maximum and median. A ratio of rates is the median of the
// rounds' own ratios: a processor that is faster for a while is so for neighbours
// in a round, and never for the best of all rounds of one contestant alone.
// packets.go has the means to run one program, worker.go those to send real traffic.
package bench

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// Set is a set of rows that are measured together.
type Set struct {
	Name    string // for ROWS
	Title   string // with the method in a sentence
	Measure func(*B)
}

var sets []Set

// Register adds a set; files of this package do it in init.
func Register(s Set) { sets = append(sets, s) }

// B measures one set.
type B struct {
	*testing.T
	Rounds int
	// Quick asks for figures that show only that everything works: fewer
	// repetitions, fewer objects.
	Quick bool

	rows []Row
}

// Contestant is one of those that are compared.
type Contestant struct {
	Name string
	Unit string // "ns", "ms"; one that ends in "/s" is a rate: more is better
	// Once measures once. It is called in each round.
	Once func() float64

	// Against names the contestant that Ratio is taken to; empty: no ratio.
	Against string
	// Bound is what was promised.
	Bound Bound
	// Peer is a figure of others, measured the same way at another time.
	Peer string
}

// Bound is what a row promises: its best figure, or its ratio.
type Bound struct {
	Ratio         bool
	Least, Most   float64 // zero: no bound
	InsteadOfBest bool    // the median is what counts
	None          bool    // nothing at all
}

// Row is a result, and what bench.json has.
type Row struct {
	Name    string    `json:"name"`
	Unit    string    `json:"unit"`
	Best    float64   `json:"best"`
	Median  float64   `json:"median"`
	Rounds  []float64 `json:"rounds,omitempty"`
	Against string    `json:"against,omitempty"`
	Ratio   float64   `json:"ratio,omitempty"`
	Promise string    `json:"promise,omitempty"`
	Kept    *bool     `json:"kept,omitempty"`
	Peer    string    `json:"peer,omitempty"`
}

func isRate(unit string) bool { return len(unit) > 2 && unit[len(unit)-2:] == "/s" }

// Compare measures contestants by turns and adds a row for each.
func (b *B) Compare(contestants ...Contestant) {
	b.Helper()
	samples := make([][]float64, len(contestants))
	for round := range b.Rounds {
		// Who comes first, with caches cold, changes.
		for i := range contestants {
			i = (i + round) % len(contestants)
			samples[i] = append(samples[i], contestants[i].Once())
		}
	}
	for i, c := range contestants {
		b.Add(c, samples[i])
	}
}

// Add adds a row of what was measured elsewhere. The row that it is compared
// with comes before it.
func (b *B) Add(c Contestant, samples []float64) {
	b.Helper()
	if len(samples) == 0 {
		b.Fatalf("%s: nothing was measured", c.Name)
	}
	sorted := slices.Sorted(slices.Values(samples))
	row := Row{Name: c.Name, Unit: c.Unit, Best: sorted[0], Median: sorted[len(sorted)/2], Rounds: samples, Against: c.Against, Peer: c.Peer}
	if isRate(c.Unit) {
		row.Best = sorted[len(sorted)-1]
	}
	if row.Best <= 0 && c.Unit != "entries" && !b.Quick {
		b.Errorf("%s: %v %s is no figure", c.Name, row.Best, c.Unit)
	}
	if c.Against != "" {
		i := slices.IndexFunc(b.rows, func(r Row) bool { return r.Name == c.Against })
		if i < 0 {
			b.Fatalf("%s is compared with %s, which is not measured before it", c.Name, c.Against)
		}
		base := b.rows[i]
		switch {
		case c.Bound.InsteadOfBest:
			row.Ratio = row.Median / base.Median
		case isRate(c.Unit) && len(samples) == len(base.Rounds):
			row.Ratio = medianRatio(samples, base.Rounds)
		default:
			row.Ratio = row.Best / base.Best
		}
	}
	value, unit := row.Best, " "+c.Unit
	if c.Bound.InsteadOfBest {
		value = row.Median
	}
	if c.Bound.Ratio {
		value, unit = row.Ratio, "x"
	}
	switch {
	case c.Bound.None:
		row.Promise = "0" + unit
		row.Kept = new(value == 0)
	case c.Bound.Least > 0:
		row.Promise = fmt.Sprintf(">= %g%s", c.Bound.Least, unit)
		row.Kept = new(value >= c.Bound.Least)
	case c.Bound.Most > 0:
		row.Promise = fmt.Sprintf("<= %g%s", c.Bound.Most, unit)
		row.Kept = new(value <= c.Bound.Most)
	}
	b.rows = append(b.rows, row)
}

// medianRatio is the median of the rounds' ratios.
func medianRatio(samples, base []float64) float64 {
	ratios := make([]float64, len(samples))
	for i := range ratios {
		ratios[i] = samples[i] / base[i]
	}
	slices.Sort(ratios)
	return ratios[len(ratios)/2]
}

// Value adds a row of one figure that is no matter of rounds: memory, a count.
func (b *B) Value(c Contestant, value float64) {
	b.Helper()
	b.Add(c, []float64{value})
}

// Sets are those of the names, in order; no name means all, and one also means
// those whose names it begins: north means north-flow.
func Sets(names []string) ([]Set, error) {
	slices.SortFunc(sets, func(a, b Set) int { return cmp.Compare(a.Name, b.Name) })
	if len(names) == 0 {
		return sets, nil
	}
	var chosen []Set
	for _, name := range names {
		before := len(chosen)
		for _, s := range sets {
			if s.Name == name || strings.HasPrefix(s.Name, name+"-") {
				chosen = append(chosen, s)
			}
		}
		if len(chosen) == before {
			var known []string
			for _, s := range sets {
				known = append(known, s.Name)
			}
			return nil, fmt.Errorf("there is no set of rows %q, but %q", name, known)
		}
	}
	return chosen, nil
}
