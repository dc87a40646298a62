// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"math"
	"net/netip"
)

// Never given to pods: the network's address (which is also IPv6's subnet-router
// anycast address), the first one, which is the node's own, and IPv4's broadcast.

// first is the lowest address of pool that a pod can have.
func first(pool netip.Prefix) netip.Addr { return gateway(pool).Next() }

// gateway is the node's own address in pool.
func gateway(pool netip.Prefix) netip.Addr { return pool.Addr().Next() }

// last is the highest address of pool that a pod can have.
func last(pool netip.Prefix) netip.Addr {
	b := pool.Addr().AsSlice()
	for i := range b {
		if host := (i+1)*8 - pool.Bits(); host >= 8 {
			b[i] = 0xff
		} else if host > 0 {
			b[i] |= 1<<host - 1
		}
	}
	end, _ := netip.AddrFromSlice(b)
	if end.Is4() {
		return end.Prev()
	}
	return end
}

// total is how many pods pool has room for, or the highest uint64.
func total(pool netip.Prefix) uint64 {
	host := pool.Addr().BitLen() - pool.Bits()
	if host >= 64 {
		return math.MaxUint64
	}
	n := uint64(1)<<host - 2
	if pool.Addr().Is4() {
		n--
	}
	return n
}

// usable says whether a pod can have addr from pool.
func usable(pool netip.Prefix, addr netip.Addr) bool {
	return pool.Contains(addr) && !addr.Less(first(pool)) && !last(pool).Less(addr)
}

// next is the address of pool to give: going round from the one after previous,
// the first that is neither in use nor resting; when there is none, the one that
// has rested longest. So a released address is reused last, and what still has
// it in a cache has the longest time to forget it.
func next(pool netip.Prefix, previous netip.Addr, used *set, resting *queue) (netip.Addr, bool) {
	low, high := first(pool), last(pool)
	start := low
	if usable(pool, previous) && previous != high {
		start = previous.Next()
	}
	for addr := start; ; {
		if !used.has(addr) && !resting.has(addr) {
			return addr, true
		}
		if addr == high {
			addr = low
		} else {
			addr = addr.Next()
		}
		if addr == start {
			break
		}
	}
	for addr := range resting.oldestFirst() {
		if usable(pool, addr) && !used.has(addr) {
			return addr, true
		}
	}
	return netip.Addr{}, false
}

// maxResting bounds how many released addresses a family remembers. What is
// forgotten counts as never used, which is right: it rested longer than all that
// are remembered.
const maxResting = 4096

// queue holds released addresses in the order of their release.
type queue struct {
	order   []rest
	since   map[netip.Addr]uint64
	counter uint64
}

// rest is an address and when it was released. It is stale when since says
// otherwise: that spares a search in order whenever an address is given again.
type rest struct {
	addr  netip.Addr
	since uint64
}

func (q *queue) has(addr netip.Addr) bool {
	_, resting := q.since[addr]
	return resting
}

func (q *queue) add(addr netip.Addr) {
	if q.since == nil {
		q.since = map[netip.Addr]uint64{}
	}
	q.counter++
	q.since[addr] = q.counter
	q.order = append(q.order, rest{addr, q.counter})
	for len(q.since) > maxResting {
		if oldest := q.order[0]; q.since[oldest.addr] == oldest.since {
			delete(q.since, oldest.addr)
		}
		q.order = q.order[1:]
	}
}

func (q *queue) remove(addr netip.Addr) { delete(q.since, addr) }

func (q *queue) oldestFirst() func(yield func(netip.Addr) bool) {
	return func(yield func(netip.Addr) bool) {
		for _, r := range q.order {
			if q.since[r.addr] == r.since && !yield(r.addr) {
				return
			}
		}
	}
}
