// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/model"
	"github.com/mooring-cni/mooring/ipam"
)

// daemonLimit is how long the daemon may take for one answer: long enough for a
// node where a hundred pods start at once. One that is not there is known to be
// so at once.
const daemonLimit = 10 * time.Second

// addressLimit is how long other processes may hold the addresses' lock.
const addressLimit = 10 * time.Second

// attachment is what a call is about: an interface of a container in a network.
type attachment struct {
	conf        *conf.NetConf
	containerID string
	ifname      string // in the pod
	netns       string
	pod         model.Name
	podUID      string

	daemon    *api.Client
	bpffs     string
	addresses ipam.Call
	host      hostLink

	chained *current.Result // what the plugins before have made, if any

	// The pod's side, as ADD finds it out.
	mac  net.HardwareAddr
	mtu  int
	ips  []netip.Addr
	dns  types.DNS
	node api.Node

	netnsFile         *os.File
	hostside, podside *netlink.Handle
}

// hostLink is the host's end of the pair.
type hostLink struct {
	name  string
	alias string // says whose it is, to people and to GC
	mac   net.HardwareAddr
	index int // 0 until it is made
}

// parse reads what the runtime sent, and changes nothing.
func parse(args *skel.CmdArgs) (*attachment, error) {
	c, err := conf.ParseNetConf(args.StdinData)
	if err != nil {
		return nil, err
	}
	pod, err := conf.ParsePodArgs(args.Args)
	if err != nil {
		return nil, err
	}
	a := newAttachment(c, args, args.ContainerID, args.IfName)
	a.netns, a.addresses.Netns = args.Netns, args.Netns
	a.pod = model.Name{Namespace: string(pod.K8S_POD_NAMESPACE), Name: string(pod.K8S_POD_NAME)}
	a.podUID = string(pod.K8S_POD_UID)
	a.addresses.RequestedIP = string(pod.IP)
	return a, a.requestMAC(string(pod.MAC))
}

// newAttachment is the attachment of a container's interface in the network of
// c, which need not be the one that the runtime calls for.
func newAttachment(c *conf.NetConf, args *skel.CmdArgs, containerID, ifname string) *attachment {
	// The slash is in neither part, so no two attachments share a name by
	// where one ends and the other begins.
	sum := sha256.Sum256([]byte(containerID + "/" + ifname))
	return &attachment{
		conf:        c,
		containerID: containerID,
		ifname:      ifname,
		daemon:      api.NewClient(c.Socket),
		bpffs:       c.BPFFS,
		addresses: ipam.Call{
			Conf: c, Key: ipam.Key{Network: c.Name, ContainerID: containerID, Ifname: ifname},
			Stdin: args.StdinData, Args: args.Args, Path: args.Path,
		},
		host: hostLink{
			name:  hostPrefix + hex.EncodeToString(sum[:6]),
			alias: aliasOf(c.Name, containerID, ifname),
			mac:   localMAC(sum[6:11]),
		},
		mac: localMAC(sum[11:16]),
	}
}

// localMAC is a locally administered unicast address.
func localMAC(b []byte) net.HardwareAddr {
	return append(net.HardwareAddr{0x0a}, b...)
}

// requestMAC takes the MAC that the runtime wants for the pod's end, if it does.
func (a *attachment) requestMAC(mac string) error {
	var asked struct {
		RuntimeConfig struct {
			MAC string `json:"mac"`
		} `json:"runtimeConfig"`
	}
	if err := json.Unmarshal(a.addresses.Stdin, &asked); err != nil {
		return failed(types.ErrDecodingFailure, "decode the network configuration: runtimeConfig: %v", err)
	}
	if asked.RuntimeConfig.MAC != "" {
		mac = asked.RuntimeConfig.MAC
	}
	if mac == "" {
		return nil
	}
	parsed, err := net.ParseMAC(mac)
	if err != nil || len(parsed) != 6 || parsed[0]&1 != 0 {
		return failed(types.ErrInvalidNetworkConfig, "the MAC asked for, %q, is no Ethernet address that an interface can have", mac)
	}
	a.mac = parsed
	return nil
}

// previous is what the plugins before this one, or in CHECK the ADD of the same
// chain, have answered; nil if the runtime sent nothing.
func (a *attachment) previous() (*current.Result, error) {
	// The library's conversions do not expect a null in a list.
	var lists map[string]json.RawMessage
	if raw, err := json.Marshal(a.conf.RawPrevResult); err != nil || json.Unmarshal(raw, &lists) != nil {
		return nil, failed(types.ErrDecodingFailure, "prevResult: it is no object")
	}
	for _, key := range []string{"interfaces", "ips", "routes"} {
		var list []any
		if json.Unmarshal(lists[key], &list) == nil && slices.Contains(list, nil) {
			return nil, failed(types.ErrDecodingFailure, "prevResult: %s: null is in the list", key)
		}
	}
	if err := a.conf.ParsePrevResult(); err != nil || a.conf.PrevResult == nil {
		return nil, err
	}
	result, err := current.NewResultFromResult(a.conf.PrevResult)
	if err != nil {
		return nil, failed(types.ErrDecodingFailure, "prevResult: %v", err)
	}
	return result, nil
}

// ask asks the daemon what pods are to be like. A daemon that is not there or
// not ready is an error with which the runtime tries again later.
func (a *attachment) ask() (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), daemonLimit)
	defer cancel()
	if a.node, err = a.daemon.Node(ctx); err != nil {
		return err
	}
	if !a.node.Ready {
		return failed(types.ErrTryAgainLater, "mooringd on %s is not ready: %s", a.conf.Socket, a.node.Reason)
	}
	if a.bpffs = a.pins(a.node.BPFFS); a.bpffs != a.node.BPFFS {
		return failed(types.ErrInvalidNetworkConfig, "network configuration: bpffs: %s, but mooringd on %s has its programs in %s", a.bpffs, a.conf.Socket, a.node.BPFFS)
	}
	a.addresses.Node = (*conf.Node)(&a.node)
	if a.mtu = a.conf.MTU; a.mtu == 0 {
		a.mtu = a.node.MTU
	}
	return nil
}

// recall finds out without the daemon what can be known without it.
func (a *attachment) recall() {
	if node, err := conf.ReadNode(a.conf.Socket); err == nil {
		a.bpffs = a.pins(node.BPFFS)
	}
}

// pins is where the programs are: where the stanza says, or, when it says
// nothing in particular, where the daemon says.
func (a *attachment) pins(daemons string) string {
	if a.conf.BPFFS == conf.DefaultBPFFS && daemons != "" {
		return daemons
	}
	return a.conf.BPFFS
}
