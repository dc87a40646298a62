// SPDX-License-Identifier: Apache-2.0

package api

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
)

// StatusError is an answer of the daemon that is not 2xx. The daemon's own
// code makes one with Errorf to choose the status; every other error is a 500.
type StatusError struct {
	Code    int // HTTP status
	Message string
}

func (e *StatusError) Error() string { return e.Message }

// Errorf makes an error that reaches the client with the given HTTP status.
func Errorf(code int, format string, args ...any) error {
	return &StatusError{Code: code, Message: fmt.Sprintf(format, args...)}
}

// NotRunningError says that no daemon answers on the socket, and what helps.
type NotRunningError struct {
	Socket string
	Err    error // of connect(2)
}

func (e *NotRunningError) Error() string {
	if errors.Is(e.Err, fs.ErrPermission) {
		return fmt.Sprintf("no permission to use mooringd's socket %s: run as root or as a member of its group", e.Socket)
	}
	return fmt.Sprintf("mooringd is not running: nothing answers on %s; start it (systemctl start mooringd, or mooringd --config FILE), or name the right socket", e.Socket)
}

func (e *NotRunningError) Unwrap() error { return e.Err }

// IsNotRunning tells whether err means that there is no daemon to talk to (or
// none that this user may talk to), as opposed to a daemon that refused.
func IsNotRunning(err error) bool {
	var e *NotRunningError
	return errors.As(err, &e)
}

// IsUnavailable tells whether a daemon answered that it cannot serve yet: the
// same request may succeed a little later.
func IsUnavailable(err error) bool {
	var e *StatusError
	return errors.As(err, &e) && e.Code == http.StatusServiceUnavailable
}

// IsConflict tells whether the daemon refused because of something that exists
// already, such as an address that another endpoint holds.
func IsConflict(err error) bool {
	var e *StatusError
	return errors.As(err, &e) && e.Code == http.StatusConflict
}
