// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/bpf"
)

// Tunnel is how a node's pods are reached: by its address, from one of this
// node's, which the other one knows; not valid: whatever the route has.
type Tunnel struct{ Remote, Local netip.Addr }

// overlay writes mooring_tunnels, and attaches the programs that read it.
type overlay struct {
	bpf *bpf.Datapath

	mu       sync.Mutex
	attached int // to the device of this index, by this process
}

// SetTunnels brings the kernel to these tunnels by the range of pods that each
// leads to, on the VXLAN device. Index 0: there is none, nor are there tunnels.
func (o *overlay) SetTunnels(device string, index int, wanted map[netip.Prefix]Tunnel) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	there := map[netip.Prefix]bpf.Tunnel{}
	var key bpf.IdentityKey
	var value bpf.Tunnel
	entries := o.bpf.Tunnels.Iterate()
	for entries.Next(&key, &value) {
		there[key.Prefix()] = value
	}
	if err := entries.Err(); err != nil {
		return fmt.Errorf("read mooring_tunnels: %w", err)
	}
	for prefix, t := range wanted {
		value := bpf.Tunnel{Remote: bpf.ToAddr(t.Remote)}
		if t.Local.IsValid() {
			value.Local = bpf.ToAddr(t.Local)
		}
		if was, known := there[prefix]; !known || was != value {
			key := bpf.ToIdentityKey(prefix)
			if err := o.bpf.Tunnels.Put(&key, &value); err != nil {
				return fmt.Errorf("write the tunnel to %s into mooring_tunnels: %w", prefix, err)
			}
		}
		delete(there, prefix)
	}
	for prefix := range there {
		key := bpf.ToIdentityKey(prefix)
		if err := o.bpf.Tunnels.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove the tunnel to %s from mooring_tunnels: %w", prefix, err)
		}
	}
	if index == 0 {
		o.attached = 0
		return o.bpf.DetachOverlay(device)
	}
	if o.attached == index {
		return nil
	}
	if err := o.bpf.AttachOverlay(device, index); err != nil {
		return err
	}
	o.attached = index
	return nil
}
