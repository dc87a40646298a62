// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// What a worker gives the kernel by its address. It is not on a stack, which
// may move.
var (
	buffer   [payload]byte
	peer4    unix.RawSockaddrInet4
	peer6    unix.RawSockaddrInet6
	peerSize uint32
)

func address[T any](v *T) uintptr { return uintptr(unsafe.Pointer(v)) }
