// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/scenario"
)

func init() {
	Register(Set{
		Name: "north-reply",
		Title: "a pod, through a ClusterIP, to a backend beyond the uplink; client and server on one CPU under SCHED_FIFO. The answers are\n" +
			"  delivered at the uplink, by tc or XDP, or left to the stack, which routes them to the pod's interface, where they are translated",
		Measure: measureNorthReplies,
	})
}

func measureNorthReplies(b *B) {
	while := time.Second / 2
	if b.Quick {
		while = time.Second / 20
	}
	const routed, routedWire = "routed by the stack", "routed by the stack" + wireSuffix
	plain := NewPlain(b)
	pod := plain.Pod(b)
	plain.Outside.Route(b, plain.PodCIDRs[0].String(), plain.IP.String(), "node")
	clients := []client{
		prepare(b, client{"plain, no service", pod.NS, netip.MustParseAddr(netns.Router)}, plain.Outside.NS),
		replyClient(b, routed, "off", false, true),
		replyClient(b, "by tc at the uplink", "off", false, false),
		replyClient(b, routedWire, "off", true, true),
		replyClient(b, "by tc at the uplink"+wireSuffix, "off", true, false),
		replyClient(b, "by XDP, generic"+wireSuffix, "generic", true, false),
		replyClient(b, "by XDP, native"+wireSuffix, "native", true, false),
	}
	for _, kind := range Kinds {
		port := map[bool]uint16{true: UDPPort, false: TCPPort}[kind == UDPNewSocket]
		var contestants []Contestant
		against := ""
		for _, c := range clients {
			name := fmt.Sprintf("%s: %s", kind, c.name)
			if c.name == routed || c.name == routedWire {
				against = ""
			}
			contestants = append(contestants, Contestant{Name: name, Unit: "1/s", Against: against,
				Once: func() float64 { return Rate(b, c.ns, kind, netip.AddrPortFrom(c.to, port), while) }})
			if c.name == routed || c.name == routedWire {
				against = name
			}
		}
		b.Compare(contestants...)
	}
}

// replyClient is a pod of a node with the daemon, whose service has its backend beyond
// the uplink. Where answers are routed, the daemon is told of another uplink only.
func replyClient(b *B, name, xdp string, wire, routed bool) client {
	n := scenario.NewNode(b)
	n.Flags = []string{"--xdp", xdp, "--masquerade=false"}
	if wire {
		n.Outside.Wire(b, n.Node)
	}
	if routed {
		netns.Veth(b, n.Outside.NS, "other", n.NS, "other")
		n.Flags = append(n.Flags, "--devices", "other")
	}
	n.Outside.Route(b, n.PodCIDRs[0].String(), n.IP.String(), "node")
	n.Write("server.yaml", fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: server, namespace: default}
spec:
  clusterIP: %s
  ports: [{name: tcp, protocol: TCP, port: %d}, {name: udp, protocol: UDP, port: %d}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: server, namespace: default, labels: {kubernetes.io/service-name: server}}
addressType: IPv4
ports: [{name: tcp, protocol: TCP, port: %[2]d}, {name: udp, protocol: UDP, port: %[3]d}]
endpoints: [{addresses: [%[4]q], conditions: {ready: true}}]
`, serviceAddress(0), TCPPort, UDPPort, netns.Router))
	n.Up()
	from := n.AddPod("client")
	c := prepare(b, client{name, from.NS, serviceAddress(0)}, n.Outside.NS)
	netns.Eventually(b, 30*time.Second, "the service answers", func() bool {
		conn, err := from.Dial("tcp", netip.AddrPortFrom(serviceAddress(0), TCPPort).String())
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return c
}
