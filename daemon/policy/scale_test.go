// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"maps"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/daemon/model"
)

// largeCluster has 200 namespaces with 5,000 pods, of which 250 are here, and
// 1,000 policies: per namespace one that isolates, and four that allow by pod
// label, by namespace, by block and by port range.
func largeCluster() (model.Changes, map[uint32]*model.Endpoint) {
	c := model.Changes{
		Synced:     true,
		Pods:       make(map[model.Name]*model.Pod),
		Namespaces: make(map[string]*model.Namespace),
		Policies:   make(map[model.Name]*model.Policy),
	}
	endpoints := make(map[uint32]*model.Endpoint)
	is := func(key, value string) model.Selector {
		return model.Selector{{Key: key, Operator: model.In, Values: []string{value}}}
	}
	for n := range 200 {
		namespace := fmt.Sprintf("namespace-%d", n)
		c.Namespaces[namespace] = &model.Namespace{Name: namespace, Labels: map[string]string{
			"kubernetes.io/metadata.name": namespace, "team": fmt.Sprint(n % 20),
		}}
		for i, p := range []model.Policy{
			{Ingress: true, Egress: true},
			{PodSelector: is("app", "web"), Ingress: true, IngressRules: []model.PolicyRule{{
				Peers: []model.PolicyPeer{{PodSelector: ptr(is("app", "client"))}},
				Ports: []model.PolicyPort{{Protocol: model.TCP, Name: "http"}, {Protocol: model.TCP, Port: 443, EndPort: 443}}}}},
			{PodSelector: is("app", "web"), Ingress: true, IngressRules: []model.PolicyRule{{
				Peers:    []model.PolicyPeer{{NamespaceSelector: ptr(is("team", fmt.Sprint(n%20))), PodSelector: ptr(is("app", "web"))}},
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

func ptr[T any](v T) *T { return &v }

func largeTable() (*Table, *Update) {
	c, endpoints := largeCluster()
	t := NewTable(Config{Node: "here", Mode: Default, Standalone: true})
	t.ApplyEndpoints(endpoints)
	return t, t.Apply(c)
}

func relabelled(t *Table, name model.Name, key, value string) model.Changes {
	p := *t.pods[name].Pod
	p.Labels = maps.Clone(p.Labels)
	p.Labels[key] = value
	return model.Changes{Pods: map[model.Name]*model.Pod{name: &p}}
}

// spent is the time that this process had on a CPU: what else the machine does
// at the moment is no part of the cost.
func spent() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		panic(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func TestALargeClusterIsComputedInTime(t *testing.T) {
	begin := spent()
	table, all := largeTable()
	scratch := spent() - begin
	t.Logf("from nothing: %v; %d identities' addresses, %d rulesets, %d verdicts, %d profiles",
		scratch, len(all.Addresses), len(table.rulesets), len(all.Verdicts), len(all.Profiles))
	if scratch > 5*time.Second {
		t.Errorf("from nothing took %v, want less than 5 s", scratch)
	}
	remote, local := model.Name{Namespace: "namespace-7", Name: "pod-7"}, model.Name{Namespace: "namespace-0", Name: "pod-0"}
	for name, change := range map[string]func() *Update{
		"label of a pod elsewhere": func() *Update { return table.Apply(relabelled(table, remote, "app", "client")) },
		"label of a pod of this node": func() *Update {
			return table.Apply(relabelled(table, local, "app", "client"))
		},
		"label of a namespace": func() *Update {
			return table.Apply(model.Changes{Namespaces: map[string]*model.Namespace{"namespace-3": {Name: "namespace-3", Labels: map[string]string{"team": "0"}}}})
		},
	} {
		begin := spent()
		u := change()
		took := spent() - begin
		t.Logf("%s: %v; %d addresses, %d verdicts, %d endpoints", name, took, len(u.Addresses), len(u.Verdicts)+len(u.GoneVerdicts), len(u.Endpoints))
		if took > 100*time.Millisecond {
			t.Errorf("%s took %v, want less than 100 ms", name, took)
		}
		if u.Empty() {
			t.Errorf("%s changed nothing", name)
		}
	}
}

func BenchmarkFromNothing(b *testing.B) {
	for b.Loop() {
		largeTable()
	}
}

func BenchmarkOneLabel(b *testing.B) {
	t, _ := largeTable()
	i := 0
	for b.Loop() {
		i++
		t.Apply(relabelled(t, model.Name{Namespace: "namespace-7", Name: "pod-7"}, "index", fmt.Sprint(i)))
	}
}
