//go:build root

// SPDX-License-Identifier: Apache-2.0

package reachability

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mooring-cni/mooring/daemon/policy"
)

func TestALargeClusterIsInTheMapsInTime(t *testing.T) {
	s := newStage(t)
	c, endpoints := Large()
	before, err := MapMemory(s.BPFFS)
	if err != nil {
		t.Fatal(err)
	}

	began := Spent()
	table := policy.NewTable(policy.Config{Node: "here", Mode: policy.Default, Standalone: true})
	table.ApplyEndpoints(endpoints)
	table.Apply(c)
	if err := s.SyncPolicy(table.State()); err != nil {
		t.Fatal(err)
	}
	scratch := Spent() - began
	after, err := MapMemory(s.BPFFS)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("computed and written from nothing: %v; the maps take %d KiB, %d KiB of them when empty", scratch, after>>10, before>>10)
	if scratch > 5*time.Second {
		t.Errorf("from nothing took %v, want less than 5 s", scratch)
	}
	if after <= before {
		t.Errorf("the maps take %d bytes when full and %d when empty", after, before)
	}

	for _, change := range LargeChanges(c) {
		began := Spent()
		const turns = 3
		for turn := range turns {
			if err := s.ApplyPolicy(table.Apply(change.Turn(turn))); err != nil {
				t.Fatal(err)
			}
		}
		took := (Spent() - began) / turns
		t.Logf("%s, computed and written: %v", change.Name, took)
		if took > 100*time.Millisecond {
			t.Errorf("%s took %v, want less than 100 ms", change.Name, took)
		}
	}

	// What was written as differences is the state.
	differences, err := Contents(s.BPFFS)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SyncPolicy(table.State()); err != nil {
		t.Fatal(err)
	}
	state, err := Contents(s.BPFFS)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(state, differences); diff != "" {
		t.Errorf("differences wrote other entries than the state (-state +differences):\n%s", diff)
	}
}
