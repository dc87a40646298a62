// SPDX-License-Identifier: Apache-2.0

package reachability

import (
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"
)

// Maps are what policies are written to, by name.
var Maps = []string{"mooring_policies", "mooring_identities", "mooring_verdicts", "mooring_profiles", "mooring_policy_drops"}

// openMaps opens the pinned maps of the datapath below bpffs, for one visit each.
func openMaps(bpffs string, readOnly bool, visit func(name string, m *ebpf.Map) error) error {
	for _, name := range Maps {
		pins, err := filepath.Glob(filepath.Join(bpffs, "v*", "maps", name))
		if err != nil || len(pins) != 1 {
			return fmt.Errorf("%s is pinned below %s as %q (%v)", name, bpffs, pins, err)
		}
		m, err := ebpf.LoadPinnedMap(pins[0], &ebpf.LoadPinOptions{ReadOnly: readOnly})
		if err != nil {
			return fmt.Errorf("open %s: %w", pins[0], err)
		}
		err = visit(name, m)
		m.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// MapMemory is what the kernel says that the maps of policies take, in bytes.
func MapMemory(bpffs string) (uint64, error) {
	var sum uint64
	err := openMaps(bpffs, true, func(name string, m *ebpf.Map) error {
		info, err := m.Info()
		if err != nil {
			return fmt.Errorf("read about %s: %w", name, err)
		}
		bytes, _ := info.Memlock() // an empty trie takes nothing
		sum += bytes
		return nil
	})
	return sum, err
}

// Contents are the entries of the maps that say who is allowed what, by map, each as text.
func Contents(bpffs string) (map[string]map[string]string, error) {
	all := make(map[string]map[string]string)
	err := openMaps(bpffs, true, func(name string, m *ebpf.Map) error {
		if m.Type() != ebpf.Hash && m.Type() != ebpf.LPMTrie {
			return nil
		}
		all[name] = make(map[string]string)
		var key, value []byte
		entries := m.Iterate()
		for entries.Next(&key, &value) {
			all[name][fmt.Sprintf("%x", key)] = fmt.Sprintf("%x", value)
		}
		if err := entries.Err(); err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		return nil
	})
	return all, err
}
