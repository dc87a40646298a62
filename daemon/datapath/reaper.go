// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/conf"
)

// The reaper's interval lives between these. It shrinks while passes find much
// to delete or the table fills up, and grows while they find nothing.
const (
	minInterval   = 1 * time.Second
	maxInterval   = 5 * time.Minute
	firstInterval = 10 * time.Second
)

// reaper ends entries that no socket owns, by passes inside the kernel: the
// table is never copied out to decide.
type reaper struct {
	bpf      *bpf.Datapath
	timeouts conf.Timeouts
	log      *slog.Logger

	wake      chan struct{}
	mu        sync.Mutex // one pass at a time
	endpoints bool       // entries of deleted endpoints wait for the next pass
	backends  bool       // likewise of deleted backends

	runs, scanned                            uint64
	entries, tethered                        uint64
	expired, deletedEndpoint, deletedBackend uint64
	flushed, failed                          uint64
	interval, cpu                            time.Duration
}

func newReaper(d *bpf.Datapath, timeouts conf.Timeouts, log *slog.Logger) *reaper {
	return &reaper{bpf: d, timeouts: timeouts, log: log, wake: make(chan struct{}, 1), interval: firstInterval}
}

func (r *reaper) run(ctx context.Context) error {
	timer := time.NewTimer(firstInterval)
	defer timer.Stop()
	last := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
		case <-timer.C:
		}
		found, err := r.pass(func(*bpf.Sweep) {})
		if err != nil {
			return err
		}
		r.mu.Lock()
		r.interval = nextInterval(r.interval, time.Since(last), found, uint64(r.bpf.CT.MaxEntries()))
		next := r.interval
		r.mu.Unlock()
		last = time.Now()
		timer.Reset(next)
	}
}

// nextInterval follows what a pass found: the share of the table that was
// expired, and how full it still is.
func nextInterval(interval, elapsed time.Duration, found bpf.Sweep, size uint64) time.Duration {
	share := 0.0
	if found.Scanned > 0 {
		share = float64(found.Expired) / float64(found.Scanned)
	}
	fill := float64(found.Entries) / float64(size)
	switch {
	case share > 0.25 || fill > 0.9:
		// As much again would expire in the time that this share took.
		interval = min(interval, elapsed) / 2
	case share < 0.05:
		interval = interval * 3 / 2
	}
	if fill > 0.5 {
		interval = min(interval, maxInterval/10)
	}
	return min(max(interval, minInterval), maxInterval)
}

// pass sweeps once, with everything that waits for a sweep.
func (r *reaper) pass(change func(*bpf.Sweep)) (bpf.Sweep, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.request()
	if r.endpoints {
		s.GoneEndpoints = 1
	}
	if r.backends {
		s.GoneBackends = 1
	}
	change(&s)
	before := threadCPU()
	if err := r.bpf.RunSweep(&s); err != nil {
		return s, err
	}
	r.cpu += threadCPU() - before
	r.endpoints, r.backends = false, false
	r.runs++
	r.scanned += s.Scanned
	r.entries, r.tethered = s.Entries, s.Tethered
	r.expired += s.Expired
	r.deletedEndpoint += s.Endpoint
	r.deletedBackend += s.Backend
	r.flushed += s.Flushed
	r.failed += s.Failed
	return s, nil
}

// request holds the timeouts in jiffies, by state and protocol.
func (r *reaper) request() bpf.Sweep {
	j := func(d time.Duration) uint64 { return uint64(d.Seconds() * float64(r.bpf.JiffiesPerSecond)) }
	t := r.timeouts
	return bpf.Sweep{
		Timeout: [4][3]uint64{
			bpf.CTNew:         {j(t.TCPNew), j(t.UDPNew), j(t.ICMP)},
			bpf.CTEstablished: {j(t.TCPEstablished), j(t.UDPEstablished), j(t.ICMP)},
			bpf.CTClosing:     {j(t.TCPClosing), j(t.UDPEstablished), j(t.ICMP)},
			bpf.CTTimeWait:    {j(t.TCPTimeWait), j(t.UDPEstablished), j(t.ICMP)},
		},
		SvcTimeout: j(t.Service),
	}
}

// expires is when an entry without an owner ends, in seconds from now.
func (r *reaper) expires(e *bpf.CTEntry, protocol, kind uint8, now uint64) int64 {
	request := r.request()
	state := e.State & 3
	if state == bpf.CTClosing && e.Flags&bpf.CTReset == 0 {
		state = bpf.CTEstablished
	}
	column := 2
	switch protocol {
	case unix.IPPROTO_TCP:
		column = 0
	case unix.IPPROTO_UDP:
		column = 1
	}
	timeout := request.Timeout[state][column]
	if kind == bpf.CTService {
		timeout += request.SvcTimeout
	}
	left := int64(e.Seen+timeout) - int64(now)
	return max(left/int64(r.bpf.JiffiesPerSecond), 0)
}

func (r *reaper) kick() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *reaper) purgeEndpoints() {
	r.mu.Lock()
	r.endpoints = true
	r.mu.Unlock()
	r.kick()
}

func (r *reaper) purgeBackends() {
	r.mu.Lock()
	r.backends = true
	r.mu.Unlock()
	r.kick()
}

// Flush deletes every entry and returns how many there were.
func (r *reaper) Flush() (uint64, error) {
	s, err := r.pass(func(s *bpf.Sweep) { s.Flush = 1 })
	if err != nil {
		return 0, fmt.Errorf("flush conntrack: %w", err)
	}
	return s.Flushed, nil
}

// threadCPU is the CPU time of this thread: RunSweep is one system call on it.
func threadCPU() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
