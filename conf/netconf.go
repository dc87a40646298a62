// SPDX-License-Identifier: Apache-2.0

package conf

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

// The types under which our plugins stand in CNI configurations.
const (
	PluginType = "mooring-cni"
	IPAMType   = "mooring-ipam"
)

// Bounds of mtu: below the first, IPv6 cannot run on the link (RFC 8200).
const minMTU, maxMTU = 1280, 65535

// NetConf is the stanza of mooring-cni in a CNI configuration, with the defaults
// filled in.
type NetConf struct {
	types.PluginConf
	Socket string
	BPFFS  string
	MTU    int // 0: the uplink's
	IPAM   IPAMConf
}

// IPAMConf is the ipam object. The fields are set for our own type only: what
// stands in the object of another plugin is that plugin's business.
type IPAMConf struct {
	Type string
	// PodCIDRs, StateDir and Socket override what the daemon on the stanza's
	// socket says: for configurations that do without a daemon.
	PodCIDRs []netip.Prefix
	StateDir string
	Socket   string
}

// Own says that addresses come from mooring-ipam.
func (i IPAMConf) Own() bool { return i.Type == IPAMType }

// ParseNetConf reads the stanza of mooring-cni from a plugin's stdin. Its errors
// are *types.Error: code 6 for what cannot be decoded, code 7 for keys that are
// not known and values that are not accepted.
func ParseNetConf(stdin []byte) (*NetConf, error) {
	var keys map[string]json.RawMessage
	if err := decodeObject(stdin, &keys); err != nil {
		return nil, err
	}
	c := &NetConf{Socket: DefaultSocket, BPFFS: DefaultBPFFS}
	if err := c.standard(keys); err != nil {
		return nil, err
	}
	if err := refuseUnknown(keys, "socket", "bpffs", "mtu"); err != nil {
		return nil, err
	}
	if err := path(keys, "socket", "", &c.Socket, CheckSocket); err != nil {
		return nil, err
	}
	if err := path(keys, "bpffs", "", &c.BPFFS, absolute); err != nil {
		return nil, err
	}
	if err := decodeKey(keys, "mtu", "", &c.MTU); err != nil {
		return nil, err
	}
	if c.MTU != 0 && (c.MTU < minMTU || c.MTU > maxMTU) {
		return nil, invalid("mtu", fmt.Sprintf("%d is not accepted; accepted: 0 (the uplink's), or %d to %d", c.MTU, minMTU, maxMTU))
	}
	if err := c.ipam(keys); err != nil {
		return nil, err
	}
	return c, nil
}

// ParseIPAMNetConf reads what mooring-ipam gets on stdin: the configuration of
// whichever plugin delegates to it, of which only the standard keys, socket and
// the ipam object are ours. A stanza of mooring-cni or of mooring-ipam itself is
// checked as a whole.
func ParseIPAMNetConf(stdin []byte) (*NetConf, error) {
	var keys map[string]json.RawMessage
	if err := decodeObject(stdin, &keys); err != nil {
		return nil, err
	}
	c := &NetConf{Socket: DefaultSocket, BPFFS: DefaultBPFFS}
	if err := c.standard(keys); err != nil {
		return nil, err
	}
	switch c.Type {
	case PluginType:
		return ParseNetConf(stdin)
	case IPAMType:
		if err := refuseUnknown(keys, "socket"); err != nil {
			return nil, err
		}
		if err := path(keys, "socket", "", &c.Socket, CheckSocket); err != nil {
			return nil, err
		}
	}
	if err := c.ipam(keys); err != nil {
		return nil, err
	}
	if !c.IPAM.Own() {
		return nil, invalid("ipam.type", fmt.Sprintf("%q is not accepted; accepted: %s", c.IPAM.Type, IPAMType))
	}
	return c, nil
}

// standard reads the keys that the specification defines.
func (c *NetConf) standard(keys map[string]json.RawMessage) error {
	for _, key := range []struct {
		name  string
		value any
	}{
		{"cniVersion", &c.CNIVersion},
		{"name", &c.Name},
		{"type", &c.Type},
		{"capabilities", &c.Capabilities},
		{"dns", &c.DNS},
		{"prevResult", &c.RawPrevResult},
		{"cni.dev/valid-attachments", &c.ValidAttachments},
	} {
		if err := decodeKey(keys, key.name, "", key.value); err != nil {
			return err
		}
	}
	return nil
}

func (c *NetConf) ipam(keys map[string]json.RawMessage) error {
	c.IPAM.Type = IPAMType
	raw, present := keys["ipam"]
	if !present || string(raw) == "null" {
		return nil
	}
	var object map[string]json.RawMessage
	if err := decodeKey(keys, "ipam", "", &object); err != nil {
		return err
	}
	if err := decodeKey(object, "type", "ipam.", &c.IPAM.Type); err != nil {
		return err
	}
	if c.IPAM.Type == "" {
		c.IPAM.Type = IPAMType
	}
	c.PluginConf.IPAM.Type = c.IPAM.Type
	if !c.IPAM.Own() {
		if strings.ContainsAny(c.IPAM.Type, `/\`) {
			return invalid("ipam.type", fmt.Sprintf("%q is not accepted; accepted: the file name of a plugin in CNI_PATH", c.IPAM.Type))
		}
		return nil
	}
	for key := range object {
		if !slices.Contains([]string{"type", "podCIDRs", "stateDir", "socket"}, key) {
			return invalid("ipam."+key, "unknown key; accepted keys: type, podCIDRs, stateDir, socket")
		}
	}
	if err := path(object, "socket", "ipam.", &c.IPAM.Socket, CheckSocket); err != nil {
		return err
	}
	if err := path(object, "stateDir", "ipam.", &c.IPAM.StateDir, absolute); err != nil {
		return err
	}
	var cidrs []string
	if err := decodeKey(object, "podCIDRs", "ipam.", &cidrs); err != nil {
		return err
	}
	scratch := new(Config)
	for _, o := range options {
		if o.key != "podCIDRs" {
			continue
		}
		if err := o.set(scratch, cidrs); err != nil {
			return invalid("ipam.podCIDRs", fmt.Sprintf("%v; accepted: %s", err, o.accepted))
		}
	}
	c.IPAM.PodCIDRs = scratch.PodCIDRs
	return nil
}

// ParsePrevResult fills PrevResult from what the runtime sent, if it did.
func (c *NetConf) ParsePrevResult() error {
	if err := version.ParsePrevResult(&c.PluginConf); err != nil {
		return types.NewError(types.ErrDecodingFailure, "prevResult: "+err.Error(), "")
	}
	return nil
}

// standardKeys may stand in every plugin's stanza: the specification's own, what
// it calls well known, and what runtimes put in. ipMasq is one of them and does
// nothing here: masquerading is the daemon's.
var standardKeys = []string{
	"cniVersion", "cniVersions", "name", "type", "capabilities", "ipam", "ipMasq", "dns",
	"args", "runtimeConfig", "prevResult", "disableCheck", "disableGC", "loadOnlyInlinedPlugins",
}

func refuseUnknown(keys map[string]json.RawMessage, own ...string) error {
	var unknown []string
	for key := range keys {
		if !slices.Contains(own, key) && !slices.Contains(standardKeys, key) && !strings.HasPrefix(key, "cni.dev/") {
			unknown = append(unknown, key)
		}
	}
	if len(unknown) == 0 {
		return nil
	}
	slices.Sort(unknown)
	return invalid(unknown[0], "unknown key; accepted keys: "+strings.Join(own, ", ")+" and those of the CNI specification")
}

func decodeObject(data []byte, keys *map[string]json.RawMessage) error {
	if err := json.Unmarshal(data, keys); err != nil {
		return types.NewError(types.ErrDecodingFailure, "decode the network configuration: "+err.Error(), "")
	}
	if *keys == nil {
		return types.NewError(types.ErrDecodingFailure, "decode the network configuration: null is no object", "")
	}
	return nil
}

// decodeKey decodes one key, whose name it takes exactly and not, as
// encoding/json does, in any case.
func decodeKey(keys map[string]json.RawMessage, key, prefix string, value any) error {
	raw, present := keys[key]
	if !present {
		return nil
	}
	if err := json.Unmarshal(raw, value); err != nil {
		return types.NewError(types.ErrDecodingFailure, fmt.Sprintf("decode the network configuration: %s%s: %v", prefix, key, err), "")
	}
	return nil
}

// path decodes a path; an empty one leaves the default.
func path(keys map[string]json.RawMessage, key, prefix string, value *string, check func(string) error) error {
	var s string
	if err := decodeKey(keys, key, prefix, &s); err != nil || s == "" {
		return err
	}
	if err := check(s); err != nil {
		i := slices.IndexFunc(options, func(o option) bool { return o.key == key })
		return invalid(prefix+key, fmt.Sprintf("%v; accepted: %s", err, options[i].accepted))
	}
	*value = s
	return nil
}

func invalid(key, problem string) error {
	return types.NewError(types.ErrInvalidNetworkConfig, "network configuration: "+key+": "+problem, "")
}

// PodArgs are the keys of CNI_ARGS that are known: which pod it is, and what it
// is to have.
type PodArgs struct {
	types.CommonArgs
	IP                         types.UnmarshallableString
	MAC                        types.UnmarshallableString
	K8S_POD_NAMESPACE          types.UnmarshallableString // as runtimes write it
	K8S_POD_NAME               types.UnmarshallableString
	K8S_POD_UID                types.UnmarshallableString
	K8S_POD_INFRA_CONTAINER_ID types.UnmarshallableString
}

// ParsePodArgs reads CNI_ARGS. Its errors are *types.Error of code 4.
func ParsePodArgs(args string) (PodArgs, error) {
	var pod PodArgs
	if err := types.LoadArgs(args, &pod); err != nil {
		return pod, types.NewError(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: "+err.Error(), "")
	}
	return pod, nil
}
