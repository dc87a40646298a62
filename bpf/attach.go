// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// hook is one place of an endpoint's interface where a program runs.
type hook struct {
	name   string // of the program, and in the pin
	attach ebpf.AttachType
	after  uint16 // how many of ours a clsact qdisc runs before
}

var endpointHooks = []hook{
	{name: "from_container", attach: ebpf.AttachTCXIngress},
	{name: "to_container", attach: ebpf.AttachTCXEgress},
}

// AttachEndpoint attaches the pinned endpoint programs to an interface, as
// pinned links that outlive both the plugin and the daemon. Doing it again is
// fine: the links then run the programs that are pinned now.
func AttachEndpoint(bpffs, ifname string, ifindex int) error {
	pins := PinsAt(bpffs)
	for _, h := range endpointHooks {
		prog, err := ebpf.LoadPinnedProgram(pins.program(h.name), nil)
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("open %s: no datapath is loaded below %s (start mooringd)", h.name, bpffs)
		}
		if err != nil {
			return fmt.Errorf("open %s: %w", h.name, err)
		}
		err = attach(pins.link(ifname, h.name), prog, h, ifindex)
		prog.Close()
		if err != nil {
			return fmt.Errorf("attach %s to %s: %w", h.name, ifname, err)
		}
	}
	return nil
}

// Loaded says whether there are programs to attach to endpoints.
func Loaded(bpffs string) error {
	pins := PinsAt(bpffs)
	for _, h := range endpointHooks {
		if _, err := os.Stat(pins.program(h.name)); err != nil {
			return fmt.Errorf("no datapath is loaded below %s (start mooringd): %w", bpffs, err)
		}
	}
	return nil
}

func attach(pin string, prog *ebpf.Program, h hook, ifindex int) error {
	if old, err := link.LoadPinnedLink(pin, nil); err == nil {
		defer old.Close()
		if linkIfindex(old) == uint32(ifindex) {
			return old.Update(prog)
		}
		// An interface of the same name in an earlier life.
		if err := old.Unpin(); err != nil {
			return err
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: prog, Attach: h.attach})
	if errors.Is(err, ebpf.ErrNotSupported) {
		return attachClsact(prog, h, ifindex)
	}
	if err != nil {
		return err
	}
	defer l.Close()
	if err := l.Pin(pin); err != nil {
		return fmt.Errorf("pin link: %w", err)
	}
	return nil
}

func linkIfindex(l link.Link) uint32 {
	info, err := l.Info()
	if err != nil {
		return 0
	}
	tcx := info.TCX()
	if tcx == nil {
		return 0
	}
	return tcx.Ifindex
}

// DetachEndpoint removes an endpoint's programs and their pins; nil when there
// are none. A deleted device detaches its links but leaves the pins.
func DetachEndpoint(bpffs, ifname string) error {
	pins := PinsAt(bpffs)
	for _, h := range endpointHooks {
		if err := os.Remove(pins.link(ifname, h.name)); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			return fmt.Errorf("unpin %s of %s: %w", h.name, ifname, err)
		}
	}
	return nil
}

// CheckEndpoint tells whether both programs are attached to the interface.
func CheckEndpoint(bpffs, ifname string, ifindex int) error {
	pins := PinsAt(bpffs)
	for _, h := range endpointHooks {
		l, err := link.LoadPinnedLink(pins.link(ifname, h.name), nil)
		if errors.Is(err, os.ErrNotExist) {
			if err := checkClsact(h, ifindex); err != nil {
				return fmt.Errorf("%s is not attached to %s: %w", h.name, ifname, err)
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("open the link of %s on %s: %w", h.name, ifname, err)
		}
		at := linkIfindex(l)
		l.Close()
		if at != uint32(ifindex) {
			return fmt.Errorf("%s is attached to interface %d, not to %s (%d)", h.name, at, ifname, ifindex)
		}
	}
	return nil
}
