// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/mooring-cni/mooring/conf"
)

// Call is one call of a CNI plugin, for the addresses of one attachment. They
// come from the node's ranges when the configuration says mooring-ipam, and from
// whichever IPAM plugin it names otherwise. The ranges are read in this process:
// starting another one would cost as much as all the rest.
type Call struct {
	Conf *conf.NetConf
	Key  Key

	// Node is what the daemon says of the node. Without it, its node file tells.
	Node *conf.Node

	// As the runtime sent them. A delegate gets them unchanged.
	Stdin       []byte
	Netns       string
	Args        string // CNI_ARGS
	RequestedIP string // IP of CNI_ARGS
	Path        string // CNI_PATH
}

// Add gets addresses for the attachment. The result has IPs, and of a delegate
// whatever else that says.
func (c *Call) Add(ctx context.Context) (*current.Result, error) {
	if !c.Conf.IPAM.Own() {
		return c.delegateAdd(ctx)
	}
	requested, err := c.requested()
	if err != nil {
		return nil, err
	}
	pool, err := c.pool()
	if err != nil {
		return nil, err
	}
	if len(pool.pools) == 0 {
		return nil, errNoRanges
	}
	prefixes, err := pool.Allocate(ctx, c.Key, requested)
	if err != nil {
		return nil, err
	}
	return asResult(prefixes), nil
}

// Del gives the attachment's addresses back. That it has none is fine.
func (c *Call) Del(ctx context.Context) error {
	if !c.Conf.IPAM.Own() {
		return c.delegate(ctx, "DEL")
	}
	pool, err := c.pool()
	if err != nil {
		return err
	}
	return pool.Release(ctx, c.Key)
}

// Check says whether the attachment still has its addresses, which it answers
// if they are ours.
func (c *Call) Check(ctx context.Context) ([]netip.Addr, error) {
	if !c.Conf.IPAM.Own() {
		return nil, c.delegate(ctx, "CHECK")
	}
	pool, err := c.pool()
	if err != nil {
		return nil, err
	}
	prefixes, err := pool.Check(ctx, c.Key)
	addrs := make([]netip.Addr, len(prefixes))
	for i, p := range prefixes {
		addrs[i] = p.Addr()
	}
	return addrs, err
}

// GC gives back what the network's attachments hold that are not valid.
func (c *Call) GC(ctx context.Context) error {
	if !c.Conf.IPAM.Own() {
		return c.delegate(ctx, "GC")
	}
	valid := map[Key]bool{}
	for _, a := range c.Conf.ValidAttachments {
		valid[Key{c.Conf.Name, a.ContainerID, a.IfName}] = true
	}
	pool, err := c.pool()
	if err != nil {
		return err
	}
	_, err = pool.GC(ctx, c.Conf.Name, valid)
	return err
}

// Status says whether addresses can be had. A pool that is exhausted is no
// reason to fail: runtimes take a node whose STATUS fails for broken, and its
// pods would be moved away.
func (c *Call) Status(ctx context.Context) error {
	if !c.Conf.IPAM.Own() {
		return c.delegate(ctx, "STATUS")
	}
	pool, err := c.pool()
	if err != nil {
		return err
	}
	if len(pool.pools) == 0 {
		return errNoRanges
	}
	_, err = pool.List(ctx)
	return err
}

var errNoRanges = types.NewError(types.ErrTryAgainLater, "it is not known which addresses pods of this node may have: no mooringd has started, and ipam.podCIDRs is not set", "")

// pool opens the allocations where the configuration says they are, or else
// where the daemon says.
func (c *Call) pool() (*Pool, error) {
	own := c.Conf.IPAM
	if len(own.PodCIDRs) > 0 && own.StateDir != "" {
		return Open(own.StateDir, own.PodCIDRs)
	}
	node, err := c.node()
	if err != nil {
		return nil, err
	}
	if len(own.PodCIDRs) > 0 {
		node.PodCIDRs = own.PodCIDRs
	}
	if own.StateDir != "" {
		node.StateDir = own.StateDir
	}
	return Open(node.StateDir, node.PodCIDRs)
}

// node is what is known of the node. Where no daemon has started since the
// machine has, as for the first DELs after a reboot, its default directory is
// tried: what is not there needs no release.
func (c *Call) node() (conf.Node, error) {
	if c.Node != nil && c.Conf.IPAM.Socket == "" {
		return *c.Node, nil
	}
	socket := c.Conf.Socket
	if c.Conf.IPAM.Socket != "" {
		socket = c.Conf.IPAM.Socket
	}
	node, err := conf.ReadNode(socket)
	if errors.Is(err, fs.ErrNotExist) {
		return conf.Node{StateDir: conf.DefaultStateDir}, nil
	}
	return node, err
}

// requested are the addresses that the runtime wants for the attachment, in any
// of the ways that there are to say it.
func (c *Call) requested() ([]netip.Addr, error) {
	var asked struct {
		RuntimeConfig struct {
			IPs []string `json:"ips"`
		} `json:"runtimeConfig"`
		Args struct {
			CNI struct {
				IPs []string `json:"ips"`
			} `json:"cni"`
		} `json:"args"`
	}
	if err := json.Unmarshal(c.Stdin, &asked); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "decode the addresses asked for: "+err.Error(), "")
	}
	type wish struct{ where, text string }
	var wishes []wish
	for _, text := range asked.RuntimeConfig.IPs {
		wishes = append(wishes, wish{"runtimeConfig.ips", text})
	}
	for _, text := range asked.Args.CNI.IPs {
		wishes = append(wishes, wish{"args.cni.ips", text})
	}
	if c.RequestedIP != "" {
		wishes = append(wishes, wish{"IP in CNI_ARGS", c.RequestedIP})
	}
	var addrs []netip.Addr
	for _, w := range wishes {
		bare, _, _ := strings.Cut(w.text, "/") // some runtimes give a length with it
		addr, err := netip.ParseAddr(bare)
		if err != nil {
			return nil, &RequestError{fmt.Sprintf("%s: %q is no IP address", w.where, w.text)}
		}
		if addr = addr.Unmap(); !slices.Contains(addrs, addr) {
			addrs = append(addrs, addr)
		}
	}
	return addrs, nil
}

// asResult is a result as IPAM plugins give it: a gateway that the calling
// plugin may give to the node's side, and no routes, which are its business.
func asResult(prefixes []netip.Prefix) *current.Result {
	r := &current.Result{CNIVersion: current.ImplementedSpecVersion}
	for _, p := range prefixes {
		ip := &current.IPConfig{}
		ip.Address.IP = p.Addr().AsSlice()
		ip.Address.Mask = net.CIDRMask(p.Bits(), p.Addr().BitLen())
		if pool := p.Masked(); pool.Bits() < pool.Addr().BitLen() {
			ip.Gateway = gateway(pool).AsSlice()
		}
		r.IPs = append(r.IPs, ip)
	}
	return r
}

func (c *Call) delegateAdd(ctx context.Context) (*current.Result, error) {
	path, err := c.plugin()
	if err != nil {
		return nil, err
	}
	raw, err := invoke.ExecPluginWithResult(ctx, path, c.Stdin, c.environment("ADD"), nil)
	if err != nil {
		return nil, c.failed("ADD", err)
	}
	result, err := current.NewResultFromResult(raw)
	if err != nil {
		return nil, c.failed("ADD", err)
	}
	return result, nil
}

func (c *Call) delegate(ctx context.Context, verb string) error {
	path, err := c.plugin()
	if err != nil {
		return err
	}
	if err := invoke.ExecPluginWithoutResult(ctx, path, c.Stdin, c.environment(verb), nil); err != nil {
		return c.failed(verb, err)
	}
	return nil
}

func (c *Call) plugin() (string, error) {
	path, err := invoke.FindInPath(c.Conf.IPAM.Type, filepath.SplitList(c.Path))
	if err != nil {
		return "", types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("network configuration: ipam.type: %v", err), "")
	}
	return path, nil
}

func (c *Call) environment(verb string) *invoke.Args {
	return &invoke.Args{Command: verb, ContainerID: c.Key.ContainerID, NetNS: c.Netns, IfName: c.Key.Ifname, PluginArgsStr: c.Args, Path: c.Path}
}

// failed keeps the delegate's code and says whose error it is.
func (c *Call) failed(verb string, err error) error {
	return fmt.Errorf("IPAM plugin %s: %s: %w", c.Conf.IPAM.Type, verb, err)
}

// Code is the code that the CNI specification has for an error of this package
// or of a delegate.
func Code(err error) uint {
	var (
		known     *types.Error
		exhausted *ExhaustedError
		inUse     *InUseError
		request   *RequestError
	)
	switch {
	case errors.As(err, &known):
		return known.Code
	case errors.As(err, &request):
		return types.ErrInvalidNetworkConfig
	case errors.As(err, &exhausted), errors.As(err, &inUse), errors.Is(err, context.DeadlineExceeded):
		return types.ErrTryAgainLater
	}
	return types.ErrIOFailure
}
