// SPDX-License-Identifier: Apache-2.0

//go:build root

package north

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/test/netns"
)

// What a device cannot do at XDP is named, tc serves it, and as soon as it can it
// does; the other device never notices.
func TestWhatADriverCannotDoIsNamed(t *testing.T) {
	l := New(t, Mode{"native", "snat"}, "--devices", netns.Uplink+",wan")
	l.Pods("a-1")
	l.Service(Spec{Pods: []string{"a-1"}})
	t.Run("a packet longer than it takes", func(t *testing.T) {
		l := l.with(t)
		l.wan(func() { l.wanMTU(9000) })
		l.wanIs("off", "MTU")
		l.wanServes()
		l.wanMTU(1500)
		l.wanIs("native", "")
		l.wanServes()
		l.wanGoes()
	})
	t.Run("another's program is on it", func(t *testing.T) {
		l := l.with(t)
		var other link.Link
		l.wan(func() { other = l.otherProgram() })
		l.wanIs("off", "another program is on the device")
		l.wanServes()
		if err := other.Close(); err != nil {
			t.Fatal(err)
		}
		l.wanIs("native", "")
		l.wanServes()
		l.wanGoes()
	})
	t.Run("it has no XDP of its own", func(t *testing.T) {
		l := l.with(t)
		l.bridge()
		l.wanIs("off", "its driver has no XDP")
		l.wanGoes()
	})
	if x := l.xdp(t, netns.Uplink); x.Mode != "native" {
		t.Errorf("the other device is %+v", x)
	}
}

// Of two daemons on one device the second says whose it is, and the first goes on.
func TestTwoDaemonsDoNotShareADevice(t *testing.T) {
	l := New(t, Mode{"native", "snat"})
	l.Pods("a-1", "b-1")
	l.Service(Spec{Pods: []string{"a-1", "b-1"}})
	second := l.A.Again()
	second.Manifests = l.A.Manifests // one cluster: neither undoes the other's routes and rules
	second.Flags = []string{"--xdp", "native", "--metrics-address", "127.0.0.1:9965"}
	second.Launch()
	var s api.Status
	netns.Eventually(t, soon, "the second daemon names the device's program as another's", func() bool {
		var err error
		s, err = second.API().Status(t.Context())
		return err == nil && slices.ContainsFunc(s.Problems, func(p string) bool {
			return strings.Contains(p, netns.Uplink) && strings.Contains(p, "another program is on the device")
		})
	})
	if len(s.XDP) != 1 || s.XDP[0].Mode != "off" {
		t.Errorf("the second daemon's devices are %+v", s.XDP)
	}
	first := func() {
		t.Helper()
		if x := l.xdp(t, netns.Uplink); x.Mode != "native" {
			t.Errorf("the first daemon's device is %+v", x)
		}
		if problems := l.status(t).Problems; len(problems) != 0 {
			t.Errorf("the first daemon's problems are %q", problems)
		}
		l.flush()
		for _, f := range l.Frontends() {
			for i := range 10 {
				if _, err := l.check(f, Payload(i, 300)); err != nil {
					t.Errorf("%s: %v", f, err)
				}
			}
		}
	}
	first()
	if err := second.Down(); err != nil {
		t.Errorf("the second daemon ends with %v", err)
	}
	first()
}

// auto takes what there is, and says why it is not more.
func TestXDPIsChosenByTheDevice(t *testing.T) {
	l := New(t, Mode{"auto", "snat"}, "--devices", netns.Uplink+",wan")
	l.bridge()
	l.wanIs("generic", "")
	if x := l.xdp(t, "wan"); !strings.Contains(x.Reason, "its driver has no XDP") {
		t.Errorf("the bridge is %+v", x)
	}
	if x := l.xdp(t, netns.Uplink); x.Mode != "off" || !strings.Contains(x.Reason, "veth") {
		t.Errorf("the veth is %+v", x)
	}
	if problems := l.status(t).Problems; len(problems) != 0 {
		t.Errorf("what auto chose is a problem: %q", problems)
	}
}

// bridge is a device without a driver to run programs.
func (l *Lab) bridge() {
	l.T.Helper()
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "wan", Flags: net.FlagUp}}
	if err := l.A.Netlink().LinkAdd(bridge); err != nil {
		l.T.Fatalf("make a bridge: %v", err)
	}
	l.A.Addr(l.T, "wan", wanNode[0].String()+"/24")
}

func (l *Lab) status(t *testing.T) api.Status {
	t.Helper()
	s, err := l.A.API().Status(t.Context())
	if err != nil {
		t.Fatalf("%v", err)
	}
	return s
}

func (l *Lab) xdp(t *testing.T, device string) (found api.XDPStatus) {
	t.Helper()
	for _, x := range l.status(t).XDP {
		if x.Device == device {
			found = x
		}
	}
	return found
}

// wan adds the device after before() has changed it: the daemon sees it complete.
func (l *Lab) wan(before func()) {
	t := l.T
	t.Helper()
	netns.Veth(t, l.Client, "wan", l.A.NS, "new")
	l.Client.Addr(t, "wan", wanClient[0], wanClient[1])
	before()
	l.Client.WithoutOffloads(t, "wan")
	l.A.WithoutOffloads(t, "new")
	dev := l.A.Link(t, "new")
	for _, change := range []func() error{
		func() error { return l.A.Netlink().LinkSetDown(dev) },
		func() error { return l.A.Netlink().LinkSetName(dev, "wan") },
		func() error { return l.A.Netlink().LinkSetUp(dev) },
	} {
		if err := change(); err != nil {
			t.Fatalf("rename the device: %v", err)
		}
	}
	l.A.Addr(t, "wan", wanNode[0].String()+"/24", wanNode[1].String()+"/64")
}

// name is the device's, which may not be renamed yet.
func (l *Lab) wanName() string {
	if l.A.HasLink("new") {
		return "new"
	}
	return "wan"
}

func (l *Lab) wanMTU(mtu int) {
	l.T.Helper()
	for ns, name := range map[*netns.NS]string{l.Client: "wan", l.A.NS: l.wanName()} {
		if err := ns.Netlink().LinkSetMTU(ns.Link(l.T, name), mtu); err != nil {
			l.T.Fatalf("set the MTU of %s: %v", name, err)
		}
	}
}

// otherProgram is what another daemon, say, has put on the device.
func (l *Lab) otherProgram() link.Link {
	t := l.T
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "another", Type: ebpf.XDP, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}}) // XDP_PASS
	if err != nil {
		t.Fatalf("%v", err)
	}
	defer p.Close()
	var other link.Link
	err = l.A.Do(func() (err error) {
		other, err = link.AttachXDP(link.XDPOptions{Program: p, Interface: l.A.Link(t, l.wanName()).Attrs().Index, Flags: link.XDPDriverMode})
		return err
	})
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() { other.Close() })
	return other
}

// wanIs waits for a mode, and for a problem that says so of the device; empty: for none.
func (l *Lab) wanIs(mode, problem string) {
	l.T.Helper()
	var s api.Status
	netns.Eventually(l.T, soon, "wan is "+mode, func() bool {
		var err error
		if s, err = l.A.API().Status(l.T.(*testing.T).Context()); err != nil {
			return false
		}
		named := slices.ContainsFunc(s.Problems, func(p string) bool { return strings.Contains(p, "wan") && strings.Contains(p, problem) })
		shown := slices.ContainsFunc(s.XDP, func(x api.XDPStatus) bool { return x.Device == "wan" && x.Mode == mode })
		return shown && named == (problem != "")
	})
}

// wanServes asks the node ports by the device.
func (l *Lab) wanServes() {
	l.T.Helper()
	for _, addr := range wanNode {
		f := Frontend{"NodePort", "tcp", netip.AddrPortFrom(addr, TCPNodePort)}
		netns.Eventually(l.T, soon, f.String()+" answers", func() bool {
			a, err := AskFrom(l.Client, netip.Addr{}, f, []byte("by that device"))
			return err == nil && a.Pod == "a-1"
		})
	}
}

func (l *Lab) wanGoes() {
	l.T.Helper()
	if err := l.A.Netlink().LinkDel(l.A.Link(l.T, "wan")); err != nil {
		l.T.Fatalf("%v", err)
	}
}
