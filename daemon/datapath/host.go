// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/mooring-cni/mooring/bpf"
)

// Backends go in bursts: the host's sockets are walked once for all of one.
const hostGather = 100 * time.Millisecond

// host is the services for the host's own sockets. What it cannot do is a
// problem and stops nothing else: pods are served without it.
type host struct {
	hooks *bpf.Host // nil: not attached
	log   *slog.Logger
	wake  chan struct{}

	mu      sync.Mutex
	problem string
}

func openHost(d *bpf.Datapath, opts bpf.HostOptions, log *slog.Logger) *host {
	h := &host{log: log, wake: make(chan struct{}, 1)}
	hooks, err := d.AttachHost(opts)
	if err != nil {
		h.fail(fmt.Errorf("the host's own processes do not reach services: %w", err))
		return h
	}
	h.hooks = hooks
	if !hooks.CanEndSockets() {
		log.Info("UDP sockets of the host are not told when their backend goes: this kernel has no bpf_sock_destroy (6.5 and newer)")
	}
	return h
}

func (h *host) fail(err error) {
	message := ""
	if err != nil {
		message = err.Error()
	}
	h.mu.Lock()
	before := h.problem
	h.problem = message
	h.mu.Unlock()
	if message != "" && message != before {
		h.log.Warn("host sockets", "error", err)
	}
}

func (h *host) problems() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.problem == "" {
		return nil
	}
	return []string{h.problem}
}

// SetNodeAddresses tells which address node ports on loopback are: the first of
// IPv4, as there are none on ::1.
func (h *host) SetNodeAddresses(addresses []netip.Addr) {
	if h.hooks == nil {
		return
	}
	var first netip.Addr
	for _, a := range addresses {
		if a.Is4() {
			first = a
			break
		}
	}
	h.fail(h.hooks.SetNodeAddress(first))
}

// backendsGone has the sockets connected to them told, soon.
func (h *host) backendsGone() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

func (h *host) run(ctx context.Context) {
	if h.hooks == nil {
		return
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.wake:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(hostGather):
		}
		ended, err := h.hooks.EndSockets()
		if h.fail(err); ended > 0 {
			h.log.Debug("UDP sockets of the host were told that their backend is gone", "sockets", ended)
		}
	}
}

func (h *host) close() error {
	if h.hooks == nil {
		return nil
	}
	return h.hooks.Close()
}
