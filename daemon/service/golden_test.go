// SPDX-License-Identifier: Apache-2.0

package service_test

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/mooring-cni/mooring/daemon/model"
	"github.com/mooring-cni/mooring/daemon/service"
	"github.com/mooring-cni/mooring/daemon/source"
)

var update = flag.Bool("update", false, "write the frontends and problems that come out into the golden files")

// Each file of testdata has manifests, what is known of the node ("node": lines
// of key and values) and its pods' interfaces ("endpoints": pod, interface and
// addresses), and the frontends and problems that must come out.
func TestManifestsBecomeFrontends(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("golden files: %v, %v", files, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			node := service.NodeContext{Name: "node-a", Standalone: true}
			var endpoints map[uint32]*model.Endpoint
			want := make(map[string]string)
			for _, f := range archive.Files {
				switch f.Name {
				case "node":
					parseNode(t, &node, string(f.Data))
				case "endpoints":
					endpoints = parseEndpoints(t, string(f.Data))
				case "frontends", "problems":
					want[f.Name] = string(f.Data)
				default:
					if err := os.WriteFile(filepath.Join(dir, f.Name), f.Data, 0o644); err != nil {
						t.Fatal(err)
					}
				}
			}
			table := service.NewTable(node)
			changes := load(t, dir)
			table.Apply(changes)
			table.ApplyEndpoints(endpoints)
			got := map[string]string{"frontends": render(table), "problems": renderProblems(changes.Problems, table.Problems())}
			if *update {
				archive.Files = slices.DeleteFunc(archive.Files, func(f txtar.File) bool { return f.Name == "frontends" || f.Name == "problems" })
				for _, name := range []string{"frontends", "problems"} {
					if got[name] != "" {
						archive.Files = append(archive.Files, txtar.File{Name: name, Data: []byte(got[name])})
					}
				}
				if err := os.WriteFile(file, txtar.Format(archive), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			for name := range got {
				if diff := cmp.Diff(want[name], got[name]); diff != "" {
					t.Errorf("%s (-want +got; go test -update writes them anew):\n%s", name, diff)
				}
			}
		})
	}
}

// load gives what a directory holds.
func load(t testing.TB, dir string) model.Changes {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var changes model.Changes
	_ = source.NewDirectory(dir).Run(ctx, func(c model.Changes) {
		changes = c
		cancel()
	})
	if !changes.Synced {
		t.Fatalf("%s is not synced: %v", dir, changes.Problems)
	}
	return changes
}

func parseNode(t *testing.T, node *service.NodeContext, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		switch words[0] {
		case "name":
			node.Name = words[1]
		case "zone":
			node.Zone = words[1]
		case "addresses":
			for _, word := range words[1:] {
				node.Addresses = append(node.Addresses, netip.MustParseAddr(word))
			}
		case "own":
			for _, word := range words[1:] {
				node.Own = append(node.Own, netip.MustParseAddr(word))
			}
		case "primary":
			node.Primary = true
		case "chosen":
			node.Chosen = true
		case "podCIDRs":
			for _, word := range words[1:] {
				node.PodCIDRs = append(node.PodCIDRs, netip.MustParsePrefix(word))
			}
		case "nodePorts":
			first, last, _ := strings.Cut(words[1], "-")
			for to, text := range map[*uint16]string{&node.NodePortFirst: first, &node.NodePortLast: last} {
				n, err := strconv.ParseUint(text, 10, 16)
				if err != nil {
					t.Fatal(err)
				}
				*to = uint16(n)
			}
		case "kubernetes":
			node.Standalone = false
		default:
			t.Fatalf("node: %q is not known", line)
		}
	}
}

func parseEndpoints(t *testing.T, text string) map[uint32]*model.Endpoint {
	t.Helper()
	endpoints := make(map[uint32]*model.Endpoint)
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		namespace, name, _ := strings.Cut(words[0], "/")
		e := &model.Endpoint{ID: uint32(len(endpoints) + 1), Pod: model.Name{Namespace: namespace, Name: name}, PodIfname: words[1]}
		for _, word := range words[2:] {
			e.IPs = append(e.IPs, netip.MustParseAddr(word))
		}
		endpoints[e.ID] = e
	}
	return endpoints
}

func render(table *service.Table) string {
	var b strings.Builder
	frontends := make(map[string][]model.Frontend)
	for name, list := range table.All() {
		frontends[name.String()] = list
	}
	names := make([]string, 0, len(frontends))
	for name := range frontends {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintln(&b, name)
		for _, f := range frontends[name] {
			renderFrontend(&b, &f)
		}
	}
	for _, check := range table.HealthChecks() {
		fmt.Fprintf(&b, "health check %s on port %d: %d ready here\n", check.Service, check.Port, check.LocalReady)
	}
	return b.String()
}

func renderFrontend(b *strings.Builder, f *model.Frontend) {
	fmt.Fprintf(b, "  %s %s", f.Kind, f.AddrPort)
	if f.PortName != "" {
		fmt.Fprintf(b, " %s", f.PortName)
	}
	for _, said := range []struct {
		text string
		is   bool
	}{
		{fmt.Sprintf("affinity=%s", f.AffinityTimeout), f.AffinityTimeout != 0},
		{"internal-local", f.InternalLocal},
		{"external-local", f.ExternalLocal},
		{fmt.Sprintf("from=%v", f.SourceRanges), len(f.SourceRanges) > 0},
		{"no-endpoints", !f.HasEndpoints},
	} {
		if said.is {
			fmt.Fprintf(b, " %s", said.text)
		}
	}
	fmt.Fprintln(b)
	if slices.Equal(f.Internal, f.External) {
		renderBackends(b, "both", f.Internal)
	} else {
		renderBackends(b, "internal", f.Internal)
		renderBackends(b, "external", f.External)
	}
	renderBackends(b, "keep", f.Keep)
}

func renderBackends(b *strings.Builder, which string, backends []model.Backend) {
	for _, backend := range backends {
		fmt.Fprintf(b, "    %s %s", which, backend.AddrPort)
		if backend.NodeName != "" {
			fmt.Fprintf(b, " on %s", backend.NodeName)
		}
		if backend.Local {
			b.WriteString(" (here)")
		}
		if backend.State == model.Terminating {
			b.WriteString(" terminating")
		}
		if !backend.Selectable && which != "keep" {
			b.WriteString(" draining")
		}
		b.WriteString("\n")
	}
}

func renderProblems(lists ...[]model.Problem) string {
	var b strings.Builder
	for _, list := range lists {
		for _, p := range list {
			fmt.Fprintln(&b, p)
		}
	}
	return b.String()
}
