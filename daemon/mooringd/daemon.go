// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"reflect"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/endpoint"
	"github.com/mooring-cni/mooring/daemon/health"
	"github.com/mooring-cni/mooring/daemon/model"
	"github.com/mooring-cni/mooring/daemon/node"
	"github.com/mooring-cni/mooring/daemon/service"
	"github.com/mooring-cni/mooring/daemon/source"
)

// daemon answers the API's clients from the parts.
type daemon struct {
	config    conf.Config
	machine   *node.Manager
	kernel    kernelSide
	endpoints *endpoint.Registry
	services  *services
	policies  *policies
	cluster   *source.Kubernetes  // nil: standalone
	where     service.NodeContext // as the services' table has it
	// remembered says that an earlier run's state is in the datapath and its
	// pod ranges are known, so that pods can be added before the API answers.
	remembered bool

	mutex    sync.Mutex
	metrics  string // why metrics are not served
	nodeFile conf.Node
	noRange  string // why the Node object gives no pod ranges
	eligible bool   // load balancers may send to this node
}

func (d *daemon) Node() api.Node {
	n := api.Node{
		Name: d.config.NodeName, MTU: d.machine.PodMTU(), BPFFS: d.config.BPFFS, StateDir: d.config.StateDir,
		PodCIDRs: d.machine.PodCIDRs(),
	}
	n.Ready, n.Reason = d.ready(n.PodCIDRs)
	return n
}

// ready tells whether pods can be added, and why not: they need addresses, and
// services, unless an earlier run's are there.
func (d *daemon) ready(podCIDRs []netip.Prefix) (bool, string) {
	d.mutex.Lock()
	noRange := d.noRange
	d.mutex.Unlock()
	switch {
	case len(podCIDRs) == 0 && noRange != "":
		return false, noRange
	case len(podCIDRs) == 0:
		return false, fmt.Sprintf("the pod ranges are not known: the Kubernetes API has not told of Node %s", d.config.NodeName)
	case d.cluster != nil && !d.remembered && !d.services.known():
		return false, "the services are not all in the datapath yet"
	}
	return true, ""
}

// nodesChanged tells all nodes of the cluster, when they are known and as they
// change. This node's object has its pod ranges, where no key has.
func (d *daemon) nodesChanged(nodes []model.Node) {
	if len(d.config.PodCIDRs) == 0 {
		noRange := fmt.Sprintf("there is no Node %s in the cluster: is nodeName the name that kubelet registers?", d.config.NodeName)
		for i := range nodes {
			if nodes[i].Name != d.config.NodeName {
				continue
			}
			switch err := conf.CheckPodCIDRs(nodes[i].PodCIDRs); {
			case len(nodes[i].PodCIDRs) == 0:
				noRange = fmt.Sprintf("Node %s has no podCIDRs: run kube-controller-manager with --allocate-node-cidrs, or set podCIDRs", d.config.NodeName)
			case err != nil:
				noRange = fmt.Sprintf("the podCIDRs of Node %s cannot be used: %v", d.config.NodeName, err)
			default:
				noRange = ""
				d.machine.SetPodCIDRs(nodes[i].PodCIDRs)
			}
		}
		d.mutex.Lock()
		d.noRange = noRange
		d.mutex.Unlock()
	}
	d.mutex.Lock()
	d.eligible = d.cluster == nil // standalone, nobody has to describe the node
	for i := range nodes {
		if nodes[i].Name == d.config.NodeName {
			d.eligible = !nodes[i].Leaving
		}
	}
	d.mutex.Unlock()
	d.machine.SetNodes(nodes)
	d.kernel.SetNodes(nodes)
}

// proxy is how the node's service proxy does, for load balancers.
func (d *daemon) proxy() health.Proxy {
	p := d.services.proxy()
	p.Started = p.Started || d.remembered
	d.mutex.Lock()
	p.Eligible = d.eligible
	d.mutex.Unlock()
	for _, prefix := range d.machine.PodCIDRs() {
		if prefix.Addr().Is4() {
			p.Families = append(p.Families, "IPv4")
		} else {
			p.Families = append(p.Families, "IPv6")
		}
	}
	return p
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
	serious = append(serious, d.policies.report()...)
	serious = append(serious, d.machine.Problems()...)
	serious = append(serious, d.kernel.Problems()...)
	if hook := d.kernel.Hook(); hook.Mode == "off" && d.config.Conntrack.Hook != "off" {
		minor = append([]string{"connections end by timers only, not with their sockets: " + hook.Reason}, minor...)
	}
	d.mutex.Lock()
	if d.metrics != "" {
		minor = append([]string{d.metrics}, minor...)
	}
	if d.noRange != "" {
		serious = append(serious, d.noRange)
	}
	d.mutex.Unlock()
	if trouble := d.services.health.Trouble(); trouble != "" {
		minor = append([]string{trouble}, minor...)
	}
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

func (d *daemon) Policies() []api.Policy { return d.policies.list() }

// ExplainPolicy refuses a service's address: policies are about its backends.
func (d *daemon) ExplainPolicy(q api.PolicyQuestion) (api.Explanation, error) {
	for _, s := range d.services.list() {
		for _, f := range s.Frontends {
			if f.Address == q.To {
				return api.Explanation{}, api.Errorf(http.StatusBadRequest, "%s is an address of Service %s/%s: policies are about its backends, ask for one of their pods", q.To, s.Namespace, s.Name)
			}
		}
	}
	return d.policies.explain(q)
}

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
			e.Policies = d.policies.applying(e.Endpoint, e.Reason)
			select {
			case named <- e:
			case <-ctx.Done():
			}
		}
	}()
	return named, nil
}

// followNode passes on what changes by itself and late: the uplinks, on which
// the pods' MTU and the addresses of NodePorts depend, and whether pods can be
// added.
func (d *daemon) followNode(ctx context.Context) error {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		uplinks := d.machine.Uplinks()
		d.kernel.SetUplinks(wires(d.config, uplinks))
		if now := nodeContext(d.config, uplinks); !reflect.DeepEqual(now, d.where) {
			d.services.moved(now)
			d.where = now
		}
		if err := d.writeNodeFile(); err != nil {
			return err
		}
	}
}

// writeNodeFile leaves the node file as it should be now, if it differs.
func (d *daemon) writeNodeFile() error {
	now := conf.Node(d.Node())
	if reflect.DeepEqual(now, d.nodeFile) {
		return nil
	}
	d.nodeFile = now
	return conf.WriteNode(d.config.Socket, now)
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
