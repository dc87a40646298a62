// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"cmp"
	"slices"
	"time"
)

// rest is how long what was freed is not used again: a program that read the
// old frontend may still go by it. Programs run for microseconds, so this is
// ample even for one that was preempted.
const rest = time.Second

// indices gives out the indices of mooring_backends. 0 is never used.
type indices struct {
	generations []uint32 // how many tenants each index has had; as long as indices were ever used
	free        []uint32
	resting     []resting[uint32]
	next, limit uint32 // never used so far: from next on
}

type resting[T any] struct {
	what T
	till time.Time
}

func (x *indices) available(now time.Time) int {
	x.wake(now)
	return len(x.free) + int(x.limit-x.next)
}

func (x *indices) wake(now time.Time) {
	n := 0
	for n < len(x.resting) && !now.Before(x.resting[n].till) {
		x.free = append(x.free, x.resting[n].what)
		n++
	}
	x.resting = slices.Delete(x.resting, 0, n)
}

// take gives an index, when one is available.
func (x *indices) take(now time.Time) uint32 {
	x.wake(now)
	if n := len(x.free); n > 0 {
		index := x.free[n-1]
		x.free = x.free[:n-1]
		return index
	}
	index := x.next
	x.next++
	for uint32(len(x.generations)) <= index {
		x.generations = append(x.generations, 0)
	}
	return index
}

// giveBack returns an index that was taken and not used.
func (x *indices) giveBack(index uint32) { x.free = append(x.free, index) }

func (x *indices) retire(index uint32, now time.Time) {
	x.resting = append(x.resting, resting[uint32]{index, now.Add(rest)})
}

// extent is a part of mooring_slots.
type extent struct{ first, n uint32 }

// extents gives out parts of mooring_slots. Slot 0 is never used.
type extents struct {
	free    []extent // sorted; neighbours are one
	resting []resting[extent]
}

// take gives the first part of this size.
func (x *extents) take(n uint32, now time.Time) (first uint32, ok bool) {
	x.wake(now)
	for i := range x.free {
		e := &x.free[i]
		if e.n < n {
			continue
		}
		first = e.first
		e.first += n
		if e.n -= n; e.n == 0 {
			x.free = slices.Delete(x.free, i, i+1)
		}
		return first, true
	}
	return 0, false
}

// has tells whether there is a part of this size.
func (x *extents) has(n uint32, now time.Time) bool {
	x.wake(now)
	return slices.ContainsFunc(x.free, func(e extent) bool { return e.n >= n })
}

func (x *extents) wake(now time.Time) {
	woken := 0
	for woken < len(x.resting) && !now.Before(x.resting[woken].till) {
		x.giveBack(x.resting[woken].what)
		woken++
	}
	x.resting = slices.Delete(x.resting, 0, woken)
}

func (x *extents) giveBack(e extent) {
	i, _ := slices.BinarySearchFunc(x.free, e, func(a, b extent) int { return cmp.Compare(a.first, b.first) })
	x.free = slices.Insert(x.free, i, e)
	if i+1 < len(x.free) && x.free[i].first+x.free[i].n == x.free[i+1].first {
		x.free[i].n += x.free[i+1].n
		x.free = slices.Delete(x.free, i+1, i+2)
	}
	if i > 0 && x.free[i-1].first+x.free[i-1].n == x.free[i].first {
		x.free[i-1].n += x.free[i].n
		x.free = slices.Delete(x.free, i, i+1)
	}
}

func (x *extents) retire(e extent, now time.Time) {
	x.resting = append(x.resting, resting[extent]{e, now.Add(rest)})
}
