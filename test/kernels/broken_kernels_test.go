// SPDX-License-Identifier: Apache-2.0

//go:build kernels

package kernels

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestBrokenGuestsFail runs scripts in the place of a test binary that break the
// guest in each way that a run has to notice.
func TestBrokenGuestsFail(t *testing.T) {
	if err := Install(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	root, err := ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, script string
		wall         time.Duration
		err, console string
		code         int
	}{
		{
			name: "kernel panic", script: "echo started; sleep 1; echo c >/proc/sysrq-trigger; sleep 100",
			err: "ended before its jobs did", console: "Kernel panic",
		},
		{
			name: "console lost", script: "echo started; poweroff -f; sleep 100",
			err: "ended before its jobs did",
		},
		{
			name: "hang", script: "echo started; sleep 1000", wall: 15 * time.Second,
			err: "hung",
		},
		{
			name: "test binary killed", script: "echo started; kill -KILL $$",
			code: 137,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			tree, err := Fetch(t.Context(), Cache(root), Matrix[1])
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			binary := filepath.Join(dir, "job")
			if err := os.WriteFile(binary, []byte("#!/bin/sh\n"+test.script+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			g := guest{tree: tree, logs: dir, wall: test.wall,
				jobs: []builtJob{{Job: Job{Package: "./broken"}, binary: binary, source: root}}}
			o, err := g.run(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(o.console)
			if err != nil {
				t.Fatal(err)
			}
			if test.err == "" && o.err != nil {
				t.Errorf("got %v", o.err)
			}
			if test.err != "" && (o.err == nil || !strings.Contains(o.err.Error(), test.err)) {
				t.Errorf("got %v, expected an error with %q", o.err, test.err)
			}
			if !strings.Contains(tail(string(text), 60), test.console) {
				t.Errorf("no %q at the console's end:\n%s", test.console, tail(string(text), 60))
			}
			if test.err == "" && (!o.jobs[0].ended || o.jobs[0].code != test.code) {
				t.Errorf("the job ended %v with code %d, expected %d", o.jobs[0].ended, o.jobs[0].code, test.code)
			}
		})
	}
}
