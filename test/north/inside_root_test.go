// SPDX-License-Identifier: Apache-2.0

//go:build root

package north

import (
	"fmt"
	"net/netip"
	"testing"
)

// Pods and processes of the nodes use the addresses that are for clients outside.
var inside = group{name: "inside reaches what is for outside", tests: []modeTest{
	{"a pod of its own node", func(t *testing.T, l *Lab) { l.fromPod(t, "a-2", "a-1") }},
	{"a pod of another node", func(t *testing.T, l *Lab) { l.fromPod(t, "b-2", "a-1") }},
	{"a pod whose backend is on another node", func(t *testing.T, l *Lab) { l.fromPod(t, "a-2", "b-1") }},
	{"a pod that is its own backend", func(t *testing.T, l *Lab) { l.fromPod(t, "a-1", "a-1") }},
	{"externalTrafficPolicy Local is none for pods", localPolicyInside},
	{"a process of the node", hostProcess},
}}

// fromPod: a pod of either node reaches the service by node-a's addresses and by
// the service's own.
func (l *Lab) fromPod(t *testing.T, client, backend string) {
	l.Service(Spec{Pods: []string{backend}})
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		for i := range 20 {
			a, err := AskFrom(l.Pod(client).NS, netip.Addr{}, f, Payload(i, 500))
			if err != nil {
				t.Fatal(err)
			}
			if a.Pod != backend {
				t.Fatalf("%s answers, want %s", a.Pod, backend)
			}
		}
	})
}

func localPolicyInside(t *testing.T, l *Lab) {
	l.Service(Spec{Fields: "externalTrafficPolicy: Local,", Pods: []string{"b-1"}})
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		if a, err := AskFrom(l.Pod("a-1").NS, netip.Addr{}, f, []byte("x")); err != nil || a.Pod != "b-1" {
			t.Errorf("%v answers, %v", a, err)
		}
	})
}

func hostProcess(t *testing.T, l *Lab) {
	l.A.EnterCgroup()
	for _, backend := range []string{"a-1", "b-1"} {
		l.Service(Spec{Pods: []string{backend}})
		frontends := append(l.Frontends(),
			Frontend{"NodePort", "tcp", netip.MustParseAddrPort(fmt.Sprintf("127.0.0.1:%d", TCPNodePort))},
			Frontend{"NodePort", "udp", netip.MustParseAddrPort(fmt.Sprintf("127.0.0.1:%d", UDPNodePort))})
		for _, f := range frontends {
			for i := range 10 {
				a, err := AskFrom(l.A.NS, netip.Addr{}, f, Payload(i, 500))
				if err != nil || a.Pod != backend {
					t.Errorf("%s: %v answers, %v; want %s", f, a, err, backend)
				}
			}
		}
	}
}
