// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

var overlayHooks = []hook{
	{name: "from_overlay", attach: ebpf.AttachTCXIngress},
	{name: "to_overlay", attach: ebpf.AttachTCXEgress},
}

// Drop reasons of tunnels.
const (
	DropNoTunnel     = abiDropReasonDROP_NO_TUNNEL
	DropTunnelSource = abiDropReasonDROP_TUNNEL_SOURCE
)

// AttachOverlay attaches the programs of tunnels to the VXLAN device, as pinned
// links that outlive the daemon; those of an earlier run get today's programs.
func (d *Datapath) AttachOverlay(ifname string, ifindex int) error {
	spec, err := loadOverlay()
	if err != nil {
		return fmt.Errorf("read overlay programs: %w", err)
	}
	keepUsedMaps(spec)
	c, err := d.collection(spec, Options{})
	if err != nil {
		return err
	}
	defer c.Close()
	for _, h := range overlayHooks {
		if err := attach(d.pins.link(ifname, h.name), c.Programs[h.name], h, ifindex); err != nil {
			return fmt.Errorf("attach %s to %s: %w", h.name, ifname, err)
		}
	}
	return nil
}

// DetachOverlay removes what AttachOverlay pinned; nil when there is nothing.
func (d *Datapath) DetachOverlay(ifname string) error {
	for _, h := range overlayHooks {
		if err := os.Remove(d.pins.link(ifname, h.name)); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			return fmt.Errorf("unpin %s of %s: %w", h.name, ifname, err)
		}
	}
	return nil
}
