// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// BenchmarkAllocateAndRelease measures what an ADD and a DEL wait for, with that
// many other attachments on the node.
func BenchmarkAllocateAndRelease(b *testing.B) {
	for _, others := range []int{0, 110, 1000, 10000, 50000} {
		b.Run(fmt.Sprintf("others=%d", others), func(b *testing.B) {
			p, err := Open(b.TempDir(), []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:244::/64")})
			if err != nil {
				b.Fatal(err)
			}
			fill(b, p, others)
			var gave, took []time.Duration
			for i := range b.N {
				key := Key{"mooring", fmt.Sprintf("%064x", i), "eth0"}
				start := time.Now()
				if _, err := p.Allocate(b.Context(), key, nil); err != nil {
					b.Fatal(err)
				}
				given := time.Now()
				if err := p.Release(b.Context(), key); err != nil {
					b.Fatal(err)
				}
				gave, took = append(gave, given.Sub(start)), append(took, time.Since(given))
			}
			for name, d := range map[string][]time.Duration{"allocate": gave, "release": took} {
				slices.Sort(d)
				b.ReportMetric(float64(d[len(d)/2].Microseconds()), name+"-p50-us")
				b.ReportMetric(float64(d[len(d)*99/100].Microseconds()), name+"-p99-us")
			}
		})
	}
}

// fill gives n attachments their addresses in one write.
func fill(t testing.TB, p *Pool, n int) {
	if err := p.make(); err != nil {
		t.Fatal(err)
	}
	f, _, err := p.read(Key{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.close()
	records := make([]record, n)
	for i := range n {
		addrs, err := p.choose(f.journal, nil)
		if err != nil {
			t.Fatal(err)
		}
		records[i] = record{op: opGive, key: Key{"mooring", fmt.Sprintf("other%059x", i), "eth0"}, addrs: addrs}
		for _, addr := range addrs { // write applies them for itself
			f.last[family(addr)] = addr
		}
	}
	f.last = [2]netip.Addr{}
	if err := f.write(records...); err != nil {
		t.Fatal(err)
	}
}
