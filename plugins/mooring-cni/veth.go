// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A pod's gateway is an address that nobody has: the pod holds a permanent
// neighbour entry that leads to the host's end of its pair.
var (
	gateway4 = netip.MustParseAddr("169.254.1.1")
	gateway6 = netip.MustParseAddr("fe80::1")
)

func gatewayOf(ip netip.Addr) netip.Addr {
	if ip.Is4() {
		return gateway4
	}
	return gateway6
}

func defaultOf(ip netip.Addr) netip.Prefix {
	if ip.Is4() {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

// hostPrefix begins the names of the host's ends.
const hostPrefix = "lxc"

// An alias says whose a host's end is: "mooring NETWORK CONTAINER INTERFACE".
// None of them can hold a space.
const (
	aliasWord = "mooring"
	maxAlias  = 255
)

func aliasOf(network, containerID, ifname string) string {
	return strings.Join([]string{aliasWord, network, containerID, ifname}, " ")
}

func readAlias(alias string) (network, containerID, ifname string, ours bool) {
	words := strings.Split(alias, " ")
	if len(words) != 4 || words[0] != aliasWord {
		return "", "", "", false
	}
	return words[1], words[2], words[3], true
}

// openNetns opens the pod's network namespace, which must not be this one:
// whatever is done there would be done to the node.
func openNetns(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, failed(types.ErrInvalidEnvironmentVariables, "CNI_NETNS: %v", err)
	}
	problem := func() error {
		kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
		if err != nil || kind != unix.CLONE_NEWNET {
			return failed(types.ErrInvalidEnvironmentVariables, "CNI_NETNS: %s is no network namespace", path)
		}
		var pod, host unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &pod); err != nil {
			return fmt.Errorf("stat %s: %w", path, err)
		}
		if err := unix.Stat("/proc/thread-self/ns/net", &host); err != nil {
			return fmt.Errorf("stat this network namespace: %w", err)
		}
		if pod.Dev == host.Dev && pod.Ino == host.Ino {
			return failed(types.ErrInvalidEnvironmentVariables, "CNI_NETNS: %s is the network namespace of the node itself", path)
		}
		return nil
	}()
	if problem != nil {
		f.Close()
		return nil, problem
	}
	return f, nil
}

// makePair makes both ends, the pod's directly where it belongs, and leaves
// them down. An earlier attempt's pair is replaced.
func (a *attachment) makePair() error {
	attributes := netlink.NewLinkAttrs()
	attributes.Name = a.host.name
	attributes.MTU = a.mtu
	attributes.HardwareAddr = a.host.mac
	pair := netlink.NewVeth(attributes)
	pair.PeerName = a.ifname
	pair.PeerHardwareAddr = a.mac
	pair.PeerNamespace = netlink.NsFd(a.netnsFile.Fd())

	err := a.hostside.LinkAdd(pair)
	if errors.Is(err, unix.EEXIST) {
		if err := a.removeEarlier(); err != nil {
			return err
		}
		err = a.hostside.LinkAdd(pair)
	}
	if errors.Is(err, unix.EEXIST) {
		return failed(types.ErrInvalidEnvironmentVariables, "CNI_IFNAME: the pod in %s has an interface %s already, and it is not of this attachment", a.netns, a.ifname)
	}
	if err != nil {
		return fmt.Errorf("add %s with its peer %s in %s: %w", a.host.name, a.ifname, a.netns, err)
	}
	a.host.index = pair.Index
	if err := a.hostside.LinkSetAlias(pair, a.host.alias); err != nil {
		return fmt.Errorf("set the alias of %s: %w", a.host.name, err)
	}
	return nil
}

// removeEarlier removes the pair of an earlier ADD of the same attachment, and
// what a delegated IPAM plugin gave it: such a plugin refuses to give twice.
func (a *attachment) removeEarlier() error {
	link, err := a.findPair()
	if err != nil || link == nil {
		return err
	}
	if err := a.deletePair(link); err != nil {
		return err
	}
	if a.conf.IPAM.Own() {
		return nil
	}
	return a.releaseAddresses()
}

// findPair finds the host's end, nil when there is none. What bears its name is
// not touched unless it is this attachment's.
func (a *attachment) findPair() (netlink.Link, error) {
	link, err := a.hostside.LinkByName(a.host.name)
	if gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", a.host.name, err)
	}
	// One without an alias is of an ADD that was killed at just that moment.
	if alias := link.Attrs().Alias; alias != "" && alias != a.host.alias {
		return nil, &othersError{a.host.name, alias}
	}
	return link, nil
}

// othersError says that the name of the host's end is another attachment's.
type othersError struct{ name, alias string }

func (e *othersError) Error() string {
	return fmt.Sprintf("the name %s is taken by %q: delete that attachment first", e.name, e.alias)
}

func (a *attachment) deletePair(link netlink.Link) error {
	if err := a.hostside.LinkDel(link); err != nil && !gone(err) {
		return fmt.Errorf("delete %s: %w", a.host.name, err)
	}
	return nil
}

// removePair removes what makePair made, and nothing else.
func (a *attachment) removePair() error {
	if a.host.index == 0 {
		return nil
	}
	return a.deletePair(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: a.host.index}})
}

// gone says whether an error means that there is no such interface.
func gone(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound) || errors.Is(err, unix.ENODEV)
}

// configurePod gives the pod's end its addresses, the way out and the
// gateway's neighbour entry. Nothing passes before the host's end is up.
func (a *attachment) configurePod() error {
	// lo is the first interface of every namespace.
	if err := a.podside.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: 1}}); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	link, err := a.podside.LinkByName(a.ifname)
	if err != nil {
		return fmt.Errorf("look for %s: %w", a.ifname, err)
	}
	if err := a.withoutLinkLocal(a.podside, link); err != nil {
		return err
	}
	for _, ip := range a.ips {
		if err := a.addAddress(link, ip); err != nil {
			return fmt.Errorf("add address %s to %s: %w", ip, a.ifname, err)
		}
	}
	if err := a.podside.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", a.ifname, err)
	}
	for _, gateway := range a.gateways() {
		if err := neighbour(a.podside, link, gateway, a.host.mac); err != nil {
			return fmt.Errorf("add neighbour %s on %s: %w", gateway, a.ifname, err)
		}
		for _, r := range wayOut(link, gateway) {
			if err := a.podside.RouteReplace(&r); err != nil {
				return fmt.Errorf("add route to %s by %s on %s: %w", r.Dst, gateway, a.ifname, err)
			}
		}
	}
	return nil
}

// wayOut is the default route by the gateway, and before it, in IPv4, the route
// that says where the gateway is. In IPv6 a link-local gateway is on the link.
func wayOut(link netlink.Link, gateway netip.Addr) []netlink.Route {
	index := link.Attrs().Index
	byGateway := netlink.Route{LinkIndex: index, Dst: ipnet(defaultOf(gateway)), Gw: gateway.AsSlice()}
	if gateway.Is6() {
		return []netlink.Route{byGateway}
	}
	onLink := netlink.Route{LinkIndex: index, Dst: ipnet(only(gateway)), Scope: netlink.SCOPE_LINK}
	return []netlink.Route{onLink, byGateway}
}

// addAddress adds an address that is usable at once: nobody else can have it.
// Where IPv6 is off in the pod, as some runtimes leave it, it is switched on.
func (a *attachment) addAddress(link netlink.Link, ip netip.Addr) error {
	address := &netlink.Addr{IPNet: ipnet(only(ip))}
	if ip.Is4() {
		return a.podside.AddrAdd(link, address)
	}
	address.Flags = unix.IFA_F_NODAD
	err := a.podside.AddrAdd(link, address)
	if errors.Is(err, unix.EACCES) {
		if err := a.inPod(func() error { return writeSysctl("ipv6", a.ifname, "disable_ipv6", "0") }); err != nil {
			return err
		}
		err = a.podside.AddrAdd(link, address)
	}
	return err
}

// raiseHost makes the host's end, and with it the link, pass packets, and says
// where the pod's addresses are. The programs are attached by now.
func (a *attachment) raiseHost() error {
	link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: a.host.index, Name: a.host.name}}
	if err := a.withoutLinkLocal(a.hostside, link); err != nil {
		return err
	}
	// A packet that the programs have rewritten may come from an address that
	// is not routed to this interface.
	if err := writeSysctl("ipv4", a.host.name, "rp_filter", "0"); err != nil {
		return err
	}
	if err := a.hostside.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", a.host.name, err)
	}
	for _, ip := range a.ips {
		if err := neighbour(a.hostside, link, ip, a.mac); err != nil {
			return fmt.Errorf("add neighbour %s on %s: %w", ip, a.host.name, err)
		}
		r := toPod(a.host.index, ip)
		if err := a.hostside.RouteReplace(&r); err != nil {
			return fmt.Errorf("add route to %s on %s: %w", ip, a.host.name, err)
		}
	}
	return nil
}

func toPod(index int, ip netip.Addr) netlink.Route {
	r := netlink.Route{LinkIndex: index, Dst: ipnet(only(ip))}
	if ip.Is4() {
		r.Scope = netlink.SCOPE_LINK
	}
	return r
}

// carrierPatience is how long ADD waits for the pod's end. The link comes up without it, too.
const carrierPatience = 5 * time.Second

// awaitCarrier waits until the pod's end passes packets. It was up before there was a
// carrier, and until the kernel's link watch has seen that, which is a work of its own
// (linkwatch_do_dev()), all that the pod sends is dropped and counted nowhere: a first
// datagram, a DNS query. From Linux 6.8 on asking for the device is what makes it look.
func (a *attachment) awaitCarrier() error {
	for began := time.Now(); ; time.Sleep(time.Millisecond) {
		link, err := a.podside.LinkByName(a.ifname)
		if err != nil {
			return fmt.Errorf("look whether %s is up: %w", a.ifname, err)
		}
		if link.Attrs().OperState == netlink.OperUp || time.Since(began) > carrierPatience {
			return nil
		}
	}
}

// withoutLinkLocal keeps the kernel from giving the interface an IPv6 address
// of its own. There is nobody on the link to use it with, and its duplicate
// address detection and router solicitations would be the pod's first packets.
func (a *attachment) withoutLinkLocal(h *netlink.Handle, link netlink.Link) error {
	err := h.LinkSetIP6AddrGenMode(link, nl.IN6_ADDR_GEN_MODE_NONE)
	if err != nil && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)) && !a.has6() {
		return nil // a kernel without IPv6
	}
	if err != nil {
		return fmt.Errorf("set IPv6 address generation of %s to none: %w", link.Attrs().Name, err)
	}
	return nil
}

func neighbour(h *netlink.Handle, link netlink.Link, ip netip.Addr, mac net.HardwareAddr) error {
	return h.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: ip.AsSlice(), HardwareAddr: mac})
}

// inPod calls f in the pod's namespace.
func (a *attachment) inPod(f func() error) (err error) {
	done := make(chan error)
	go func() {
		done <- func() error {
			// The thread ends with the goroutine, for nobody unlocks it: nothing
			// else may run where it was.
			runtime.LockOSThread()
			if err := unix.Setns(int(a.netnsFile.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter %s: %w", a.netns, err)
			}
			return f()
		}()
	}()
	return <-done
}

func writeSysctl(family, dev, key, value string) error {
	path := filepath.Join("/proc/sys/net", family, "conf", dev, key)
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		return fmt.Errorf("set %s: %w", path, err)
	}
	return nil
}

func (a *attachment) has6() bool {
	for _, ip := range a.ips {
		if ip.Is6() {
			return true
		}
	}
	return false
}

// gateways are those of the families that the pod has.
func (a *attachment) gateways() (gateways []netip.Addr) {
	seen := map[netip.Addr]bool{}
	for _, ip := range a.ips {
		if g := gatewayOf(ip); !seen[g] {
			seen[g] = true
			gateways = append(gateways, g)
		}
	}
	return gateways
}

// only is the prefix that has this address only.
func only(ip netip.Addr) netip.Prefix { return netip.PrefixFrom(ip, ip.BitLen()) }

func ipnet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// handles opens one netlink socket on each side.
func (a *attachment) openHandles() (err error) {
	if a.hostside, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	if a.netnsFile, err = openNetns(a.netns); err != nil {
		return err
	}
	if a.podside, err = netlink.NewHandleAt(netns.NsHandle(a.netnsFile.Fd()), unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open netlink in %s: %w", a.netns, err)
	}
	return nil
}
