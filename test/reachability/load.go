// SPDX-License-Identifier: Apache-2.0

package reachability

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/mooring-cni/mooring/daemon/model"
	"github.com/mooring-cni/mooring/daemon/policy"
	"github.com/mooring-cni/mooring/daemon/source"
)

// Read delivers what a directory of manifests holds, the way the daemon reads it.
func Read(dir string) (model.Changes, error) {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var all model.Changes
	err := source.NewDirectory(dir).Run(ctx, func(c model.Changes) {
		if all = c; c.Synced {
			stop()
		}
	})
	if err != nil && ctx.Err() == nil {
		return all, fmt.Errorf("read manifests: %w", err)
	}
	return all, nil
}

// Changes is the world as its manifests are understood, by way of a directory.
func (w *World) Changes(dir string) (model.Changes, error) {
	if err := os.WriteFile(filepath.Join(dir, "world.json"), w.Manifests(), 0o644); err != nil {
		return model.Changes{}, fmt.Errorf("write manifests: %w", err)
	}
	c, err := Read(dir)
	if err != nil {
		return c, err
	}
	for _, p := range c.Problems {
		// Rules of a direction that policyTypes leaves out are made on purpose.
		if !strings.HasPrefix(p.Message, "has no effect") {
			return c, fmt.Errorf("a made-up manifest is not sound: %s", p)
		}
	}
	return c, nil
}

// Endpoints are the interfaces of the pods of this node; pod i has id i+1.
func (w *World) Endpoints() map[uint32]*model.Endpoint {
	endpoints := make(map[uint32]*model.Endpoint)
	for i, p := range w.Pods {
		if p.Node == w.Here {
			id := uint32(i + 1)
			endpoints[id] = &model.Endpoint{ID: id, Pod: model.Name{Namespace: p.Meta.Namespace, Name: p.Meta.Name}, IPs: slices.Clone(p.Addrs)}
		}
	}
	return endpoints
}

// Number is that of a Packet's protocol.
func (k Packet) Number() model.Protocol {
	switch k.Protocol {
	case "TCP":
		return model.TCP
	case "UDP":
		return model.UDP
	case "SCTP":
		return model.SCTP
	}
	if k.From.Is4() {
		return model.ICMP
	}
	return model.ICMPv6
}

// Query is the packet as daemon/policy is asked about it.
func (k Packet) Query() policy.Query {
	return policy.Query{From: k.From, To: k.To, Protocol: k.Number(), Port: uint16(k.Port)}
}

func (k Packet) String() string {
	return fmt.Sprintf("%s -> %s/%s", k.From, netip.AddrPortFrom(k.To, uint16(k.Port)), k.Protocol)
}
