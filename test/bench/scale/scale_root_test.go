// SPDX-License-Identifier: Apache-2.0

//go:build root

package scale_test

import (
	"os"
	"testing"

	"github.com/mooring-cni/mooring/test/bench/scale"
	"github.com/mooring-cni/mooring/test/scenario"
)

func TestMain(m *testing.M) {
	code := m.Run()
	scenario.RemovePrograms()
	os.Exit(code)
}

// What it takes is for `make bench ROWS=scale` to say: a test sees that all of it
// is loaded, that changes reach the maps, and that the daemon stays small.
func TestTenThousandServices(t *testing.T) {
	r := scale.Measure(t, scale.Options{Services: 10_000, Backends: 10, PerFile: 1, Changes: 40})
	t.Log(r)
	if r.RSS > 150<<20 {
		t.Errorf("the daemon has %d MiB, want less than 150", r.RSS>>20)
	}
}
