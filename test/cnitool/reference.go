// SPDX-License-Identifier: Apache-2.0

// Package cnitool runs the plugins as cnitool of the CNI project does, alone and
// in chains with the reference plugins, which it builds from their modules.
package cnitool

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
)

// References is the directory of cnitool and the reference plugins: bridge, ptp,
// host-local, static, portmap, bandwidth, tuning. They are built once and kept in
// the project's cache; MOORING_REFERENCES names a directory that has them.
var References = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("MOORING_REFERENCES"); dir != "" {
		return dir, nil
	}
	module, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find go.mod: %w", err)
	}
	root := filepath.Dir(strings.TrimSpace(string(module)))
	dir := filepath.Join(root, ".cache", "reference")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	// Tests of several packages may want them at the same time.
	lock, err := os.OpenFile(dir+".lock", os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", dir+"/", "tool")
	build.Dir = filepath.Join(root, "test", "cnitool", "reference")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the reference plugins: %w\n%s", err, out)
	}
	return dir, nil
})
