// SPDX-License-Identifier: Apache-2.0

//go:build root

package packet

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/test/netns"
)

// The namespace level: real sockets on real veths.

// reachable lets what is outside answer pods by their own addresses.
func (n *Node) reachable(t *testing.T) {
	t.Helper()
	n.Outside.Route(t, n.PodCIDRs[0].String(), n.IP.String(), "node")
	n.Outside.Route(t, n.PodCIDRs[1].String(), n.IP6.String(), "node")
}

// upload sends size bytes to an address and compares what arrived by its hash.
func upload(from, to *netns.NS, address, listen netip.AddrPort, size int) error {
	l, err := to.Listen("tcp", listen.String())
	if err != nil {
		return err
	}
	defer l.Close()
	l.(*net.TCPListener).SetDeadline(time.Now().Add(30 * time.Second))
	type sum struct {
		hash [sha256.Size]byte
		size int64
		err  error
	}
	received := make(chan sum, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			received <- sum{err: err}
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(60 * time.Second))
		h := sha256.New()
		n, err := io.Copy(h, c)
		received <- sum{[sha256.Size]byte(h.Sum(nil)), n, err}
	}()
	c, err := from.Dial("tcp", address.String())
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(60 * time.Second))
	data := make([]byte, size)
	for i := 0; i < len(data); i += 4 {
		binary.LittleEndian.PutUint32(data[i:], uint32(i)*2654435761)
	}
	if _, err := c.Write(data); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	got := <-received
	if got.err != nil {
		return fmt.Errorf("receive: %w", got.err)
	}
	if got.size != int64(size) || got.hash != sha256.Sum256(data) {
		return fmt.Errorf("%d bytes arrived of %d, or others", got.size, size)
	}
	return nil
}

func TestLargeTransfersThroughAServiceArriveWhole(t *testing.T) {
	for name, offloads := range map[string]bool{"with offloads": true, "without offloads": false} {
		t.Run(name, func(t *testing.T) {
			n := NewNode(t)
			n.reachable(t)
			client, web := n.Pod(t), n.Pod(t)
			if !offloads {
				for _, pod := range []*Pod{client, web} {
					pod.WithoutOffloads(t, "eth0")
					n.WithoutOffloads(t, pod.Host)
				}
			}
			families(t, func(t *testing.T, v6 bool) {
				n.Service(t, TCP, VIP(v6, 10, 80), web.At(v6, 8080))
				n.Service(t, TCP, VIP(v6, 11, 80), remotes[v6])
				n.Service(t, TCP, VIP(v6, 12, 80), client.At(v6, 8081))
				const size = 8 << 20
				segments := n.segments(t, web)
				if err := upload(client.NS, web.NS, VIP(v6, 10, 80), web.At(v6, 8080), size); err != nil {
					t.Errorf("to a pod: %v", err)
				}
				// Whole checksums and segments of the wire's size, or not.
				if got := n.segments(t, web) - segments; offloads == (got > size/1500) {
					t.Errorf("%d bytes went in %d packets", size, got)
				}
				if err := upload(client.NS, n.Outside.NS, VIP(v6, 11, 80), remotes[v6], size); err != nil {
					t.Errorf("to a backend outside: %v", err)
				}
				if err := upload(client.NS, client.NS, VIP(v6, 12, 80), client.At(v6, 8081), size); err != nil {
					t.Errorf("to itself: %v", err)
				}
			})
			n.noDrops(t)
		})
	}
}

// segments is how many packets a pod's interface has received.
func (n *Node) segments(t *testing.T, pod *Pod) int {
	t.Helper()
	return int(pod.Link(t, "eth0").Attrs().Statistics.RxPackets)
}

// noDrops fails when the datapath dropped anything.
func (n *Node) noDrops(t *testing.T) {
	t.Helper()
	for reason, packets := range n.Dropped(t) {
		t.Errorf("%d packets were dropped: %s", packets, reason)
	}
}

func TestPathMTUIsDiscoveredThroughAService(t *testing.T) {
	n := NewNode(t)
	n.reachable(t)
	client := n.Pod(t)
	// The way out of the node is narrower than the pod's interface, and the far end does not know.
	uplink := n.Link(t, netns.Uplink)
	if err := n.Netlink().LinkSetMTU(uplink, 1300); err != nil {
		t.Fatal(err)
	}
	families(t, func(t *testing.T, v6 bool) {
		tcp, udp := VIP(v6, 10, 80), VIP(v6, 11, 53)
		n.Service(t, TCP, tcp, remotes[v6])
		n.Service(t, UDP, udp, remotes[v6])
		if err := upload(client.NS, n.Outside.NS, tcp, remotes[v6], 1<<20); err != nil {
			t.Errorf("TCP: %v", err)
		}
		client.learned(t, tcp.Addr(), 1300)

		netns.UDPEcho(t, n.Outside.NS, remotes[v6].String())
		c, err := client.Dial("udp", udp.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		dontFragment(t, c.(*net.UDPConn), v6)
		netns.Eventually(t, 10*time.Second, "the socket is told that its datagram is too long", func() bool {
			_, err := c.Write(make([]byte, 1400))
			return errors.Is(err, syscall.EMSGSIZE)
		})
		client.learned(t, udp.Addr(), 1300)
		// Of a socket of its own: the other may have been told twice.
		if err := client.Echo("udp", udp.String(), strings.Repeat("x", 1200)); err != nil {
			t.Errorf("what fits: %v", err)
		}
	})
}

func dontFragment(t *testing.T, c *net.UDPConn, v6 bool) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		if v6 {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO)
		} else {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// learned checks what MTU the pod's kernel knows on the way to an address: a
// connected datagram socket tells it.
func (p *Pod) learned(t *testing.T, to netip.Addr, want int) {
	t.Helper()
	c, err := p.Dial("udp", netip.AddrPortFrom(to, 9).String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var mtu int
	raw.Control(func(fd uintptr) {
		if to.Is6() {
			mtu, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU)
		} else {
			mtu, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU)
		}
	})
	if err != nil || mtu != want {
		t.Errorf("the MTU to %s is %d (%v), want %d", to, mtu, err, want)
	}
}

func TestDatagramsLongerThanTheWireThroughAService(t *testing.T) {
	n := NewNode(t)
	n.reachable(t)
	client, dns := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		n.Service(t, UDP, VIP(v6, 10, 53), dns.At(v6, 1053))
		n.Service(t, UDP, VIP(v6, 11, 53), remotes[v6])
		n.Service(t, UDP, VIP(v6, 12, 53), client.At(v6, 1053))
		netns.UDPEcho(t, dns.NS, dns.At(v6, 1053).String())
		netns.UDPEcho(t, client.NS, client.At(v6, 1053).String())
		netns.UDPEcho(t, n.Outside.NS, remotes[v6].String())
		for _, size := range []int{1, 1472, 1473, 3001, 9000, 60000} {
			for _, vip := range []int{10, 11, 12} {
				if err := client.Echo("udp", VIP(v6, vip, 53).String(), strings.Repeat("x", size)); err != nil {
					t.Errorf("%d bytes: %v", size, err)
				}
			}
		}
	})
	n.noDrops(t)
}

// ping sends an echo request by an unprivileged ICMP socket and waits for its answer.
func ping(n *netns.NS, to netip.Addr, size int) error {
	family, proto, request := unix.AF_INET, unix.IPPROTO_ICMP, byte(Echo)
	var address unix.Sockaddr = &unix.SockaddrInet4{}
	if to.Is6() {
		family, proto, request = unix.AF_INET6, unix.IPPROTO_ICMPV6, Echo6
		address = &unix.SockaddrInet6{Addr: to.As16()}
	} else {
		address = &unix.SockaddrInet4{Addr: to.As4()}
	}
	return n.Do(func() error {
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, proto)
		if err != nil {
			return fmt.Errorf("ICMP socket: %w", err)
		}
		defer unix.Close(fd)
		timeout := unix.Timeval{Sec: 5}
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
			return err
		}
		message := make([]byte, 8+size)
		message[0], message[7] = request, 1
		for i := range size {
			message[8+i] = byte(i)
		}
		if err := unix.Sendto(fd, message, 0, address); err != nil {
			return fmt.Errorf("ping %s: %w", to, err)
		}
		answer := make([]byte, len(message)+1)
		got, _, err := unix.Recvfrom(fd, answer, 0)
		if err != nil {
			return fmt.Errorf("ping %s: no answer: %w", to, err)
		}
		if string(answer[8:got]) != string(message[8:]) {
			return fmt.Errorf("ping %s: another payload came back", to)
		}
		return nil
	})
}

func TestPingBetweenPodsNodeAndOutside(t *testing.T) {
	n := NewNode(t)
	n.reachable(t)
	a, b := n.Pod(t), n.Pod(t)
	for _, ns := range []*netns.NS{a.NS, b.NS, n.NS, n.Outside.NS} {
		ns.Sysctl(t, "net.ipv4.ping_group_range", "0 2147483647")
	}
	families(t, func(t *testing.T, v6 bool) {
		node := n.IP
		if v6 {
			node = n.IP6
		}
		for _, size := range []int{0, 56, 1473, 8000} {
			for _, c := range []struct {
				name string
				from *netns.NS
				to   netip.Addr
			}{
				{"pod to pod", a.NS, b.IP(v6)},
				{"pod to itself", a.NS, a.IP(v6)},
				{"pod to node", a.NS, node},
				{"node to pod", n.NS, a.IP(v6)},
				{"pod to outside", a.NS, remotes[v6].Addr()},
				{"outside to pod", n.Outside.NS, a.IP(v6)},
			} {
				if err := ping(c.from, c.to, size); err != nil {
					t.Errorf("%s, %d bytes: %v", c.name, size, err)
				}
			}
		}
	})
	n.noDrops(t)
}

// received counts the packets that a namespace's IP layers took in, before any rule of iptables.
func received(t *testing.T, n *netns.NS) (v4, v6 int) {
	t.Helper()
	err := n.Do(func() error {
		text, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		var names []string
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			if fields[0] != "Ip:" {
				continue
			}
			if names == nil {
				names = fields
				continue
			}
			for i, name := range names {
				if name == "InReceives" {
					v4, err = strconv.Atoi(fields[i])
				}
			}
		}
		if err != nil {
			return err
		}
		text, err = os.ReadFile("/proc/thread-self/net/snmp6")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			if fields := strings.Fields(line); fields[0] == "Ip6InReceives" {
				v6, err = strconv.Atoi(fields[1])
			}
		}
		return err
	})
	if err != nil {
		t.Fatalf("read the IP counters of %s: %v", n.Name(), err)
	}
	return v4, v6
}

func TestPodsOfOneNodeTalkWithoutTheHostsStack(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	for _, v6 := range []bool{false, true} {
		n.Service(t, TCP, VIP(v6, 10, 80), web.At(v6, 7))
		n.Service(t, UDP, VIP(v6, 10, 53), web.At(v6, 7))
		netns.TCPEcho(t, web.NS, web.At(v6, 7).String())
		netns.UDPEcho(t, web.NS, web.At(v6, 7).String())
	}
	talk := func() {
		t.Helper()
		for _, v6 := range []bool{false, true} {
			for _, address := range []netip.AddrPort{web.At(v6, 7), VIP(v6, 10, 80)} {
				if err := client.Echo("tcp", address.String(), strings.Repeat("x", 100000)); err != nil {
					t.Error(err)
				}
			}
			for _, address := range []netip.AddrPort{web.At(v6, 7), VIP(v6, 10, 53)} {
				if err := client.Echo("udp", address.String(), "x"); err != nil {
					t.Error(err)
				}
			}
		}
	}
	v4, v6 := received(t, n.NS)
	raw := client.Capture(t, "eth0")
	talk()
	if sent := raw.Packets(nil); len(sent) < 20 {
		t.Fatalf("only %d packets were sent", len(sent))
	}
	after4, after6 := received(t, n.NS)
	// Neighbour and multicast listener discovery of IPv6 is the stack's; a flow has more packets.
	if after4 != v4 || after6-v6 > 10 {
		t.Errorf("the host's stack saw %d IPv4 and %d IPv6 packets", after4-v4, after6-v6)
	}
	// The counters do count what the stack handles.
	netns.UDPEcho(t, n.NS, n.IP.String()+":7")
	if err := client.Echo("udp", n.IP.String()+":7", "x"); err != nil {
		t.Error(err)
	}
	if later, _ := received(t, n.NS); later == after4 {
		t.Error("a packet to the node is not counted")
	}
}

func TestPodsAndTheirNodeReachEachOther(t *testing.T) {
	n := NewNode(t)
	n.reachable(t)
	pod := n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		node := n.IP
		if v6 {
			node = n.IP6
		}
		for name, c := range map[string]struct {
			client, server *netns.NS
			address        netip.Addr
		}{
			"pod to node":    {pod.NS, n.NS, node},
			"node to pod":    {n.NS, pod.NS, pod.IP(v6)},
			"pod to outside": {pod.NS, n.Outside.NS, remotes[v6].Addr()},
			"outside to pod": {n.Outside.NS, pod.NS, pod.IP(v6)},
		} {
			t.Run(name, func(t *testing.T) {
				address := netip.AddrPortFrom(c.address, 7).String()
				netns.TCPEcho(t, c.server, address)
				netns.UDPEcho(t, c.server, address)
				if err := c.client.Echo("tcp", address, strings.Repeat("x", 200000)); err != nil {
					t.Error(err)
				}
				if err := c.client.Echo("udp", address, strings.Repeat("x", 4000)); err != nil {
					t.Error(err)
				}
			})
		}
	})
	n.noDrops(t)
}

func TestSocketsAreRefusedAtOnce(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	families(t, func(t *testing.T, v6 bool) {
		n.Service(t, TCP, VIP(v6, 10, 80))
		n.Service(t, UDP, VIP(v6, 10, 53))
		n.Service(t, TCP, VIP(v6, 11, 80), web.At(v6, 8080))
		n.Service(t, UDP, VIP(v6, 11, 53), web.At(v6, 1053))
		n.Service(t, UDP, VIP(v6, 12, 53), client.At(v6, 1053))
		for name, vip := range map[string]netip.AddrPort{
			"no backend": VIP(v6, 10, 80), "no such port": VIP(v6, 10, 81), "the backend does not listen": VIP(v6, 11, 80),
		} {
			sent := client.Capture(t, "eth0")
			if c, err := client.Dial("tcp", vip.String()); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("TCP, %s: %v, %v", name, c, err)
			}
			if syns := sent.Packets(func(p netns.Packet) bool {
				read, _ := Read(p.Data) // its checksum is left to an offload
				return p.Outgoing && read.Proto == TCP && read.Flags == SYN
			}); len(syns) > 1 {
				t.Errorf("TCP, %s: refused after %d SYNs", name, len(syns))
			}
		}
		for name, vip := range map[string]netip.AddrPort{
			"no backend": VIP(v6, 10, 53), "no such port": VIP(v6, 10, 54), "the backend does not listen": VIP(v6, 11, 53),
			"the pod itself does not listen": VIP(v6, 12, 53),
		} {
			c, err := client.Dial("udp", vip.String())
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(5 * time.Second))
			c.Write([]byte("anyone?"))
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("UDP, %s: %v", name, err)
			}
			c.Close()
		}
	})
}

// send puts frames on the pod's wire as they are.
func (p *Pod) send(t *testing.T, dev string, frames ...[]byte) {
	t.Helper()
	index := p.Link(t, dev).Attrs().Index
	err := p.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, frame := range frames {
			if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: index}); err != nil {
				return fmt.Errorf("send %d bytes: %w", len(frame), err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestFramesOfEveryLengthOnTheWire(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	serveAll(t, n, web)
	got := web.Capture(t, "eth0")
	count := 0
	for _, v6 := range []bool{false, true} {
		for _, p := range kinds(client, v6) {
			frame := p.Bytes()
			for size := 15; size < len(frame); size++ {
				client.send(t, "eth0", frame[:size])
				count++
			}
		}
	}
	var drops uint64
	netns.Eventually(t, 5*time.Second, "every frame is counted", func() bool {
		drops = n.Dropped(t)["truncated"] + n.Dropped(t)["malformed"]
		return drops >= uint64(count)
	})
	if stray := got.Packets(func(p netns.Packet) bool {
		return !p.Outgoing && string(p.Data[6:12]) == string(web.HostMAC[:]) && string(p.Data[12:14]) == "\x08\x00"
	}); len(stray) != 0 {
		t.Errorf("%d cut frames reached the backend", len(stray))
	}
	netns.UDPEcho(t, web.NS, web.At(false, 1053).String())
	if err := client.Echo("udp", VIP(false, 10, 53).String(), "still well"); err != nil {
		t.Error(err)
	}
}

func TestTagsThatTheKernelKeepsBesideTheFrame(t *testing.T) {
	n := NewNode(t)
	client, web := n.Pod(t), n.Pod(t)
	serveAll(t, n, web)
	// A packet socket that gives the tag beside the frame, as a VLAN interface does.
	tagged := kinds(client, false)["UDP"]
	tagged.VLAN = 7
	client.send(t, "eth0", tagged.Bytes())
	netns.Eventually(t, 5*time.Second, "the tagged frame is dropped", func() bool { return n.Dropped(t)["vlan_tag"] > 0 })
	if e := n.Entries(t); len(e) != 0 {
		t.Errorf("it left %d entries", len(e))
	}
}
