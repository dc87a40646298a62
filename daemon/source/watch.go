// SPDX-License-Identifier: Apache-2.0

package source

import (
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// watcher tells of changes to a directory's entries. It uses inotify itself,
// because the libraries in use do not tell when a writer closes a file, which
// is what separates a finished file from half of one.
type watcher struct {
	events chan []event
	done   chan struct{}
	file   *os.File
	fd     int   // the file's; its own method would make it blocking
	err    error // inotify cannot be used at all

	// What is watched: only Run's goroutine uses these.
	descriptor    int
	device, inode uint64
}

// event is one change to an entry. Lost events have no name.
type event struct {
	descriptor int
	name       string
	open       bool // a writer has the file open
	lost       bool // the queue ran over
	self       bool // the directory itself went, by whatever way
}

const (
	entryChanged = unix.IN_CLOSE_WRITE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE | unix.IN_ATTRIB
	entryOpen    = unix.IN_CREATE | unix.IN_MODIFY
	directory    = unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
)

func newWatcher() *watcher {
	w := &watcher{descriptor: -1, done: make(chan struct{})}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		w.err = fmt.Errorf("start inotify: %w; raise the sysctl fs.inotify.max_user_instances", err)
		return w
	}
	w.events = make(chan []event)
	w.fd, w.file = fd, os.NewFile(uintptr(fd), "inotify")
	go w.read()
	return w
}

func (w *watcher) close() {
	close(w.done)
	if w.file != nil {
		w.file.Close()
	}
}

func (w *watcher) read() {
	buffer := make([]byte, 64<<10)
	for {
		n, err := w.file.Read(buffer)
		if err != nil {
			return // closed
		}
		select {
		case w.events <- parseEvents(buffer[:n]):
		case <-w.done:
			return
		}
	}
}

func parseEvents(buffer []byte) []event {
	var events []event
	for len(buffer) >= unix.SizeofInotifyEvent {
		raw := (*unix.InotifyEvent)(unsafe.Pointer(&buffer[0]))
		end := unix.SizeofInotifyEvent + int(raw.Len)
		if end > len(buffer) {
			break
		}
		events = append(events, event{
			descriptor: int(raw.Wd),
			name:       strings.TrimRight(string(buffer[unix.SizeofInotifyEvent:end]), "\x00"),
			open:       raw.Mask&entryOpen != 0,
			lost:       raw.Mask&unix.IN_Q_OVERFLOW != 0,
			self:       raw.Mask&(directory|unix.IN_IGNORED|unix.IN_UNMOUNT) != 0,
		})
		buffer = buffer[end:]
	}
	return events
}

// watch watches the directory that has the path now; it gives true when that
// is not the one watched before.
func (w *watcher) watch(path string) (changed bool, err error) {
	if w.err != nil {
		return false, w.err
	}
	info, err := os.Stat(path)
	if err != nil {
		w.unwatch()
		return false, fmt.Errorf("watch %s: %w", path, unwrapPath(err))
	}
	system, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return false, fmt.Errorf("watch %s: no inode", path)
	}
	if w.descriptor >= 0 && w.device == system.Dev && w.inode == system.Ino {
		return false, nil
	}
	w.unwatch()
	descriptor, err := unix.InotifyAddWatch(w.fd, path, entryChanged|entryOpen|directory|unix.IN_ONLYDIR)
	if err != nil {
		hint := ""
		if err == unix.ENOSPC {
			hint = "; raise the sysctl fs.inotify.max_user_watches"
		}
		return false, &fs.PathError{Op: "watch", Path: path, Err: fmt.Errorf("%w%s", err, hint)}
	}
	w.descriptor, w.device, w.inode = descriptor, system.Dev, system.Ino
	return true, nil
}

// unwatch forgets the directory. Its watch may have ended by itself.
func (w *watcher) unwatch() {
	if w.descriptor >= 0 {
		_, _ = unix.InotifyRmWatch(w.fd, uint32(w.descriptor))
		w.descriptor = -1
	}
}
