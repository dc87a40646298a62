// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
)

// Hook is how the ends of sockets are noticed.
type Hook struct {
	Mode   string // trampoline, tracepoint or off
	Reason string // why not a better one
}

// The modes, as configuration and status name them.
const (
	HookAuto       = "auto"
	HookTrampoline = "trampoline"
	HookTracepoint = "tracepoint"
	HookOff        = "off"
)

func (h Hook) mode() uint8 {
	switch h.Mode {
	case HookTrampoline:
		return uint8(abiHookModeHOOK_TRAMPOLINE)
	case HookTracepoint:
		return uint8(abiHookModeHOOK_TRACEPOINT)
	}
	return uint8(abiHookModeHOOK_OFF)
}

// UnnamedACKs says whether what a mini-socket sends over IPv6 comes without a socket, as
// it does before Linux 6.13, where nothing but time ends what it would make: with
// trampolines the entry is there as long as the mini-socket.
func (h Hook) UnnamedACKs() bool {
	return h.Mode == HookTracepoint && unnamedResets()
}

// unnamedResets says whether the kernel sends a reset for a socket without a connection
// by a socket of its own only, as it does before Linux 6.13.
func unnamedResets() bool {
	version, err := features.LinuxVersionCode()
	return err == nil && version < 6<<16|13<<8
}

// hookPrograms are those of sock.c that a mode attaches.
var hookPrograms = map[string][]string{
	HookTrampoline: {"on_sock_destruct", "on_twsk_alloc", "on_twsk_free"},
	HookTracepoint: {"on_set_state", "on_tcp_destroy", "on_sock_release"},
	HookOff:        {},
}

// nested is the end of a copy's name. The kernel skips a tracing program that is running
// on that processor already, as one is that ran in a process and was interrupted by a
// packet; of two copies, one after the other, only one can be running.
const nested = "_nested"

// attachHook attaches the best hook that the kernel lets us, or the one that is
// asked for. Links are pinned: sockets end while no daemon runs. Those of an
// earlier run go when the new ones are in place; that both run for a moment does
// no harm, for an entry is released once.
func (d *Datapath) attachHook(opts Options) error {
	var err error
	switch opts.Hook {
	case HookTrampoline, HookTracepoint:
		if err = d.tryHook(opts.Hook, opts); err != nil {
			return fmt.Errorf("conntrack.hook: %s: %w (auto takes what the kernel has)", opts.Hook, err)
		}
		d.Hook = Hook{opts.Hook, "as configured"}
	case HookAuto:
		first := d.tryHook(HookTrampoline, opts)
		if first == nil {
			d.Hook = Hook{HookTrampoline, "the kernel loads BPF trampolines (fentry)"}
			break
		}
		second := d.tryHook(HookTracepoint, opts)
		if second == nil {
			d.Hook = Hook{HookTracepoint, "no trampolines: " + why(first)}
			break
		}
		if err = d.tryHook(HookOff, opts); err != nil {
			return err
		}
		d.Hook = Hook{HookOff, "no trampolines: " + why(first) + "; no tracepoints: " + why(second)}
	default:
		if err = d.tryHook(HookOff, opts); err != nil {
			return err
		}
		d.Hook = Hook{HookOff, "as configured"}
	}
	return nil
}

// why is an error's first line: a verifier's log is no reason that fits a status. Nor
// is the library's guess that the limit on locked memory is what EPERM is about: it is lifted.
func why(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	line, _, _ = strings.Cut(line, " (MEMLOCK")
	return line
}

func (d *Datapath) tryHook(mode string, opts Options) error {
	spec, err := loadSock()
	if err != nil {
		return fmt.Errorf("read socket programs: %w", err)
	}
	var names []string
	for _, name := range hookPrograms[mode] {
		names = append(names, name)
		if p := spec.Programs[name]; p.Type == ebpf.Tracing {
			spec.Programs[name+nested] = p.Copy()
			names = append(names, name+nested)
		}
	}
	for name := range spec.Programs {
		if !slices.Contains(rollPrograms, name) && !slices.Contains(names, name) {
			delete(spec.Programs, name)
		}
	}
	d.Hook.Mode = mode
	if err := d.configure(spec, opts); err != nil {
		return err
	}
	sizeMaps(spec, opts)
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: d.pins.maps()}})
	if err != nil {
		return fmt.Errorf("load: %w", err)
	}
	defer c.Close()
	links := make(map[string]link.Link)
	defer func() {
		for _, l := range links {
			l.Close()
		}
	}()
	for _, name := range names {
		l, err := attachHookProgram(c.Programs[name], opts.Cgroup)
		if err != nil {
			return fmt.Errorf("attach %s: %w", name, err)
		}
		links[name] = l
	}
	old, err := filepath.Glob(d.pins.link("hook", "*"))
	if err != nil {
		return err
	}
	for _, pin := range old {
		if err := os.Remove(pin); err != nil {
			return fmt.Errorf("unpin an earlier hook: %w", err)
		}
	}
	for name, l := range links {
		if err := l.Pin(d.pins.link("hook", name)); err != nil {
			return fmt.Errorf("pin %s: %w", name, err)
		}
	}
	d.roll.close()
	d.roll, err = newRollCall(c)
	return err
}

func attachHookProgram(prog *ebpf.Program, cgroup string) (link.Link, error) {
	if prog.Type() != ebpf.CGroupSock {
		return link.AttachTracing(link.TracingOptions{Program: prog})
	}
	if cgroup == "" {
		root, err := CgroupRoot()
		if err != nil {
			return nil, err
		}
		cgroup = root
	}
	return link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCgroupInetSockRelease, Program: prog})
}

// CgroupRoot is where the cgroup2 hierarchy is mounted: on /sys/fs/cgroup, or
// beside version 1, or anywhere.
func CgroupRoot() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("look for cgroup2: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// proc(5): ... root mountpoint options [optional fields] - type source options
		head, tail, ok := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(head)
		if ok && strings.HasPrefix(tail, "cgroup2 ") && len(fields) > 4 && fields[3] == "/" {
			return fields[4], nil
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("look for cgroup2: %w", err)
	}
	return "", errors.New("no cgroup2 hierarchy is mounted (mount -t cgroup2 none DIR, or name one with cgroup)")
}
