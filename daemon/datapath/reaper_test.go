// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"testing"
	"time"

	"github.com/mooring-cni/mooring/bpf"
)

func TestTheReapersInterval(t *testing.T) {
	const size = 1000
	for _, c := range []struct {
		what              string
		interval, elapsed time.Duration
		found             bpf.Sweep
		want              time.Duration
	}{
		{"nothing found: later", time.Minute, time.Minute, bpf.Sweep{Scanned: 100, Entries: 100}, 90 * time.Second},
		{"but not for ever", 4 * time.Minute, 4 * time.Minute, bpf.Sweep{}, 5 * time.Minute},
		{"somebody asked before the time: as before", time.Minute, time.Second, bpf.Sweep{Scanned: 100, Entries: 100}, time.Minute},
		{"some found: as before", time.Minute, time.Minute, bpf.Sweep{Scanned: 100, Expired: 10, Entries: 90}, time.Minute},
		{"much found: twice as often", time.Minute, time.Minute, bpf.Sweep{Scanned: 100, Expired: 50, Entries: 50}, 30 * time.Second},
		{"much found in a short time: as often as that", time.Minute, 10 * time.Second, bpf.Sweep{Scanned: 100, Expired: 50, Entries: 50}, 5 * time.Second},
		{"but not all the time", time.Second, time.Second, bpf.Sweep{Scanned: 100, Expired: 50, Entries: 50}, time.Second},
		{"half full: not rarely", time.Minute, time.Minute, bpf.Sweep{Scanned: 600, Entries: 600}, 30 * time.Second},
		{"nearly full: twice as often", time.Minute, time.Minute, bpf.Sweep{Scanned: 950, Entries: 950}, 30 * time.Second},
	} {
		if got := nextInterval(c.interval, c.elapsed, c.found, size); got != c.want {
			t.Errorf("%s: %v, want %v", c.what, got, c.want)
		}
	}
}
