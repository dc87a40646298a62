// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/model"
)

// sourceRanges are the elements of mooring_source_ranges for a frontend, of its
// own family: an IPv6 prefix such as ::/0 has the IPv4-mapped addresses in it.
func sourceRanges(id uint32, w *model.Frontend) map[bpf.SourceRangeKey]struct{} {
	if len(w.SourceRanges) == 0 {
		return nil
	}
	keys := make(map[bpf.SourceRangeKey]struct{}, len(w.SourceRanges))
	for _, r := range w.SourceRanges {
		if r.Addr().Is4() != w.Addr.Is4() {
			continue
		}
		// Without host bits: prefixes that differ in no others are one element.
		bits := r.Bits() + 128 - r.Addr().BitLen()
		keys[bpf.SourceRangeKey{Prefixlen: uint32(32 + bits), Service: id, Addr: r.Masked().Addr().As16()}] = struct{}{}
	}
	return keys
}

// freshRanges is how many elements wanted frontends need that they have not, at most.
func (p *plan) freshRanges(t *tenancy, wanted []model.Frontend) (fresh int) {
	for i := range wanted {
		if len(wanted[i].SourceRanges) == 0 {
			continue
		}
		var id uint32
		if f := p.frontends[serviceKey(wanted[i].AddrPort)]; f != nil && (f.owner == nil || f.owner == t) {
			id = f.value.Id
		}
		for key := range sourceRanges(id, &wanted[i]) {
			if _, there := p.ranges[id][key]; !there {
				fresh++
			}
		}
	}
	return fresh
}

// setRanges makes a frontend's source ranges what is wanted. All of the new ones
// are there before the frontend asks for them, and the old ones until it does not:
// nobody gets in meanwhile whom neither lets in.
func (p *plan) setRanges(id uint32, wanted map[bpf.SourceRangeKey]struct{}) {
	has := p.ranges[id]
	for key := range wanted {
		if _, there := has[key]; !there {
			p.writes.sourceRange(key)
		}
	}
	for key := range has {
		if _, still := wanted[key]; !still {
			p.writes.removeRange(key)
		}
	}
	p.rangeSum += len(wanted) - len(has)
	if p.ranges[id] = wanted; len(wanted) == 0 {
		delete(p.ranges, id)
	}
}

// adoptRanges takes over the source ranges of an earlier run, and removes those
// that it left without their frontend.
func (p *plan) adoptRanges(maps reader) error {
	err := maps.sourceRanges(func(key bpf.SourceRangeKey) {
		if p.ranges[key.Service] == nil {
			p.ranges[key.Service] = make(map[bpf.SourceRangeKey]struct{})
		}
		p.ranges[key.Service][key] = struct{}{}
		p.rangeSum++
	})
	if err != nil {
		return err
	}
	used := make(map[uint32]bool, len(p.frontends))
	for _, f := range p.frontends {
		used[f.value.Id] = true
	}
	for id := range p.ranges {
		p.lastID = max(p.lastID, id)
		if !used[id] {
			p.setRanges(id, nil)
		}
	}
	return nil
}
