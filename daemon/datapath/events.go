// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/model"
)

// events hands the datapath's events to whoever watches. The programs write
// none while nobody does.
type events struct {
	bpf *bpf.Datapath
	log *slog.Logger

	mu       sync.Mutex
	watchers map[chan api.Event]struct{}
}

// reset tells the programs that nobody watches.
func (e *events) reset() error { return e.tell(0) }

func (e *events) tell(watchers int) error { return e.bpf.SetMonitors(watchers) }

// Events delivers until ctx is done. A watcher that does not keep up loses
// events: the datapath waits for nobody.
func (e *events) Events(ctx context.Context) (<-chan api.Event, error) {
	ch := make(chan api.Event, 1024)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.watchers == nil {
		e.watchers = make(map[chan api.Event]struct{})
	}
	e.watchers[ch] = struct{}{}
	if err := e.tell(len(e.watchers)); err != nil {
		delete(e.watchers, ch)
		return nil, err
	}
	context.AfterFunc(ctx, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.watchers, ch)
		close(ch)
		if err := e.tell(len(e.watchers)); err != nil {
			e.log.Error("stop events", "error", err)
		}
	})
	return ch, nil
}

func (e *events) run(ctx context.Context) {
	reader, err := ringbuf.NewReader(e.bpf.Events)
	if err != nil {
		e.log.Error("read events: `mooring monitor` shows none", "error", err)
		return
	}
	defer reader.Close()
	context.AfterFunc(ctx, func() { reader.Close() })
	boot := bootTime()
	for {
		record, err := reader.Read()
		if errors.Is(err, os.ErrClosed) {
			return
		}
		var raw bpf.Event
		if err == nil {
			err = binary.Read(bytes.NewReader(record.RawSample), binary.NativeEndian, &raw)
		}
		if err != nil {
			e.log.Error("read an event", "error", err)
			continue
		}
		e.deliver(describe(&raw, boot))
	}
}

func (e *events) deliver(event api.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for ch := range e.watchers {
		select {
		case ch <- event:
		default:
		}
	}
}

func describe(raw *bpf.Event, boot time.Time) api.Event {
	event := api.Event{
		Time:        boot.Add(time.Duration(raw.Time)).UTC().Format(time.RFC3339Nano),
		Kind:        map[uint8]string{bpf.EventDrop: "drop", bpf.EventNew: "new", bpf.EventEnd: "end"}[raw.Kind],
		Endpoint:    uint32(raw.Endpoint),
		Direction:   bpf.DirectionLabel(bpf.Direction(raw.Direction)),
		Protocol:    model.Protocol(raw.Proto).String(),
		Source:      ends(raw.Src, raw.Sport),
		Destination: ends(raw.Dst, raw.Dport),
		Bytes:       raw.Len,
	}
	if raw.Kind == bpf.EventDrop {
		event.Reason = bpf.Label(bpf.DropReason(raw.Reason))
	}
	if raw.Nat != (bpf.Addr{}) {
		event.Translation = ends(raw.Nat, raw.NatPort)
	}
	return event
}

// bootTime is when CLOCK_MONOTONIC, which events carry, was zero.
func bootTime() time.Time {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return time.Time{}
	}
	return time.Now().Add(-time.Duration(ts.Nano()))
}
