// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/endpoint"
	"github.com/mooring-cni/mooring/daemon/model"
	"github.com/mooring-cni/mooring/daemon/node"
)

// daemon answers the API's clients from the parts.
type daemon struct {
	config    conf.Config
	machine   *node.Manager
	kernel    kernelSide
	endpoints *endpoint.Registry
	services  *services
	mtu       int          // as the node file had it at the start
	addresses []netip.Addr // as the services' table had them

	mutex   sync.Mutex
	metrics string // why metrics are not served
}

func (d *daemon) Node() api.Node {
	return api.Node{
		Name: d.config.NodeName, MTU: node.MTU(d.machine.Uplinks()), BPFFS: d.config.BPFFS, StateDir: d.config.StateDir,
		PodCIDRs: d.config.PodCIDRs, Ready: true,
	}
}

func (d *daemon) Status() (api.Status, error) {
	s := api.Status{
		Node: d.config.NodeName, Version: version, Kernel: kernelRelease(), Mode: "standalone",
		Hook: d.kernel.Hook(), XDP: d.kernel.XDP(), Endpoints: d.endpoints.Len(),
	}
	if !d.config.Standalone() {
		s.Mode = "kubernetes"
	}
	s.Services, s.Backends = d.services.counts()
	serious, minor := d.problems()
	stats, err := d.kernel.Stats()
	if err != nil {
		serious = append(serious, fmt.Sprintf("conntrack statistics: %v", err))
	}
	s.Conntrack = api.TableStatus{Entries: stats.Entries, MaxEntries: stats.MaxEntries}
	s.Healthy = len(serious) == 0
	s.Problems = append(serious, minor...)
	return s, nil
}

// problems are what is wrong with this node: with serious ones it is not
// healthy.
func (d *daemon) problems() (serious, minor []string) {
	serious, minor = d.services.report()
	serious = append(serious, d.machine.Problems()...)
	if hook := d.kernel.Hook(); hook.Mode == "off" && d.config.Conntrack.Hook != "off" {
		minor = append([]string{"connections end by timers only, not with their sockets: " + hook.Reason}, minor...)
	}
	d.mutex.Lock()
	if d.metrics != "" {
		minor = append([]string{d.metrics}, minor...)
	}
	d.mutex.Unlock()
	return serious, minor
}

func (d *daemon) Connections(f api.Filter, yield func(api.Connection) bool) error {
	matches := d.matcher(f)
	return d.kernel.Connections(func(c api.Connection) bool { return !matches(&c) || yield(c) })
}

// matcher resolves the filter's names once.
func (d *daemon) matcher(f api.Filter) func(*api.Connection) bool {
	var pod map[uint32]bool
	if f.Pod != (model.Name{}) {
		pod = map[uint32]bool{}
		for _, e := range d.endpoints.List() {
			if e.Pod == f.Pod {
				pod[e.ID] = true
			}
		}
	}
	var service map[string]bool
	if f.Service != (model.Name{}) {
		service = d.services.addresses(f.Service)
	}
	return func(c *api.Connection) bool {
		if f.Protocol != "" && c.Protocol != f.Protocol || pod != nil && !pod[c.Endpoint] {
			return false
		}
		if service == nil {
			return true
		}
		address := c.Translation // EGRESS and INGRESS: as replies show it
		if c.Type == "SVC" {
			address = c.Destination
		}
		return service[c.Protocol+" "+address]
	}
}

func (d *daemon) ConntrackStats() (api.ConntrackStats, error) { return d.kernel.Stats() }

func (d *daemon) FlushConntrack() (uint64, error) { return d.kernel.Flush() }

func (d *daemon) Services() []api.Service { return d.services.list() }

func (d *daemon) Attachments() []model.Endpoint { return d.endpoints.List() }

func (d *daemon) AddEndpoint(e model.Endpoint) (model.Endpoint, error) { return d.endpoints.Add(e) }

func (d *daemon) DeleteEndpoint(containerID, ifname string) error {
	return d.endpoints.Delete(containerID, ifname)
}

// Events names the pods in the datapath's events.
func (d *daemon) Events(ctx context.Context) (<-chan api.Event, error) {
	events, err := d.kernel.Events(ctx)
	if err != nil {
		return nil, err
	}
	named := make(chan api.Event, cap(events))
	go func() {
		defer close(named)
		for e := range events {
			if e.Pod == "" && e.Endpoint != 0 {
				if owner, known := d.endpoints.Get(e.Endpoint); known && owner.Pod != (model.Name{}) {
					e.Pod = owner.Pod.String()
				}
			}
			select {
			case named <- e:
			case <-ctx.Done():
			}
		}
	}()
	return named, nil
}

// followUplinks passes on what depends on the uplinks, which may come late and
// change: the pods' MTU in the node file, and the addresses of NodePorts.
func (d *daemon) followUplinks(ctx context.Context) error {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	mtu, addresses := d.mtu, d.addresses
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		uplinks := d.machine.Uplinks()
		if now := node.Addresses(uplinks); !slices.Equal(now, addresses) {
			d.services.moved(nodeContext(d.config, uplinks))
			addresses = now
		}
		if now := node.MTU(uplinks); now != mtu {
			if err := conf.WriteNode(d.config.Socket, conf.Node(d.Node())); err != nil {
				return err
			}
			mtu = now
		}
	}
}

// leaveNodeFile says in the node file that nobody serves, for DEL needs the
// rest of it while the daemon is down.
func (d *daemon) leaveNodeFile() error {
	n := d.Node()
	n.Ready, n.Reason = false, "mooringd was stopped"
	return conf.WriteNode(d.config.Socket, conf.Node(n))
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}
