// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/model"
)

// shaping knows which endpoints have qdiscs on their host end, as the CNI plugin
// bandwidth sets them after the endpoint was added: the programs then send their
// packets that way. Its users hold the endpoints' mutex.
type shaping struct {
	bpf *bpf.Datapath
	log *slog.Logger

	seen     map[int]uint16    // by interface
	applied  map[uint32]uint16 // by endpoint
	problems map[uint32]string // by endpoint: why a limit does not hold
}

func newShaping(d *bpf.Datapath, log *slog.Logger) *shaping {
	s := &shaping{bpf: d, log: log, applied: make(map[uint32]uint16), problems: make(map[uint32]string)}
	// So that endpoints of an earlier run keep theirs: who watches looks again.
	if seen, err := bpf.Limits(); err == nil {
		s.seen = seen
	}
	return s
}

// of says what an endpoint's entries are to say, and makes what they rely on.
func (s *shaping) of(ep model.Endpoint) uint16 {
	now := s.seen[ep.Ifindex]
	delete(s.problems, ep.ID)
	if now&bpf.LimitOut != 0 {
		if err := s.bpf.AttachLimit(ep.Interface, ep.Ifindex); err != nil {
			now &^= bpf.LimitOut
			s.problems[ep.ID] = fmt.Sprintf("what pods of this node get from %s is not limited: %v", ep.Interface, err)
		}
	}
	s.applied[ep.ID] = now
	return now
}

func (s *shaping) forget(ep model.Endpoint) {
	delete(s.applied, ep.ID)
	delete(s.problems, ep.ID)
}

// unlimited are the limits that do not hold.
func (e *endpoints) unlimited() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Sorted(maps.Values(e.shaping.problems))
}

// limitInterval is how often a limit is tried again that does not hold.
const limitInterval = 5 * time.Second

// lookForLimits brings all endpoints to the qdiscs that there are.
func (e *endpoints) lookForLimits() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	seen, err := bpf.Limits()
	if err != nil {
		return err
	}
	e.shaping.seen = seen
	var errs []error
	changed := false
	var free []model.Endpoint
	for id, ep := range e.known {
		before := e.shaping.applied[id]
		if seen[ep.Ifindex] == before {
			continue
		}
		// Among them those whose limit does not hold yet.
		errs = append(errs, e.write(ep))
		now := e.shaping.applied[id]
		if now == before {
			continue
		}
		changed = true
		if before&^now&bpf.LimitOut != 0 {
			free = append(free, ep)
		}
		e.shaping.log.Info("endpoint has other limits", "endpoint", id, "interface", ep.Interface, "ingress", now&bpf.LimitIn != 0, "egress", now&bpf.LimitOut != 0)
	}
	if changed {
		errs = append(errs, e.bpf.Invalidate())
	}
	// Not before nothing goes that way any more.
	for _, ep := range free {
		errs = append(errs, bpf.DetachLimit(ep.Interface))
	}
	return errors.Join(errs...)
}

// watchLimits follows the qdiscs until ctx is done.
func (e *endpoints) watchLimits(ctx context.Context, log *slog.Logger) {
	for {
		// The kernel drops messages when a burst overruns the socket's buffer.
		if err := e.followLimits(ctx, log); ctx.Err() == nil {
			log.Warn("watch qdiscs: starting again", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
	}
}

func (e *endpoints) followLimits(ctx context.Context, log *slog.Logger) error {
	socket, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_TC)
	if err != nil {
		return fmt.Errorf("subscribe to qdiscs: %w", err)
	}
	defer socket.Close()
	news := make(chan struct{}, 1) // one look is enough for all that has come meanwhile
	failed := make(chan error, 1)
	go func() {
		for {
			if _, _, err := socket.Receive(); err != nil {
				failed <- err
				return
			}
			select {
			case news <- struct{}{}:
			default:
			}
		}
	}()
	for {
		// What was before there was a subscription is found by looking, too.
		if err := e.lookForLimits(); err != nil {
			log.Warn("follow limits of endpoints", "error", err)
		}
		var again <-chan time.Time
		if len(e.unlimited()) > 0 {
			again = time.After(limitInterval)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-again:
		case err := <-failed:
			return fmt.Errorf("hear of qdiscs: %w", err)
		case <-news:
		}
	}
}
