// SPDX-License-Identifier: Apache-2.0

package source

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	yamlv2 "go.yaml.in/yaml/v2"
	"golang.org/x/tools/txtar"
	strictjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/mooring-cni/mooring/daemon/model"
)

// FuzzManifest: whatever a file holds, reading it ends without panic, says what
// is wrong wherever it takes less than all, and lets only sound nouns pass.
func FuzzManifest(f *testing.F) {
	for _, content := range seeds(f) {
		f.Add(content)
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		p := parse("fuzz.yaml", content, nil)
		for _, document := range p.documents {
			if document.malformed && len(document.problems) == 0 {
				t.Error("a document is malformed but has no problem")
			}
			for _, o := range document.objects {
				if o.refused && (o.value != nil || len(document.problems) == 0) {
					t.Errorf("%s is refused without reason, or used nevertheless", o.key)
				}
				checkNoun(t, o)
			}
		}
		again := parse("fuzz.yaml", content, p)
		for i := range again.documents {
			if again.documents[i] != p.byHash[hashOf(p, again.documents[i])] {
				t.Error("the same document is read twice")
			}
		}
	})
}

// FuzzList: a list that is read item by item holds what it holds as a whole.
func FuzzList(f *testing.F) {
	for _, content := range []string{
		"apiVersion: v1\nitems:\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: a}\n- {apiVersion: v1, kind: Namespace, metadata: {name: b}}\nkind: List\n",
		"kind: NodeList\napiVersion: v1\nitems:\n  # c\n  - metadata:\n      name: a\n      annotations:\n        x: |\n          - a\n          items:\n\n  - metadata: {name: b, annotations: {x: \"\n  - y\"}}\n  -\n",
	} {
		f.Add([]byte(content))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		var parts, whole document
		if !parts.parseYAMLList("fuzz.yaml", content, nil) {
			return
		}
		text, err := yamlToJSON(content, "document")
		if err != nil {
			t.Fatalf("the list cannot be read as a whole: %v", err)
		}
		whole.parseObject("fuzz.yaml", text, "", nil)
		if diff := cmp.Diff(objectsOf(&whole), objectsOf(&parts), comparers); diff != "" {
			t.Errorf("from %q (-whole +parts):\n%s", content, diff)
		}
	})
}

func objectsOf(d *document) map[string]any {
	objects := make(map[string]any)
	for _, o := range d.objects {
		objects[o.key.String()] = o.value
	}
	return objects
}

func hashOf(p *parsed, d *document) uint64 {
	for hash, other := range p.byHash {
		if other == d {
			return hash
		}
	}
	return 0
}

// FuzzYAMLToJSON: our writer and that of sigs.k8s.io/yaml, which kubectl uses,
// mean the same.
func FuzzYAMLToJSON(f *testing.F) {
	for _, content := range seeds(f) {
		f.Add(content)
	}
	for _, content := range []string{"a: 1e3", "a: 0x1f", "a: yes", "1: a\ntrue: b\n1.5: c", "a: 2001-01-01", "a: !!binary aGk=", "a: 12345678901234567890", "a: -1", "a: \"\\u00e4\\u2028<>\"", "a: .nan", "a: ~"} {
		f.Add([]byte(content))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		want, err := yaml.YAMLToJSON(content)
		if err != nil {
			return
		}
		var tree any
		if err := yamlv2.Unmarshal(content, &tree); err != nil {
			t.Fatalf("sigs.k8s.io/yaml reads it, we do not: %v", err)
		}
		got, err := appendJSON(nil, tree)
		if err != nil {
			t.Fatalf("sigs.k8s.io/yaml writes it, we do not: %v", err)
		}
		var wantTree, gotTree any
		if err := json.Unmarshal(want, &wantTree); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(got, &gotTree); err != nil {
			t.Fatalf("%s: %v", got, err)
		}
		if diff := cmp.Diff(wantTree, gotTree); diff != "" {
			t.Errorf("from %q (-sigs.k8s.io/yaml +ours):\n%s", content, diff)
		}
	})
}

// FuzzPlain: what the quick reader takes, YAML reads without a complaint and to
// the same.
func FuzzPlain(f *testing.F) {
	for _, content := range seeds(f) {
		for _, part := range split(content) {
			f.Add(part)
		}
	}
	for _, content := range plainTexts {
		f.Add([]byte(content))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		for _, part := range []string{"document", "item"} {
			if text, ok := plainToJSON(content, part); ok {
				checkPlain(t, content, text, part)
			}
		}
	})
}

func checkPlain(t *testing.T, content []byte, text jsonText, part string) {
	t.Helper()
	got := text.all
	var tree any
	if err := yamlv2.UnmarshalStrict(content, &tree); err != nil {
		t.Fatalf("from %q, which we read as %s: %v", content, got, err)
	}
	if part == "item" {
		list, ok := tree.([]any)
		if !ok || len(list) != 1 {
			t.Fatalf("%q is not an item, we read it as %s", content, got)
		}
		tree = list[0]
	}
	want, err := appendJSON(nil, tree)
	if err != nil {
		t.Fatalf("from %q, which we read as %s: %v", content, got, err)
	}
	if diff := cmp.Diff(jsonTree(t, want), jsonTree(t, got)); diff != "" {
		t.Errorf("from %q (-YAML +ours):\n%s", content, diff)
	}
	var whole, head head
	wholeErr := strictjson.UnmarshalCaseSensitivePreserveInts(text.all, &whole)
	headErr := strictjson.UnmarshalCaseSensitivePreserveInts(text.head, &head)
	if diff := cmp.Diff(whole, head); diff != "" || (wholeErr == nil) != (headErr == nil) {
		t.Errorf("from %q the head is %s, %v and %v:\n%s", content, text.head, wholeErr, headErr, diff)
	}
}

func jsonTree(t *testing.T, text []byte) (tree any) {
	t.Helper()
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	if err := decoder.Decode(&tree); err != nil {
		t.Fatalf("%s is not JSON: %v", text, err)
	}
	return tree
}

// plainTexts are what the quick reader has to tell apart.
var plainTexts = []string{
	"---\na: b\n# c\nd:\n- e\n-   f: 1\n    g: {h: [i, 'j k', \"l\"], m: {}}\n  \n-\n- \no:\n    p: q # r\n",
	"- a: 1\n  b:\n  - c\n  - d: e\n    f:\n      - g\n",
	"a: 10.244.0.1\nb: 007\nc: 1e3\nd: 2001-01-01\ne: 12345678901234567890\nf: 0x1f\ng: 10.0.0.0/8\nh: fd00:10::1\ni: 2001:db8::1\nj: 100m\nk: 1_000\nl: 3f2504e0-4f89-11d3-9a0c-0305e82c3301\nm: 1.5\nn: 0b1\n",
	"a: yes\nb: null\nc: ~\nd: True\ne: true\nf: 'true'\ng: \"1\"\nh: .inf\ni: y\n",
	"a: b\n  c\n", "a: b\nc\n", "a:\n    b: 1\n  c: 2\n", "a: b: c\n", "a: b #c\n", "a: b#c\n", "a: 'b'#c\n", "a: [b]c\n", "a: \"b\\n\"\n", "a: 'b''c'\n",
	"a: 1\na: 2\n", "a: {b: 1, b: 2}\n", "{a: b}\n", "a: [b, c,]\n", "a: [b: c]\n", "a: {b, c}\n", "a: {b:c}\n", "a: [fd00::, ::1]\n", "a: [fd00::1, a:]\n",
	"a: |\n  b\n", "a: >-\n  b\n", "a: &b c\nd: *b\n", "<<: {a: b}\n", "? a\n: b\n", "a: !!str 1\n", "%YAML 1.1\n---\na: b\n", "a:\n- b\nc: d\n", "a:\n  - b\n- c\n", "- - a\n", "a: -\n", "a: - b\n", "a:\n\n  # c\n  b: 1\n",
	"a: 5:30\nb: /x/y\nc: _1\nd: b- c\ne: a, [b] {c}\n", "a : b\n", "\"a\": b\n", "a: b\n---\nc: d\n", "a: b\n...\n", "a:\tb\n", "a: [b\n]\n",
}

func seeds(f *testing.F) [][]byte {
	f.Helper()
	files, err := filepath.Glob("../service/testdata/*.txtar")
	if err != nil || len(files) == 0 {
		f.Fatalf("golden files: %v, %v", files, err)
	}
	var contents [][]byte
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		for _, part := range txtar.Parse(text).Files {
			if strings.HasSuffix(part.Name, ".yaml") {
				contents = append(contents, part.Data)
			}
		}
	}
	return append(contents,
		[]byte(policyText(`{podSelector: {matchExpressions: [{key: a, operator: In, values: [b]}]}, policyTypes: [Ingress, Egress], ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}], ports: [{port: 80, endPort: 90}]}], egress: [{to: [{namespaceSelector: {}}]}]}`)),
		[]byte(`{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Node","metadata":{"name":"n"},"spec":{"podCIDRs":["10.244.0.0/24"]},"status":{"addresses":[{"type":"InternalIP","address":"192.0.2.1"}]}},5]}`),
		[]byte("apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {a: 1}}\nspec: {containers: [{name: c, ports: [{containerPort: x}]}]}\nstatus: {podIPs: [{ip: 10.244.0.5}]}\n"),
	)
}

// checkNoun states what the rest of the daemon relies on.
func checkNoun(t *testing.T, o object) {
	t.Helper()
	switch v := o.value.(type) {
	case *model.Service:
		seen := make(map[string]bool)
		for _, p := range v.Ports {
			if p.Port == 0 || (p.TargetPort == 0) == (p.TargetName == "") || seen[p.Name] {
				t.Errorf("%s has the port %+v", o.key, p)
			}
			seen[p.Name] = true
		}
		for _, addr := range append(append(v.ClusterIPs, v.ExternalIPs...), v.LoadBalancerIPs...) {
			if !addr.IsGlobalUnicast() || addr.Is4In6() || addr.Zone() != "" {
				t.Errorf("%s has the address %s", o.key, addr)
			}
		}
		if len(v.ClusterIPs) > 2 {
			t.Errorf("%s has the addresses %s", o.key, v.ClusterIPs)
		}
	case *model.EndpointSlice:
		for _, p := range v.Ports {
			if p.Port == 0 {
				t.Errorf("%s has the port %+v", o.key, p)
			}
		}
		for _, e := range v.Endpoints {
			if len(e.Addresses) != 1 || !e.Addresses[0].IsGlobalUnicast() || e.Addresses[0].Is4In6() || e.Addresses[0].Zone() != "" {
				t.Errorf("%s has the endpoint %+v", o.key, e)
			}
		}
		if v.Service.Name == "" {
			t.Errorf("%s is no service's", o.key)
		}
	case *model.Policy:
		for _, rule := range append(v.IngressRules, v.EgressRules...) {
			if rule.AllPeers && len(rule.Peers) > 0 || rule.AllPorts && len(rule.Ports) > 0 {
				t.Errorf("%s has the rule %+v", o.key, rule)
			}
			for _, p := range rule.Ports {
				if p.EndPort < p.Port || p.Name != "" && p.Port != 0 {
					t.Errorf("%s has the port %+v", o.key, p)
				}
			}
			for _, p := range rule.Peers {
				if p.IPBlock == nil && p.PodSelector == nil && p.NamespaceSelector == nil || p.IPBlock != nil && !p.IPBlock.CIDR.IsValid() {
					t.Errorf("%s has the peer %+v", o.key, p)
				}
			}
		}
	case *model.Pod, *model.Namespace, *model.Node, nil:
	default:
		t.Errorf("%s is a %s", o.key, reflect.TypeOf(v))
	}
	if o.key.name.Name == "" || o.key.kind.namespaced() != (o.key.name.Namespace != "") {
		t.Errorf("the key is %+v", o.key)
	}
}
