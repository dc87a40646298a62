// SPDX-License-Identifier: Apache-2.0

//go:build root

package bench

import (
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/mooring-cni/mooring/test/scenario"
)

var (
	full   = flag.Bool("full", false, "measure as the documents do; otherwise only see that every set can be measured")
	rows   = flag.String("rows", "", "the sets to measure, by their names; empty: all")
	rounds = flag.Int("rounds", 0, "how often each contestant has its turn")
	output = flag.String("output", "", "file for the report")
)

func TestMain(m *testing.M) {
	WorkerMain()
	HolderMain()
	flag.Parse()
	code := m.Run()
	scenario.RemovePrograms()
	os.Exit(code)
}

func TestEverySetIsMeasured(t *testing.T) {
	chosen, err := Sets(strings.Fields(*rows))
	if err != nil {
		t.Fatal(err)
	}
	count := *rounds
	if count == 0 {
		count = map[bool]int{true: 25, false: 1}[*full]
	}
	report := NewReport(count)
	if *full {
		report.Head(os.Stdout)
	}
	for _, set := range chosen {
		t.Run(set.Name, func(t *testing.T) {
			b := &B{T: t, Rounds: count, Quick: !*full}
			set.Measure(b)
			if len(b.rows) == 0 {
				t.Error("no row was measured")
			}
			one := SetReport{Name: set.Name, Title: set.Title, Rows: b.rows}
			report.Sets = append(report.Sets, one)
			if *full {
				one.Table(os.Stdout)
			}
		})
	}
	if *output != "" {
		if err := report.Write(*output); err != nil {
			t.Fatal(err)
		}
	}
}
