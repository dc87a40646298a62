// SPDX-License-Identifier: Apache-2.0

// Package north proves that services are reached from outside: a client beyond
// the uplinks of two nodes, each with a daemon of its own, asks node ports,
// external addresses, those of a load balancer and ClusterIPs that are routed to
// a node.
//
//	client ──(router)── uplink of node-a ── pods a-1, a-2
//	              └──── uplink of node-b ── pods b-1, b-2
//
// lab.go makes all that; what is asserted is in the tests, most of it in every
// mode of Modes, in one lab each: TestServicesFromOutside.
package north

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/scenario"
)

// Mode is how a node handles what comes from outside.
type Mode struct {
	XDP      string // xdp
	NodePort string // nodePort.mode
}

func (m Mode) String() string { return "xdp " + m.XDP + ", " + m.NodePort }

// Modes are all that there are.
var Modes = []Mode{{"native", "snat"}, {"native", "dsr"}, {"generic", "snat"}, {"generic", "dsr"}, {"off", "snat"}, {"off", "dsr"}}

// The addresses of the service in either family.
var (
	ClusterIPs = [2]netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:10:96::10")}
	External   = [2]netip.Addr{netip.MustParseAddr("198.51.100.10"), netip.MustParseAddr("2001:db8:100::10")}
	Balancer   = [2]netip.Addr{netip.MustParseAddr("198.51.100.20"), netip.MustParseAddr("2001:db8:100::20")}
	// Client is where the client is: not on the nodes' link.
	Client = [2]netip.Addr{netip.MustParseAddr(netns.Remote), netip.MustParseAddr(netns.Remote6)}
)

// The ports of the service and of its pods.
const (
	TCPPort, UDPPort         = 80, 53
	TCPNodePort, UDPNodePort = 30080, 30053
	TCPTarget, UDPTarget     = 8080, 5353
)

// Lab is a client and two nodes.
type Lab struct {
	T      netns.T
	Client *netns.NS
	A, B   *scenario.Node
	Mode   Mode

	wire string // the client's interface to the nodes
}

// New makes the nodes and starts their daemons, without pods and services. What
// is for the service's addresses is routed to node-a.
func New(t netns.T, mode Mode, flags ...string) *Lab {
	t.Helper()
	nodes := scenario.NewNodes(t, 2)
	l := &Lab{T: t, Client: nodes[0].Outside.NS, A: nodes[0], B: nodes[1], Mode: mode, wire: "nodes"}
	l.RouteTo(l.A)
	for _, n := range nodes {
		if mode.XDP != "off" {
			nodes[0].Outside.Wire(t, n.Node)
		}
		n.Flags = append([]string{"--xdp", mode.XDP, "--node-port-mode", mode.NodePort}, flags...)
		n.Up()
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("%s dropped:\n%s", n.NodeName, n.Drops())
			}
		})
	}
	return l
}

// flush has both nodes forget every flow.
func (l *Lab) flush() {
	l.T.Helper()
	for _, n := range l.Nodes() {
		if _, err := n.API().FlushConntrack(context.Background()); err != nil {
			l.T.Fatalf("flush %s: %v", n.NodeName, err)
		}
	}
}

// RouteTo has the router send what is for the service's addresses to a node.
func (l *Lab) RouteTo(n *scenario.Node) {
	l.T.Helper()
	for _, prefix := range []string{"198.51.100.0/24", "10.96.0.0/16"} {
		l.Client.Route(l.T, prefix, n.IP.String(), l.wire)
	}
	for _, prefix := range []string{"2001:db8:100::/64", "fd00:10:96::/112"} {
		l.Client.Route(l.T, prefix, n.IP6.String(), l.wire)
	}
}

// Pods makes pods that serve, by name: a-1 is node-a's.
func (l *Lab) Pods(names ...string) (pods []*scenario.Pod) {
	l.T.Helper()
	for _, name := range names {
		p := l.NodeOf(name).AddPod(name)
		Serve(l.T, p.NS, name)
		pods = append(pods, p)
	}
	return pods
}

// NodeOf is the node that a pod's name says.
func (l *Lab) NodeOf(pod string) *scenario.Node {
	if strings.HasPrefix(pod, "a-") {
		return l.A
	}
	return l.B
}

// Pod is a pod by its name. Those of the node's own network (hostNetwork) are the
// node itself: a-host.
func (l *Lab) Pod(name string) *scenario.Pod {
	n := l.NodeOf(name)
	if strings.HasSuffix(name, "-host") {
		return &scenario.Pod{NS: n.NS, IP: n.IP, IP6: n.IP6}
	}
	return n.Pod(name)
}

// Nodes are both.
func (l *Lab) Nodes() []*scenario.Node { return []*scenario.Node{l.A, l.B} }

// Spec is what of the service differs from test to test.
type Spec struct {
	Fields string   // of its spec, as YAML in braces: "sessionAffinity: ClientIP, "
	Pods   []string // that serve it
	// Conditions are those of some of the pods: "ready: false".
	Conditions map[string]string
}

// Hosts makes servers in the network of the nodes themselves, for each of both.
func (l *Lab) Hosts() {
	l.T.Helper()
	for _, name := range []string{"a-host", "b-host"} {
		Serve(l.T, l.NodeOf(name).NS, name)
	}
}

// Service makes the service and its endpoints what is specified.
func (l *Lab) Service(s Spec) {
	l.T.Helper()
	manifest := fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {type: LoadBalancer, ipFamilyPolicy: RequireDualStack, clusterIPs: [%q, %q], externalIPs: [%q, %q], %s
  ports: [
    {name: tcp, protocol: TCP, port: %d, nodePort: %d, targetPort: %d},
    {name: udp, protocol: UDP, port: %d, nodePort: %d, targetPort: %d}]}
status: {loadBalancer: {ingress: [{ip: %q}, {ip: %q}]}}
`, ClusterIPs[0], ClusterIPs[1], External[0], External[1], s.Fields,
		TCPPort, TCPNodePort, TCPTarget, UDPPort, UDPNodePort, UDPTarget, Balancer[0], Balancer[1])
	for i, family := range []string{"IPv4", "IPv6"} {
		manifest += fmt.Sprintf(`---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-%s, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: %s
ports: [{name: tcp, protocol: TCP, port: %d}, {name: udp, protocol: UDP, port: %d}]
endpoints:
`, strings.ToLower(family), family, TCPTarget, UDPTarget)
		for _, name := range s.Pods {
			p := l.Pod(name)
			manifest += fmt.Sprintf("- {addresses: [%q], nodeName: %s, conditions: {%s}}\n",
				[2]netip.Addr{p.IP, p.IP6}[i], l.NodeOf(name).NodeName, s.Conditions[name])
		}
		if len(s.Pods) == 0 {
			manifest = strings.TrimSuffix(manifest, "endpoints:\n") + "endpoints: []\n"
		}
	}
	l.Apply("web.yaml", manifest)
}

// Apply writes a manifest on both nodes and waits until both have it.
func (l *Lab) Apply(file, manifest string) {
	l.T.Helper()
	// A file is one change: when this service is there, all of it is.
	number := markers.Add(1)
	marker := fmt.Sprintf("marker-%d", number)
	manifest += fmt.Sprintf("---\napiVersion: v1\nkind: Service\nmetadata: {name: %s, namespace: default}\nspec: {clusterIP: 10.96.%d.%d, ports: [{port: 1}]}\n",
		marker, 128+number/256%128, number%256)
	for _, n := range l.Nodes() {
		n.Write(file, manifest)
	}
	for _, n := range l.Nodes() {
		netns.Eventually(l.T, 20*time.Second, n.NodeName+" has "+file, func() bool {
			services, err := n.API().Services(context.Background())
			return err == nil && slices.ContainsFunc(services, func(s api.Service) bool { return s.Name == marker })
		})
	}
}

var markers atomic.Uint32

// Frontend is one of the service's addresses.
type Frontend struct {
	Kind    string
	Network string // "tcp" or "udp"
	Address netip.AddrPort
}

func (f Frontend) String() string { return f.Kind + " " + f.Network + " " + f.Address.String() }

// V6 says whether it is of IPv6.
func (f Frontend) V6() bool { return f.Address.Addr().Is6() }

// Frontends are all of the service's as node-a has them: every kind, protocol
// and family.
func (l *Lab) Frontends() (all []Frontend) {
	for i := range 2 {
		node := [2]netip.Addr{l.A.IP, l.A.IP6}[i]
		for _, f := range []struct {
			kind     string
			addr     netip.Addr
			tcp, udp uint16
		}{
			{"NodePort", node, TCPNodePort, UDPNodePort},
			{"ExternalIP", External[i], TCPPort, UDPPort},
			{"LoadBalancer", Balancer[i], TCPPort, UDPPort},
			{"ClusterIP", ClusterIPs[i], TCPPort, UDPPort},
		} {
			all = append(all, Frontend{f.kind, "tcp", netip.AddrPortFrom(f.addr, f.tcp)}, Frontend{f.kind, "udp", netip.AddrPortFrom(f.addr, f.udp)})
		}
	}
	return all
}

// Serve answers in a pod, by TCP and UDP: first a line that names the pod and its
// client, then what the client sent.
func Serve(t netns.T, pod *netns.NS, name string) {
	t.Helper()
	netns.TCP(t, pod, fmt.Sprintf("[::]:%d", TCPTarget), func(c net.Conn) {
		if _, err := fmt.Fprintln(c, name, c.RemoteAddr()); err == nil {
			io.Copy(c, c)
		}
	})
	netns.UDP(t, pod, fmt.Sprintf("[::]:%d", UDPTarget), func(request []byte, from net.Addr) []byte {
		return append(fmt.Appendln(nil, name, from), request...)
	})
}

// Answer is who answered, and whom it saw.
type Answer struct {
	Pod    string
	Client netip.AddrPort
}

// Patience is how long a client waits for an answer that has to come: a lost SYN
// is sent again after 1 s.
const Patience = 15 * time.Second

// Dial connects from one of a namespace's addresses; of none where it is invalid.
func Dial(ns *netns.NS, from netip.Addr, f Frontend, limit time.Duration) (c net.Conn, err error) {
	d := net.Dialer{Timeout: limit}
	if from.IsValid() {
		if f.Network == "udp" {
			d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		} else {
			d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		}
	}
	err = ns.Do(func() error {
		c, err = d.Dial(f.Network, f.Address.String())
		return err
	})
	return c, err
}

// Dial connects from the client.
func (l *Lab) Dial(f Frontend) (net.Conn, error) { return Dial(l.Client, l.ClientFor(f), f, Patience) }

// ClientFor is the client's address of a frontend's family.
func (l *Lab) ClientFor(f Frontend) netip.Addr {
	if f.V6() {
		return Client[1]
	}
	return Client[0]
}

// Ask sends a payload by a new socket of the client and reads who answers; that
// the payload comes back is checked.
func (l *Lab) Ask(f Frontend, payload []byte) (Answer, error) {
	return AskFrom(l.Client, l.ClientFor(f), f, payload)
}

// AskFrom is Ask from any namespace.
func AskFrom(ns *netns.NS, from netip.Addr, f Frontend, payload []byte) (a Answer, err error) {
	c, err := Dial(ns, from, f, Patience)
	if err != nil {
		return a, err
	}
	defer c.Close()
	return AskOn(c, payload, Patience)
}

// AskOn is Ask on a new connection.
func AskOn(c net.Conn, payload []byte, limit time.Duration) (a Answer, err error) {
	c.SetDeadline(time.Now().Add(limit))
	defer c.SetDeadline(time.Time{})
	sent := make(chan error, 1)
	go func() { // an echo of more than the buffers hold would wait for itself
		_, err := c.Write(payload)
		sent <- err
	}()
	var line, echo []byte
	if c.LocalAddr().Network() == "udp" {
		buffer := make([]byte, 1<<16)
		n, err := c.Read(buffer)
		if err != nil {
			return a, errors.Join(<-sent, err)
		}
		line, echo, _ = bytes.Cut(buffer[:n], []byte("\n"))
	} else {
		r := bufio.NewReader(c)
		if line, err = r.ReadBytes('\n'); err == nil {
			echo = make([]byte, len(payload))
			_, err = io.ReadFull(r, echo)
		}
		if err = errors.Join(<-sent, err); err != nil {
			return a, err
		}
	}
	words := strings.Fields(string(line))
	if len(words) != 2 {
		return a, fmt.Errorf("%s answers %q", c.RemoteAddr(), line)
	}
	a.Pod = words[0]
	if a.Client, err = netip.ParseAddrPort(words[1]); err != nil {
		return a, err
	}
	a.Client = netip.AddrPortFrom(a.Client.Addr().Unmap(), a.Client.Port())
	if !bytes.Equal(echo, payload) {
		return a, fmt.Errorf("%s: sent %d bytes %x..., got %d bytes %x...", c.RemoteAddr(), len(payload), head(payload), len(echo), head(echo))
	}
	return a, nil
}

func head(b []byte) []byte { return b[:min(len(b), 16)] }

// Payload is the i-th of many that differ.
func Payload(i, size int) []byte {
	b := make([]byte, size)
	for at := 0; at < size; at += 8 {
		var word [8]byte
		binary.BigEndian.PutUint64(word[:], uint64(i)<<32^uint64(at)*0x9e3779b97f4a7c15)
		copy(b[at:], word[:])
	}
	return b
}
