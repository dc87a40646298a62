//go:build root

// SPDX-License-Identifier: Apache-2.0

package reachability

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/scenario"
)

// asked is a question to `mooring policy explain` and what it has to say.
type asked struct {
	from, to string
	port     uint16
	protocol string
	allowed  bool
}

// answers asks until the answers, of the computation and the programs, are those.
func answers(t *testing.T, n *scenario.Node, questions ...asked) {
	t.Helper()
	client := n.API()
	defer client.Close()
	var got string
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		got = ""
		for _, q := range questions {
			x, err := client.ExplainPolicy(context.Background(), api.PolicyQuestion{From: q.from, To: q.to, Port: q.port, Protocol: q.protocol})
			want := map[bool]string{true: "allowed", false: "denied"}[q.allowed]
			switch {
			case err != nil:
				got += fmt.Sprintf("%v: %v\n", q, err)
			case !x.Agrees:
				got += fmt.Sprintf("%v: computation and programs differ: %+v\n", q, x.Answers)
			case x.Answers[0].Program != want:
				got += fmt.Sprintf("%v: %s\n", q, x.Answers[0].Program)
			}
		}
		if got == "" {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not as wanted:\n%s", got)
		}
	}
}

func problem(t *testing.T, n *scenario.Node, text string) {
	t.Helper()
	client := n.API()
	defer client.Close()
	var problems []string
	netns.Eventually(t, 20*time.Second, fmt.Sprintf("the status says %q", text), func() bool {
		s, err := client.Status(context.Background())
		problems = s.Problems
		return err == nil && strings.Contains(strings.Join(problems, "\n"), text)
	})
}

func TestBadInputIsRightOrRefusedAndNeverSilentlyOpen(t *testing.T) {
	n := scenario.NewNode(t)
	pod := func(name, ports string) string {
		return labelled(name) + fmt.Sprintf("spec: {containers: [{name: c, image: c, ports: [%s]}]}\n", ports)
	}
	n.Write("pods.yaml", pod("client", "")+
		pod("web", "{name: http, containerPort: 8080}")+
		pod("other", "{name: http, containerPort: 9090}, {name: dns, containerPort: 8080, protocol: UDP}")+
		pod("names", "{name: dns, containerPort: 53}, {name: dns, containerPort: 53, protocol: UDP}"))
	n.Up()
	for _, name := range []string{"client", "web", "other", "names"} {
		n.AddPod(name)
	}
	policy := func(spec string) string {
		return "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: default}\nspec: " + spec + "\n"
	}
	const client, web, other, outside = "default/client", "default/web", "default/other", "203.0.113.9"
	cases := 0
	for _, c := range []struct {
		name, spec, problem string
		questions           []asked
	}{
		{"a block that is none", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/33}}]}]}`, `"203.0.113.0/33" is not a CIDR`,
			[]asked{{client, web, 8080, "TCP", false}, {outside, web, 8080, "TCP", false}}},
		{"an address for a block", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 203.0.113.9}}]}]}`, `"203.0.113.9" is not a CIDR`,
			[]asked{{outside, web, 8080, "TCP", false}}},
		{"IPv4 as IPv6", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: "::ffff:203.0.113.0/120"}}]}]}`, `is an IPv4 block in IPv6 notation`,
			[]asked{{outside, web, 8080, "TCP", false}}},
		{"an exception outside of its block", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/24, except: [198.51.100.0/25]}}]}]}`, `198.51.100.0/25 is not inside 203.0.113.0/24`,
			[]asked{{outside, web, 8080, "TCP", false}}},
		{"an exception of the other family", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/24, except: ["2001:db8::/64"]}}]}]}`, `2001:db8::/64 is not inside 203.0.113.0/24`,
			[]asked{{outside, web, 8080, "TCP", false}}},
		{"a bad peer beside a good one", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: x}}, {podSelector: {matchLabels: {app: client}}}]}]}`, `"x" is not a CIDR`,
			[]asked{{client, web, 8080, "TCP", true}, {outside, web, 8080, "TCP", false}}},
		{"a block with host bits", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 203.0.113.77/24}}]}]}`, "",
			[]asked{{outside, web, 8080, "TCP", true}, {"198.51.100.1", web, 8080, "TCP", false}}},
		{"what was good and has a field that is unknown now", `{podSelector: {}, ingress: [{form: []}]}`, `spec.ingress[0].form: is not a field of this kind`,
			[]asked{{outside, web, 8080, "TCP", true}, {"198.51.100.1", web, 8080, "TCP", false}, {client, web, 8080, "TCP", false}}},
		{"a name that is another port in each pod, in ingress", `{podSelector: {}, ingress: [{ports: [{port: http}]}]}`, "",
			[]asked{{client, web, 8080, "TCP", true}, {client, web, 9090, "TCP", false}, {client, other, 9090, "TCP", true}, {client, other, 8080, "TCP", false}, {client, "default/names", 8080, "TCP", false}}},
		{"the same in egress", `{podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: [{ports: [{port: http}]}]}`, "",
			[]asked{{client, web, 8080, "TCP", true}, {client, web, 9090, "TCP", false}, {client, other, 9090, "TCP", true}, {client, other, 8080, "TCP", false}, {client, outside, 8080, "TCP", false}}},
		{"a name that is another protocol in another pod", `{podSelector: {}, ingress: [{ports: [{port: dns}]}]}`, "",
			[]asked{{client, other, 8080, "UDP", false}, {client, other, 8080, "TCP", false}, {client, "default/names", 53, "TCP", true}, {client, "default/names", 53, "UDP", false}}},
		{"a name that nobody has", `{podSelector: {}, ingress: [{ports: [{port: nothing}]}]}`, "",
			[]asked{{client, web, 8080, "TCP", false}}},
		{"SCTP only", `{podSelector: {}, ingress: [{ports: [{protocol: SCTP, port: 8080}]}]}`, "",
			[]asked{{client, web, 8080, "SCTP", true}, {client, web, 8081, "SCTP", false}, {client, web, 8080, "TCP", false}, {client, web, 8080, "UDP", false}, {client, web, 0, "ICMP", false}}},
		{"SCTP without a port", `{podSelector: {}, ingress: [{ports: [{protocol: SCTP}]}]}`, "",
			[]asked{{client, web, 8081, "SCTP", true}, {client, web, 8080, "TCP", false}}},
		{"a protocol that is none", `{podSelector: {}, ingress: [{ports: [{protocol: QUIC, port: 8080}]}]}`, `"QUIC" is not a protocol`,
			[]asked{{client, web, 8080, "TCP", false}, {client, web, 8080, "UDP", false}}},
		{"a range that ends before it begins", `{podSelector: {}, ingress: [{ports: [{port: 8080, endPort: 80}]}]}`, `80 is below port 8080`,
			[]asked{{client, web, 8080, "TCP", false}, {client, web, 80, "TCP", false}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			cases++
			marker := fmt.Sprintf("case-%d", cases)
			n.Write("policy.yaml", policy(c.spec)+"---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: "+marker+", namespace: nobody}\nspec: {podSelector: {}}\n")
			enforces(t, n, marker)
			if c.problem != "" {
				problem(t, n, c.problem)
			}
			answers(t, n, c.questions...)
		})
	}

	t.Run("ten thousand blocks in one list", func(t *testing.T) {
		var blocks []string
		for i := range 10_000 { // every other address of 100.64.0.0/17
			blocks = append(blocks, fmt.Sprintf("{ipBlock: {cidr: 100.64.%d.%d/32}}", i>>7, i<<1&0xff))
		}
		began := time.Now()
		n.Write("policy.yaml", policy("{podSelector: {matchLabels: {app: web}}, ingress: [{from: ["+strings.Join(blocks, ", ")+"]}]}"))
		answers(t, n,
			asked{"100.64.0.0", web, 8080, "TCP", true}, asked{"100.64.78.30", web, 8080, "TCP", true},
			asked{"100.64.0.1", web, 8080, "TCP", false}, asked{"100.64.78.31", web, 8080, "TCP", false},
			asked{"100.64.78.32", web, 8080, "TCP", false}, asked{client, web, 8080, "TCP", false}, asked{client, other, 8080, "TCP", true})
		t.Logf("in the datapath %v after the file was written", time.Since(began))
	})
}

func TestExplainFailsWhereTheProgramsAndTheComputationDiffer(t *testing.T) {
	n := scenario.NewNode(t)
	n.Write("pods.yaml", labelled("web")+labelled("friend"))
	n.Write("policy.yaml", onlyFriends)
	n.Up()
	n.AddPod("web")
	n.AddPod("friend")
	answers(t, n, asked{"default/friend", "default/web", 8080, "TCP", true})
	explain := []string{"policy", "explain", "--from", "default/friend", "--to", "default/web", "--port", "8080/TCP"}
	if out, err := n.Mooring(explain...); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	// Somebody else wrote into the daemon's maps.
	err := openMaps(n.BPFFS, false, func(name string, m *ebpf.Map) error {
		if name != "mooring_verdicts" {
			return nil
		}
		var keys [][]byte
		var key, value []byte
		entries := m.Iterate()
		for entries.Next(&key, &value) {
			keys = append(keys, append([]byte(nil), key...))
		}
		for _, key := range keys {
			if err := m.Delete(key); err != nil {
				return err
			}
		}
		return entries.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	out, err := n.Mooring(explain...)
	if err == nil {
		t.Errorf("explain succeeds:\n%s", out)
	}
	for _, want := range []string{"computed  allowed", "program   denied"} {
		if !strings.Contains(out, want) {
			t.Errorf("explain does not say %q:\n%s", want, out)
		}
	}
}
