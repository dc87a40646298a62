// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

// (The machine's own kernel need not have VLANs: a job of test/kernels runs this in those that do.)

package north

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
	"github.com/mooring-cni/mooring/test/scenario"
)

const (
	vlan   = 7
	noVLAN = 9 // of the node's
)

// trunks are two wires between a client and a node, each with a VLAN on it. Of the first its
// own device and the VLAN's are uplinks, of the other the VLAN's alone.
type trunks struct {
	*scenario.Node
	client *netns.NS
}

type trunk struct {
	name       string
	devices    []string
	client     [2]string
	node       [2]netip.Addr
	clientAddr [2]netip.Addr
}

func newTrunk(name string, net int, devices ...string) (w trunk) {
	w = trunk{name: name, devices: devices, client: [2]string{fmt.Sprintf("198.18.%d.1/24", net), fmt.Sprintf("2001:db8:18%d::1/64", net)}}
	for i, c := range w.client {
		w.clientAddr[i] = netip.MustParsePrefix(c).Addr()
		w.node[i] = w.clientAddr[i].Next()
	}
	return w
}

func (w trunk) vlan() string { return w.name + ".7" }

var wires = []trunk{newTrunk("wan", 1, "wan", "wan.7"), newTrunk("lan", 2, "lan.7")}

// A VLAN's device is an uplink, beside the device that it is on or alone: what is tagged is
// served by it wherever the tag is, and what is no service's is the stack's as it came.
func TestServicesAreReachedByAVLAN(t *testing.T) {
	for _, mode := range []string{"native", "generic"} {
		t.Run("xdp "+mode, func(t *testing.T) { servedByVLANs(t, mode) })
	}
}

func servedByVLANs(t *testing.T, mode string) {
	n := scenario.NewNode(t) // one daemon: in a guest it takes long to start
	l := trunks{n, n.Outside.NS}
	devices := []string{netns.Uplink}
	for _, w := range wires {
		l.add(t, w)
		devices = append(devices, w.devices...)
	}
	n.Flags = []string{"--xdp", mode, "--devices", strings.Join(devices, ",")}
	n.Up()
	near := n.AddPod("near")
	Serve(t, near.NS, "near")
	Serve(t, l.client, "far")
	backends := map[string][2]netip.Addr{"near": {near.IP, near.IP6}, "far": Client}
	manifest := ""
	for i, backend := range []string{"near", "far"} {
		manifest += fmt.Sprintf(`---
apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: default}
spec: {type: NodePort, ipFamilyPolicy: RequireDualStack, clusterIPs: [10.96.0.%[2]d, "fd00:10:96::%[2]d"], ports: [
  {name: tcp, protocol: TCP, port: 80, nodePort: %[3]d, targetPort: %[4]d}, {name: udp, protocol: UDP, port: 53, nodePort: %[5]d, targetPort: %[6]d}]}
`, backend, 10+i, TCPNodePort+i, TCPTarget, UDPNodePort+i, UDPTarget)
		for j, family := range []string{"IPv4", "IPv6"} {
			manifest += fmt.Sprintf(`---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %s-%d, namespace: default, labels: {kubernetes.io/service-name: %[1]s}}
addressType: %[3]s
ports: [{name: tcp, protocol: TCP, port: %[4]d}, {name: udp, protocol: UDP, port: %[5]d}]
endpoints: [{addresses: [%[6]q], conditions: {ready: true}}]
`, backend, j, family, TCPTarget, UDPTarget, backends[backend][j])
		}
	}
	n.Write("services.yaml", manifest)
	s, err := n.API().Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, problem := range s.Problems {
		if mode != "native" || !strings.Contains(problem, "no XDP") {
			t.Errorf("a problem: %s", problem)
		}
	}
	for _, w := range wires {
		for _, dev := range w.devices {
			want := mode
			if mode == "native" && dev == w.vlan() { // which it is not able to
				want = "off"
			}
			if !slices.ContainsFunc(s.XDP, func(x api.XDPStatus) bool { return x.Device == dev && x.Mode == want }) {
				t.Errorf("%s is not %s: %+v", dev, want, s.XDP)
			}
		}
	}
	netns.UDPEcho(t, n.NS, "[::]:2222")
	for _, w := range wires {
		for family, addr := range w.node {
			client := w.clientAddr[family]
			for i, backend := range []string{"near", "far"} {
				for _, f := range []Frontend{
					{"NodePort", "tcp", netip.AddrPortFrom(addr, uint16(TCPNodePort+i))}, {"NodePort", "udp", netip.AddrPortFrom(addr, uint16(UDPNodePort+i))},
				} {
					netns.Eventually(t, soon, f.String()+" answers", func() bool {
						a, err := AskFrom(l.client, client, f, []byte("by the VLAN"))
						return err == nil && a.Pod == backend
					})
					before := driven(t, n)
					report(t, f.String(), connections(), parallel(connections(), func(i int) error {
						_, err := AskFrom(l.client, client, f, Payload(i, 1+(13*i)%1200))
						return err
					}))
					a, err := AskFrom(l.client, client, f, []byte("who asks"))
					if err != nil || backend == "near" && a.Client.Addr() != client {
						t.Errorf("%s: %s sees %s (%v), want %s", f, backend, a.Client, err, client)
					}
					byDriver := mode == "generic" || slices.Contains(w.devices, w.name)
					if did := driven(t, n) - before; backend == "near" && (byDriver && did < uint64(connections()) || !byDriver && did > 0) {
						t.Errorf("%s: the driver's programs did %d packets", f, did)
					}
				}
			}
			l.tagged(t, w, near, client, netip.AddrPortFrom(addr, UDPNodePort))
			l.untouched(t, w, client, netip.AddrPortFrom(addr, 2222))
		}
	}
}

func (l trunks) add(t *testing.T, w trunk) {
	t.Helper()
	netns.Veth(t, l.client, w.name, l.NS, w.name)
	l.client.LikeADriver(t, w.name)
	l.WithoutOffloads(t, w.name)
	for _, ns := range []*netns.NS{l.client, l.NS} {
		dev := &netlink.Vlan{LinkAttrs: netlink.LinkAttrs{Name: w.vlan(), ParentIndex: ns.Link(t, w.name).Attrs().Index}, VlanId: vlan}
		if err := ns.Netlink().LinkAdd(dev); err != nil {
			t.Fatalf("make a VLAN: %v", err)
		}
		if err := ns.Netlink().LinkSetUp(dev); err != nil {
			t.Fatal(err)
		}
	}
	l.client.Addr(t, w.vlan(), w.client[0], w.client[1])
	l.Addr(t, w.vlan(), w.node[0].String()+"/24", w.node[1].String()+"/64")
}

// onTheVLAN is a UDP socket of the client.
func (l trunks) onTheVLAN(t *testing.T, client netip.Addr) (net.PacketConn, netip.AddrPort) {
	t.Helper()
	c, err := l.client.ListenPacket("udp", netip.AddrPortFrom(client, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, netip.MustParseAddrPort(c.LocalAddr().String())
}

// tagged sends datagrams whose tag is in the frame, where the kernel leaves it to the device elsewhere.
func (l trunks) tagged(t *testing.T, w trunk, pod *scenario.Pod, client netip.Addr, to netip.AddrPort) {
	t.Helper()
	inPod := pod.Capture(t, "eth0")
	c, from := l.onTheVLAN(t, client)
	text := "tagged, to " + to.String()
	// Of a VLAN that the node is not in: on one wire it would be there first.
	l.putOnWire(t, w, noVLAN, packet.Datagram(from, to, "not "+text))
	l.putOnWire(t, w, vlan, packet.Datagram(from, to, text))
	receive(t, c, text)
	if got := inPod.Packets(func(p netns.Packet) bool { return bytes.Contains(p.Data, []byte("not "+text)) }); len(got) > 0 {
		t.Errorf("the pod got a datagram of VLAN %d, which the node has no device for", noVLAN)
	}
}

// untouched is what is no service's: of a frame the VLAN's device gets what was sent but the tag.
func (l trunks) untouched(t *testing.T, w trunk, client netip.Addr, to netip.AddrPort) {
	t.Helper()
	arrivals := l.Capture(t, w.vlan())
	c, from := l.onTheVLAN(t, client)
	text := "for the node, to " + to.String()
	p := l.putOnWire(t, w, vlan, packet.Datagram(from, to, text))
	receive(t, c, text)
	p.VLAN = 0
	arrivals.Stop()
	got := arrivals.Packets(func(p netns.Packet) bool { return !p.Outgoing && bytes.Contains(p.Data, []byte(text)) })
	if len(got) != 1 || !bytes.Equal(got[0].Data, p.Bytes()) {
		t.Errorf("the VLAN's device gets %v\nof the frame %x", got, p.Bytes())
	}
}

// putOnWire sends a frame with its tag in it.
func (l trunks) putOnWire(t *testing.T, w trunk, id uint16, p packet.Packet) packet.Packet {
	t.Helper()
	p.VLAN = id
	p.From = packet.MAC(l.client.Link(t, w.name).Attrs().HardwareAddr)
	p.To = packet.MAC(l.Link(t, w.name).Attrs().HardwareAddr)
	err := l.client.Do(func() error {
		s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		proto := binary.NativeEndian.Uint16([]byte{0x81, 0})
		return unix.Sendto(s, p.Bytes(), 0, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: l.client.Link(t, w.name).Attrs().Index})
	})
	if err != nil {
		t.Fatalf("send a tagged frame: %v", err)
	}
	return p
}
