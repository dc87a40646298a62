// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Limits of an endpoint (enum endpoint_limits): what it gets, or sends, is to
// pass the qdiscs of its host end.
const (
	LimitIn  = uint16(abiEndpointLimitsLIMIT_IN)
	LimitOut = uint16(abiEndpointLimitsLIMIT_OUT)
)

// The program behind a sender's ingress qdisc. It hangs on a qdisc, which needs no
// pin: it lives and dies with the device, and that with the pod's.
var limitHook = hook{name: "from_limit", attach: ebpf.AttachTCXIngress}

// limitPrefix begins the names of the devices; the rest is the host end's.
const limitPrefix = "lim"

func limitName(ifname string) string { return limitPrefix + strings.TrimPrefix(ifname, "lxc") }

// AttachLimit makes the device of a host end from which what the ingress qdisc
// there lets pass goes on. That it is there is fine: it gets today's program.
func (d *Datapath) AttachLimit(ifname string, ifindex int) error {
	name := limitName(ifname)
	dev, err := limitDevice(name, ifindex, d.limitMAC)
	if err != nil {
		return fmt.Errorf("make %s for the limit of what %s lets in: %w", name, ifname, err)
	}
	if err := attachClsact(d.FromLimit, limitHook, dev.Attrs().Index); err != nil {
		return fmt.Errorf("attach %s to %s: %w", limitHook.name, name, err)
	}
	// Only now, that no packet comes by it before.
	if err := netlink.LinkSetUp(dev); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

func limitDevice(name string, ifindex int, mac net.HardwareAddr) (netlink.Link, error) {
	dev, err := netlink.LinkByName(name)
	if err == nil && dev.Attrs().ParentIndex == ifindex && dev.Type() == "macvlan" {
		return dev, nil
	}
	if err == nil {
		return nil, fmt.Errorf("the name is taken by a %s device", dev.Type())
	}
	attributes := netlink.NewLinkAttrs()
	attributes.Name = name
	attributes.ParentIndex = ifindex
	attributes.HardwareAddr = mac
	if err := netlink.LinkAdd(&netlink.Macvlan{LinkAttrs: attributes, Mode: netlink.MACVLAN_MODE_PRIVATE}); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	if dev, err = netlink.LinkByName(name); err != nil {
		return nil, err
	}
	// Nobody is to be reached at it.
	if err := netlink.LinkSetIP6AddrGenMode(dev, nl.IN6_ADDR_GEN_MODE_NONE); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) {
		return nil, fmt.Errorf("set IPv6 address generation to none: %w", err)
	}
	return dev, nil
}

// DetachLimit removes what AttachLimit made; nil when there is nothing.
func DetachLimit(ifname string) error {
	dev, err := netlink.LinkByName(limitName(ifname))
	var gone netlink.LinkNotFoundError
	if errors.As(err, &gone) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at %s: %w", limitName(ifname), err)
	}
	return removeLimit(dev)
}

// DetachLimits removes all of them.
func DetachLimits() error {
	devices, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	var errs []error
	for _, dev := range devices {
		if strings.HasPrefix(dev.Attrs().Name, limitPrefix) && dev.Type() == "macvlan" {
			errs = append(errs, removeLimit(dev))
		}
	}
	return errors.Join(errs...)
}

// removeLimit leaves alone what only has such a name.
func removeLimit(dev netlink.Link) error {
	spec, err := loadEndpoint()
	if err != nil {
		return fmt.Errorf("read endpoint programs: %w", err)
	}
	mac, err := limitMAC(spec)
	if err != nil || !slices.Equal(mac, dev.Attrs().HardwareAddr) {
		return err
	}
	if err := netlink.LinkDel(dev); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove %s: %w", dev.Attrs().Name, err)
	}
	return nil
}

// limitMAC is the address of the devices, which the programs know.
func limitMAC(spec *ebpf.CollectionSpec) (net.HardwareAddr, error) {
	var mac [6]byte
	if err := spec.Variables["limit_mac"].Get(&mac); err != nil {
		return nil, fmt.Errorf("read limit_mac: %w", err)
	}
	return mac[:], nil
}

// Limits tells by interface which qdiscs are in the way of packets: a root qdisc
// other than the one that queues nothing, and one for ingress, where the
// programs themselves are not on it.
func Limits() (map[int]uint16, error) {
	qdiscs, err := netlink.QdiscList(nil)
	if err != nil {
		return nil, fmt.Errorf("list qdiscs: %w", err)
	}
	limits := make(map[int]uint16)
	for _, q := range qdiscs {
		switch attributes := q.Attrs(); {
		case attributes.Parent == netlink.HANDLE_ROOT && q.Type() != "noqueue":
			limits[attributes.LinkIndex] |= LimitIn
		case attributes.Parent == netlink.HANDLE_INGRESS && q.Type() == "ingress":
			limits[attributes.LinkIndex] |= LimitOut
		}
	}
	return limits, nil
}
