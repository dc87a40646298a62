// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/test/netns"
)

// Gateway is every pod's next hop in its own family.
const (
	Gateway  = "169.254.1.1"
	Gateway6 = "fe80::1"
)

// Node is a node with the datapath loaded and nobody who manages it: tests write the maps.
type Node struct {
	*netns.Node
	*bpf.Datapath

	tables   []*ebpf.Map // every map that holds conntrack entries
	pods     []*Pod
	backends uint32
	slots    uint32
	services uint32
	shared   bpf.Shared
	driver   *ebpf.Program // nil: none
	fast     int           // packets that it did all of
}

// Options say what a node should have that is not usual.
type Options struct {
	MaxEntries uint32
	Policy     bool   // enforce network policies: a pod is closed until something is said of it
	Hook       string // conntrack.hook; empty: off
	Cgroup     string // where the hook for close() attaches
	SNATPorts  bpf.PortRange
	NoCache    bool // see bpf.Options
	XDP        bool // the driver's program looks at what comes by the uplink first
}

// NewNode makes a node in namespaces of its own, with an uplink to n.Outside.
func NewNode(t testing.TB, options ...Options) *Node {
	t.Helper()
	o := Options{MaxEntries: 4096}
	for _, given := range options {
		o = given
	}
	n := &Node{Node: netns.NewNode(t)}
	n.Datapath = n.load(t, o)
	n.addresses(t)
	if o.XDP {
		n.drive(t)
	}
	n.changed(t)
	pins, err := filepath.Glob(filepath.Join(n.BPFFS, "v*", "maps", "mooring_ct*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, pin := range pins {
		m, err := ebpf.LoadPinnedMap(pin, nil)
		if err != nil {
			t.Fatalf("open %s: %v", pin, err)
		}
		t.Cleanup(func() { m.Close() })
		if m.Type() == ebpf.LRUHash {
			n.tables = append(n.tables, m)
		}
	}
	return n
}

// drive attaches the driver's program to the uplink, whose router is known, and
// opens every door.
func (n *Node) drive(t testing.TB) {
	t.Helper()
	uplink := n.Link(t, netns.Uplink).Attrs()
	options := bpf.XDPOptions{Mode: bpf.XDPNative}
	copy(options.MAC[:], uplink.HardwareAddr)
	err := n.Do(func() (err error) {
		if n.driver, err = n.LoadXDP(options); err == nil {
			err = n.AttachXDP(netns.Uplink, uplink.Index, options)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.driver.Close() })
	for _, router := range []string{netns.Router, netns.Router6} {
		neighbour(t, n.NS, netns.Uplink, netip.MustParseAddr(router), routerMAC)
	}
}

// Driver is the program of the uplink's driver.
func (n *Node) Driver() *ebpf.Program { return n.driver }

// OpenDoors opens these addresses' doors, and shuts all others.
func (n *Node) OpenDoors(t testing.TB, addresses ...netip.Addr) {
	t.Helper()
	words := make([]uint64, n.Doors.MaxEntries())
	for _, a := range addresses {
		word, bit := bpf.Door(bpf.ToAddr(a))
		words[word] |= 1 << bit
	}
	for i, word := range words {
		put(t, n.Doors, uint32(i), word)
	}
}

// addresses tells the programs which addresses are the node's, and opens all doors.
func (n *Node) addresses(t testing.TB) {
	t.Helper()
	uplink := uint32(n.Link(t, netns.Uplink).Attrs().Index)
	put(t, n.Uplinks, uplink, bpf.Uplink{V4: bpf.ToAddr(n.IP), V6: bpf.ToAddr(n.IP6)})
	for _, a := range []netip.Addr{n.IP, n.IP6} {
		put(t, n.NodeAddresses, bpf.ToAddr(a), uint32(1))
	}
	for i := range n.Doors.MaxEntries() {
		put(t, n.Doors, i, ^uint64(0))
	}
}

// changed makes sockets forget what they decided on the maps as they were.
func (n *Node) changed(t testing.TB) {
	t.Helper()
	n.shared.Generation++
	put(t, n.Shared, uint32(0), n.shared)
}

// Pod is a pod of the node: a namespace behind a veth, with both programs attached.
type Pod struct {
	*netns.NS
	ID           uint16
	V4, V6       netip.Addr
	MAC, HostMAC MAC
	Host         string // the name of the host's end
	Ifindex      int    // of the host's end
}

// Pod adds a pod, as the plugin does.
func (n *Node) Pod(t testing.TB) *Pod {
	t.Helper()
	i := len(n.pods)
	p := &Pod{
		NS:   netns.New(t, fmt.Sprintf("pod%d", i+1)),
		ID:   uint16(i + 1),
		V4:   netip.AddrFrom4([4]byte{10, 244, 0, byte(5 + i)}),
		V6:   netip.MustParseAddr(fmt.Sprintf("fd00:10:244::%d", 5+i)),
		Host: fmt.Sprintf("lxc%d", i+1),
	}
	netns.Veth(t, n.NS, p.Host, p.NS, "eth0")
	host, inside := n.Link(t, p.Host).Attrs(), p.Link(t, "eth0").Attrs()
	p.Ifindex = host.Index
	copy(p.HostMAC[:], host.HardwareAddr)
	copy(p.MAC[:], inside.HardwareAddr)

	// Routes and neighbours as the plugin makes them: nobody has to ask for an address.
	n.Addr(t, p.Host, Gateway+"/32", Gateway6+"/128")
	p.Addr(t, "eth0", p.V4.String()+"/32", p.V6.String()+"/128")
	p.Route(t, Gateway+"/32", "", "eth0")
	p.Route(t, "default", Gateway, "eth0")
	p.Route(t, "default6", Gateway6, "eth0")
	n.Route(t, p.V4.String()+"/32", "", p.Host)
	n.Route(t, p.V6.String()+"/128", "", p.Host)
	for _, address := range []string{Gateway, Gateway6} {
		neighbour(t, p.NS, "eth0", netip.MustParseAddr(address), p.HostMAC)
	}
	for _, address := range []netip.Addr{p.V4, p.V6} {
		neighbour(t, n.NS, p.Host, address, p.MAC)
		n.register(t, p, address)
	}
	if err := n.Do(func() error { return bpf.AttachEndpoint(n.BPFFS, p.Host, p.Ifindex) }); err != nil {
		t.Fatal(err)
	}
	n.pods = append(n.pods, p)
	return p
}

func (n *Node) register(t testing.TB, p *Pod, address netip.Addr) {
	t.Helper()
	put(t, n.Endpoints, bpf.ToAddr(address), bpf.Endpoint{
		Ifindex: uint32(p.Ifindex), Id: p.ID, Mac: p.MAC, HostMac: p.HostMAC,
	})
	n.changed(t)
}

func neighbour(t testing.TB, ns *netns.NS, dev string, address netip.Addr, mac MAC) {
	t.Helper()
	family := netlink.FAMILY_V4
	if address.Is6() {
		family = netlink.FAMILY_V6
	}
	err := ns.Netlink().NeighSet(&netlink.Neigh{
		LinkIndex: ns.Link(t, dev).Attrs().Index, Family: family, State: unix.NUD_PERMANENT,
		IP: address.AsSlice(), HardwareAddr: mac[:],
	})
	if err != nil {
		t.Fatalf("add neighbour %s to %s of %s: %v", address, dev, ns.Name(), err)
	}
}

func put(t testing.TB, m *ebpf.Map, key, value any) {
	t.Helper()
	if err := m.Put(key, value); err != nil {
		t.Fatalf("write %s: %v", m, err)
	}
}

// IP is the pod's address of a family.
func (p *Pod) IP(v6 bool) netip.Addr {
	if v6 {
		return p.V6
	}
	return p.V4
}

// At is an address and port of the pod.
func (p *Pod) At(v6 bool, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(p.IP(v6), port)
}

// Forget takes the pod out of the maps, as when it was deleted.
func (n *Node) Forget(t testing.TB, p *Pod) {
	t.Helper()
	for _, address := range []netip.Addr{p.V4, p.V6} {
		if err := n.Endpoints.Delete(bpf.ToAddr(address)); err != nil {
			t.Fatalf("delete endpoint %s: %v", address, err)
		}
	}
	n.changed(t)
}

// Service is a frontend of one port.
type Service struct {
	Frontend netip.AddrPort
	Proto    uint8
	Backends []uint32 // their indices
	value    bpf.Service
	node     *Node
}

// VIP is the n-th service address of a family.
func VIP(v6 bool, n int, port uint16) netip.AddrPort {
	if v6 {
		return netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf("fd00:10:96::%x", n)), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, byte(n)}), port)
}

// Service adds a frontend with its backends.
func (n *Node) Service(t testing.TB, proto uint8, frontend netip.AddrPort, backends ...netip.AddrPort) *Service {
	t.Helper()
	n.services++
	s := &Service{Frontend: frontend, Proto: proto, value: bpf.Service{Id: n.services}, node: n}
	for _, b := range backends {
		s.Backends = append(s.Backends, n.backend(t, proto, b))
	}
	s.Choose(t, s.Backends...)
	if frontend.Addr() == n.IP || frontend.Addr() == n.IP6 {
		s.Change(t, func(v *bpf.Service) { v.Flags |= bpf.ServiceExternal })
		return s // a node port: the address is used for other things as well
	}
	put(t, n.Services, bpf.ServiceKey{Addr: bpf.ToAddr(frontend.Addr())}, bpf.Service{Id: ^uint32(0), Flags: bpf.ServiceAddress})
	return s
}

func (n *Node) backend(t testing.TB, proto uint8, at netip.AddrPort) uint32 {
	t.Helper()
	n.backends++
	n.SetBackend(t, n.backends, bpf.Backend{
		Addr: bpf.ToAddr(at.Addr()), Port: bpf.Port(at.Port()), Proto: proto, State: bpf.BackendActive, Generation: 1,
	})
	return n.backends
}

// SetBackend writes a backend as it is now.
func (n *Node) SetBackend(t testing.TB, index uint32, b bpf.Backend) {
	t.Helper()
	put(t, n.Datapath.Backends, index, b)
	n.changed(t)
}

// BackendAt reads a backend.
func (n *Node) BackendAt(t testing.TB, index uint32) (b bpf.Backend) {
	t.Helper()
	if err := n.Datapath.Backends.Lookup(index, &b); err != nil {
		t.Fatalf("read backend %d: %v", index, err)
	}
	return b
}

// Change changes the frontend's value.
func (s *Service) Change(t testing.TB, change func(*bpf.Service)) {
	t.Helper()
	change(&s.value)
	put(t, s.node.Services, bpf.ServiceKey{
		Addr: bpf.ToAddr(s.Frontend.Addr()), Port: bpf.Port(s.Frontend.Port()), Proto: s.Proto,
	}, s.value)
	s.node.changed(t)
}

// Choose makes new flows take one of these backends.
func (s *Service) Choose(t testing.TB, backends ...uint32) {
	t.Helper()
	first := s.node.slots
	for _, b := range backends {
		put(t, s.node.Slots, s.node.slots, b)
		s.node.slots++
	}
	s.Change(t, func(v *bpf.Service) {
		v.Internal = bpf.Slots{First: first, Count: uint32(len(backends))}
		v.External = v.Internal
	})
}
