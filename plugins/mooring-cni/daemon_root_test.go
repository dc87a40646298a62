// SPDX-License-Identifier: Apache-2.0

//go:build root

package main

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/endpoint"
	"github.com/mooring-cni/mooring/daemon/model"
	"github.com/mooring-cni/mooring/test/netns"
)

// fakeDaemon is of mooringd what the plugin meets: the API, the endpoints, the
// programs and the map of addresses. It can be made to refuse and to hang.
type fakeDaemon struct {
	api.Daemon // what nobody asks it for
	*endpoint.Registry
	*bpf.Datapath
	node   *netns.Node
	links  *endpoint.Kernel
	stop   context.CancelFunc
	served chan struct{}

	notReady atomic.Pointer[string]
	refuse   atomic.Pointer[error] // of AddEndpoint
	hang     atomic.Bool           // until it is stopped
	ctx      context.Context
}

// startDaemon starts one, or the next one, on the node.
func startDaemon(t *testing.T, node *netns.Node) *fakeDaemon {
	t.Helper()
	d := &fakeDaemon{node: node, served: make(chan struct{})}
	d.ctx, d.stop = context.WithCancel(context.Background())
	err := node.Do(func() (err error) {
		if d.Datapath, err = bpf.Load(bpf.Options{BPFFS: node.BPFFS, MaxEntries: 1024}); err != nil {
			return err
		}
		d.links, err = endpoint.NewKernel()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	if d.Registry, err = endpoint.Open(node.StateDir, d.asDatapath(), d.links, log, func() {}); err != nil {
		t.Fatal(err)
	}
	listener, err := api.Listen(node.Socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := conf.WriteNode(node.Socket, conf.Node(d.Node())); err != nil {
		t.Fatal(err)
	}
	go func() {
		api.Serve(d.ctx, listener, d, log)
		listener.Close()
		close(d.served)
	}()
	t.Cleanup(d.Stop)
	return d
}

// Stop ends it; what is in the kernel and in files stays.
func (d *fakeDaemon) Stop() {
	if d.ctx.Err() != nil {
		return
	}
	d.stop()
	<-d.served
	d.links.Close()
	d.Datapath.Close()
}

func (d *fakeDaemon) asDatapath() endpoint.Datapath { return mapOf{d.Datapath, d.node.BPFFS} }

// mapOf writes addresses as the daemon's datapath does.
type mapOf struct {
	*bpf.Datapath
	bpffs string
}

func (m mapOf) AddEndpoint(e model.Endpoint) error {
	value := bpf.Endpoint{Ifindex: uint32(e.Ifindex), Id: uint16(e.ID)}
	mac, _ := net.ParseMAC(e.MAC)
	hostMAC, _ := net.ParseMAC(e.HostMAC)
	copy(value.Mac[:], mac)
	copy(value.HostMac[:], hostMAC)
	for _, ip := range e.IPs {
		key := bpf.ToAddr(ip)
		if err := m.Endpoints.Put(&key, &value); err != nil {
			return err
		}
	}
	return nil
}

func (m mapOf) RemoveEndpoint(e model.Endpoint) error {
	for _, ip := range e.IPs {
		key := bpf.ToAddr(ip)
		if err := m.Endpoints.Delete(&key); err != nil && err != ebpf.ErrKeyNotExist {
			return err
		}
	}
	return bpf.DetachEndpoint(m.bpffs, e.Interface)
}

func (d *fakeDaemon) Node() api.Node {
	if d.hang.Load() {
		<-d.ctx.Done()
	}
	n := api.Node{Name: d.node.NodeName, MTU: 1400, BPFFS: d.node.BPFFS, StateDir: d.node.StateDir, PodCIDRs: d.node.PodCIDRs, Ready: true}
	if reason := d.notReady.Load(); reason != nil {
		n.Ready, n.Reason = false, *reason
	}
	return n
}

func (d *fakeDaemon) Attachments() []model.Endpoint { return d.Registry.List() }

func (d *fakeDaemon) AddEndpoint(e model.Endpoint) (model.Endpoint, error) {
	if err := d.refuse.Load(); err != nil {
		return e, *err
	}
	return d.Registry.Add(e)
}

func (d *fakeDaemon) DeleteEndpoint(containerID, ifname string) error {
	if d.hang.Load() {
		<-d.ctx.Done()
	}
	return d.Registry.Delete(containerID, ifname)
}

// entries are the addresses in the map.
func (d *fakeDaemon) entries(t *testing.T) []netip.Addr {
	t.Helper()
	var key bpf.Addr
	var value bpf.Endpoint
	found := []netip.Addr{}
	all := d.Endpoints.Iterate()
	for all.Next(&key, &value) {
		found = append(found, key.IP())
	}
	if err := all.Err(); err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(found, netip.Addr.Compare)
	return found
}

// within fails a test whose call takes longer than the issue of the call allows.
func within(t *testing.T, limit time.Duration, what string, f func()) {
	t.Helper()
	begin := time.Now()
	f()
	if took := time.Since(begin); took > limit {
		t.Errorf("%s took %v, longer than %v", what, took, limit)
	}
}
