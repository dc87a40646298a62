// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// HostOptions say which sockets the host's hooks serve, and how.
type HostOptions struct {
	Cgroup                      string // where they attach; empty: the root of cgroup2
	NodePortFirst, NodePortLast uint16
}

// Host is the services for the host's own sockets: programs on a cgroup, for
// sockets of the network namespace in which AttachHost was called.
type Host struct {
	walk    *link.Iter
	address *ebpf.Variable
	ended   *ebpf.Variable
	destroy bool // whether the kernel can end sockets

	mutex sync.Mutex
}

var hostHooks = map[string]ebpf.AttachType{
	"host_connect4":     ebpf.AttachCGroupInet4Connect,
	"host_connect6":     ebpf.AttachCGroupInet6Connect,
	"host_sendmsg4":     ebpf.AttachCGroupUDP4Sendmsg,
	"host_sendmsg6":     ebpf.AttachCGroupUDP6Sendmsg,
	"host_recvmsg4":     ebpf.AttachCGroupUDP4Recvmsg,
	"host_recvmsg6":     ebpf.AttachCGroupUDP6Recvmsg,
	"host_getpeername4": ebpf.AttachCgroupInet4GetPeername,
	"host_getpeername6": ebpf.AttachCgroupInet6GetPeername,
}

// AttachHost attaches the host's hooks, as pinned links that outlive the daemon;
// those of an earlier run get the new programs in place.
func (d *Datapath) AttachHost(opts HostOptions) (*Host, error) {
	cgroup := opts.Cgroup
	if cgroup == "" {
		var err error
		if cgroup, err = hierarchyRoot(); err != nil {
			return nil, err
		}
	}
	directory, err := os.Stat(cgroup)
	if err != nil {
		return nil, fmt.Errorf("open the cgroup: %w", err)
	}
	cookie, err := netnsCookie()
	if err != nil {
		return nil, err
	}
	spec, err := loadHost()
	if err != nil {
		return nil, fmt.Errorf("read host programs: %w", err)
	}
	for name, value := range map[string]any{
		"netns_cookie": cookie, "node_port_first": opts.NodePortFirst, "node_port_last": opts.NodePortLast, "jiffies_per_second": d.JiffiesPerSecond,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("set %s: %w", name, err)
		}
	}
	keepUsedMaps(spec)
	c, err := d.collection(spec, Options{})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	h := &Host{address: c.Variables["node_address"], ended: c.Variables["ended"], destroy: hasSockDestroy()}
	for name, hook := range hostHooks {
		if err := attachCgroup(d.pins.link("cgroup", name), c.Programs[name], hook, cgroup, inode(directory)); err != nil {
			return nil, fmt.Errorf("attach %s to %s: %w", name, cgroup, err)
		}
	}
	if h.walk, err = link.AttachIter(link.IterOptions{Program: c.Programs["end_udp"]}); err != nil {
		return nil, fmt.Errorf("attach end_udp: %w", err)
	}
	return h, nil
}

// keepUsedMaps leaves the maps that no program here uses to those that size them.
func keepUsedMaps(spec *ebpf.CollectionSpec) {
	used := map[string]bool{}
	for _, p := range spec.Programs {
		for _, instruction := range p.Instructions {
			used[instruction.Reference()] = true
		}
	}
	for name := range spec.Maps {
		if !used[name] {
			delete(spec.Maps, name)
		}
	}
}

func attachCgroup(pin string, prog *ebpf.Program, hook ebpf.AttachType, cgroup string, id uint64) error {
	if old, err := link.LoadPinnedLink(pin, nil); err == nil {
		defer old.Close()
		if info, err := old.Info(); err == nil && info.Cgroup() != nil && info.Cgroup().CgroupId == id {
			return old.Update(prog)
		}
		// The cgroup of another configuration, or one that is gone.
		if err := old.Unpin(); err != nil {
			return err
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: hook, Program: prog})
	if err != nil {
		return err
	}
	defer l.Close()
	if err := l.Pin(pin); err != nil {
		return fmt.Errorf("pin link: %w", err)
	}
	return nil
}

// DetachHost removes the host's hooks of any run; nil when there are none.
func DetachHost(bpffs string) error {
	for name := range hostHooks {
		if err := os.Remove(PinsAt(bpffs).link("cgroup", name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("unpin %s: %w", name, err)
		}
	}
	return nil
}

// SetNodeAddress tells which address the node ports of loopback addresses are;
// none: they are nobody's.
func (h *Host) SetNodeAddress(a netip.Addr) error {
	value := Addr{}
	if a.IsValid() {
		value = ToAddr(a)
	}
	if err := h.address.Set(value); err != nil {
		return fmt.Errorf("set the node's address for the host's sockets: %w", err)
	}
	return nil
}

// CanEndSockets tells whether the kernel lets sockets be told that their backend
// is gone.
func (h *Host) CanEndSockets() bool { return h.destroy }

// EndSockets ends the UDP sockets of this network namespace that are connected
// to a backend that is gone: who waits to read gets ECONNABORTED, and who writes
// finds the socket unconnected. It returns how many they were.
func (h *Host) EndSockets() (uint64, error) {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	before, err := h.count()
	if err != nil {
		return 0, err
	}
	walk, err := h.walk.Open()
	if err != nil {
		return 0, fmt.Errorf("walk the host's sockets: %w", err)
	}
	defer walk.Close()
	if _, err := io.Copy(io.Discard, walk); err != nil {
		return 0, fmt.Errorf("walk the host's sockets: %w", err)
	}
	after, err := h.count()
	return after - before, err
}

func (h *Host) count() (n uint64, err error) {
	if err := h.ended.Get(&n); err != nil {
		return 0, fmt.Errorf("read how many sockets were ended: %w", err)
	}
	return n, nil
}

// Close gives up the daemon's handles. What is pinned goes on.
func (h *Host) Close() error { return h.walk.Close() }

func hasSockDestroy() bool {
	types, err := btf.LoadKernelSpec()
	if err != nil {
		return false
	}
	var function *btf.Func
	return types.TypeByName("bpf_sock_destroy", &function) == nil
}

func inode(info os.FileInfo) uint64 {
	if system, ok := info.Sys().(*syscall.Stat_t); ok {
		return system.Ino
	}
	return 0
}

// netnsCookie is the name of this thread's network namespace in the kernel.
func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open a socket: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("ask for the network namespace's cookie (5.14 or newer is needed): %w", err)
	}
	return cookie, nil
}

// rootInode is the inode of every hierarchy's root, whatever a cgroup namespace
// shows as its root.
const rootInode = 1

// hierarchyRoot is where the root of the cgroup2 hierarchy is mounted.
func hierarchyRoot() (string, error) {
	root, err := CgroupRoot()
	if err != nil {
		return "", err
	}
	info, err := os.Stat(root)
	if err != nil {
		return "", fmt.Errorf("look at %s: %w", root, err)
	}
	if inode(info) != rootInode {
		return "", fmt.Errorf("%s shows only a part of the cgroup2 hierarchy, as in a container: mount the host's and name it with the key cgroup", root)
	}
	return root, nil
}
