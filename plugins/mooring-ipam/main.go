// SPDX-License-Identifier: Apache-2.0

// Command mooring-ipam is the CNI IPAM plugin: it gives out the addresses of the
// node's ranges, as the daemon's node file or the configuration names them. It
// needs no daemon to run. mooring-cni does the same in its own process; this
// command is for other plugins that delegate to it.
package main

import (
	"context"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/ipam"
)

var version = "unknown" // set by the build

func main() {
	skel.PluginMainFuncs(skel.CNIFuncs{
		Add:    verb(add),
		Del:    verb(del),
		Check:  verb(check),
		GC:     verb(gc),
		Status: verb(status),
	}, cniversion.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0"), "mooring-ipam "+version+": the IPAM plugin of Mooring")
}

// limit is how long others may hold the lock of the allocations.
const limit = 10 * time.Second

func verb(do func(context.Context, *ipam.Call, *skel.CmdArgs) error) func(*skel.CmdArgs) error {
	return func(args *skel.CmdArgs) error {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		c, err := conf.ParseIPAMNetConf(args.StdinData)
		if err != nil {
			return err
		}
		call := &ipam.Call{
			Conf: c, Key: ipam.Key{Network: c.Name, ContainerID: args.ContainerID, Ifname: args.IfName},
			Stdin: args.StdinData, Netns: args.Netns, Args: args.Args, Path: args.Path,
		}
		if err := do(ctx, call, args); err != nil {
			return types.NewError(ipam.Code(err), err.Error(), "")
		}
		return nil
	}
}

func add(ctx context.Context, call *ipam.Call, args *skel.CmdArgs) error {
	pod, err := conf.ParsePodArgs(args.Args)
	if err != nil {
		return err
	}
	call.RequestedIP = string(pod.IP)
	result, err := call.Add(ctx)
	if err != nil {
		return err
	}
	return types.PrintResult(result, call.Conf.CNIVersion)
}

func del(ctx context.Context, call *ipam.Call, _ *skel.CmdArgs) error { return call.Del(ctx) }

func check(ctx context.Context, call *ipam.Call, _ *skel.CmdArgs) error {
	_, err := call.Check(ctx)
	return err
}

func gc(ctx context.Context, call *ipam.Call, _ *skel.CmdArgs) error { return call.GC(ctx) }

func status(ctx context.Context, call *ipam.Call, _ *skel.CmdArgs) error {
	if err := call.Status(ctx); err != nil {
		return types.NewError(types.ErrPluginNotAvailable, err.Error(), "")
	}
	return nil
}
