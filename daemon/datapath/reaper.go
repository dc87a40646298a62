// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
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

// What sockets leave behind is looked at so often while there is something. Where
// there is nothing, nothing can be due before its grace is over, GRACE_TRAMPOLINE
// or GRACE_TRACEPOINT: a look at nothing has cold caches, and costs what a hundred
// deletions do.
const (
	buryInterval       = 250 * time.Millisecond
	buryIdle           = 500 * time.Millisecond
	buryIdleTracepoint = 2 * time.Second
)

// An owner that no roll call has found for so long is gone. With trampolines that is
// longer than a TIME_WAIT mini-socket lives, which owns its entry and answers none: 60
// s, and 60 s before in FIN_WAIT2. With tracepoints only sockets own entries, and the
// ends of some are not heard: on a busy machine, of those that close while their
// peer's acknowledgement waits for them.
const (
	rollInterval             = time.Minute
	missingTimeout           = 150 * time.Second
	missingTimeoutTracepoint = 10 * time.Second
)

// reaper ends what does not end by itself: entries that no socket owns, by
// passes inside the kernel (the table is never copied out to decide); those that
// sockets left, when their grace is over; and those whose socket's end was missed.
type reaper struct {
	bpf        *bpf.Datapath
	timeouts   conf.Timeouts
	namespaces func() []string // of the pods, for the roll call
	log        *slog.Logger

	wake chan struct{}

	mu        sync.Mutex // one pass at a time
	endpoints bool       // entries of deleted endpoints wait for the next pass
	backends  bool       // likewise of deleted backends
	crowds    bool       // likewise of sockets with more flows than they knew
	roll      uint32     // the roll call that the next pass goes by; 0: none
	called    time.Time  // when it was

	runs, scanned      uint64
	entries, embryonic uint64
	tethered, failed   uint64
	created, evicted   uint64    // created: before the pass that found tethered
	swept              time.Time // when the numbers were found
	interval, cpu      time.Duration
}

func newReaper(d *bpf.Datapath, timeouts conf.Timeouts, log *slog.Logger) *reaper {
	return &reaper{
		bpf: d, timeouts: timeouts, log: log, namespaces: func() []string { return nil },
		wake: make(chan struct{}, 1), interval: firstInterval,
	}
}

func (r *reaper) run(ctx context.Context) error {
	timer := time.NewTimer(firstInterval)
	defer timer.Stop()
	bury := time.NewTimer(buryInterval)
	defer bury.Stop()
	last := time.Now()
	crowds, err := r.count(bpf.StatCrowds)
	if err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-bury.C:
			ended, next, err := r.bury(crowds)
			if err != nil {
				return err
			}
			bury.Reset(next)
			if ended == crowds {
				continue
			}
			crowds = ended
		case <-r.wake:
		case <-timer.C:
		}
		// Before each pass, whoever asked for it: where endpoints come and go all the time, the timer never fires.
		if err := r.callRoll(rollInterval); err != nil {
			// The entries stay: somebody else's timers are no reason to cut connections.
			r.log.Warn("look for missed ends of sockets", "error", err)
		}
		found, err := r.pass(func(*bpf.Sweep) {})
		if err != nil {
			return err
		}
		r.mu.Lock()
		r.interval = nextInterval(r.interval, time.Since(last), found, uint64(r.bpf.CT.MaxEntries()))
		next := r.interval
		if r.bpf.Hook.Mode == bpf.HookTracepoint {
			next = min(next, rollInterval) // flows may come whose end is not heard
		}
		r.mu.Unlock()
		last = time.Now()
		timer.Reset(next)
	}
}

// bury deletes what is due and returns how many sockets with crowds have ended:
// more than before need a pass; and when to look again.
func (r *reaper) bury(before uint64) (crowds uint64, next time.Duration, err error) {
	var waiting bool
	took, err := timed(func() (err error) {
		if _, waiting, err = r.bpf.Bury(); err == nil {
			crowds, err = r.count(bpf.StatCrowds)
		}
		return err
	})
	if err != nil {
		return 0, 0, err
	}
	next = buryIdle
	if waiting {
		next = buryInterval
	} else if r.bpf.Hook.Mode != bpf.HookTrampoline {
		next = buryIdleTracepoint
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cpu += took
	if crowds != before {
		r.crowds = true
	}
	return crowds, next, nil
}

// callRoll has live sockets confirm their entries, unless that was less than
// interval ago or no entry can be tethered.
func (r *reaper) callRoll(interval time.Duration) error {
	created, err := r.count(bpf.StatCreated)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.called) < interval || r.tethered == 0 && created == r.created && !r.swept.IsZero() {
		return nil
	}
	r.called = time.Now()
	roll, took, err := r.bpf.RollCall(r.namespaces())
	r.cpu += took
	if err != nil {
		r.roll = 0
		return err
	}
	r.roll = roll
	return nil
}

// count is one of mooring_ct_stats, over all processors.
func (r *reaper) count(stat any) (uint64, error) {
	var perCPU []uint64
	if err := r.bpf.CTStats.Lookup(stat, &perCPU); err != nil {
		return 0, fmt.Errorf("read conntrack counters: %w", err)
	}
	var sum uint64
	for _, n := range perCPU {
		sum += n
	}
	return sum, nil
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
	case share < 0.05 && elapsed >= interval: // a pass that was asked for says nothing about a longer time
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
	if r.crowds {
		s.GoneCrowds = 1
	}
	if r.roll != 0 {
		s.RollCall = r.roll
		// What was heard after the roll was called need not have answered it.
		s.MissingTimeout = r.jiffies(r.missingTimeout() + time.Since(r.called))
	}
	change(&s)
	created, err := r.count(bpf.StatCreated)
	if err != nil {
		return s, err
	}
	took, err := timed(func() error {
		if err := r.bpf.RunSweep(&s); err != nil {
			return err
		}
		return r.countEvicted(created, s.Entries)
	})
	r.cpu += took
	if err != nil {
		return s, err
	}
	r.endpoints, r.backends, r.crowds, r.roll = false, false, false, 0
	r.runs++
	r.scanned += s.Scanned
	r.entries, r.embryonic, r.tethered, r.created = s.Entries, s.Embryonic, s.Tethered, created
	r.failed += s.Failed
	r.swept = time.Now()
	return s, nil
}

func (r *reaper) missingTimeout() time.Duration {
	if r.bpf.Hook.Mode == bpf.HookTracepoint {
		return missingTimeoutTracepoint
	}
	return missingTimeout
}

func (r *reaper) jiffies(d time.Duration) uint64 {
	return uint64(d.Seconds() * float64(r.bpf.JiffiesPerSecond))
}

// countEvicted finds what no one tells: an eviction is what was made and neither
// went nor is there. What was made is counted before the pass and what went
// after, so that a busy table does not look as if it evicted.
func (r *reaper) countEvicted(created, entries uint64) error {
	for _, stat := range []any{
		bpf.StatTakenOver, bpf.StatDeletedSocket, bpf.StatDeletedTimewait, bpf.StatDeletedExpired,
		bpf.StatDeletedEndpoint, bpf.StatDeletedBackend, bpf.StatDeletedFlush,
	} {
		n, err := r.count(stat)
		if err != nil {
			return err
		}
		entries += n
	}
	if created > entries {
		r.evicted = max(r.evicted, created-entries)
	}
	return nil
}

// look sweeps unless that was less than interval ago, for the numbers.
func (r *reaper) look(interval time.Duration) error {
	r.mu.Lock()
	fresh := time.Since(r.swept) < interval
	r.mu.Unlock()
	if fresh {
		return nil
	}
	_, err := r.pass(func(*bpf.Sweep) {})
	return err
}

// request holds the timeouts in jiffies, by state and protocol.
func (r *reaper) request() bpf.Sweep {
	j, t := r.jiffies, r.timeouts
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
	if state == bpf.CTClosing && e.Flags&(bpf.CTReset|bpf.CTEnded) == 0 {
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

func (r *reaper) purgeEndpoints() { r.purge(&r.endpoints) }

func (r *reaper) purgeBackends() { r.purge(&r.backends) }

// purge asks for a pass, and first voids what sockets have cached: a decision
// for what is gone must not make its entry again.
func (r *reaper) purge(what *bool) {
	if err := r.bpf.Invalidate(); err != nil {
		r.log.Error("void the sockets' decisions", "error", err)
	}
	r.mu.Lock()
	*what = true
	r.mu.Unlock()
	r.kick()
}

// Flush deletes every entry and returns how many there were.
func (r *reaper) Flush() (uint64, error) {
	if err := r.bpf.Forget(); err != nil {
		return 0, fmt.Errorf("flush conntrack: %w", err)
	}
	s, err := r.pass(func(s *bpf.Sweep) { s.Flush = 1 })
	if err != nil {
		return 0, fmt.Errorf("flush conntrack: %w", err)
	}
	return s.Flushed, nil
}

// timed is the CPU time that f takes, on one thread from beginning to end.
func timed(f func() error) (time.Duration, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := bpf.ThreadCPU()
	err := f()
	return bpf.ThreadCPU() - before, err
}
