// SPDX-License-Identifier: Apache-2.0

package house

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/mooring-cni/mooring"

// An arrow says which rooms of this module a room's code may use besides itself,
// and which other modules: "*" all, otherwise those named. The first prefix that
// matches a package decides. Tests may use what they want, programs excepted: they
// are no part of what users run.
type arrow struct {
	room    string
	uses    []string
	foreign []string
}

var arrows = []arrow{
	// plugins answers kubelet.
	{"plugins", []string{"conf", "ipam", "bpf", "daemon/api", "daemon/model", "plugins"}, []string{"*"}},

	// daemon keeps the node. The nouns and the API are for everyone, and cost nothing.
	{"daemon/model", nil, nil},
	{"daemon/api", []string{"daemon/model"}, nil},
	// Pure functions to desired state.
	{"daemon/service", []string{"daemon/model"}, nil},
	{"daemon/policy", []string{"daemon/model"}, nil},
	{"daemon/maglev", []string{"daemon/model"}, nil},
	{"daemon/health", []string{"daemon/model"}, nil},
	{"daemon/source", []string{"daemon/model"}, []string{"*"}},
	{"daemon/node", []string{"daemon/model"}, []string{"*"}},
	{"daemon/endpoint", []string{"daemon/model", "daemon/api"}, []string{"*"}},
	{"daemon/datapath", []string{"conf", "daemon/model", "daemon/api", "daemon/service", "daemon/policy", "daemon/maglev", "bpf"}, []string{"*"}},
	// The two main packages put the parts together.
	{"daemon/mooringd", []string{"daemon", "bpf", "conf", "ipam"}, []string{"*"}},
	{"daemon/mooring", []string{"daemon", "bpf", "conf"}, []string{"*"}},

	{"bpf", nil, []string{"github.com/cilium/ebpf", "github.com/vishvananda/netlink", "golang.org/x/sys"}},
	{"ipam", []string{"conf"}, []string{"github.com/containernetworking/cni", "golang.org/x/sys"}},
	{"conf", nil, []string{"github.com/containernetworking/cni", "github.com/spf13/pflag", "go.yaml.in/yaml"}},

	// test proves it.
	{"test", []string{""}, []string{"*"}},
}

type goPackage struct {
	ImportPath, Name string
	Imports          []string
	TestImports      []string
	XTestImports     []string
	Deps             []string
}

func (p goPackage) room() string {
	return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
}

// goList lists this module's packages as `go list` does.
func goList(t *testing.T, args ...string) (packages []goPackage) {
	t.Helper()
	command := exec.Command("go", append([]string{"list", "-json=ImportPath,Name,Imports,TestImports,XTestImports,Deps", "-tags", "root,kernels"}, args...)...)
	command.Dir = filepath.Join("..", "..")
	out, err := command.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %v: %s", err, exit.Stderr)
		}
		t.Fatalf("go list: %v", err)
	}
	for decoder := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatalf("read what go list says: %v", err)
		}
		packages = append(packages, p)
	}
}

func within(path string, rooms []string) bool {
	return slices.ContainsFunc(rooms, func(room string) bool {
		return room == "*" || room == "" || path == room || strings.HasPrefix(path, room+"/")
	})
}

func TestImportsRunOneWay(t *testing.T) {
	packages := goList(t, "./...")
	programs := make(map[string]bool)
	for _, p := range packages {
		if p.Name == "main" {
			programs[p.ImportPath] = true
		}
	}
	if len(packages) < 10 || len(programs) == 0 {
		t.Fatalf("go list finds %d packages and %d programs", len(packages), len(programs))
	}
	for _, p := range packages {
		room := p.room()
		i := slices.IndexFunc(arrows, func(a arrow) bool { return within(room, []string{a.room}) })
		if i < 0 {
			t.Errorf("%s is in no room: name it in arrows, with what it may use", room)
			continue
		}
		arrow := arrows[i]
		for _, imported := range p.Imports {
			own, isOwn := strings.CutPrefix(imported, module+"/")
			host, _, _ := strings.Cut(imported, "/")
			switch isForeign := !isOwn && strings.Contains(host, "."); {
			case isOwn && !within(own, append(arrow.uses, arrow.room)):
				t.Errorf("%s imports %s; it may use %q", room, own, arrow.uses)
			case isForeign && !foreignAllowed(imported, arrow.foreign):
				t.Errorf("%s imports %s; of other modules it may use %q", room, imported, arrow.foreign)
			case host == "k8s.io" && arrow.room != "daemon/source" && arrow.room != "test":
				t.Errorf("%s imports %s: k8s.io is for daemon/source alone", room, imported)
			case (imported == "github.com/cilium/ebpf/link" || imported == "github.com/cilium/ebpf/rlimit") && arrow.room != "bpf" && arrow.room != "test":
				t.Errorf("%s imports %s: only bpf loads and attaches", room, imported)
			}
		}
		for _, imported := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			if programs[imported] && imported != p.ImportPath {
				t.Errorf("%s imports the program %s", room, imported)
			}
		}
	}
}

func foreignAllowed(imported string, allowed []string) bool {
	return slices.ContainsFunc(allowed, func(prefix string) bool { return prefix == "*" || strings.HasPrefix(imported, prefix) })
}

// kubelet starts a plugin for every pod: what it links is read from disk and
// initialised each time.
func TestPluginsLinkNoKubernetes(t *testing.T) {
	for _, p := range goList(t, "./...") {
		if !within(p.room(), []string{"plugins"}) {
			continue
		}
		for _, dependency := range p.Deps {
			if strings.HasPrefix(dependency, "k8s.io/") {
				t.Errorf("%s links %s", p.room(), dependency)
			}
		}
	}
}
