// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

var rollPrograms = []string{"call_roll_tcp", "call_roll_udp"}

// rollCall makes live sockets confirm their entries: socket iterators, each of
// which walks the network namespace in which it is opened.
type rollCall struct {
	walks  []*link.Iter
	number *ebpf.Variable
	last   uint32
}

func newRollCall(c *ebpf.Collection) (rollCall, error) {
	r := rollCall{number: c.Variables["roll_call"]}
	for _, name := range rollPrograms {
		it, err := link.AttachIter(link.IterOptions{Program: c.Programs[name]})
		if err != nil {
			r.close()
			return r, fmt.Errorf("attach %s: %w", name, err)
		}
		r.walks = append(r.walks, it)
	}
	return r, nil
}

func (r *rollCall) close() {
	for _, it := range r.walks {
		it.Close()
	}
	r.walks = nil
}

// RollCall has the sockets of the node and in the given network namespaces confirm their entries
// and bring the entries' counters up to date. It returns the call's number, by
// which a sweep knows the entries that nobody has confirmed. A namespace that is
// gone has no sockets. One caller at a time.
func (d *Datapath) RollCall(namespaces []string) (uint32, time.Duration, error) {
	d.roll.last++
	if d.roll.last == 0 {
		d.roll.last = 1
	}
	if err := d.roll.number.Set(d.roll.last); err != nil {
		return 0, 0, fmt.Errorf("number the roll call: %w", err)
	}
	var took time.Duration
	var err error
	onThreadOfItsOwn(func() {
		began := ThreadCPU()
		// The node's own sockets first: this thread is where the daemon is.
		err = d.roll.walk()
		for _, path := range namespaces {
			if failed := d.roll.in(path); failed != nil && !errors.Is(failed, fs.ErrNotExist) {
				err = errors.Join(err, fmt.Errorf("call the roll of sockets in %s: %w", path, failed))
			}
		}
		took = ThreadCPU() - began
	})
	return d.roll.last, took, err
}

// onThreadOfItsOwn runs f on a thread that ends with it: nothing else may run where f has
// been. The process's first thread never ends, and where it is is where others take the
// process to be (/proc/PID/ns): it has to wait meanwhile.
func onThreadOfItsOwn(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			onThreadOfItsOwn(f)
			runtime.UnlockOSThread()
			return
		}
		f()
	}()
	<-done
}

// ThreadCPU is the CPU time that this thread has had.
func ThreadCPU() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

func (r *rollCall) in(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(filepath.Dir(path)); err != nil {
			return fmt.Errorf("%v: mount the node's into the daemon's container", err)
		}
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
		return err
	}
	return r.walk()
}

// walk has the sockets of this thread's network namespace confirm.
func (r *rollCall) walk() error {
	for _, it := range r.walks {
		walk, err := it.Open()
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, walk)
		walk.Close()
		if err != nil {
			return err
		}
	}
	return nil
}
