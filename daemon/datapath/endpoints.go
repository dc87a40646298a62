// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/model"
)

// endpoints writes mooring_endpoints: an entry per address of a pod.
type endpoints struct {
	bpf    *bpf.Datapath
	bpffs  string
	reaper *reaper
	doors  *doors

	shaping *shaping

	mu    sync.Mutex
	known map[uint32]model.Endpoint // by id
}

// namespaces are those of the pods.
func (e *endpoints) namespaces() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var paths []string
	for _, ep := range e.known {
		if ep.Netns != "" {
			paths = append(paths, ep.Netns)
		}
	}
	return paths
}

// refresh gives the endpoints that are attached today's programs. An interface
// that is gone loses its pins.
func (e *endpoints) refresh() error {
	names, err := bpf.EndpointLinks(e.bpffs)
	if err != nil {
		return err
	}
	for _, name := range names {
		dev, err := net.InterfaceByName(name)
		if err != nil {
			if err := bpf.DetachEndpoint(e.bpffs, name); err != nil {
				return err
			}
			continue
		}
		if err := bpf.AttachEndpoint(e.bpffs, name, dev.Index); err != nil {
			return err
		}
	}
	return nil
}

// AddEndpoint makes a pod's addresses known. Doing it again is fine.
func (e *endpoints) AddEndpoint(ep model.Endpoint) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.known[ep.ID] = ep
	return e.write(ep)
}

// write brings an endpoint's entries to what is known of it.
func (e *endpoints) write(ep model.Endpoint) error {
	value := bpf.Endpoint{Ifindex: uint32(ep.Ifindex), Id: uint16(ep.ID)}
	for _, mac := range []struct {
		text string
		to   *[6]uint8
	}{{ep.MAC, &value.Mac}, {ep.HostMAC, &value.HostMac}} {
		parsed, err := net.ParseMAC(mac.text)
		if err != nil || len(parsed) != 6 {
			return fmt.Errorf("endpoint %s: MAC %q is not an Ethernet address", ep.Interface, mac.text)
		}
		copy(mac.to[:], parsed)
	}
	value.Limits = e.shaping.of(ep)
	for _, ip := range ep.IPs {
		key := bpf.ToAddr(ip)
		if err := e.doors.open(key); err != nil {
			return err
		}
		if err := e.bpf.Endpoints.Put(&key, &value); err != nil {
			if errors.Is(err, ebpf.ErrKeyNotExist) || isFull(err) {
				return fmt.Errorf("add %s to mooring_endpoints: the map is full (%d addresses)", ip, e.bpf.Endpoints.MaxEntries())
			}
			return fmt.Errorf("add %s to mooring_endpoints: %w", ip, err)
		}
	}
	return nil
}

// RemoveEndpoint forgets a pod's addresses, as far as they are still this
// endpoint's, and ends its connections' entries.
func (e *endpoints) RemoveEndpoint(ep model.Endpoint) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.known, ep.ID)
	e.shaping.forget(ep)
	for _, ip := range ep.IPs {
		key := bpf.ToAddr(ip)
		var have bpf.Endpoint
		err := e.bpf.Endpoints.Lookup(&key, &have)
		if errors.Is(err, ebpf.ErrKeyNotExist) || err == nil && have.Id != uint16(ep.ID) {
			continue
		}
		if err == nil {
			err = e.bpf.Endpoints.Delete(&key)
		}
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove %s from mooring_endpoints: %w", ip, err)
		}
	}
	e.reaper.purgeEndpoints()
	return bpf.DetachEndpoint(e.bpffs, ep.Interface)
}

// Adopt brings the kernel to the endpoints that are there when the daemon
// starts: each runs today's programs, which may be gone with the BPF filesystem
// or hang on a qdisc, which has no pins; other endpoints' addresses go.
func (e *endpoints) Adopt(known []model.Endpoint) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	var errs []error
	ids := make(map[bpf.Addr]uint16)
	for _, ep := range known {
		for _, ip := range ep.IPs {
			ids[bpf.ToAddr(ip)] = uint16(ep.ID)
		}
		if err := bpf.AttachEndpoint(e.bpffs, ep.Interface, ep.Ifindex); err != nil {
			errs = append(errs, err)
		}
	}
	var stale []bpf.Addr
	var key bpf.Addr
	var value bpf.Endpoint
	entries := e.bpf.Endpoints.Iterate()
	for entries.Next(&key, &value) {
		if ids[key] != value.Id {
			stale = append(stale, key)
		}
	}
	if err := entries.Err(); err != nil {
		errs = append(errs, fmt.Errorf("read mooring_endpoints: %w", err))
	}
	for _, key := range stale {
		if err := e.bpf.Endpoints.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("remove %s from mooring_endpoints: %w", key.IP(), err))
		}
	}
	if len(stale) > 0 {
		e.reaper.purgeEndpoints()
	}
	return errors.Join(errs...)
}
