// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/scenario"
)

func init() {
	Register(Set{
		Name: "north-flow",
		Title: "a client beyond the uplink, through a NodePort, to a pod of the node that it asks; client and server on one CPU\n" +
			"  under SCHED_FIFO. \"plain\" asks the pod itself, routed, with nothing attached; nftables is kube-proxy's layout",
		Measure: measureNorthFlows,
	})
}

// The node ports of the servers' ports.
const (
	tcpNodePort = 30080
	udpNodePort = 30081
)

func nodePortOf(kind Kind) uint16 {
	if kind == UDPNewSocket {
		return udpNodePort
	}
	return tcpNodePort
}

func measureNorthFlows(b *B) {
	while := time.Second / 5
	if b.Quick {
		while = time.Second / 20
	}
	clients := []client{
		outsideClient(b, "plain", NewPlain(b), nil),
		outsideClient(b, "nftables", NewPlain(b), nodePorts(true)),
		outsideClient(b, "nftables, externalTrafficPolicy Local", NewPlain(b), nodePorts(false)),
		northClient(b, "mooring, xdp off", "off"),
		outsideClient(b, nftablesOnAWire, onAWire(b, NewPlain(b)), nodePorts(true)),
	}
	for _, xdp := range []string{"native", "generic", "off"} {
		clients = append(clients, northClient(b, "mooring"+wireSuffix+", xdp "+xdp, xdp))
	}
	for _, kind := range Kinds {
		var contestants []Contestant
		for _, c := range clients {
			port := nodePortOf(kind)
			if c.name == "plain" {
				port = map[bool]uint16{true: UDPPort, false: TCPPort}[kind == UDPNewSocket]
			}
			one := Contestant{
				Name: fmt.Sprintf("%s: %s", kind, c.name), Unit: "1/s", Against: fmt.Sprintf("%s: nftables", kind),
				Once: func() float64 { return Rate(b, c.ns, kind, netip.AddrPortFrom(c.to, port), while) },
			}
			if strings.Contains(c.name, wireSuffix) {
				one.Against = fmt.Sprintf("%s: %s", kind, nftablesOnAWire)
			}
			switch {
			case c.name == "plain", c.name == "nftables", c.name == nftablesOnAWire:
				one.Against = ""
			case strings.HasPrefix(c.name, "mooring") && kind == ConnectRequestClose:
				one.Bound = Bound{Ratio: true, Least: 1.2}
			}
			contestants = append(contestants, one)
		}
		b.Compare(contestants...)
	}
}

// Packets as a wire carries them, with whole sums, are what drivers' programs get: compared among each other.
const (
	wireSuffix      = " on a wire"
	nftablesOnAWire = "nftables" + wireSuffix
)

func onAWire(b *B, n *Plain) *Plain {
	n.Outside.Wire(b, n.Node)
	return n
}

// outsideClient is a client beyond a plain node, which asks the pod or, where
// change makes node ports, the node.
func outsideClient(b *B, name string, n *Plain, change func(b *B, n *Plain, server *PlainPod)) client {
	server := n.Pod(b)
	to := server.IP
	n.Outside.Route(b, "10.244.0.0/24", n.IP.String(), "node")
	if change != nil {
		change(b, n, server)
		to = n.IP
	}
	return prepare(b, client{name, n.Outside.NS, to}, server.NS)
}

// nodePorts are what kube-proxy's nftables mode has of NodePorts: a map by
// protocol and port for what is to the node's own addresses, and unless the
// policy is Local, a masquerade of whoever comes from outside.
func nodePorts(masquerade bool) func(b *B, n *Plain, server *PlainPod) {
	return func(b *B, n *Plain, server *PlainPod) {
		n.forgetDatagrams(b)
		NFTables(b, n.NS, 1, []netip.AddrPort{netip.AddrPortFrom(server.IP, TCPPort)})
		var rules strings.Builder
		rules.WriteString("add map ip proxy service-nodeports { type inet_proto . inet_service : verdict; }\n" +
			"add set ip proxy nodeport-ips { type ipv4_addr; }\n")
		fmt.Fprintf(&rules, "add element ip proxy nodeport-ips { %s }\n", n.IP)
		rules.WriteString("add rule ip proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports\n")
		for proto, port := range map[string]int{"tcp": tcpNodePort, "udp": udpNodePort} {
			mark := ""
			if masquerade {
				mark = "jump mark-for-masquerade;"
			}
			fmt.Fprintf(&rules, "add chain ip proxy external-%s { %s goto service-0-%[1]s; }\n", proto, mark)
			fmt.Fprintf(&rules, "add element ip proxy service-nodeports { %s . %d : goto external-%[1]s }\n", proto, port)
		}
		feed(b, n.NS, rules.String(), "nft", "-f", "-")
	}
}

// northClient is a client beyond the uplink of a node with the daemon.
func northClient(b *B, name, xdp string) client {
	n := scenario.NewNode(b)
	n.Flags = []string{"--xdp", xdp}
	if strings.Contains(name, wireSuffix) {
		n.Outside.Wire(b, n.Node)
	}
	n.Write("server.yaml", fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: server, namespace: default}
spec:
  type: NodePort
  clusterIP: %s
  selector: {app: server}
  ports: [{name: tcp, protocol: TCP, port: %d, nodePort: %d}, {name: udp, protocol: UDP, port: %[4]d, nodePort: %[5]d}]
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: default, labels: {app: server}}
`, serviceAddress(0), TCPPort, tcpNodePort, UDPPort, udpNodePort))
	n.Up()
	server := n.AddPod("server")
	c := prepare(b, client{name, n.Outside.NS, n.IP}, server.NS)
	netns.Eventually(b, 30*time.Second, "the node port answers", func() bool {
		conn, err := n.Outside.Dial("tcp", netip.AddrPortFrom(n.IP, tcpNodePort).String())
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return c
}
