// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/maglev"
	"github.com/mooring-cni/mooring/daemon/model"
)

// plan is what the service maps hold, as far as it decides what to write next:
// which index each backend has, which run of slots each frontend. It turns what
// services want into writes, and touches nothing that is right already.
//
// Programs read while the daemon writes, without locks. So a run of slots and a
// backend in use are never changed in place, except a backend's state: a new
// run is written first, then the frontend's value switches to it, and what the
// old one held rests before it is used again.
type plan struct {
	limits    limits
	maglev    bool                    // clients beyond the uplinks get their backend by a table
	untabled  map[model.Name]untabled // services for whose table there was no room
	frontends map[bpf.ServiceKey]*frontend
	services  map[model.Name]*tenancy
	addresses map[bpf.Addr]*address
	backends  indices
	slots     extents
	ranges    map[uint32]map[bpf.SourceRangeKey]struct{} // by the frontend's id
	rangeSum  int                                        // of them
	lastID    uint32                                     // of a frontend
	inherited *inherited
	writes    writes

	// Scratch of one service's planning, kept for its memory.
	have  map[backendKey]tenant
	want  map[backendKey]int
	lists map[listKey]*run
}

// limits are the sizes of the maps.
type limits struct{ services, slots, backends, ranges uint32 }

// tenancy is what a service has in the maps.
type tenancy struct {
	keys    []bpf.ServiceKey
	tenants []tenant
}

// tenant is a backend of one service. Two services have their own for one
// address, so that what ends in one goes on in the other.
type tenant struct {
	backendKey
	state uint8
	index uint32
}

type backendKey struct {
	addr  bpf.Addr
	port  uint16 // as on the wire
	proto uint8
}

// frontend is an element of mooring_services.
type frontend struct {
	owner              *tenancy // nil: left by an earlier run and not asked for yet
	value              bpf.Service
	internal, external *run
	clusterIP          bool
}

// address is an element of mooring_services that says that an address is a
// service's. Without users, an earlier run left it.
type address struct{ users int }

// run is a run of mooring_slots: the indices that may be chosen, each once or as
// often as a maglev table has it, then those of backends that only keep their
// flows, then 0. Programs never read the second part: a daemon that starts finds
// there which service a backend is of.
type run struct {
	first   uint32
	chosen  uint32
	content []uint32
	users   int
	table   bool // a maglev table
	foreign bool // not understood: replaced at the first chance, and its slots are left alone
}

// inherited is what an earlier run left, until all services are known.
type inherited struct {
	backends []bpf.Backend // by index
	claimed  []bool
	leaving  []tenant // to be freed when nothing inherited leads there any more
}

// listKey is a list of backends by identity, and how one of them is chosen:
// frontends of a service share them.
type listKey struct {
	first, keep *model.Backend
	n           int
	table       bool
}

func newPlan(l limits) *plan {
	return &plan{
		limits:    l,
		frontends: make(map[bpf.ServiceKey]*frontend),
		services:  make(map[model.Name]*tenancy),
		addresses: make(map[bpf.Addr]*address),
		backends:  indices{next: 1, limit: l.backends},
		slots:     extents{free: []extent{{1, l.slots - 1}}},
		untabled:  make(map[model.Name]untabled),
		ranges:    make(map[uint32]map[bpf.SourceRangeKey]struct{}),
		have:      make(map[backendKey]tenant),
		want:      make(map[backendKey]int),
		lists:     make(map[listKey]*run),
	}
}

// untabled is a service whose clients beyond the uplinks get a backend at random,
// since no run of so many slots was free: it may be when others have rested.
type untabled struct {
	wanted []model.Frontend
	lack   uint32
}

var errFull = errors.New("is full")

// apply makes a service's frontends what is wanted. With an error nothing of it
// is changed.
func (p *plan) apply(name model.Name, wanted []model.Frontend, now time.Time) error {
	t := p.services[name]
	if t == nil {
		if len(wanted) == 0 {
			return nil
		}
		t = &tenancy{}
	}
	inherit := p.collect(t, wanted)
	tenants, missing := p.tenants(wanted)

	fresh := uint32(0) // elements of mooring_services, at most
	for i := range wanted {
		if p.frontends[serviceKey(wanted[i].AddrPort)] == nil {
			fresh += 2
		}
	}
	if fresh > 0 && uint32(len(p.frontends)+len(p.addresses))+fresh > p.limits.services {
		return fmt.Errorf("mooring_services %w (%d entries)", errFull, p.limits.services)
	}
	if fresh := p.freshRanges(t, wanted); fresh > 0 && p.rangeSum+len(p.writes.rangeRemovals)+fresh > int(p.limits.ranges) {
		return fmt.Errorf("mooring_source_ranges %w (%d entries)", errFull, p.limits.ranges)
	}
	if have := p.backends.available(now); missing > have {
		return fmt.Errorf("mooring_backends %w (%d of %d entries are left, %d are needed)", errFull, have, p.limits.backends, missing)
	}
	for i := range tenants {
		if tenants[i].index == 0 {
			tenants[i].index = p.backends.take(now)
		}
	}
	internal, external, lack, err := p.runs(wanted, tenants, now)
	if err != nil {
		for i := range tenants {
			if _, had := p.have[tenants[i].backendKey]; !had {
				p.backends.giveBack(tenants[i].index)
			}
		}
		return err
	}
	for _, index := range inherit {
		p.inherited.claimed[index] = true
	}
	if delete(p.untabled, name); lack > 0 {
		p.untabled[name] = untabled{wanted, lack}
	}
	p.commit(t, wanted, tenants, internal, external, now)
	if p.services[name] = t; len(t.keys) == 0 {
		delete(p.services, name)
	}
	return nil
}

// collect fills p.have with the backends that the service has, and returns the
// indices of those that it takes over from an earlier run.
func (p *plan) collect(t *tenancy, wanted []model.Frontend) (inherit []uint32) {
	clear(p.have)
	for _, tenant := range t.tenants {
		p.have[tenant.backendKey] = tenant
	}
	if p.inherited == nil {
		return nil
	}
	for i := range wanted {
		f := p.frontends[serviceKey(wanted[i].AddrPort)]
		if f == nil || f.owner != nil {
			continue
		}
		for _, r := range []*run{f.internal, f.external} {
			if r == nil {
				continue
			}
			for _, index := range r.content {
				if int(index) >= len(p.inherited.backends) || p.inherited.claimed[index] {
					continue
				}
				b := &p.inherited.backends[index]
				key := backendKey{b.Addr, b.Port, b.Proto}
				if _, known := p.have[key]; !known && b.State != bpf.BackendFree {
					p.have[key] = tenant{key, b.State, index}
					inherit = append(inherit, index)
				}
			}
		}
	}
	return inherit
}

// tenants are the wanted backends, each once, with the index that it has, and
// the number of those that have none. p.want is where each is in the list.
func (p *plan) tenants(wanted []model.Frontend) (tenants []tenant, missing int) {
	clear(p.want)
	clear(p.lists)
	count := 0
	for i := range wanted {
		count = max(count, len(wanted[i].Internal)+len(wanted[i].Keep))
	}
	tenants = make([]tenant, 0, count)
	add := func(list []model.Backend, keep bool) {
		if len(list) == 0 {
			return
		}
		id := listKey{first: &list[0], n: len(list)}
		if _, seen := p.lists[id]; seen {
			return
		}
		p.lists[id] = nil
		for i := range list {
			state := bpf.BackendActive
			if keep || list[i].State != model.Active {
				state = bpf.BackendTerminating
			}
			key := backendKeyOf(list[i].AddrPort)
			at, there := p.want[key]
			if !there {
				at = len(tenants)
				p.want[key] = at
				tenants = append(tenants, tenant{backendKey: key, state: state, index: p.have[key].index})
				if tenants[at].index == 0 {
					missing++
				}
			}
			if state == bpf.BackendActive {
				tenants[at].state = state
			}
		}
	}
	for i := range wanted {
		add(wanted[i].Internal, false)
		add(wanted[i].External, false)
		add(wanted[i].Keep, true)
	}
	return tenants, missing
}

// runs are the slots of each wanted frontend: those that it has where they are
// right, else new ones. Lack is how many slots a maglev table needed and did not find.
func (p *plan) runs(wanted []model.Frontend, tenants []tenant, now time.Time) (internal, external []*run, lack uint32, err error) {
	clear(p.lists)
	var made []*run
	find := func(list, keep []model.Backend, table bool, current *run) (*run, error) {
		if len(list)+len(keep) == 0 {
			return nil, nil
		}
		id := listKey{n: len(list), table: table}
		if id.n > 0 {
			id.first = &list[0]
		}
		if len(keep) > 0 {
			id.keep = &keep[0]
		}
		if r := p.lists[id]; r != nil {
			return r, nil
		}
		content, chosen := p.content(list, keep, tenants, table)
		r := current
		if r == nil || r.foreign || r.chosen != chosen || !slices.Equal(r.content, content) {
			first, ok := p.slots.take(uint32(len(content))+1, now)
			if !ok && table {
				// Any choice is better than none.
				table, lack = false, max(lack, uint32(len(content))+1)
				content, chosen = p.content(list, keep, tenants, table)
				first, ok = p.slots.take(uint32(len(content))+1, now)
			}
			if !ok {
				return nil, fmt.Errorf("mooring_slots %w (%d entries; a run of %d does not fit)", errFull, p.limits.slots, len(content)+1)
			}
			r = &run{first: first, chosen: chosen, content: content}
			made = append(made, r)
		}
		r.table = table
		p.lists[id] = r
		return r, nil
	}
	tabled := p.tabled(wanted)
	internal, external = make([]*run, len(wanted)), make([]*run, len(wanted))
	for i := range wanted {
		w := &wanted[i]
		var has frontend
		if f := p.frontends[serviceKey(w.AddrPort)]; f != nil {
			has = *f
		}
		if internal[i], err = find(w.Internal, w.Keep, false, has.internal); err != nil {
			break
		}
		table := len(w.External) > 0 && tabled[listKey{first: &w.External[0], n: len(w.External)}]
		if !table && sameList(w.Internal, w.External) {
			external[i] = internal[i]
		} else if external[i], err = find(w.External, nil, table, has.external); err != nil {
			break
		}
	}
	if err != nil {
		for _, r := range made {
			p.slots.giveBack(extent{r.first, uint32(len(r.content)) + 1})
		}
		return nil, nil, 0, err
	}
	for _, r := range made {
		p.writes.run(r)
	}
	return internal, external, lack, nil
}

func sameList(a, b []model.Backend) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}

// tabled are the lists of which clients beyond the uplinks get a backend by a
// maglev table, where there is a choice: those of addresses that are made for such
// clients. A ClusterIP has one where it shares their list; a table for each of a
// cluster's services would need more room than there is.
func (p *plan) tabled(wanted []model.Frontend) map[listKey]bool {
	if !p.maglev {
		return nil
	}
	tabled := make(map[listKey]bool)
	for i := range wanted {
		w := &wanted[i]
		choice := 0
		for j := range w.External {
			if w.External[j].Selectable {
				choice++
			}
		}
		if w.Kind != model.ClusterIP && choice > 1 {
			tabled[listKey{first: &w.External[0], n: len(w.External)}] = true
		}
	}
	return tabled
}

// tables makes the tables for which there was no room and is now, and tells
// whether it did.
func (p *plan) tables(now time.Time) (made bool, err error) {
	for name, u := range p.untabled {
		if !p.slots.has(u.lack, now) {
			continue
		}
		if err := p.apply(name, u.wanted, now); err != nil {
			return made, err
		}
		made = true
	}
	return made, nil
}

// content is what a run for these lists holds.
func (p *plan) content(list, keep []model.Backend, tenants []tenant, table bool) (content []uint32, chosen uint32) {
	content = make([]uint32, 0, len(list)+len(keep))
	index := func(b *model.Backend) uint32 { return tenants[p.want[backendKeyOf(b.AddrPort)]].index }
	for i := range list {
		if list[i].Selectable {
			content = append(content, index(&list[i]))
		}
	}
	if table {
		content = p.spread(list, content)
	}
	chosen = uint32(len(content))
	for i := range list {
		if !list[i].Selectable {
			content = append(content, index(&list[i]))
		}
	}
	for i := range keep {
		content = append(content, index(&keep[i]))
	}
	return content, chosen
}

// spread makes a maglev table of the indices of a list's selectable backends.
func (p *plan) spread(list []model.Backend, indices []uint32) []uint32 {
	backends := make([]model.AddrPort, 0, len(indices))
	for i := range list {
		if list[i].Selectable {
			backends = append(backends, list[i].AddrPort)
		}
	}
	// One table takes an eighth at most: the next one needs its place while it is in use.
	table := maglev.Table(backends, maglev.Size(len(backends), int(p.limits.slots/8)))
	if table == nil {
		return indices
	}
	for i, at := range table {
		table[i] = indices[at]
	}
	return table
}

// commit notes what is new and queues its writing.
func (p *plan) commit(t *tenancy, wanted []model.Frontend, tenants []tenant, internal, external []*run, now time.Time) {
	for _, n := range tenants {
		had, there := p.have[n.backendKey]
		if !there {
			p.backends.generations[n.index]++
		}
		if !there || had.state != n.state {
			p.writes.backend(n, p.backends.generations[n.index])
		}
	}
	keys := make([]bpf.ServiceKey, len(wanted))
	for i := range wanted {
		keys[i] = serviceKey(wanted[i].AddrPort)
		p.put(keys[i], &wanted[i], t, internal[i], external[i], now)
	}
	for _, key := range t.keys {
		if f := p.frontends[key]; f != nil && f.owner == t && !slices.Contains(keys, key) {
			p.remove(key, f, now)
		}
	}
	for key, had := range p.have {
		if _, still := p.want[key]; !still {
			p.evict(had, now)
		}
	}
	t.keys, t.tenants = keys, tenants
}

func (p *plan) put(key bpf.ServiceKey, w *model.Frontend, t *tenancy, internal, external *run, now time.Time) {
	f := p.frontends[key]
	value := bpf.Service{
		Flags: bpf.ServiceExternal, AffinitySeconds: uint32(w.AffinityTimeout / time.Second),
		Internal: internal.slots(), External: external.slots(),
	}
	if w.HasEndpoints && w.InternalLocal {
		value.Flags |= bpf.ServiceInternalLocal
	}
	// From outside, an address of the cluster is used as from inside.
	if w.HasEndpoints && (w.ExternalLocal || w.InternalLocal && w.Kind == model.ClusterIP) {
		value.Flags |= bpf.ServiceExternalLocal
	}
	if len(w.SourceRanges) > 0 {
		value.Flags |= bpf.ServiceSourceRanges
	}
	if external != nil && external.table {
		value.Flags |= bpf.ServiceMaglev
	}
	if f != nil && (f.owner == nil || f.owner == t) {
		value.Id = f.value.Id
	} else {
		p.lastID = max(p.lastID+1, 1)
		value.Id = p.lastID
	}
	internal.use()
	external.use()
	if f == nil {
		f = &frontend{}
		p.frontends[key] = f
	}
	if f.value.Id != value.Id {
		p.setRanges(f.value.Id, nil)
	}
	p.setRanges(value.Id, sourceRanges(value.Id, w))
	if f.value != value {
		f.value = value
		p.writes.service(key, value)
	}
	p.release(f.internal, now)
	p.release(f.external, now)
	f.owner, f.internal, f.external = t, internal, external
	p.claimAddress(f, key.Addr, w.Kind == model.ClusterIP)
}

// remove takes a frontend away.
func (p *plan) remove(key bpf.ServiceKey, f *frontend, now time.Time) {
	delete(p.frontends, key)
	p.writes.remove(key)
	p.setRanges(f.value.Id, nil)
	p.release(f.internal, now)
	p.release(f.external, now)
	p.claimAddress(f, key.Addr, false)
}

// claimAddress keeps the element that says that an address is a service's as
// long as one of its frontends is a ClusterIP: what has no service there is
// refused. Other kinds of addresses may be used for other things as well.
func (p *plan) claimAddress(f *frontend, addr bpf.Addr, is bool) {
	if f.clusterIP == is {
		return
	}
	f.clusterIP = is
	a := p.addresses[addr]
	if is {
		if a == nil {
			a = &address{}
			p.addresses[addr] = a
			p.writes.service(bpf.ServiceKey{Addr: addr}, bpf.Service{Id: ^uint32(0), Flags: bpf.ServiceAddress})
		}
		a.users++
		return
	}
	if a.users--; a.users == 0 {
		p.dropAddress(addr)
	}
}

func (p *plan) dropAddress(addr bpf.Addr) {
	delete(p.addresses, addr)
	p.writes.remove(bpf.ServiceKey{Addr: addr})
}

// evict frees a backend's index. The next tenant has another generation.
func (p *plan) evict(t tenant, now time.Time) {
	if p.inherited != nil {
		// A frontend of an earlier run that nobody asked for yet may lead to it.
		p.inherited.leaving = append(p.inherited.leaving, t)
		return
	}
	t.state = bpf.BackendFree
	p.writes.free(t, p.backends.generations[t.index])
	p.backends.retire(t.index, now)
}

// settle drops what an earlier run left and nobody asked for.
func (p *plan) settle(now time.Time) {
	left := p.inherited
	if left == nil {
		return
	}
	p.inherited = nil
	for key, f := range p.frontends {
		if f.owner == nil {
			p.remove(key, f, now)
		}
	}
	for addr, a := range p.addresses {
		if a.users == 0 {
			p.dropAddress(addr)
		}
	}
	for index, b := range left.backends {
		if index > 0 && b.State != bpf.BackendFree && !left.claimed[index] {
			p.evict(tenant{backendKey{b.Addr, b.Port, b.Proto}, b.State, uint32(index)}, now)
		}
	}
	for _, t := range left.leaving {
		p.evict(t, now)
	}
}

func (r *run) slots() bpf.Slots {
	if r == nil {
		return bpf.Slots{}
	}
	return bpf.Slots{First: r.first, Count: r.chosen}
}

func (r *run) use() {
	if r != nil {
		r.users++
	}
}

func (p *plan) release(r *run, now time.Time) {
	if r == nil {
		return
	}
	if r.users--; r.users == 0 && !r.foreign {
		p.slots.retire(extent{r.first, uint32(len(r.content)) + 1}, now)
	}
}

func serviceKey(a model.AddrPort) bpf.ServiceKey {
	return bpf.ServiceKey{Addr: bpf.ToAddr(a.Addr), Port: bpf.Port(a.Port), Proto: uint8(a.Protocol)}
}

func backendKeyOf(a model.AddrPort) backendKey {
	return backendKey{bpf.ToAddr(a.Addr), bpf.Port(a.Port), uint8(a.Protocol)}
}
