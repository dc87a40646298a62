// SPDX-License-Identifier: Apache-2.0

//go:build root

package cnitool

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/test/netns"
)

// What the limited pod gets and sends: 1 MB/s, after a burst of 100 kB. Without
// a limit a pair of veths carries more than a hundred times that.
const (
	limited = `{"bandwidth": {"IngressRate": 8000000, "IngressBurst": 800000, "EgressRate": 8000000, "EgressBurst": 800000}}`
	rate    = 1_000_000
	burst   = 100_000
)

const twoServices = `
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  type: NodePort
  selector: {app: web}
  ipFamilyPolicy: RequireDualStack
  ipFamilies: [IPv4, IPv6]
  clusterIPs: [10.96.0.10, "fd00:10:96::10"]
  ports:
  - {name: bulk, port: 81, targetPort: 8081, nodePort: 30081}
  - {name: sink, port: 82, targetPort: 8082, nodePort: 30082}
---
apiVersion: v1
kind: Service
metadata: {name: client, namespace: default}
spec:
  selector: {app: client}
  ipFamilyPolicy: RequireDualStack
  ipFamilies: [IPv4, IPv6]
  clusterIPs: [10.96.0.11, "fd00:10:96::11"]
  ports: [{name: bulk, port: 81, targetPort: 8081}]
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: default, labels: {app: web}}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: default, labels: {app: client}}
`

// bulk sends as much as is taken, until the client is gone.
func bulk(t *testing.T, ns *netns.NS) {
	t.Helper()
	netns.TCP(t, ns, "[::]:8081", func(c net.Conn) {
		block := make([]byte, 64<<10)
		for {
			if _, err := c.Write(block); err != nil {
				return
			}
		}
	})
}

// flow takes from the server at an address for a while: how much came, and how
// long that was.
func flow(t *testing.T, client *netns.NS, address netip.AddrPort) (received int64, took time.Duration) {
	t.Helper()
	conn, err := client.Dial("tcp", address.String())
	if err != nil {
		t.Error(err)
		return 0, 0
	}
	defer conn.Close()
	began := time.Now()
	conn.SetDeadline(began.Add(time.Second))
	received, _ = io.Copy(io.Discard, conn)
	return received, time.Since(began)
}

// holds tells whether so much in so long is within the limit, generously: the
// burst, and what a qdisc's queue and the sockets' buffers have, are on top.
func holds(received int64, took time.Duration) bool {
	return received < 3*int64(rate*took.Seconds())+10*burst
}

func limitedFlow(t *testing.T, what string, client *netns.NS, address netip.AddrPort) {
	t.Helper()
	received, took := flow(t, client, address)
	t.Logf("%s: %d bytes in %v", what, received, took.Round(time.Millisecond))
	if received == 0 {
		t.Errorf("%s: nothing came", what)
	}
	if !holds(received, took) {
		t.Errorf("%s: %d bytes came in %v, as if there were no limit", what, received, took)
	}
}

func freeFlow(t *testing.T, what string, client *netns.NS, address netip.AddrPort) {
	t.Helper()
	received, took := flow(t, client, address)
	t.Logf("%s: %d bytes in %v", what, received, took.Round(time.Millisecond))
	if holds(received, took) {
		t.Errorf("%s: %d bytes came in %v, as if there were a limit", what, received, took)
	}
}

// limits waits until the daemon has seen the pod's qdiscs, or that they are gone.
func (n *node) limits(t *testing.T, p *pod, want bool) {
	t.Helper()
	device := "lim" + strings.TrimPrefix(p.result.Interfaces[0].Name, "lxc")
	netns.Eventually(t, 10*time.Second, fmt.Sprintf("%s has its limit: %v", p.name, want), func() bool { return n.HasLink(device) == want })
	client := api.NewClient(n.Socket)
	defer client.Close()
	if s, err := client.Status(t.Context()); err != nil || !s.Healthy {
		t.Errorf("status %+v, %v", s, err)
	}
}

func TestBandwidthLimitsWhatPodsOfOneNodeSendEachOther(t *testing.T) {
	n := newNode(t)
	n.write("manifests/web.yaml", twoServices)
	n.configure("1.0.0", "", portmap, bandwidth)
	web, client, other := n.pod(t, "web"), n.pod(t, "client"), n.pod(t, "other")
	web.capabilities, other.capabilities = limited, limited
	for _, p := range []*pod{web, client, other} {
		p.do(t, "add", "check")
		bulk(t, p.NS)
	}
	n.limits(t, web, true)
	n.limits(t, other, true)
	at := func(address string, port uint16) netip.AddrPort {
		return netip.AddrPortFrom(netip.MustParseAddr(address), port)
	}
	both := func(t *testing.T) {
		t.Helper()
		for i, family := range []string{"IPv4", "IPv6"} {
			limitedFlow(t, family+" from the limited pod", client.NS, netip.AddrPortFrom(web.ips()[i], 8081))
			limitedFlow(t, family+" to the limited pod", web.NS, netip.AddrPortFrom(client.ips()[i], 8081))
			limitedFlow(t, family+" from the limited pod by its service", client.NS, at([]string{"10.96.0.10", "fd00:10:96::10"}[i], 81))
			limitedFlow(t, family+" to the limited pod from a service", web.NS, at([]string{"10.96.0.11", "fd00:10:96::11"}[i], 81))
		}
	}
	for _, ip := range []string{"10.96.0.10", "10.96.0.11", "fd00:10:96::10", "fd00:10:96::11"} {
		netns.Eventually(t, 5*time.Second, "the service answers on "+ip, func() bool {
			conn, err := client.Dial("tcp", at(ip, 81).String())
			if err == nil {
				conn.Close()
			}
			return err == nil
		})
	}
	both(t)
	for i, family := range []string{"IPv4", "IPv6"} {
		limitedFlow(t, family+" between two limited pods", other.NS, netip.AddrPortFrom(web.ips()[i], 8081))
		limitedFlow(t, family+" from the limited pod to itself by its service", web.NS, at([]string{"10.96.0.10", "fd00:10:96::10"}[i], 81))
	}

	t.Run("an answer that passes the qdisc under a service's name begins no connection", func(t *testing.T) {
		socket := api.NewClient(n.Socket)
		defer socket.Close()
		seen := 0
		for c, err := range socket.Connections(t.Context(), api.Filter{}) {
			if err != nil {
				t.Fatal(err)
			}
			seen++
			if strings.HasPrefix(c.Source, "10.96.") || strings.HasPrefix(c.Source, "[fd00:10:96::") {
				t.Errorf("a service begins a connection: %+v", c)
			}
		}
		if seen == 0 {
			t.Error("there are no connections")
		}
	})

	t.Run("a flow that is on its way when the limit comes and goes", func(t *testing.T) {
		host := web.result.Interfaces[0].Name
		n.Sh(t, "tc qdisc del dev "+host+" root; tc qdisc del dev "+host+" ingress")
		n.limits(t, web, false)
		freeFlow(t, "from the pod without its limit", client.NS, netip.AddrPortFrom(web.ips()[0], 8081))
		freeFlow(t, "to the pod without its limit", web.NS, netip.AddrPortFrom(client.ips()[0], 8081))
		conn, err := web.Dial("tcp", netip.AddrPortFrom(client.ips()[0], 8081).String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.ReadFull(conn, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		n.Sh(t, "tc qdisc add dev "+host+" root tbf rate 8mbit burst 100kb latency 25ms")
		var received int64
		var took time.Duration
		// What the sockets have in their buffers comes first.
		netns.Eventually(t, 20*time.Second, "the flow is limited", func() bool {
			began := time.Now()
			conn.SetDeadline(began.Add(time.Second))
			received, _ = io.Copy(io.Discard, conn)
			took = time.Since(began)
			return received > 0 && holds(received, took)
		})
		t.Logf("%d bytes in %v", received, took)
	})
	web.do(t, "del", "add") // and there again with what the runtime wants
	n.limits(t, web, true)

	t.Run("a restart of the daemon", func(t *testing.T) {
		if err := n.daemon.Stop(); err != nil {
			t.Fatal(err)
		}
		limitedFlow(t, "from the limited pod while there is no daemon", client.NS, netip.AddrPortFrom(web.ips()[0], 8081))
		limitedFlow(t, "to the limited pod while there is no daemon", web.NS, netip.AddrPortFrom(client.ips()[1], 8081))
		n.up(n.t)
		both(t)
	})

	t.Run("the device that the limit needs cannot be made", func(t *testing.T) {
		socket := api.NewClient(n.Socket)
		defer socket.Close()
		said := func() bool {
			s, err := socket.Status(t.Context())
			return err == nil && !s.Healthy && slices.ContainsFunc(s.Problems, func(p string) bool { return strings.Contains(p, "is not limited") })
		}
		device := "lim" + strings.TrimPrefix(other.result.Interfaces[0].Name, "lxc")
		other.do(t, "del")
		n.Sh(t, "ip link add "+device+" type bridge")
		other.do(t, "add")
		netns.Eventually(t, 10*time.Second, "status says that the pod is not limited", said)
		freeFlow(t, "from the pod whose limit does not hold", client.NS, netip.AddrPortFrom(other.ips()[0], 8081))
		limitedFlow(t, "to the pod, whose other limit does", other.NS, netip.AddrPortFrom(client.ips()[1], 8081))
		n.Sh(t, "ip link del "+device)
		netns.Eventually(t, 20*time.Second, "the limit holds", func() bool { return !said() })
		limitedFlow(t, "from the pod whose limit holds now", client.NS, netip.AddrPortFrom(other.ips()[0], 8081))
	})
	for _, p := range []*pod{web, client, other} {
		p.do(t, "del")
	}
	n.left(t)
}

// In at the uplink, by tc and by the driver, and out there under a service's name.
func TestBandwidthLimitsWhatPodsSendTheOutside(t *testing.T) {
	for _, xdp := range []string{"off", "generic"} {
		t.Run("xdp "+xdp, func(t *testing.T) {
			n := newNode(t, "--xdp", xdp)
			n.Outside.Wire(t, n.Node)
			n.write("manifests/web.yaml", twoServices)
			n.configure("1.0.0", "", bandwidth)
			web := n.pod(t, "web")
			web.capabilities = limited
			web.do(t, "add")
			n.limits(t, web, true)
			bulk(t, web.NS)
			sunk := make(chan int64, 1)
			netns.TCP(t, web.NS, "[::]:8082", func(c net.Conn) {
				c.SetReadDeadline(time.Now().Add(time.Second))
				received, _ := io.Copy(io.Discard, c)
				sunk <- received
			})
			for _, ip := range []netip.Addr{n.IP, n.IP6} {
				netns.Eventually(t, 5*time.Second, "the node port answers on "+ip.String(), func() bool {
					conn, err := n.Outside.Dial("tcp", netip.AddrPortFrom(ip, 30081).String())
					if err == nil {
						conn.Close()
					}
					return err == nil
				})
				limitedFlow(t, "from the limited pod", n.Outside.NS, netip.AddrPortFrom(ip, 30081))

				conn, err := n.Outside.Dial("tcp", netip.AddrPortFrom(ip, 30082).String())
				if err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				block := make([]byte, 64<<10)
				for err == nil {
					_, err = conn.Write(block) // until the server closes
				}
				conn.Close()
				received, took := <-sunk, time.Since(began)
				t.Logf("to the limited pod at %s: %d bytes in %v", ip, received, took)
				if received == 0 || !holds(received, took) {
					t.Errorf("to the limited pod at %s: %d bytes came in %v, as if there were no limit", ip, received, took)
				}
			}
			web.do(t, "del")
			n.left(t)
		})
	}
}
