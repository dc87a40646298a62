// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/policy"
)

// policies writes mooring_policies and the maps that it leads to.
type policies struct {
	bpf *bpf.Datapath
	mu  sync.Mutex
	// written are the entries of each profile, whose keys have to be known to
	// take it away again.
	written map[policy.ID][]bpf.ProfileKey
}

// ApplyPolicy writes a difference. Its order is such that nothing is allowed at
// any moment that neither the state before nor the one after allows. When it
// returns, every packet is judged by the new state.
func (p *policies) ApplyPolicy(u *policy.Update) error {
	if u.Empty() {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.write(u)
	// What was written counts, even if not everything could be.
	return errors.Join(err, p.bpf.Invalidate())
}

func (p *policies) write(u *policy.Update) error {
	for _, step := range []func(*policy.Update) error{
		p.writeProfiles, p.writeVerdicts, p.writeAddresses, p.writeEndpoints,
		p.closeEndpoints, p.removeAddresses, p.removeVerdicts, p.removeProfiles,
	} {
		if err := step(u); err != nil {
			return err
		}
	}
	return nil
}

// profileEntry is an entry as the trie has it: no bits are the whole profile.
func profileEntry(id policy.ID, e policy.Entry) (bpf.ProfileKey, uint32) {
	bits := 8 + e.Bits
	if e.Any {
		bits = 0
	}
	allow := uint32(0)
	if e.Allow {
		allow = 1
	}
	return bpf.ToProfileKey(uint64(id), bits, uint8(e.Protocol), e.Port), allow
}

func (p *policies) writeProfiles(u *policy.Update) error {
	for id, profile := range u.Profiles {
		keys := make([]bpf.ProfileKey, 0, len(profile.Entries))
		for _, e := range profile.Entries {
			key, allow := profileEntry(id, e)
			if err := put1(p.bpf.Profiles, "mooring_profiles", &key, &allow); err != nil {
				return err
			}
			keys = append(keys, key)
		}
		p.written[id] = keys
	}
	return nil
}

func (p *policies) writeVerdicts(u *policy.Update) error {
	keys, values := make([]bpf.VerdictKey, 0, len(u.Verdicts)), make([]uint64, 0, len(u.Verdicts))
	for pair, profile := range u.Verdicts {
		keys = append(keys, verdictKey(pair))
		values = append(values, uint64(profile))
	}
	return putAll(p.bpf.Verdicts, "mooring_verdicts", keys, values)
}

func verdictKey(pair policy.Pair) bpf.VerdictKey {
	return bpf.VerdictKey{Ruleset: uint64(pair.Ruleset), Identity: uint64(pair.Identity)}
}

func (p *policies) writeAddresses(u *policy.Update) error {
	keys, values := make([]bpf.IdentityKey, 0, len(u.Addresses)), make([]uint64, 0, len(u.Addresses))
	for prefix, id := range u.Addresses {
		keys = append(keys, bpf.ToIdentityKey(prefix))
		values = append(values, uint64(id))
	}
	return putAll(p.bpf.Identities, "mooring_identities", keys, values)
}

func (p *policies) writeEndpoints(u *policy.Update) error {
	for id, e := range u.Endpoints {
		value := bpf.EndpointPolicy{}
		value.Ruleset[bpf.PolicyIngress] = uint64(e[policy.Ingress])
		value.Ruleset[bpf.PolicyEgress] = uint64(e[policy.Egress])
		if err := put1(p.bpf.Policies, "mooring_policies", &id, &value); err != nil {
			return err
		}
	}
	return nil
}

func (p *policies) closeEndpoints(u *policy.Update) error {
	for _, id := range u.GoneEndpoints {
		if err := p.closeEndpoint(id); err != nil {
			return err
		}
	}
	return nil
}

// closeEndpoint makes the id's next owner wait for policies of its own.
func (p *policies) closeEndpoint(id uint32) error {
	return put1(p.bpf.Policies, "mooring_policies", &id, &bpf.EndpointPolicy{})
}

func (p *policies) removeAddresses(u *policy.Update) error {
	for _, prefix := range u.GoneAddresses {
		key := bpf.ToIdentityKey(prefix)
		if err := remove1(p.bpf.Identities, "mooring_identities", &key); err != nil {
			return err
		}
	}
	return nil
}

func (p *policies) removeVerdicts(u *policy.Update) error {
	for _, pair := range u.GoneVerdicts {
		key := verdictKey(pair)
		if err := remove1(p.bpf.Verdicts, "mooring_verdicts", &key); err != nil {
			return err
		}
	}
	return nil
}

func (p *policies) removeProfiles(u *policy.Update) error {
	for _, id := range u.GoneProfiles {
		for _, key := range p.written[id] {
			if err := remove1(p.bpf.Profiles, "mooring_profiles", &key); err != nil {
				return err
			}
		}
		delete(p.written, id)
	}
	return nil
}

func put1(m *ebpf.Map, name string, key, value any) error {
	err := m.Put(key, value)
	if isFull(err) {
		return fmt.Errorf("write %s: the map is full (%d entries)", name, m.MaxEntries())
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

func putAll[K, V any](m *ebpf.Map, name string, keys []K, values []V) error {
	const chunk = 4096
	for len(keys) > 0 {
		n := min(len(keys), chunk)
		_, err := m.BatchUpdate(keys[:n], values[:n], nil)
		if errors.Is(err, ebpf.ErrNotSupported) {
			for i := range keys[:n] {
				if err := put1(m, name, &keys[i], &values[i]); err != nil {
					return err
				}
			}
			err = nil
		}
		if isFull(err) {
			return fmt.Errorf("write %s: the map is full (%d entries)", name, m.MaxEntries())
		}
		if err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		keys, values = keys[n:], values[n:]
	}
	return nil
}

func remove1(m *ebpf.Map, name string, key any) error {
	if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete from %s: %w", name, err)
	}
	return nil
}

// SyncPolicy brings the maps to a whole state from whatever an earlier run left
// in them. Because numbers follow from what they name, a restart with the same
// policies finds its own entries and changes none.
func (p *policies) SyncPolicy(state *policy.Update) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	u := &policy.Update{
		Profiles: maps.Clone(state.Profiles), Verdicts: maps.Clone(state.Verdicts),
		Addresses: maps.Clone(state.Addresses), Endpoints: maps.Clone(state.Endpoints),
	}
	if err := p.compareProfiles(state, u); err != nil {
		return err
	}
	if err := p.compareVerdicts(state, u); err != nil {
		return err
	}
	if err := p.compareAddresses(state, u); err != nil {
		return err
	}
	if err := p.compareEndpoints(state, u); err != nil {
		return err
	}
	if err := p.write(u); err != nil {
		return errors.Join(err, p.bpf.Invalidate())
	}
	return p.bpf.Invalidate()
}

func (p *policies) compareProfiles(state, u *policy.Update) error {
	want := make(map[bpf.ProfileKey]uint32)
	for id, profile := range state.Profiles {
		keys := make([]bpf.ProfileKey, 0, len(profile.Entries))
		for _, e := range profile.Entries {
			key, allow := profileEntry(id, e)
			want[key] = allow
			keys = append(keys, key)
		}
		p.written[id] = keys
	}
	missing := make(map[policy.ID]int)
	for id, profile := range state.Profiles {
		missing[id] = len(profile.Entries)
	}
	stale := make(map[policy.ID][]bpf.ProfileKey)
	var key bpf.ProfileKey
	var allow uint32
	entries := p.bpf.Profiles.Iterate()
	for entries.Next(&key, &allow) {
		id := policy.ID(key.ID())
		wanted, known := want[key]
		switch {
		case !known:
			stale[id] = append(stale[id], key)
		case wanted == allow:
			missing[id]--
		}
	}
	if err := entries.Err(); err != nil {
		return fmt.Errorf("read mooring_profiles: %w", err)
	}
	for id, n := range missing {
		if n == 0 {
			delete(u.Profiles, id)
		}
	}
	for id, keys := range stale {
		if state.Profiles[id] != nil { // half of it was written
			for _, key := range keys {
				if err := remove1(p.bpf.Profiles, "mooring_profiles", &key); err != nil {
					return err
				}
			}
			continue
		}
		p.written[id] = keys
		u.GoneProfiles = append(u.GoneProfiles, id)
	}
	return nil
}

func (p *policies) compareVerdicts(state, u *policy.Update) error {
	var key bpf.VerdictKey
	var profile uint64
	entries := p.bpf.Verdicts.Iterate()
	for entries.Next(&key, &profile) {
		pair := policy.Pair{Ruleset: policy.ID(key.Ruleset), Identity: policy.ID(key.Identity)}
		want, known := state.Verdicts[pair]
		switch {
		case !known:
			u.GoneVerdicts = append(u.GoneVerdicts, pair)
		case want == policy.ID(profile):
			delete(u.Verdicts, pair)
		}
	}
	if err := entries.Err(); err != nil {
		return fmt.Errorf("read mooring_verdicts: %w", err)
	}
	return nil
}

func (p *policies) compareAddresses(state, u *policy.Update) error {
	var key bpf.IdentityKey
	var id uint64
	entries := p.bpf.Identities.Iterate()
	for entries.Next(&key, &id) {
		prefix := key.Prefix()
		want, known := state.Addresses[prefix]
		switch {
		case !known:
			u.GoneAddresses = append(u.GoneAddresses, prefix)
		case want == policy.ID(id):
			delete(u.Addresses, prefix)
		}
	}
	if err := entries.Err(); err != nil {
		return fmt.Errorf("read mooring_identities: %w", err)
	}
	return nil
}

func (p *policies) compareEndpoints(state, u *policy.Update) error {
	return scan(p.bpf.Policies, func(keys []uint32, values []bpf.EndpointPolicy) bool {
		for i, id := range keys {
			want, known := state.Endpoints[id]
			have := policy.EndpointPolicy{
				policy.Ingress: policy.ID(values[i].Ruleset[bpf.PolicyIngress]),
				policy.Egress:  policy.ID(values[i].Ruleset[bpf.PolicyEgress]),
			}
			switch {
			case !known && have != policy.EndpointPolicy{}:
				u.GoneEndpoints = append(u.GoneEndpoints, id)
			case known && want == have:
				delete(u.Endpoints, id)
			}
		}
		return true
	})
}

// PolicyDrops counts what each ruleset denied since its counter was made.
func (p *policies) PolicyDrops() (map[policy.ID]uint64, error) {
	drops := make(map[policy.ID]uint64)
	var ruleset uint64
	var perCPU []bpf.Counter
	entries := p.bpf.PolicyDrops.Iterate()
	for entries.Next(&ruleset, &perCPU) {
		for _, c := range perCPU {
			drops[policy.ID(ruleset)] += c.Packets
		}
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("read mooring_policy_drops: %w", err)
	}
	return drops, nil
}

// ForgetPolicyDrops takes the counters of rulesets away that nobody has any more.
func (p *policies) ForgetPolicyDrops(rulesets []policy.ID) error {
	for _, id := range rulesets {
		key := uint64(id)
		if err := remove1(p.bpf.PolicyDrops, "mooring_policy_drops", &key); err != nil {
			return err
		}
	}
	return nil
}

// TryPacket runs the programs on a made packet that begins a flow, as they are
// attached to a pod's interface: the source's, or where that is none of this
// node, the destination's. It tells whether the packet passes. It is counted as
// any other; what it leaves in the connection table is taken away.
func (p *policies) TryPacket(q policy.Query) (bool, error) {
	prog, name := p.bpf.FromContainer, "from_container"
	var ep bpf.Endpoint
	key := bpf.ToAddr(q.From)
	if err := p.bpf.Endpoints.Lookup(&key, &ep); err != nil {
		prog, name = p.bpf.ToContainer, "to_container"
		key = bpf.ToAddr(q.To)
		if err := p.bpf.Endpoints.Lookup(&key, &ep); err != nil {
			return false, fmt.Errorf("try a packet from %s to %s: neither is a pod of this node", q.From, q.To)
		}
	}
	port, err := p.quietPort(q)
	if err != nil {
		return false, err
	}
	frame := probe(q, port, ep.Mac, ep.HostMac, name == "from_container")
	context := struct {
		_       [10]uint32
		Ifindex uint32
	}{Ifindex: ep.Ifindex}
	result, err := prog.Run(&ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256), Context: context})
	if err != nil {
		return false, fmt.Errorf("run %s on a packet from %s to %s: %w", name, q.From, q.To, err)
	}
	const shot = 2 // TC_ACT_SHOT
	return result != shot, p.forget(q, port)
}

// quietPort is a source port that the two do not use for anything.
func (p *policies) quietPort(q policy.Query) (uint16, error) {
	for port := uint16(1); port < 1024; port++ {
		var entry bpf.CTEntry
		key := flowKey(q, port)
		if p.bpf.CT.Lookup(&key, &entry) != nil && p.bpf.Embryonic.Lookup(&key, &entry) != nil {
			return port, nil
		}
	}
	return 0, fmt.Errorf("try a packet from %s to %s: no source port is free", q.From, q.To)
}

func (p *policies) forget(q policy.Query, port uint16) error {
	key := flowKey(q, port)
	return remove1(p.bpf.Embryonic, "mooring_ct_embryonic", &key)
}

func flowKey(q policy.Query, port uint16) bpf.CTKey {
	from, to := netip.AddrPortFrom(q.From, port), netip.AddrPortFrom(q.To, q.Port)
	if !hasPorts(q.Protocol) { // both ports are the identifier of an echo
		to = netip.AddrPortFrom(q.To, port)
	}
	return bpf.FlowKey(uint8(q.Protocol), from, to)
}
