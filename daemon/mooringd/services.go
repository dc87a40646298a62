// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/datapath"
	"github.com/mooring-cni/mooring/daemon/endpoint"
	"github.com/mooring-cni/mooring/daemon/health"
	"github.com/mooring-cni/mooring/daemon/model"
	"github.com/mooring-cni/mooring/daemon/service"
	"github.com/mooring-cni/mooring/daemon/source"
)

// retryInterval is how long what the datapath refused waits for the next try.
const retryInterval = time.Second

// services brings what the source and the pods' interfaces say into the
// datapath, a difference at a time.
type services struct {
	kernel   kernelSide
	setNodes func([]model.Node)
	cluster  *source.Kubernetes // nil: standalone
	health   *health.Server
	log      *slog.Logger
	wake     chan struct{}

	mutex     sync.Mutex
	table     *service.Table
	endpoints *endpoint.Registry
	applied   map[uint32]model.Endpoint       // endpoints that the table knows
	nodes     map[string]*model.Node          // of the source
	owed      map[model.Name][]model.Frontend // what the datapath refused
	refusal   error                           // with which words
	synced    bool                            // the source has delivered all there is
	settled   bool                            // and the datapath knows that it has it all
	problems  []model.Problem                 // of the source
	pending   time.Time                       // since when the datapath refuses; zero: it does not
	updated   time.Time                       // when it last held all
	addressed []netip.Addr                    // the node's addresses that the datapath knows
}

func newServices(table *service.Table, kernel kernelSide, setNodes func([]model.Node), log *slog.Logger) *services {
	return &services{
		table: table, kernel: kernel, setNodes: setNodes, log: log, wake: make(chan struct{}, 1),
		applied: map[uint32]model.Endpoint{}, nodes: map[string]*model.Node{},
		owed: map[model.Name][]model.Frontend{},
	}
}

// follow makes the registry's endpoints known: all now, changes as they come.
func (s *services) follow(endpoints *endpoint.Registry) {
	s.mutex.Lock()
	s.endpoints = endpoints
	s.applyEndpoints()
	s.mutex.Unlock()
}

// apply takes what a source delivers. It is the source's sink.
func (s *services) apply(c model.Changes) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	began := time.Now()
	s.problems = c.Problems
	for name, n := range c.Nodes {
		if n == nil {
			delete(s.nodes, name)
		} else {
			s.nodes[name] = n
		}
	}
	update := s.table.Apply(c)
	first := c.Synced && !s.synced
	s.synced = s.synced || c.Synced
	if s.synced && (first || len(c.Nodes) > 0) {
		s.setNodes(s.nodeList())
	}
	s.push(update)
	if c.Len() > 0 || first {
		s.log.Debug("objects applied", "changed", c.Len(), "services", len(update.Frontends), "problems", len(c.Problems), "took", time.Since(began))
	}
}

func (s *services) nodeList() []model.Node {
	list := make([]model.Node, 0, len(s.nodes))
	for _, n := range s.nodes {
		list = append(list, *n)
	}
	slices.SortFunc(list, func(a, b model.Node) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

// moved tells where the node is now: NodePorts follow its addresses.
func (s *services) moved(where service.NodeContext) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.push(s.table.SetNode(where))
}

// endpointsChanged is called by the registry while an ADD waits. It does the
// work at once if nothing else is being done, so that a pod is a backend of its
// services when its ADD returns; otherwise run does it.
func (s *services) endpointsChanged() {
	if s.mutex.TryLock() {
		s.applyEndpoints()
		s.mutex.Unlock()
		return
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// applyEndpoints tells the table how the registry's endpoints differ from what
// it knows. The mutex is held.
func (s *services) applyEndpoints() {
	if s.endpoints == nil {
		return
	}
	changed := map[uint32]*model.Endpoint{}
	now := map[uint32]model.Endpoint{}
	for _, e := range s.endpoints.List() {
		now[e.ID] = e
		if was, known := s.applied[e.ID]; !known || was.Pod != e.Pod || !slices.Equal(was.IPs, e.IPs) {
			changed[e.ID] = &e
		}
	}
	for id := range s.applied {
		if _, there := now[id]; !there {
			changed[id] = nil
		}
	}
	s.applied = now
	if len(changed) > 0 {
		s.push(s.table.ApplyEndpoints(changed))
	}
}

// push writes what differs into the datapath, and first what it still owes. The
// mutex is held.
//
// Until the source has delivered all there is, nothing is written: a service
// whose slices are still to come would lose the backends that it had before
// this daemon started.
func (s *services) push(update service.Update) {
	s.announce()
	maps.Copy(s.owed, update.Frontends)
	if !s.synced {
		return
	}
	if len(s.owed) > 0 {
		if err := s.kernel.ApplyFrontends(s.owed); err != nil {
			var refused *datapath.RefusedError
			if errors.As(err, &refused) {
				maps.DeleteFunc(s.owed, func(name model.Name, _ []model.Frontend) bool { return refused.Services[name] == nil })
			}
			if s.refusal == nil || s.refusal.Error() != err.Error() {
				s.log.Error("services do not reach the datapath", "services", len(s.owed), "error", err)
			}
			if s.refusal = err; refused == nil {
				s.wait()
				return
			}
			s.upToDate() // but for those: no reason to take the node from load balancers
			return
		}
		s.owed, s.refusal = map[model.Name][]model.Frontend{}, nil
	}
	if !s.settled {
		if err := s.kernel.Synced(); err != nil {
			s.log.Error("services of an earlier run stay in the datapath", "error", err)
			s.refusal = err
			s.wait()
			return
		}
		s.settled, s.refusal = true, nil
	}
	s.upToDate()
}

// upToDate tells the others of what the datapath holds now. The mutex is held.
func (s *services) upToDate() {
	s.pending, s.updated = time.Time{}, time.Now()
	s.answerHealth()
	if now := s.table.NodeAddresses(); !slices.Equal(now, s.addressed) {
		s.kernel.SetNodeAddresses(now)
		s.addressed = slices.Clone(now)
	}
}

// wait takes note that the datapath is behind. The mutex is held.
func (s *services) wait() {
	if s.pending.IsZero() {
		s.pending = time.Now()
	}
}

// answerHealth says what load balancers are told at services' health check
// ports: never before it is true. The mutex is held.
func (s *services) answerHealth() {
	var checks []health.Check
	for _, c := range s.table.HealthChecks() {
		checks = append(checks, health.Check{Service: c.Service, Port: c.Port, LocalEndpoints: c.LocalReady})
	}
	var addresses []netip.Addr // all
	if s.table.NodeAddressesChosen() {
		if addresses = s.table.NodeAddresses(); len(addresses) == 0 {
			checks = nil
		}
	}
	s.health.Set(checks, addresses)
}

// announce has Events made of what is wrong with services. The mutex is held.
func (s *services) announce() {
	if s.cluster != nil {
		s.cluster.Announce(s.tableProblems())
	}
}

// tableProblems are those with services, whether the table found them or the
// machine. The mutex is held.
func (s *services) tableProblems() []model.Problem {
	all := append(slices.Clone(s.table.Problems()), s.health.Problems()...)
	slices.SortStableFunc(all, model.CompareProblems)
	return all
}

// proxy is how the services do in the datapath.
func (s *services) proxy() health.Proxy {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return health.Proxy{Started: s.settled, Pending: s.pending, Updated: s.updated}
}

// run does what others left to do: endpoints that changed while the table was
// busy, and what the datapath refused.
func (s *services) run(ctx context.Context) error {
	retry := time.NewTicker(retryInterval)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case <-retry.C:
		}
		s.mutex.Lock()
		s.applyEndpoints()
		if s.refusal != nil {
			s.push(service.Update{})
		}
		s.announce()
		s.mutex.Unlock()
	}
}

// counts are the services and their distinct backends.
func (s *services) counts() (services, backends int) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	distinct := map[model.AddrPort]struct{}{}
	for _, frontends := range s.table.All() {
		services++
		for i := range frontends {
			for _, list := range [][]model.Backend{frontends[i].Internal, frontends[i].External} {
				for j := range list {
					distinct[list[j].AddrPort] = struct{}{}
				}
			}
		}
	}
	return services, len(distinct)
}

// list is the rows of `mooring service list`, sorted.
func (s *services) list() []api.Service {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	var rows []api.Service
	for name, frontends := range s.table.All() {
		row := api.Service{Namespace: name.Namespace, Name: name.Name}
		for i := range frontends {
			row.Frontends = append(row.Frontends, frontendRow(&frontends[i]))
		}
		rows = append(rows, row)
	}
	slices.SortFunc(rows, func(a, b api.Service) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return rows
}

func frontendRow(f *model.Frontend) api.Frontend {
	row := api.Frontend{Address: f.Addr.String(), Port: f.Port, Protocol: f.Protocol.String(), Kind: string(f.Kind)}
	seen := map[model.AddrPort]bool{}
	for _, list := range [][]model.Backend{f.Internal, f.External} {
		for _, b := range list {
			if !seen[b.AddrPort] {
				seen[b.AddrPort] = true
				row.Backends = append(row.Backends, api.Backend{Address: b.Addr.String(), Port: b.Port, State: b.State.String()})
			}
		}
	}
	return row
}

// addresses are a service's frontends as the connection table shows them.
func (s *services) addresses(name model.Name) map[string]bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	frontends, _ := s.table.Frontends(name)
	set := map[string]bool{}
	for _, f := range frontends {
		set[f.Protocol.String()+" "+netip.AddrPortFrom(f.Addr, f.Port).String()] = true
	}
	return set
}

// known tells whether all services are in the datapath.
func (s *services) known() bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.settled
}

// maxProblems is how many objects' problems status names before it counts.
const maxProblems = 100

// report is what is wrong: serious says that the node does not do its work,
// minor that an object is not as its author meant it.
func (s *services) report() (serious, minor []string) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.refusal != nil {
		serious = append(serious, fmt.Sprintf("services are not up to date in the datapath: %v", s.refusal))
	} else if !s.synced {
		why := "the manifests have not been read"
		if s.cluster != nil {
			why = "the Kubernetes API has not told all of them"
		}
		serious = append(serious, "services are not known yet: "+why)
	}
	all := append(slices.Clone(s.problems), s.tableProblems()...)
	slices.SortStableFunc(all, model.CompareProblems)
	for i, p := range all {
		if i == maxProblems {
			minor = append(minor, fmt.Sprintf("and %d more problems with objects", len(all)-maxProblems))
			break
		}
		minor = append(minor, p.String())
	}
	return serious, minor
}
