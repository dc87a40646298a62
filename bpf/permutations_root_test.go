// SPDX-License-Identifier: Apache-2.0

//go:build root

package bpf

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// choices are the values that a constant is tried with: a byte is a yes or no,
// except the hook's mode, which has three.
func choices(name string) []uint8 {
	if name == "hook_mode" {
		return []uint8{uint8(abiHookModeHOOK_OFF), uint8(abiHookModeHOOK_TRACEPOINT), uint8(abiHookModeHOOK_TRAMPOLINE)}
	}
	return []uint8{0, 1}
}

// TestHooksLoadWithEveryConstant loads the programs of packets with every
// permutation of their one-byte constants: the verifier sees other code each time.
func TestHooksLoadWithEveryConstant(t *testing.T) {
	for object, load := range map[string]func() (*ebpf.CollectionSpec, error){"endpoint": loadEndpoint, "north": loadNorth, "xdp": loadXdp} {
		t.Run(object, func(t *testing.T) {
			spec, err := load()
			if err != nil {
				t.Fatal(err)
			}
			loadWithEveryConstant(t, spec)
		})
	}
}

func loadWithEveryConstant(t *testing.T, spec *ebpf.CollectionSpec) {
	t.Helper()
	var names []string
	for name, v := range spec.Variables {
		if _, ok := btf.UnderlyingType(v.Type.Type).(*btf.Int); ok && v.Size() == 1 {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		t.Fatal("no constant of one byte was found: this test looks for the wrong thing")
	}
	var load func(set []string, names []string)
	load = func(set []string, names []string) {
		if len(names) > 0 {
			for _, value := range choices(names[0]) {
				if err := spec.Variables[names[0]].Set(value); err != nil {
					t.Fatalf("set %s: %v", names[0], err)
				}
				load(append(set[:len(set):len(set)], fmt.Sprintf("%s=%d", names[0], value)), names[1:])
			}
			return
		}
		t.Run(strings.Join(set, ","), func(t *testing.T) {
			own := spec.Copy()
			sizeMaps(own, Options{})
			dir := t.TempDir() + "/bpf"
			if err := Mount(dir); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := Remove(dir); err != nil {
					t.Error(err)
				}
			})
			pins := PinsAt(dir)
			if err := pins.make(); err != nil {
				t.Fatal(err)
			}
			c, err := ebpf.NewCollectionWithOptions(own, ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: pins.maps()}})
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
		})
	}
	load(nil, names)
}
