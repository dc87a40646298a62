// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"errors"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Packet is a captured frame, from its Ethernet header on. A VLAN tag that the
// kernel keeps beside the frame is not in it.
type Packet struct {
	Time     time.Time
	Outgoing bool // sent by this interface, not received by it
	Data     []byte
}

// Capture collects what an interface sends and receives.
type Capture struct {
	file    *os.File
	done    chan struct{}
	mutex   sync.Mutex
	packets []Packet
}

// Capture begins to capture on an interface ("" for all of the namespace). It
// ends with the test. What BPF programs at tc see and redirect is not seen on
// that interface; it is seen where it goes to.
func (n *NS) Capture(t T, dev string) *Capture {
	t.Helper()
	index := 0
	if dev != "" {
		index = n.Link(t, dev).Attrs().Index
	}
	c := &Capture{done: make(chan struct{})}
	err := n.Do(func() error {
		protocol := uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		c.file = os.NewFile(uintptr(fd), "capture on "+dev)
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: index})
	})
	if err != nil {
		t.Fatalf("capture on %s of %s: %v", dev, n.name, err)
	}
	go c.read()
	t.Cleanup(c.Stop)
	return c
}

func (c *Capture) read() {
	defer close(c.done)
	raw, err := c.file.SyscallConn()
	if err != nil {
		return
	}
	buffer := make([]byte, 1<<17)
	for {
		var size int
		var from unix.Sockaddr
		var failed error
		err := raw.Read(func(fd uintptr) bool {
			size, from, failed = unix.Recvfrom(int(fd), buffer, 0)
			return failed != unix.EAGAIN
		})
		if err != nil {
			return
		}
		if failed != nil {
			if errors.Is(failed, unix.ENETDOWN) || errors.Is(failed, unix.EINTR) {
				continue
			}
			return
		}
		p := Packet{Time: time.Now(), Data: slices.Clone(buffer[:size])}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok {
			p.Outgoing = ll.Pkttype == unix.PACKET_OUTGOING
		}
		c.mutex.Lock()
		c.packets = append(c.packets, p)
		c.mutex.Unlock()
	}
}

// Stop ends the capture.
func (c *Capture) Stop() {
	c.file.Close()
	<-c.done
}

// Packets are those captured so far that match; nil matches all.
func (c *Capture) Packets(match func(Packet) bool) (matching []Packet) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	for _, p := range c.packets {
		if match == nil || match(p) {
			matching = append(matching, p)
		}
	}
	return matching
}

// Reset forgets what was captured.
func (c *Capture) Reset() {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.packets = nil
}
