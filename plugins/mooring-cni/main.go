// SPDX-License-Identifier: Apache-2.0

// Command mooring-cni is the CNI plugin: it connects a pod to its node.
//
//	main.go    verbs, and which error has which code
//	attach.go  what one call is about: configuration, container, interface
//	add.go     ADD, from top to bottom
//	del.go     DEL; check.go, gc.go, status.go likewise
//	veth.go    the pair of interfaces: addresses, routes, neighbours
//	undo.go    what takes a failed ADD back
package main

import (
	"fmt"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/ipam"
)

var version = "unknown" // set by the build

// specVersions are those of the CNI specification that the plugin speaks.
var specVersions = cniversion.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0")

func main() {
	skel.PluginMainFuncs(funcs, specVersions, "mooring-cni "+version+": the CNI plugin of Mooring")
}

var funcs = skel.CNIFuncs{
	Add:    coded(cmdAdd),
	Del:    coded(cmdDel),
	Check:  coded(cmdCheck),
	GC:     coded(cmdGC),
	Status: coded(cmdStatus),
}

// differs is the code of a CHECK that finds something else than ADD made. The
// specification leaves codes from 100 on to plugins.
const differs = 100

// coded gives an error that has none of the specification's codes one, and
// keeps all that the error says.
func coded(verb func(*skel.CmdArgs) error) func(*skel.CmdArgs) error {
	return func(args *skel.CmdArgs) error {
		err := verb(args)
		if err == nil {
			return nil
		}
		return types.NewError(code(err), err.Error(), "")
	}
}

func code(err error) uint {
	if api.IsNotRunning(err) || api.IsUnavailable(err) {
		return types.ErrTryAgainLater
	}
	return ipam.Code(err)
}

// failed is an error with one of the specification's codes.
func failed(code uint, format string, args ...any) error {
	return types.NewError(code, fmt.Sprintf(format, args...), "")
}
