// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/model"
)

// Uplink is a device by which services are reached from outside, and this node's
// addresses there.
type Uplink struct {
	Name      string
	Index     int
	MAC       [6]byte
	Veth      bool
	Virtual   bool // it has no driver
	Addresses []netip.Addr
}

// attachment is how a device's packets are looked at.
type attachment struct {
	index  int
	mac    [6]byte
	mode   string // of XDP
	reason string // why not a better one
	failed bool
}

// north writes mooring_uplinks, mooring_node_addresses and mooring_nodes, and attaches the
// program that reads them. What it cannot do on one device is a problem and stops nothing else.
type north struct {
	bpf   *bpf.Datapath
	log   *slog.Logger
	doors *doors
	mode  string // xdp

	mu        sync.Mutex
	uplinks   []Uplink
	addresses []netip.Addr
	attached  map[string]attachment // by the device's name, as this process made them
	problems  []string
	unknown   string // why the nodes are not known
	first     bool   // nothing was done yet
}

// SetUplinks brings the kernel to these devices, and to all addresses of the
// node. It may be called at any time: what is right already is not touched.
func (n *north) SetUplinks(uplinks []Uplink, addresses []netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.first && len(n.problems) == 0 && reflect.DeepEqual(n.uplinks, uplinks) && slices.Equal(n.addresses, addresses) {
		return
	}
	before := n.problems
	n.problems = nil
	fail := func(err error) {
		if err == nil {
			return
		}
		problem := fmt.Sprintf("services from outside: %v", err)
		if n.problems = append(n.problems, problem); !slices.Contains(before, problem) {
			n.log.Warn("an uplink is not as it should be", "error", err)
		}
	}
	fail(n.writeAddresses(addresses))
	fail(n.writeUplinks(uplinks))
	fail(n.detachOthers(uplinks))
	for _, u := range uplinks {
		if a := n.attached[u.Name]; a.index == u.Index && a.mac == u.MAC && !a.failed {
			continue
		}
		a, err := n.attach(u)
		fail(err)
		a.failed = err != nil
		n.attached[u.Name] = a
	}
	n.uplinks, n.addresses, n.first = slices.Clone(uplinks), slices.Clone(addresses), false
}

func (n *north) writeAddresses(addresses []netip.Addr) error {
	wanted := make(map[bpf.Addr]uint32)
	for _, a := range addresses {
		wanted[bpf.ToAddr(a)] = 1
	}
	if err := n.doors.open(slices.Collect(maps.Keys(wanted))...); err != nil {
		return err
	}
	if err := replace(n.bpf.NodeAddresses, wanted); err != nil {
		return fmt.Errorf("write mooring_node_addresses: %w", err)
	}
	return nil
}

// SetNodes tells which nodes there are: what one of them says about a client's
// packet is believed, and their pods and they themselves answer clients directly.
func (n *north) SetNodes(nodes []model.Node) {
	wanted := make(map[bpf.IdentityKey]uint32)
	for i := range nodes {
		for _, prefix := range nodes[i].PodCIDRs {
			wanted[bpf.ToIdentityKey(prefix)] |= bpf.NodePods
		}
	}
	for i := range nodes {
		for _, a := range nodes[i].Addresses {
			wanted[bpf.ToIdentityKey(netip.PrefixFrom(a, a.BitLen()))] |= bpf.NodeItself
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.unknown = ""
	if err := replace(n.bpf.Nodes, wanted); err != nil {
		n.unknown = fmt.Sprintf("services from outside: write mooring_nodes: %v", err)
		n.log.Warn("the cluster's nodes are not known to the datapath", "error", err)
	}
}

// writeUplinks tells by which address of the node a backend beyond each device
// answers; number 0 is for devices that are no uplinks.
func (n *north) writeUplinks(uplinks []Uplink) error {
	wanted := make(map[uint32]bpf.Uplink)
	var any bpf.Uplink
	for _, u := range uplinks {
		var value bpf.Uplink
		for _, a := range slices.Backward(u.Addresses) { // the first of each family stays
			if a.Is4() {
				value.V4 = bpf.ToAddr(a)
			} else {
				value.V6 = bpf.ToAddr(a)
			}
		}
		wanted[uint32(u.Index)] = value
		if any.V4 == (bpf.Addr{}) {
			any.V4 = value.V4
		}
		if any.V6 == (bpf.Addr{}) {
			any.V6 = value.V6
		}
	}
	wanted[0] = any
	if err := replace(n.bpf.Uplinks, wanted); err != nil {
		return fmt.Errorf("write mooring_uplinks: %w", err)
	}
	return nil
}

// detachOthers leaves the devices that are no uplinks any more.
func (n *north) detachOthers(uplinks []Uplink) error {
	have, err := n.bpf.UplinkLinks()
	if err != nil {
		return err
	}
	for name := range n.attached {
		if !slices.Contains(have, name) {
			have = append(have, name)
		}
	}
	var errs []error
	for _, name := range have {
		if slices.ContainsFunc(uplinks, func(u Uplink) bool { return u.Name == name }) {
			continue
		}
		errs = append(errs, n.bpf.DetachUplink(name))
		delete(n.attached, name)
	}
	return errors.Join(errs...)
}

// attach has a device's packets looked at, at tc and, as the configuration has
// it, at the driver. What the driver does not do tc does, so that a device without XDP serves all the same.
func (n *north) attach(u Uplink) (a attachment, err error) {
	a = attachment{index: u.Index, mac: u.MAC, mode: bpf.XDPOff}
	if err := n.bpf.AttachUplink(u.Name, u.Index); err != nil {
		return a, err
	}
	if u.Virtual || n.mode == "" || n.mode == bpf.XDPOff {
		return a, n.bpf.DetachXDP(u.Name)
	}
	if u.Veth && n.mode == bpf.XDPAuto {
		a.reason = "packets of a veth's other end have no sums yet, and are for tc to change"
		return a, n.bpf.DetachXDP(u.Name)
	}
	modes := []string{n.mode}
	if n.mode == bpf.XDPAuto {
		modes = []string{bpf.XDPNative, bpf.XDPGeneric}
	}
	for _, mode := range modes {
		err = n.bpf.AttachXDP(u.Name, u.Index, bpf.XDPOptions{Mode: mode, MAC: u.MAC})
		if err == nil {
			a.mode = mode
			return a, nil
		}
		a.reason, _, _ = strings.Cut(err.Error(), "\n")
	}
	if n.mode == bpf.XDPAuto {
		return a, nil // all is served, if not by the driver; status says why
	}
	return a, fmt.Errorf("xdp: %s: %w; services are served at tc", n.mode, err)
}

// XDP is the mode of each uplink.
func (n *north) XDP() []api.XDPStatus {
	n.mu.Lock()
	defer n.mu.Unlock()
	var list []api.XDPStatus
	for _, u := range n.uplinks {
		a := n.attached[u.Name]
		list = append(list, api.XDPStatus{Device: u.Name, Mode: cmp.Or(a.mode, bpf.XDPOff), Reason: a.reason})
	}
	return list
}

func (n *north) trouble() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.unknown != "" {
		return append(slices.Clone(n.problems), n.unknown)
	}
	return slices.Clone(n.problems)
}

// replace makes a map's content what is wanted: additions first, and nothing
// that is right is touched.
func replace[K comparable, V comparable](m *ebpf.Map, wanted map[K]V) error {
	there := make(map[K]V)
	var key K
	var value V
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		there[key] = value
	}
	if err := entries.Err(); err != nil {
		return err
	}
	for key, value := range wanted {
		if was, known := there[key]; !known || was != value {
			if err := m.Put(&key, &value); err != nil {
				return err
			}
		}
	}
	for key := range there {
		if _, still := wanted[key]; !still {
			if err := m.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return err
			}
		}
	}
	return nil
}

// snatPorts are the ports of the node for flows to backends on other nodes: the
// most that are in a row beside those that Linux gives to its own sockets and
// those of node ports.
func snatPorts(nodeFirst, nodeLast uint16) (bpf.PortRange, error) {
	const first, last = 1024, 65535
	local, err := localPorts()
	if err != nil {
		return bpf.PortRange{}, err
	}
	taken := [][2]int{local, {int(nodeFirst), int(nodeLast)}}
	slices.SortFunc(taken, func(a, b [2]int) int { return a[0] - b[0] })
	var best [2]int
	from := first
	for _, t := range append(taken, [2]int{last + 1, last + 1}) {
		if t[0]-from > best[1]-best[0] {
			best = [2]int{from, t[0]}
		}
		from = max(from, t[1]+1)
	}
	if best[1] == 0 {
		return bpf.PortRange{}, errors.New("no port is left beside nodePort.range and net.ipv4.ip_local_port_range")
	}
	return bpf.PortRange{First: uint16(best[0]), Last: uint16(best[1] - 1)}, nil
}

func localPorts() (ports [2]int, err error) {
	const file = "/proc/sys/net/ipv4/ip_local_port_range"
	content, err := os.ReadFile(file)
	if err == nil {
		_, err = fmt.Sscan(string(content), &ports[0], &ports[1])
	}
	if err != nil {
		return ports, fmt.Errorf("read %s: %w", file, err)
	}
	return ports, nil
}
