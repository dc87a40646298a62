// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/conf"
)

// cmdStatus says whether an ADD could be served now. Code 50: no, but the pods
// that there are go on, for the datapath needs no daemon. Code 51: no, and there
// is no datapath either.
func cmdStatus(args *skel.CmdArgs) error {
	c, err := conf.ParseNetConf(args.StdinData)
	if err != nil {
		return err
	}
	a := newAttachment(c, args, "", "")
	a.recall()
	asked := a.ask()
	if err := bpf.Loaded(a.bpffs); err != nil {
		if asked != nil {
			return failed(types.ErrLimitedConnectivity, "%v; and %v", asked, err)
		}
		return failed(types.ErrLimitedConnectivity, "%v", err)
	}
	if asked != nil {
		return failed(types.ErrPluginNotAvailable, "%v", asked)
	}
	ctx, cancel := context.WithTimeout(context.Background(), daemonLimit)
	defer cancel()
	if err := a.addresses.Status(ctx); err != nil {
		return failed(types.ErrPluginNotAvailable, "%v", err)
	}
	return nil
}
