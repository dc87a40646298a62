// SPDX-License-Identifier: Apache-2.0

//go:build root

package fate

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/scenario"
)

func TestMain(m *testing.M) {
	IdleMain()
	if address := os.Getenv("FATE_HOLD"); address != "" {
		hold(address)
	}
	code := m.Run()
	scenario.RemovePrograms()
	os.Exit(code)
}

// hold is a process with an open connection, to be killed.
func hold(address string) {
	c, err := net.Dial("tcp", address)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	time.Sleep(time.Minute)
	c.Close()
	os.Exit(0)
}

// connections is how many of each test's flows are made: as many as the figures
// are given for with FATE_CONNECTIONS, fewer in an emulated machine.
func connections(usual int) int {
	if n, err := strconv.Atoi(os.Getenv("FATE_CONNECTIONS")); err == nil {
		return n
	}
	if os.Getenv("MOORING_KERNEL") != "" {
		return max(usual/10, 70)
	}
	return usual
}

var vips = []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:10:96::10")}

const service = `
apiVersion: v1
kind: Service
metadata: {name: churn, namespace: default}
spec:
  clusterIPs: [10.96.0.10, "fd00:10:96::10"]
  ipFamilyPolicy: RequireDualStack
  selector: {app: churn}
  ports:
  - {name: tcp, protocol: TCP, port: 80, targetPort: 8080}
  - {name: refused, protocol: TCP, port: 81, targetPort: 8081}
  - {name: udp, protocol: UDP, port: 53, targetPort: 5353}
`

// newNode is a node with a client and servers, and the hook that the environment
// asks for (MOORING_HOOK) or what auto finds.
func newNode(t *testing.T, servers int, flags ...string) *scenario.Node {
	t.Helper()
	n, _ := newServedNode(t, servers, flags...)
	return n
}

// newServedNode is newNode, and what its servers have been asked.
func newServedNode(t *testing.T, servers int, flags ...string) (*scenario.Node, []*Served) {
	t.Helper()
	var served []*Served
	n := scenario.NewNode(t)
	hook := os.Getenv("MOORING_HOOK")
	if hook == "" {
		hook = "auto"
	}
	n.Flags = append([]string{"--conntrack-hook", hook}, flags...)
	manifest := service
	for i := range servers {
		manifest += fmt.Sprintf("---\napiVersion: v1\nkind: Pod\nmetadata: {name: server%d, namespace: default, labels: {app: churn}}\n", i)
	}
	n.Write("churn.yaml", manifest)
	n.Up()
	n.EnterCgroup()
	n.AddPod("client")
	for i := range servers {
		served = append(served, Serve(t, n.AddPod(fmt.Sprintf("server%d", i)).NS))
	}
	return n, served
}

func hookOf(t *testing.T, n *scenario.Node) string {
	t.Helper()
	s, err := n.API().Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s.Hook.Mode
}

func entries(t *testing.T, n *scenario.Node) (rows []api.Connection) {
	t.Helper()
	for c, err := range n.API().Connections(context.Background(), api.Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		rows = append(rows, c)
	}
	return rows
}

func stats(t *testing.T, n *scenario.Node) api.ConntrackStats {
	t.Helper()
	s, err := n.API().ConntrackStats(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func show(rows []api.Connection) string {
	var b strings.Builder
	for i, c := range rows {
		if i == 10 {
			fmt.Fprintf(&b, "  and %d more\n", len(rows)-i)
			break
		}
		fmt.Fprintf(&b, "  %+v\n", c)
	}
	return b.String()
}

// left waits until no entry is left that the rest of the test does not expect.
func left(t *testing.T, n *scenario.Node, within time.Duration, expected func(api.Connection) bool) {
	t.Helper()
	began := time.Now()
	for {
		var unexpected []api.Connection
		for _, c := range entries(t, n) {
			if !expected(c) {
				unexpected = append(unexpected, c)
			}
		}
		if len(unexpected) == 0 {
			t.Logf("nothing left after %.1f s", time.Since(began).Seconds())
			return
		}
		if time.Since(began) > within {
			t.Fatalf("%d entries left after %v:\n%s%+v", len(unexpected), within, show(unexpected), stats(t, n))
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// grace is how long entries may outlive their sockets: the figures' seconds, more
// where the machine is emulated.
func grace(hook string) time.Duration {
	g := 5 * time.Second
	if hook == "trampoline" {
		g = time.Second
	}
	if os.Getenv("MOORING_KERNEL") != "" {
		g *= 4
	}
	return g
}

func inTimeWait(c api.Connection) bool { return c.State == "timewait" }

func nothing(api.Connection) bool { return false }

// TestFate is one node for all: a datapath takes long to load where the machine
// is emulated.
func TestFate(t *testing.T) {
	n, served := newServedNode(t, servers)
	started := time.Now()
	hook := hookOf(t, n)
	if hook == "off" {
		t.Fatal("no hook")
	}
	for _, test := range []struct {
		name string
		run  func(*testing.T, *scenario.Node)
	}{
		{"nothing is left of flows that ended", nothingIsLeftOfFlowsThatEnded},
		{"an entry shows the socket that owns it", entryShowsTheSocketThatOwnsIt},
		{"a reused port chooses anew", func(t *testing.T, n *scenario.Node) { reusedPortChoosesAnew(t, n, served) }},
		{"sockets that share a port take their entries along", socketsThatShareAPortTakeTheirEntriesAlong},
		{"a socket with many flows takes them all along", socketWithManyFlowsTakesThemAllAlong},
		{"a killed process takes its entries along", killedProcessTakesItsEntriesAlong},
		{"a half-closed flow keeps its entry", halfClosedFlowKeepsItsEntry},
		{"a late FIN from elsewhere is translated", lateFINFromElsewhereIsTranslated},
		{"queued packets of a closed socket are translated", queuedPacketsOfAClosedSocketAreTranslated},
		{"queued segments of an aborted socket are translated", queuedSegmentsOfAnAbortedSocketAreTranslated},
		{"an aborted socket takes its entries along", abortedSocketTakesItsEntriesAlong},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, n) })
	}
	s := stats(t, n)
	if s.InsertFailed != 0 || s.DeleteFailed != 0 || s.Evicted != 0 {
		t.Errorf("insertions or deletions failed: %+v", s)
	}
	// Where all that took longer than TIME_WAIT the sweep may have come first to what was in it.
	if s.Deleted.Expired != 0 && time.Since(started) < time.Minute {
		t.Errorf("timers ended flows: %+v", s)
	}
	began := time.Now()
	left(t, n, 65*time.Second+grace(hook), nothing)
	t.Logf("%s: nothing left of TIME_WAIT after %.0f s: %+v", hook, time.Since(began).Seconds(), stats(t, n))
	// Last, for the servers' sockets live on, and what they send has entries of its own.
	t.Run("a deleted pod takes its entries along", func(t *testing.T) { deletedPodTakesItsEntriesAlong(t, n) })
}

// servers are the backends of the service.
const servers = 4

func nothingIsLeftOfFlowsThatEnded(t *testing.T, n *scenario.Node) {
	hook := hookOf(t, n)
	count := connections(3500)
	for _, kind := range []Kind{ServerCloses, Reset, Refused, ConnectedUDP, UnconnectedUDP} {
		t.Run(kind.String(), func(t *testing.T) {
			if err := Churn(n.Pod("client").NS, 4, count/7, vips, kind); err != nil {
				t.Fatal(err)
			}
			left(t, n, grace(hook), inTimeWait)
		})
	}
	for _, kind := range []Kind{ClientCloses, LateFIN} {
		t.Run(kind.String(), func(t *testing.T) {
			if err := Churn(n.Pod("client").NS, 16, count/7, vips, kind); err != nil {
				t.Fatal(err)
			}
			left(t, n, grace(hook), inTimeWait)
		})
	}
}

func entryShowsTheSocketThatOwnsIt(t *testing.T, n *scenario.Node) {
	client := n.Pod("client")
	c, err := client.Dial("tcp", "10.96.0.10:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte{byte(ClientCloses)}); err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if _, err := c.Read(b[:]); err != nil {
		t.Fatal(err)
	}
	rows := map[string]api.Connection{}
	for _, r := range entries(t, n) {
		if r.Source == c.LocalAddr().String() {
			rows[r.Type] = r
		}
	}
	for _, kind := range []string{"SVC", "EGRESS", "INGRESS"} {
		r, there := rows[kind]
		if !there {
			t.Fatalf("no %s row: %+v", kind, rows)
		}
		if !r.Tethered || r.SocketCookie == 0 || r.ExpiresInSeconds != 0 || r.State != "established" {
			t.Errorf("%s: %+v", kind, r)
		}
	}
	if rows["SVC"].SocketCookie != rows["EGRESS"].SocketCookie || rows["SVC"].SocketCookie == rows["INGRESS"].SocketCookie {
		t.Errorf("cookies: %+v", rows)
	}
}

func reusedPortChoosesAnew(t *testing.T, n *scenario.Node, served []*Served) {
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			count := connections(1000)
			hits := spread(t, n, served, network, count)
			chi2 := uneven(hits, count)
			if chi2 > tooUneven {
				t.Errorf("%v of %d is no fair choice: chi-square is %.1f", hits, count, chi2)
			}
			t.Logf("%d flows from one port: %v, sigma %.1f, chi-square %.1f", count, hits, sigma(count), chi2)
		})
	}
}

// fixedPort is below those that the kernel gives out: of those any may be in TIME_WAIT.
const fixedPort = 21000

// fromPort makes a flow from a port that the last one has just left. Of one that fails
// the witnesses tell while its socket is still there.
func fromPort(network string, port uint16, witnesses ...func(port uint16) string) error {
	kind, number := unix.SOCK_STREAM, uint16(TCPPort)
	if network == "udp" {
		kind, number = unix.SOCK_DGRAM, UDPPort
	}
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience); err != nil {
		return err
	}
	if err := unix.Bind(fd, sockaddr(netip.IPv4Unspecified(), port)); err != nil {
		return fmt.Errorf("bind to port %d: %w", port, err)
	}
	if err := unix.Connect(fd, sockaddr(vips[0], number)); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if network == "udp" {
		return exchange(fd, 1)
	}
	// Aborted, so that the port is free at once.
	if err := exchange(fd, byte(Reset)); err != nil {
		for _, witness := range witnesses {
			err = fmt.Errorf("%w\n%s", err, witness(port))
		}
		return err
	}
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}

// socketsThatShareAPortTakeTheirEntriesAlong is also what a port is that is used again
// before the end of the last socket was heard.
func socketsThatShareAPortTakeTheirEntriesAlong(t *testing.T, n *scenario.Node) {
	const ports, sharers = 20, 4
	err := n.Pod("client").Do(func() error {
		for port := range uint16(ports) {
			for range sharers {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
					return err
				}
				if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience); err != nil {
					return err
				}
				if err := unix.Bind(fd, sockaddr(netip.IPv4Unspecified(), fixedPort+1+port)); err != nil {
					return err
				}
				// Connected, or the answer would be any sharer's.
				if err := unix.Connect(fd, sockaddr(vips[0], UDPPort)); err != nil {
					return err
				}
				if err := exchange(fd, 1); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	left(t, n, grace(hookOf(t, n)), inTimeWait)
}

func socketWithManyFlowsTakesThemAllAlong(t *testing.T, n *scenario.Node) {
	hook := hookOf(t, n)
	client := n.Pod("client")
	server := n.Pod("server0")
	flows := connections(3000)
	err := client.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for i := range flows {
			if err := unix.Sendto(fd, []byte{1}, 0, sockaddr(server.IP, uint16(10000+i))); err != nil && err != unix.ECONNREFUSED {
				return err
			}
		}
		owned := 0
		for _, c := range entries(t, n) {
			if c.Tethered {
				owned++
			}
		}
		if owned < flows*9/10 {
			t.Errorf("%d flows of one socket have %d entries that it owns", flows, owned)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	left(t, n, grace(hook), inTimeWait)
}

func deletedPodTakesItsEntriesAlong(t *testing.T, n *scenario.Node) {
	hook := hookOf(t, n)
	doomed := n.AddPod("doomed")
	for range 20 {
		c, err := doomed.Dial("tcp", "10.96.0.10:80")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	ip := doomed.IP.String() + ":"
	n.DeletePod("doomed")
	left(t, n, grace(hook), func(c api.Connection) bool { return !strings.HasPrefix(c.Source, ip) })
}

func killedProcessTakesItsEntriesAlong(t *testing.T, n *scenario.Node) {
	hook := hookOf(t, n)
	holder := n.Pod("client").Command(os.Args[0])
	holder.Env = append(os.Environ(), "FATE_HOLD=10.96.0.10:80")
	process := holder.Background(t)
	netns.Eventually(t, 20*time.Second, "the connection to be established", func() bool {
		return slices.ContainsFunc(entries(t, n), func(c api.Connection) bool { return c.Type == "SVC" && c.State == "established" })
	})
	process.Kill()
	left(t, n, grace(hook), inTimeWait)
}

func halfClosedFlowKeepsItsEntry(t *testing.T, n *scenario.Node) {
	client := n.Pod("client")
	c, err := client.Dial("tcp", "10.96.0.10:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte{byte(ServerCloses)}); err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if _, err := c.Read(b[:]); err != nil {
		t.Fatal(err)
	}
	if size, err := c.Read(b[:]); size != 0 || err == nil {
		t.Fatalf("the server's FIN: %d, %v", size, err)
	}
	time.Sleep(4 * time.Second)
	rows := entries(t, n)
	if len(rows) == 0 {
		t.Fatal("the entries of a half-closed connection are gone")
	}
	t.Logf("half closed:\n%s", show(rows))
}

func queuedPacketsOfAClosedSocketAreTranslated(t *testing.T, n *scenario.Node) {
	hook := hookOf(t, n)
	client := n.Pod("client")
	defer throttle(t, client.NS, 10_000)()
	captured := map[netip.Addr]*netns.Capture{}
	for i := range servers {
		server := n.Pod(fmt.Sprintf("server%d", i))
		captured[server.IP] = server.Capture(t, "eth0")
	}
	arrived := func(to func(server netip.Addr) netip.Addr) (count int) {
		for server, c := range captured {
			count += len(c.Packets(func(p netns.Packet) bool { return datagramTo(p, to(server)) }))
		}
		return count
	}
	const count = 60
	err := client.Do(func() error {
		for i := range count {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			err = unix.Sendto(fd, make([]byte, 300), 0, sockaddr(vips[0], UDPPort))
			unix.Close(fd)
			if err != nil {
				return fmt.Errorf("datagram %d: %w", i, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	netns.Eventually(t, 30*time.Second, "every queued datagram at a server", func() bool {
		return arrived(func(server netip.Addr) netip.Addr { return server }) >= count
	})
	if n := arrived(func(netip.Addr) netip.Addr { return vips[0] }); n > 0 {
		t.Errorf("%d datagrams came untranslated", n)
	}
	left(t, n, grace(hook)+2*time.Second, inTimeWait)
}

// datagramTo tells whether a captured frame is an IPv4 UDP packet to an address.
func datagramTo(p netns.Packet, to netip.Addr) bool {
	const ip = 14
	return len(p.Data) > ip+20 && p.Data[12] == 8 && p.Data[13] == 0 && p.Data[ip+9] == unix.IPPROTO_UDP &&
		netip.AddrFrom4([4]byte(p.Data[ip+16:ip+20])) == to
}
