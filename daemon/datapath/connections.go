// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/model"
)

// chunk is how many entries one system call reads.
const chunk = 4096

var states = [...]string{
	bpf.CTNew:         "new",
	bpf.CTEstablished: "established",
	bpf.CTClosing:     "closing",
	bpf.CTTimeWait:    "timewait",
}

// Connections yields the table's rows: a SVC row for each flow's decision, an
// EGRESS row for a flow that a pod of this node began, an INGRESS row for one
// that entered a pod of this node. A flow between two pods of this node has one
// entry and both rows.
func (m *Manager) Connections(yield func(api.Connection) bool) error {
	now, err := m.bpf.Jiffies()
	if err != nil {
		return err
	}
	keys := make([]bpf.CTKey, chunk)
	values := make([]bpf.CTEntry, chunk)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.bpf.CT.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("read mooring_ct: %w", err)
		}
		for i := range n {
			for _, row := range m.rows(&keys[i], &values[i], now) {
				if !yield(row) {
					return nil
				}
			}
		}
		if err != nil {
			return nil
		}
	}
}

func (m *Manager) rows(k *bpf.CTKey, e *bpf.CTEntry, now uint64) []api.Connection {
	row := api.Connection{
		Protocol: model.Protocol(k.Proto).String(),
		State:    states[e.State&3],
		Packets:  e.Packets[0] + e.Packets[1],
		Bytes:    e.Bytes[0] + e.Bytes[1],
	}
	from, to := 0, 1
	if k.Type == bpf.CTFlow && e.Flags&bpf.CTInitiatorHigh != 0 {
		from, to = 1, 0
	}
	row.Source = ends(k.Addr[from], k.Port[from])
	row.Destination = ends(k.Addr[to], k.Port[to])
	if e.Nat != (bpf.Addr{}) {
		row.Translation = ends(e.Nat, e.NatPort)
	}
	side := func(kind string, owner int) api.Connection {
		r := row
		r.Type = kind
		r.Endpoint = uint32(e.Endpoint[owner])
		r.SocketCookie = e.Cookie[owner]
		r.Tethered = r.SocketCookie != 0
		if e.Cookie == [2]uint64{} {
			r.ExpiresInSeconds = m.expires(e, k.Proto, k.Type, now)
		}
		return r
	}
	if k.Type == bpf.CTService {
		return []api.Connection{side("SVC", 0)}
	}
	var rows []api.Connection
	if e.Flags&bpf.CTEgress != 0 {
		rows = append(rows, side("EGRESS", 0))
	}
	if e.Flags&bpf.CTIngress != 0 {
		rows = append(rows, side("INGRESS", 1))
	}
	return rows
}

func ends(a bpf.Addr, port uint16) string {
	return netip.AddrPortFrom(a.IP(), bpf.Port(port)).String()
}

// Stats counts the table's life since its maps were made.
func (m *Manager) Stats() (api.ConntrackStats, error) {
	var counts [bpf.CTStats]uint64
	for i := range counts {
		var perCPU []uint64
		key := uint32(i)
		if err := m.bpf.CTStats.Lookup(&key, &perCPU); err != nil {
			return api.ConntrackStats{}, fmt.Errorf("read conntrack counters: %w", err)
		}
		for _, n := range perCPU {
			counts[i] += n
		}
	}
	// A pass that deletes nothing but what is due anyway counts exactly.
	if _, err := m.pass(func(*bpf.Sweep) {}); err != nil {
		return api.ConntrackStats{}, err
	}
	r := m.reaper
	r.mu.Lock()
	defer r.mu.Unlock()
	s := api.ConntrackStats{
		Entries:    r.entries,
		MaxEntries: uint64(m.bpf.CT.MaxEntries()),
		Tethered:   r.tethered,
		Created:    counts[bpf.StatCreated],
		Deleted: api.Deleted{
			Socket:   counts[bpf.StatDeletedSocket],
			Timewait: counts[bpf.StatDeletedTimewait],
			Expired:  r.expired,
			Endpoint: r.deletedEndpoint,
			Backend:  r.deletedBackend,
			Flush:    r.flushed,
		},
		InsertFailed: counts[bpf.StatInsertFailed],
		DeleteFailed: counts[bpf.StatDeleteFailed] + r.failed,
		Sweep: api.SweepStats{
			Runs:            r.runs,
			Scanned:         r.scanned,
			IntervalSeconds: r.interval.Seconds(),
			CPUSeconds:      r.cpu.Seconds(),
		},
	}
	return s, nil
}
