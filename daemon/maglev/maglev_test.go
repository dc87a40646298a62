// SPDX-License-Identifier: Apache-2.0

package maglev

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math"
	"math/big"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/mooring-cni/mooring/daemon/model"
)

// pods are n backends of a service, spread over nodes' pod ranges.
func pods(n int) []model.AddrPort {
	list := make([]model.AddrPort, n)
	for i := range list {
		list[i] = model.AddrPort{Addr: netip.AddrFrom4([4]byte{10, 244, byte(i % 50), byte(2 + i/50)}), Port: 8080, Protocol: model.TCP}
	}
	return list
}

// named is a table by backends' names, so that those of two lists compare.
func named(backends []model.AddrPort, size int) []model.AddrPort {
	slots := make([]model.AddrPort, size)
	for i, b := range Table(backends, size) {
		slots[i] = backends[b]
	}
	return slots
}

// moved is the share of all slots that lead elsewhere although their backend is still there.
func moved(before, after []model.AddrPort, gone model.AddrPort) float64 {
	n := 0
	for i := range before {
		if before[i] != gone && before[i] != after[i] {
			n++
		}
	}
	return float64(n) / float64(len(before))
}

func TestSizesArePrimes(t *testing.T) {
	for _, size := range sizes {
		if !big.NewInt(int64(size)).ProbablyPrime(0) { // certain below 2^64
			t.Errorf("%d is no prime: a backend's steps do not reach every slot", size)
		}
	}
}

func TestSizeGivesEachBackendItsSlots(t *testing.T) {
	for _, c := range []struct{ backends, limit, want int }{
		{1, 1 << 19, 2039}, {2, 1 << 19, 2039}, {20, 1 << 19, 2039}, {21, 1 << 19, 16381},
		{163, 1 << 19, 16381}, {164, 1 << 19, 131071}, {1310, 1 << 19, 131071}, {1311, 1 << 19, 524287},
		{5242, 1 << 19, 524287}, {100000, 1 << 19, 524287}, {2, 2038, 0}, {1311, 131072, 131071},
	} {
		if got := Size(c.backends, c.limit); got != c.want {
			t.Errorf("Size(%d, %d) = %d, want %d", c.backends, c.limit, got, c.want)
		}
	}
}

func TestEveryBackendGetsItsShare(t *testing.T) {
	for _, n := range []int{1, 2, 3, 7, 10, 20, 21, 163, 1310} {
		size := Size(n, 1<<19)
		count := make([]int, n)
		for _, b := range Table(pods(n), size) {
			count[b]++
		}
		if least, most := slices.Min(count), slices.Max(count); most-least > 1 || n > 1 && least < slotsEach {
			t.Errorf("%d backends have from %d to %d of %d slots", n, least, most, size)
		}
	}
}

func TestOrderOfTheListDoesNotMatter(t *testing.T) {
	backends := pods(20)
	want := named(backends, 2039)
	for seed := range uint64(10) {
		rand.New(rand.NewPCG(seed, 1)).Shuffle(len(backends), func(i, j int) { backends[i], backends[j] = backends[j], backends[i] })
		if !slices.Equal(named(backends, 2039), want) {
			t.Fatalf("seed %d: another order gives another table", seed)
		}
	}
}

// Nodes that run another version must choose the same.
func TestTableIsTheSameInEveryVersion(t *testing.T) {
	sum := sha256.New()
	for _, n := range []int{2, 10, 100} {
		if err := binary.Write(sum, binary.BigEndian, Table(pods(n), Size(n, 1<<19))); err != nil {
			t.Fatal(err)
		}
	}
	const want = "4d27f41e706b0d8c6b66acb14b90b34ce554ff927ce89ebdf4e1c1bac5408267"
	if got := hex.EncodeToString(sum.Sum(nil)); got != want {
		t.Errorf("the tables' hash is %s, was %s: a node of either version chooses others", got, want)
	}
}

// accepted is the share of flows that move although their backend is still there:
// with 100 slots for each, the paper's tables move 2 to 3 % (its figure 12).
const accepted = 0.04

// What is unavoidable is that the flows of a backend that is gone move, and that a
// new one gets its share. Beyond that, few do.
func TestFewFlowsMoveWithABackend(t *testing.T) {
	for _, n := range []int{2, 3, 5, 10, 20, 50, 163, 500} {
		backends := pods(n)
		size := Size(n, 1<<19)
		before := named(backends, size)
		worst, sum, tries := 0.0, 0.0, 0
		for i := 0; i < n; i += max(1, n/10) {
			share := moved(before, named(slices.Delete(slices.Clone(backends), i, i+1), size), backends[i])
			worst, sum, tries = max(worst, share), sum+share, tries+1
		}
		t.Logf("%3d backends, %6d slots: beyond its own, the end of one moves %.2f %% of the flows at most, %.2f %% on average", n, size, 100*worst, 100*sum/float64(tries))
		if worst > accepted {
			t.Errorf("of %d backends, the end of one moves %.2f %% of the others' flows", n, 100*worst)
		}
	}
}

func FuzzTable(f *testing.F) {
	f.Add(uint64(1), uint16(10))
	f.Add(uint64(2), uint16(1))
	f.Add(uint64(3), uint16(300))
	f.Fuzz(func(t *testing.T, seed uint64, many uint16) {
		r := rand.New(rand.NewPCG(seed, 2))
		n := 1 + int(many)%400
		seen := make(map[model.AddrPort]bool, n)
		for len(seen) < n {
			b := model.AddrPort{Port: uint16(r.Uint32()), Protocol: []model.Protocol{model.TCP, model.UDP}[r.IntN(2)]}
			if r.IntN(2) == 0 {
				b.Addr = netip.AddrFrom4([4]byte{10, byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32())})
			} else {
				b.Addr = netip.AddrFrom16([16]byte{0: 0xfd, 14: byte(r.Uint32()), 15: byte(r.Uint32())})
			}
			seen[b] = true
		}
		var backends []model.AddrPort
		for b := range seen {
			backends = append(backends, b)
		}
		size := Size(n, 131071)
		before := named(backends, size)
		count := make(map[model.AddrPort]int, n)
		for _, b := range before {
			count[b]++
		}
		for _, b := range backends {
			if got, share := count[b], float64(size)/float64(n); math.Abs(float64(got)-share) >= 1 {
				t.Fatalf("%v has %d slots, its share is %.1f", b, got, share)
			}
		}
		if n == 1 {
			return
		}
		gone := r.IntN(n)
		share := moved(before, named(slices.Delete(slices.Clone(backends), gone, gone+1), size), backends[gone])
		if share > accepted {
			t.Fatalf("of %d backends, the end of one moves %.1f %% of the others' flows", n, 100*share)
		}
	})
}

func BenchmarkTable(b *testing.B) {
	for _, n := range []int{2, 10, 20, 100, 1000, 5000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			backends, size := pods(n), Size(n, 1<<19)
			for b.Loop() {
				Table(backends, size)
			}
		})
	}
}
