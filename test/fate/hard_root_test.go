// SPDX-License-Identifier: Apache-2.0

//go:build root

package fate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/scenario"
)

// elsewhere is a service whose backend is no pod of this node.
const elsewhere = `
apiVersion: v1
kind: Service
metadata: {name: elsewhere, namespace: default}
spec:
  clusterIP: 10.96.0.12
  ports: [{protocol: TCP, port: 80, targetPort: 8080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: elsewhere, namespace: default, labels: {kubernetes.io/service-name: elsewhere}}
addressType: IPv4
ports: [{protocol: TCP, port: 8080}]
endpoints: [{addresses: [203.0.113.1]}]
`

var elsewhereAddress = netip.MustParseAddrPort("10.96.0.12:80")

// delays are how long a peer's FIN comes after the pod's.
var delays = []time.Duration{0, 50 * time.Millisecond, 300 * time.Millisecond, time.Second, 2500 * time.Millisecond, 5 * time.Second}

func lateFINFromElsewhereIsTranslated(t *testing.T, n *scenario.Node) {
	n.Write("elsewhere.yaml", elsewhere)
	waitForService(t, n, elsewhereAddress)
	netns.TCP(t, n.Outside.NS, netns.Remote+":8080", func(c net.Conn) {
		var delay [1]byte
		if _, err := io.ReadFull(c, delay[:]); err != nil {
			return
		}
		c.Write(delay[:])
		io.Copy(io.Discard, c)
		time.Sleep(delays[delay[0]])
	})
	client := n.Pod("client")
	inside := client.Capture(t, "eth0")
	outside := n.Outside.Capture(t, "node")
	count := connections(600)
	var wait sync.WaitGroup
	errs := make([]error, count)
	for i := range count {
		c, err := client.Dial("tcp", elsewhereAddress.String())
		if err != nil {
			t.Fatal(err)
		}
		wait.Go(func() { errs[i] = errors.Join(ask(c, byte(i%len(delays))), c.Close()) })
	}
	wait.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	remote := netip.MustParseAddr(netns.Remote)
	fins := func() int {
		return len(inside.Packets(func(p netns.Packet) bool {
			s, ok := segment(p)
			return ok && !p.Outgoing && s.src == elsewhereAddress && s.flags&tcpFIN != 0
		}))
	}
	netns.Eventually(t, 20*time.Second, "every late FIN at the pod", func() bool { return fins() >= count })
	time.Sleep(200 * time.Millisecond) // for the last ACK, and what should not come
	// (The peer itself resets what comes twice: the ACK to a FIN that was sent again.)
	wrong := inside.Packets(func(p netns.Packet) bool {
		s, ok := segment(p)
		return ok && (s.src.Addr() == remote || s.dst.Addr() == remote || p.Outgoing && s.flags&tcpRST != 0)
	})
	if len(wrong) > 0 {
		t.Errorf("%d untranslated or resetting packets at the pod, the first: %+v", len(wrong), first(wrong))
	}
	wrong = outside.Packets(func(p netns.Packet) bool {
		s, ok := segment(p)
		return ok && (s.dst.Addr() == elsewhereAddress.Addr() || s.src.Addr() == elsewhereAddress.Addr() || s.dst.Addr() == remote && s.flags&tcpRST != 0)
	})
	if len(wrong) > 0 {
		t.Errorf("%d untranslated or resetting packets outside, the first: %+v", len(wrong), first(wrong))
	}
	left(t, n, grace(hookOf(t, n)), inTimeWait)
	t.Logf("%d connections whose peer's FIN came up to %v later", count, delays[len(delays)-1])
}

func queuedSegmentsOfAnAbortedSocketAreTranslated(t *testing.T, n *scenario.Node) {
	client := n.Pod("client")
	captured := map[netip.Addr]*netns.Capture{}
	for i := range servers {
		server := n.Pod(fmt.Sprintf("server%d", i))
		captured[server.IP] = server.Capture(t, "eth0")
	}
	const count = 20
	release := func() {}
	err := client.Do(func() error {
		var open []int
		for range count {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			if err := unix.Connect(fd, sockaddr(vips[0], TCPPort)); err != nil {
				return err
			}
			open = append(open, fd)
		}
		release = throttle(t, client.NS, 50_000)
		for _, fd := range open {
			if _, err := unix.Write(fd, make([]byte, 2000)); err != nil {
				return err
			}
			if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
				return err
			}
			unix.Close(fd)
		}
		return nil
	})
	defer release()
	if err != nil {
		t.Fatal(err)
	}
	resets := func() (count int) {
		for server, c := range captured {
			count += len(c.Packets(func(p netns.Packet) bool {
				s, ok := segment(p)
				return ok && !p.Outgoing && s.dst.Addr() == server && s.flags&tcpRST != 0
			}))
		}
		return count
	}
	netns.Eventually(t, 30*time.Second, "every reset at a server", func() bool { return resets() >= count })
	for _, c := range captured {
		if wrong := c.Packets(func(p netns.Packet) bool {
			s, ok := segment(p)
			return ok && s.dst.Addr() == vips[0]
		}); len(wrong) > 0 {
			t.Errorf("%d segments came untranslated, the first: %+v", len(wrong), first(wrong))
		}
	}
	left(t, n, grace(hookOf(t, n))+2*time.Second, inTimeWait)
}

// throttle makes a pod's packets wait in a tbf queue of so many bytes a second, until
// it is released.
func throttle(t *testing.T, pod *netns.NS, rate uint64) (release func()) {
	t.Helper()
	const burst = 2048
	queue := &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: pod.Link(t, "eth0").Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       rate, Limit: uint32(20*rate + burst), Buffer: netlink.Xmittime(rate, burst),
	}
	if err := pod.Netlink().QdiscAdd(queue); err != nil {
		t.Fatalf("throttle %s: %v", pod.Name(), err)
	}
	return func() {
		if err := pod.Netlink().QdiscDel(queue); err != nil {
			t.Errorf("throttle %s no more: %v", pod.Name(), err)
		}
	}
}

func abortedSocketTakesItsEntriesAlong(t *testing.T, n *scenario.Node) {
	client := n.Pod("client")
	count := connections(200)
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for i := range count {
		network, number := "tcp", uint16(TCPPort)
		if i%2 == 1 {
			network, number = "udp", UDPPort
		}
		c, err := client.Dial(network, netip.AddrPortFrom(vips[0], number).String())
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
		if err := ask(c, byte(ClientCloses)); err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range open {
		proto := uint8([]int{unix.IPPROTO_TCP, unix.IPPROTO_UDP}[i%2])
		local, remote := netip.MustParseAddrPort(c.LocalAddr().String()), netip.MustParseAddrPort(c.RemoteAddr().String())
		if err := Abort(client.NS, proto, local, remote); err != nil {
			t.Fatal(err)
		}
	}
	// Aborted, the sockets live on in their process until it closes them; of UDP that is the end.
	for _, c := range open {
		c.Close()
	}
	open = nil
	left(t, n, grace(hookOf(t, n)), inTimeWait)
}

const (
	tcpFIN = 1
	tcpRST = 4
)

// captured is what the tests ask of a TCP segment over IPv4.
type captured struct {
	src, dst netip.AddrPort
	flags    byte
}

func segment(p netns.Packet) (s captured, ok bool) {
	const ip = 14
	if len(p.Data) < ip+40 || p.Data[12] != 8 || p.Data[13] != 0 || p.Data[ip+9] != unix.IPPROTO_TCP {
		return s, false
	}
	tcp := p.Data[ip+int(p.Data[ip]&0xf)*4:]
	if len(tcp) < 20 {
		return s, false
	}
	at := func(address, port []byte) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(address)), binary.BigEndian.Uint16(port))
	}
	return captured{at(p.Data[ip+12:ip+16], tcp), at(p.Data[ip+16:ip+20], tcp[2:]), tcp[13]}, true
}

func first(packets []netns.Packet) captured {
	s, _ := segment(packets[0])
	return s
}
