// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A process whose first thread has gone into a pod's namespace is taken for the pod's.
func TestAThreadOfItsOwnIsNotTheProcesssFirst(t *testing.T) {
	var wait sync.WaitGroup
	var runs, first atomic.Int64
	for range 16 { // more than threads that are at work already, so that each is asked at times
		wait.Go(func() {
			for range 50 {
				onThreadOfItsOwn(func() {
					if unix.Gettid() == unix.Getpid() {
						first.Add(1)
					}
					pause := unix.NsecToTimespec(int64(100 * time.Microsecond))
					unix.Nanosleep(&pause, nil)
					runs.Add(1)
				})
			}
		})
	}
	wait.Wait()
	if runs.Load() != 16*50 || first.Load() != 0 {
		t.Errorf("of %d runs %d were on the process's first thread", runs.Load(), first.Load())
	}
}
