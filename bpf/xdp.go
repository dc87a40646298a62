// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// The modes of XDP, as configuration and status name them.
const (
	XDPAuto    = "auto"
	XDPNative  = "native"
	XDPGeneric = "generic"
	XDPOff     = "off"
)

const xdpHook = "from_wire_xdp"

// XDPOptions say how a device's driver is to be used.
type XDPOptions struct {
	Mode string  // native or generic
	MAC  [6]byte // the device's
}

// LoadXDP loads the driver's program for one device. The caller closes it.
func (d *Datapath) LoadXDP(opts XDPOptions) (*ebpf.Program, error) {
	spec, err := loadXdp()
	if err != nil {
		return nil, fmt.Errorf("read the drivers' program: %w", err)
	}
	if err := d.configure(spec, d.options); err != nil {
		return nil, err
	}
	if err := spec.Variables["wire_mac"].Set(opts.MAC); err != nil {
		return nil, fmt.Errorf("set wire_mac: %w", err)
	}
	c, err := d.collection(spec, d.options)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.DetachProgram(xdpHook), nil
}

// AttachXDP attaches the driver's program to a device, as a pinned link that
// outlives the daemon; one of an earlier run in the same mode gets today's
// program in place, so that no packet misses it.
func (d *Datapath) AttachXDP(ifname string, ifindex int, opts XDPOptions) error {
	prog, err := d.LoadXDP(opts)
	if err != nil {
		return err
	}
	defer prog.Close()
	pin := d.xdpPin(ifname, opts.Mode)
	if old, err := link.LoadPinnedLink(pin, nil); err == nil {
		defer old.Close()
		if info, err := old.Info(); err == nil && info.XDP() != nil && info.XDP().Ifindex == uint32(ifindex) {
			if err := old.Update(prog); err != nil {
				return fmt.Errorf("update %s on %s: %w", xdpHook, ifname, err)
			}
			return nil
		}
	}
	// Another mode's, or of a device of the same name in an earlier life.
	if err := d.DetachXDP(ifname); err != nil {
		return err
	}
	flags := link.XDPGenericMode
	if opts.Mode == XDPNative {
		flags = link.XDPDriverMode
	}
	l, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: ifindex, Flags: flags})
	switch {
	case err == nil:
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		return fmt.Errorf("attach %s to %s: another program is on the device (`ip link show dev %s`), of another mooringd perhaps: %w", xdpHook, ifname, ifname, err)
	case opts.Mode != XDPNative:
		return fmt.Errorf("attach %s to %s: %w", xdpHook, ifname, err)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("attach %s to %s: its driver has no XDP, or none as it is set up: %w", xdpHook, ifname, err)
	case errors.Is(err, unix.ERANGE), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("attach %s to %s: its driver does not do XDP with packets as long as its MTU, or its other end's: %w", xdpHook, ifname, err)
	default:
		return fmt.Errorf("attach %s to %s: %w", xdpHook, ifname, err)
	}
	defer l.Close()
	if err := l.Pin(pin); err != nil {
		return fmt.Errorf("pin %s of %s: %w", xdpHook, ifname, err)
	}
	return nil
}

func (d *Datapath) xdpPin(ifname, mode string) string {
	return d.pins.link(ifname, xdpHook+"_"+mode)
}

// DetachXDP removes what AttachXDP made; nil when there is nothing.
func (d *Datapath) DetachXDP(ifname string) error {
	for _, mode := range []string{XDPNative, XDPGeneric} {
		pin := d.xdpPin(ifname, mode)
		l, err := link.LoadPinnedLink(pin, nil)
		if err == nil {
			// Not by the pin alone: the next one is refused as long as this one lingers.
			if detacher, ok := l.(interface{ Detach() error }); ok {
				_ = detacher.Detach() // of a device that is gone there is nothing to detach
			}
			l.Close()
		}
		if err := os.Remove(pin); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			return fmt.Errorf("unpin %s: %w", filepath.Base(pin), err)
		}
	}
	return nil
}
