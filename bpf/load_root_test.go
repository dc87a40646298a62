// SPDX-License-Identifier: Apache-2.0

//go:build root

package bpf

import (
	"path/filepath"
	"testing"
)

func TestEveryProgramLoads(t *testing.T) {
	d := load(t)
	t.Logf("%d jiffies a second; hook %+v", d.JiffiesPerSecond, d.Hook)
	if _, _, err := d.RollCall([]string{"/proc/self/ns/net"}); err != nil {
		t.Error(err)
	}
	if _, _, err := d.RollCall([]string{filepath.Join(t.TempDir(), "gone")}); err != nil {
		t.Errorf("of a namespace that is gone: %v", err)
	}
	if _, _, err := d.RollCall([]string{filepath.Join(t.TempDir(), "unseen", "pod")}); err == nil {
		t.Error("namespaces whose directory is not there pass for gone")
	}
	if _, _, err := d.Bury(); err != nil {
		t.Error(err)
	}
	driver, err := d.LoadXDP(XDPOptions{MAC: [6]byte{2, 0, 0, 0, 0, 1}})
	if err != nil {
		t.Fatal(err)
	}
	driver.Close()
}

// load loads the datapath below a BPF filesystem of the test's own.
func load(t *testing.T) *Datapath {
	t.Helper()
	dir := t.TempDir() + "/bpf"
	t.Cleanup(func() {
		if err := Remove(dir); err != nil {
			t.Error(err)
		}
	})
	d, err := Load(Options{BPFFS: dir, MaxEntries: 4096, Hook: HookAuto})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}
