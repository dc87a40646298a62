// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/test/netns"
)

// Traffic between two pods is made by processes of this binary that do nothing
// but system calls, on one CPU under SCHED_FIFO: unpinned, the wake-ups of the
// other CPU hide what is to be measured.

// Kind is a way to use the network.
type Kind string

// The kinds, as the rows call them.
const (
	RequestResponse     Kind = "request-response"      // on one TCP connection
	ConnectRequestClose Kind = "connect-request-close" // a TCP connection each, the client closes first
	UDPNewSocket        Kind = "UDP, a new socket each"
)

// Kinds are all of them.
var Kinds = []Kind{RequestResponse, ConnectRequestClose, UDPNewSocket}

// The server answers on these ports with as much as it is sent.
const (
	TCPPort = 8080
	UDPPort = 8081
)

const (
	workerVariable = "MOORING_BENCH_WORKER"
	payload        = 64
)

type workerTask struct {
	Kind   Kind // empty: server
	Server int  // of which type of socket; 0: as the port says
	Target netip.AddrPort
	For    time.Duration
}

// WorkerMain is called first in TestMain: in a worker process it does not return.
func WorkerMain() {
	text := os.Getenv(workerVariable)
	if text == "" {
		return
	}
	var task workerTask
	err := json.Unmarshal([]byte(text), &task)
	if err == nil {
		// No collector and no preemption: one thread, whose blocking calls the
		// runtime need not know about.
		debug.SetGCPercent(-1)
		err = pin()
	}
	if err == nil {
		err = task.run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func worker(ns *netns.NS, task workerTask) (*netns.Cmd, error) {
	text, err := json.Marshal(task)
	if err != nil {
		return nil, err
	}
	c := ns.Command("/proc/self/exe")
	c.Env = append(os.Environ(), workerVariable+"="+string(text), "GODEBUG=asyncpreemptoff=1", "GOMAXPROCS=2")
	return c, nil
}

// Serve starts a server in a namespace, which ends with the test. It answers by
// TCP and UDP in both families, one connection after the other.
func Serve(t netns.T, ns *netns.NS) {
	t.Helper()
	for _, udp := range []bool{false, true} {
		task := workerTask{Target: netip.AddrPortFrom(netip.IPv6Unspecified(), TCPPort)}
		port := TCPPort
		if udp {
			task.Target = netip.AddrPortFrom(netip.IPv6Unspecified(), UDPPort)
			port = UDPPort
		}
		c, err := worker(ns, task)
		if err != nil {
			t.Fatalf("server in %s: %v", ns.Name(), err)
		}
		c.Background(t)
		listening := "ss -Hln" + map[bool]string{false: "t", true: "u"}[udp]
		netns.Eventually(t, 10*time.Second, "the server listens", func() bool {
			out, _ := ns.Command("sh", "-c", listening).Output()
			return strings.Contains(string(out), fmt.Sprintf(":%d ", port))
		})
	}
}

// Rate has a client in a namespace use the network for a while and answers how
// often it did, a second.
func Rate(t netns.T, ns *netns.NS, kind Kind, target netip.AddrPort, while time.Duration) float64 {
	t.Helper()
	c, err := worker(ns, workerTask{Kind: kind, Target: target, For: while})
	var out []byte
	if err == nil {
		out, err = c.Output()
	}
	var rate float64
	if err == nil {
		_, err = fmt.Sscan(string(out), &rate)
	}
	if err != nil {
		t.Fatalf("%s from %s to %s: %v", kind, ns.Name(), target, err)
	}
	return rate
}

func (w workerTask) run() error {
	switch {
	case w.Kind == "" && (w.Server == unix.SOCK_STREAM || w.Target.Port() == TCPPort):
		return w.serveTCP()
	case w.Kind == "":
		return w.serveUDP()
	}
	var once func() error
	switch w.Kind {
	case RequestResponse:
		fd, err := w.connect(unix.SOCK_STREAM)
		if err != nil {
			return err
		}
		once = func() error { return ask(fd) }
	case ConnectRequestClose:
		once = func() error { return w.connectAskClose(unix.SOCK_STREAM) }
	case UDPNewSocket:
		once = func() error { return w.connectAskClose(unix.SOCK_DGRAM) }
	default:
		return fmt.Errorf("there is no kind of traffic %q", w.Kind)
	}
	// The first ones are slower: neighbours, slow start, cold code.
	for range 100 {
		if err := once(); err != nil {
			return err
		}
	}
	count := 0
	began := time.Now()
	for time.Since(began) < w.For {
		for range 20 {
			if err := once(); err != nil {
				return err
			}
		}
		count += 20
	}
	fmt.Println(float64(count) / time.Since(began).Seconds())
	return nil
}

// call is a system call of which the Go runtime is not told.
func call(what string, trap, a, b, c uintptr) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall(trap, a, b, c)
		if errno == syscall.EINTR {
			continue
		}
		if errno != 0 {
			return 0, fmt.Errorf("%s: %w", what, errno)
		}
		return int(n), nil
	}
}

func (w workerTask) connect(typ int) (int, error) {
	family, at, size := unix.AF_INET6, address(&peer6), uintptr(unix.SizeofSockaddrInet6)
	port := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, w.Target.Port()))
	if w.Target.Addr().Is4() {
		peer4 = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: w.Target.Addr().As4()}
		family, at, size = unix.AF_INET, address(&peer4), unix.SizeofSockaddrInet4
	} else {
		peer6 = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: w.Target.Addr().As16()}
	}
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("make a socket: %w", err)
	}
	// Nothing that is lost is waited for longer.
	timeout := unix.Timeval{Sec: 5}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return -1, err
	}
	if typ == unix.SOCK_STREAM {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
			return -1, err
		}
	}
	if _, err := call("connect", unix.SYS_CONNECT, uintptr(fd), at, size); err != nil {
		return -1, fmt.Errorf("%w (%s)", err, w.Target)
	}
	return fd, nil
}

func ask(fd int) error {
	if _, err := call("send", unix.SYS_WRITE, uintptr(fd), address(&buffer), payload); err != nil {
		return err
	}
	for got := 0; got < payload; {
		n, err := call("receive", unix.SYS_READ, uintptr(fd), address(&buffer), payload)
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("receive: the server has closed after %d bytes", got)
		}
		got += n
	}
	return nil
}

func (w workerTask) connectAskClose(typ int) error {
	fd, err := w.connect(typ)
	if err != nil {
		return err
	}
	if err := ask(fd); err != nil {
		return err
	}
	_, err = call("close", unix.SYS_CLOSE, uintptr(fd), 0, 0)
	return err
}

func (w workerTask) bind(typ int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET6, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("make a socket: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0); err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet6{Port: int(w.Target.Port())}); err != nil {
		return -1, fmt.Errorf("bind to %s: %w", w.Target, err)
	}
	return fd, nil
}

func (w workerTask) serveTCP() error {
	listener, err := w.bind(unix.SOCK_STREAM)
	if err != nil {
		return err
	}
	if err := unix.Listen(listener, 1024); err != nil {
		return err
	}
	for {
		fd, err := call("accept", unix.SYS_ACCEPT4, uintptr(listener), 0, 0)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
			return err
		}
		for {
			n, err := call("receive", unix.SYS_READ, uintptr(fd), address(&buffer), payload)
			if err != nil || n == 0 {
				break // the client has gone, one way or the other
			}
			if _, err := call("send", unix.SYS_WRITE, uintptr(fd), address(&buffer), uintptr(n)); err != nil {
				break
			}
		}
		if _, err := call("close", unix.SYS_CLOSE, uintptr(fd), 0, 0); err != nil {
			return err
		}
	}
}

func (w workerTask) serveUDP() error {
	fd, err := w.bind(unix.SOCK_DGRAM)
	if err != nil {
		return err
	}
	for {
		peerSize = unix.SizeofSockaddrInet6
		n, _, errno := syscall.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), address(&buffer), payload, 0, address(&peer6), address(&peerSize))
		if errno != 0 {
			continue // an ICMP error about an answer
		}
		syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), address(&buffer), n, 0, address(&peer6), uintptr(peerSize))
	}
}
