// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestFirstLastAndTotalOfPools(t *testing.T) {
	for _, test := range []struct {
		pool, gateway, first, last string
		total                      uint64
	}{
		{"10.244.0.0/24", "10.244.0.1", "10.244.0.2", "10.244.0.254", 253},
		{"10.244.0.0/30", "10.244.0.1", "10.244.0.2", "10.244.0.2", 1},
		{"10.244.0.0/29", "10.244.0.1", "10.244.0.2", "10.244.0.6", 5},
		{"10.244.0.0/16", "10.244.0.1", "10.244.0.2", "10.244.255.254", 65533},
		{"10.0.0.0/8", "10.0.0.1", "10.0.0.2", "10.255.255.254", 1<<24 - 3},
		{"10.244.128.0/17", "10.244.128.1", "10.244.128.2", "10.244.255.254", 1<<15 - 3},
		{"fd00:10:244::/126", "fd00:10:244::1", "fd00:10:244::2", "fd00:10:244::3", 2},
		{"fd00:10:244::/120", "fd00:10:244::1", "fd00:10:244::2", "fd00:10:244::ff", 254},
		{"fd00:10:244::/65", "fd00:10:244::1", "fd00:10:244::2", "fd00:10:244:0:7fff:ffff:ffff:ffff", 1<<63 - 2},
		{"fd00:10:244::/64", "fd00:10:244::1", "fd00:10:244::2", "fd00:10:244:0:ffff:ffff:ffff:ffff", math.MaxUint64},
		{"fd00:10:244::/56", "fd00:10:244::1", "fd00:10:244::2", "fd00:10:244:ff:ffff:ffff:ffff:ffff", math.MaxUint64},
	} {
		pool := netip.MustParsePrefix(test.pool)
		if gateway(pool).String() != test.gateway || first(pool).String() != test.first || last(pool).String() != test.last || total(pool) != test.total {
			t.Errorf("%s: node %s, pods %s to %s, %d in all; want %+v", pool, gateway(pool), first(pool), last(pool), total(pool), test)
		}
		for addr, want := range map[netip.Addr]bool{
			pool.Addr(): false, gateway(pool): false, first(pool): true, last(pool): true, last(pool).Next(): false, pool.Addr().Prev(): false,
		} {
			if usable(pool, addr) != want {
				t.Errorf("%s: %s usable %v, want %v", pool, addr, !want, want)
			}
		}
	}
}

func TestNextAddress(t *testing.T) {
	pool := netip.MustParsePrefix("10.244.0.0/29") // pods get .2 to .6
	for _, test := range []struct {
		name, previous string
		used, resting  []string // resting: the longest ago first
		want           string
	}{
		{"the first of an empty pool", "", nil, nil, "10.244.0.2"},
		{"the one after the previous", "10.244.0.3", []string{"10.244.0.3"}, nil, "10.244.0.4"},
		{"not a used one", "10.244.0.2", []string{"10.244.0.3", "10.244.0.4"}, nil, "10.244.0.5"},
		{"round the end", "10.244.0.6", []string{"10.244.0.2"}, nil, "10.244.0.3"},
		{"not one that rests while another never was used", "10.244.0.5", []string{"10.244.0.5"}, []string{"10.244.0.6", "10.244.0.2"}, "10.244.0.3"},
		{"the one that rests longest", "10.244.0.2", []string{"10.244.0.3"}, []string{"10.244.0.5", "10.244.0.4", "10.244.0.2", "10.244.0.6"}, "10.244.0.5"},
		{"one released, in a full pool", "10.244.0.4", []string{"10.244.0.2", "10.244.0.3", "10.244.0.4", "10.244.0.6"}, []string{"10.244.0.5"}, "10.244.0.5"},
		{"none in a full pool", "10.244.0.4", []string{"10.244.0.2", "10.244.0.3", "10.244.0.4", "10.244.0.5", "10.244.0.6"}, nil, ""},
		{"none of another pool that rests", "", []string{"10.244.0.2", "10.244.0.3", "10.244.0.4", "10.244.0.5", "10.244.0.6"}, []string{"10.244.9.1", "10.244.0.1", "10.244.0.7"}, ""},
		{"the first when the previous is of another pool", "10.9.0.77", nil, nil, "10.244.0.2"},
		{"the first when the previous is the broadcast", "10.244.0.7", nil, nil, "10.244.0.2"},
	} {
		var used set
		for _, addr := range test.used {
			used.add(netip.MustParseAddr(addr))
		}
		var resting queue
		for _, addr := range test.resting {
			resting.add(netip.MustParseAddr(addr))
		}
		previous, _ := netip.ParseAddr(test.previous)
		got, found := next(pool, previous, &used, &resting)
		if want, _ := netip.ParseAddr(test.want); got != want || found != (test.want != "") {
			t.Errorf("%s: %v %v, want %q", test.name, got, found, test.want)
		}
	}
}

func TestReleasedAddressesRestInTheOrderOfTheirRelease(t *testing.T) {
	var q queue
	a, b, c := netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3"), netip.MustParseAddr("10.0.0.4")
	q.add(a)
	q.add(b)
	q.add(c)
	q.remove(a)
	q.add(a) // again, so now it is the last
	if diff := cmp.Diff([]netip.Addr{b, c, a}, slices.Collect(q.oldestFirst()), sameAddr); diff != "" {
		t.Error(diff)
	}
	addr := netip.MustParseAddr("fd00:10:244::2")
	for range 3 * maxResting {
		q.add(addr)
		addr = addr.Next()
	}
	if got := slices.Collect(q.oldestFirst()); len(got) != maxResting || got[len(got)-1] != addr.Prev() || q.has(b) {
		t.Errorf("%d rest, the last is %s", len(got), got[len(got)-1])
	}
}

func TestSetIsASet(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for _, base := range []string{"10.244.0.0", "fd00:10:244::"} {
		var got set
		want := map[netip.Addr]bool{}
		for range 20000 {
			b := netip.MustParseAddr(base).AsSlice()
			b[len(b)-1], b[len(b)-2] = byte(random.Uint32()), byte(random.Uint32())
			if random.IntN(10) == 0 { // some are far away
				b[len(b)/2] = byte(random.Uint32())
			}
			addr, _ := netip.AddrFromSlice(b)
			if got.has(addr) != want[addr] {
				t.Fatalf("%s: %v", addr, !want[addr])
			}
			if random.IntN(2) == 0 {
				if got.add(addr) == want[addr] {
					t.Fatalf("add %s", addr)
				}
				want[addr] = true
			} else {
				if got.remove(addr) != want[addr] {
					t.Fatalf("remove %s", addr)
				}
				delete(want, addr)
			}
		}
		n := 0
		for addr := range got.each {
			n++
			if !want[addr] {
				t.Errorf("%s is in the set", addr)
			}
		}
		if n != len(want) {
			t.Errorf("%d in the set, want %d", n, len(want))
		}
	}
}
