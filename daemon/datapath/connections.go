// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

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
// that entered a pod of this node, or the node itself. A flow between two pods of this node has one
// entry and both rows.
func (m *Manager) Connections(yield func(api.Connection) bool) error {
	now, err := m.bpf.Jiffies()
	if err != nil {
		return err
	}
	// Sockets count their packets for themselves.
	if err := m.reaper.callRoll(time.Second); err != nil {
		m.log.Warn("bring the sockets' counters up to date", "error", err)
	}
	for _, table := range []*ebpf.Map{m.bpf.CT, m.bpf.Embryonic} {
		done, err := m.table(table, now, yield)
		if err != nil || done {
			return err
		}
	}
	return nil
}

// table yields the rows of one of the two maps; done says that nobody wants more.
func (m *Manager) table(table *ebpf.Map, now uint64, yield func(api.Connection) bool) (done bool, err error) {
	keys := make([]bpf.CTKey, chunk)
	values := make([]bpf.CTEntry, chunk)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := table.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return false, fmt.Errorf("read %s: %w", table, err)
		}
		for i := range n {
			if values[i].Life&bpf.CTClaimed != 0 {
				continue
			}
			for _, row := range m.rows(&keys[i], &values[i], now) {
				if !yield(row) {
					return true, nil
				}
			}
		}
		if err != nil {
			return false, nil
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
		if !held(e) {
			r.ExpiresInSeconds = m.expires(e, k.Proto, k.Type, now)
		}
		return r
	}
	if k.Type == bpf.CTService {
		return []api.Connection{side("SVC", 0)}
	}
	var rows []api.Connection
	if e.Flags&bpf.CTAlone != 0 {
		rows = append(rows, decision(side("SVC", 0), e))
	}
	if e.Flags&bpf.CTEgress != 0 {
		rows = append(rows, side("EGRESS", 0))
	}
	// One that neither a pod began nor entered is the node's own, unless it only passes by a port of the node's.
	if e.Flags&bpf.CTIngress != 0 || e.Flags&bpf.CTEgress == 0 && e.Origin == (bpf.Addr{}) {
		rows = append(rows, side("INGRESS", 1))
	}
	return rows
}

// decision is the SVC row of a flow that has no SVC entry: from the client, as it calls
// itself, to the frontend, by which the flow's own row translates, and on to the responder.
func decision(flow api.Connection, e *bpf.CTEntry) api.Connection {
	row := flow
	if e.Origin != (bpf.Addr{}) {
		row.Source = ends(e.Origin, e.OriginPort)
	}
	row.Destination, row.Translation = flow.Translation, flow.Destination
	row.Packets, row.Bytes = e.Packets[0], e.Bytes[0]
	return row
}

// held tells whether a side's socket keeps the entry, so that no timer ends it.
func held(e *bpf.CTEntry) bool {
	return e.Cookie[0] != 0 && e.Tether[0] == bpf.TetherHeld || e.Cookie[1] != 0 && e.Tether[1] == bpf.TetherHeld
}

func ends(a bpf.Addr, port uint16) string {
	return netip.AddrPortFrom(a.IP(), bpf.Port(port)).String()
}

// Stats counts the table's life since its maps were made.
func (m *Manager) Stats() (api.ConntrackStats, error) {
	var counts [bpf.CTStats]uint64
	for i := range counts {
		var err error
		if counts[i], err = m.reaper.count(uint32(i)); err != nil {
			return api.ConntrackStats{}, err
		}
	}
	// A pass that deletes nothing but what is due anyway counts exactly.
	if err := m.reaper.look(time.Second); err != nil {
		return api.ConntrackStats{}, err
	}
	r := m.reaper
	r.mu.Lock()
	defer r.mu.Unlock()
	deleted := api.Deleted{
		Socket:   counts[bpf.StatDeletedSocket],
		Timewait: counts[bpf.StatDeletedTimewait],
		Expired:  counts[bpf.StatDeletedExpired],
		Endpoint: counts[bpf.StatDeletedEndpoint],
		Backend:  counts[bpf.StatDeletedBackend],
		Flush:    counts[bpf.StatDeletedFlush],
	}
	s := api.ConntrackStats{
		Entries:      r.entries,
		MaxEntries:   uint64(m.bpf.CT.MaxEntries()),
		Tethered:     r.tethered,
		Created:      counts[bpf.StatCreated],
		Deleted:      deleted,
		Evicted:      r.evicted,
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
