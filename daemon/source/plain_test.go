// SPDX-License-Identifier: Apache-2.0

package source

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What people and tools write takes the quick way: were it not so, nothing would
// be wrong but the time that ten thousand services take to load.
func TestManifestsTakeTheQuickWay(t *testing.T) {
	files, err := filepath.Glob("../../conf/examples/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("examples: %v, %v", files, err)
	}
	texts := map[string]string{"a service with ten endpoints": manifestOf(7), "as kubectl writes it": asKubectl}
	for _, file := range files {
		content, err := os.ReadFile(file)
		must(t, err)
		texts[file] = string(content)
	}
	for name, text := range texts {
		for i, part := range split([]byte(text)) {
			got, ok := plainToJSON(part, "document")
			if !ok {
				t.Errorf("%s: document %d is not read the quick way", name, i+1)
				continue
			}
			checkPlain(t, part, got, "document")
		}
	}
}

const asKubectl = `apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  annotations:
    endpoints.kubernetes.io/last-change-trigger-time: "2026-01-02T03:04:05Z"
  creationTimestamp: "2026-01-02T03:04:05Z"
  generateName: web-
  generation: 3
  labels:
    app.kubernetes.io/managed-by: Helm
    endpointslice.kubernetes.io/managed-by: endpointslice-controller.k8s.io
    kubernetes.io/service-name: web
  name: web-4xk2p
  namespace: default
  ownerReferences:
  - apiVersion: v1
    blockOwnerDeletion: true
    controller: true
    kind: Service
    name: web
    uid: 3f2504e0-4f89-11d3-9a0c-0305e82c3301
  resourceVersion: "1234"
  uid: 9b1deb4d-3b7d-4bad-9bdd-2b0d7b3dcb6d
addressType: IPv6
endpoints:
- addresses:
  - fd00:10:244::5
  - 2001:db8::5
  conditions:
    ready: true
    serving: true
    terminating: false
  nodeName: node-1
  targetRef:
    kind: Pod
    name: web-5d9c7b8f6-abcde
    namespace: default
    uid: e58ed763-928c-4155-bee9-fdbaaadc15f3
  zone: europe-west1-b
ports:
- name: ""
  port: 8080
  protocol: TCP
`

// A scalar is text, a number or something else as YAML says, or is left to YAML.
func TestPlainScalars(t *testing.T) {
	for text, want := range map[string]string{
		"abc": `"abc"`, "10.0.0.1": `"10.0.0.1"`, "10.0.0.0/8": `"10.0.0.0/8"`, "fd00::1": `"fd00::1"`, "80": "80", "0": "0", "100m": `"100m"`,
		"true": "true", "null": "null", "'true'": `"true"`, `"80"`: `"80"`, "a b  c # d": `"a b  c"`, "a#b": `"a#b"`, "/x": `"/x"`, `a"b`: `"a\"b"`,
		"{}": "{}", "[]": "[]", "[ a , 1 ]": `["a",1]`, "{a: {b: c}, d: []}": `{"a":{"b":"c"},"d":[]}`, "": "null", "# c": "null",
		// YAML's own to tell:
		"yes": "", "Null": "", "~": "", "1.5": "", "1e3": "", "007": "", "0x1f": "", "1_0": "", "2001-01-02": "", "12345678901234567890": "", "-1": "", "-": "", ".5": "",
		"|": "", "&a b": "", "*a": "", "!!str 1": "", "a: b": "", "a:": "", `"a\n"`: "", "'a''b'": "", "'a": "", "[a": "", "[a,]": "", "{a}": "", "{a: 1, a: 2}": "",
	} {
		got, ok := plainToJSON([]byte("key: "+text+"\n"), "document")
		if wanted := `{"key":` + want + `}`; ok != (want != "") || ok && string(got.all) != wanted {
			t.Errorf("%s is read as %s, %v; want %s", text, got.all, ok, wanted)
		}
	}
}

// Deeper than anything of the API, or with as many keys: YAML's own to read, which
// knows where to stop.
func TestPlainReaderGivesUpInTime(t *testing.T) {
	var deep, wide strings.Builder
	for i := range 10_000 {
		fmt.Fprintf(&deep, "%*sa:\n", i, "")
		fmt.Fprintf(&wide, "k%d: v\n", i)
	}
	for name, text := range map[string]string{
		"mappings": deep.String(), "brackets": "a: " + strings.Repeat("[", 10_000), "keys": wide.String(),
	} {
		if _, ok := plainToJSON([]byte(text), "document"); ok {
			t.Errorf("%s are read the quick way", name)
		}
	}
	text, ok := plainToJSON([]byte("a: "+strings.Repeat("[", plainDepth-1)+strings.Repeat("]", plainDepth-1)), "document")
	if !ok || !json.Valid(text.all) {
		t.Errorf("%s, %v", text.all, ok)
	}
}
