// SPDX-License-Identifier: Apache-2.0

package source

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mooring-cni/mooring/daemon/model"
)

func clusterText(spec string) string {
	return "apiVersion: policy.networking.k8s.io/v1beta1\nkind: ClusterNetworkPolicy\nmetadata: {name: p}\nspec: " + spec + "\n"
}

func TestClusterPolicyBecomesNoun(t *testing.T) {
	all := &model.Selector{}
	app := &model.Selector{{Key: "app", Operator: model.In, Values: []string{"web"}}}
	objects, problems := parsedText(clusterText(`
  tier: Admin
  priority: 10
  subject: {namespaces: {}}
  ingress:
  - {name: scrape, action: Accept, from: [{pods: {namespaceSelector: {matchLabels: {app: web}}, podSelector: {}}}], protocols: [{tcp: {destinationPort: {number: 80}}}, {udp: {}}, {sctp: {destinationPort: {range: {start: 10, end: 20}}}}, {destinationNamedPort: http}]}
  egress:
  - {action: Deny, to: [{networks: [203.0.113.0/24, "2001:db8::/32"]}, {nodes: {matchLabels: {app: web}}}]}
  - {action: Pass, to: [{namespaces: {}}]}`))
	want := map[string]any{"ClusterNetworkPolicy p": &model.ClusterPolicy{
		Name: "p", Tier: model.AdminTier, Priority: 10, Subject: model.PolicyPeer{NamespaceSelector: all},
		Ingress: []model.ClusterRule{{Name: "scrape", Action: model.Accept, Peers: []model.PolicyPeer{{NamespaceSelector: app, PodSelector: all}}, Ports: []model.PolicyPort{
			{Protocol: model.TCP, Port: 80, EndPort: 80}, {Protocol: model.UDP}, {Protocol: model.SCTP, Port: 10, EndPort: 20}, {Name: "http"},
		}}},
		Egress: []model.ClusterRule{
			{Action: model.Deny, AllPorts: true, Peers: []model.PolicyPeer{
				{IPBlock: &model.IPBlock{CIDR: netip.MustParsePrefix("203.0.113.0/24")}}, {IPBlock: &model.IPBlock{CIDR: netip.MustParsePrefix("2001:db8::/32")}}, {Nodes: app}}},
			{Action: model.Pass, AllPorts: true, Peers: []model.PolicyPeer{{NamespaceSelector: all}}},
		},
	}}
	if diff := cmp.Diff(want, objects, comparers); diff != "" || len(problems) > 0 {
		t.Errorf("policy (-want +got):\n%s\nproblems %q", diff, problems)
	}
}

// As the API asks: an Accept that is not understood accepts nothing, a Deny or
// Pass denies everything, and what is worse is refused.
func TestUnsoundClusterPolicyFailsClosed(t *testing.T) {
	const head = `{tier: Admin, priority: 1, subject: {namespaces: {}}, `
	for _, c := range []struct {
		name, spec, problem string
		refused             bool
	}{
		{"names of domains", head + `egress: [{action: Accept, to: [{domainNames: [example.com]}]}]}`, "names are not resolved", false},
		{"empty peer", head + `egress: [{action: Accept, to: [{}]}]}`, "has to have exactly one of", false},
		{"empty peer of a pass", head + `egress: [{action: Pass, to: [{}]}]}`, "denies everything", false},
		{"empty peer of a deny", head + `egress: [{action: Deny, to: [{}]}]}`, "denies everything", false},
		{"no peers", head + `egress: [{action: Deny, to: []}]}`, "is empty; a rule names whom it is about", false},
		{"two kinds of peer", head + `egress: [{action: Deny, to: [{nodes: {}, networks: [0.0.0.0/0]}]}]}`, "exactly one", false},
		{"network", head + `egress: [{action: Accept, to: [{networks: [0.0.0.0/33]}]}]}`, "is not a CIDR", false},
		{"action", head + `egress: [{action: Allow, to: [{nodes: {}}]}]}`, `"Allow" is not an action`, false},
		{"protocol", head + `egress: [{action: Accept, to: [{nodes: {}}], protocols: [{}]}]}`, "exactly one of tcp", false},
		{"port", head + `egress: [{action: Accept, to: [{nodes: {}}], protocols: [{tcp: {destinationPort: {number: 70000}}}]}]}`, "70000 is not a port", false},
		{"no port", head + `egress: [{action: Accept, to: [{nodes: {}}], protocols: [{tcp: {destinationPort: {}}}]}]}`, "either number or range", false},
		{"range", head + `egress: [{action: Accept, to: [{nodes: {}}], protocols: [{tcp: {destinationPort: {range: {start: 5, end: 4}}}}]}]}`, "5 to 4 is no range", false},
		{"tier", `{tier: Middle, priority: 1, subject: {namespaces: {}}}`, `"Middle" is not a tier`, true},
		{"priority", `{tier: Admin, priority: 1001, subject: {namespaces: {}}}`, "1001 is not a priority", true},
		{"subject", `{tier: Admin, priority: 1, subject: {}}`, "either namespaces or pods", true},
		{"unknown field", head + `egres: []}`, "is not a field of this kind", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			objects, problems := parsedText(clusterText(c.spec))
			if !strings.Contains(strings.Join(problems, "\n"), c.problem) {
				t.Errorf("problems %q, want one with %q", problems, c.problem)
			}
			p, understood := objects["ClusterNetworkPolicy p"].(*model.ClusterPolicy)
			if understood == c.refused {
				t.Fatalf("refused %v, want %v", !understood, c.refused)
			}
			if c.refused {
				return
			}
			rule := p.Egress[0]
			if rule.Action == model.Accept && (len(rule.Peers) > 0 || rule.AllPeers) ||
				rule.Action != model.Accept && !(rule.Action == model.Deny && rule.AllPeers && rule.AllPorts) {
				t.Errorf("rule does not fail closed: %+v", rule)
			}
		})
	}
}
