// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
)

func init() {
	Register(Set{
		Name: "tethered",
		Title: "ns/packet of from_container for datagrams of connected sockets to a ClusterIP, as the kernel counts it (BPF_ENABLE_STATS), less\n" +
			"  an empty program in the same turn: one flow, and many in scattered rotation, with the decision in the socket and by the tables",
		Measure: measureTethered,
	})
}

// A process may have so many sockets, less than what the limit of some machines is.
const flowsPerProcess = 18_000

func measureTethered(b *B) {
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
		name1, nameN := "1 flow: "+way.name, fmt.Sprintf("%d flows: %s", flows, way.name)
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
