// SPDX-License-Identifier: Apache-2.0

//go:build root

package endpoint

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// The test runs in a network namespace of its own: it starts the test binary
// once more there.
func TestPodWhoseNetworkNamespaceVanishesIsDropped(t *testing.T) {
	if os.Getenv("MOORING_TEST_NETNS") == "" {
		command := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
		command.Env = append(os.Environ(), "MOORING_TEST_NETNS=1")
		command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if out, err := command.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	sh := func(line string) {
		t.Helper()
		if out, err := exec.Command("sh", "-ec", line).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
	}
	index := func(name string) int {
		t.Helper()
		link, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		return link.Attrs().Index
	}
	pod := exec.Command("sleep", "60")
	pod.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := pod.Start(); err != nil {
		t.Fatal(err)
	}
	sh("ip link add lxca type veth peer name eth0 netns " + strconv.Itoa(pod.Process.Pid))
	sh("ip link add lxcb type veth peer name wire")
	kernel, err := NewKernel()
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	n := newNode()
	directory := t.TempDir()
	r, err := Open(directory, n, kernel, slog.New(slog.DiscardHandler), func() {})
	if err != nil {
		t.Fatal(err)
	}
	a := add(t, r, made("a", "lxca", index("lxca"), "10.244.0.5"))
	b := add(t, r, made("b", "lxcb", index("lxcb"), "10.244.0.6"))
	if _, err := r.Add(made("c", "lxcb", 4711, "10.244.0.7")); err == nil || !strings.Contains(err.Error(), "not in mooringd's network namespace") {
		t.Errorf("endpoint with an interface of elsewhere: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { r.Watch(ctx); close(done) }()

	pod.Process.Kill()
	pod.Wait()
	gone := time.Now()
	for r.Len() != 1 && time.Since(gone) < 5*time.Second {
		time.Sleep(5 * time.Millisecond)
	}
	if list := r.List(); len(list) != 1 || list[0].ID != b.ID {
		t.Fatalf("5 s after a's namespace vanished: %+v", list)
	}
	if _, known := n.known[a.ID]; known {
		t.Error("the datapath still has a")
	}
	cancel()
	<-done

	// While nobody watches, b goes; the next run notices.
	sh("ip link del lxcb")
	r, err = Open(directory, n, kernel, slog.New(slog.DiscardHandler), func() {})
	if err != nil {
		t.Fatal(err)
	}
	if r.Len() != 0 || len(n.known) != 0 {
		t.Errorf("after a restart: %+v, datapath %+v", r.List(), n.known)
	}
}
