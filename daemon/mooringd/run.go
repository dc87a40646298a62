// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/datapath"
	"github.com/mooring-cni/mooring/daemon/endpoint"
	"github.com/mooring-cni/mooring/daemon/health"
	"github.com/mooring-cni/mooring/daemon/model"
	"github.com/mooring-cni/mooring/daemon/node"
	"github.com/mooring-cni/mooring/daemon/policy"
	"github.com/mooring-cni/mooring/daemon/service"
	"github.com/mooring-cni/mooring/daemon/source"
)

// run is the daemon: every part is built in order, runs, and stops in reverse.
// What is in the kernel stays there.
//
//	source ──────> services, ─────> datapath ──> kernel: programs and maps
//	(manifests, API) policies          ^
//	                   ^ │             │
//	                   │ └──> node     │         kernel: routes, chains, sysctls
//	CNI plugin ──> endpoints ──────────┘
//	client, Prometheus <── daemon (status, lists, metrics) of all of them
func run(ctx context.Context, config conf.Config, log *slog.Logger, open opener) (err error) {
	if err := unsupported(config); err != nil {
		return err
	}
	objects, cluster, err := openSource(config, log)
	if err != nil {
		return err
	}
	log.Info("mooringd starts", "version", version, "node", config.NodeName, "podCIDRs", config.PodCIDRs, "socket", config.Socket)

	// The socket first: a second daemon is refused before it touches anything.
	listener, err := api.Listen(config.Socket)
	if err != nil {
		return err
	}
	defer listener.Close()
	if directory, is := objects.(*source.Directory); is {
		directory.Prepare()
	}

	podCIDRs := config.PodCIDRs
	if len(podCIDRs) == 0 { // as an earlier run had them, until the Node object is known
		if last, err := conf.ReadNode(config.Socket); err == nil && last.Name == config.NodeName {
			podCIDRs = last.PodCIDRs
		}
	}
	machine := node.New(node.Options{
		Name: config.NodeName, PodCIDRs: podCIDRs, Devices: config.Devices, Masquerade: config.Masquerade,
		Overlay: config.Routing.Mode == "vxlan", Log: log,
	})
	uplinks := machine.Uplinks()
	kernel, err := open(config, uplinks, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, kernel.Close()) }()

	machine.SetTunnelSetter(func(device string, index int, tunnels map[netip.Prefix]node.Tunnel) error {
		wanted := make(map[netip.Prefix]datapath.Tunnel, len(tunnels))
		for pods, t := range tunnels {
			wanted[pods] = datapath.Tunnel(t)
		}
		return kernel.SetTunnels(device, index, wanted)
	})

	links, err := endpoint.NewKernel()
	if err != nil {
		return err
	}
	defer links.Close()
	daemon := &daemon{config: config, cluster: cluster, machine: machine, kernel: kernel, remembered: len(podCIDRs) > 0, where: nodeContext(config, uplinks)}
	services := newServices(service.NewTable(daemon.where), kernel, daemon.nodesChanged, log)
	services.cluster = cluster
	services.health = health.New(daemon.proxy, log)
	policies := newPolicies(config, kernel, log)
	endpoints, err := endpoint.Open(config.StateDir, kernel, links, log, func() {
		policies.endpointsChanged() // first, so that nobody is sent to a pod that is still closed
		services.endpointsChanged()
	})
	if err != nil {
		return err
	}
	if err := kernel.Adopt(endpoints.List()); err != nil {
		log.Error("adopt endpoints", "error", err) // the others are well
	}
	policies.follow(endpoints)
	services.follow(endpoints)

	daemon.endpoints, daemon.services, daemon.policies = endpoints, services, policies
	if err := daemon.writeNodeFile(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, daemon.leaveNodeFile()) }()

	parts := newParts(log)
	parts.start("datapath", kernel.Run)
	parts.start("node", machine.Run)
	parts.start("endpoints", endpoints.Watch)
	parts.start("services", services.run)
	parts.start("policies", policies.run)
	parts.start("source", func(ctx context.Context) error {
		return objects.Run(ctx, func(c model.Changes) {
			policies.apply(c)
			services.apply(c)
		})
	})
	parts.start("metrics", daemon.serveMetrics)
	parts.start("uplinks", daemon.followNode)
	parts.start("health", func(ctx context.Context) error { return services.health.Run(ctx, config.HealthzAddress) })
	parts.start("API", func(ctx context.Context) error { return api.Serve(ctx, listener, daemon, log) })
	if err := notify("READY=1"); err != nil {
		log.Warn("tell systemd", "error", err)
	}
	log.Info("mooringd serves", "hook", kernel.Hook().Mode, "endpoints", endpoints.Len())

	err = parts.wait(ctx)
	notify("STOPPING=1")
	parts.stop()
	if err == nil {
		log.Info("mooringd stops; the datapath goes on")
	}
	return err
}

// unsupported refuses what can be configured and not be done: silence would be
// taken for consent.
func unsupported(config conf.Config) error {
	if config.NodePort.Mode == "dsr" && config.Routing.Mode == "vxlan" {
		return errors.New("nodePort.mode: dsr needs routing.mode native, as tunnels carry only what is from nodes and their pods: use snat")
	}
	return nil
}

// objects is where services, nodes and policies come from.
type objects interface {
	Run(context.Context, source.Sink) error
}

// openSource makes the source that the configuration names; cluster is nil where
// it is not an API server.
func openSource(config conf.Config, log *slog.Logger) (objects, *source.Kubernetes, error) {
	if config.Standalone() {
		return source.NewDirectory(config.Manifests), nil, nil
	}
	cluster, err := source.NewKubernetes(source.KubernetesOptions{
		Kubeconfig: config.Kubeconfig, NodeName: config.NodeName, Policies: config.Policy != "never", Version: version, Log: log,
	})
	return cluster, cluster, err
}

func nodeContext(config conf.Config, uplinks []node.Uplink) service.NodeContext {
	where := service.NodeContext{
		Name: config.NodeName, Addresses: node.Addresses(uplinks), Own: node.Addresses(uplinks), PodCIDRs: config.PodCIDRs,
		NodePortFirst: config.NodePort.Range.First, NodePortLast: config.NodePort.Range.Last,
		Standalone: config.Standalone(),
	}
	switch ranges := config.NodePort.Addresses; {
	case len(ranges) == 0:
	case ranges[0] == conf.PrimaryAddresses:
		where.Primary = true
	default:
		where.Chosen = true
		where.Addresses, _ = node.AddressesIn(prefixes(ranges)) // an error is a node without addresses: netlink does not answer
	}
	return where
}

func prefixes(cidrs []string) (list []netip.Prefix) {
	for _, cidr := range cidrs {
		if prefix, err := netip.ParsePrefix(cidr); err == nil { // conf has checked them
			list = append(list, prefix)
		}
	}
	return list
}

// opener loads or adopts the datapath.
type opener func(conf.Config, []node.Uplink, *slog.Logger) (kernelSide, error)

// kernelSide is what the daemon wants of the datapath.
type kernelSide interface {
	Run(context.Context) error
	Close() error // leaves everything in the kernel
	ApplyFrontends(changed map[model.Name][]model.Frontend) error
	ApplyPolicy(*policy.Update) error
	SyncPolicy(state *policy.Update) error
	PolicyDrops() (map[policy.ID]uint64, error)
	ForgetPolicyDrops(rulesets []policy.ID) error
	TryPacket(policy.Query) (passes bool, err error)
	Synced() error // everything was applied: what an earlier run left may go
	AddEndpoint(model.Endpoint) error
	Adopt([]model.Endpoint) error // all that there are at the start
	RemoveEndpoint(model.Endpoint) error
	Connections(yield func(api.Connection) bool) error
	Stats() (api.ConntrackStats, error)
	Flush() (uint64, error)
	Drops() (map[api.Drop]api.DropCount, error)
	Events(context.Context) (<-chan api.Event, error)
	Hook() api.HookStatus
	XDP() []api.XDPStatus
	Problems() []string
	SetNodeAddresses([]netip.Addr)
	SetUplinks(uplinks []datapath.Uplink, addresses []netip.Addr)
	SetNodes([]model.Node)
	SetTunnels(device string, index int, wanted map[netip.Prefix]datapath.Tunnel) error
}

// parts run beside each other until one fails or all are stopped.
type parts struct {
	log    *slog.Logger
	list   []part
	failed chan error
}

type part struct {
	name   string
	cancel context.CancelFunc
	done   chan struct{}
}

func newParts(log *slog.Logger) *parts { return &parts{log: log, failed: make(chan error, 16)} }

// start runs a part. That it returns before it is told to is a failure.
func (p *parts) start(name string, run func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	one := part{name: name, cancel: cancel, done: make(chan struct{})}
	p.list = append(p.list, one)
	go func() {
		defer close(one.done)
		err := run(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = errors.New("it ended by itself")
		}
		select {
		case p.failed <- fmt.Errorf("%s: %w", name, err):
		default:
		}
	}()
}

// wait returns nil when ctx is done and the error of a part that fails.
func (p *parts) wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case err := <-p.failed:
		return err
	}
}

// stop ends the parts, the last one first. One that does not end is named and
// left: SIGTERM must not hang.
func (p *parts) stop() {
	for i := len(p.list) - 1; i >= 0; i-- {
		p.list[i].cancel()
		select {
		case <-p.list[i].done:
		case <-time.After(5 * time.Second):
			p.log.Error("part does not stop", "part", p.list[i].name)
		}
	}
}
