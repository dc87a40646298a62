// SPDX-License-Identifier: Apache-2.0

//go:build root

package bpf

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/test/netns"
)

// hostTest is a node whose own sockets are served, and this process in its cgroup.
type hostTest struct {
	*netns.NS
	t    *testing.T
	d    *Datapath
	host *Host

	backends, slots uint32
}

const (
	tcp = unix.IPPROTO_TCP
	udp = unix.IPPROTO_UDP
)

func newHostTest(t *testing.T) *hostTest {
	t.Helper()
	h := &hostTest{NS: netns.New(t, "host"), t: t, d: load(t)}
	h.Addr(t, "lo", "10.244.0.7/32", "10.244.0.8/32", "fd00:10:244::7/128", "192.0.2.11/32")
	group := netns.NewCgroup(t, "host")
	enter(t, group.Path)
	if err := h.Do(func() (err error) {
		h.host, err = h.d.AttachHost(HostOptions{Cgroup: group.Path, NodePortFirst: 30000, NodePortLast: 32767})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.host.Close() })
	return h
}

// enter moves this process into a cgroup until the test ends: a socket belongs
// to the cgroup in which it was opened.
func enter(t *testing.T, path string) {
	t.Helper()
	root, err := CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	list, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	var before string
	for line := range strings.Lines(string(list)) {
		if rest, ok := strings.CutPrefix(line, "0::"); ok {
			before = filepath.Join(root, strings.TrimSpace(rest))
		}
	}
	move := func(to string) error {
		return os.WriteFile(filepath.Join(to, "cgroup.procs"), fmt.Append(nil, os.Getpid()), 0o644)
	}
	if err := move(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := move(before); err != nil {
			t.Fatalf("leave the test's cgroup: %v", err)
		}
	})
}

func (h *hostTest) put(what error) {
	h.t.Helper()
	if what != nil {
		h.t.Fatal(what)
	}
}

// backend makes one and returns its index.
func (h *hostTest) backend(address string, proto uint8) uint32 {
	h.t.Helper()
	h.backends++
	at := netip.MustParseAddrPort(address)
	h.put(h.d.Backends.Put(h.backends, Backend{Addr: ToAddr(at.Addr()), Port: Port(at.Port()), Proto: proto, State: BackendActive, Generation: 1}))
	return h.backends
}

// service makes a frontend of the backends, and its address known.
func (h *hostTest) service(address string, proto uint8, value Service, backends ...uint32) {
	h.t.Helper()
	first := h.slots
	for _, index := range backends {
		h.put(h.d.Slots.Put(h.slots, index))
		h.slots++
	}
	at := netip.MustParseAddrPort(address)
	value.Id = first + 1000
	value.Internal = Slots{First: first, Count: uint32(len(backends))}
	h.put(h.d.Services.Put(ServiceKey{Addr: ToAddr(at.Addr()), Port: Port(at.Port()), Proto: proto}, value))
	if !at.Addr().Is4() || at.Addr().As4()[0] == 10 {
		h.put(h.d.Services.Put(ServiceKey{Addr: ToAddr(at.Addr())}, Service{Id: ^uint32(0), Flags: ServiceAddress}))
	}
}

// remove ends a backend, and moves its slot to another where there is one.
func (h *hostTest) remove(index uint32) {
	h.t.Helper()
	var b Backend
	h.put(h.d.Backends.Lookup(index, &b))
	b.State = BackendFree
	b.Generation++
	h.put(h.d.Backends.Put(index, b))
}

func (h *hostTest) refused(reason DropReason) uint64 {
	h.t.Helper()
	var perCPU []Counter
	h.put(h.d.Counters.Lookup(uint32(int(reason)*Directions+int(abiDirectionFROM_HOST)), &perCPU))
	var n uint64
	for _, c := range perCPU {
		n += c.Packets
	}
	return n
}

// ask sends a line on a connection and returns the answer: the server's own address.
func ask(conn net.Conn) (string, error) {
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Write([]byte("who?")); err != nil {
		return "", err
	}
	buffer := make([]byte, 100)
	n, err := conn.Read(buffer)
	return string(buffer[:n]), err
}

// servers answer with the address that they listen on.
func (h *hostTest) servers(addresses ...string) {
	h.t.Helper()
	for _, address := range addresses {
		netns.TCP(h.t, h.NS, address, func(c net.Conn) {
			buffer := make([]byte, 100)
			for {
				if _, err := c.Read(buffer); err != nil {
					return
				}
				c.Write([]byte(address))
			}
		})
		netns.UDP(h.t, h.NS, address, func([]byte, net.Addr) []byte { return []byte(address) })
	}
}

func (h *hostTest) reaches(network, address string, want ...string) {
	h.t.Helper()
	conn, err := h.Dial(network, address)
	if err != nil {
		h.t.Fatalf("%s %s: %v", network, address, err)
	}
	defer conn.Close()
	got, err := ask(conn)
	if err != nil {
		h.t.Fatalf("%s %s: %v", network, address, err)
	}
	for _, w := range want {
		if got == w {
			if peer := conn.RemoteAddr().String(); peer != address && !strings.HasPrefix(address, "[::ffff:") {
				h.t.Errorf("%s: its peer is %s", address, peer)
			}
			return
		}
	}
	h.t.Errorf("%s %s: answered by %s, want %v", network, address, got, want)
}

func TestTheHostsSocketsReachServices(t *testing.T) {
	h := newHostTest(t)
	h.servers("10.244.0.7:8080", "[fd00:10:244::7]:8080")
	h.service("10.96.0.10:80", tcp, Service{}, h.backend("10.244.0.7:8080", tcp))
	h.service("10.96.0.10:53", udp, Service{}, h.backend("10.244.0.7:8080", udp))
	h.service("[fd00:10:96::10]:80", tcp, Service{}, h.backend("[fd00:10:244::7]:8080", tcp))
	h.service("[fd00:10:96::10]:53", udp, Service{}, h.backend("[fd00:10:244::7]:8080", udp))
	h.service("192.0.2.11:30080", tcp, Service{}, h.backend("10.244.0.7:8080", tcp))
	h.reaches("tcp", "10.96.0.10:80", "10.244.0.7:8080")
	h.reaches("udp", "10.96.0.10:53", "10.244.0.7:8080")
	h.reaches("tcp", "[fd00:10:96::10]:80", "[fd00:10:244::7]:8080")
	h.reaches("udp", "[fd00:10:96::10]:53", "[fd00:10:244::7]:8080")
	h.reaches("tcp", "192.0.2.11:30080", "10.244.0.7:8080")
	// What is no service's goes where it went before.
	h.reaches("tcp", "10.244.0.7:8080", "10.244.0.7:8080")

	if _, err := h.Dial("tcp", "127.0.0.1:30080"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a node port on loopback before the node's address is known: %v", err)
	}
	h.put(h.host.SetNodeAddress(netip.MustParseAddr("192.0.2.11")))
	h.reaches("tcp", "127.0.0.1:30080", "10.244.0.7:8080")
	if n := h.refused(0); n < 6 {
		t.Errorf("%d calls were counted as served", n)
	}
}

func TestTheNameThatAConnectedSocketGivesItsPeer(t *testing.T) {
	h := newHostTest(t)
	h.servers("10.244.0.7:8080")
	h.service("10.96.0.10:80", tcp, Service{}, h.backend("10.244.0.7:8080", tcp))
	conn, err := h.Dial("tcp", "10.96.0.10:80")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	h.put(err)
	var peer unix.Sockaddr
	h.put(raw.Control(func(fd uintptr) { peer, err = unix.Getpeername(int(fd)) }))
	h.put(err)
	if a := peer.(*unix.SockaddrInet4); a.Addr != [4]byte{10, 96, 0, 10} || a.Port != 80 {
		t.Errorf("getpeername gives %v port %d", a.Addr, a.Port)
	}
}

func TestIPv4InAnIPv6SocketIsServed(t *testing.T) {
	h := newHostTest(t)
	h.servers("10.244.0.7:8080")
	h.service("10.96.0.10:80", tcp, Service{}, h.backend("10.244.0.7:8080", tcp))
	h.put(h.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		mapped := netip.MustParseAddr("::ffff:10.96.0.10").As16()
		if err := unix.Connect(fd, &unix.SockaddrInet6{Addr: mapped, Port: 80}); err != nil {
			return err
		}
		peer, err := unix.Getpeername(fd)
		if err != nil {
			return err
		}
		if a := peer.(*unix.SockaddrInet6); a.Addr != mapped || a.Port != 80 {
			t.Errorf("getpeername gives %v port %d", netip.AddrFrom16(a.Addr), a.Port)
		}
		return nil
	}))
}

func TestAServiceWithoutBackendsRefusesAtOnce(t *testing.T) {
	h := newHostTest(t)
	h.service("10.96.0.10:80", tcp, Service{})
	h.service("10.96.0.10:53", udp, Service{})
	h.service("10.96.0.11:80", tcp, Service{Flags: ServiceInternalLocal})
	for _, test := range []struct {
		network, address string
		reason           DropReason
	}{
		{"tcp", "10.96.0.10:80", abiDropReasonDROP_NO_BACKEND},
		{"udp", "10.96.0.10:53", abiDropReasonDROP_NO_BACKEND},
		{"tcp", "10.96.0.10:81", abiDropReasonDROP_NO_PORT},
		{"tcp", "10.96.0.11:80", abiDropReasonDROP_NO_LOCAL_BACKEND},
	} {
		before := h.refused(test.reason)
		if _, err := h.Dial(test.network, test.address); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s %s: %v, want refused", test.network, test.address, err)
		}
		if n := h.refused(test.reason); n != before+1 {
			t.Errorf("%s %s: counted %d times as %s", test.network, test.address, n-before, test.reason)
		}
	}
	// getaddrinfo() asks for a route by a datagram socket connected to port 0.
	h.put(h.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{10, 96, 0, 10}}); !errors.Is(err, unix.ENETUNREACH) {
			t.Errorf("a question for a route: %v, want what the routes here say", err)
		}
		return nil
	}))
}

func TestDatagramsOfOneSocketStayWithABackendWhileItIsThere(t *testing.T) {
	h := newHostTest(t)
	h.servers("10.244.0.7:8080", "10.244.0.8:8080")
	one, two := h.backend("10.244.0.7:8080", udp), h.backend("10.244.0.8:8080", udp)
	h.service("10.96.0.10:53", udp, Service{}, one, two)
	frontend := net.UDPAddrFromAddrPort(netip.MustParseAddrPort("10.96.0.10:53"))
	seen := map[string]bool{}
	for range 40 {
		conn, err := h.ListenPacket("udp4", "0.0.0.0:0")
		h.put(err)
		exchange := func() string {
			t.Helper()
			conn.SetDeadline(time.Now().Add(5 * time.Second))
			if _, err := conn.WriteTo([]byte("who?"), frontend); err != nil {
				t.Fatal(err)
			}
			buffer := make([]byte, 100)
			n, from, err := conn.ReadFrom(buffer)
			if err != nil {
				t.Fatal(err)
			}
			if from.String() != frontend.String() {
				t.Fatalf("the answer is from %s", from)
			}
			return string(buffer[:n])
		}
		first := exchange()
		seen[first] = true
		for range 5 {
			if again := exchange(); again != first {
				t.Fatalf("a socket's datagrams go to %s and %s", first, again)
			}
		}
		conn.Close()
	}
	if len(seen) != 2 {
		t.Errorf("40 sockets used only %v", seen)
	}

	conn, err := h.ListenPacket("udp4", "0.0.0.0:0")
	h.put(err)
	defer conn.Close()
	send := func() error {
		_, err := conn.WriteTo([]byte("who?"), frontend)
		return err
	}
	h.put(send())
	h.remove(one)
	h.put(h.d.Slots.Put(uint32(0), two))
	for range 3 {
		h.put(send())
	}
	// Without any the call fails.
	h.remove(two)
	h.service("10.96.0.10:53", udp, Service{})
	if err := send(); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("without backends: %v", err)
	}
}

func TestSessionAffinityHoldsForTheHost(t *testing.T) {
	h := newHostTest(t)
	h.servers("10.244.0.7:8080", "10.244.0.8:8080")
	one, two := h.backend("10.244.0.7:8080", tcp), h.backend("10.244.0.8:8080", tcp)
	h.service("10.96.0.10:80", tcp, Service{AffinitySeconds: 60}, one, two)
	seen := map[string]bool{}
	for range 20 {
		conn, err := h.Dial("tcp", "10.96.0.10:80")
		h.put(err)
		who, err := ask(conn)
		h.put(err)
		conn.Close()
		seen[who] = true
	}
	if len(seen) != 1 {
		t.Errorf("one client was served by %v", seen)
	}
}

func TestSocketsConnectedToAUDPBackendThatGoesAreTold(t *testing.T) {
	h := newHostTest(t)
	if !h.host.CanEndSockets() {
		const why = "this kernel has no bpf_sock_destroy (6.5 and newer)"
		if os.Getenv("NO_SKIP") == "1" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	h.servers("10.244.0.7:8080", "10.244.0.8:8080")
	gone, stays := h.backend("10.244.0.7:8080", udp), h.backend("10.244.0.8:8080", udp)
	h.service("10.96.0.10:53", udp, Service{}, gone)
	h.service("10.96.0.11:53", udp, Service{}, stays)
	var conns []net.Conn
	for _, address := range []string{"10.96.0.10:53", "10.96.0.11:53", "10.244.0.7:8080"} {
		conn, err := h.Dial("udp", address)
		h.put(err)
		defer conn.Close()
		if _, err := ask(conn); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	end := func(want uint64) {
		t.Helper()
		h.put(h.Do(func() error {
			if n, err := h.host.EndSockets(); err != nil || n != want {
				return fmt.Errorf("%d sockets were ended, want %d: %w", n, want, err)
			}
			return nil
		}))
	}
	end(0)
	h.remove(gone)
	end(1)
	conns[0].SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := conns[0].Read(make([]byte, 100)); !errors.Is(err, syscall.ECONNABORTED) {
		t.Errorf("the socket of the backend that is gone: %v", err)
	}
	for i, conn := range conns[1:] {
		if _, err := ask(conn); err != nil {
			t.Errorf("socket %d, which has nothing to do with it: %v", i+1, err)
		}
	}
	end(0)
}

func TestSocketsOfOtherNamespacesAreLeftAlone(t *testing.T) {
	h := newHostTest(t)
	h.servers("10.244.0.7:8080")
	h.service("10.96.0.10:80", tcp, Service{}, h.backend("10.244.0.7:8080", tcp))
	pod := netns.New(t, "pod")
	pod.Addr(t, "lo", "10.96.0.10/32")
	netns.TCPEcho(t, pod, "10.96.0.10:80")
	if err := pod.Echo("tcp", "10.96.0.10:80", "a pod's own"); err != nil {
		t.Error(err)
	}
}

func TestTheHostsHooksAreTakenOver(t *testing.T) {
	h := newHostTest(t)
	h.servers("10.244.0.7:8080")
	h.service("10.96.0.10:80", tcp, Service{}, h.backend("10.244.0.7:8080", tcp))
	old, err := h.Dial("tcp", "10.96.0.10:80")
	h.put(err)
	defer old.Close()
	// Without a daemon.
	h.host.Close()
	h.reaches("tcp", "10.96.0.10:80", "10.244.0.7:8080")
	// With the next one, and in another cgroup.
	group := netns.NewCgroup(t, "next")
	enter(t, group.Path)
	h.put(h.Do(func() (err error) {
		h.host, err = h.d.AttachHost(HostOptions{Cgroup: group.Path, NodePortFirst: 30000, NodePortLast: 32767})
		return err
	}))
	h.reaches("tcp", "10.96.0.10:80", "10.244.0.7:8080")
	if _, err := ask(old); err != nil || old.RemoteAddr().String() != "10.96.0.10:80" {
		t.Errorf("a connection of before: %v", err)
	}
	h.host.Close()
	h.put(DetachHost(filepath.Dir(h.d.pins.root)))
	// The kernel detaches a link after the last reference has gone, in its own time.
	netns.Eventually(t, 10*time.Second, "the programs to be detached", func() bool {
		_, err := h.Dial("tcp", "10.96.0.10:80")
		return errors.Is(err, syscall.ENETUNREACH)
	})
	h.put(DetachHost(filepath.Dir(h.d.pins.root)))
}
