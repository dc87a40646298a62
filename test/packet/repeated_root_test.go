// SPDX-License-Identifier: Apache-2.0

//go:build root

package packet

import (
	"net"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/test/netns"
)

// repeat makes every segment with data that the pod sends from now on a SYN, until
// it is over: what a socket sends again before it hears the answer, and what another
// processor's queue holds until the handshake is complete. The socket remains the segment's.
func (p *Pod) repeat(t *testing.T, v6 bool) (over func()) {
	t.Helper()
	flags := int16(14 + 20 + 13)
	if v6 {
		flags = 14 + 40 + 13
	}
	const data, dataEnd = 76, 80 // of struct __sk_buff
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, data, asm.Word),
			asm.LoadMem(asm.R3, asm.R1, dataEnd, asm.Word),
			asm.Mov.Reg(asm.R4, asm.R2),
			asm.Add.Imm(asm.R4, int32(flags)+1),
			asm.JGT.Reg(asm.R4, asm.R3, "leave"),
			asm.LoadMem(asm.R5, asm.R2, flags, asm.Byte),
			asm.JNE.Imm(asm.R5, ACK|PSH, "leave"),
			// Its checksum is left to the interface.
			asm.StoreImm(asm.R2, flags, SYN, asm.Byte),
			asm.Mov.Imm(asm.R0, -1).WithSymbol("leave"), // TC_ACT_UNSPEC
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	index := p.Link(t, "eth0").Attrs().Index
	qdisc := &netlink.GenericQdisc{QdiscType: "clsact", QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	filter := &netlink.BpfFilter{Fd: prog.FD(), Name: "repeat", DirectAction: true, FilterAttrs: netlink.FilterAttrs{
		LinkIndex: index, Parent: netlink.HANDLE_MIN_EGRESS, Handle: 1, Priority: 1, Protocol: 3, // ETH_P_ALL
	}}
	if err := p.Netlink().QdiscAdd(qdisc); err != nil {
		t.Fatalf("add clsact to eth0 of %s: %v", p.Name(), err)
	}
	if err := p.Netlink().FilterAdd(filter); err != nil {
		t.Fatalf("add a filter to eth0 of %s: %v", p.Name(), err)
	}
	return func() {
		if err := p.Netlink().QdiscDel(qdisc); err != nil {
			t.Fatalf("take clsact from eth0 of %s: %v", p.Name(), err)
		}
	}
}

// hooked is a node that hears of the ends of sockets, those of this process too.
func hooked(t *testing.T) *Node {
	t.Helper()
	cgroup := netns.NewCgroup(t, "node")
	cgroup.Enter(t)
	n := NewNode(t, Options{MaxEntries: 4096, Hook: bpf.HookAuto, Cgroup: cgroup.Path})
	if n.Hook.Mode == bpf.HookOff {
		t.Fatalf("no hook: %s", n.Hook.Reason)
	}
	return n
}

func TestASYNThatASocketRepeatsAfterItsHandshakeChangesNothing(t *testing.T) {
	n := hooked(t)
	client := n.Pod(t)
	webs := []*Pod{n.Pod(t), n.Pod(t), n.Pod(t), n.Pod(t)}
	families(t, func(t *testing.T, v6 bool) {
		vip := VIP(v6, 10, 80)
		n.Service(t, TCP, vip, webs[0].At(v6, 8080), webs[1].At(v6, 8080), webs[2].At(v6, 8080), webs[3].At(v6, 8080))
		var captures []*netns.Capture
		for _, web := range webs {
			netns.TCPEcho(t, web.NS, web.At(v6, 8080).String())
			captures = append(captures, web.Capture(t, "eth0"))
		}
		c, err := client.Dial("tcp", vip.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := netns.EchoOn(c, "established"); err != nil {
			t.Fatal(err)
		}
		from := c.LocalAddr().(*net.TCPAddr).AddrPort()
		chosen := -1
		for i := range webs {
			if _, there := n.FlowEntry(t, TCP, from, webs[i].At(v6, 8080)); there {
				chosen = i
			}
		}
		if chosen < 0 {
			t.Fatal("the flow has no entry")
		}
		for _, capture := range captures {
			capture.Reset()
		}

		over := client.repeat(t, v6)
		const repeated = 8 // fewer than may be on their way without an answer
		for range repeated {
			if _, err := c.Write([]byte("x")); err != nil {
				over()
				t.Fatalf("after a repeated SYN: %v", err)
			}
			time.Sleep(time.Millisecond) // a segment each
		}
		arrived := func() (at [4]int) {
			for i, capture := range captures {
				at[i] = len(capture.Packets(func(p netns.Packet) bool {
					read, _ := Read(p.Data) // its checksum is left to an offload
					return !p.Outgoing && read.Proto == TCP && read.Flags == SYN
				}))
			}
			return at
		}
		netns.Eventually(t, 30*time.Second, "SYNs at the backends", func() bool {
			at := arrived()
			return at[0]+at[1]+at[2]+at[3] >= repeated
		})
		over()
		for i, count := range arrived() {
			if count > 0 && i != chosen {
				t.Errorf("%d repeated SYNs went to %s", count, webs[i].Host)
			}
		}
		if after, there := n.ServiceEntry(t, TCP, from, vip); there {
			t.Errorf("there is a decision beside the socket's: %+v", after)
		}
		for i := range webs {
			flow, there := n.FlowEntry(t, TCP, from, webs[i].At(v6, 8080))
			if mine := i == chosen; there != mine || mine && flow.State != bpf.CTEstablished {
				t.Errorf("the flow to %s: %v, %+v", webs[i].Host, there, flow)
			}
		}
	})
}
