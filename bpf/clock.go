// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"fmt"
	"time"

	"github.com/cilium/ebpf"
)

// runSyscall runs a syscall program on a context that it reads and writes.
func runSyscall[T any](prog *ebpf.Program, ctx *T) error {
	ret, err := prog.Run(&ebpf.RunOptions{Context: *ctx, ContextOut: ctx})
	if err != nil {
		return err
	}
	if ret != 0 {
		return fmt.Errorf("the program answered %d", ret)
	}
	return nil
}

// jiffiesPerSecond finds the kernel's CONFIG_HZ by reading both clocks twice:
// the configuration itself is not readable on every machine.
func jiffiesPerSecond(prog *ebpf.Program) (uint64, error) {
	var first, second abiClock
	if err := runSyscall(prog, &first); err != nil {
		return 0, fmt.Errorf("read the kernel's clocks: %w", err)
	}
	// jiffies64 starts 300 s before its low half wraps (INITIAL_JIFFIES), so
	// its value and the uptime tell the rate, except close to those 300 s.
	uptime := float64(first.Monotonic) / 1e9
	if uptime < 280 || uptime > 330 {
		if hz := closest(func(hz float64) float64 {
			return (float64(first.Jiffies) - (1<<32 - 300*hz)) / uptime
		}); hz != 0 {
			return hz, nil
		}
	}
	time.Sleep(200 * time.Millisecond)
	if err := runSyscall(prog, &second); err != nil {
		return 0, fmt.Errorf("read the kernel's clocks: %w", err)
	}
	rate := float64(second.Jiffies-first.Jiffies) / (float64(second.Monotonic-first.Monotonic) / 1e9)
	if hz := closest(func(float64) float64 { return rate }); hz != 0 {
		return hz, nil
	}
	return 0, fmt.Errorf("measure the kernel's tick: %.1f Hz is none that Linux is built with", rate)
}

// closest is the rate that Linux is built with (kernel/Kconfig.hz) which a
// measurement fits within 5 %, or 0.
func closest(measure func(hz float64) float64) uint64 {
	for _, hz := range []float64{100, 250, 300, 1000} {
		if m := measure(hz); m > 0.95*hz && m < 1.05*hz {
			return uint64(hz)
		}
	}
	return 0
}
