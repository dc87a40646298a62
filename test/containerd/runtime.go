// SPDX-License-Identifier: Apache-2.0

// Package containerd runs the real container runtime on a node of the tests:
// Debian's containerd and runc with root, state, socket and CNI directories of
// their own, in the node's network namespace and in a cgroup of its own.
//
//	programs := containerd.Build(t)                // plugins, daemon, images: once for all nodes
//	node := netns.NewNode(t)
//	runtime := containerd.Start(t, node, programs)
//	runtime.Install(t, conflist)
//	id, err := runtime.RunSandbox("web")           // through the CRI, as a kubelet does
package containerd

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"github.com/mooring-cni/mooring/test/netns"
)

// The images that every node has.
const (
	PauseImage = "registry.example/mooring/pause:1"
	AppImage   = "registry.example/mooring/app:1"
)

// Runtime is a node's containerd.
type Runtime struct {
	Node    *netns.Node
	Cgroup  *netns.Cgroup
	Dir     string // all of its files
	Socket  string
	BinDir  string // the CNI plugins
	ConfDir string // the CNI configuration

	t        netns.T // whose end is the runtime's, which may be started again in a subtest
	programs *Programs
	process  *netns.Process
	client   *client
}

// Packages are what the tests need of Debian.
var Packages = []string{"containerd", "runc", "iptables"}

// Start starts a node's containerd, with the plugins in place and the images
// imported, but without a CNI configuration.
func Start(t netns.T, node *netns.Node, programs *Programs) *Runtime {
	t.Helper()
	r := &Runtime{Node: node, t: t, programs: programs, Dir: filepath.Join(node.Dir, "containerd")}
	r.Socket = filepath.Join(r.Dir, "containerd.sock")
	r.BinDir = filepath.Join(r.Dir, "cni", "bin")
	r.ConfDir = filepath.Join(r.Dir, "cni", "net.d")
	for _, dir := range []string{r.BinDir, r.ConfDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatalf("make containerd's directories: %v", err)
		}
	}
	if err := r.configure(); err != nil {
		t.Fatalf("configure containerd: %v", err)
	}
	r.Cgroup = netns.NewCgroup(t, node.NodeName)
	r.client = newClient(t, programs.Path("cri"), r.Socket)
	r.Launch()
	t.Cleanup(func() { r.removeSandboxes(t) })
	for _, image := range programs.images {
		r.Import(t, image)
	}
	for _, plugin := range programs.plugins {
		if err := copyProgram(plugin, filepath.Join(r.BinDir, filepath.Base(plugin))); err != nil {
			t.Fatalf("install a CNI plugin: %v", err)
		}
	}
	return r
}

// Launch starts the daemon, for the first time or after Kill.
func (r *Runtime) Launch() {
	r.t.Helper()
	r.process = r.Node.Command("containerd", "--config", filepath.Join(r.Dir, "config.toml")).In(r.Cgroup).Background(r.t)
	// The socket is there before the part behind it that serves the CRI.
	netns.Eventually(r.t, time.Minute, "containerd serves the CRI", func() bool {
		_, _, err := r.NetworkReady()
		return err == nil
	})
}

// Kill ends the daemon as a crash does. Its containers go on.
func (r *Runtime) Kill() { r.process.Kill() }

// Import adds an image from an archive.
func (r *Runtime) Import(t netns.T, archive string) {
	t.Helper()
	if out, err := r.ctr("images", "import", archive); err != nil {
		t.Fatalf("import %s: %v: %s", archive, err, out)
	}
}

func (r *Runtime) ctr(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "ctr", append([]string{"--address", r.Socket, "--namespace", "k8s.io"}, args...)...).CombinedOutput()
	return string(out), err
}

// Install puts a CNI configuration in place, as an installer must: containerd
// does not notice a file that comes from another directory.
func (r *Runtime) Install(t netns.T, conflist string) {
	t.Helper()
	temporary := filepath.Join(r.ConfDir, ".10-mooring")
	if err := os.WriteFile(temporary, []byte(conflist), 0o600); err != nil {
		t.Fatalf("install the CNI configuration: %v", err)
	}
	if err := os.Rename(temporary, filepath.Join(r.ConfDir, "10-mooring.conflist")); err != nil {
		t.Fatalf("install the CNI configuration: %v", err)
	}
}

// Conflist is the documented CNI configuration with the node's places, for the
// versions "1.0.0" or "1.0.0 1.1.0": the first is what runtimes get that know
// one only. What is chained follows the plugin.
func Conflist(node *netns.Node, versions string, chained ...string) string {
	stanzas := append([]string{fmt.Sprintf(`{"type": "mooring-cni", "socket": %q, "bpffs": %q, "ipam": {"type": "mooring-ipam"}}`,
		node.Socket, node.BPFFS)}, chained...)
	all := strings.Fields(versions)
	return fmt.Sprintf(`{"cniVersion": %q, "cniVersions": ["%s"], "name": "mooring-%s", "plugins": [%s]}`,
		all[0], strings.Join(all, `", "`), node.Name(), strings.Join(stanzas, ", "))
}

// The configuration is of version 2, which containerd 1.6 and later read.
// restrict_oom_score_adj lets sandboxes run where root may not lower that score.
var configuration = template.Must(template.New("").Parse(`version = 2
root = "{{.Dir}}/root"
state = "{{.Dir}}/state"
[grpc]
  address = "{{.Socket}}"
[ttrpc]
  address = "{{.Socket}}.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{{.Dir}}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + PauseImage + `"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{{.BinDir}}"
    conf_dir = "{{.ConfDir}}"
    max_conf_num = 1
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
        Root = "{{.Dir}}/runc"
`))

func (r *Runtime) configure() error {
	f, err := os.Create(filepath.Join(r.Dir, "config.toml"))
	if err != nil {
		return err
	}
	defer f.Close()
	return configuration.Execute(f, r)
}

// copyProgram puts a program in place under a name that never holds a part of it.
func copyProgram(from, to string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.WriteFile(to+".new", content, 0o755); err != nil {
		return err
	}
	return os.Rename(to+".new", to)
}
