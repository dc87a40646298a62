// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
)

func init() {
	Register(Set{
		Name: "tethered",
		Title: "ns/packet of from_container for what a socket sends to a ClusterIP on an established flow, by BPF_PROG_TEST_RUN as in\n" +
			"  \"packet\"; its packets have a socket that knows what a pod's does. With the decision in the socket and by the tables",
		Measure: measureTethered,
	})
	Register(Set{
		Name: "tethered-live",
		Title: "ns/packet of from_container for datagrams of connected sockets to a ClusterIP, as the kernel counts it (BPF_ENABLE_STATS), less\n" +
			"  an empty program in the same turn: one flow, and many in scattered rotation, with the decision in the socket and by the tables",
		Measure: measureTetheredLive,
	})
}

// A process may have so many sockets, less than what the limit of some machines is.
const flowsPerProcess = 18_000

// measureTethered gives the program packets of one flow of each kind, again and again.
func measureTethered(b *B) {
	n := packet.NewNode(b, packet.Options{Hook: bpf.HookAuto})
	client, server := n.Pod(b), n.Pod(b)
	repeat := 100_000
	if b.Quick {
		repeat = 1000
	}
	for _, v6 := range []bool{false, true} {
		// All at first: what sockets know is void when services change.
		n.Service(b, packet.TCP, packet.VIP(v6, 10, 80), server.At(v6, 8080))
		n.Service(b, packet.UDP, packet.VIP(v6, 10, 80), server.At(v6, 8080))
	}
	var contestants []Contestant
	for _, v6 := range []bool{false, true} {
		for _, network := range []string{"tcp", "udp"} {
			kind := fmt.Sprintf("%s %s", map[bool]string{false: "IPv4", true: "IPv6"}[v6], strings.ToUpper(network))
			vip := packet.VIP(v6, 10, 80)
			next := packet.Segment(netip.AddrPort{}, vip, packet.ACK|packet.PSH)
			if network == "udp" {
				next = packet.Datagram(netip.AddrPort{}, vip, "")
			}
			answerAt(b, server.NS, network, netip.AddrPortFrom(server.IP(v6), 8080))
			// What is measured is the packet that follows those of a real socket.
			c, err := client.Dial(network, vip.String())
			if err != nil {
				b.Fatalf("reach %s: %v", vip, err)
			}
			b.Cleanup(func() { c.Close() })
			known := make([]byte, n.Sockets.ValueSize())
			if err := teachReal(c, n.Sockets, known); err != nil {
				b.Fatalf("read what a socket to %s knows: %v", vip, err)
			}
			next.Src = netip.MustParseAddrPort(c.LocalAddr().String())
			next.Payload = []byte("a question, long enough to be restored")
			next.From, next.To = client.MAC, client.HostMAC
			f := Frame{Data: next.Bytes(), Known: known, Sockets: n.Sockets}
			r := &Runner{T: b, NS: n.NS, Repeat: repeat, Context: skbContext{Ifindex: uint32(client.Ifindex)}}
			stranger := f
			stranger.Data, stranger.Known = slices.Clone(f.Data), nil
			for _, f := range []Frame{f, stranger} {
				verdict, _ := r.repeat(r.caller(n.FromContainer, f), f.Data, 100)
				if verdict != tcRedirect {
					b.Fatalf("%s: verdict %d, want %d: to the pod", kind, verdict, tcRedirect)
				}
			}
			byHeart := kind + ", the socket knows"
			contestants = append(contestants,
				Contestant{Name: byHeart, Unit: "ns", Bound: Bound{Most: 120}, Once: func() float64 { return r.Nanoseconds(n.FromContainer, f) }},
				Contestant{Name: kind + ", by the tables", Unit: "ns", Against: byHeart, Once: func() float64 { return r.Nanoseconds(n.FromContainer, stranger) }})
		}
	}
	b.Compare(contestants...)
}

// tcRedirect is TC_ACT_REDIRECT.
const tcRedirect = 7

// answerAt answers whatever it is sent.
func answerAt(b *B, ns *netns.NS, network string, at netip.AddrPort) {
	b.Helper()
	if network == "udp" {
		netns.UDP(b, ns, at.String(), func(request []byte, _ net.Addr) []byte { return request })
		return
	}
	netns.TCPEcho(b, ns, at.String())
}

// teachReal has a connection used until its socket knows the flow, and reads what it knows.
func teachReal(c net.Conn, sockets *ebpf.Map, known []byte) error {
	for range 3 {
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Write([]byte("ask")); err != nil {
			return err
		}
		if _, err := c.Read(make([]byte, 16)); err != nil {
			return err
		}
	}
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = sockets.Lookup(uint32(fd), &known) })
	return errors.Join(err, failed)
}

// measureTetheredLive counts what sockets' own packets take.
func measureTetheredLive(b *B) {
	flows, datagrams := 500_000, 200_000
	if b.Quick {
		flows, datagrams = 64, 256
	}
	stats, err := ebpf.EnableStats(bpfStatsRunTime)
	if err != nil {
		b.Fatalf("have the kernel count programs' time: %v", err)
	}
	b.Cleanup(func() { closeStats(b, stats) })

	plain := NewPlain(b)
	from, to := plain.Pod(b), plain.Pod(b)
	empty := (&Runner{T: b, NS: plain.NS}).Empty(ebpf.SchedCLS)
	plain.attach(b, empty, from)
	plain.attach(b, empty, to)
	hush := answerUntil(b, to.NS)
	idle := hold(b, from.NS, netip.AddrPortFrom(to.IP, UDPPort), 1)
	hush()
	floor := func() float64 { return perRun(b, empty, datagrams, idle) }

	measureStorage(b, flows, datagrams, floor)
	var one, many string
	for _, way := range []struct {
		name    string
		noCache bool
	}{{"the socket knows", false}, {"by the tables", true}} {
		n := packet.NewNode(b, packet.Options{MaxEntries: uint32(max(flows*5, 4096)), NoCache: way.noCache, Hook: bpf.HookAuto})
		server := n.Pod(b)
		vip := netip.MustParseAddrPort("10.96.0.10:53")
		n.Service(b, packet.UDP, vip, server.At(false, UDPPort))
		hush := answerUntil(b, server.NS)
		single := hold(b, n.Pod(b).NS, vip, 1)
		var holders []*holder
		for left := flows; left > 0; left -= flowsPerProcess {
			holders = append(holders, hold(b, n.Pod(b).NS, vip, min(flowsPerProcess, left)))
		}
		// Nobody answers from now on: what is counted are the sockets' packets.
		hush()
		each := func(total int, holders ...*holder) func() float64 {
			return func() float64 { return perRun(b, n.FromContainer, total, holders...) - floor() }
		}
		all := each(flows, holders...)
		all()
		name1, nameN := "1 flow, "+way.name, fmt.Sprintf("%d flows, %s", flows, way.name)
		first := Contestant{Name: name1, Unit: "ns", Against: one, Once: each(datagrams, single)}
		rest := Contestant{Name: nameN, Unit: "ns", Against: many, Once: all}
		if !way.noCache {
			one, many = name1, nameN
			first.Bound = Bound{Most: 120}
			rest.Against, rest.Bound = name1, Bound{Ratio: true, Most: 1.3}
		}
		b.Compare(first, rest)
		for _, h := range holders {
			h.end()
		}
	}
}

// measureStorage counts what a program takes that only reads and writes a word of each
// socket's storage: less than that nothing takes that a socket has by heart.
func measureStorage(b *B, flows, datagrams int, floor func() float64) {
	n := NewPlain(b)
	server := n.Pod(b)
	storage, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "storage", Type: ebpf.SkStorage, KeySize: 4, ValueSize: 8, Flags: unix.BPF_F_NO_PREALLOC,
		Key: &btf.Int{Size: 4, Encoding: btf.Signed}, Value: &btf.Int{Size: 8},
	})
	if err != nil {
		b.Fatalf("make storage for sockets: %v", err)
	}
	b.Cleanup(func() { storage.Close() })
	const skbSocket = 168 // offset of sk in struct __sk_buff
	p := (&Runner{T: b, NS: n.NS}).load(&ebpf.ProgramSpec{Name: "storage", Type: ebpf.SchedCLS, License: "Dual BSD/GPL", Instructions: asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, skbSocket, asm.DWord),
		asm.JEq.Imm(asm.R2, 0, "done"),
		asm.LoadMapPtr(asm.R1, storage.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.Mov.Imm(asm.R4, unix.BPF_SK_STORAGE_GET_F_CREATE),
		asm.FnSkStorageGet.Call(),
		asm.JEq.Imm(asm.R0, 0, "done"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.Add.Imm(asm.R1, 1),
		asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("done"),
		asm.Return(),
	}})
	pod := func() *PlainPod {
		from := n.Pod(b)
		n.attach(b, p, from)
		return from
	}
	to := netip.AddrPortFrom(server.IP, UDPPort)
	hush := answerUntil(b, server.NS)
	single := hold(b, pod().NS, to, 1)
	var holders []*holder
	for left := flows; left > 0; left -= flowsPerProcess {
		holders = append(holders, hold(b, pod().NS, to, min(flowsPerProcess, left)))
	}
	hush()
	each := func(total int, holders ...*holder) func() float64 {
		return func() float64 { return perRun(b, p, total, holders...) - floor() }
	}
	one := "1 flow, a word of the socket's storage and nothing else"
	b.Compare(
		Contestant{Name: one, Unit: "ns", Once: each(datagrams, single)},
		Contestant{Name: fmt.Sprintf("%d flows, a word of the socket's storage and nothing else", flows), Unit: "ns", Against: one, Once: each(flows, holders...)})
	for _, h := range holders {
		h.end()
	}
}

// answerUntil answers datagrams until the function that it returns is called: then
// nobody reads them.
func answerUntil(b *B, ns *netns.NS) func() {
	silent, end := make(chan struct{}), make(chan struct{})
	b.Cleanup(func() { close(end) })
	netns.UDP(b, ns, fmt.Sprintf("0.0.0.0:%d", UDPPort), func(request []byte, _ net.Addr) []byte {
		select {
		case <-silent:
			<-end
		default:
		}
		return request
	})
	return sync.OnceFunc(func() { close(silent) })
}

// perRun has sockets send, one process after the other and each socket as often, and
// returns what a run of a program has taken, as the kernel counts it.
func perRun(b *B, p *ebpf.Program, datagrams int, holders ...*holder) float64 {
	b.Helper()
	before := programStats(b, p)
	for _, h := range holders {
		h.send(b, datagrams/len(holders))
	}
	after := programStats(b, p)
	runs := after.RunCount - before.RunCount
	if runs < uint64(datagrams/len(holders)*len(holders)) {
		b.Fatalf("%s ran %d times for %d datagrams", p, runs, datagrams)
	}
	return float64(after.Runtime-before.Runtime) / float64(runs)
}

// A holder is a process with connected sockets, whose flows are established: each was
// answered once, and has sent since.
type holder struct {
	commands io.WriteCloser
	answers  *bufio.Reader
	end      func()
}

const holderVariable = "MOORING_BENCH_HOLDER"

// HolderMain is called first in TestMain: in a holder's process it does not return.
func HolderMain() {
	text := os.Getenv(holderVariable)
	if text == "" {
		return
	}
	var to string
	var count int
	_, err := fmt.Sscan(text, &to, &count)
	if err == nil {
		err = holdFlows(netip.MustParseAddrPort(to), count)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}

func hold(b *B, ns *netns.NS, to netip.AddrPort, count int) *holder {
	b.Helper()
	c := ns.Command("/proc/self/exe")
	c.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d", holderVariable, to, count))
	commands, ours, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	theirs, answers, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	c.Stdin, c.Stdout = commands, answers
	c.Background(b)
	commands.Close()
	answers.Close()
	end := sync.OnceFunc(func() {
		ours.Close()
		theirs.Close()
	})
	b.Cleanup(end)
	h := &holder{ours, bufio.NewReader(theirs), end}
	h.done(b)
	return h
}

func (h *holder) send(b *B, datagrams int) {
	if _, err := fmt.Fprintln(h.commands, datagrams); err != nil {
		b.Fatalf("have datagrams sent: %v", err)
	}
	h.done(b)
}

func (h *holder) done(b *B) {
	b.Helper()
	if line, err := h.answers.ReadString('\n'); err != nil || line != "done\n" {
		b.Fatalf("a process with sockets says %q (%v)", line, err)
	}
}

// holdFlows makes the sockets, and at each line of its input sends as many datagrams.
func holdFlows(to netip.AddrPort, count int) error {
	var sockets []int
	for i := range count {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		sockets = append(sockets, fd)
		patience := unix.NsecToTimeval(int64(time.Second))
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience); err != nil {
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: 2048 + i}); err != nil {
			return fmt.Errorf("bind to port %d: %w", 2048+i, err)
		}
		if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}); err != nil {
			return fmt.Errorf("connect to %s: %w", to, err)
		}
		// Many at a time: alone, each waits for its turn of the processor.
		if i == count-1 || i%window == window-1 {
			if err := answered(sockets[i/window*window:]); err != nil {
				return fmt.Errorf("sockets up to %d to %s: %w", i, to, err)
			}
		}
	}
	fmt.Println("done")
	at := 0
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); fmt.Println("done") {
		datagrams, err := strconv.Atoi(lines.Text())
		if err != nil {
			return err
		}
		err = pinned(func() error {
			for range datagrams {
				// A step that shares no factor with the number of sockets is a scattered rotation.
				at = (at + 7_368_787) % len(sockets)
				if _, err := unix.Write(sockets[at], []byte{1}); err != nil {
					return fmt.Errorf("send: %w", err)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

const window = 100

// answered asks until an answer comes to each socket, and once more: what follows an
// answer is what the socket remembers.
func answered(sockets []int) error {
	var b [1]byte
	silent := sockets
	for try := 0; len(silent) > 0; try++ {
		for _, fd := range silent {
			if _, err := unix.Write(fd, b[:]); err != nil {
				return err
			}
		}
		var again []int
		for _, fd := range silent {
			if _, err := unix.Read(fd, b[:]); err != nil {
				if try == 10 {
					return err
				}
				again = append(again, fd)
			}
		}
		silent = again
	}
	for _, fd := range sockets {
		if _, err := unix.Write(fd, b[:]); err != nil {
			return err
		}
	}
	return nil
}
