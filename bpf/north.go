// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// On the device of tunnels they have their turn after those of tunnels.
var (
	wireHook  = hook{name: "from_wire", attach: ebpf.AttachTCXIngress, after: 1}
	wireHooks = []hook{wireHook, {name: "to_wire", attach: ebpf.AttachTCXEgress, after: 1}}
)

// PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

func (r PortRange) count() uint16 { return r.Last - r.First + 1 }

// What is left below Linux' own ephemeral ports and Kubernetes' node ports.
var defaultSNATPorts = PortRange{1024, 29999}

// What is at an address of the cluster (enum node_flags).
const (
	NodePods   = uint32(abiNodeFlagsNODE_PODS)
	NodeItself = uint32(abiNodeFlagsNODE_ITSELF)
)

// Drop reasons at uplinks.
const (
	DropSourceRange = abiDropReasonDROP_SOURCE_RANGE
	DropMartian     = abiDropReasonDROP_MARTIAN
	DropSNATPorts   = abiDropReasonDROP_SNAT_PORTS
	DropTooBig      = abiDropReasonDROP_TOO_BIG
	DropHopLimit    = abiDropReasonDROP_HOP_LIMIT
	DropNoRoute     = abiDropReasonDROP_NO_ROUTE
	DropDSROption   = abiDropReasonDROP_DSR_OPTION
)

// Door is the place of an address's bit in mooring_doors, as lib/north.h:north_door looks for it.
func Door(a Addr) (word int, bit uint) {
	var hash uint32
	for i := 0; i < len(a.B); i += 4 {
		hash ^= binary.NativeEndian.Uint32(a.B[i:])
	}
	hash *= 0x9e3779b1
	return int(hash >> 22), uint(hash >> 16 & 63)
}

func (d *Datapath) loadWire(opts Options) error {
	spec, err := loadNorth()
	if err != nil {
		return fmt.Errorf("read the uplinks' programs: %w", err)
	}
	if err := d.configure(spec, opts); err != nil {
		return err
	}
	c, err := d.collection(spec, opts)
	if err != nil {
		return err
	}
	defer c.Close()
	d.FromWire = c.DetachProgram("from_wire")
	d.ToWire = c.DetachProgram("to_wire")
	return nil
}

// AttachUplink attaches the programs of uplinks to a device, as pinned links that
// outlive the daemon; those of an earlier run get today's programs in place.
func (d *Datapath) AttachUplink(ifname string, ifindex int) error {
	programs := map[string]*ebpf.Program{"from_wire": d.FromWire, "to_wire": d.ToWire}
	for _, h := range wireHooks {
		if err := attach(d.pins.link(ifname, h.name), programs[h.name], h, ifindex); err != nil {
			return fmt.Errorf("attach %s to %s: %w", h.name, ifname, err)
		}
	}
	return nil
}

// UplinkLinks lists the devices that have a pinned link of the uplinks' program at tc.
func (d *Datapath) UplinkLinks() ([]string, error) {
	pins, err := filepath.Glob(d.pins.link("*", wireHook.name))
	for i := range pins {
		pins[i] = withDots.Replace(strings.TrimSuffix(filepath.Base(pins[i]), "-"+wireHook.name))
	}
	return pins, err
}

// DetachUplink removes what AttachUplink made; nil when there is nothing.
func (d *Datapath) DetachUplink(ifname string) error {
	if err := d.DetachXDP(ifname); err != nil {
		return err
	}
	for _, h := range wireHooks {
		if err := os.Remove(d.pins.link(ifname, h.name)); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			return fmt.Errorf("unpin %s of %s: %w", h.name, ifname, err)
		}
	}
	dev, err := netlink.LinkByName(ifname)
	if err != nil {
		return nil // gone, with all that was on it
	}
	return detachWire(dev)
}

func detachWire(dev netlink.Link) error {
	var errs []error
	for _, h := range wireHooks {
		errs = append(errs, detachClsact(h, dev))
	}
	return errors.Join(errs...)
}

// DetachUplinks removes from every device of this network namespace what has no
// pin: on kernels without TCX links.
func DetachUplinks() error {
	devices, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	var errs []error
	for _, dev := range devices {
		errs = append(errs, detachWire(dev))
	}
	return errors.Join(errs...)
}
