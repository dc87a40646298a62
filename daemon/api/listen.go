// SPDX-License-Identifier: Apache-2.0

package api

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// maxSocketPath is what sockaddr_un.sun_path holds besides its final zero.
const maxSocketPath = 107

// listener holds the lock that makes its daemon the only one on the socket.
type listener struct {
	*net.UnixListener
	lock *os.File
}

// Close removes the socket, then gives the lock back: in between nobody else
// can have made a socket that would be removed.
func (l *listener) Close() error {
	err := l.UnixListener.Close()
	l.lock.Close()
	return err
}

// Listen makes the API's socket with mode 0660. A second daemon on the same
// socket is refused; a socket that a killed daemon left behind is replaced.
func Listen(socket string) (net.Listener, error) {
	if len(socket) > maxSocketPath {
		return nil, fmt.Errorf("listen on %s: the path of a unix socket holds at most %d bytes, this has %d: choose a shorter one", socket, maxSocketPath, len(socket))
	}
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		return nil, fmt.Errorf("make the directory of the socket %s: %w", socket, err)
	}
	// The lock closes the gap between the check and bind for daemons that start
	// at the same time; the kernel gives it back however its holder ends.
	lock, err := os.OpenFile(lockFile(socket), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the socket %s: %w", socket, err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, inUse(socket)
		}
		return nil, fmt.Errorf("lock %s: %w", lockFile(socket), err)
	}
	l, err := listen(socket)
	if err != nil {
		lock.Close()
		return nil, err
	}
	return &listener{UnixListener: l, lock: lock}, nil
}

func listen(socket string) (*net.UnixListener, error) {
	if err := removeStale(socket); err != nil {
		return nil, err
	}
	// No moment may pass in which others could connect.
	mask := syscall.Umask(0o117)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	syscall.Umask(mask)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", socket, err)
	}
	if err := os.Chmod(socket, 0o660); err != nil {
		l.Close()
		return nil, fmt.Errorf("set the mode of the socket %s: %w", socket, err)
	}
	return l, nil
}

// removeStale removes a socket on which nobody answers.
func removeStale(socket string) error {
	info, err := os.Lstat(socket)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at the socket %s: %w", socket, err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("listen on %s: a file that is not a socket is there: remove it or choose another path", socket)
	}
	conn, err := net.DialTimeout("unix", socket, time.Second)
	if err == nil {
		conn.Close()
		return inUse(socket)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("see whether somebody answers on %s: %w", socket, err)
	}
	if err := os.Remove(socket); err != nil {
		return fmt.Errorf("remove the stale socket %s: %w", socket, err)
	}
	return nil
}

func inUse(socket string) error {
	return fmt.Errorf("another daemon answers on %s: stop it, or give this one its own socket, bpffs, stateDir and metricsAddress", socket)
}

func lockFile(socket string) string { return socket + ".lock" }

// RemoveSocket removes what a daemon that is not running left at socket.
func RemoveSocket(socket string) error {
	if err := removeStale(socket); err != nil {
		return err
	}
	if err := os.Remove(lockFile(socket)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the lock of the socket %s: %w", socket, err)
	}
	return nil
}
