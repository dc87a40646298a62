// SPDX-License-Identifier: Apache-2.0

// Package node makes the machine a node of the cluster: it forwards, knows its
// uplinks, has routes to the other nodes' pods, and hides its pods behind its
// own address when they talk to the world. It works in the network namespace
// that it runs in and reaches nothing outside it.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/coreos/go-iptables/iptables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/daemon/model"
)

// checkInterval is how often somebody else's changes are looked for.
const checkInterval = 20 * time.Second

// Options say what the node should be.
type Options struct {
	Name       string
	PodCIDRs   []netip.Prefix
	Devices    []string // uplinks; the default routes' when empty
	Masquerade bool
	Overlay    bool // other nodes' pods are reached by tunnels
	Log        *slog.Logger
}

// Manager keeps the machine as the options and the cluster's nodes want it.
type Manager struct {
	options Options
	wake    chan struct{}
	tables  map[iptables.Protocol]*tables

	mutex    sync.Mutex
	podCIDRs []netip.Prefix // this node's; none: not known yet
	nodes    []model.Node
	complete bool // nodes are all that there are
	tunnels  TunnelSetter
	overhead int // of what leads to other nodes' pods
	uplinks  []Uplink
	problems []string
}

// New brings the machine into the state that needs no knowledge of other
// nodes. What cannot be done is in Problems and tried again by Run.
func New(options Options) *Manager {
	m := &Manager{options: options, podCIDRs: options.PodCIDRs, wake: make(chan struct{}, 1), tables: map[iptables.Protocol]*tables{}}
	m.reconcile()
	return m
}

// SetNodes tells all nodes of the cluster, this one may be among them.
func (m *Manager) SetNodes(nodes []model.Node) {
	m.mutex.Lock()
	m.nodes, m.complete = nodes, true
	m.mutex.Unlock()
	m.poke()
}

// SetPodCIDRs tells the ranges of this node's pods, which may be known late.
func (m *Manager) SetPodCIDRs(podCIDRs []netip.Prefix) {
	m.mutex.Lock()
	m.podCIDRs = podCIDRs
	m.mutex.Unlock()
	m.poke()
}

// PodCIDRs are the ranges of this node's pods; none: not known yet.
func (m *Manager) PodCIDRs() []netip.Prefix {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return slices.Clone(m.podCIDRs)
}

// SetTunnelSetter tells who is told of tunnels. Without it there are none.
func (m *Manager) SetTunnelSetter(set TunnelSetter) {
	m.mutex.Lock()
	m.tunnels = set
	m.mutex.Unlock()
	m.poke()
}

// PodMTU is the largest packet of a pod that every way out carries.
func (m *Manager) PodMTU() int {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return MTU(m.uplinks) - m.overhead
}

func (m *Manager) poke() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Uplinks are the devices by which the node reaches the world, as last seen.
func (m *Manager) Uplinks() []Uplink {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return slices.Clone(m.uplinks)
}

// Problems are what is not as it should be, in words for people.
func (m *Manager) Problems() []string {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return slices.Clone(m.problems)
}

// Run follows the nodes and repairs what somebody else undoes until ctx is
// done. It leaves everything in place.
func (m *Manager) Run(ctx context.Context) error {
	stop := make(chan struct{})
	defer close(stop)
	m.watchKernel(stop)
	ticker := time.NewTicker(checkInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		case <-m.wake:
			// Changes come in bursts: one pass for all of them.
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(50 * time.Millisecond):
			}
			select {
			case <-m.wake:
			default:
			}
		}
		m.reconcile()
	}
}

// watchKernel pokes when one of our routes goes, as all do with a link that goes
// down, when an uplink comes or goes, and when its addresses change. Without it
// the ticker does the same later.
func (m *Manager) watchKernel(stop chan struct{}) {
	routes := make(chan netlink.RouteUpdate, 64)
	if err := netlink.RouteSubscribe(routes, stop); err != nil {
		m.options.Log.Warn("watch routes", "error", err)
	} else {
		go func() {
			for update := range routes {
				if update.Type == unix.RTM_DELROUTE && update.Protocol == Protocol {
					m.poke()
				}
			}
		}()
	}
	links := make(chan netlink.LinkUpdate, 64)
	if err := netlink.LinkSubscribe(links, stop); err != nil {
		m.options.Log.Warn("watch links", "error", err)
	} else {
		go func() {
			up := map[int32]bool{}
			for update := range links {
				now := update.Header.Type == unix.RTM_NEWLINK && update.IfInfomsg.Flags&unix.IFF_RUNNING != 0
				before, known := up[update.Index]
				if (!known || now != before) && m.isUplink(update.Link.Attrs().Name) {
					m.poke()
				}
				if up[update.Index] = now; update.Header.Type == unix.RTM_DELLINK {
					delete(up, update.Index)
				}
			}
		}()
	}
	addresses := make(chan netlink.AddrUpdate, 64)
	if err := netlink.AddrSubscribe(addresses, stop); err != nil {
		m.options.Log.Warn("watch addresses", "error", err)
	} else {
		go func() {
			for update := range addresses {
				if m.isUplinkAt(update.LinkIndex) {
					m.poke()
				}
			}
		}()
	}
}

// isUplink tells whether news of a device concern the node: pods come and go
// by the thousand.
func (m *Manager) isUplink(name string) bool {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return slices.Contains(m.options.Devices, name) || slices.ContainsFunc(m.uplinks, func(u Uplink) bool { return u.Name == name })
}

func (m *Manager) isUplinkAt(index int) bool {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return slices.ContainsFunc(m.uplinks, func(u Uplink) bool { return u.Index == index })
}

// reconcile looks at everything once and mends what differs.
func (m *Manager) reconcile() {
	m.mutex.Lock()
	podCIDRs, nodes, complete, before, set := m.podCIDRs, m.nodes, m.complete, m.problems, m.tunnels
	m.mutex.Unlock()

	v4, v6 := ofFamily(podCIDRs, true), ofFamily(podCIDRs, false)
	uplinks, problems, err := Uplinks(m.options.Devices)
	if err != nil {
		problems = append(problems, err.Error())
	}
	problems = append(problems, setSysctls(len(v4) > 0, len(v6) > 0, uplinks)...)

	tunnels := map[netip.Prefix]Tunnel{}
	find := native
	if m.options.Overlay {
		find = tunnelled(podCIDRs, tunnelAddresses(m.options.Name, nodes, uplinks), tunnels)
	}
	wanted, wrong := routes(m.options.Name, podCIDRs, nodes, find)
	problems = append(problems, wrong...)
	cost := 0
	if m.options.Overlay {
		cost = overhead(tunnels, uplinks)
	}
	overlay, err := m.overlay(podCIDRs, MTU(uplinks)-cost, complete)
	if err != nil {
		problems = append(problems, fmt.Sprintf("%v: other nodes' pods are not reached", err))
		wanted = slices.DeleteFunc(wanted, func(r Route) bool { return r.Overlay && overlay == 0 })
	}
	ready := err == nil && complete && set != nil
	wrong, remove, err := apply(wanted, overlay)
	problems = append(problems, wrong...)
	if err != nil {
		problems = append(problems, err.Error())
	}
	// A tunnel lets in what comes from its node: before that the answers have their
	// route, and until it is gone they keep it. On another they would leave the node bare.
	if ready && err == nil {
		at := overlay
		if !m.options.Overlay {
			at = 0
		}
		if err := set(OverlayDevice, at, tunnels); err != nil {
			problems = append(problems, fmt.Sprintf("%v: other nodes' pods are not reached", err))
		}
	}
	if complete {
		problems = append(problems, remove()...)
	}
	if link, err := overlayLink(); !m.options.Overlay && complete && err == nil && link != nil {
		// An earlier run's. Its routes have been replaced, so that no packet misses it.
		if err := removeOverlay(); err != nil {
			problems = append(problems, err.Error())
		}
	}

	for _, family := range []struct {
		protocol iptables.Protocol
		own      []netip.Prefix
		name     string
	}{{iptables.ProtocolIPv4, v4, "IPv4"}, {iptables.ProtocolIPv6, v6, "IPv6"}} {
		if len(podCIDRs) == 0 {
			break // an earlier run's chains are right until something else is known
		}
		if err := m.masquerade(family.protocol, family.own, nodes, complete); err != nil {
			problems = append(problems, fmt.Sprintf("masquerade (%s): %v; pods of this node do not reach the world", family.name, err))
		}
	}

	m.mutex.Lock()
	m.uplinks, m.problems, m.overhead = uplinks, problems, cost
	m.mutex.Unlock()
	for _, problem := range problems {
		if !slices.Contains(before, problem) {
			m.options.Log.Warn("node is not as it should be", "problem", problem)
		}
	}
}

// overlay keeps the device and returns its index: also that of an earlier run,
// which goes later, once all nodes are known.
func (m *Manager) overlay(podCIDRs []netip.Prefix, mtu int, complete bool) (index int, err error) {
	if m.options.Overlay {
		return ensureOverlay(podCIDRs, mtu)
	}
	link, err := overlayLink()
	if err != nil || !complete || link == nil {
		return 0, err
	}
	return link.Attrs().Index, nil
}

// masquerade keeps one family's chains, or their absence. As long as the nodes
// are not all known, an earlier run's chains stay as they are: with fewer nodes in
// them, connections to the pods of those left out would get another source
// address in the middle.
func (m *Manager) masquerade(protocol iptables.Protocol, own []netip.Prefix, nodes []model.Node, complete bool) error {
	wanted := m.options.Masquerade && len(own) > 0
	t := m.tables[protocol]
	if t == nil {
		var err error
		if t, err = openTables(protocol); err != nil {
			if !wanted {
				return nil // nothing can be there without the program that makes it
			}
			return err
		}
		m.tables[protocol] = t
		if !wanted { // an earlier run may have wanted it
			return t.remove()
		}
	}
	if !wanted {
		return nil
	}
	for _, c := range chains(own, nodes, m.options.Overlay, t.ipt.HasRandomFully()) {
		if !complete && t.written[c.name] == "" {
			there, err := t.show(c)
			if err != nil {
				return err
			}
			if there != "" {
				continue
			}
		}
		repaired, err := t.ensure(c)
		if err != nil {
			return err
		}
		if repaired {
			m.options.Log.Warn("chain was changed by somebody else and is repaired", "table", c.table, "chain", c.name)
		}
	}
	return nil
}

func ofFamily(podCIDRs []netip.Prefix, v4 bool) (own []netip.Prefix) {
	for _, p := range podCIDRs {
		if p.Addr().Is4() == v4 {
			own = append(own, p)
		}
	}
	return own
}

// Cleanup removes what any run of the daemon left in this network namespace:
// routes and chains. Forwarding stays on: others may rely on it by now.
func Cleanup() error {
	errs := []error{removeRoutes(), removeOverlay()}
	for _, protocol := range []iptables.Protocol{iptables.ProtocolIPv4, iptables.ProtocolIPv6} {
		t, err := openTables(protocol)
		if err != nil {
			continue // without the program there is nothing that it made
		}
		if err := t.remove(); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
