// SPDX-License-Identifier: Apache-2.0

package source

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/mooring-cni/mooring/daemon/model"
)

// manifestOf is a service with ten endpoints as kubectl would write them.
func manifestOf(i int) string {
	var b bytes.Buffer
	fmt.Fprintf(&b, `apiVersion: v1
kind: Service
metadata:
  name: svc-%[1]d
  namespace: default
spec:
  clusterIP: 10.96.%[2]d.%[3]d
  selector:
    app: svc-%[1]d
  ports:
  - name: http
    port: 80
    protocol: TCP
    targetPort: 8080
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: svc-%[1]d-abcde
  namespace: default
  labels:
    kubernetes.io/service-name: svc-%[1]d
addressType: IPv4
ports:
- name: http
  protocol: TCP
  port: 8080
endpoints:
`, i, i/250, i%250+1)
	for j := range 10 {
		fmt.Fprintf(&b, "- addresses: [\"10.244.%d.%d\"]\n  conditions: {ready: true, serving: true, terminating: false}\n  nodeName: node-%d\n", i/250, (i+j)%250+1, j)
	}
	return b.String()
}

func manyManifests(tb testing.TB, form string, services int) string {
	tb.Helper()
	dir := tb.TempDir()
	var all bytes.Buffer
	for i := range services {
		content := []byte(manifestOf(i))
		switch form {
		case "yaml":
			write(tb, filepath.Join(dir, fmt.Sprintf("svc-%d.yaml", i)), string(content))
		case "one-yaml":
			all.WriteString("---\n")
			all.Write(content)
		case "one-json":
			for _, part := range split(content) {
				converted, err := yaml.YAMLToJSON(part)
				if err != nil {
					tb.Fatal(err)
				}
				if all.Len() > 0 {
					all.WriteByte(',')
				}
				all.Write(converted)
			}
		}
	}
	switch form {
	case "one-yaml":
		write(tb, filepath.Join(dir, "all.yaml"), all.String())
	case "one-json":
		write(tb, filepath.Join(dir, "all.json"), `{"apiVersion":"v1","kind":"List","items":[`+all.String()+`]}`)
	}
	return dir
}

func write(tb testing.TB, path, content string) {
	tb.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		tb.Fatal(err)
	}
}

// BenchmarkLoad10000Services reads 10,000 services of 10 endpoints from files.
func BenchmarkLoad10000Services(b *testing.B) {
	for _, form := range []string{"yaml", "one-yaml", "one-json"} {
		b.Run(form, func(b *testing.B) {
			dir := manyManifests(b, form, 10_000)
			b.ReportAllocs()
			for b.Loop() {
				ctx, cancel := context.WithCancel(b.Context())
				_ = NewDirectory(dir).Run(ctx, func(c model.Changes) {
					if len(c.Services) != 10_000 || len(c.Slices) != 10_000 || len(c.Problems) != 0 {
						b.Errorf("%d services, %d slices, problems %v", len(c.Services), len(c.Slices), c.Problems)
					}
					cancel()
				})
			}
		})
	}
}

// BenchmarkOneChangedFile reads one changed file among 10,000.
func BenchmarkOneChangedFile(b *testing.B) {
	dir := manyManifests(b, "yaml", 10_000)
	d := NewDirectory(dir)
	d.scan(nil)
	d.deliver(func(model.Changes) {})
	i := 0
	for b.Loop() {
		i++
		write(b, filepath.Join(dir, "svc-7.yaml"), manifestOf(7)+fmt.Sprintf("- addresses: [10.244.200.%d]\n", i%250+1))
		d.scan([]string{"svc-7.yaml"})
		d.deliver(func(c model.Changes) {
			if c.Len() != 1 {
				b.Errorf("%d objects changed, want 1", c.Len())
			}
		})
	}
}

// BenchmarkOneChangedDocument reads a file of 20,000 documents of which one
// has changed.
func BenchmarkOneChangedDocument(b *testing.B) {
	dir := manyManifests(b, "one-yaml", 10_000)
	content, err := os.ReadFile(filepath.Join(dir, "all.yaml"))
	if err != nil {
		b.Fatal(err)
	}
	d := NewDirectory(dir)
	d.scan(nil)
	d.deliver(func(model.Changes) {})
	i := 0
	for b.Loop() {
		i++
		write(b, filepath.Join(dir, "all.yaml"), string(content)+fmt.Sprintf("- addresses: [10.244.200.%d]\n", i%250+1))
		d.scan([]string{"all.yaml"})
		d.deliver(func(c model.Changes) {
			if c.Len() != 1 {
				b.Errorf("%d objects changed, want 1", c.Len())
			}
		})
	}
}

// BenchmarkNoticing is the time from a file's rename to the sink, with 10,000
// files beside it.
func BenchmarkNoticing(b *testing.B) {
	dir := manyManifests(b, "yaml", 10_000)
	told := make(chan int)
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = NewDirectory(dir).Run(ctx, func(c model.Changes) {
			select {
			case told <- c.Len():
			case <-ctx.Done():
			}
		})
	}()
	<-told
	i := 0
	for b.Loop() {
		i++
		temporary := filepath.Join(dir, "svc-7.yaml.tmp")
		write(b, temporary, manifestOf(7)+fmt.Sprintf("- addresses: [10.244.200.%d]\n", i%250+1))
		if err := os.Rename(temporary, filepath.Join(dir, "svc-7.yaml")); err != nil {
			b.Fatal(err)
		}
		if n := <-told; n != 1 {
			b.Fatalf("%d objects changed, want 1", n)
		}
	}
	cancel()
	<-done
}

// BenchmarkPoll looks at 10,000 files that have not changed.
func BenchmarkPoll(b *testing.B) {
	d := NewDirectory(manyManifests(b, "yaml", 10_000))
	d.scan(nil)
	for b.Loop() {
		d.scan(nil)
	}
}
