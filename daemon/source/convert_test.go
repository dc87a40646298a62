// SPDX-License-Identifier: Apache-2.0

package source

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mooring-cni/mooring/daemon/model"
)

var comparers = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

// parsedText gives the objects and the problems of a file's content.
func parsedText(content string) (map[string]any, []string) {
	objects := make(map[string]any)
	var problems []string
	f := &manifest{parsed: parse("test.yaml", []byte(content), nil)}
	for _, document := range f.parsed.documents {
		for _, o := range document.objects {
			objects[o.key.String()] = o.value
			if o.refused {
				objects[o.key.String()] = "refused"
			}
		}
	}
	for _, p := range f.list("") {
		problems = append(problems, p.String())
	}
	return objects, problems
}

// The services and slices that may go wrong are in daemon/service/testdata,
// with what is left of them.
func TestPodNamespaceAndNodeBecomeNouns(t *testing.T) {
	objects, problems := parsedText(`
apiVersion: v1
kind: Pod
metadata: {name: web-1, uid: 1-2-3, labels: {app: web}}
spec:
  nodeName: node-a
  hostNetwork: true
  initContainers:
  - name: done
    ports: [{name: init, containerPort: 1}]
  - name: sidecar
    restartPolicy: Always
    ports: [{name: metrics, containerPort: 9090}]
  containers:
  - name: web
    ports:
    - {name: http, containerPort: 8080, hostPort: 80}
    - {name: dns, containerPort: 53, protocol: UDP}
    - {name: bad, containerPort: 70000}
    - {name: worse, containerPort: x}
status:
  podIPs: [{ip: 10.244.0.5}, {ip: "fd00:10:244::5"}, {ip: nowhere}]
---
apiVersion: v1
kind: Pod
metadata: {name: done}
status: {phase: Succeeded, podIP: 10.244.0.6}
---
apiVersion: v1
kind: Pod
metadata: {name: number, labels: {version: 1}}
---
apiVersion: v1
kind: Namespace
metadata: {name: prod, labels: {env: prod}}
---
apiVersion: v1
kind: Node
metadata: {name: node-a, labels: {topology.kubernetes.io/zone: a}}
spec: {podCIDRs: [10.244.0.0/24, "fd00:10:244::/64", 10.244.0.0]}
status:
  addresses:
  - {type: Hostname, address: node-a}
  - {type: ExternalIP, address: 203.0.113.1}
  - {type: InternalIP, address: 192.0.2.1}
  - {type: InternalIP, address: 192.0.2.256}
`)
	want := map[string]any{
		"Pod default/web-1": &model.Pod{
			Name: model.Name{Namespace: "default", Name: "web-1"}, UID: "1-2-3", Labels: map[string]string{"app": "web"}, NodeName: "node-a", HostNetwork: true,
			IPs: []netip.Addr{netip.MustParseAddr("10.244.0.5"), netip.MustParseAddr("fd00:10:244::5")},
			Ports: []model.ContainerPort{
				{Name: "http", Protocol: model.TCP, Port: 8080, HostPort: 80}, {Name: "dns", Protocol: model.UDP, Port: 53},
				{Name: "metrics", Protocol: model.TCP, Port: 9090},
			},
		},
		"Pod default/done":   &model.Pod{Name: model.Name{Namespace: "default", Name: "done"}},
		"Pod default/number": "refused",
		"Namespace prod":     &model.Namespace{Name: "prod", Labels: map[string]string{"env": "prod", "kubernetes.io/metadata.name": "prod"}},
		"Node node-a": &model.Node{
			Name: "node-a", Zone: "a", Labels: map[string]string{"topology.kubernetes.io/zone": "a"},
			Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("203.0.113.1")},
			PodCIDRs:  []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24"), netip.MustParsePrefix("fd00:10:244::/64")},
		},
	}
	if diff := cmp.Diff(want, objects, comparers); diff != "" {
		t.Errorf("objects (-want +got):\n%s", diff)
	}
	wantProblems := []string{
		`document 1: Pod default/web-1: spec.containers[0].ports[3].containerPort: is the text "x", want a whole number, without quotes`,
		`document 1: Pod default/web-1: status.podIPs[2].ip: "nowhere" is not an IP address`,
		`document 1: Pod default/web-1: spec.containers[0].ports[2].containerPort: 70000 is not a port; want 1 to 65535`,
		`document 3: Pod default/number: metadata.labels[version]: is the number 1, want text: "1", with quotes`,
		`document 5: Node node-a: status.addresses[3].address: "192.0.2.256" is not an IP address`,
		`document 5: Node node-a: spec.podCIDRs[2]: "10.244.0.0" is not a CIDR such as 203.0.113.0/24 or 2001:db8::/32`,
	}
	if diff := cmp.Diff(wantProblems, problems); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
}

func policyText(spec string) string {
	return "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec: " + spec + "\n"
}

func TestPolicyBecomesNoun(t *testing.T) {
	everyone, number := model.PolicyRule{AllPeers: true, AllPorts: true}, func(n uint16) model.PolicyPort {
		return model.PolicyPort{Protocol: model.TCP, Port: n, EndPort: n}
	}
	in := func(key, value string) model.Requirement {
		return model.Requirement{Key: key, Operator: model.In, Values: []string{value}}
	}
	app := model.Selector{in("app", "web")}
	for _, c := range []struct {
		name, spec string
		want       model.Policy
	}{
		{"default is ingress", `{podSelector: {}}`, model.Policy{PodSelector: model.Selector{}, Ingress: true}},
		{"egress by its rules", `{podSelector: {}, egress: [{}]}`, model.Policy{PodSelector: model.Selector{}, Ingress: true, Egress: true, EgressRules: []model.PolicyRule{everyone}}},
		{"named types", `{podSelector: {}, policyTypes: [Egress], ingress: [{}]}`, model.Policy{PodSelector: model.Selector{}, Egress: true}},
		{
			"selectors", `{podSelector: {matchLabels: {app: web}, matchExpressions: [{key: tier, operator: NotIn, values: [b, a]}, {key: x, operator: Exists}]}}`,
			model.Policy{PodSelector: model.Selector{in("app", "web"), {Key: "tier", Operator: model.NotIn, Values: []string{"a", "b"}}, {Key: "x", Operator: model.Exists}}, Ingress: true},
		},
		{
			"peers", `{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}, {namespaceSelector: {}}, {podSelector: {}, namespaceSelector: {matchLabels: {app: web}}}, {ipBlock: {cidr: 203.0.113.7/24, except: [203.0.113.128/25]}}]}]}`,
			model.Policy{PodSelector: model.Selector{}, Ingress: true, IngressRules: []model.PolicyRule{{AllPorts: true, Peers: []model.PolicyPeer{
				{PodSelector: &app}, {NamespaceSelector: &model.Selector{}}, {PodSelector: &model.Selector{}, NamespaceSelector: &app},
				{IPBlock: &model.IPBlock{CIDR: netip.MustParsePrefix("203.0.113.0/24"), Except: []netip.Prefix{netip.MustParsePrefix("203.0.113.128/25")}}},
			}}}},
		},
		{
			"ports", `{podSelector: {}, ingress: [{ports: [{port: 80}, {port: 80, endPort: 90, protocol: UDP}, {port: http}, {protocol: SCTP}]}]}`,
			model.Policy{PodSelector: model.Selector{}, Ingress: true, IngressRules: []model.PolicyRule{{AllPeers: true, Ports: []model.PolicyPort{
				number(80), {Protocol: model.UDP, Port: 80, EndPort: 90}, {Protocol: model.TCP, Name: "http"}, {Protocol: model.SCTP},
			}}}},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			objects, problems := parsedText(policyText(c.spec))
			c.want.Name = model.Name{Namespace: "default", Name: "p"}
			if diff := cmp.Diff(map[string]any{"NetworkPolicy default/p": &c.want}, objects, comparers); diff != "" {
				t.Errorf("policy (-want +got):\n%s\nproblems %q", diff, problems)
			}
		})
	}
}

// Whatever is wrong with a policy, it never allows more than was written.
func TestUnsoundPolicyAllowsLessOrIsRefused(t *testing.T) {
	for _, c := range []struct {
		name, spec string
		refused    bool
		problem    string
	}{
		{"bad block", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/33}}]}]}`, false, `spec.ingress[0].from[0].ipBlock.cidr: "203.0.113.0/33" is not a CIDR`},
		{"bad exception", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/24, except: [x]}}]}]}`, false, `spec.ingress[0].from[0].ipBlock.except[0]: "x" is not a CIDR`},
		{"exception outside", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/24, except: [192.0.2.0/25]}}]}]}`, false, `except[0]: 192.0.2.0/25 is not inside 203.0.113.0/24`},
		{"exception around", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/24, except: [203.0.0.0/16]}}]}]}`, false, `is not inside`},
		{"block and selector", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/24}, podSelector: {}}]}]}`, false, `spec.ingress[0].from[0]: has ipBlock beside a selector`},
		{"empty peer", `{podSelector: {}, ingress: [{from: [{}]}]}`, false, `spec.ingress[0].from[0]: is empty`},
		{"operator of a peer", `{podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: [{key: a, operator: Is}]}}]}]}`, false, `matchExpressions[0].operator: "Is" is not an operator`},
		{"In without values", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: a, operator: In}]}}]}]}`, false, `values: is empty; In needs a value`},
		{"Exists with values", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}]}]}`, false, `Exists takes no values`},
		{"protocol", `{podSelector: {}, ingress: [{ports: [{protocol: ICMP}]}]}`, false, `spec.ingress[0].ports[0].protocol: "ICMP" is not a protocol`},
		{"port", `{podSelector: {}, ingress: [{ports: [{port: 0}]}]}`, false, `spec.ingress[0].ports[0].port: 0 is not a port`},
		{"port name", `{podSelector: {}, ingress: [{ports: [{port: "80"}]}]}`, false, `"80" is neither a port nor a port's name`},
		{"end before start", `{podSelector: {}, ingress: [{ports: [{port: 80, endPort: 79}]}]}`, false, `endPort: 79 is below port 80`},
		{"end without start", `{podSelector: {}, ingress: [{ports: [{endPort: 79}]}]}`, false, `endPort: 79 has no port to start from`},
		{"range of a name", `{podSelector: {}, ingress: [{ports: [{port: http, endPort: 79}]}]}`, false, `endPort: 79 cannot end a range`},
		{"selector of the policy", `{podSelector: {matchExpressions: [{key: a, operator: Is}]}, ingress: [{}]}`, true, `spec.podSelector.matchExpressions[0].operator`},
		{"label", `{podSelector: {matchLabels: {"no label": x}}, ingress: [{}]}`, true, `"no label" is not a label`},
		{"direction", `{podSelector: {}, policyTypes: [Sideways], ingress: [{}]}`, true, `spec.policyTypes[0]: "Sideways" is not a direction`},
		{"misspelt from", `{podSelector: {}, ingress: [{form: [{podSelector: {}}]}]}`, true, `spec.ingress[0].form: is not a field of this kind`},
		{"from of the wrong type", `{podSelector: {}, ingress: [{from: {podSelector: {}}}]}`, true, `spec.ingress[0].from: is an object, want a list`},
		{"label of the wrong type", `{podSelector: {matchLabels: {version: 1}}, ingress: [{}]}`, true, `spec.podSelector.matchLabels[version]: is the number 1, want text`},
		{"key twice", `{podSelector: {}, ingress: [{from: [{podSelector: {}}], from: []}]}`, true, `key "from" occurs twice`},
	} {
		t.Run(c.name, func(t *testing.T) {
			objects, problems := parsedText(policyText(c.spec))
			switch p := objects["NetworkPolicy default/p"].(type) {
			case string:
				if !c.refused {
					t.Errorf("policy is %s", p)
				}
			case *model.Policy:
				if c.refused {
					t.Errorf("policy is not refused: %+v", p)
				}
				rule := p.IngressRules[0]
				if !(rule.AllPeers || len(rule.Peers) == 0) || !(rule.AllPorts || len(rule.Ports) == 0) || rule.AllPeers && rule.AllPorts {
					t.Errorf("rule still allows something: %+v", rule)
				}
			default:
				t.Errorf("no policy: %v", objects)
			}
			if !strings.Contains(strings.Join(problems, "\n"), c.problem) {
				t.Errorf("problems %q do not say %q", problems, c.problem)
			}
		})
	}
}

func TestDocumentsThatCannotBeUsedSaySo(t *testing.T) {
	for _, c := range []struct{ name, content, problem string }{
		{"not YAML", "a: b\nc: [d", "document 1: is not YAML: line 2 of the document: did not find expected ',' or ']'"},
		{"a tab", "a:\n\tb: c", "document 1: is not YAML: line 2 of the document: found character that cannot start any token"},
		{"not JSON and not YAML", `{"a": "b"`, "document 1: is not YAML: "},
		{"text", "hello", "document 1: is text, not an object with apiVersion and kind"},
		{"a list", "[1, 2]", "document 1: is a list, not an object with apiVersion and kind"},
		{"no kind", "apiVersion: v1\nmetadata: {name: web}", "document 1: default/web: kind: is missing or not text"},
		{"kind of the wrong type", "apiVersion: v1\nkind: [Service]\nmetadata: {name: web}", "document 1: default/web: kind: is missing or not text"},
		{"no apiVersion", "kind: Service\nmetadata: {name: web}", "document 1: Service default/web: apiVersion: is missing or not text; want v1 for Service"},
		{"other apiVersion", "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {name: web}", "document 1: EndpointSlice default/web: apiVersion: discovery.k8s.io/v1beta1 is not read, the object is left out; want discovery.k8s.io/v1 for EndpointSlice"},
		{"no name", "apiVersion: v1\nkind: Service", "document 1: Service: metadata.name: is missing or not text"},
		{"no such name", "apiVersion: v1\nkind: Service\nmetadata: {name: My_Service}", `document 1: Service default/My_Service: metadata.name: "My_Service" is not a name: a lowercase RFC 1123 subdomain`},
		{"unknown kind", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}", "document 1: Deployment default/web: kind: Deployment (apps/v1) is not read, the object is left out; Mooring reads Service, Pod, Namespace"},
		{"in a list", "apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: Secret, metadata: {name: s}}, 5, null]", "document 1: Secret default/s: kind: Secret (v1) is not read"},
		{"number in a list", "apiVersion: v1\nkind: List\nitems: [5]", "document 1: List items[0]: is a number, not an object"},
		{"nothing in a list", "apiVersion: v1\nkind: List\nitems: [null]", "document 1: List items[0]: is empty"},
		{"no list", "apiVersion: v1\nkind: List\nitems: {a: b}", "document 1: items: is an object, want a list"},
		{"list of another version", "apiVersion: v2\nkind: ServiceList", `document 1: ServiceList: apiVersion: is "v2"; want v1 for ServiceList`},
		{"infinite", "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nx: .inf", "document 1: has the value +Inf, which objects of the API cannot have"},
		{"strange key", "apiVersion: v1\n[a, b]: c", "document 1: "},
		{"key twice", "apiVersion: v1\nkind: Namespace\nmetadata: {name: web}\nmetadata: {name: web2}", `document 1: Namespace web2: key "metadata" occurs twice, again in line 4 of the document; the last one counts`},
		{"key twice in a list", "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Namespace\n  kind: Namespace\n  metadata: {name: web}", `document 1: Namespace web: key "kind" occurs twice, again in line 3 of the item`},
		{"broken list", "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: [\n- x", `document 1: is not YAML: line `},
		{"large document", "a: \"" + strings.Repeat("x", maxYAML) + "\"", "document 1: is larger than 8 MiB and is not read"},
		{"large list with a broken item", "apiVersion: v1\nkind: List\nitems:\n- x: \"" + strings.Repeat("x", maxYAML) + "\"\n- a: [\n", "document 1: List items[1]: is not YAML: line 1 of the item"},
		{"second document", "apiVersion: v1\nkind: Namespace\nmetadata: {name: web}\n---\n# nothing\n---\nx: [", "document 2: is not YAML"},
		{"spec of the wrong type", "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: 5", "document 1: Service default/web: spec: is the number 5, want an object"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, problems := parsedText(c.content)
			if !strings.Contains(strings.Join(problems, "\n"), c.problem) {
				t.Errorf("problems %q do not say %q", problems, c.problem)
			}
		})
	}
}

func TestFilesAreCutIntoDocumentsAsYAMLDoes(t *testing.T) {
	namespace := func(name string) string { return "apiVersion: v1\nkind: Namespace\nmetadata: {name: " + name + "}\n" }
	list := `{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"a"}},{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"b"}}]}`
	for name, content := range map[string]string{
		"separator":             namespace("a") + "---\n" + namespace("b"),
		"separators around":     "---\n" + namespace("a") + "---\n---\n# c\n---\n" + namespace("b") + "---\n",
		"comment on separator":  namespace("a") + "--- # next\n" + namespace("b"),
		"content on separator":  "--- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n---\n" + namespace("b"),
		"end marker":            namespace("a") + "...\n" + namespace("b"),
		"carriage returns":      strings.ReplaceAll(namespace("a")+"---\n"+namespace("b"), "\n", "\r\n"),
		"byte order mark":       "\xef\xbb\xbf" + namespace("a") + "---\n" + namespace("b"),
		"no newline at the end": namespace("a") + "---\n" + strings.TrimSpace(namespace("b")),
		"dashes in text":        "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, annotations: {x: \"---\", y: a---b}}\n---\n" + namespace("b"),
		"dashes in a block":     "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: a\n  annotations:\n    x: |\n      ---\n      y\n---\n" + namespace("b"),
		"list":                  list,
		"list in YAML":          "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n- {apiVersion: v1, kind: Namespace, metadata: {name: b}}",
		"list that goes on":     "apiVersion: v1\nitems:\n# c\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: a}\n\n# c\n- {apiVersion: v1, kind: Namespace, metadata: {name: b}}\nkind: List\nmetadata:\n  resourceVersion: \"\"\n",
		"list with an indent":   "kind: List\napiVersion: v1\nitems:\n  - apiVersion: v1\n    kind: Namespace\n    metadata:\n      name: a\n      annotations:\n        x: |\n          - a\n          items:\n  -\n    apiVersion: v1\n    kind: Namespace\n    metadata: {name: b}\n",
		"list with open quotes": "kind: List\napiVersion: v1\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: a, annotations: {x: \"\n- y\"}}}\n- {apiVersion: v1, kind: Namespace, metadata: {name: b}}\n",
		"shared anchors":        "kind: List\napiVersion: v1\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: a, labels: &l {x: one}}}\n- {apiVersion: v1, kind: Namespace, metadata: {name: b, labels: *l}}\n",
		"typed list":            "apiVersion: v1\nkind: NamespaceList\nitems:\n- metadata: {name: a}\n- metadata: {name: b}",
		"list of lists":         `{"apiVersion":"v1","kind":"List","items":[` + list + `]}`,
		"JSON documents":        `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"a"}} {"apiVersion":"v1","kind":"Namespace","metadata":{"name":"b"}}`,
		"flow style":            "{apiVersion: v1, kind: Namespace, metadata: {name: a}}\n---\n" + namespace("b"),
		"anchors":               "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: a, labels: &l {x: one}}}\n- {apiVersion: v1, kind: Namespace, metadata: {name: b, labels: {<<: *l, z: two}}}",
	} {
		t.Run(name, func(t *testing.T) {
			objects, problems := parsedText(content)
			if len(problems) > 0 || len(objects) != 2 || objects["Namespace a"] == nil || objects["Namespace b"] == nil {
				t.Errorf("objects %v, problems %q", objects, problems)
			}
		})
	}
}

func TestItemsOfAListThatDidNotChangeAreNotReadAgain(t *testing.T) {
	yaml := "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: a}\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: b}\n"
	json := `{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"a"}},{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"b"}}]}`
	for _, content := range []string{yaml, json} {
		before := parse("x", []byte(content), nil)
		after := parse("x", []byte(strings.Replace(content, "b", "c", 1)), before)
		after = parse("x", []byte(content), after)
		if p := before.documents[0].objects; len(p) != 2 || p[0].value != after.documents[0].objects[0].value || p[1].value == after.documents[0].objects[1].value {
			t.Errorf("objects before %v, after %v", p, after.documents[0].objects)
		}
	}
}

func TestOneBadFileDoesNotFloodTheProblems(t *testing.T) {
	var content strings.Builder
	for i := range 500 {
		fmt.Fprintf(&content, "---\napiVersion: v1\nkind: Secret\nmetadata: {name: s%d}\n", i)
	}
	_, problems := parsedText(content.String())
	if len(problems) > maxFileProblems+2 || !strings.Contains(problems[len(problems)-1], "more problems; mend those listed first") {
		t.Errorf("%d problems, the last is %q", len(problems), problems[len(problems)-1])
	}
}

func TestNodeThatIsToGoIsLeaving(t *testing.T) {
	now := metav1.Now()
	taint := func(key string) corev1.NodeSpec {
		return corev1.NodeSpec{Taints: []corev1.Taint{{Key: key, Effect: corev1.TaintEffectNoSchedule}}}
	}
	for name, c := range map[string]struct {
		node corev1.Node
		want bool
	}{
		"a node":                      {corev1.Node{}, false},
		"cordoned":                    {corev1.Node{Spec: taint("node.kubernetes.io/unschedulable")}, false},
		"chosen by the autoscaler":    {corev1.Node{Spec: taint("ToBeDeletedByClusterAutoscaler")}, true},
		"deleted, and not let go yet": {corev1.Node{ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &now}}, true},
	} {
		if got := convertNode(&c.node, &report{}).Leaving; got != c.want {
			t.Errorf("%s: leaving %v", name, got)
		}
	}
}
