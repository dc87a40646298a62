// SPDX-License-Identifier: Apache-2.0

//go:build root

package scenario

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/test/netns"
)

func TestMain(m *testing.M) {
	code := m.Run()
	RemovePrograms()
	os.Exit(code)
}

// echoService is a service of TCP and UDP with the pods that are labelled app=echo.
const echoService = `
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: default}
spec:
  clusterIPs: [10.96.0.10, "fd00:10:96::10"]
  ipFamilyPolicy: RequireDualStack
  selector: {app: echo}
  ports:
  - {name: tcp, protocol: TCP, port: 80, targetPort: 8080}
  - {name: udp, protocol: UDP, port: 53, targetPort: 5353}
`

func podManifest(name string) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: default, labels: {app: echo}}\n", name)
}

// echoNode is a node with a client and echo servers behind one service.
func echoNode(t *testing.T, servers ...string) *Node {
	t.Helper()
	n := NewNode(t)
	manifests := echoService
	for _, name := range servers {
		manifests += podManifest(name)
	}
	n.Write("echo.yaml", manifests)
	n.Up()
	n.AddPod("client")
	for _, name := range servers {
		p := n.AddPod(name)
		netns.TCPEcho(t, p.NS, "[::]:8080")
		netns.UDPEcho(t, p.NS, "[::]:5353")
	}
	return n
}

// load is traffic that has to survive: connections that stay, in both families.
type load struct {
	t        *testing.T
	stop     chan struct{}
	wait     sync.WaitGroup
	exchange atomic.Int64 // finished ones of all kinds
	opened   atomic.Int64 // new connections
	slowest  atomic.Int64
}

// startLoad begins: a TCP stream each, whose every byte has to come back in
// order; a UDP socket each, whose every request has to be answered, without a
// repetition; and new connections one after the other.
func startLoad(t *testing.T, n *Node) *load {
	t.Helper()
	l := &load{t: t, stop: make(chan struct{})}
	client := n.Pod("client").NS
	for _, vip := range []string{"10.96.0.10", "[fd00:10:96::10]"} {
		stream, err := client.Dial("tcp", vip+":80")
		if err != nil {
			t.Fatalf("open the stream: %v", err)
		}
		packets, err := client.Dial("udp", vip+":53")
		if err != nil {
			t.Fatalf("open the UDP socket: %v", err)
		}
		l.run(func(i uint32) error { return roundTrip(stream, i, 1<<14) })
		l.run(func(i uint32) error { return roundTrip(packets, i, 512) })
		l.run(func(i uint32) error {
			l.opened.Add(1)
			return client.Echo("tcp", vip+":80", "a new connection")
		})
		l.run(func(i uint32) error { return client.Echo("udp", vip+":53", "a new socket") })
		t.Cleanup(func() { stream.Close(); packets.Close() })
	}
	return l
}

func (l *load) run(once func(i uint32) error) {
	l.wait.Go(func() {
		for i := uint32(0); ; i++ {
			select {
			case <-l.stop:
				return
			default:
			}
			began := time.Now()
			if err := once(i); err != nil {
				l.t.Errorf("exchange %d: %v", i, err)
				return
			}
			l.exchange.Add(1)
			if took := int64(time.Since(began)); took > l.slowest.Load() {
				l.slowest.Store(took)
			}
			time.Sleep(time.Millisecond)
		}
	})
}

func roundTrip(c net.Conn, i uint32, size int) error {
	request := make([]byte, size)
	binary.BigEndian.PutUint32(request, i)
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write(request); err != nil {
		return err
	}
	answer := make([]byte, size)
	if _, err := io.ReadFull(c, answer); err != nil {
		return err
	}
	if got := binary.BigEndian.Uint32(answer); got != i {
		return fmt.Errorf("sent %d and got %d", i, got)
	}
	return nil
}

func (l *load) end() {
	close(l.stop)
	l.wait.Wait()
	l.t.Logf("%d exchanges, %d new TCP connections, the slowest took %v", l.exchange.Load(), l.opened.Load(), time.Duration(l.slowest.Load()))
}

func TestRestartUnderLoadLosesNoPacketAndNoConnection(t *testing.T) {
	n := echoNode(t, "echo-1", "echo-2", "echo-3")
	l := startLoad(t, n)
	before, err := n.API().Services(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range 6 {
		if i%2 == 0 {
			n.Crash()
		} else if err := n.Down(); err != nil {
			t.Errorf("SIGTERM: %v", err)
		}
		// Without a daemon for a while, too.
		at := l.exchange.Load()
		netns.Eventually(t, 20*time.Second, "traffic while no daemon runs", func() bool { return t.Failed() || l.exchange.Load() > at+40 })
		n.Up()
		at = l.exchange.Load()
		netns.Eventually(t, 20*time.Second, "traffic after the start", func() bool { return t.Failed() || l.exchange.Load() > at+40 })
		if t.Failed() {
			break
		}
	}
	l.end()
	after, err := n.API().Services(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("services were\n%v\nand are\n%v", before, after)
	}
	if text := n.Drops(); text != "" {
		t.Errorf("packets were dropped:\n%s", text)
	}
}

func TestCrashWhileServicesChangeLosesNothing(t *testing.T) {
	n := echoNode(t, "echo-1", "echo-2")
	l := startLoad(t, n)
	// Other services come, change and go while the daemon is killed at any
	// moment, and the last state wins.
	other := func(i int) string {
		var b strings.Builder
		for s := range 40 {
			if (s+i)%7 == 0 {
				continue
			}
			fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Service\nmetadata: {name: s%d, namespace: other}\nspec: {clusterIP: 10.96.1.%d, ports: [{port: 80}]}\n", s, s+1)
			fmt.Fprintf(&b, "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s%d-x, namespace: other, labels: {kubernetes.io/service-name: s%d}}\naddressType: IPv4\nports: [{port: 80}]\nendpoints:\n", s, s)
			for e := range 1 + (s+i)%5 {
				fmt.Fprintf(&b, "- addresses: [10.244.9.%d]\n", 1+(e+i)%200)
			}
		}
		return b.String()
	}
	for i := range 8 {
		n.Write("other.yaml", other(i))
		time.Sleep(time.Duration(i*13) * time.Millisecond)
		n.Crash()
		n.Launch()
		time.Sleep(time.Duration(100+i*37) * time.Millisecond)
	}
	n.Crash()
	n.Up()
	l.end()
	services, err := n.API().Services(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for s := range 40 {
		var got []string
		for _, row := range services {
			if row.Name == fmt.Sprintf("s%d", s) {
				for _, b := range row.Frontends[0].Backends {
					got = append(got, b.Address)
				}
			}
		}
		want := 0
		if (s+7)%7 != 0 {
			want = 1 + (s+7)%5
		}
		if len(got) != want {
			t.Errorf("service s%d has backends %v, want %d", s, got, want)
		}
	}
	if text := n.Drops(); text != "" {
		t.Errorf("packets were dropped:\n%s", text)
	}
}

func TestPodIsAddedWhileTheDaemonRestarts(t *testing.T) {
	n := echoNode(t, "echo-1")
	n.Crash()
	p := &Pod{NS: netns.Empty(t, "late"), ID: "container-late", namespace: "default", name: "late"}
	began := time.Now()
	err := n.Attach(p)
	if err == nil || !strings.Contains(err.Error(), `"code": 11`) && !strings.Contains(err.Error(), `"code":11`) {
		t.Errorf("ADD without a daemon: %v, want code 11", err)
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("ADD without a daemon took %v", took)
	}
	n.Up()
	if err := n.Attach(p); err != nil {
		t.Fatalf("the retry: %v", err)
	}
	if err := p.Echo("tcp", "10.96.0.10:80", "hello"); err != nil {
		t.Error(err)
	}
	n.Crash()
	if _, err := n.cni("DEL", p); err != nil {
		t.Errorf("DEL without a daemon: %v", err)
	}
	n.Up()
	list, err := n.API().Endpoints(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		if e.ContainerID == p.ID {
			t.Errorf("deleted while the daemon was away, and known: %+v", e)
		}
	}
}

// A reboot empties the BPF filesystem and takes interfaces and namespaces
// away; stateDir stays.
func TestRebootIsSurvived(t *testing.T) {
	n := echoNode(t, "echo-1")
	first := n.Pod("echo-1").IP
	n.Crash()
	reboot(t, n, true)
	n.Up()
	list, err := n.API().Endpoints(t.Context())
	if err != nil || len(list) != 0 {
		t.Errorf("endpoints after the reboot: %+v, %v", list, err)
	}
	status, err := n.API().Status(t.Context())
	if err != nil || !status.Healthy {
		t.Errorf("status after the reboot: %+v, %v", status, err)
	}
	// The runtime tears the old pods down and makes new ones.
	for _, name := range []string{"client", "echo-1"} {
		if _, err := n.cni("DEL", n.Pod(name)); err != nil {
			t.Errorf("DEL after the reboot: %v", err)
		}
	}
	client, server := n.AddPod("client-2"), n.AddPod("echo-1")
	netns.TCPEcho(t, server.NS, "[::]:8080")
	if server.IP == first {
		t.Errorf("%s is used again at once", first)
	}
	if err := client.Echo("tcp", "10.96.0.10:80", "hello"); err != nil {
		t.Error(err)
	}
}

// The pins are gone and the pods are not: an administrator's `mooring cleanup`,
// or a BPF filesystem that was unmounted.
func TestPinsAreLostAndPodsAreThere(t *testing.T) {
	n := echoNode(t, "echo-1", "echo-2")
	n.Crash()
	reboot(t, n, false)
	n.Up()
	for _, vip := range []string{"10.96.0.10", "[fd00:10:96::10]"} {
		if err := n.Pod("client").Echo("tcp", vip+":80", "hello"); err != nil {
			t.Errorf("after the pins were lost: %v", err)
		}
	}
	source := netip.AddrPortFrom(n.Pod("client").IP, 0).Addr()
	list, err := n.API().Endpoints(t.Context())
	if err != nil || len(list) != 3 {
		t.Errorf("endpoints: %+v, %v; want client %s and two more", list, err, source)
	}
	out, err := n.cni("CHECK", n.Pod("client"))
	if err != nil && !strings.Contains(err.Error(), "prevResult") {
		t.Errorf("CHECK: %v %s", err, out)
	}
}

func reboot(t *testing.T, n *Node, machine bool) {
	t.Helper()
	if err := unix.Unmount(n.BPFFS, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", n.BPFFS, "bpf", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	if !machine {
		return
	}
	os.Remove(n.Socket)
	links, err := n.Netlink().LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, "lxc") {
			if err := n.Netlink().LinkDel(l); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestCleanupRemovesEverything(t *testing.T) {
	n := echoNode(t, "echo-1")
	if err := n.Pod("client").Echo("tcp", "10.96.0.10:80", "hello"); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Mooring("cleanup"); err == nil {
		t.Error("cleanup removes the datapath below a running daemon")
	}
	if err := n.Down(); err != nil {
		t.Fatal(err)
	}
	if out, err := n.Mooring("cleanup"); err != nil {
		t.Errorf("cleanup: %v\n%s", err, out)
	}
	if left, _ := filepath.Glob(filepath.Join(n.BPFFS, "*", "*", "*")); len(left) > 0 {
		t.Errorf("pins are left: %v", left)
	}
	for _, table := range []string{"iptables-save", "ip6tables-save"} {
		if rules := n.Sh(t, table); strings.Contains(strings.ToLower(rules), "mooring") {
			t.Errorf("%s is left with\n%s", table, rules)
		}
	}
	if out, err := n.Mooring("cleanup"); err != nil {
		t.Errorf("cleanup again: %v\n%s", err, out)
	}
}
