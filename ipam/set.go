// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"encoding/binary"
	"net/netip"
)

// set is a set of addresses of one family, for the thousands in a row that a pool gives: a bit
// for each in blocks of 1024, so that a process that starts for one ADD and reads
// them all touches little memory.
type set struct {
	blocks map[block]*[16]uint64
	recent block // and its bits: neighbours come one after the other
	bits   *[16]uint64
}

// block is what 1024 neighbours have in common.
type block struct {
	hi, lo uint64
	v4     bool
}

func split(addr netip.Addr) (block, uint64) {
	b := addr.As16()
	lo := binary.BigEndian.Uint64(b[8:])
	return block{binary.BigEndian.Uint64(b[:8]), lo >> 10, addr.Is4()}, lo & 1023
}

func (s *set) find(b block) *[16]uint64 {
	if s.bits == nil || s.recent != b {
		s.recent, s.bits = b, s.blocks[b]
	}
	return s.bits
}

func (s *set) has(addr netip.Addr) bool {
	b, n := split(addr)
	bits := s.find(b)
	return bits != nil && bits[n/64]&(1<<(n%64)) != 0
}

// add says whether addr is new in the set.
func (s *set) add(addr netip.Addr) bool {
	b, n := split(addr)
	bits := s.find(b)
	if bits == nil {
		bits = new([16]uint64)
		if s.blocks == nil {
			s.blocks = map[block]*[16]uint64{}
		}
		s.blocks[b], s.bits = bits, bits
	}
	if bits[n/64]&(1<<(n%64)) != 0 {
		return false
	}
	bits[n/64] |= 1 << (n % 64)
	return true
}

// remove says whether addr was in the set.
func (s *set) remove(addr netip.Addr) bool {
	if !s.has(addr) {
		return false
	}
	_, n := split(addr)
	s.bits[n/64] &^= 1 << (n % 64)
	return true
}

func (s *set) each(yield func(netip.Addr) bool) {
	for block, bits := range s.blocks {
		for n := range uint64(1024) {
			if bits[n/64]&(1<<(n%64)) == 0 {
				continue
			}
			var b [16]byte
			binary.BigEndian.PutUint64(b[:8], block.hi)
			binary.BigEndian.PutUint64(b[8:], block.lo<<10|n)
			addr := netip.AddrFrom16(b)
			if block.v4 {
				addr = addr.Unmap()
			}
			if !yield(addr) {
				return
			}
		}
	}
}
