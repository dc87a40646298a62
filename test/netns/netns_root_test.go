// SPDX-License-Identifier: Apache-2.0

//go:build root

package netns

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

func TestCodeProgramsAndSocketsAreInTheNamespace(t *testing.T) {
	before, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	a, b := New(t, "a"), New(t, "b")
	Veth(t, a, "wire", b, "wire")
	a.Addr(t, "wire", "192.0.2.1/24", "2001:db8::1/64")
	b.Addr(t, "wire", "192.0.2.2/24", "2001:db8::2/64")

	outer := errors.New("as f says")
	err = a.Do(func() error {
		if err := b.Do(func() error { _, err := net.InterfaceByName("wire"); return err }); err != nil {
			t.Errorf("in b: %v", err)
		}
		if links, _ := net.Interfaces(); len(links) != 2 {
			t.Errorf("in a after b: interfaces %v", links)
		}
		return outer
	})
	if err != outer {
		t.Errorf("Do returned %v", err)
	}
	if after, _ := os.Readlink("/proc/thread-self/ns/net"); after != before {
		t.Errorf("left in namespace %s, began in %s", after, before)
	}
	if out := a.Sh(t, "ip -br addr show dev wire"); !strings.Contains(out, "192.0.2.1/24") || !strings.Contains(out, "2001:db8::1/64") {
		t.Errorf("ip in a: %s", out)
	}
	if out, err := exec.Command("ip", "-n", b.Name(), "-br", "link").Output(); err != nil || !bytes.Contains(out, []byte("wire")) {
		t.Errorf("ip -n: %v: %s", err, out)
	}

	capture := a.Capture(t, "wire")
	HTTPEcho(t, b, ":80", "web")
	TCPEcho(t, b, ":7")
	UDPEcho(t, b, ":7")
	for _, address := range []string{"192.0.2.2", "2001:db8::2"} {
		body, err := a.Get("http://" + net.JoinHostPort(address, "80") + "/path")
		if err != nil || !strings.HasPrefix(body, "web GET /path ") {
			t.Errorf("get from %s: %q, %v", address, body, err)
		}
		for _, network := range []string{"tcp", "udp"} {
			if err := a.Echo(network, net.JoinHostPort(address, "7"), "a payload"); err != nil {
				t.Error(err)
			}
		}
	}
	if err := a.Echo("tcp", "192.0.2.2:7", strings.Repeat("0123456789abcdef", 1<<18)); err != nil {
		t.Error(err)
	}
	Eventually(t, time.Second, "the payload is captured in both directions", func() bool {
		var out, in bool
		for _, p := range capture.Packets(func(p Packet) bool { return bytes.Contains(p.Data, []byte("a payload")) }) {
			out, in = out || p.Outgoing, in || !p.Outgoing
		}
		return out && in
	})
	if err := a.Echo("tcp", "192.0.2.2:9", "x"); err == nil {
		t.Error("something answers where nothing listens")
	}
}

func TestNodesReachEachOtherTheirRouterAndBeyond(t *testing.T) {
	outside := NewOutside(t)
	a, b := outside.Node(t), outside.Node(t)
	UDPEcho(t, b.NS, ":7")
	UDPEcho(t, outside.NS, ":7")
	for _, address := range []string{b.IP.String(), b.IP6.String(), Router, Router6, Remote, Remote6} {
		if err := a.Echo("udp", net.JoinHostPort(address, "7"), "hello"); err != nil {
			t.Errorf("from %s: %v", a.NodeName, err)
		}
	}
	if a.PodCIDRs[0] == b.PodCIDRs[0] || a.Socket == b.Socket {
		t.Errorf("a and b share something: %+v %+v", a, b)
	}
	alone := NewNode(t)
	alone.WithoutOffloads(t, Uplink)
	TCPEcho(t, alone.Outside.NS, ":7")
	if err := alone.Echo("tcp", net.JoinHostPort(Remote6, "7"), "hello"); err != nil {
		t.Error(err)
	}
}

// fake is a test that ends when its cleanups are called.
type fake struct {
	*testing.T
	cleanups []func()
}

func (f *fake) Cleanup(c func()) { f.cleanups = append(f.cleanups, c) }

func (f *fake) end() {
	for len(f.cleanups) > 0 {
		last := len(f.cleanups) - 1
		c := f.cleanups[last]
		f.cleanups = f.cleanups[:last]
		c()
	}
}

func TestNothingIsLeftAfterATest(t *testing.T) {
	f := &fake{T: t}
	node := NewNode(f)
	p := node.Start(f, "sleep", "60")
	stray := node.Command("sleep", "60")
	if err := stray.Start(); err != nil {
		t.Fatal(err)
	}
	f.end()
	if p.Wait() == nil {
		t.Error("the program ended by itself")
	}
	if stray.Wait() == nil {
		t.Error("the stray program ended by itself")
	}
	for _, path := range []string{node.Path(), node.Outside.Path(), node.Dir} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left (%v)", path, err)
		}
	}
	if mounts, _ := os.ReadFile("/proc/self/mounts"); bytes.Contains(mounts, []byte(node.Dir)) {
		t.Errorf("a mount is left below %s", node.Dir)
	}
}

// The test starts itself as a process that dies in the middle.
func TestWhatAKilledTestLeftIsRemovedByTheNext(t *testing.T) {
	if os.Getenv("MOORING_TEST_DIE") != "" {
		node := NewNode(t)
		os.Stdout.WriteString("left " + node.Path() + " " + node.Dir + "\n")
		p, _ := os.FindProcess(os.Getpid())
		p.Kill()
		select {}
	}
	command := exec.CommandContext(context.Background(), os.Args[0], "-test.run=^"+t.Name()+"$")
	command.Env = append(os.Environ(), "MOORING_TEST_DIE=1")
	out, _ := command.Output()
	_, rest, found := strings.Cut(string(out), "left ")
	if !found {
		t.Fatalf("the test that is to die says %q", out)
	}
	paths := strings.Fields(rest)[:2]
	for _, path := range paths {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("nothing was left behind: %v", err)
		}
	}
	command = exec.Command(os.Args[0], "-test.run=^TestCodeProgramsAndSocketsAreInTheNamespace$")
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, path := range paths {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there (%v)", path, err)
		}
	}
}
