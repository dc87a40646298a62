// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The addresses beyond a node's uplink.
const (
	Router  = "192.0.2.1"       // the nodes' default route
	Router6 = "2001:db8:2::1"   //
	Remote  = "203.0.113.1"     // a host that is no node, in the same namespace
	Remote6 = "2001:db8:203::1" //
)

// Uplink is the name of a node's interface to the outside.
const Uplink = "uplink"

// Outside is what is beyond the nodes' uplinks: their router, and a host of
// the internet. It has no route to pods or services.
type Outside struct {
	*NS
	port  string // where the nodes are: a bridge, or the only node's wire
	nodes int
}

// Node is a throw-away node: a namespace with an uplink and default routes,
// forwarding, and places of its own for all that a daemon keeps.
type Node struct {
	*NS
	Outside *Outside

	NodeName string         // "node-a"
	IP, IP6  netip.Addr     // of the uplink: 192.0.2.11, 2001:db8:2::11
	PodCIDRs []netip.Prefix // 10.244.0.0/24 and fd00:10:244::/64 for node-a, the next ones for node-b

	Dir      string // removed with the node; short enough for a socket's path
	Socket   string // Dir/mooring.sock
	StateDir string // Dir/state
	BPFFS    string // Dir/bpf, a BPF filesystem

	mounts string // its mount namespace; none: the machine's
}

// NewNode makes a node whose uplink ends at an Outside of its own.
func NewNode(t T) *Node {
	t.Helper()
	o := &Outside{NS: New(t, "outside"), port: "node"}
	return o.node(t)
}

// NewOutside makes a network for several nodes: each is on one bridge.
func NewOutside(t T) *Outside {
	t.Helper()
	o := &Outside{NS: New(t, "outside"), port: "nodes"}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: o.port}}
	if err := o.handle.LinkAdd(bridge); err != nil {
		t.Fatalf("make the nodes' bridge: %v", err)
	}
	o.up(t, o.port)
	o.address(t)
	return o
}

// Wire makes a node's link one that carries what a wire does, at both ends.
func (o *Outside) Wire(t T, n *Node) {
	t.Helper()
	port := o.port
	if port == "nodes" {
		port = n.NodeName
	}
	o.LikeADriver(t, port)
	n.WithoutOffloads(t, Uplink)
}

// Node adds a node to the network.
func (o *Outside) Node(t T) *Node {
	t.Helper()
	return o.node(t)
}

func (o *Outside) address(t T) {
	o.Addr(t, o.port, Router+"/24", Router6+"/64")
	o.Addr(t, "lo", Remote+"/32", Remote6+"/128")
	o.Sysctl(t, "net.ipv4.ip_forward", "1")
	o.Sysctl(t, "net.ipv6.conf.all.forwarding", "1")
}

func (o *Outside) node(t T) *Node {
	t.Helper()
	i := o.nodes
	o.nodes++
	letter := string(rune('a' + i))
	n := &Node{
		NS: New(t, "node-"+letter), Outside: o, NodeName: "node-" + letter,
		IP:  netip.AddrFrom4([4]byte{192, 0, 2, byte(11 + i)}),
		IP6: netip.MustParseAddr(fmt.Sprintf("2001:db8:2::%d", 11+i)),
		PodCIDRs: []netip.Prefix{
			netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", i)),
			netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%x::/64", i)),
		},
	}
	n.keep(t)

	if o.port == "nodes" {
		port := "node-" + letter
		Veth(t, o.NS, port, n.NS, Uplink)
		if err := o.handle.LinkSetMaster(o.Link(t, port), o.Link(t, o.port)); err != nil {
			t.Fatalf("put %s on the nodes' bridge: %v", port, err)
		}
	} else {
		Veth(t, o.NS, o.port, n.NS, Uplink)
		o.address(t)
	}
	n.Addr(t, Uplink, n.IP.String()+"/24", n.IP6.String()+"/64")
	n.Sysctl(t, "net.ipv4.ip_forward", "1")
	n.Sysctl(t, "net.ipv6.conf.all.forwarding", "1")
	n.Route(t, "default", Router, Uplink)
	n.Route(t, "default6", Router6, Uplink)
	return n
}

// Again is the same node with other places for what a daemon keeps, as another daemon has them.
func (n *Node) Again(t T) *Node {
	t.Helper()
	other := *n
	other.keep(t)
	return &other
}

// keep makes the places of all that a daemon keeps.
func (n *Node) keep(t T) {
	t.Helper()
	n.Dir = Directory(t, n.NodeName)
	n.Socket = filepath.Join(n.Dir, "mooring.sock")
	n.StateDir = filepath.Join(n.Dir, "state")
	n.BPFFS = filepath.Join(n.Dir, "bpf")
	for _, dir := range []string{n.StateDir, n.BPFFS} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatalf("make %s: %v", n.NodeName, err)
		}
	}
	if err := unix.Mount("bpf", n.BPFFS, "bpf", 0, "mode=0700"); err != nil {
		t.Fatalf("mount a BPF filesystem on %s: %v", n.BPFFS, err)
	}
}
