// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
)

// Run calls f with a T of its own, for programs that are no tests, and takes
// down what f made: after its end, after Fatalf, and after a panic, which goes
// on then. It returns what went wrong.
func Run(name string, f func(T)) error {
	p := &program{name: name}
	var panicked any
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if r := recover(); r != nil {
				panicked = fmt.Sprintf("%v\n%s", r, stack())
			}
		}()
		f(p)
	}()
	<-done
	p.cleanUp()
	if panicked != nil {
		panic(panicked)
	}
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return errors.Join(p.errors...)
}

func stack() []byte {
	buffer := make([]byte, 1<<16)
	return buffer[:runtime.Stack(buffer, false)]
}

type program struct {
	name     string
	mutex    sync.Mutex
	cleanups []func()
	errors   []error
}

func (p *program) Helper() {}

func (p *program) Name() string { return p.name }

func (p *program) Cleanup(f func()) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.cleanups = append(p.cleanups, f)
}

// cleanUp runs the cleanups, the last one first, and those that they add. One
// that calls Fatalf ends alone.
func (p *program) cleanUp() {
	for {
		p.mutex.Lock()
		last := len(p.cleanups) - 1
		if last < 0 {
			p.mutex.Unlock()
			return
		}
		f := p.cleanups[last]
		p.cleanups = slices.Delete(p.cleanups, last, last+1)
		p.mutex.Unlock()
		done := make(chan struct{})
		go func() {
			defer close(done)
			f()
		}()
		<-done
	}
}

func (p *program) Failed() bool {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return len(p.errors) > 0
}

func (p *program) Logf(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

func (p *program) Errorf(format string, args ...any) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.errors = append(p.errors, fmt.Errorf(format, args...))
}

func (p *program) Fatalf(format string, args ...any) {
	p.Errorf(format, args...)
	runtime.Goexit()
}
