// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/bpf"
)

// inGuest says whether a kernel of the matrix runs the test: emulated, and slow.
func inGuest() bool { return os.Getenv("MOORING_KERNEL") != "" }

// A loaded is a datapath that tests use one after the other: a verifier takes
// ten seconds for the programs where the processor is emulated.
type loaded struct {
	*bpf.Datapath
	bpffs string
	used  bool
}

// kept are the datapaths of this process, by what they were loaded with. They end with the guest.
var kept = map[Options][]*loaded{}

// load loads a datapath, or in a guest takes one that an earlier test has left,
// emptied.
func (n *Node) load(t testing.TB, o Options) *bpf.Datapath {
	t.Helper()
	options := bpf.Options{BPFFS: n.BPFFS, MaxEntries: o.MaxEntries, Policy: o.Policy, Hook: o.Hook, Cgroup: o.Cgroup, SNATPorts: o.SNATPorts, NoCache: o.NoCache}
	if !inGuest() {
		d, err := bpf.Load(options)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		return d
	}
	for _, l := range kept[o] {
		if !l.used {
			n.take(t, l)
			return l.Datapath
		}
	}
	dir, err := os.MkdirTemp("", "bpf")
	if err != nil {
		t.Fatal(err)
	}
	options.BPFFS = dir
	d, err := bpf.Load(options)
	if err != nil {
		t.Fatal(err)
	}
	l := &loaded{Datapath: d, bpffs: dir}
	kept[o] = append(kept[o], l)
	n.take(t, l)
	return d
}

func (n *Node) take(t testing.TB, l *loaded) {
	t.Helper()
	l.used = true
	n.BPFFS = l.bpffs
	t.Cleanup(func() {
		l.used = false
		if err := l.empty(); err != nil {
			t.Fatal(err)
		}
	})
}

// empty makes the maps what they were when they were loaded.
func (l *loaded) empty() error {
	links, err := filepath.Glob(filepath.Join(l.bpffs, "v*", "links", "lxc*"))
	if err != nil {
		return err
	}
	for _, pin := range links {
		if err := os.Remove(pin); err != nil {
			return err
		}
	}
	pins, err := filepath.Glob(filepath.Join(l.bpffs, "v*", "maps", "*"))
	if err != nil {
		return err
	}
	for _, pin := range pins {
		m, err := ebpf.LoadPinnedMap(pin, nil)
		if err != nil {
			return fmt.Errorf("open %s: %w", pin, err)
		}
		err = emptyMap(m)
		m.Close()
		if err != nil {
			return fmt.Errorf("empty %s: %w", pin, err)
		}
	}
	return nil
}

func emptyMap(m *ebpf.Map) error {
	switch m.Type() {
	case ebpf.Hash, ebpf.LRUHash, ebpf.PerCPUHash, ebpf.LPMTrie:
		var keys [][]byte
		var key, value []byte
		var perCPU [][]byte
		into := any(&value)
		if m.Type() == ebpf.PerCPUHash {
			into = &perCPU
		}
		all := m.Iterate()
		for all.Next(&key, into) {
			keys = append(keys, key)
			key, value, perCPU = nil, nil, nil
		}
		if err := all.Err(); err != nil {
			return err
		}
		for _, key := range keys {
			if err := m.Delete(key); err != nil {
				return err
			}
		}
	case ebpf.Queue:
		value := make([]byte, m.ValueSize())
		for m.LookupAndDelete(nil, &value) == nil {
		}
	case ebpf.PerCPUArray:
		zero := make([][]byte, ebpf.MustPossibleCPU())
		for i := range zero {
			zero[i] = make([]byte, m.ValueSize())
		}
		for i := range m.MaxEntries() {
			if err := m.Put(i, zero); err != nil {
				return err
			}
		}
	case ebpf.Array:
		// Tests number their pods, backends and services from the lowest on.
		for i := range min(m.MaxEntries(), 256) {
			if err := m.Put(i, make([]byte, m.ValueSize())); err != nil {
				return err
			}
		}
	}
	return nil
}
