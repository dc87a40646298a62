// SPDX-License-Identifier: Apache-2.0

//go:build root

package main

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The test starts its binary once more with network and mounts of its own.
func inNamespaces(t *testing.T) (inside bool) {
	t.Helper()
	if os.Getenv("MOORING_TEST_NETNS") != "" {
		return true
	}
	command := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	command.Env = append(os.Environ(), "MOORING_TEST_NETNS=1")
	command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	if out, err := command.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

func TestReadOnlyDirectoryIsNamedWithTheRemedy(t *testing.T) {
	if !inNamespaces(t) {
		return
	}
	h := newHost(t)
	h.write(h.bin, "mooring-cni", "plugin 0")
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(h.bin, h.bin, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", h.bin, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(h.bin, 0) })
	code, _, stderr := h.install()
	if code != 1 || !strings.Contains(stderr, "into "+h.bin) || !strings.Contains(stderr, "read-only file system: mount the node's directory writable") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	if got := h.files(h.bin)["mooring-cni"]; got != "plugin 0" {
		t.Errorf("the plugin is now %q", got)
	}
}

func TestPrepareMakesARouterAndMountsBPF(t *testing.T) {
	if !inNamespaces(t) {
		return
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	sysctl := func(key string) string {
		t.Helper()
		value, err := os.ReadFile("/proc/sys/net/" + key)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(value))
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0o644); err != nil {
		t.Fatal(err)
	}
	bpffs := t.TempDir()
	t.Cleanup(func() { unix.Unmount(bpffs, 0) })
	for range 2 {
		if code, _, stderr := mooring(t, "", "prepare", "--bpffs", bpffs); code != 0 {
			t.Fatalf("exit %d: %s", code, stderr)
		}
		if v4, v6 := sysctl("ipv4/ip_forward"), sysctl("ipv6/conf/all/forwarding"); v4 != "1" || v6 != "1" {
			t.Errorf("forwarding: %s and %s", v4, v6)
		}
		var at unix.Statfs_t
		if err := unix.Statfs(bpffs, &at); err != nil || at.Type != unix.BPF_FS_MAGIC {
			t.Errorf("%s is on a file system of type %#x (%v)", bpffs, at.Type, err)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(mounts), " "+bpffs+" "); n != 1 {
		t.Errorf("%d file systems are mounted on %s", n, bpffs)
	}
}
