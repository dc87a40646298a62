// SPDX-License-Identifier: Apache-2.0

// Package maglev makes the tables by which every node chooses the same backend
// for a flow, and by which few flows move when a backend comes or goes: Eisenbud
// et al., Maglev: A Fast and Reliable Software Network Load Balancer, NSDI 2016,
// section 3.4. It is pure, and a table depends on nothing but the backends.
package maglev

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"slices"

	"github.com/mooring-cni/mooring/daemon/model"
)

// slotsEach is how many slots a backend has at least, so that none has more than
// 1 % above its share.
const slotsEach = 100

// sizes are primes, as a backend's steps must reach every slot. They are far
// apart since another size moves nearly every flow.
var sizes = []int{2039, 16381, 131071, 524287}

// Size is that of the table for so many backends, at most limit; 0: none is.
func Size(backends, limit int) int {
	size := 0
	for _, s := range sizes {
		if s > limit {
			break
		}
		if size = s; s >= backends*slotsEach {
			break
		}
	}
	return size
}

// turn is a backend's way through the slots: from one, in steps of one length.
type turn struct {
	first, second uint64 // hashes, which tell backends apart
	at, step      int
	backend       uint32
}

// Table gives each of size slots a backend, by its index in the list. All get as
// many slots, but for one, in whatever order they are listed.
func Table(backends []model.AddrPort, size int) []uint32 {
	if len(backends) == 0 || size == 0 {
		return nil
	}
	turns := make([]turn, len(backends))
	for i, b := range backends {
		turns[i] = turnOf(b, size)
		turns[i].backend = uint32(i)
	}
	// Who takes the first turn must not depend on the order of the list.
	slices.SortFunc(turns, func(a, b turn) int { return cmp.Or(cmp.Compare(a.first, b.first), cmp.Compare(a.second, b.second)) })

	const free = ^uint32(0)
	table := make([]uint32, size)
	for i := range table {
		table[i] = free
	}
	for filled := 0; ; {
		for i := range turns {
			t := &turns[i]
			for table[t.at] != free {
				t.next(size)
			}
			table[t.at] = t.backend
			t.next(size)
			if filled++; filled == size {
				return table
			}
		}
	}
}

func (t *turn) next(size int) {
	if t.at += t.step; t.at >= size {
		t.at -= size
	}
}

// turnOf goes by the address, port and protocol of a backend, and by nothing that
// nodes may disagree on.
func turnOf(b model.AddrPort, size int) turn {
	var key [19]byte
	*(*[16]byte)(key[:]) = b.Addr.As16()
	binary.BigEndian.PutUint16(key[16:], b.Port)
	key[18] = byte(b.Protocol)
	sum := sha256.Sum256(key[:])
	t := turn{first: binary.BigEndian.Uint64(sum[:]), second: binary.BigEndian.Uint64(sum[8:])}
	t.at = int(t.first % uint64(size))
	t.step = 1 + int(t.second%uint64(size-1))
	return t
}
