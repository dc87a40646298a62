// SPDX-License-Identifier: Apache-2.0

//go:build root

package fate

import (
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
	"github.com/mooring-cni/mooring/test/scenario"
)

// idleService is a service whose backends are the servers' idle ports.
const idleService = `
apiVersion: v1
kind: Service
metadata: {name: idle, namespace: default}
spec:
  clusterIP: 10.96.0.11
  selector: {app: churn}
  ports: [{protocol: TCP, port: 82, targetPort: 8082}]
`

var idleAddress = netip.MustParseAddrPort("10.96.0.11:82")

func TestFloodsBreakNoEstablishedConnection(t *testing.T) {
	established, capacity := 10_000, 32_768
	if os.Getenv("MOORING_KERNEL") != "" {
		established, capacity = 500, 2048
	}
	// (The host's own connection tracking, which masquerading would switch on, has a table too.)
	n := newNode(t, 2, "--conntrack-max-entries", fmt.Sprint(capacity), "--masquerade=false")
	n.Write("idle.yaml", idleService)
	n.Outside.Route(t, n.PodCIDRs[0].String(), n.IP.String(), "node")
	client, victim := n.Pod("client"), n.Pod("server1")
	waitForService(t, n, idleAddress)
	idle := Establish(t, client.NS, idleAddress, established, n.Pod("server0").NS, victim.NS)
	flooder := n.AddPod("flooder")
	// Its gateway answers, so that its MAC is known outside.
	if err := n.Outside.Do(func() error { return datagramsTo(netip.AddrPortFrom(n.IP, 9), 1) }); err != nil {
		t.Fatal(err)
	}
	count := 10 * capacity
	fromPod := func(next func(i int) packet.Packet) func() error {
		return func() error { return Forge(flooder.NS, "eth0", packet.Gateway, count, next) }
	}
	fromOutside := func(next func(i int) packet.Packet) func() error {
		return func() error { return Forge(n.Outside.NS, "node", n.IP.String(), count, next) }
	}
	own := func(i int) netip.AddrPort { return netip.AddrPortFrom(flooder.IP, somePort(i)) }
	other := func(i int) netip.AddrPort { return netip.AddrPortFrom(foreign(i), somePort(i)) }
	random := func(i int) netip.AddrPort { return netip.AddrPortFrom(victim.IP, somePort(i/7)) }
	open := netip.AddrPortFrom(victim.IP, 8080)
	for _, flood := range []struct {
		name string
		make func() error
	}{
		{"datagrams of one socket to random ports", func() error {
			return flooder.Do(func() error { return datagramsTo(netip.AddrPortFrom(victim.IP, 0), count) })
		}},
		{"connections that nobody answers", func() error {
			return flooder.Do(func() error { return unanswered(count) })
		}},
		{"datagrams of a pod to random ports", fromPod(func(i int) packet.Packet { return packet.Datagram(own(i), random(i), "x") })},
		{"SYNs of a pod to random ports", fromPod(func(i int) packet.Packet { return packet.Segment(own(i), random(i), packet.SYN) })},
		{"SYNs of a pod to a service", fromPod(func(i int) packet.Packet {
			return packet.Segment(own(i), netip.AddrPortFrom(vips[0], TCPPort), packet.SYN)
		})},
		{"SYNs of the connections' own pod to their service, by their ports too", func() error {
			return Forge(client.NS, "eth0", packet.Gateway, count, func(i int) packet.Packet {
				return packet.Segment(netip.AddrPortFrom(client.IP, somePort(i)), idleAddress, packet.SYN)
			})
		}},
		{"datagrams of a pod that a service answers", fromPod(func(i int) packet.Packet {
			return packet.Datagram(own(i), netip.AddrPortFrom(vips[0], UDPPort), "x")
		})},
		{"datagrams from outside to random ports", fromOutside(func(i int) packet.Packet { return packet.Datagram(other(i), random(i), "x") })},
		{"SYNs from outside to random ports", fromOutside(func(i int) packet.Packet { return packet.Segment(other(i), random(i), packet.SYN) })},
		{"SYNs from outside to an open port", fromOutside(func(i int) packet.Packet { return packet.Segment(other(i), open, packet.SYN) })},
	} {
		t.Run(flood.name, func(t *testing.T) {
			before := stats(t, n)
			began := time.Now()
			if err := flood.make(); err != nil {
				t.Fatal(err)
			}
			took := time.Since(began)
			after := stats(t, n)
			t.Logf("%d in %.1f s: %d entries made, %d evicted, insertions failed %d, %d in the table", count, took.Seconds(),
				after.Created-before.Created, after.Evicted-before.Evicted, after.InsertFailed-before.InsertFailed, after.Entries)
			if made := after.Created - before.Created; made < uint64(capacity) {
				t.Errorf("the flood of %d made %d entries", count, made)
			}
			broken := idle.Broken()
			for _, err := range broken[:min(len(broken), 5)] {
				t.Error(err)
			}
			if len(broken) > 0 {
				t.Fatalf("%d of %d established connections are broken", len(broken), idle.Len())
			}
		})
	}
}

// waitForService waits until the datapath knows a frontend.
func waitForService(t *testing.T, n *scenario.Node, frontend netip.AddrPort) {
	t.Helper()
	netns.Eventually(t, 20*time.Second, "the service "+frontend.String(), func() bool {
		services, err := n.API().Services(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range services {
			for _, f := range s.Frontends {
				if f.Address == frontend.Addr().String() && f.Port == frontend.Port() {
					return true
				}
			}
		}
		return false
	})
}

// datagramsTo sends datagrams by one socket, to an address' port or, if that is 0,
// to as many ports as there are, of the neighbouring addresses as well.
func datagramsTo(to netip.AddrPort, count int) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for i := range count {
		port, address := to.Port(), to.Addr()
		if port == 0 {
			port = uint16(1024 + i%64000)
			for range i / 64000 {
				address = address.Next()
			}
		}
		if err := unix.Sendto(fd, []byte{1}, 0, sockaddr(address, port)); err != nil && err != unix.ECONNREFUSED {
			return fmt.Errorf("datagram %d to %s: %w", i, address, err)
		}
	}
	return nil
}

// unanswered begins connections to an address that nobody has, and gives them up.
func unanswered(count int) error {
	to := sockaddr(netip.MustParseAddr("203.0.113.77"), 80)
	for i := range count {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		err = unix.Connect(fd, to)
		unix.Close(fd)
		if err != nil && err != unix.EINPROGRESS {
			return fmt.Errorf("connection %d: %w", i, err)
		}
	}
	return nil
}
