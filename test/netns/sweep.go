// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// prefix begins the name of everything that the package makes.
const prefix = "mrtest-"

// sweep removes what killed test processes left behind: once in a process.
var sweep = sync.OnceFunc(func() {
	if os.Geteuid() != 0 {
		return
	}
	for _, path := range leftBehind(directory) {
		unmount(path)
	}
	for _, path := range leftBehind(os.TempDir()) {
		removeDirectory(path)
	}
})

// leftBehind lists what is named after a process that is gone.
func leftBehind(directory string) (paths []string) {
	all, _ := filepath.Glob(filepath.Join(directory, prefix+"*"))
	for _, path := range all {
		var pid int
		if _, err := fmt.Sscanf(strings.TrimPrefix(filepath.Base(path), prefix), "%d-", &pid); err != nil {
			continue
		}
		if unix.Kill(pid, 0) == unix.ESRCH {
			paths = append(paths, path)
		}
	}
	return paths
}

// directoryFor makes a short path for files: a unix socket's holds 107 bytes,
// which t.TempDir easily exceeds.
func directoryFor(t T, label string) string {
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

// removeDirectory removes a directory in which there may be mounted bpffs.
func removeDirectory(path string) error {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 1 && strings.HasPrefix(fields[1], path+"/") {
			if err := unix.Unmount(fields[1], unix.MNT_DETACH); err != nil {
				return fmt.Errorf("unmount %s: %w", fields[1], err)
			}
		}
	}
	return os.RemoveAll(path)
}
