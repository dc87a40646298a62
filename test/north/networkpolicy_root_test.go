// SPDX-License-Identifier: Apache-2.0

//go:build root

package north

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// A NetworkPolicy knows a client from outside by its address, however the client
// came to the pod.
var networkPolicies = group{name: "network policies judge clients from outside", tests: []modeTest{
	{"an ipBlock lets its clients in and nobody else", ipBlock},
	{"an ipBlock's except keeps a client out", ipBlockExcept},
	{"what was let in is stopped when the policy changes", policyStopsFlows},
	{"a policy of egress leaves answers alone", egressLeavesAnswers},
}}

// allowFrom writes one policy for a-1: ingress from an ipBlock of either family,
// or with none, from nowhere.
func (l *Lab) allowFrom(t *testing.T, blocks ...string) {
	t.Helper()
	var from strings.Builder
	for _, b := range blocks {
		fmt.Fprintf(&from, "    - ipBlock: %s\n", b)
	}
	rules := "  ingress: []\n"
	if len(blocks) > 0 {
		rules = "  ingress:\n  - from:\n" + from.String()
	}
	l.applyPolicy(t, "  policyTypes: [Ingress]\n"+rules)
}

func (l *Lab) applyPolicy(t *testing.T, spec string) {
	t.Helper()
	l.Apply("policy.yaml", `
apiVersion: v1
kind: Pod
metadata: {name: a-1, namespace: default, labels: {app: web}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: outside, namespace: default}
spec:
  podSelector: {matchLabels: {app: web}}
`+spec)
	t.Cleanup(func() { l.Apply("policy.yaml", "") })
}

// denied asks as a client whom no policy allows, and wants silence that is counted.
func (l *Lab) denied(t *testing.T, from netip.Addr, f Frontend) {
	t.Helper()
	before := dropped(t, l.A, "policy_ingress")
	c, err := Dial(l.Client, from, f, short)
	if err == nil {
		_, err = AskOn(c, []byte("x"), short)
		c.Close()
	}
	if err == nil {
		t.Errorf("%s is let to %s", from, f)
	}
	if dropped(t, l.A, "policy_ingress") == before {
		t.Errorf("%s to %s: no packet is counted as dropped by the policy (%v)", from, f, err)
	}
}

func ipBlock(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"a-1"}})
	l.allowFrom(t, "{cidr: 203.0.113.0/24}", `{cidr: "2001:db8:203::/64"}`)
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		for i := range 5 {
			a, err := l.Ask(f, Payload(i, 100))
			if err != nil {
				t.Fatalf("a client of the block: %v", err)
			}
			if a.Client.Addr() != l.ClientFor(f) {
				t.Fatalf("the pod sees %s, want %s", a.Client, l.ClientFor(f))
			}
		}
		l.denied(t, onLink[index(f)], f)
	})
}

func ipBlockExcept(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"a-1"}})
	l.allowFrom(t, fmt.Sprintf("{cidr: 0.0.0.0/0, except: [%s/32]}", Client[0]), fmt.Sprintf(`{cidr: "::/0", except: ["%s/128"]}`, Client[1]))
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		l.denied(t, l.ClientFor(f), f)
		if _, err := AskFrom(l.Client, onLink[index(f)], f, []byte("x")); err != nil {
			t.Errorf("a client that is no exception: %v", err)
		}
	})
}

func policyStopsFlows(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"a-1"}})
	l.allowFrom(t, "{cidr: 203.0.113.0/24}", `{cidr: "2001:db8:203::/64"}`)
	l.flush()
	open := map[Frontend]net.Conn{}
	for _, f := range l.Frontends() {
		c, err := l.Dial(f)
		if err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		defer c.Close()
		if _, err := AskOn(c, []byte("hello"), Patience); err != nil {
			t.Fatalf("%s, allowed: %v", f, err)
		}
		open[f] = c
	}
	l.allowFrom(t)
	for f, c := range open {
		before := dropped(t, l.A, "policy_ingress")
		c.SetDeadline(time.Now().Add(short))
		c.Write([]byte("again"))
		if n, err := c.Read(make([]byte, 100)); err == nil {
			t.Errorf("%s: %d bytes are answered though the policy changed", f, n)
		}
		if dropped(t, l.A, "policy_ingress") == before {
			t.Errorf("%s: no packet is counted as dropped by the policy", f)
		}
	}
}

func egressLeavesAnswers(t *testing.T, l *Lab) {
	l.Service(Spec{Pods: []string{"a-1"}})
	l.applyPolicy(t, "  policyTypes: [Egress]\n  egress: []\n")
	l.eachFrontend(t, func(t *testing.T, f Frontend) {
		for i := range 5 {
			if _, err := l.Ask(f, Payload(i, 100)); err != nil {
				t.Fatal(err)
			}
		}
	})
}
