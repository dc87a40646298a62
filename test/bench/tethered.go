// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
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

// flowsPerPod is how many of its ports a pod's sockets take.
const flowsPerPod = 60_000

func measureTethered(b *B) {
	flows, datagrams := 500_000, 200_000
	if b.Quick {
		flows, datagrams = 64, 256
	}
	// The sockets of one way and all else that is open.
	limit := unix.Rlimit{Cur: 1 << 20, Max: 1 << 20}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil && !b.Quick {
		b.Fatalf("open %d sockets: %v", flows, err)
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
	idle, err := connected(from.NS, netip.AddrPortFrom(to.IP, UDPPort), 2048, 1)
	if err != nil {
		b.Fatal(err)
	}
	defer closeAll(idle)
	hush()
	floor := func() float64 { return perRun(b, empty, idle, datagrams) }

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
		var sockets []int
		for len(sockets) < flows {
			some, err := connected(n.Pod(b).NS, vip, 2048, min(flowsPerPod, flows-len(sockets)))
			if err != nil {
				b.Fatal(err)
			}
			sockets = append(sockets, some...)
		}
		// Nobody answers from now on: what is counted are the sockets' packets.
		hush()
		each := func(sockets []int) func() float64 {
			return func() float64 { return perRun(b, n.FromContainer, sockets, datagrams) - floor() }
		}
		each(sockets)()
		name1, nameN := "1 flow: "+way.name, fmt.Sprintf("%d flows: %s", flows, way.name)
		first, all := Contestant{Name: name1, Unit: "ns", Against: one, Once: each(sockets[:1])},
			Contestant{Name: nameN, Unit: "ns", Against: many, Once: each(sockets)}
		if !way.noCache {
			one, many = name1, nameN
			first.Bound = Bound{Most: 120}
			all.Against, all.Bound = name1, Bound{Ratio: true, Most: 1.3}
		}
		b.Compare(first, all)
		closeAll(sockets)
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

// perRun sends datagrams by sockets in scattered order and returns what a program's
// run has taken, as the kernel counts it.
func perRun(b *B, p *ebpf.Program, sockets []int, datagrams int) float64 {
	b.Helper()
	before := programStats(b, p)
	err := pinned(func() error {
		at := 0
		for range datagrams {
			// A step that shares no factor with any count of sockets below it.
			at = (at + 7_368_787) % len(sockets)
			if _, err := unix.Write(sockets[at], []byte{1}); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		b.Fatalf("send datagrams: %v", err)
	}
	after := programStats(b, p)
	if after.RunCount-before.RunCount < uint64(datagrams) {
		b.Fatalf("%s ran %d times for %d datagrams", p, after.RunCount-before.RunCount, datagrams)
	}
	return float64(after.Runtime-before.Runtime) / float64(after.RunCount-before.RunCount)
}

// connected makes sockets whose flows are established: each was answered once, and has
// sent since.
func connected(client *netns.NS, to netip.AddrPort, port, count int) (sockets []int, err error) {
	err = client.Do(func() error {
		for i := range count {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			sockets = append(sockets, fd)
			// The answers of the others are not read.
			patience := unix.NsecToTimeval(int64(time.Second))
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience); err != nil {
				return err
			}
			if err := unix.Bind(fd, &unix.SockaddrInet4{Port: port + i}); err != nil {
				return fmt.Errorf("bind to port %d: %w", port+i, err)
			}
			if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}); err != nil {
				return fmt.Errorf("connect to %s: %w", to, err)
			}
			if err := answered(fd); err != nil {
				return fmt.Errorf("socket %d to %s: %w", i, to, err)
			}
		}
		return nil
	})
	if err != nil {
		closeAll(sockets)
	}
	return sockets, err
}

// answered asks until an answer comes, and once more: what follows an answer is what
// the socket remembers.
func answered(fd int) (err error) {
	var answer [1]byte
	for range 10 {
		if _, err = unix.Write(fd, []byte{1}); err != nil {
			return err
		}
		if _, err = unix.Read(fd, answer[:]); err == nil {
			_, err = unix.Write(fd, []byte{1})
			return err
		}
	}
	return err
}

func closeAll(sockets []int) {
	for _, fd := range sockets {
		unix.Close(fd)
	}
}
