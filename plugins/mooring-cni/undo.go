// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
)

// undo takes back what an ADD that fails has done so far.
type undo []reversal

type reversal struct {
	what string
	do   func() error
}

// push notes how to take a step back. It comes before the step is tried, and
// must do for one that was done in part or not at all: of a request that was
// not answered nobody knows how far it came.
func (u *undo) push(what string, do func() error) {
	if do != nil {
		*u = append(*u, reversal{what, do})
	}
}

// unwind is for `defer undo.unwind(&err)` with the *named* result of the
// function: an err that shadows it would leave everything as it is. What cannot
// be taken back is told, and the rest is taken back all the same.
func (u *undo) unwind(err *error) {
	if *err == nil {
		return
	}
	for i := len(*u) - 1; i >= 0; i-- {
		if e := (*u)[i].do(); e != nil {
			*err = errors.Join(*err, fmt.Errorf("take back %q: %w", (*u)[i].what, e))
		}
	}
}
