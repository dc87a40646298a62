// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/mooring-cni/mooring/test/netns"
)

// Programs are the static binaries that the tests use.
type Programs struct {
	dir     string
	plugins []string // those that go to a node's CNI directory
	images  []string // archives
}

// Path is where a program is: "mooringd", "mooring", "app".
func (p *Programs) Path(name string) string { return filepath.Join(p.dir, name) }

// ModuleRoot is the directory of the project's go.mod.
func ModuleRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find go.mod: %w", err)
	}
	return filepath.Dir(strings.TrimSpace(string(out))), nil
}

// Packages of the project's module, of the module of the CRI client, and of
// the plugins that come with CNI: containerd 1.6 asks for loopback by itself.
var (
	ours = []string{"./plugins/mooring-cni", "./plugins/mooring-ipam", "./daemon/mooringd", "./daemon/mooring",
		"./test/containerd/pause", "./test/containerd/app"}
	criClient = "test/containerd/cri"
	standard  = []string{"main/loopback", "main/bridge", "ipam/host-local", "meta/portmap", "meta/bandwidth"}
)

// standardPlugins is the version of the plugins that come with CNI.
const standardPlugins = "v1.9.1"

var building sync.Mutex

// Build makes the programs and images in a directory that goes with the test.
func Build(t netns.T) *Programs {
	t.Helper()
	building.Lock()
	defer building.Unlock()
	root, err := ModuleRoot()
	if err != nil {
		t.Fatalf("%v", err)
	}
	p := &Programs{dir: netns.Directory(t, "programs")}
	build := func(dir string, args ...string) {
		t.Helper()
		command := exec.Command("go", args...)
		command.Dir = filepath.Join(root, dir)
		command.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GOBIN="+p.dir)
		if out, err := command.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	flags := []string{"-trimpath", "-ldflags", "-s -w"}
	build(".", slices.Concat([]string{"build"}, flags, []string{"-o", p.dir + "/"}, ours)...)
	build(criClient, slices.Concat([]string{"build"}, flags, []string{"-o", p.Path("cri"), "."})...)
	install := slices.Concat([]string{"install"}, flags)
	for _, plugin := range standard {
		install = append(install, "github.com/containernetworking/plugins/plugins/"+plugin+"@"+standardPlugins)
		p.plugins = append(p.plugins, p.Path(filepath.Base(plugin)))
	}
	build(".", install...)
	for _, plugin := range []string{"mooring-cni", "mooring-ipam"} {
		p.plugins = append(p.plugins, p.Path(plugin))
	}
	for _, i := range []Image{
		{Names: []string{PauseImage}, Files: map[string]string{"/pause": p.Path("pause")}, Entrypoint: []string{"/pause"}},
		{Names: []string{AppImage}, Files: map[string]string{"/app": p.Path("app")}, Entrypoint: []string{"/app"}},
	} {
		archive := p.Path(filepath.Base(i.Entrypoint[0]) + ".tar")
		if err := i.Write(archive); err != nil {
			t.Fatalf("%v", err)
		}
		p.images = append(p.images, archive)
	}
	return p
}
