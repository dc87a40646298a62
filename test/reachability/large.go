// SPDX-License-Identifier: Apache-2.0

package reachability

import (
	"fmt"
	"maps"
	"net/netip"
	"syscall"
	"time"

	"github.com/mooring-cni/mooring/daemon/model"
)

// Large is a cluster of 200 namespaces with 5,000 pods, of which 250 are here,
// and 1,000 policies: per namespace one that isolates, and four that allow by
// pod label, by namespace, by block and by port range.
func Large() (model.Changes, map[uint32]*model.Endpoint) {
	c := model.Changes{
		Synced:     true,
		Pods:       make(map[model.Name]*model.Pod),
		Namespaces: make(map[string]*model.Namespace),
		Policies:   make(map[model.Name]*model.Policy),
	}
	endpoints := make(map[uint32]*model.Endpoint)
	is := func(key, value string) *model.Selector {
		return &model.Selector{{Key: key, Operator: model.In, Values: []string{value}}}
	}
	for n := range 200 {
		namespace := fmt.Sprintf("namespace-%d", n)
		c.Namespaces[namespace] = &model.Namespace{Name: namespace, Labels: map[string]string{
			"kubernetes.io/metadata.name": namespace, "team": fmt.Sprint(n % 20),
		}}
		for i, p := range []model.Policy{
			{Ingress: true, Egress: true},
			{PodSelector: *is("app", "web"), Ingress: true, IngressRules: []model.PolicyRule{{
				Peers: []model.PolicyPeer{{PodSelector: is("app", "client")}},
				Ports: []model.PolicyPort{{Protocol: model.TCP, Name: "http"}, {Protocol: model.TCP, Port: 443, EndPort: 443}}}}},
			{PodSelector: *is("app", "web"), Ingress: true, IngressRules: []model.PolicyRule{{
				Peers:    []model.PolicyPeer{{NamespaceSelector: is("team", fmt.Sprint(n%20)), PodSelector: is("app", "web")}},
				AllPorts: true}}},
			{Egress: true, EgressRules: []model.PolicyRule{{
				Peers:    []model.PolicyPeer{{IPBlock: &model.IPBlock{CIDR: netip.MustParsePrefix("0.0.0.0/0"), Except: []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.%d.0.0/16", n))}}}},
				AllPorts: true}}},
			{Egress: true, EgressRules: []model.PolicyRule{
				{Peers: []model.PolicyPeer{{NamespaceSelector: &model.Selector{}}}, Ports: []model.PolicyPort{{Protocol: model.UDP, Port: 53, EndPort: 53}}},
				{Peers: []model.PolicyPeer{{PodSelector: &model.Selector{}}}, Ports: []model.PolicyPort{{Protocol: model.TCP, Port: 1024, EndPort: 65535}}}}},
		} {
			p.Name = model.Name{Namespace: namespace, Name: fmt.Sprintf("policy-%d", i)}
			c.Policies[p.Name] = &p
		}
	}
	for i := range 5000 {
		name := model.Name{Namespace: fmt.Sprintf("namespace-%d", i%200), Name: fmt.Sprintf("pod-%d", i)}
		p := &model.Pod{
			Name:   name,
			Labels: map[string]string{"app": []string{"web", "client", "db"}[i/200%3], "pod-template-hash": fmt.Sprint(i / 400), "index": fmt.Sprint(i % 5)},
			IPs:    []netip.Addr{netip.AddrFrom4([4]byte{10, 244, byte(i >> 8), byte(i)}), netip.AddrFrom16([16]byte{0xfd, 0, 0, 0x10, 2, 0x44, 14: byte(i >> 8), 15: byte(i)})},
			Ports:  []model.ContainerPort{{Name: "http", Protocol: model.TCP, Port: uint16(8000 + i%3)}},
		}
		c.Pods[name] = p
		if i%20 == i/200%20 {
			id := uint32(i/20 + 1)
			endpoints[id] = &model.Endpoint{ID: id, Pod: name, IPs: p.IPs}
		}
	}
	return c, endpoints
}

// LargeChange is one thing of the large cluster that changes, to another value
// at each turn.
type LargeChange struct {
	Name string
	Turn func(turn int) model.Changes
}

// LargeChanges are labels that policies select by, and a policy itself.
func LargeChanges(c model.Changes) []LargeChange {
	pod := func(name model.Name) func(int) model.Changes {
		return func(turn int) model.Changes {
			p := *c.Pods[name]
			p.Labels = maps.Clone(p.Labels)
			p.Labels["app"] = []string{"client", "web", "db"}[turn%3]
			p.Labels["index"] = fmt.Sprint(100 + turn)
			return model.Changes{Pods: map[model.Name]*model.Pod{name: &p}}
		}
	}
	return []LargeChange{
		{"a label of a pod elsewhere", pod(model.Name{Namespace: "namespace-7", Name: "pod-7"})},
		{"a label of a pod of this node", pod(model.Name{Namespace: "namespace-0", Name: "pod-0"})},
		{"a label of a namespace", func(turn int) model.Changes {
			n := *c.Namespaces["namespace-3"]
			n.Labels = maps.Clone(n.Labels)
			n.Labels["team"] = fmt.Sprint(4 + turn%10)
			return model.Changes{Namespaces: map[string]*model.Namespace{n.Name: &n}}
		}},
		{"a policy's address block", func(turn int) model.Changes {
			p := *c.Policies[model.Name{Namespace: "namespace-3", Name: "policy-3"}]
			p.EgressRules = []model.PolicyRule{{AllPorts: true, Peers: []model.PolicyPeer{{
				IPBlock: &model.IPBlock{CIDR: netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(turn)}), 32)}}}}}
			return model.Changes{Policies: map[model.Name]*model.Policy{p.Name: &p}}
		}},
	}
}

// Spent is the time that this process had on a CPU: what else the machine does
// at the moment is no part of the cost.
func Spent() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		panic(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
