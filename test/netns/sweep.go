// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// prefix begins the name of everything that the package makes.
const prefix = "mrtest-"

// sweep removes what killed test processes left behind: once in a process.
var sweep = sync.OnceFunc(func() {
	if os.Geteuid() == 0 {
		removeAll(leftBehind)
	}
})

// removeAll removes what has a name that is chosen, and returns what it could
// not. The cgroups' processes go first, since they hold all the rest.
func removeAll(chosen func(name string) bool) (problems []error) {
	add := func(err error) {
		if err != nil {
			problems = append(problems, err)
		}
	}
	if hierarchies, err := cgroupHierarchies(); err != nil {
		add(err)
	} else {
		for _, h := range hierarchies {
			for _, path := range named(h.path, chosen) {
				add(removeCgroup(filepath.Base(path)))
			}
		}
	}
	for _, path := range named(directory, chosen) {
		add(unmount(path))
	}
	for _, path := range named(os.TempDir(), chosen) {
		add(removeDirectory(path))
	}
	return problems
}

// leftBehind says that a thing is named after a process that is gone.
func leftBehind(name string) bool {
	var pid int
	if _, err := fmt.Sscanf(strings.TrimPrefix(name, prefix), "%d-", &pid); err != nil {
		return false
	}
	return unix.Kill(pid, 0) == unix.ESRCH
}

// named lists what the package has made in a directory and is chosen.
func named(directory string, chosen func(name string) bool) (paths []string) {
	all, _ := filepath.Glob(filepath.Join(directory, prefix+"*"))
	for _, path := range all {
		if chosen(filepath.Base(path)) {
			paths = append(paths, path)
		}
	}
	return paths
}

// Directory makes a short path for files: a unix socket's holds 107 bytes,
// which t.TempDir easily exceeds.
func Directory(t T, label string) string {
	t.Helper()
	sweep()
	path := filepath.Join(os.TempDir(), fmt.Sprintf("%s%d-%d-%s", prefix, os.Getpid(), count.Add(1), label))
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatalf("make directory for %s: %v", label, err)
	}
	t.Cleanup(func() {
		if err := removeDirectory(path); err != nil {
			t.Errorf("remove directory of %s: %v", label, err)
		}
	})
	return path
}

// removeDirectory removes a directory in which things may be mounted.
func removeDirectory(path string) error {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	// What is mounted last may be on top of the others.
	for _, line := range slices.Backward(strings.Split(string(mounts), "\n")) {
		if fields := strings.Fields(line); len(fields) > 1 && strings.HasPrefix(fields[1], path+"/") {
			if err := unix.Unmount(fields[1], unix.MNT_DETACH); err != nil {
				return fmt.Errorf("unmount %s: %w", fields[1], err)
			}
		}
	}
	return os.RemoveAll(path)
}
