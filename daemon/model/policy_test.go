// SPDX-License-Identifier: Apache-2.0

package model

import (
	"net/netip"
	"testing"
)

func TestSelectorMatchesAsTheAPISays(t *testing.T) {
	web := map[string]string{"app": "web", "tier": "front"}
	for _, c := range []struct {
		selector Selector
		text     string
		labels   map[string]string
		want     bool
	}{
		{nil, "", nil, true},
		{nil, "", web, true},
		{Selector{{"app", In, []string{"web"}}}, "app=web", web, true},
		{Selector{{"app", In, []string{"web"}}}, "app=web", nil, false},
		{Selector{{"app", In, []string{"api", "web"}}}, "app in (api,web)", web, true},
		{Selector{{"app", In, []string{"web"}}, {"tier", In, []string{"back"}}}, "app=web,tier=back", web, false},
		{Selector{{"app", NotIn, []string{"web"}}}, "app notin (web)", web, false},
		{Selector{{"app", NotIn, []string{"web"}}}, "app notin (web)", nil, true},
		{Selector{{"app", Exists, nil}}, "app", web, true},
		{Selector{{"app", Exists, nil}}, "app", nil, false},
		{Selector{{"app", DoesNotExist, nil}}, "!app", web, false},
		{Selector{{"app", DoesNotExist, nil}}, "!app", nil, true},
		{Selector{{"app", "Like", nil}}, "", web, false},
	} {
		if got := c.selector.Matches(c.labels); got != c.want {
			t.Errorf("%q matches %v: %v, want %v", c.selector, c.labels, got, c.want)
		}
		if got := c.selector.String(); got != c.text {
			t.Errorf("selector %#v is written %q, want %q", c.selector, got, c.text)
		}
	}
}

func TestEqualSelectorsAreWrittenEqually(t *testing.T) {
	a := Selector{{"b", In, []string{"y", "x", "y"}}, {"a", Exists, nil}, {"a", Exists, nil}}.Sorted()
	b := Selector{{"a", Exists, nil}, {"b", In, []string{"x", "y"}}}.Sorted()
	if a.String() != b.String() || a.String() != "a,b in (x,y)" {
		t.Errorf("%q and %q, want both %q", a, b, "a,b in (x,y)")
	}
}

func TestPeerNamesPodsOfTheRightNamespace(t *testing.T) {
	web, all := &Selector{{"app", In, []string{"web"}}}, &Selector{}
	prod := &Selector{{"env", In, []string{"prod"}}}
	pod, production := map[string]string{"app": "web"}, map[string]string{"env": "prod"}
	for _, c := range []struct {
		name      string
		peer      PolicyPeer
		namespace string
		labels    map[string]string // the namespace's
		want      bool
	}{
		{"pod selector, own namespace", PolicyPeer{PodSelector: web}, "own", nil, true},
		{"pod selector, other namespace", PolicyPeer{PodSelector: web}, "other", nil, false},
		{"every namespace", PolicyPeer{NamespaceSelector: all}, "other", nil, true},
		{"namespace selector that does not match", PolicyPeer{NamespaceSelector: prod}, "own", nil, false},
		{"both", PolicyPeer{NamespaceSelector: prod, PodSelector: web}, "other", production, true},
		{"both, pod does not match", PolicyPeer{NamespaceSelector: prod, PodSelector: &Selector{{"app", DoesNotExist, nil}}}, "other", production, false},
		{"address block", PolicyPeer{IPBlock: &IPBlock{}}, "own", nil, false},
		{"nothing", PolicyPeer{}, "own", nil, false},
	} {
		if got := c.peer.MatchesPod("own", c.namespace, c.labels, pod); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestBlockLeavesItsExceptionsOut(t *testing.T) {
	block := IPBlock{CIDR: netip.MustParsePrefix("203.0.113.0/24"), Except: []netip.Prefix{netip.MustParsePrefix("203.0.113.128/25")}}
	for addr, want := range map[string]bool{"203.0.113.7": true, "203.0.113.200": false, "192.0.2.1": false, "2001:db8::1": false} {
		if got := block.Contains(netip.MustParseAddr(addr)); got != want {
			t.Errorf("block contains %s: %v, want %v", addr, got, want)
		}
	}
}

func TestPolicyPortByNumberRangeNameAndProtocol(t *testing.T) {
	declared := []ContainerPort{{Name: "http", Protocol: TCP, Port: 8080}}
	for _, c := range []struct {
		port     PolicyPort
		text     string
		protocol Protocol
		number   uint16
		want     bool
	}{
		{PolicyPort{Protocol: TCP}, "*/TCP", TCP, 1, true},
		{PolicyPort{Protocol: TCP}, "*/TCP", UDP, 1, false},
		{PolicyPort{Protocol: TCP, Port: 80, EndPort: 80}, "80/TCP", TCP, 80, true},
		{PolicyPort{Protocol: TCP, Port: 80, EndPort: 80}, "80/TCP", TCP, 81, false},
		{PolicyPort{Protocol: UDP, Port: 80, EndPort: 90}, "80-90/UDP", UDP, 90, true},
		{PolicyPort{Protocol: UDP, Port: 80, EndPort: 90}, "80-90/UDP", UDP, 91, false},
		{PolicyPort{Protocol: TCP, Name: "http"}, "http/TCP", TCP, 8080, true},
		{PolicyPort{Protocol: TCP, Name: "http"}, "http/TCP", TCP, 80, false},
		{PolicyPort{Protocol: UDP, Name: "http"}, "http/UDP", UDP, 8080, false},
	} {
		if got := c.port.Matches(c.protocol, c.number, declared); got != c.want {
			t.Errorf("%s matches %d/%s: %v, want %v", c.port, c.number, c.protocol, got, c.want)
		}
		if got := c.port.String(); got != c.text {
			t.Errorf("port is written %q, want %q", got, c.text)
		}
	}
}

func TestProblemNamesFileDocumentObjectAndField(t *testing.T) {
	for want, p := range map[string]Problem{
		"web.yaml document 2: Service default/web: spec.ports[0].port: is 0": {"web.yaml", 2, "Service default/web", "spec.ports[0].port", "is 0"},
		"web.yaml: is too large":               {File: "web.yaml", Message: "is too large"},
		"Service default/web: has no endpoint": {Object: "Service default/web", Message: "has no endpoint"},
	} {
		if got := p.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
