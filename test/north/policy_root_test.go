// SPDX-License-Identifier: Apache-2.0

//go:build root

package north

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/test/netns"
)

// short is how long a client waits for an answer that must not come.
const short = 300 * time.Millisecond

var who = group{name: "who may reach a service, and who answers", tests: []modeTest{
	{"externalTrafficPolicy Local keeps the client and its own pods", localPolicy},
	{"externalTrafficPolicy Local without a local pod drops with a reason", localPolicyWithoutPod},
	{"the last local pod that terminates serves", terminatingPodServes},
	{"loadBalancerSourceRanges", sourceRanges},
	{"changes of loadBalancerSourceRanges open no window", sourceRangesChange},
	{"a service without backends refuses at once", noBackends},
	{"a ClusterIP refuses other ports at once", noPort},
	{"sessionAffinity", affinity},
	{"the client lists every kind of frontend", listed},
}}

func localPolicy(t *testing.T, l *Lab) {
	l.Service(Spec{Fields: "externalTrafficPolicy: Local,", Pods: []string{"a-1", "b-1"}})
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		for i := range 20 {
			a, err := l.Ask(f, Payload(i, 100))
			if err != nil {
				t.Fatal(err)
			}
			if f.Kind == "ClusterIP" { // for it the policy is none
				continue
			}
			if a.Pod != "a-1" || a.Client.Addr() != l.ClientFor(f) {
				t.Fatalf("%s answers and sees %s, want a-1 and %s", a.Pod, a.Client, l.ClientFor(f))
			}
		}
	})
}

func localPolicyWithoutPod(t *testing.T, l *Lab) {
	l.Service(Spec{Fields: "externalTrafficPolicy: Local,", Pods: []string{"b-1"}})
	for _, f := range l.Frontends() {
		if f.Kind == "ClusterIP" {
			continue
		}
		before := dropped(t, l.A, "no_local_backend")
		c, err := Dial(l.Client, l.ClientFor(f), f, short)
		if err == nil {
			_, err = AskOn(c, []byte("x"), short)
			c.Close()
		}
		var timeout interface{ Timeout() bool }
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%s: got %v, want silence", f, err)
		}
		if dropped(t, l.A, "no_local_backend") == before {
			t.Errorf("%s: no packet is counted as dropped for want of a local backend", f)
		}
	}
	// The other node has one.
	l.RouteTo(l.B)
	defer l.RouteTo(l.A)
	for _, f := range l.Frontends() {
		if f.Kind == "ClusterIP" || f.Kind == "NodePort" {
			continue
		}
		if a, err := l.Ask(f, []byte("x")); err != nil || a.Pod != "b-1" || a.Client.Addr() != l.ClientFor(f) {
			t.Errorf("%s by node-b: %v, %v", f, a, err)
		}
	}
}

// KEP-1669: where all local endpoints terminate, those that still serve do.
func terminatingPodServes(t *testing.T, l *Lab) {
	l.Service(Spec{
		Fields: "externalTrafficPolicy: Local,", Pods: []string{"a-1", "a-2", "b-1"},
		Conditions: map[string]string{"a-1": "ready: false, serving: true, terminating: true", "a-2": "ready: false, serving: false, terminating: true"},
	})
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		for i := range 10 {
			a, err := l.Ask(f, Payload(i, 100))
			if err != nil {
				t.Fatal(err)
			}
			if want := map[bool]string{true: "b-1", false: "a-1"}[f.Kind == "ClusterIP"]; a.Pod != want {
				t.Fatalf("%s answers, want %s", a.Pod, want)
			}
		}
	})
}

// onLink are the client's addresses on the nodes' own link.
var onLink = [2]netip.Addr{netip.MustParseAddr(netns.Router), netip.MustParseAddr(netns.Router6)}

func index(f Frontend) int {
	if f.V6() {
		return 1
	}
	return 0
}

func sourceRanges(t *testing.T, l *Lab) {
	l.Service(Spec{Fields: `loadBalancerSourceRanges: [203.0.113.0/24, "2001:db8:203::/64"],`, Pods: []string{"a-1", "b-1"}})
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		for i := range 10 {
			if _, err := l.check(f, Payload(i, 100)); err != nil {
				t.Errorf("a client that the ranges have: %v", err)
			}
		}
		before := dropped(t, l.A, "source_range")
		limit := Patience
		if f.Kind == "LoadBalancer" { // the ranges are the load balancer's alone
			limit = short
		}
		c, err := Dial(l.Client, onLink[index(f)], f, limit)
		if err == nil {
			_, err = AskOn(c, []byte("x"), limit)
			c.Close()
		}
		switch counted := dropped(t, l.A, "source_range") - before; {
		case f.Kind == "LoadBalancer" && (err == nil || counted == 0):
			t.Errorf("a client that the ranges have not: %v, %d packets are counted", err, counted)
		case f.Kind != "LoadBalancer" && err != nil:
			t.Errorf("a client that the ranges have not is kept from a %s: %v", f.Kind, err)
		}
	})
}

func sourceRangesChange(t *testing.T, l *Lab) {
	service := func(ranges ...string) {
		l.Service(Spec{Fields: fmt.Sprintf("loadBalancerSourceRanges: [%s],", strings.Join(ranges, ",")), Pods: []string{"a-1"}})
	}
	service("203.0.113.0/24")
	l.flush()
	f := Frontend{"LoadBalancer", "udp", netip.AddrPortFrom(Balancer[0], UDPPort)}
	stop := make(chan struct{})
	var wait sync.WaitGroup
	var asked, denied int
	wait.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := l.Ask(f, Payload(i, 32)); err != nil {
				t.Errorf("a client that all ranges have: %v", err)
				return
			}
			asked++
		}
	})
	wait.Go(func() {
		c, err := l.Client.ListenPacket("udp4", onLink[0].String()+":0")
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		for i := 0; ; i++ {
			select {
			case <-stop:
				c.SetReadDeadline(time.Now().Add(short))
				if n, from, err := c.ReadFrom(make([]byte, 100)); err == nil {
					t.Errorf("a client that no ranges have got %d bytes from %s", n, from)
				}
				return
			default:
			}
			if _, err := c.WriteTo([]byte("x"), netAddr(f.Address)); err != nil {
				t.Error(err)
				return
			}
			denied++
			time.Sleep(100 * time.Microsecond)
		}
	})
	for i := range 10 {
		service(fmt.Sprintf("10.%d.0.0/16", i), "203.0.113.0/24")
		service("203.0.113.0/25", fmt.Sprintf("10.%d.0.0/16", i+100))
	}
	close(stop)
	wait.Wait()
	t.Logf("%d requests of a client that all ranges have, %d of one that none has", asked, denied)
}

func noBackends(t *testing.T, l *Lab) {
	l.Service(Spec{})
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		before := dropped(t, l.A, "no_backend")
		began := time.Now()
		_, err := l.Ask(f, []byte("x"))
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("got %v after %v, want a refusal", err, time.Since(began))
		}
		if dropped(t, l.A, "no_backend") == before {
			t.Error("no packet is counted as dropped for want of a backend")
		}
	})
}

func noPort(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"a-1"}})
	for _, addr := range ClusterIPs {
		for _, network := range []string{"tcp", "udp"} {
			f := Frontend{"ClusterIP", network, netip.AddrPortFrom(addr, 4242)}
			if _, err := l.Ask(f, []byte("x")); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: got %v, want a refusal", f, err)
			}
		}
	}
}

func affinity(t *testing.T, l *Lab) {
	pods := []string{"a-1", "a-2", "b-1", "b-2"}
	l.Service(Spec{Fields: "sessionAffinity: ClientIP,", Pods: pods})
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		first, err := l.check(f, []byte("x"))
		if err != nil {
			t.Fatal(err)
		}
		for i := range 40 {
			if pod, err := l.check(f, Payload(i, 100)); err != nil || pod != first {
				t.Fatalf("%s answered first, then %s (%v)", first, pod, err)
			}
		}
	})
}

func listed(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"a-1", "b-1"}})
	services, err := l.A.API().Services(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]int{}
	for _, s := range services {
		if s.Name != "web" {
			continue
		}
		for _, f := range s.Frontends {
			got[fmt.Sprintf("%s %s %s", f.Kind, strings.ToLower(f.Protocol), netip.AddrPortFrom(netip.MustParseAddr(f.Address), f.Port))] = len(f.Backends)
		}
	}
	for _, f := range l.Frontends() {
		if got[f.String()] != 2 {
			t.Errorf("%s is listed with %d backends: %v", f, got[f.String()], got)
		}
	}
}
