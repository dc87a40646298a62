// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/model"
)

// services writes mooring_services, mooring_slots, mooring_backends and mooring_source_ranges.
type services struct {
	kernel *bpf.Datapath
	gone   func() // called when a backend is no longer one
	doors  *doors

	mu   sync.Mutex
	plan *plan
}

// RefusedError tells which services did not get into the maps, and why. All
// others did.
type RefusedError struct{ Services map[model.Name]error }

func (e *RefusedError) Error() string {
	names := slices.SortedFunc(maps.Keys(e.Services), func(a, b model.Name) int { return strings.Compare(a.String(), b.String()) })
	text := fmt.Sprintf("service %s: %v", names[0], e.Services[names[0]])
	if len(names) > 1 {
		text += fmt.Sprintf(" (and %d more services)", len(names)-1)
	}
	return text
}

// adoptServices takes over what the maps hold.
func adoptServices(d *bpf.Datapath, r *reaper, o *doors, maglev bool) (*services, error) {
	s := &services{kernel: d, gone: r.purgeBackends, doors: o}
	s.plan = newPlan(limits{d.Services.MaxEntries(), d.Slots.MaxEntries(), d.Backends.MaxEntries(), d.SourceRanges.MaxEntries()})
	s.plan.maglev = maglev
	return s, s.plan.adopt(pinned{d})
}

// ApplyFrontends brings the maps to what the named services want; nil: the
// service is gone. What is right already is not touched. A service that does
// not fit stays as it was, and the error says so; what the kernel refused to
// write is written by the next call.
func (s *services) ApplyFrontends(changed map[model.Name][]model.Frontend) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	// What an earlier call could not write comes first: an index that it frees
	// may have its next tenant in this one.
	if err := s.flush(); err != nil {
		return err
	}
	now := time.Now()
	refused := make(map[model.Name]error)
	for name, wanted := range changed {
		if err := s.plan.apply(name, wanted, now); err != nil {
			refused[name] = err
			continue
		}
		if s.plan.writes.large() {
			if err := s.flushAdditions(); err != nil {
				return err
			}
		}
	}
	if err := s.flush(); err != nil {
		return err
	}
	if len(refused) > 0 {
		return &RefusedError{refused}
	}
	return nil
}

// Synced says that every service was applied: what an earlier run left in the
// maps, and nobody wants now, goes.
func (s *services) Synced() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.flush(); err != nil {
		return err
	}
	s.plan.settle(time.Now())
	return s.flush()
}

// tableInterval is how often tables are tried again for which there was no room.
const tableInterval = 2 * time.Second

func (s *services) run(ctx context.Context, log *slog.Logger) {
	again := time.NewTicker(tableInterval)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-again.C:
		}
		if err := s.makeTables(); err != nil {
			log.Warn("make maglev tables for which there was no room", "error", err)
		}
	}
}

func (s *services) makeTables() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if made, err := s.plan.tables(time.Now()); err != nil || !made {
		return err
	}
	return s.flush()
}

// problems are what of the services is not as it was configured.
func (s *services) problems() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.plan.untabled) == 0 {
		return nil
	}
	return []string{fmt.Sprintf("the backends of %d services are chosen at random: mooring_slots (%d entries) has no room for their maglev tables",
		len(s.plan.untabled), s.plan.limits.slots)}
}

// flushAdditions writes what is new. The drivers' program looks for a frontend
// before that is there.
func (s *services) flushAdditions() error {
	addresses := make([]bpf.Addr, len(s.plan.writes.serviceKeys))
	for i := range addresses {
		addresses[i] = s.plan.writes.serviceKeys[i].Addr
	}
	if err := s.doors.open(addresses...); err != nil {
		return err
	}
	return s.plan.writes.flushAdditions(s.kernel)
}

func (s *services) flush() error {
	if err := s.flushAdditions(); err != nil {
		return err
	}
	gone, err := s.plan.writes.flushRemovals(s.kernel)
	if gone {
		s.gone()
	}
	return err
}

// writes are what waits to be written. What was written is dropped from it, so
// that nothing is lost when the kernel refuses some.
type writes struct {
	backendKeys   []uint32
	backendValues []bpf.Backend
	slotKeys      []uint32
	slotValues    []uint32
	rangeKeys     []bpf.SourceRangeKey
	rangeValues   []uint32
	serviceKeys   []bpf.ServiceKey
	serviceValues []bpf.Service
	removals      map[bpf.ServiceKey]struct{}
	rangeRemovals map[bpf.SourceRangeKey]struct{}
	freeKeys      []uint32
	freeValues    []bpf.Backend
}

func (w *writes) backend(t tenant, generation uint32) {
	w.backendKeys = append(w.backendKeys, t.index)
	w.backendValues = append(w.backendValues, bpf.Backend{Addr: t.addr, Port: t.port, Proto: t.proto, State: t.state, Generation: generation})
}

func (w *writes) free(t tenant, generation uint32) {
	w.freeKeys = append(w.freeKeys, t.index)
	w.freeValues = append(w.freeValues, bpf.Backend{Addr: t.addr, Port: t.port, Proto: t.proto, State: bpf.BackendFree, Generation: generation})
}

func (w *writes) run(r *run) {
	for i, index := range r.content {
		w.slotKeys = append(w.slotKeys, r.first+uint32(i))
		w.slotValues = append(w.slotValues, index)
	}
	w.slotKeys = append(w.slotKeys, r.first+uint32(len(r.content)))
	w.slotValues = append(w.slotValues, 0)
}

func (w *writes) service(key bpf.ServiceKey, value bpf.Service) {
	delete(w.removals, key)
	w.serviceKeys = append(w.serviceKeys, key)
	w.serviceValues = append(w.serviceValues, value)
}

func (w *writes) remove(key bpf.ServiceKey) {
	if w.removals == nil {
		w.removals = make(map[bpf.ServiceKey]struct{})
	}
	w.removals[key] = struct{}{}
}

func (w *writes) sourceRange(key bpf.SourceRangeKey) {
	delete(w.rangeRemovals, key)
	w.rangeKeys = append(w.rangeKeys, key)
	w.rangeValues = append(w.rangeValues, 1)
}

func (w *writes) removeRange(key bpf.SourceRangeKey) {
	if w.rangeRemovals == nil {
		w.rangeRemovals = make(map[bpf.SourceRangeKey]struct{})
	}
	w.rangeRemovals[key] = struct{}{}
}

// large tells that enough waits to be worth a few system calls.
func (w *writes) large() bool {
	return len(w.backendKeys) >= chunk || len(w.slotKeys) >= chunk || len(w.rangeKeys) >= chunk || len(w.serviceKeys) >= chunk
}

// flushAdditions writes what is new, in the order in which programs come to it
// from behind: a frontend is never seen before its slots and source ranges, nor
// the slots before their backends.
func (w *writes) flushAdditions(d *bpf.Datapath) error {
	var err error
	if w.backendKeys, w.backendValues, err = put(d.Backends, w.backendKeys, w.backendValues); err != nil {
		return fmt.Errorf("write mooring_backends: %w", err)
	}
	if w.slotKeys, w.slotValues, err = put(d.Slots, w.slotKeys, w.slotValues); err != nil {
		return fmt.Errorf("write mooring_slots: %w", err)
	}
	if w.rangeKeys, w.rangeValues, err = put(d.SourceRanges, w.rangeKeys, w.rangeValues); err != nil {
		return fmt.Errorf("write mooring_source_ranges: %w", err)
	}
	if w.serviceKeys, w.serviceValues, err = put(d.Services, w.serviceKeys, w.serviceValues); err != nil {
		if isFull(err) {
			return fmt.Errorf("write mooring_services: the map is full (%d entries)", d.Services.MaxEntries())
		}
		return fmt.Errorf("write mooring_services: %w", err)
	}
	return nil
}

// flushRemovals takes away what is not wanted any more, and tells whether
// backends are among it.
func (w *writes) flushRemovals(d *bpf.Datapath) (gone bool, err error) {
	for key := range w.removals {
		if err := d.Services.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return false, fmt.Errorf("remove from mooring_services: %w", err)
		}
		delete(w.removals, key)
	}
	for key := range w.rangeRemovals {
		if err := d.SourceRanges.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return false, fmt.Errorf("remove from mooring_source_ranges: %w", err)
		}
		delete(w.rangeRemovals, key)
	}
	before := len(w.freeKeys)
	w.freeKeys, w.freeValues, err = put(d.Backends, w.freeKeys, w.freeValues)
	if err != nil {
		err = fmt.Errorf("free backends in mooring_backends: %w", err)
	}
	return len(w.freeKeys) < before, err
}

// put writes elements and returns those that were not written, in memory that
// is used again unless it is large.
func put[K, V any](m *ebpf.Map, keys []K, values []V) ([]K, []V, error) {
	done := 0
	for done < len(keys) {
		n := min(len(keys)-done, chunk)
		written, err := m.BatchUpdate(keys[done:done+n], values[done:done+n], nil)
		if err != nil {
			return slices.Delete(keys, 0, done+written), slices.Delete(values, 0, done+written), err
		}
		done += n
	}
	if cap(keys) > 4*chunk {
		return nil, nil, nil
	}
	return keys[:0], values[:0], nil
}

// isFull tells that a map has no room for one more element.
func isFull(err error) bool { return errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) }
