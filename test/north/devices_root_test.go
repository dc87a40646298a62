// SPDX-License-Identifier: Apache-2.0

//go:build root

package north

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/test/netns"
)

// A device that is not there is named, and the others work. It is served when it
// comes, and again when it comes back under its name, which may be like that of a VLAN's.
func TestDevicesComeAndGo(t *testing.T) {
	for _, mode := range []Mode{{"native", "snat"}, {"off", "snat"}} {
		t.Run(mode.String(), func(t *testing.T) { devices(t, New(t, mode, "--devices", netns.Uplink+",wan.7")) })
	}
}

// The node's addresses on the device that comes and goes, and the client's.
var (
	wanNode   = [2]netip.Addr{netip.MustParseAddr("198.18.1.2"), netip.MustParseAddr("2001:db8:181::2")}
	wanClient = [2]string{"198.18.1.1/24", "2001:db8:181::1/64"}
)

// soon is when the daemon has looked again even if nobody told it.
const soon = time.Minute

func devices(t *testing.T, l *Lab) {
	l.Pods("a-1", "b-1")
	l.Service(Spec{Pods: []string{"a-1", "b-1"}})
	status := func() api.Status {
		t.Helper()
		s, err := l.A.API().Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	named := func(s api.Status) bool {
		return slices.ContainsFunc(s.Problems, func(p string) bool { return strings.Contains(p, "wan.7") })
	}
	shown := func(s api.Status) bool {
		return slices.ContainsFunc(s.XDP, func(x api.XDPStatus) bool { return x.Device == "wan.7" })
	}
	others := func() {
		t.Helper()
		for _, f := range l.Frontends() {
			if _, err := l.Ask(f, []byte("by the other device")); err != nil {
				t.Errorf("%s: %v", f, err)
			}
		}
	}
	for range 2 {
		netns.Eventually(t, soon, "the device that is not there is named", func() bool { s := status(); return named(s) && !shown(s) })
		l.flush()
		others()

		netns.Veth(t, l.Client, "wan.7", l.A.NS, "wan.7")
		l.Client.Addr(t, "wan.7", wanClient[0], wanClient[1])
		l.A.Addr(t, "wan.7", wanNode[0].String()+"/24", wanNode[1].String()+"/64")
		netns.Eventually(t, soon, "the device that has come is served", func() bool { s := status(); return !named(s) && shown(s) })
		for _, addr := range wanNode {
			f := Frontend{"NodePort", "tcp", netip.AddrPortFrom(addr, TCPNodePort)}
			netns.Eventually(t, soon, f.String()+" answers", func() bool {
				a, err := AskFrom(l.Client, netip.Addr{}, f, []byte("by the new device"))
				return err == nil && a.Pod != ""
			})
		}
		if err := l.A.Netlink().LinkDel(l.A.Link(t, "wan.7")); err != nil {
			t.Fatal(err)
		}
	}
	netns.Eventually(t, soon, "the device that is gone is named", func() bool { return named(status()) })
	others()
}
