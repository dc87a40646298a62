// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// WithoutOffloads makes an interface send and receive what is on a real wire:
// whole checksums, no segments of 64 KiB. Captures then show true packets.
func (n *NS) WithoutOffloads(t T, dev string) {
	t.Helper()
	for _, command := range []uint32{unix.ETHTOOL_STXCSUM, unix.ETHTOOL_STSO, unix.ETHTOOL_SGSO, unix.ETHTOOL_SGRO} {
		err := n.Do(func() error { return ethtoolSet(dev, command, 0) })
		if err != nil && err != unix.EOPNOTSUPP {
			t.Fatalf("turn offloads of %s in %s off (ethtool command %#x): %v", dev, n.name, command, err)
		}
	}
}

// LikeADriver makes an end of a veth send whole checksums and no more than its
// MTU, as a wire has them, and receive as a driver does. Only to an end that runs
// an XDP program the kernel hands at once what the other end's program sends.
func (n *NS) LikeADriver(t T, dev string) {
	t.Helper()
	n.WithoutOffloads(t, dev)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "pass", Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}}) // XDP_PASS
	if err != nil {
		t.Fatalf("load a program that lets everything pass: %v", err)
	}
	defer p.Close()
	err = n.Do(func() error {
		l, err := link.AttachXDP(link.XDPOptions{Program: p, Interface: n.Link(t, dev).Attrs().Index, Flags: link.XDPDriverMode})
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	})
	if err != nil {
		t.Fatalf("attach a program to %s in %s: %v", dev, n.name, err)
	}
}

// ethtoolSet sets a feature that has one number as its value.
func ethtoolSet(dev string, command, value uint32) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	argument := struct{ command, value uint32 }{command, value} // struct ethtool_value
	request := struct {                                         // struct ifreq
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&argument)}
	copy(request.name[:unix.IFNAMSIZ-1], dev)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
	runtime.KeepAlive(&argument)
	if errno != 0 {
		return errno
	}
	return nil
}
