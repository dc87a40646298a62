// SPDX-License-Identifier: Apache-2.0

// Package datapath is the kernel's side of the daemon: it turns the desired
// state into map entries, and the maps' entries into what people read. It is
// the only writer of the maps that bpf/lib/maps.h gives it.
package datapath

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/model"
	"github.com/mooring-cni/mooring/daemon/policy"
)

// Options say how the datapath is loaded.
type Options struct {
	BPFFS      string
	MaxEntries uint32 // of the conntrack map
	Timeouts   conf.Timeouts
	Hook       string // conntrack.hook
	Policy     bool   // enforce network policies
	XDP        string // xdp; empty: off
	DSR        bool   // nodePort.mode: backends on other nodes answer clients outside themselves
	Cgroup     string // where it attaches programs of cgroups; empty: the root
	Maglev     bool   // clients beyond the uplinks get their backend by a table, elsewhere at random
	// Ports that are nodes' on loopback addresses too, for the host's own sockets.
	NodePortFirst, NodePortLast uint16
	Log                         *slog.Logger
}

// Manager owns the loaded datapath.
type Manager struct {
	*services
	*endpoints
	*reaper
	*events
	*policies
	*host
	*overlay
	*north

	bpf *bpf.Datapath
	log *slog.Logger
}

// New loads the datapath, or adopts the one that an earlier run left pinned:
// its connections, services and endpoints go on as they are.
func New(opts Options) (*Manager, error) {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	ports, err := snatPorts(opts.NodePortFirst, opts.NodePortLast)
	if err != nil {
		return nil, err
	}
	d, err := bpf.Load(bpf.Options{
		BPFFS: opts.BPFFS, MaxEntries: opts.MaxEntries, Hook: opts.Hook, Policy: opts.Policy, Cgroup: opts.Cgroup, SNATPorts: ports, DSR: opts.DSR,
	})
	if err != nil {
		return nil, err
	}
	m := &Manager{bpf: d, log: opts.Log}
	m.reaper = newReaper(d, opts.Timeouts, opts.Log)
	doors, err := openDoors(d)
	if err != nil {
		d.Close()
		return nil, err
	}
	m.endpoints = &endpoints{
		bpf: d, bpffs: opts.BPFFS, reaper: m.reaper, doors: doors,
		shaping: newShaping(d, opts.Log), known: make(map[uint32]model.Endpoint),
	}
	m.reaper.namespaces = m.endpoints.namespaces
	m.events = &events{bpf: d, log: opts.Log}
	m.overlay = &overlay{bpf: d}
	m.north = &north{bpf: d, log: opts.Log, doors: doors, mode: opts.XDP, attached: make(map[string]attachment), first: true}
	m.policies = &policies{bpf: d, written: make(map[policy.ID][]bpf.ProfileKey)}
	m.services, err = adoptServices(d, m.reaper, doors, opts.Maglev)
	if err == nil {
		err = m.endpoints.refresh()
	}
	if err == nil {
		err = m.events.reset()
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	m.host = openHost(d, bpf.HostOptions{Cgroup: opts.Cgroup, NodePortFirst: opts.NodePortFirst, NodePortLast: opts.NodePortLast}, opts.Log)
	m.services.gone = func() {
		m.reaper.purgeBackends()
		m.host.backendsGone()
	}
	return m, nil
}

// Run reaps until ctx is done.
func (m *Manager) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { m.events.run(ctx) })
	wg.Go(func() { m.host.run(ctx) })
	wg.Go(func() { m.services.run(ctx, m.log) })
	wg.Go(func() { m.endpoints.watchLimits(ctx, m.log) })
	return m.reaper.run(ctx)
}

// Close leaves everything in the kernel.
func (m *Manager) Close() error {
	return errors.Join(m.events.reset(), m.host.close(), m.bpf.Close())
}

// Hook says how socket ends are noticed.
func (m *Manager) Hook() api.HookStatus {
	return api.HookStatus{Mode: m.bpf.Hook.Mode, Reason: m.bpf.Hook.Reason}
}

// Problems are what of the datapath does not work, while the rest does.
func (m *Manager) Problems() []string {
	return slices.Concat(m.host.problems(), m.north.trouble(), m.services.problems(), m.endpoints.unlimited())
}

// Drops counts dropped packets since the maps were made.
func (m *Manager) Drops() (map[api.Drop]api.DropCount, error) {
	drops := make(map[api.Drop]api.DropCount)
	for reason := 1; reason < bpf.DropReasons; reason++ {
		for direction := range bpf.Directions {
			var perCPU []bpf.Counter
			key := uint32(reason*bpf.Directions + direction)
			if err := m.bpf.Counters.Lookup(&key, &perCPU); err != nil {
				return nil, fmt.Errorf("read packet counters: %w", err)
			}
			var sum api.DropCount
			for _, c := range perCPU {
				sum.Packets += c.Packets
				sum.Bytes += c.Bytes
			}
			if sum.Packets > 0 {
				drops[api.Drop{
					Reason:    bpf.Label(bpf.DropReason(reason)),
					Direction: bpf.DirectionLabel(bpf.Direction(direction)),
				}] = sum
			}
		}
	}
	return drops, nil
}

// Cleanup removes the datapath's pins, and with them what is attached by them.
func Cleanup(bpffs string) error {
	return errors.Join(bpf.Remove(bpffs), bpf.DetachUplinks(), bpf.DetachLimits())
}
