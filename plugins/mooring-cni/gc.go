// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/api"
)

// cmdGC removes what this network has for attachments that the runtime does not
// name as valid. Like DEL it goes on where one thing fails.
func cmdGC(args *skel.CmdArgs) error {
	c, err := conf.ParseNetConf(args.StdinData)
	if err != nil {
		return err
	}
	// Nobody's attachment, for what is common to all of them.
	network := newAttachment(c, args, "", "")
	network.recall()
	if network.hostside, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	known, err := network.attachments()
	errs := []error{err}
	valid := map[types.GCAttachment]bool{}
	for _, v := range c.ValidAttachments {
		valid[v] = true
	}
	for v := range known {
		if valid[v] {
			continue
		}
		a := newAttachment(c, args, v.ContainerID, v.IfName)
		a.bpffs, a.hostside, a.daemon = network.bpffs, network.hostside, network.daemon
		if err := a.del(); err != nil {
			errs = append(errs, fmt.Errorf("container %s, interface %s: %w", v.ContainerID, v.IfName, err))
		}
	}
	errs = append(errs, network.removeStrayPins())
	ctx, cancel := network.addressContext()
	defer cancel()
	errs = append(errs, network.addresses.GC(ctx))
	return errors.Join(errs...)
}

// attachments are those of the network that there are: of interfaces, and of
// the daemon's endpoints, whose interface may be gone.
func (a *attachment) attachments() (map[types.GCAttachment]bool, error) {
	found := map[types.GCAttachment]bool{}
	links, err := a.hostside.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	for _, link := range links {
		if network, containerID, ifname, ours := readAlias(link.Attrs().Alias); ours && network == a.conf.Name {
			found[types.GCAttachment{ContainerID: containerID, IfName: ifname}] = true
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), daemonLimit)
	defer cancel()
	endpoints, err := a.daemon.Attachments(ctx)
	if err != nil && !api.IsNotRunning(err) {
		return found, err
	}
	for _, e := range endpoints {
		if e.Network == a.conf.Name {
			found[types.GCAttachment{ContainerID: e.ContainerID, IfName: e.PodIfname}] = true
		}
	}
	return found, nil
}

// removeStrayPins removes the pins of interfaces that are gone: deleting one
// detaches its programs but leaves their pins.
func (a *attachment) removeStrayPins() error {
	names, err := bpf.EndpointLinks(a.bpffs)
	if err != nil {
		return err
	}
	for _, name := range names {
		_, err := a.hostside.LinkByName(name)
		if err == nil {
			continue
		}
		if !gone(err) {
			return fmt.Errorf("look at %s: %w", name, err)
		}
		if err := bpf.DetachEndpoint(a.bpffs, name); err != nil {
			return err
		}
	}
	return nil
}
