// SPDX-License-Identifier: Apache-2.0

// Package netns makes network namespaces for tests, runs code and programs in
// them, and takes everything down again: after a failed test, after a panic,
// and, at the next run, after a test that was killed.
//
//	node := netns.NewNode(t)                  // lo, an uplink to node.Outside, a bpffs, room for state
//	pod := netns.New(t, "pod")                // empty, for CNI to fill: pod.Path()
//	node.Start(t, "bin/mooringd", ...)        // ends with the test, its output shows when the test fails
//	netns.HTTPEcho(t, pod, "[::]:8080", "web")
//	body, err := node.Get("http://10.244.0.5:8080/")
//
// The machine's own network namespace is only ever the one that is left.
package netns

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// T is what the package needs of a *testing.T, for programs that have none.
type T interface {
	Helper()
	Name() string
	Cleanup(func())
	Failed() bool
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// directory is where iproute2 looks for namespaces: `ip -n NAME` works.
const directory = "/run/netns"

// NS is a network namespace.
type NS struct {
	name   string
	file   *os.File
	handle *netlink.Handle
}

var count atomic.Uint32

// New makes a namespace in which lo is up. The label shows in its name:
// mrtest-PID-NUMBER-LABEL. It goes when the test ends, with all processes that
// are still in it.
func New(t T, label string) *NS {
	t.Helper()
	n := Empty(t, label)
	n.up(t, "lo")
	return n
}

// Empty makes a namespace as a container runtime does: nothing is up.
func Empty(t T, label string) *NS {
	t.Helper()
	sweep()
	n := &NS{name: fmt.Sprintf("%s%d-%d-%s", prefix, os.Getpid(), count.Add(1), label)}
	if err := n.make(); err != nil {
		t.Fatalf("make network namespace %s: %v", n.name, err)
	}
	t.Cleanup(func() { n.remove(t) })
	return n
}

func (n *NS) make() error {
	if os.Geteuid() != 0 {
		return errors.New("this test needs root: sudo make test-root")
	}
	if err := os.MkdirAll(directory, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(n.Path(), nil, 0o444); err != nil {
		return err
	}
	// A thread of its own makes the namespace; it ends with the goroutine that
	// holds it, since nothing unlocks it.
	made := make(chan error)
	go func() {
		runtime.LockOSThread()
		made <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			if err := unix.Mount("/proc/thread-self/ns/net", n.Path(), "none", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("mount: %w", err)
			}
			return nil
		}()
	}()
	err := <-made
	if err == nil {
		n.file, err = os.Open(n.Path())
	}
	if err == nil {
		n.handle, err = netlink.NewHandleAt(netns.NsHandle(n.file.Fd()), unix.NETLINK_ROUTE)
	}
	if err != nil {
		unmount(n.Path())
	}
	return err
}

func (n *NS) remove(t T) {
	for _, p := range n.processes() {
		t.Logf("namespace %s: process %d (%s) is left and is ended", n.name, p.pid, p.command)
		unix.Kill(p.pid, unix.SIGKILL)
	}
	n.handle.Close()
	n.file.Close()
	if err := unmount(n.Path()); err != nil {
		t.Errorf("remove network namespace %s: %v", n.name, err)
	}
}

// Delete takes the namespace's name away now, as `ip netns del` does. It is
// gone when the last process and socket in it are.
func (n *NS) Delete(t T) {
	t.Helper()
	n.handle.Close()
	if err := unmount(n.Path()); err != nil {
		t.Fatalf("remove network namespace %s: %v", n.name, err)
	}
	n.file.Close()
}

func unmount(path string) error {
	// EINVAL: nothing is mounted there. ENOENT: the name is gone already.
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Name is the name for `ip -n NAME`.
func (n *NS) Name() string { return n.name }

// Path is the namespace's file: what CNI_NETNS wants.
func (n *NS) Path() string { return filepath.Join(directory, n.name) }

// Netlink is a route netlink handle in the namespace.
func (n *NS) Netlink() *netlink.Handle { return n.handle }

// Do calls f with this goroutine in the namespace, and no other: goroutines
// that f starts are elsewhere, and so is what net.Dial does with a name of two
// addresses. Sockets that f makes belong to the namespace for good. f may call
// t.Fatal, and Do of another namespace.
func (n *NS) Do(f func() error) error {
	runtime.LockOSThread()
	before, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer before.Close()
	if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter %s: %w", n.name, err)
	}
	defer func() {
		// A thread that cannot go back is never used for anything else.
		if unix.Setns(int(before.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return f()
}

// Cmd is an exec.Cmd whose process starts in a namespace.
type Cmd struct {
	*exec.Cmd
	ns *NS
}

// Command prepares a program that runs in the namespace, and elsewhere only in
// that: unlike with `ip netns exec`, /sys stays as it is.
func (n *NS) Command(name string, args ...string) *Cmd {
	return &Cmd{Cmd: exec.Command(name, args...), ns: n}
}

// Start is exec.Cmd.Start in the namespace.
func (c *Cmd) Start() error { return c.ns.Do(c.Cmd.Start) }

// Run is exec.Cmd.Run in the namespace.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output is exec.Cmd.Output in the namespace; an error holds what the program
// said on its standard error.
func (c *Cmd) Output() ([]byte, error) {
	var out, complaint bytes.Buffer
	c.Stdout = &out
	if c.Stderr == nil {
		c.Stderr = &complaint
	}
	err := c.Run()
	if text := strings.TrimSpace(complaint.String()); err != nil && text != "" {
		err = fmt.Errorf("%w: %s", err, text)
	}
	return out.Bytes(), err
}

// CombinedOutput is exec.Cmd.CombinedOutput in the namespace.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	return out.Bytes(), err
}

// Sh runs a shell script in the namespace, returns what it prints, and fails
// the test when a command of it fails.
func (n *NS) Sh(t T, script string) string {
	t.Helper()
	out, err := n.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		t.Fatalf("in %s: %s: %v\n%s", n.name, script, err, out)
	}
	return string(out)
}

// Process is a program that runs beside the test.
type Process struct {
	*Cmd
	output lockedBuffer
	done   chan struct{}
	err    error
}

// Start starts a program beside the test. It gets SIGTERM when the test ends,
// and SIGKILL 5 s later; its output is logged if the test has failed.
func (n *NS) Start(t T, name string, args ...string) *Process {
	t.Helper()
	return n.Command(name, args...).Background(t)
}

// Background starts the prepared program as NS.Start does.
func (c *Cmd) Background(t T) *Process {
	t.Helper()
	p := &Process{Cmd: c, done: make(chan struct{})}
	if c.Stdout == nil {
		c.Stdout = &p.output
	}
	if c.Stderr == nil {
		c.Stderr = &p.output
	}
	if err := c.Start(); err != nil {
		t.Fatalf("start %s in %s: %v", c.Path, c.ns.name, err)
	}
	go func() {
		p.err = c.Cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.Stop()
		if t.Failed() {
			t.Logf("output of %s (%v):\n%s", filepath.Base(c.Path), p.err, p.Output())
		}
	})
	return p
}

// Stop sends SIGTERM and waits; after 5 s it sends SIGKILL. It returns what
// waiting for the program did.
func (p *Process) Stop() error {
	p.Cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(5 * time.Second):
		return p.Kill()
	}
	return p.err
}

// Kill sends SIGKILL and waits.
func (p *Process) Kill() error {
	p.Cmd.Process.Kill()
	<-p.done
	return p.err
}

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the program to end.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// Output is what the program has printed so far.
func (p *Process) Output() string { return p.output.String() }

type lockedBuffer struct {
	mutex  sync.Mutex
	buffer bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	return b.buffer.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	return b.buffer.String()
}

// Eventually waits until f is true, and fails the test when it is not within
// the limit.
func Eventually(t T, limit time.Duration, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

type process struct {
	pid     int
	command string
}

// processes lists the processes whose main thread is in the namespace.
func (n *NS) processes() (found []process) {
	var own unix.Stat_t
	if unix.Stat(n.Path(), &own) != nil {
		return nil
	}
	directories, _ := os.ReadDir("/proc")
	for _, d := range directories {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		var other unix.Stat_t
		if unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &other) != nil || own.Ino != other.Ino || own.Dev != other.Dev {
			continue
		}
		command, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		found = append(found, process{pid, strings.TrimSpace(string(command))})
	}
	return found
}
