// SPDX-License-Identifier: Apache-2.0

//go:build root

package main

import (
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/node"
)

func TestCleanupLeavesNothingOfMooringAndAllOfOthers(t *testing.T) {
	if !inNamespaces(t) {
		return
	}
	sh := func(line string) string {
		t.Helper()
		out, err := exec.Command("sh", "-ec", line).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
		return string(out)
	}
	const state = `ip route show table all proto 77; ip -6 route show table all proto 77
		iptables-save -t nat; iptables-save -t raw; ip6tables-save -t nat; ip6tables-save -t raw`
	directory := t.TempDir()
	socket, bpffs := filepath.Join(directory, "mooring.sock"), filepath.Join(directory, "bpf")
	if err := os.Mkdir(bpffs, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", bpffs, "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	sh("ip link set lo up; iptables -t nat -A POSTROUTING -s 172.16.0.0/12 -j ACCEPT; ip route add blackhole 10.99.0.0/16")
	if err := os.Mkdir(filepath.Join(bpffs, "v1"), 0o700); err != nil {
		t.Fatal(err)
	}
	machine := node.New(node.Options{
		Name: "a", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24"), netip.MustParsePrefix("fd00:10:244::/64")}, Masquerade: true,
		Log: slog.New(slog.DiscardHandler),
	})
	if p := machine.Problems(); len(p) > 0 {
		t.Fatal(p)
	}
	stateDir := filepath.Join(directory, "state")
	if err := os.MkdirAll(filepath.Join(stateDir, "endpoints"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := conf.WriteNode(socket, conf.Node{Name: "a", BPFFS: bpffs, StateDir: stateDir}); err != nil {
		t.Fatal(err)
	}
	if out := sh(state); !strings.Contains(out, "MOORING-NOTRACK") || !strings.Contains(out, "unreachable fd00:10:244::/64") {
		t.Fatalf("nothing to clean up:\n%s", out)
	}
	if code, stdout, stderr := mooring(t, socket, "cleanup"); code != 0 || stdout != "" || stderr != "" {
		t.Fatalf("exit %d, %q, %q", code, stdout, stderr)
	}
	out := sh(state)
	if strings.Contains(out, "MOORING") || strings.Contains(out, "10.244") || strings.Contains(out, "fd00") {
		t.Errorf("left:\n%s", out)
	}
	if !strings.Contains(out, "172.16.0.0/12") || !strings.Contains(sh("ip route show"), "10.99.0.0/16") {
		t.Errorf("other people's rules or routes are gone:\n%s", out)
	}
	for _, path := range []string{bpffs, conf.NodeFile(socket)} {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s is left", path)
		}
	}
	if _, err := os.Stat(stateDir); err != nil {
		t.Errorf("the addresses given must stay: %v", err)
	}
	// Again, with nothing left to tell whose pins are meant.
	if code, _, stderr := mooring(t, socket, "cleanup"); code != 0 || !strings.Contains(stderr, "--bpffs") {
		t.Errorf("again: exit %d, %q", code, stderr)
	}
	if err := conf.WriteNode(socket, conf.Node{Name: "a", BPFFS: bpffs, StateDir: stateDir}); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := mooring(t, socket, "cleanup", "--state"); code != 0 || stderr != "" {
		t.Errorf("--state: exit %d, %q", code, stderr)
	}
	if _, err := os.Stat(stateDir); err == nil {
		t.Error("--state left the state directory")
	}
}
