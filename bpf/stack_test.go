// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// Before 6.8 the verifier rounds each function's stack up to 32 bytes, so that a
// program which newer kernels take is refused by 6.1: found here without one.
const (
	stackLimit    = 512
	stackRounding = 32
)

// functions splits a program where its functions begin, and tells what each needs
// of the stack and calls.
func functions(p *ebpf.ProgramSpec) (frames map[string]int, calls map[string][]string) {
	frames, calls = map[string]int{}, map[string][]string{}
	name := ""
	for _, in := range p.Instructions {
		// Labels within a function are no functions: those have debug information.
		if s := in.Symbol(); s != "" && !strings.HasPrefix(s, "LBB") {
			name = s
			frames[name] = 0
		}
		at := 0
		switch class := in.OpCode.Class(); {
		case class == asm.LdXClass && in.Src == asm.RFP, class.IsStore() && in.Dst == asm.RFP:
			at = -int(in.Offset)
		case class == asm.ALU64Class && in.OpCode.ALUOp() == asm.Add && in.OpCode.Source() == asm.ImmSource && in.Constant < 0 && in.Constant >= -stackLimit:
			// The address of a variable is the frame's end and a distance down.
			at = -int(in.Constant)
		}
		frames[name] = max(frames[name], at)
		if in.IsFunctionCall() {
			calls[name] = append(calls[name], in.Reference())
		}
	}
	return frames, calls
}

func deepest(frames map[string]int, calls map[string][]string, name string) (depth int, chain string) {
	for _, callee := range calls[name] {
		if d, c := deepest(frames, calls, callee); d > depth {
			depth, chain = d, " -> "+c
		}
	}
	own := (max(frames[name], 1) + stackRounding - 1) / stackRounding * stackRounding
	return depth + own, name + chain
}

func TestNoChainOfCallsNeedsMoreStackThanTheOldestKernelHas(t *testing.T) {
	for object, load := range map[string]func() (*ebpf.CollectionSpec, error){
		"endpoint": loadEndpoint, "sock": loadSock, "sweep": loadSweep, "host": loadHost, "north": loadNorth, "xdp": loadXdp,
	} {
		spec, err := load()
		if err != nil {
			t.Fatal(err)
		}
		for name, p := range spec.Programs {
			frames, calls := functions(p)
			depth, chain := deepest(frames, calls, name)
			t.Logf("%s: %s: %d bytes: %s", object, name, depth, chain)
			if len(frames) < 1 || len(calls) == 0 && strings.Contains(name, "container") {
				t.Fatalf("%s: no functions are found in %d instructions", name, len(p.Instructions))
			}
			if depth > stackLimit {
				t.Errorf("%s needs %d bytes of stack by %s; 6.1 has %d", name, depth, chain, stackLimit)
			}
		}
	}
}
