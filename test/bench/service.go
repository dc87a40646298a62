// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/scenario"
)

func init() {
	Register(Set{
		Name: "service",
		Title: "two pods of one node, through a ClusterIP and beside it; client and server on one CPU under SCHED_FIFO.\n" +
			"  \"plain\" is kernel routing between such pods with no service, no NAT and nothing attached",
		Measure: measureServices,
	})
}

// client is one who asks, and where.
type client struct {
	name string
	ns   *netns.NS
	to   netip.Addr
}

func measureServices(b *B) {
	while, many := time.Second/5, 10_000
	if b.Quick {
		while, many = time.Second/20, 100
	}
	plain := NewPlain(b)
	clients := []client{
		plainClient(b, "plain", plain, nil),
		plainClient(b, "veth limit", NewPlain(b), (*Plain).shortcut),
		mooringClient(b, "mooring", 1),
		mooringClient(b, fmt.Sprintf("mooring, %d services of 10 backends", many), many),
		plainClient(b, "nftables", NewPlain(b), proxied(NFTables, 1)),
		plainClient(b, "iptables", NewPlain(b), proxied(IPTables, 1)),
	}
	// What was promised: of plain, and with many services of what it is with one.
	promised := map[Kind]float64{ConnectRequestClose: 1.05, RequestResponse: 1.05, UDPNewSocket: 1.02}
	peers := map[Kind]map[string]string{
		RequestResponse:     {"veth limit": "1.14", "nftables": "0.90", "iptables": "0.83"},
		ConnectRequestClose: {"veth limit": "1.18", "nftables": "0.88", "iptables": "0.84"},
		UDPNewSocket:        {"veth limit": "1.09", "nftables": "0.88", "iptables": "0.85"},
	}
	for _, kind := range Kinds {
		port := uint16(TCPPort)
		if kind == UDPNewSocket {
			port = UDPPort
		}
		var contestants []Contestant
		for _, c := range clients {
			one := Contestant{
				Name: fmt.Sprintf("%s: %s", kind, c.name), Unit: "1/s", Against: fmt.Sprintf("%s: plain", kind), Peer: peers[kind][c.name],
				Once: func() float64 { return Rate(b, c.ns, kind, netip.AddrPortFrom(c.to, port), while) },
			}
			switch {
			case c.name == "plain":
				one.Against = ""
			case c.name == "mooring":
				one.Bound = Bound{Ratio: true, Least: promised[kind]}
			case strings.HasPrefix(c.name, "mooring,"):
				one.Against = fmt.Sprintf("%s: mooring", kind)
				one.Bound = Bound{Ratio: true, Least: 0.97}
			}
			contestants = append(contestants, one)
		}
		b.Compare(contestants...)
	}
}

// prepare lets a client use a port again a second after its connection has
// closed: rounds would otherwise run out of ports.
func prepare(b *B, c client, server *netns.NS) client {
	c.ns.Sysctl(b, "net.ipv4.ip_local_port_range", "1024 65535")
	c.ns.Sysctl(b, "net.ipv4.tcp_tw_reuse", "1")
	Serve(b, server)
	return c
}

// plainClient is a client on a node without Mooring, which change has changed.
// It asks the server itself, or the service that change has made.
func plainClient(b *B, name string, n *Plain, change func(n *Plain, b *B, client, server *PlainPod) (service netip.Addr)) client {
	from, server := n.Pod(b), n.Pod(b)
	to := server.IP
	if change != nil {
		if service := change(n, b, from, server); service.IsValid() {
			to = service
		}
	}
	return prepare(b, client{name, from.NS, to}, server.NS)
}

func proxied(layout Services, count int) func(n *Plain, b *B, from, server *PlainPod) netip.Addr {
	return func(n *Plain, b *B, _, server *PlainPod) netip.Addr {
		n.forgetDatagrams(b)
		layout(b, n.NS, count, []netip.AddrPort{netip.AddrPortFrom(server.IP, TCPPort)})
		return serviceAddress(0)
	}
}

// forgetDatagrams lets nf_conntrack have entries of UDP for a second only: a fast
// machine else fills its table within a few rounds, and what does not fit is dropped.
func (n *Plain) forgetDatagrams(b *B) {
	n.Sysctl(b, "net.netfilter.nf_conntrack_udp_timeout", "1")
	n.Sysctl(b, "net.netfilter.nf_conntrack_udp_timeout_stream", "1")
}

// shortcut hands every packet of one pod to the other, whatever it is: the most
// that a program at a veth can save.
func (n *Plain) shortcut(b *B, from, server *PlainPod) netip.Addr {
	for _, pair := range [][2]*PlainPod{{from, server}, {server, from}} {
		// The packet arrives as it was sent: its MAC must be the other pod's.
		for _, address := range []string{gateway, gateway6} {
			neighbour(b, pair[0].NS, "eth0", address, pair[1].Link(b, "eth0"))
		}
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "shortcut", Type: ebpf.SchedCLS, License: "Dual BSD/GPL", Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R1, int32(n.Link(b, pair[1].Host).Attrs().Index)),
			asm.Mov.Imm(asm.R2, 0),
			asm.FnRedirectPeer.Call(),
			asm.Return(),
		}})
		if err != nil {
			b.Fatalf("load the shortcut: %v", err)
		}
		b.Cleanup(func() { p.Close() })
		n.attach(b, p, pair[0])
	}
	return netip.Addr{}
}

// attach attaches a program to what a pod sends.
func (n *Plain) attach(b *B, p *ebpf.Program, from *PlainPod) {
	var attached link.Link
	err := n.Do(func() (err error) {
		attached, err = link.AttachTCX(link.TCXOptions{Interface: n.Link(b, from.Host).Attrs().Index, Program: p, Attach: ebpf.AttachTCXIngress})
		return err
	})
	if err != nil {
		b.Fatalf("attach %s: %v", p, err)
	}
	b.Cleanup(func() { attached.Close() })
}

// mooringClient is a client on a node with the daemon, pods by the plugin, and
// services: the first one's only backend is the server, the others have 10.
func mooringClient(b *B, name string, count int) client {
	c, _ := mooringNode(b, name, count)
	return c
}

// mooringNode is mooringClient, and where the programs are pinned.
func mooringNode(b *B, name string, count int) (c client, bpffs string) {
	n := scenario.NewNode(b)
	n.Write("server.yaml", fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: server, namespace: default}
spec:
  clusterIP: %s
  selector: {app: server}
  ports: [{name: tcp, protocol: TCP, port: %d}, {name: udp, protocol: UDP, port: %[3]d}]
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: default, labels: {app: server}}
`, serviceAddress(0), TCPPort, UDPPort))
	if count > 1 {
		n.Write("many.yaml", ManyServices(count-1, 10))
	}
	n.Up()
	from, server := n.AddPod("client"), n.AddPod("server")
	prepared := prepare(b, client{name, from.NS, serviceAddress(0)}, server.NS)
	netns.Eventually(b, 30*time.Second, "the service answers", func() bool {
		conn, err := from.Dial("tcp", netip.AddrPortFrom(serviceAddress(0), TCPPort).String())
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return prepared, n.BPFFS
}

// ManyServices are manifests of services with backends that nothing answers at,
// and whose addresses follow those of the first.
func ManyServices(count, backends int) string {
	var b strings.Builder
	for i := 1; i <= count; i++ {
		fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Service\nmetadata: {name: many-%d, namespace: default}\nspec: {clusterIP: %s, ports: [{port: 80}]}\n", i, serviceAddress(i))
		fmt.Fprintf(&b, "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: many-%d, namespace: default, labels: {kubernetes.io/service-name: many-%[1]d}}\naddressType: IPv4\nports: [{port: 8080}]\nendpoints:\n", i)
		for j := range backends {
			n := i*backends + j
			fmt.Fprintf(&b, "- addresses: [10.%d.%d.%d]\n", 128+n>>16, n>>8&0xff, n&0xff)
		}
	}
	return b.String()
}
