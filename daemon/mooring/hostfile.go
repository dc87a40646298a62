// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// hostDirectory is a directory of the node that others read while it changes:
// the container runtime starts what is in it at any moment.
type hostDirectory struct {
	path string
	file *os.File // locked: two installers take turns
}

// temporary begins the names of files that are being written. They have no
// extension by which a runtime would take one for a configuration.
const temporary = ".mooring-new-"

// openHostDirectory makes the directory if need be, and removes what an
// installer that was killed has left in it.
func openHostDirectory(path string) (*hostDirectory, error) {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return nil, hint(err)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, hint(err)
	}
	d := &hostDirectory{path: path, file: file}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), file.Close())
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), temporary) {
			if err := os.Remove(filepath.Join(path, e.Name())); err != nil {
				return nil, errors.Join(hint(err), file.Close())
			}
		}
	}
	return d, nil
}

func (d *hostDirectory) Close() error { return d.file.Close() }

// put makes a file hold content. Whoever opens it, and whatever ends this
// process or the machine, finds what was there before or all of the new. A file
// that is right already is not touched.
//
// The temporary file is in the same directory: a rename within it is atomic, and
// is the only way of coming that containerd notices.
func (d *hostDirectory) put(name string, content []byte, mode os.FileMode) (changed bool, err error) {
	path := filepath.Join(d.path, name)
	if holds(path, content, mode) {
		return false, nil
	}
	f, err := os.CreateTemp(d.path, temporary+"*")
	if err != nil {
		return false, hint(err)
	}
	defer func() {
		if err != nil {
			err = hint(errors.Join(err, f.Close(), os.Remove(f.Name())))
		}
	}()
	if _, err := f.Write(content); err != nil {
		return false, err
	}
	if err := f.Chmod(mode); err != nil {
		return false, err
	}
	if err := f.Sync(); err != nil {
		return false, err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return false, err
	}
	return true, errors.Join(f.Close(), d.file.Sync())
}

// holds tells whether a file is as put would make it.
func holds(path string, content []byte, mode os.FileMode) bool {
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() || info.Mode().Perm() != mode || info.Size() != int64(len(content)) {
		return false
	}
	was, err := os.ReadFile(path)
	return err == nil && bytes.Equal(was, content)
}

// remove takes a file away, if it is there.
func (d *hostDirectory) remove(name string) (changed bool, err error) {
	err = os.Remove(filepath.Join(d.path, name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, hint(err)
	}
	return true, d.file.Sync()
}

// hint adds to an error what helps.
func hint(err error) error {
	switch {
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: mount the node's directory writable, or name the one that the container runtime uses (bin_dir and conf_dir of containerd)", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: run as root, in a pod of an SELinux node as spc_t", err)
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("%w: what was there before is unchanged", err)
	}
	return err
}
