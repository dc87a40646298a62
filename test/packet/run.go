// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/test/netns"
)

// Verdicts of the programs: linux/pkt_cls.h.
const (
	Pass     = -1 // TC_ACT_UNSPEC: the next program's turn, then the stack's
	Drop     = 2
	Redirect = 7
)

// Result is what became of a packet.
type Result struct {
	Packet // as it came out

	Verdict int
	Raw     []byte
	To      *Pod   // where a redirected packet goes
	Leaves  bool   // redirected, and to no pod: out of an uplink
	Reason  string // why it was dropped or refused, as metrics say it
}

// context is the part of struct __sk_buff that a run is given: up to ifindex.
type context struct {
	_              [9]uint32
	IngressIfindex uint32
	Ifindex        uint32
}

// RunRaw runs a frame, whatever it is, through a program on an interface.
func (n *Node) RunRaw(prog *ebpf.Program, ifindex int, frame []byte, flags uint32) (verdict int, out []byte, err error) {
	out = make([]byte, len(frame)+256)
	options := &ebpf.RunOptions{Data: frame, DataOut: out, Context: context{Ifindex: uint32(ifindex)}, Flags: flags}
	var result uint32
	err = n.Do(func() error {
		result, err = prog.Run(options)
		return err
	})
	return int(int32(result)), options.DataOut, err
}

// From runs a packet that the pod sends. Its MACs are the pod's unless given.
func (n *Node) From(t testing.TB, p *Pod, packet Packet) Result {
	t.Helper()
	if packet.From == (MAC{}) {
		packet.From = p.MAC
	}
	if packet.To == (MAC{}) {
		packet.To = p.HostMAC
	}
	return n.run(t, n.FromContainer, p.Ifindex, packet.Bytes())
}

// Wire runs a packet that comes in by the uplink, from its router's MAC.
func (n *Node) Wire(t testing.TB, packet Packet) Result {
	t.Helper()
	if packet.From == (MAC{}) {
		packet.From = routerMAC
	}
	if packet.To == (MAC{}) {
		copy(packet.To[:], n.Link(t, netns.Uplink).Attrs().HardwareAddr)
	}
	return n.WireRaw(t, packet.Bytes())
}

// WireRaw is Wire for a frame.
func (n *Node) WireRaw(t testing.TB, frame []byte) Result {
	t.Helper()
	index := n.Link(t, netns.Uplink).Attrs().Index
	if n.driver != nil {
		if r, done := n.drives(t, index, frame); done {
			return r
		}
	}
	return n.run(t, n.FromWire, index, frame)
}

// Verdicts of the driver's program: linux/bpf.h.
const (
	xdpDrop = 1
	xdpPass = 2
	xdpTx   = 3
)

// drives runs a frame through the driver's program. What that has not done is
// left as it was for tc.
func (n *Node) drives(t testing.TB, index int, frame []byte) (r Result, done bool) {
	t.Helper()
	before := n.counted(t)
	out := make([]byte, len(frame)+256)
	ctx := DriverContext{End: uint32(len(frame)), Ifindex: uint32(index)}
	options := &ebpf.RunOptions{Data: frame, DataOut: out, Context: ctx, ContextOut: &ctx}
	var verdict uint32
	err := n.Do(func() (err error) {
		verdict, err = n.driver.Run(options)
		return err
	})
	if errors.Is(err, unix.EINVAL) {
		return r, false // less than an Ethernet header
	}
	if err != nil {
		t.Fatalf("run %s: %v", n.driver, err)
	}
	for reason, packets := range n.counted(t) {
		if bpf.DropReason(reason) != 0 && packets != before[reason] {
			r.Reason = label(reason)
		}
	}
	told, packet := options.DataOut[:ctx.Data], options.DataOut[ctx.Data:]
	r.Raw = packet
	switch verdict {
	case xdpDrop:
		r.Verdict = Drop
		r.Packet, _ = Read(packet)
		return r, true
	case xdpPass:
		if len(told) == 0 || binary.NativeEndian.Uint32(told) == 0 {
			if !bytes.Equal(packet, frame) {
				t.Errorf("the driver leaves to tc what it has changed\n in: % x\nout: % x", frame, packet)
			}
			return r, false
		}
		copy(packet, told[8:20]) // as from_wire does
	case xdpTx:
		r.Leaves = true
	default:
		t.Fatalf("verdict %d of the driver's program", verdict)
	}
	n.fast++
	r.Verdict = Redirect
	if r.Packet, err = Read(packet); err != nil {
		t.Errorf("the driver lets out a packet that is wrong: %v\n in: % x\nout: % x", err, frame, packet)
	}
	for _, to := range n.pods {
		if !r.Leaves && r.Packet.To == to.MAC && binary.NativeEndian.Uint32(told[4:]) == uint32(to.Ifindex) {
			r.To = to
		}
	}
	if r.Leaves == (r.To != nil) || r.Leaves && r.Packet.To != routerMAC {
		t.Errorf("the driver sends to MAC %x", r.Packet.To)
	}
	return r, true
}

// DriverContext is struct xdp_md; the packet begins at Data, behind what is told to tc.
type DriverContext struct{ Data, End, Meta, Ifindex, Queue, Egress uint32 }

var routerMAC = MAC{2, 0, 0, 0, 0, 1}

// FromRaw is From for a frame.
func (n *Node) FromRaw(t testing.TB, p *Pod, frame []byte) Result {
	t.Helper()
	return n.run(t, n.FromContainer, p.Ifindex, frame)
}

// To runs a packet that the node's stack sends to the pod.
func (n *Node) To(t testing.TB, p *Pod, packet Packet) Result {
	t.Helper()
	packet.From, packet.To = p.HostMAC, p.MAC
	return n.run(t, n.ToContainer, p.Ifindex, packet.Bytes())
}

// ToRaw is To for a frame.
func (n *Node) ToRaw(t testing.TB, p *Pod, frame []byte) Result {
	t.Helper()
	return n.run(t, n.ToContainer, p.Ifindex, frame)
}

// run reads the packet that came out, and the reason from what was counted. A
// packet that came in right has to go out right.
func (n *Node) run(t testing.TB, prog *ebpf.Program, ifindex int, frame []byte) Result {
	t.Helper()
	before := n.counted(t)
	verdict, out, err := n.RunRaw(prog, ifindex, frame, 0)
	if err != nil {
		t.Fatalf("run %s: %v", prog, err)
	}
	r := Result{Verdict: verdict, Raw: out}
	for reason, packets := range n.counted(t) {
		if bpf.DropReason(reason) != 0 && packets != before[reason] {
			r.Reason = label(reason)
		}
	}
	_, wrong := Read(frame)
	r.Packet, err = Read(out)
	if err != nil && wrong == nil && verdict != Drop {
		t.Errorf("%s let out a packet that is wrong: %v\n in: % x\nout: % x", prog, err, frame, out)
	}
	if verdict == Redirect {
		for _, to := range n.pods {
			if r.Packet.To == to.MAC {
				r.To = to
			}
		}
		// Neighbours are found later than here: the frame is as it was, or turned round.
		sent, _ := Read(frame)
		r.Leaves = r.To == nil && (r.Packet.To == sent.To || r.Packet.To == sent.From)
		if r.To == nil && !r.Leaves {
			t.Errorf("%s sent a packet to MAC %x, which no pod has", prog, r.Packet.To)
		}
	}
	return r
}

// counted are the packets by reason, over all processors and hooks.
func (n *Node) counted(t testing.TB) []uint64 {
	t.Helper()
	count := bpf.DropReasons * bpf.Directions
	cpus := ebpf.MustPossibleCPU()
	keys, values := make([]uint32, count), make([]bpf.Counter, count*cpus)
	var cursor ebpf.MapBatchCursor
	got, err := n.Counters.BatchLookup(&cursor, keys, values, nil)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatalf("read the counters: %v", err)
	}
	packets := make([]uint64, bpf.DropReasons)
	for i, key := range keys[:got] {
		for _, v := range values[i*cpus : (i+1)*cpus] {
			packets[int(key)/bpf.Directions] += v.Packets
		}
	}
	return packets
}

// Dropped are the packets dropped so far, by reason.
func (n *Node) Dropped(t testing.TB) map[string]uint64 {
	t.Helper()
	reasons := map[string]uint64{}
	for reason, packets := range n.counted(t) {
		if reason != 0 && packets != 0 {
			reasons[label(reason)] = packets
		}
	}
	return reasons
}

// String says what became of the packet.
func (r Result) String() string {
	s := map[int]string{Pass: "pass", Drop: "drop", Redirect: "redirect"}[r.Verdict]
	if r.To != nil {
		s += " to " + r.To.Host
	}
	if r.Leaves {
		s += " out of an uplink"
	}
	if r.Reason != "" {
		s += " (" + r.Reason + ")"
	}
	return fmt.Sprintf("%s: %s -> %s protocol %d flags %#x type %d/%d", s, r.Src, r.Dst, r.Proto, r.Flags, r.Type, r.Code)
}

// Entries are all conntrack entries, of every table.
func (n *Node) Entries(t testing.TB) map[bpf.CTKey]bpf.CTEntry {
	t.Helper()
	entries := map[bpf.CTKey]bpf.CTEntry{}
	for _, table := range n.tables {
		var k bpf.CTKey
		var e bpf.CTEntry
		all := table.Iterate()
		for all.Next(&k, &e) {
			entries[k] = e
		}
		if err := all.Err(); err != nil {
			t.Fatalf("read %s: %v", table, err)
		}
	}
	return entries
}

// ServiceKey is the key of a flow through a frontend.
func ServiceKey(proto uint8, client, frontend netip.AddrPort) bpf.CTKey {
	return bpf.CTKey{
		Addr: [2]bpf.Addr{bpf.ToAddr(client.Addr()), bpf.ToAddr(frontend.Addr())},
		Port: [2]uint16{bpf.Port(client.Port()), bpf.Port(frontend.Port())},
		Type: bpf.CTService, Proto: proto,
	}
}

// entry looks a key up in every table.
func (n *Node) entry(t testing.TB, k bpf.CTKey) (e bpf.CTEntry, there bool) {
	t.Helper()
	for _, table := range n.tables {
		err := table.Lookup(k, &e)
		if err == nil {
			return e, true
		}
		if !errors.Is(err, ebpf.ErrKeyNotExist) {
			t.Fatalf("read %s: %v", table, err)
		}
	}
	return bpf.CTEntry{}, false
}

// ServiceEntry is the entry of a flow through a frontend.
func (n *Node) ServiceEntry(t testing.TB, proto uint8, client, frontend netip.AddrPort) (bpf.CTEntry, bool) {
	t.Helper()
	return n.entry(t, ServiceKey(proto, client, frontend))
}

// FlowEntry is the entry of a flow as it is on the wire, by its two ends in either order.
func (n *Node) FlowEntry(t testing.TB, proto uint8, a, b netip.AddrPort) (e bpf.CTEntry, there bool) {
	t.Helper()
	for _, ends := range [][2]netip.AddrPort{{a, b}, {b, a}} {
		k := ServiceKey(proto, ends[0], ends[1])
		k.Type = bpf.CTFlow
		if e, there = n.entry(t, k); there {
			return e, true
		}
	}
	return e, false
}

// SetEntries changes entries in place: to let time pass, above all.
func (n *Node) SetEntries(t testing.TB, change func(bpf.CTKey, *bpf.CTEntry)) {
	t.Helper()
	for _, table := range n.tables {
		var k bpf.CTKey
		var e bpf.CTEntry
		changed := map[bpf.CTKey]bpf.CTEntry{}
		all := table.Iterate()
		for all.Next(&k, &e) {
			was := e
			change(k, &e)
			if e != was {
				changed[k] = e
			}
		}
		if err := all.Err(); err != nil {
			t.Fatalf("read %s: %v", table, err)
		}
		for k, e := range changed {
			put(t, table, k, e)
		}
	}
}

// Flush takes all entries, as evictions would: what sockets know stays.
func (n *Node) Flush(t testing.TB) {
	t.Helper()
	if err := n.RunSweep(&bpf.Sweep{Flush: 1}); err != nil {
		t.Fatal(err)
	}
}

func label(reason int) string { return bpf.Label(bpf.DropReason(reason)) }
