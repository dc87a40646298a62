// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Cgroup is a cgroup of the test's own, of one name in every hierarchy. What
// runs in it ends with the test, however far it has forked: that is how
// daemonized children such as a container runtime's are found again.
type Cgroup struct {
	Name string // "/mrtest-PID-NUMBER-LABEL", as a kubelet wants it
	Path string // its directory in cgroup2, as mooringd wants it

	directory *os.File
}

// NewCgroup makes a cgroup.
func NewCgroup(t T, label string) *Cgroup {
	t.Helper()
	sweep()
	c := &Cgroup{Name: fmt.Sprintf("/%s%d-%d-%s", prefix, os.Getpid(), count.Add(1), label)}
	t.Cleanup(func() { c.remove(t) })
	hierarchies, err := cgroupHierarchies()
	if err != nil {
		t.Fatalf("make cgroup %s: %v", c.Name, err)
	}
	for _, h := range hierarchies {
		if err := h.make(c.Name); err != nil {
			t.Fatalf("make cgroup %s: %v", c.Name, err)
		}
		if h.unified {
			c.Path = filepath.Join(h.path, c.Name)
		}
	}
	if c.Path == "" {
		t.Fatalf("make cgroup %s: no cgroup2 hierarchy is mounted", c.Name)
	}
	if c.directory, err = os.Open(c.Path); err != nil {
		t.Fatalf("make cgroup %s: %v", c.Name, err)
	}
	return c
}

// In makes the prepared program start in the cgroup, in a session of its own:
// what is typed at the test's terminal does not reach it.
func (c *Cmd) In(g *Cgroup) *Cmd {
	if c.SysProcAttr == nil {
		c.SysProcAttr = &syscall.SysProcAttr{}
	}
	c.SysProcAttr.Setsid = true
	c.SysProcAttr.UseCgroupFD = true
	c.SysProcAttr.CgroupFD = int(g.directory.Fd())
	return c
}

// Enter puts this process, and so the sockets that it makes from now on in any
// namespace, into the cgroup until the test ends.
func (c *Cgroup) Enter(t T) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(c.Path, "cgroup.procs"), []byte(fmt.Sprint(os.Getpid())), 0); err != nil {
		t.Fatalf("enter cgroup %s: %v", c.Name, err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(filepath.Join(filepath.Dir(c.Path), "cgroup.procs"), []byte(fmt.Sprint(os.Getpid())), 0); err != nil {
			t.Errorf("leave cgroup %s: %v", c.Name, err)
		}
	})
}

func (c *Cgroup) remove(t T) {
	if c.directory != nil {
		c.directory.Close()
	}
	if err := removeCgroup(strings.TrimPrefix(c.Name, "/")); err != nil {
		t.Errorf("remove cgroup %s: %v", c.Name, err)
	}
}

type hierarchy struct {
	path    string
	unified bool
}

// cgroupHierarchies are those of version 1, if any, and version 2.
func cgroupHierarchies() (found []hierarchy, err error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		switch f := strings.Fields(line); {
		case len(f) < 3 || !strings.HasPrefix(f[1], "/sys/fs/cgroup"):
		case f[2] == "cgroup":
			found = append(found, hierarchy{path: f[1]})
		case f[2] == "cgroup2":
			found = append(found, hierarchy{path: f[1], unified: true})
		}
	}
	return found, nil
}

func (h hierarchy) make(name string) error {
	path := filepath.Join(h.path, name)
	if err := os.Mkdir(path, 0o755); err != nil {
		return err
	}
	if h.unified {
		return nil
	}
	// A new cpuset has no processors, and no process may enter it.
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		all, err := os.ReadFile(filepath.Join(h.path, file))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(path, file), all, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// removeCgroup ends all processes of the cgroups of a name and removes them
// with what is below them.
func removeCgroup(name string) error {
	hierarchies, err := cgroupHierarchies()
	if err != nil {
		return err
	}
	var failed []error
	for _, h := range hierarchies {
		root := filepath.Join(h.path, name)
		if _, err := os.Stat(root); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			if err = emptyCgroup(root, h.unified); err == nil || time.Now().After(end) {
				break
			}
		}
		if err != nil {
			failed = append(failed, err)
		}
	}
	return errors.Join(failed...)
}

func emptyCgroup(root string, unified bool) error {
	if unified {
		if err := os.WriteFile(filepath.Join(root, "cgroup.kill"), []byte("1"), 0); err != nil {
			return err
		}
	}
	var directories []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		directories = append(directories, path)
		pids, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			return err
		}
		for pid := range bytes.FieldsSeq(pids) {
			if n, err := strconv.Atoi(string(pid)); err == nil && n > 0 {
				unix.Kill(n, unix.SIGKILL)
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for i := len(directories) - 1; i >= 0; i-- {
		if err := unix.Rmdir(directories[i]); err != nil && err != unix.ENOENT {
			return fmt.Errorf("rmdir %s: %w", directories[i], err)
		}
	}
	return nil
}

// OnInterrupt takes down all that this process has made, and ends it, when it
// is interrupted: the cleanups of tests do not run then. For TestMain.
func OnInterrupt() {
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, unix.SIGINT, unix.SIGTERM)
	go func() {
		<-interrupted
		signal.Stop(interrupted) // a second one is not waited for
		own := fmt.Sprintf("%s%d-", prefix, os.Getpid())
		for _, problem := range removeAll(func(name string) bool { return strings.HasPrefix(name, own) }) {
			fmt.Fprintln(os.Stderr, problem)
		}
		os.Exit(130)
	}()
}
