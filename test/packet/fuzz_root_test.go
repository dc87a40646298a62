// SPDX-License-Identifier: Apache-2.0

//go:build root

package packet

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// A world for anything that a pod may send: services of every kind, and flows under way.
func fuzzWorld(t testing.TB) (*Node, *Pod) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	for _, v6 := range []bool{false, true} {
		n.Service(t, TCP, VIP(v6, 10, 80), web.At(v6, 8080))
		n.Service(t, UDP, VIP(v6, 10, 53), web.At(v6, 1053))
		n.Service(t, TCP, VIP(v6, 11, 80), client.At(v6, 8080))
		n.Service(t, UDP, VIP(v6, 11, 53), client.At(v6, 1053))
		n.Service(t, TCP, VIP(v6, 12, 80))
		n.Service(t, UDP, VIP(v6, 12, 53))
		n.Service(t, TCP, VIP(v6, 13, 80), remotes[v6])
	}
	return n, client
}

// seeds are frames from which the mutations begin.
func seeds(pod *Pod) (frames [][]byte) {
	add := func(p Packet) {
		p.From, p.To = pod.MAC, pod.HostMAC
		frames = append(frames, p.Bytes())
	}
	for _, v6 := range []bool{false, true} {
		from := pod.At(v6, 4000)
		for vip := 10; vip <= 13; vip++ {
			for _, flags := range []uint8{SYN, ACK, FIN | ACK, RST, SYN | ACK} {
				s := Segment(from, VIP(v6, vip, 80), flags)
				s.Payload = []byte("a segment")
				add(s)
			}
			d := Datagram(from, VIP(v6, vip, 53), "a datagram that is longer than its fragments")
			add(d)
			d.NoSum = true
			add(d)
			d.NoSum = false
			for _, f := range d.Fragments(uint32(vip), 24) {
				add(f)
			}
			for _, e := range icmpErrors {
				add(e.from(from.Addr(), Datagram(VIP(v6, vip, 53), from, "answer"), 14))
				add(e.from(from.Addr(), Segment(VIP(v6, vip, 80), from, ACK), 20))
			}
			add(Segment(pod.At(v6, 8080), from, ACK))
			add(Ping(from.Addr(), VIP(v6, vip, 1).Addr(), 7))
		}
		add(Ping(from.Addr(), remotes[v6].Addr(), 7))
		for _, p := range kinds(pod, v6) {
			add(p)
		}
	}
	return frames
}

// invariants of any frame whatever, at one hook: see each check.
func invariants(t *testing.T, n *Node, program *ebpf.Program, pod *Pod, frame []byte) {
	t.Helper()
	if len(frame) < 14 || len(frame) > 4000 {
		return
	}
	verdict, out, err := n.RunRaw(program, pod.Ifindex, frame, 0)
	if errors.Is(err, unix.EINVAL) && len(frame) < 14+40 {
		return // newer kernels run no program on less than an IP header
	}
	if err != nil {
		t.Fatalf("%s: the kernel: %v\nin: % x", program, err, frame)
	}
	if verdict == Drop {
		return
	}
	if verdict != Pass && verdict != Redirect {
		t.Fatalf("%s: verdict %d\nin: % x", program, verdict, frame)
	}
	in, wrong := Read(frame)
	read, bad := Read(out)
	if wrong == nil && bad != nil {
		t.Fatalf("%s: a right packet comes out wrong: %v\n in: % x\nout: % x", program, bad, frame, out)
	}
	if program == n.ToContainer || wrong != nil || verdict != Pass {
		return
	}
	// What the stack gets is for no service's address, and under a name of the pod's.
	if service(read.Dst.Addr()) {
		t.Fatalf("a packet to a service passes untranslated\n in: % x\nout: % x", frame, out)
	}
	if src := read.Src.Addr(); !linkLocal(in) && src != pod.V4 && src != pod.V6 && !service(src) && !alias(src) {
		t.Fatalf("a forged source passes\n in: % x\nout: % x", frame, out)
	}
}

func service(a netip.Addr) bool {
	for vip := 10; vip <= 13; vip++ {
		if a == VIP(false, vip, 1).Addr() || a == VIP(true, vip, 1).Addr() {
			return true
		}
	}
	return false
}

func alias(a netip.Addr) bool {
	return a == netip.MustParseAddr("169.254.1.2") || a == netip.MustParseAddr("fd6d:6f6f:7269:6e67::2")
}

func linkLocal(p Packet) bool {
	return p.Proto == ICMPv6 && (p.Dst.Addr().IsMulticast() || p.Dst.Addr().IsLinkLocalUnicast())
}

// mutate changes a few bytes, or cuts, or repeats.
func mutate(r *rand.Rand, frame []byte) []byte {
	f := append([]byte{}, frame...)
	for range 1 + r.IntN(4) {
		switch r.IntN(5) {
		case 0: // any byte
			f[r.IntN(len(f))] = byte(r.Uint32())
		case 1: // a bit behind the Ethernet header
			f[min(14+r.IntN(60), len(f)-1)] ^= 1 << r.IntN(8)
		case 2:
			f = f[:14+r.IntN(len(f)-13)]
			if len(f) < 15 {
				f = append(f, 0)
			}
		case 3:
			f = append(f, frame[r.IntN(len(frame)):]...)
		case 4: // values at the edge
			f[min(14+r.IntN(60), len(f)-1)] = []byte{0, 1, 0x7f, 0x80, 0xff}[r.IntN(5)]
		}
	}
	return f
}

func TestMutatedFramesBreakNothing(t *testing.T) {
	n, client := fuzzWorld(t)
	all := seeds(client)
	r := rand.New(rand.NewPCG(1, 2))
	rounds := 20000
	if testing.Short() {
		rounds = 3000
	}
	if inGuest() {
		rounds = 500
	}
	for _, program := range []*ebpf.Program{n.FromContainer, n.ToContainer} {
		// What the host's stack sends to the pod makes flows that no pod began.
		n.Flush(t)
		for _, frame := range all {
			invariants(t, n, program, client, frame)
		}
		for range rounds {
			invariants(t, n, program, client, mutate(r, all[r.IntN(len(all))]))
		}
	}
	// After all of that the ordinary still works.
	n.Flush(t)
	from := client.At(false, 5000)
	n.From(t, client, Segment(from, VIP(false, 10, 80), SYN)).arrives(t, n.pods[1], from, n.pods[1].At(false, 8080))
}

func FuzzFrames(f *testing.F) {
	out, client := fuzzWorld(f)
	in, other := fuzzWorld(f)
	for _, frame := range seeds(client) {
		f.Add(frame)
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) < 14 {
			return
		}
		// A fuzzer knows nothing of this run's MACs.
		frame = append([]byte{}, frame...)
		copy(frame, client.HostMAC[:])
		copy(frame[6:], client.MAC[:])
		invariants(t, out, out.FromContainer, client, frame)
		invariants(t, in, in.ToContainer, other, frame)
	})
}
