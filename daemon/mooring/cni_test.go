// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mooring-cni/mooring/daemon/api"
)

// host is a node's directories, and the image from which it is installed.
type host struct {
	t                        *testing.T
	image, others, bin, netd string
}

func newHost(t *testing.T) *host {
	root := t.TempDir()
	h := &host{t, filepath.Join(root, "cni"), filepath.Join(root, "standard"), filepath.Join(root, "bin"), filepath.Join(root, "net.d")}
	h.write(h.image, "mooring-cni", "plugin 1")
	h.write(h.image, "mooring-ipam", "addresses 1")
	h.write(h.others, "portmap", "portmap of the image")
	return h
}

func (h *host) write(dir, name, content string) {
	h.t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o755); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) install(args ...string) (code int, stdout, stderr string) {
	h.t.Helper()
	return mooring(h.t, "", append([]string{"cni", "install", "--from", h.image, "--bin", h.bin, "--conf", h.netd}, args...)...)
}

// files are those of a directory with what they hold.
func (h *host) files(dir string) map[string]string {
	h.t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		h.t.Fatal(err)
	}
	found := map[string]string{}
	for _, e := range entries {
		content, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			h.t.Fatal(err)
		}
		found[e.Name()] = string(content)
	}
	return found
}

func TestInstallPutsPluginsInPlaceAndASecondRunTouchesNothing(t *testing.T) {
	h := newHost(t)
	if code, _, stderr := h.install(); code != 0 {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	if diff := cmp.Diff(map[string]string{"mooring-cni": "plugin 1", "mooring-ipam": "addresses 1"}, h.files(h.bin)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	before, err := os.Stat(filepath.Join(h.bin, "mooring-cni"))
	if err != nil {
		t.Fatal(err)
	}
	if before.Mode().Perm() != 0o755 {
		t.Errorf("the plugin has mode %v", before.Mode())
	}
	if code, stdout, _ := h.install(); code != 0 || strings.Count(stdout, "is up to date") != 2 {
		t.Errorf("second run: exit %d: %s", code, stdout)
	}
	after, err := os.Stat(filepath.Join(h.bin, "mooring-cni"))
	if err != nil {
		t.Fatal(err)
	}
	if !os.SameFile(before, after) || before.ModTime() != after.ModTime() {
		t.Error("the second run wrote the plugin anew")
	}

	h.write(h.image, "mooring-cni", "plugin 2")
	if code, stdout, _ := h.install(); code != 0 || !strings.Contains(stdout, "mooring-cni installed") || !strings.Contains(stdout, "mooring-ipam is up to date") {
		t.Errorf("another version: exit %d: %s", code, stdout)
	}
	if got := h.files(h.bin)["mooring-cni"]; got != "plugin 2" {
		t.Errorf("the plugin is %q", got)
	}
}

func TestInstallCompletesTheNodesPluginsAndReplacesNone(t *testing.T) {
	h := newHost(t)
	h.write(h.others, "loopback", "loopback of the image")
	h.write(h.bin, "portmap", "portmap of the node")
	if code, _, stderr := h.install("--complete-from", h.others); code != 0 {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	files := h.files(h.bin)
	if files["portmap"] != "portmap of the node" || files["loopback"] != "loopback of the image" {
		t.Errorf("%q", files)
	}
}

func TestInstallNamesAConfigurationThatTheRuntimePrefers(t *testing.T) {
	h := newHost(t)
	for _, name := range []string{"05-other.conflist", "05-other.conflist.off", "20-later.conf"} {
		h.write(h.netd, name, "{}")
	}
	code, stdout, _ := h.install()
	if code != 0 || !strings.Contains(stdout, "05-other.conflist comes before 10-mooring.conflist") || strings.Count(stdout, "warning") != 1 {
		t.Errorf("exit %d: %s", code, stdout)
	}
	if got := len(h.files(h.netd)); got != 3 {
		t.Errorf("%d files in %s", got, h.netd)
	}
}

func TestInstallSaysWhatIsWrong(t *testing.T) {
	h := newHost(t)
	h.write(filepath.Dir(h.bin), "bin", "a file, no directory")
	code, _, stderr := h.install()
	if code != 1 || !strings.Contains(stderr, "cni install: put the plugins into "+h.bin) || !strings.Contains(stderr, "not a directory") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	code, _, stderr = mooring(t, "", "cni", "install", "--from", filepath.Join(h.image, "none"), "--bin", t.TempDir())
	if code != 1 || !strings.Contains(stderr, "no such file") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	if code, _, _ = mooring(t, "", "cni", "install"); code != 2 {
		t.Errorf("without --from: exit %d", code)
	}
}

// The test starts its binary again as the installer and kills it at some moment.
func TestKilledInstallLeavesEachFileOldOrNew(t *testing.T) {
	if arguments := os.Getenv("MOORING_TEST_INSTALL"); arguments != "" {
		os.Exit(run(context.Background(), strings.Split(arguments, " "), io.Discard, os.Stderr, func(string) string { return "" }))
	}
	h := newHost(t)
	version := func(n byte) string { return strings.Repeat(string('0'+n), 2<<20) }
	left, changes, was := 0, 0, byte(0)
	h.write(h.bin, "mooring-cni", version(was))
	for i := range 10 {
		next := was ^ 1
		h.write(h.image, "mooring-cni", version(next))
		command := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
		command.Env = append(os.Environ(), "MOORING_TEST_INSTALL=cni install --from "+h.image+" --bin "+h.bin+" --conf "+h.netd)
		if err := command.Start(); err != nil {
			t.Fatal(err)
		}
		// A temporary file shows that it is in the middle.
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end) && command.ProcessState == nil; {
			if found, _ := filepath.Glob(filepath.Join(h.bin, temporary+"*")); len(found) > 0 {
				break
			}
		}
		time.Sleep(time.Duration(i*i) * 2 * time.Millisecond)
		command.Process.Kill()
		command.Wait()
		for name := range h.files(h.bin) {
			if strings.HasPrefix(name, temporary) {
				left++
			}
		}
		got, err := os.ReadFile(filepath.Join(h.bin, "mooring-cni"))
		if err != nil {
			t.Fatal(err)
		}
		switch string(got) {
		case version(was):
		case version(next):
			changes++
			was = next
		default:
			t.Fatalf("a mixture of %d bytes is in place", len(got))
		}
	}
	t.Logf("%d of 10 left a temporary file, %d were done", left, changes)
	if left == 0 {
		t.Error("no run was killed in the middle: this shows nothing")
	}
	if code, _, stderr := h.install(); code != 0 {
		t.Fatalf("the run after: exit %d: %s", code, stderr)
	}
	if got := h.files(h.bin); len(got) != 2 {
		t.Errorf("%d files are in place", len(got))
	}
}

// waking is a daemon that becomes ready.
type waking struct {
	daemon
	ready *atomic.Bool
}

func (w waking) Node() api.Node {
	return api.Node{Name: "node-a", Ready: w.ready.Load(), Reason: "the pod ranges are not known"}
}

func TestConflistIsPutInPlaceWhenTheDaemonServes(t *testing.T) {
	h := newHost(t)
	w := waking{ready: &atomic.Bool{}}
	socket := serve(t, w)
	example, err := os.ReadFile("../../conf/10-mooring.conflist")
	if err != nil {
		t.Fatal(err)
	}
	h.write(h.image, "conflist", string(example))
	enable := func(args ...string) (int, string, string) {
		return mooring(t, socket, append([]string{"cni", "enable", "--conflist", filepath.Join(h.image, "conflist"), "--bin", h.bin, "--conf", h.netd}, args...)...)
	}
	code, _, stderr := enable()
	if code != 1 || !strings.Contains(stderr, "plugin mooring-cni is not in "+h.bin) {
		t.Errorf("without plugins: exit %d: %s", code, stderr)
	}
	if code, _, stderr := h.install("--complete-from", h.others); code != 0 {
		t.Fatal(stderr)
	}
	code, _, stderr = enable("--wait", "100ms")
	if code != 1 || !strings.Contains(stderr, "the pod ranges are not known") {
		t.Errorf("before the daemon is ready: exit %d: %s", code, stderr)
	}
	if _, err := os.Stat(h.netd); err == nil {
		t.Error("before the daemon is ready there is a directory of configurations")
	}

	time.AfterFunc(300*time.Millisecond, func() { w.ready.Store(true) })
	if code, _, stderr := enable(); code != 0 {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	if diff := cmp.Diff(map[string]string{conflistName: string(example)}, h.files(h.netd)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}

	// What is right needs no daemon; what changes does.
	w.ready.Store(false)
	if code, stdout, _ := enable(); code != 0 || !strings.Contains(stdout, "is up to date") {
		t.Errorf("again: exit %d: %s", code, stdout)
	}
	h.write(h.image, "conflist", strings.ReplaceAll(string(example), `"mtu": 0`, `"mtu": 1400`))
	if code, _, _ := enable("--wait", "100ms"); code != 1 {
		t.Errorf("another configuration: exit %d", code)
	}
	if got := h.files(h.netd)[conflistName]; got != string(example) {
		t.Errorf("before the daemon is ready the configuration is\n%s", got)
	}

	// A container beside the daemon's waits for it, and repairs what others break.
	staying, cancel := context.WithCancel(t.Context())
	done := make(chan int)
	go func() {
		done <- run(staying, []string{"--socket", socket, "cni", "enable", "--stay", "--conflist", filepath.Join(h.image, "conflist"), "--bin", h.bin, "--conf", h.netd}, io.Discard, io.Discard, func(string) string { return "" })
	}()
	inPlace := func() bool { return strings.Contains(h.files(h.netd)[conflistName], "1400") }
	time.Sleep(300 * time.Millisecond)
	if inPlace() {
		t.Error("--stay does not wait for the daemon")
	}
	w.ready.Store(true)
	for _, what := range []string{"put in place", "put back"} {
		end := time.Now().Add(20 * time.Second)
		for ; !inPlace() && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		}
		if !inPlace() {
			t.Errorf("the configuration is not %s", what)
		}
		if err := os.Remove(filepath.Join(h.netd, conflistName)); err != nil {
			t.Error(err)
		}
	}
	cancel()
	if code := <-done; code != 0 {
		t.Errorf("--stay: exit %d", code)
	}

	for broken, word := range map[string]string{
		`"mtu": "large"`:                "mtu",
		`"socket": "relative"`:          "socket",
		`"unknown": 1`:                  "unknown key",
		`"type": "some-other-plugin"`:   "some-other-plugin is not in",
		`"type": "../../bin/something"`: "no plugin's type",
	} {
		h.write(h.image, "conflist", `{"cniVersion": "1.0.0", "name": "mooring", "plugins": [{"type": "mooring-cni", `+broken+`}]}`)
		if code, _, stderr := enable(); code != 1 || !strings.Contains(stderr, word) {
			t.Errorf("%s: exit %d: %s", broken, code, stderr)
		}
	}
}

func TestUninstallTakesOursAndLeavesOthers(t *testing.T) {
	h := newHost(t)
	if code, _, stderr := h.install("--complete-from", h.others); code != 0 {
		t.Fatal(stderr)
	}
	h.write(h.netd, conflistName, "{}")
	h.write(h.netd, "20-other.conflist", "{}")
	uninstall := []string{"cni", "uninstall", "--bin", h.bin, "--conf", h.netd}
	for range 2 {
		if code, _, stderr := mooring(t, "", uninstall...); code != 0 {
			t.Fatalf("exit %d: %s", code, stderr)
		}
		if diff := cmp.Diff(map[string]string{"portmap": "portmap of the image"}, h.files(h.bin)); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
		if diff := cmp.Diff(map[string]string{"20-other.conflist": "{}"}, h.files(h.netd)); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
	}
	if code, _, stderr := mooring(t, "", "cni", "uninstall", "--bin", "/nowhere/bin", "--conf", "/nowhere/net.d"); code != 0 {
		t.Errorf("on a node that has no such directories: exit %d: %s", code, stderr)
	}

	ctx, cancel := context.WithCancel(t.Context())
	var stdout bytes.Buffer
	time.AfterFunc(100*time.Millisecond, cancel)
	if code := run(ctx, append(uninstall, "--stay"), &stdout, io.Discard, func(string) string { return "" }); code != 0 || ctx.Err() == nil || stdout.String() != "done\n" {
		t.Errorf("--stay: exit %d, %q, interrupted: %v", code, &stdout, ctx.Err())
	}
}
