// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"
	"slices"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/bpf"
)

// doors writes mooring_doors: by which addresses somebody may be reached who
// services concern. A bit too many costs a look-up; without its own the programs do not know an
// address at all. So bits are set before addresses are written, and only the next start takes any away.
type doors struct {
	bpf *bpf.Datapath

	mu    sync.Mutex
	words []uint64
}

// openDoors takes the addresses that the maps hold.
func openDoors(d *bpf.Datapath) (*doors, error) {
	o := &doors{bpf: d, words: make([]uint64, d.Doors.MaxEntries())}
	var service bpf.ServiceKey
	var svc bpf.Service
	if err := each(d.Services, &service, &svc, func() { o.set(service.Addr) }); err != nil {
		return nil, fmt.Errorf("read mooring_services: %w", err)
	}
	var addr bpf.Addr
	var endpoint bpf.Endpoint
	if err := each(d.Endpoints, &addr, &endpoint, func() { o.set(addr) }); err != nil {
		return nil, fmt.Errorf("read mooring_endpoints: %w", err)
	}
	var one uint32
	if err := each(d.NodeAddresses, &addr, &one, func() { o.set(addr) }); err != nil {
		return nil, fmt.Errorf("read mooring_node_addresses: %w", err)
	}
	for i := range o.words {
		if err := o.write(i); err != nil {
			return nil, err
		}
	}
	return o, nil
}

func each[K, V any](m *ebpf.Map, key *K, value *V, f func()) error {
	entries := m.Iterate()
	for entries.Next(key, value) {
		f()
	}
	return entries.Err()
}

// open lets the driver's program look at packets to these addresses.
func (o *doors) open(addresses ...bpf.Addr) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	var changed []int
	for _, a := range addresses {
		if i, is := o.set(a); !is && !slices.Contains(changed, i) {
			changed = append(changed, i)
		}
	}
	for _, i := range changed {
		if err := o.write(i); err != nil {
			return err
		}
	}
	return nil
}

// set returns the word of the address's bit, and whether it was set already.
func (o *doors) set(a bpf.Addr) (word int, was bool) {
	word, bit := bpf.Door(a)
	was = o.words[word]>>bit&1 != 0
	o.words[word] |= 1 << bit
	return word, was
}

func (o *doors) write(word int) error {
	key, value := uint32(word), o.words[word]
	if err := o.bpf.Doors.Put(&key, &value); err != nil {
		return fmt.Errorf("write mooring_doors: %w", err)
	}
	return nil
}
