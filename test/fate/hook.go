// SPDX-License-Identifier: Apache-2.0

package fate

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/mooring-cni/mooring/test/netns"
)

// HookPrograms are the programs that notice the ends of sockets, by name, of the
// daemon whose pins are below bpffs.
func HookPrograms(t netns.T, bpffs string) map[string]*ebpf.Program {
	t.Helper()
	pins, err := filepath.Glob(filepath.Join(bpffs, "v*", "links", "hook-*"))
	if err != nil {
		t.Fatalf("find the hook's links: %v", err)
	}
	programs := map[string]*ebpf.Program{}
	for _, pin := range pins {
		p, err := linkedProgram(pin)
		if err != nil {
			t.Fatalf("open the program of %s: %v", pin, err)
		}
		t.Cleanup(func() { p.Close() })
		programs[strings.TrimPrefix(filepath.Base(pin), "hook-")] = p
	}
	return programs
}

func linkedProgram(pin string) (*ebpf.Program, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return nil, err
	}
	return ebpf.NewProgramFromID(info.Program)
}

// Missed are the runs that the kernel skipped because the program was running on
// that processor already.
func Missed(programs map[string]*ebpf.Program) (missed map[string]uint64, err error) {
	missed = map[string]uint64{}
	for name, p := range programs {
		s, err := p.Stats()
		if err != nil {
			return nil, fmt.Errorf("read the statistics of %s: %w", name, err)
		}
		if s.RecursionMisses > 0 {
			missed[name] = s.RecursionMisses
		}
	}
	return missed, nil
}
