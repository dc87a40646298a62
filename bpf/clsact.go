// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
)

// Kernels before 6.6 have no TCX links: the programs then hang on the clsact
// qdisc, which lives and dies with the device.

func clsactFilter(h hook, ifindex int) *netlink.BpfFilter {
	parent := uint32(netlink.HANDLE_MIN_INGRESS)
	if h.attach == ebpf.AttachTCXEgress {
		parent = netlink.HANDLE_MIN_EGRESS
	}
	return &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex,
			Parent:    parent,
			Handle:    1,
			Priority:  1 + h.after,
			Protocol:  3, // ETH_P_ALL
		},
		Name:         h.name,
		DirectAction: true,
	}
}

func attachClsact(prog *ebpf.Program, h hook, ifindex int) error {
	qdisc := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: ifindex,
			Handle:    netlink.MakeHandle(0xffff, 0),
			Parent:    netlink.HANDLE_CLSACT,
		},
		QdiscType: "clsact",
	}
	if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("add clsact qdisc: %w", err)
	}
	filter := clsactFilter(h, ifindex)
	filter.Fd = prog.FD()
	if err := netlink.FilterReplace(filter); err != nil {
		return fmt.Errorf("add clsact filter: %w", err)
	}
	return nil
}

// detachClsact removes a program that attachClsact attached; nil when there is none.
func detachClsact(h hook, dev netlink.Link) error {
	want := clsactFilter(h, dev.Attrs().Index)
	filters, err := netlink.FilterList(dev, want.Parent)
	if err != nil {
		return fmt.Errorf("list clsact filters of %s: %w", dev.Attrs().Name, err)
	}
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Name == h.name {
			if err := netlink.FilterDel(f); err != nil {
				return fmt.Errorf("remove clsact filter %s of %s: %w", h.name, dev.Attrs().Name, err)
			}
		}
	}
	return nil
}

func checkClsact(h hook, ifindex int) error {
	want := clsactFilter(h, ifindex)
	dev, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return err
	}
	filters, err := netlink.FilterList(dev, want.Parent)
	if err != nil {
		return err
	}
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Name == h.name {
			return nil
		}
	}
	return errors.New("neither a pinned link nor a clsact filter")
}
