//go:build root

// SPDX-License-Identifier: Apache-2.0

package reachability

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/scenario"
)

// Policies of these tests.
const (
	closedWeb = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web-is-closed, namespace: default}
spec: {podSelector: {matchLabels: {app: web}}}
`
	silentClient = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: client-is-silent, namespace: default}
spec: {podSelector: {matchLabels: {app: client}}, policyTypes: [Egress]}
`
	denied = `
apiVersion: policy.networking.k8s.io/v1beta1
kind: ClusterNetworkPolicy
metadata: {name: denied}
spec:
  tier: Admin
  priority: 1
  subject: {namespaces: {}}
  ingress: [{action: Deny, from: [{namespaces: {}}]}]
`
	onlyFriends = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-friends, namespace: default}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]
`
	closedNamespace = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: default}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
`
)

func labelled(app string) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: default, labels: {app: %[1]s}}\n", app)
}

// ear is when one end of a conversation heard the other last.
type ear struct{ heard atomic.Int64 }

func (e *ear) now()                 { e.heard.Store(time.Now().UnixNano()) }
func (e *ear) last() time.Time      { return time.Unix(0, e.heard.Load()) }
func (e *ear) since() time.Duration { return time.Since(e.last()) }

// interval is that between what is said.
const interval = 5 * time.Millisecond

// speak says something at each interval, whatever becomes of it, and listens.
func speak(t *testing.T, read func([]byte) (int, error), write func([]byte) (int, error)) *ear {
	e := &ear{}
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop) })
	go func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(interval):
				write([]byte("."))
			}
		}
	}()
	go func() {
		buffer := make([]byte, 4096)
		for {
			n, err := read(buffer)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if n > 0 {
				e.now()
			}
		}
	}()
	return e
}

// conversations are one by TCP and one by UDP in each family, that the client began.
func conversations(t *testing.T, client, web *scenario.Pod) map[string]*ear {
	t.Helper()
	ears := map[string]*ear{}
	for _, addr := range []netip.Addr{web.IP, web.IP6} {
		at := netip.AddrPortFrom(addr, 8080).String()
		listener, err := web.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { listener.Close() })
		tcp, err := client.Dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		server, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		packets, err := web.ListenPacket("udp", at)
		if err != nil {
			t.Fatal(err)
		}
		udp, err := client.Dial("udp", at)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := udp.Write([]byte(".")); err != nil {
			t.Fatal(err)
		}
		buffer := make([]byte, 16)
		packets.SetReadDeadline(time.Now().Add(10 * time.Second))
		_, from, err := packets.ReadFrom(buffer)
		if err != nil {
			t.Fatalf("the server hears nobody: %v", err)
		}
		packets.SetReadDeadline(time.Time{})
		for _, c := range []net.Conn{tcp, server, udp} {
			t.Cleanup(func() { c.Close() })
		}
		t.Cleanup(func() { packets.Close() })
		ears[addr.String()+" TCP, client hears"] = speak(t, tcp.Read, tcp.Write)
		ears[addr.String()+" TCP, server hears"] = speak(t, server.Read, server.Write)
		ears[addr.String()+" UDP, client hears"] = speak(t, udp.Read, udp.Write)
		ears[addr.String()+" UDP, server hears"] = speak(t,
			func(b []byte) (int, error) { n, _, err := packets.ReadFrom(b); return n, err },
			func(b []byte) (int, error) { return packets.WriteTo(b, from) })
	}
	return ears
}

func TestAnEstablishedFlowIsJudgedAnewWithinASecondOfAChange(t *testing.T) {
	n := scenario.NewNode(t)
	n.Write("pods.yaml", labelled("web")+labelled("client"))
	n.Up()
	client, web := n.AddPod("client"), n.AddPod("web")
	ears := conversations(t, client, web)
	all := func(what string, holds func(*ear) bool) {
		t.Helper()
		netns.Eventually(t, 30*time.Second, what, func() bool {
			for _, e := range ears {
				if !holds(e) {
					return false
				}
			}
			return true
		})
	}
	best := time.Hour
	for name, policy := range map[string]string{"ingress": closedWeb, "egress": silentClient, "a tier": denied, "ingress again": closedWeb} {
		all("both ends hear each other", func(e *ear) bool { return e.since() < 20*interval })
		began := time.Now()
		n.Write("policy.yaml", policy)
		all(name+": nobody hears anybody", func(e *ear) bool { return e.since() > 500*time.Millisecond })
		var last time.Duration
		for _, e := range ears {
			last = max(last, e.last().Sub(began))
		}
		t.Logf("%s: nothing more %v after the policy was written", name, last)
		best = min(best, last)
		if err := os.Remove(filepath.Join(n.Manifests, "policy.yaml")); err != nil {
			t.Fatal(err)
		}
	}
	// What the machine does besides may be in the way of one change, not of all.
	if best > time.Second {
		t.Errorf("the soonest change took %v to stop flows, want less than 1 s", best)
	}
}

// spy counts what it receives by UDP and TCP.
func spy(t *testing.T, ns *netns.NS, port int, heard *atomic.Int64) {
	t.Helper()
	at := fmt.Sprintf("[::]:%d", port)
	netns.UDP(t, ns, at, func([]byte, net.Addr) []byte { heard.Add(1); return nil })
	netns.TCP(t, ns, at, func(net.Conn) { heard.Add(1) })
}

// flood sends datagrams, and connects, to all of the targets again and again,
// from new sockets, until stop.
func flood(ns *netns.NS, stop <-chan struct{}, targets ...netip.AddrPort) error {
	return ns.Do(func() error {
		for {
			for _, to := range targets {
				select {
				case <-stop:
					return nil
				case <-time.After(200 * time.Microsecond):
				}
				for _, protocol := range []string{"UDP", "TCP"} {
					a := attempt{Packet: Packet{From: netip.IPv6Unspecified(), To: to.Addr(), Protocol: protocol, Port: int(to.Port())}}
					if to.Addr().Is4() {
						a.From = netip.IPv4Unspecified()
					}
					if err := a.begin(); err == nil {
						unix.Close(a.fd)
					} else if a.fd > 0 {
						unix.Close(a.fd) // there is no way there yet
					}
				}
			}
		}
	})
}

func TestARestartWithPoliciesBreaksNothingAndOpensNothing(t *testing.T) {
	n := scenario.NewNode(t)
	n.Write("pods.yaml", labelled("web")+labelled("friend")+labelled("stranger"))
	n.Write("policy.yaml", onlyFriends)
	n.Up()
	web, friend, stranger := n.AddPod("web"), n.AddPod("friend"), n.AddPod("stranger")
	var overheard atomic.Int64
	spy(t, web.NS, 9999, &overheard)
	ears := conversations(t, friend, web)
	netns.TCPEcho(t, web.NS, "[::]:7777")

	stop := make(chan struct{})
	var wait sync.WaitGroup
	var opened atomic.Int64
	wait.Go(func() {
		if err := flood(stranger.NS, stop, netip.AddrPortFrom(web.IP, 9999), netip.AddrPortFrom(web.IP6, 9999)); err != nil {
			t.Errorf("stranger: %v", err)
		}
	})
	wait.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(interval):
			}
			to := []netip.Addr{web.IP, web.IP6}[i%2]
			if err := friend.Echo("tcp", netip.AddrPortFrom(to, 7777).String(), "hello"); err != nil {
				t.Errorf("friend, connection %d: %v", i, err)
				return
			}
			opened.Add(1)
		}
	})
	pause := func() { time.Sleep(300 * time.Millisecond) }
	for range 2 {
		pause()
		n.Crash()
		pause()
		n.Up()
		pause()
		if err := n.Down(); err != nil {
			t.Fatal(err)
		}
		pause()
		n.Up()
	}
	pause()
	for name, e := range ears {
		if e.since() > 2*time.Second {
			t.Errorf("%s nothing since %v", name, e.since())
		}
	}
	close(stop)
	wait.Wait()
	t.Logf("%d connections opened", opened.Load())
	if heard := overheard.Load(); heard != 0 {
		t.Errorf("the stranger got through %d times", heard)
	}
	if opened.Load() == 0 {
		t.Error("the friend opened no connection")
	}

	// The stranger would have been heard, had it been let through.
	if err := os.Remove(filepath.Join(n.Manifests, "policy.yaml")); err != nil {
		t.Fatal(err)
	}
	again := make(chan struct{})
	wait.Go(func() { flood(stranger.NS, again, netip.AddrPortFrom(web.IP, 9999)) })
	netns.Eventually(t, 30*time.Second, "the stranger is heard without the policy", func() bool { return overheard.Load() > 0 })
	close(again)
	wait.Wait()
}

func TestAPodIsClosedFromItsFirstPacketOn(t *testing.T) {
	n := scenario.NewNode(t)
	n.Write("policy.yaml", closedNamespace)
	n.Up()
	// Whom the pods write to, and who writes to them, before they are there.
	outside := []netip.AddrPort{netip.MustParseAddrPort(netns.Remote + ":9999"), netip.AddrPortFrom(netip.MustParseAddr(netns.Remote6), 9999)}
	var leaked, reached atomic.Int64
	spy(t, n.Outside.NS, 9999, &leaked)
	neighbour := n.AddPod("open/neighbour")
	spy(t, neighbour.NS, 9999, &leaked)
	const pods = 15
	targets := append(outside, netip.AddrPortFrom(neighbour.IP, 9999), netip.AddrPortFrom(neighbour.IP6, 9999))
	var future []netip.AddrPort
	for v4, v6, i := neighbour.IP.Next(), neighbour.IP6.Next(), 0; i < pods+2; v4, v6, i = v4.Next(), v6.Next(), i+1 {
		future = append(future, netip.AddrPortFrom(v4, 9999), netip.AddrPortFrom(v6, 9999))
	}
	stop := make(chan struct{})
	var wait sync.WaitGroup
	wait.Go(func() { flood(neighbour.NS, stop, future...) })
	var last *scenario.Pod
	for i := range pods {
		p := n.NewPod(fmt.Sprintf("pod%d", i))
		spy(t, p.NS, 9999, &reached)
		own := make(chan struct{})
		var sender sync.WaitGroup
		sender.Go(func() { flood(p.NS, own, targets...) })
		if err := n.Attach(p); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
		close(own)
		sender.Wait()
		if leaked.Load() != 0 || reached.Load() != 0 {
			t.Fatalf("pod %d: %d of its packets got out, %d got in", i, leaked.Load(), reached.Load())
		}
		last = p
	}

	// All of it arrives when nothing forbids it.
	if err := os.Remove(filepath.Join(n.Manifests, "policy.yaml")); err != nil {
		t.Fatal(err)
	}
	wait.Go(func() { flood(last.NS, stop, targets...) })
	netns.Eventually(t, 30*time.Second, "packets get out and in without the policy", func() bool { return leaked.Load() > 0 && reached.Load() > 0 })
	close(stop)
	wait.Wait()
}
