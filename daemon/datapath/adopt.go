// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/bpf"
)

// pinned reads the service maps. Each read ends when visit wants no more.
type pinned struct{ *bpf.Datapath }

func (p pinned) services(visit func(bpf.ServiceKey, bpf.Service)) error {
	return scan(p.Services, func(keys []bpf.ServiceKey, values []bpf.Service) bool {
		for i := range keys {
			visit(keys[i], values[i])
		}
		return true
	})
}

func (p pinned) slots(visit func([]uint32) bool) error {
	return scan(p.Slots, func(_, values []uint32) bool { return visit(values) })
}

func (p pinned) backends(visit func([]bpf.Backend) bool) error {
	return scan(p.Backends, func(_ []uint32, values []bpf.Backend) bool { return visit(values) })
}

func (p pinned) sourceRanges(visit func(bpf.SourceRangeKey)) error {
	return scan(p.SourceRanges, func(keys []bpf.SourceRangeKey, _ []uint32) bool {
		for i := range keys {
			visit(keys[i])
		}
		return true
	})
}

func scan[K, V any](m *ebpf.Map, visit func([]K, []V) bool) error {
	keys, values := make([]K, chunk), make([]V, chunk)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("read %s: %w", m, err)
		}
		if !visit(keys[:n], values[:n]) || err != nil {
			return nil
		}
	}
}

// reader is where a plan learns what the maps hold.
type reader interface {
	services(visit func(bpf.ServiceKey, bpf.Service)) error
	slots(visit func([]uint32) bool) error
	backends(visit func([]bpf.Backend) bool) error
	sourceRanges(visit func(bpf.SourceRangeKey)) error
}

// adopt takes over what the maps hold: frontends without owners, which their
// services take, with the backends in their slots, when they are applied.
func (p *plan) adopt(maps reader) error {
	if err := maps.services(func(key bpf.ServiceKey, value bpf.Service) {
		if value.Flags&bpf.ServiceAddress != 0 {
			p.addresses[key.Addr] = &address{}
			return
		}
		p.frontends[key] = &frontend{value: value}
		p.lastID = max(p.lastID, value.Id)
	}); err != nil {
		return err
	}
	if err := p.adoptRanges(maps); err != nil {
		return err
	}
	if err := p.adoptBackends(maps); err != nil {
		return err
	}
	return p.adoptRuns(maps)
}

func (p *plan) adoptBackends(maps reader) error {
	left := &inherited{}
	err := maps.backends(func(values []bpf.Backend) bool {
		for _, b := range values {
			// Indices are used from the lowest on: what follows one that never
			// had a tenant never had one either.
			if b.Generation == 0 && len(left.backends) > 0 {
				return false
			}
			left.backends = append(left.backends, b)
		}
		return true
	})
	if err != nil {
		return err
	}
	left.claimed = make([]bool, len(left.backends))
	p.inherited = left
	for i, b := range left.backends {
		p.backends.generations = append(p.backends.generations, b.Generation)
		if i > 0 && b.State == bpf.BackendFree {
			p.backends.free = append(p.backends.free, uint32(i))
		}
	}
	p.backends.next = max(uint32(len(left.backends)), 1)
	return nil
}

func (p *plan) adoptRuns(maps reader) error {
	runs := make(map[bpf.Slots]*run)
	var sorted []*run
	get := func(s bpf.Slots) *run {
		if s == (bpf.Slots{}) {
			return nil
		}
		r := runs[s]
		if r == nil {
			r = &run{first: s.First, chosen: s.Count}
			runs[s] = r
			sorted = append(sorted, r)
		}
		r.users++
		return r
	}
	for _, f := range p.frontends {
		f.internal, f.external = get(f.value.Internal), get(f.value.External)
	}
	slices.SortFunc(sorted, func(a, b *run) int { return cmp.Compare(a.first, b.first) })
	if err := readRuns(maps, sorted); err != nil {
		return err
	}
	// The gaps between the runs are free.
	var free []extent
	next := uint32(1)
	for i, r := range sorted {
		end := r.first + uint32(len(r.content)) + 1
		if r.first < next || end > p.limits.slots {
			r.foreign = true
			if i > 0 {
				sorted[i-1].foreign = true
			}
		}
		if r.first > next {
			free = append(free, extent{next, r.first - next})
		}
		next = max(next, end)
	}
	if next < p.limits.slots {
		free = append(free, extent{next, p.limits.slots - next})
	}
	p.slots.free = free
	return nil
}

// readRuns fills the runs, sorted by place, in one pass over the slots: each
// holds what may be chosen and then all up to the first 0.
func readRuns(maps reader, sorted []*run) error {
	if len(sorted) == 0 {
		return nil
	}
	at := uint32(0)
	waiting, open := sorted, []*run(nil)
	return maps.slots(func(values []uint32) bool {
		for _, value := range values {
			for len(waiting) > 0 && waiting[0].first == at {
				open = append(open, waiting[0])
				waiting = waiting[1:]
			}
			open = slices.DeleteFunc(open, func(r *run) bool {
				if value == 0 && uint32(len(r.content)) >= r.chosen {
					return true
				}
				r.content = append(r.content, value)
				return false
			})
			at++
		}
		return len(waiting)+len(open) > 0
	})
}
