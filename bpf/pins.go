// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ABIVersion is the layout of the shared types: part of the pin path, so that
// a daemon of another layout never adopts these maps. TestABI compares it with
// lib/abi.h.
const ABIVersion = 1

// Pins are the places of everything pinned below one root. The kernel keeps
// what is pinned: programs run and maps live while no daemon does.
type Pins struct{ root string }

// PinsAt returns the places below bpffs, the configuration key.
func PinsAt(bpffs string) Pins {
	return Pins{filepath.Join(bpffs, fmt.Sprintf("v%d", ABIVersion))}
}

func (p Pins) maps() string               { return filepath.Join(p.root, "maps") }
func (p Pins) program(name string) string { return filepath.Join(p.root, "programs", name) }
func (p Pins) link(dev, hook string) string {
	return filepath.Join(p.root, "links", withoutDots.Replace(dev)+"-"+hook)
}

// A BPF filesystem refuses names with a dot (EPERM), as the devices of VLANs have them.
var (
	withoutDots = strings.NewReplacer("%", "%25", ".", "%2e")
	withDots    = strings.NewReplacer("%25", "%", "%2e", ".")
)

// Mount makes bpffs usable: the directory is made, and a BPF filesystem is
// mounted on it unless it is on one already.
func Mount(bpffs string) error {
	if err := os.MkdirAll(bpffs, 0o755); err != nil {
		return fmt.Errorf("make pin root: %w", err)
	}
	on, err := onBPFFS(bpffs)
	if err != nil || on {
		return err
	}
	if err := unix.Mount("bpf", bpffs, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount a BPF filesystem on %s: %w", bpffs, err)
	}
	return nil
}

func onBPFFS(dir string) (bool, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return false, fmt.Errorf("statfs %s: %w", dir, err)
	}
	return uint64(fs.Type) == unix.BPF_FS_MAGIC, nil
}

// make creates the directories that hold pins.
func (p Pins) make() error {
	for _, dir := range []string{p.maps(), filepath.Dir(p.program("x")), filepath.Dir(p.link("x", "x"))} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make pin directory: %w", err)
		}
	}
	return nil
}

// Remove unpins everything below bpffs, of every ABI version, and unmounts the
// filesystem if Mount made it. What is attached only by its pin detaches.
func Remove(bpffs string) error {
	versions, err := filepath.Glob(filepath.Join(bpffs, "v*"))
	if err != nil {
		return err
	}
	for _, dir := range versions {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("remove pins: %w", err)
		}
	}
	if err := unix.Unmount(bpffs, 0); err != nil &&
		!errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", bpffs, err)
	}
	if err := os.Remove(bpffs); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("remove pin root: %w", err)
	}
	return nil
}

// EndpointLinks lists the host interfaces that have pinned endpoint programs.
func EndpointLinks(bpffs string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(PinsAt(bpffs).root, "links"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list pinned links: %w", err)
	}
	var names []string
	seen := make(map[string]bool)
	for _, e := range entries {
		dev, hook, ok := strings.Cut(e.Name(), "-")
		if ok && strings.HasPrefix(dev, "lxc") && !strings.HasPrefix(hook, wireHook.name) && hook != "to_wire" && !seen[dev] {
			seen[dev] = true
			names = append(names, dev)
		}
	}
	return names, nil
}
