// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/api"
)

// cmdDel disconnects a container. It needs neither the container's namespace
// nor the daemon, and it does not mind what is gone already: everything has a
// name that follows from the container's.
func cmdDel(args *skel.CmdArgs) error {
	c, err := conf.ParseNetConf(args.StdinData)
	if err != nil {
		return err
	}
	a := newAttachment(c, args, args.ContainerID, args.IfName)
	a.addresses.Netns = args.Netns
	a.recall()
	if a.hostside, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	return a.del()
}

// del goes on where one thing fails, so that as little as possible stays. The
// addresses come last: they may be another pod's from then on.
func (a *attachment) del() error {
	link, err := a.findPair()
	var others *othersError
	if errors.As(err, &others) {
		// A name that somebody gave the interface is no attachment: the daemon
		// knows it as this one's, and would refuse its addresses to the next.
		if _, _, _, another := readAlias(others.alias); !another {
			err = a.forget()
		} else {
			err = nil
		}
		return errors.Join(err, a.releaseAddresses())
	}
	errs := []error{err}
	if link != nil {
		errs = append(errs, a.deletePair(link))
	}
	errs = append(errs, a.forget(), a.detachPrograms(), a.releaseAddresses())
	return errors.Join(errs...)
}

// forget makes the daemon let go of the endpoint. One that is not there does so
// when it starts, and one that does not answer when it sees the interface gone.
func (a *attachment) forget() error {
	err := a.untellDaemon()
	if api.IsNotRunning(err) || errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	return err
}
