// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write testdata/abi.golden anew")

const golden = "testdata/abi.golden"

// The layout of everything that C and Go share, as the compiler made it. A pin
// outlives the binary that made it: a change here is one that a running node
// must survive.
func TestSharedLayoutIsTheGoldenOne(t *testing.T) {
	spec, err := btf.LoadSpecFromReader(bytes.NewReader(_AbiBytes))
	if err != nil {
		t.Fatalf("read the types of abi_bpfel.o: %v", err)
	}
	var types []string
	for typ, err := range spec.All() {
		if err != nil {
			t.Fatal(err)
		}
		switch typ := typ.(type) {
		case *btf.Struct:
			// Unnamed structs are the maps' own descriptions.
			if typ.Name != "" {
				types = append(types, structLayout(t, typ))
			}
		case *btf.Enum:
			if typ.Name != "" {
				types = append(types, enumLayout(typ))
			}
		}
	}
	collection, err := loadAbi()
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range collection.Maps {
		if strings.HasPrefix(name, "mooring_") {
			types = append(types, fmt.Sprintf("map %s: %s, key %d bytes, value %d bytes, flags %#x\n", name, m.Type, m.KeySize, m.ValueSize, m.Flags))
		}
	}
	slices.Sort(types)
	got := fmt.Sprintf("version %d\n\n%s", ABIVersion, strings.Join(types, "\n"))

	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("the layout of lib/abi.h has changed (-golden +now): if it is meant, raise ABI_VERSION and `make generate`\n%s", diff)
	}
}

func TestVersionOfTheLayoutIsThatOfTheHeader(t *testing.T) {
	header, err := os.ReadFile("lib/abi.h")
	if err != nil {
		t.Fatal(err)
	}
	match := regexp.MustCompile(`(?m)^#define ABI_VERSION (\d+)$`).FindSubmatch(header)
	if match == nil {
		t.Fatal("lib/abi.h has no ABI_VERSION")
	}
	if got, want := fmt.Sprint(ABIVersion), string(match[1]); got != want {
		t.Errorf("ABIVersion is %s in pins.go and %s in lib/abi.h", got, want)
	}
}

func structLayout(t *testing.T, s *btf.Struct) string {
	var b strings.Builder
	fmt.Fprintf(&b, "struct %s: %d bytes\n", s.Name, s.Size)
	end := uint32(0)
	for _, m := range s.Members {
		size, err := btf.Sizeof(m.Type)
		if err != nil {
			t.Fatalf("size of %s.%s: %v", s.Name, m.Name, err)
		}
		offset := m.Offset.Bytes()
		if offset != end {
			t.Errorf("struct %s has a hole of %d bytes before %s: name the padding", s.Name, offset-end, m.Name)
		}
		end = offset + uint32(size)
		fmt.Fprintf(&b, "  %3d  %-20s %s\n", offset, m.Name, typeName(m.Type))
	}
	if end != s.Size {
		t.Errorf("struct %s ends with %d bytes without a name: name the padding", s.Name, s.Size-end)
	}
	return b.String()
}

func enumLayout(e *btf.Enum) string {
	var b strings.Builder
	fmt.Fprintf(&b, "enum %s: %d bytes\n", e.Name, e.Size)
	for _, v := range e.Values {
		fmt.Fprintf(&b, "  %3d  %s\n", v.Value, v.Name)
	}
	return b.String()
}

func typeName(typ btf.Type) string {
	if array, ok := typ.(*btf.Array); ok {
		return fmt.Sprintf("%s[%d]", typeName(array.Type), array.Nelems)
	}
	if name := typ.TypeName(); name != "" {
		return name
	}
	return fmt.Sprint(typ)
}
