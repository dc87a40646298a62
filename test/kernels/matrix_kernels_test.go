// SPDX-License-Identifier: Apache-2.0

//go:build kernels

package kernels

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestKernels runs every job of the matrix in every kernel: TestKernels/6.1/bpf/TestName.
// KERNELS="6.1 newest" limits it to some kernels, KERNELS_JOBS="bpf fate/trampoline" to
// some jobs, -test.parallel says how many kernels run at once.
func TestKernels(t *testing.T) {
	ctx := t.Context()
	if deadline, ok := t.Deadline(); ok {
		limited, cancel := context.WithDeadline(ctx, deadline.Add(-20*time.Second))
		t.Cleanup(cancel)
		ctx = limited
	}
	chosen, err := choose(os.Getenv("KERNELS"))
	if err != nil {
		t.Fatal(err)
	}
	jobs := Jobs
	names := strings.Fields(os.Getenv("KERNELS_JOBS"))
	if os.Getenv("KERNELS_LONG") == "1" || len(names) > 0 {
		jobs = append(slices.Clone(Jobs), Long...)
	}
	if len(names) > 0 {
		jobs = slices.DeleteFunc(jobs, func(j Job) bool { return !slices.Contains(names, j.name()) })
		if len(jobs) != len(names) {
			t.Fatalf("KERNELS_JOBS names %q, of which %d exist", names, len(jobs))
		}
	}
	if err := Install(ctx, jobs); err != nil {
		t.Fatal(err)
	}
	root, err := ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	built, err := build(ctx, root, t.TempDir(), jobs)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("test binaries built in %.0f s", time.Since(start).Seconds())

	noSkip := os.Getenv("NO_SKIP") == "1"
	for _, k := range chosen {
		t.Run(k.Name, func(t *testing.T) {
			t.Parallel()
			start := time.Now()
			tree, err := Fetch(ctx, Cache(root), k)
			if err != nil && k.Optional && !noSkip && os.Getenv("KERNELS") == "" {
				t.Skipf("optional kernel: %v", err)
			}
			if err != nil {
				t.Fatal(err)
			}
			if tree.Stale != nil {
				t.Logf("the cached kernel is used, no newer one can be had: %v", tree.Stale)
			}
			if k.Name != "newest" && tree.Series() != k.Name {
				t.Fatalf("package %s of %s is kernel %s, expected %s", k.Package, strings.Join(k.Suites, ", "), tree.Release, k.Name)
			}
			fetched := time.Since(start)
			g := guest{tree: tree, logs: filepath.Join(Cache(root), k.Name, "logs")}
			for _, j := range built {
				if j.runsOn(k) {
					g.jobs = append(g.jobs, j)
				}
			}
			if len(g.jobs) == 0 {
				t.Fatalf("no job names kernel %s", k.Name)
			}
			o, err := g.run(ctx)
			for boots := 1; err == nil && o.emulatorsFault() && boots < 3; boots++ {
				t.Logf("boot %d ended by an int3 that nobody handled, which is the emulator's: booted again", boots)
				o, err = g.run(ctx)
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("kernel %s: fetched in %.0f s, booted in %.0f s, ended after %.0f s, with %.0f s of processors' time (%s)",
				tree.Release, fetched.Seconds(), o.boot.Seconds(), o.total.Seconds(), o.cpu.Seconds(), g.logs)
			if len(o.absent) > 0 {
				t.Logf("modules that this kernel does not have: %s", strings.Join(o.absent, " "))
			}
			report(t, k, g, o, noSkip)
		})
	}
}

func choose(names string) ([]Kernel, error) {
	want := strings.FieldsFunc(names, func(r rune) bool { return r == ' ' || r == ',' })
	if len(want) == 0 {
		return Matrix, nil
	}
	var chosen []Kernel
	for _, name := range want {
		i := slices.IndexFunc(Matrix, func(k Kernel) bool { return k.Name == name })
		if i < 0 {
			var known []string
			for _, k := range Matrix {
				known = append(known, k.Name)
			}
			return nil, fmt.Errorf("KERNELS names %q: known are %s", name, strings.Join(known, ", "))
		}
		chosen = append(chosen, Matrix[i])
	}
	return chosen, nil
}

// report turns one boot's outcome into subtests.
func report(t *testing.T, k Kernel, g guest, o outcome, noSkip bool) {
	text, err := os.ReadFile(o.console)
	if err != nil {
		t.Fatal(err)
	}
	console := string(text)
	if o.err != nil {
		t.Errorf("%v; the end of the console (%s):\n%s", o.err, o.console, tail(console, 60))
	} else if lines := troubles(console); len(lines) > 0 {
		t.Errorf("the kernel complained (%s):\n%s", o.console, strings.Join(lines, "\n"))
	}
	for i, j := range g.jobs {
		t.Run(j.name(), func(t *testing.T) {
			out := o.jobs[i]
			if !out.started {
				t.Fatal("the guest ended before this job began")
			}
			results, err := parse(out.output)
			if err != nil {
				t.Fatal(err)
			}
			passed, failed, skipped := results.count()
			t.Logf("%d passed, %d failed, %d skipped in %.0f s", passed, failed, skipped, out.took.Seconds())
			for _, r := range results.children {
				r.replay(t, noSkip)
			}
			said := strings.TrimSpace(results.output.String())
			switch {
			case !out.ended:
				t.Errorf("the guest ended inside this job\n%s", said)
			case out.code != 0 && !t.Failed():
				t.Errorf("the test binary ended with code %d\n%s", out.code, said)
			case out.code != 0:
				t.Logf("the test binary ended with code %d\n%s", out.code, said)
			case passed+failed+skipped == 0:
				t.Errorf("-test.run %q matches no test", j.Run)
			}
		})
	}
}
