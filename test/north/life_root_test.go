// SPDX-License-Identifier: Apache-2.0

//go:build root

package north

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/test/fate"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
	"github.com/mooring-cni/mooring/test/scenario"
)

func entries(t *testing.T, n *scenario.Node) (rows []api.Connection) {
	t.Helper()
	for c, err := range n.API().Connections(context.Background(), api.Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		rows = append(rows, c)
	}
	return rows
}

// An end of which the kernel tells no program, as it does once in a thousand where it has no
// trampolines, is found by the first or second roll call of sockets after it (docs/conntrack.md).
const unheard = 150 * time.Second

// Flows from outside to a pod of the node, or to the node itself, end with the backend's socket.
var ends = group{name: "entries end with the backend's socket", tests: []modeTest{
	{"of a pod", func(t *testing.T, l *Lab) { l.entriesEnd(t, "a-1") }},
	{"of the node's own network", func(t *testing.T, l *Lab) { l.Hosts(); l.entriesEnd(t, "a-host") }},
}}

func (l *Lab) entriesEnd(t *testing.T, backend string) {
	const flows, missed = 100, 1
	l.Service(Spec{Pods: []string{backend}})
	l.flush()
	f := Frontend{"NodePort", "tcp", netip.AddrPortFrom(l.A.IP, TCPNodePort)}
	var open []net.Conn
	for i := range flows {
		c, err := l.Dial(f)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := AskOn(c, Payload(i, 100), Patience); err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	defer func() {
		if t.Failed() {
			stats, err := l.A.API().ConntrackStats(context.Background())
			t.Logf("%+v (%v)", stats, err)
			for _, c := range entries(t, l.A) {
				t.Logf("%+v", c)
			}
		}
	}()
	mine := func(state func(api.Connection) bool) (count int) {
		for _, c := range entries(t, l.A) {
			if strings.HasPrefix(c.Source, Client[0].String()+":") && state(c) {
				count++
			}
		}
		return count
	}
	if got := mine(func(c api.Connection) bool {
		return c.Type == "INGRESS" && c.Tethered && c.Translation == f.Address.String()
	}); got != flows {
		t.Errorf("%d of %d flows have an INGRESS entry that lives with the socket of %s", got, flows, backend)
	}
	for _, c := range open[:flows/2] {
		c.Close()
	}
	ingress := func() int { return mine(func(c api.Connection) bool { return c.Type == "INGRESS" }) }
	netns.Eventually(t, 20*time.Second, "the entries of the flows that have ended go", func() bool { return ingress() <= flows/2+missed })
	netns.Eventually(t, unheard, "the last of them go", func() bool { return ingress() == flows/2 })
	// Those of the others stay, whoever is asked whether their sockets live.
	for i, c := range open[flows/2:] {
		if err := echoOn(c, Payload(i, 100)); err != nil {
			t.Errorf("a connection that stays: %v", err)
		}
		c.Close()
	}
	// The client closed first: the pod's socket is gone with its last ACK, and nothing waits.
	all := func() int { return mine(func(api.Connection) bool { return true }) }
	netns.Eventually(t, 20*time.Second, "the entries of all flows end", func() bool { return all() <= 2*missed }) // INGRESS and SVC
	netns.Eventually(t, unheard, "the last of all end", func() bool { return all() == 0 })
}

// load is traffic through frontends that has to survive: of each, a connection
// that stays, a UDP socket that stays, and new ones one after the other.
type load struct {
	t         *testing.T
	stop      chan struct{}
	wait      sync.WaitGroup
	exchanges atomic.Int64
}

func startLoad(t *testing.T, l *Lab) *load {
	t.Helper()
	o := &load{t: t, stop: make(chan struct{})}
	for at, f := range l.Frontends() {
		c, err := l.Dial(f)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if f.Network == "tcp" {
			if _, err := AskOn(c, []byte("hello"), Patience); err != nil {
				t.Fatal(err)
			}
			o.run(f, func(i int) error { return echoOn(c, Payload(i, 4000)) })
		} else {
			o.run(f, func(i int) error { _, err := AskOn(c, Payload(i, 400), Patience); return err })
			// Each frontend's flows are from ports of their own.
			o.run(f, func(i int) error {
				_, err := l.askFromPort(f, uint16(10000+1000*at+i%1000), Payload(i, 400))
				return err
			})
			continue
		}
		o.run(f, func(i int) error { _, err := l.check(f, Payload(i, 400)); return err })
	}
	return o
}

// echoOn is AskOn on a connection whose server has said who it is.
func echoOn(c net.Conn, payload []byte) error { return netns.EchoOn(c, string(payload)) }

func (o *load) run(f Frontend, once func(i int) error) {
	o.wait.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-o.stop:
				return
			default:
			}
			if err := once(i); err != nil {
				o.t.Errorf("%s: exchange %d: %v", f, i, err)
				return
			}
			o.exchanges.Add(1)
			time.Sleep(2 * time.Millisecond)
		}
	})
}

// more waits for so many exchanges.
func (o *load) more(count int64) {
	o.t.Helper()
	from := o.exchanges.Load()
	netns.Eventually(o.t, 60*time.Second, "traffic goes on", func() bool { return o.t.Failed() || o.exchanges.Load() >= from+count })
}

func (o *load) end() {
	close(o.stop)
	o.wait.Wait()
	o.t.Logf("%d exchanges", o.exchanges.Load())
}

// A UDP exchange that is lost is an error, as nobody repeats it: what passes here
// has lost no packet.
var restarts = group{name: "restarts under load lose nothing", tests: []modeTest{{"restarts", restartUnderLoad}}}

func restartUnderLoad(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"a-1", "b-1"}})
	l.flush()
	before := l.A.Drops()
	o := startLoad(t, l)
	o.more(500)
	for i := range 4 {
		if i%2 == 0 {
			l.A.Crash()
		} else if err := l.A.Down(); err != nil {
			t.Errorf("SIGTERM: %v", err)
		}
		o.more(500) // while no daemon runs
		l.A.Up()    // which loads all programs anew and replaces them in place
		o.more(500)
		if t.Failed() {
			break
		}
	}
	o.end()
	if after := l.A.Drops(); after != before {
		t.Errorf("packets were dropped; before:\n%safter:\n%s", before, after)
	}
}

// A flood of SYNs from outside breaks no connection, neither to a pod of the node
// nor to one of another, even if the connection began when the tables were full.
var floods = group{name: "a flood breaks no connection", tests: []modeTest{
	{"flood", flood},
	{"from the connections' own ports", ownPorts},
}}

func flood(t *testing.T, l *Lab) {
	established := connections()
	l.Service(Spec{Pods: []string{"a-1", "b-1"}})
	f := Frontend{"LoadBalancer", "tcp", netip.AddrPortFrom(Balancer[0], TCPPort)}
	targets := []Frontend{f, {"NodePort", "tcp", netip.AddrPortFrom(l.A.IP, TCPNodePort)}, {"NodePort", "udp", netip.AddrPortFrom(l.A.IP, UDPNodePort)}}
	l.forge(t, packet.Segment(netip.AddrPortFrom(Client[0], 999), f.Address, packet.RST)) // the neighbour is known
	for _, target := range slices.Backward(targets) {                                     // last the one that was seen to break most
		l.flood(t, target)
	}
	open := make([]net.Conn, established)
	report(t, "connections", established, parallel(established, func(i int) error {
		c, err := l.Dial(f)
		if err != nil {
			return err
		}
		open[i] = c
		_, err = AskOn(c, Payload(i, 100), Patience)
		return err
	}))
	defer func() {
		for _, c := range open {
			if c != nil {
				c.Close()
			}
		}
	}()
	if t.Failed() {
		return
	}
	for _, target := range targets {
		l.flood(t, target)
		report(t, "established connections", established, parallel(established, func(i int) error { return echoOn(open[i], Payload(i, 100)) }))
		// And new ones still come in.
		report(t, "new connections", 20, parallel(20, func(i int) error { _, err := l.check(f, Payload(i, 100)); return err }))
	}
}

// A SYN that has the ends of a connection that lives is no news of its client: TCP's answer
// is to ask back (RFC 5961, 4), which only the connection's own backend can. Where the client
// has in truth forgotten the connection, it says so to that, and begins anew.
func ownPorts(t *testing.T, l *Lab) {
	const each = 8
	established := connections() / 5
	l.Service(Spec{Pods: []string{"a-1", "a-2", "b-1", "b-2"}})
	l.flush()
	for _, f := range []Frontend{
		{"LoadBalancer", "tcp", netip.AddrPortFrom(Balancer[0], TCPPort)},
		{"LoadBalancer", "tcp", netip.AddrPortFrom(Balancer[1], TCPPort)},
	} {
		open := make([]net.Conn, established)
		report(t, "connections", established, parallel(established, func(i int) (err error) {
			if open[i], err = l.dialFrom(netip.AddrPortFrom(l.ClientFor(f), uint16(20000+i)), f); err != nil {
				return err
			}
			_, err = AskOn(open[i], Payload(i, 100), Patience)
			return err
		}))
		if t.Failed() {
			return
		}
		var syns []packet.Packet
		for i := range established * each {
			syn := packet.Segment(netip.AddrPortFrom(l.ClientFor(f), uint16(20000+i/each)), f.Address, packet.SYN)
			syn.Seq = uint32(i) * 0x9e3779b1
			syns = append(syns, syn)
		}
		l.forge(t, syns...)
		report(t, "connections whose ports somebody else used", established, parallel(established, func(i int) error { return echoOn(open[i], Payload(i, 100)) }))
		forgotten := min(established, 40)
		for _, c := range open[:forgotten] {
			forget(t, c)
		}
		for _, c := range open {
			c.Close()
		}
		report(t, "connections whose client has forgotten the last one", forgotten, parallel(forgotten, func(i int) error {
			c, err := l.dialFrom(netip.AddrPortFrom(l.ClientFor(f), uint16(20000+i)), f)
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = AskOn(c, Payload(i, 100), Patience)
			return err
		}))
	}
}

// flood begins many more flows at a frontend than the tables have room for.
func (l *Lab) flood(t *testing.T, target Frontend) {
	t.Helper()
	began := time.Now()
	count := 4 * capacity()
	err := fate.Forge(l.Client, l.wire, l.A.IP.String(), count, func(i int) packet.Packet {
		source := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, byte(i >> 16), byte(i >> 8)}), uint16(1024+i%64000))
		if target.Network == "udp" {
			return packet.Datagram(source, target.Address, "x")
		}
		return packet.Segment(source, target.Address, packet.SYN)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d packets to %s in %v", count, target, time.Since(began))
}
