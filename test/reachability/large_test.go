// SPDX-License-Identifier: Apache-2.0

package reachability

import (
	"testing"
	"time"

	"github.com/mooring-cni/mooring/daemon/policy"
)

func largeTable() (*policy.Table, *policy.Update) {
	c, endpoints := Large()
	t := policy.NewTable(policy.Config{Node: "here", Mode: policy.Default, Standalone: true})
	t.ApplyEndpoints(endpoints)
	return t, t.Apply(c)
}

// What is promised of the clock is asked of the CPU: others may use it too.
func TestALargeClusterIsComputedInTime(t *testing.T) {
	began := Spent()
	table, all := largeTable()
	scratch := Spent() - began
	t.Logf("from nothing: %v; %d addresses, %d rulesets, %d verdicts, %d profiles",
		scratch, len(all.Addresses), len(table.Rulesets()), len(all.Verdicts), len(all.Profiles))
	if scratch > 5*time.Second {
		t.Errorf("from nothing took %v, want less than 5 s", scratch)
	}
	c, _ := Large()
	for _, change := range LargeChanges(c) {
		began := Spent()
		const turns = 3
		for turn := range turns {
			if table.Apply(change.Turn(turn)).Empty() {
				t.Errorf("%s, turn %d: nothing differs", change.Name, turn)
			}
		}
		took := (Spent() - began) / turns
		t.Logf("%s: %v", change.Name, took)
		if took > 100*time.Millisecond {
			t.Errorf("%s took %v, want less than 100 ms", change.Name, took)
		}
	}
}

func BenchmarkLargeFromNothing(b *testing.B) {
	for b.Loop() {
		largeTable()
	}
}

func BenchmarkLargeChange(b *testing.B) {
	c, _ := Large()
	for _, change := range LargeChanges(c) {
		b.Run(change.Name, func(b *testing.B) {
			t, _ := largeTable()
			turn := 0
			for b.Loop() {
				t.Apply(change.Turn(turn))
				turn++
			}
		})
	}
}
