// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"
)

// A result is one inner test: a node of the tree that t.Run made in the guest.
type result struct {
	// name is the part below the parent's.
	name, full string
	// action is pass, fail or skip; empty when the test did not end.
	action   string
	elapsed  float64
	output   strings.Builder
	children []*result
}

type event struct {
	Action, Test, Output string
	Elapsed              float64
}

// parse turns what `-test.v=test2json` printed into the tree of its tests,
// with Go's own converter. The root holds what belongs to no test.
func parse(output []byte) (*result, error) {
	cmd := exec.Command("go", "tool", "test2json", "-t")
	cmd.Stdin = bytes.NewReader(output)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	events, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go tool test2json: %w: %s", err, errs.String())
	}
	root := &result{}
	known := map[string]*result{"": root}
	decoder := json.NewDecoder(bytes.NewReader(events))
	for {
		var e event
		err := decoder.Decode(&e)
		if errors.Is(err, io.EOF) {
			return root, nil
		}
		if err != nil {
			return nil, fmt.Errorf("decode the results: %w", err)
		}
		r := known[e.Test]
		if r == nil {
			r = &result{full: e.Test}
			// A name may hold slashes of its own: the parent is the longest known.
			parent := e.Test
			for known[parent] == nil || parent == e.Test {
				parent = parent[:max(0, strings.LastIndexByte(parent, '/'))]
			}
			r.name = strings.TrimPrefix(strings.TrimPrefix(e.Test, parent), "/")
			known[parent].children = append(known[parent].children, r)
			known[e.Test] = r
		}
		switch e.Action {
		case "output":
			if !framing(e.Output) {
				r.output.WriteString(e.Output)
			}
		case "pass", "fail", "skip":
			r.action, r.elapsed = e.Action, e.Elapsed
		}
	}
}

// framing are the lines by which a test binary tells about its tests; the
// outer run prints its own.
func framing(line string) bool {
	line = strings.TrimLeft(line, " ")
	for _, prefix := range []string{"=== RUN ", "=== PAUSE ", "=== CONT ", "=== NAME ", "--- PASS: ", "--- FAIL: ", "--- SKIP: "} {
		if strings.HasPrefix(line, prefix) {
			return true
		}
	}
	return line == "PASS\n" || line == "FAIL\n" || line == "\n"
}

// count adds up the tests that have no subtests.
func (r *result) count() (passed, failed, skipped int) {
	for _, c := range r.children {
		p, f, s := c.count()
		passed, failed, skipped = passed+p, failed+f, skipped+s
	}
	if len(r.children) == 0 && r.full != "" {
		switch r.action {
		case "pass":
			passed++
		case "skip":
			skipped++
		default:
			failed++
		}
	}
	return passed, failed, skipped
}

func (r *result) failedBelow() bool {
	for _, c := range r.children {
		if c.action == "fail" || c.action == "" || c.failedBelow() {
			return true
		}
	}
	return false
}

// verdict is how the outer run reports a test: as pass, fail or skip, with what
// to say about it.
func (r *result) verdict(noSkip bool) (action, say string) {
	said := strings.TrimRight(r.output.String(), "\n")
	if said != "" {
		said = "\n" + said
	}
	switch {
	case r.action == "":
		return "fail", "did not end" + said
	case r.action == "fail" && r.failedBelow():
		// The subtests that failed have made it fail already.
		return "pass", fmt.Sprintf("%.1f s in the guest%s", r.elapsed, said)
	case r.action == "fail":
		return "fail", fmt.Sprintf("failed after %.1f s in the guest%s", r.elapsed, said)
	case r.action == "skip" && noSkip:
		return "fail", "skipped in the guest, which NO_SKIP=1 forbids: let it prove what that kernel does instead" + said
	case r.action == "skip":
		return "skip", "skipped in the guest" + said
	}
	return "pass", fmt.Sprintf("%.1f s in the guest%s", r.elapsed, said)
}

// replay reports an inner test, and those below it, as subtests of t.
func (r *result) replay(t *testing.T, noSkip bool) {
	t.Run(r.name, func(t *testing.T) {
		for _, c := range r.children {
			c.replay(t, noSkip)
		}
		switch action, say := r.verdict(noSkip); action {
		case "fail":
			t.Error(say)
		case "skip":
			t.Skip(say)
		default:
			t.Log(say)
		}
	})
}
