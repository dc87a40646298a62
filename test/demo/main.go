// SPDX-License-Identifier: Apache-2.0

// Command demo shows Mooring's main job on a throw-away node: a client pod asks
// a service of three backend pods, and the connection table is shown while the
// connection is open and after it. The node is a network namespace; nothing is
// changed on the machine itself, and at the end, or on Ctrl-C, nothing is left.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/test/netns"
)

// endings are the signals that end the demo early, in order.
var endings = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT}

func main() {
	var o options
	flag.StringVar(&o.bin, "bin", "bin", "directory of mooringd, mooring and the plugins")
	flag.StringVar(&o.cnitool, "cnitool", "cnitool", "the CNI project's cnitool")
	flag.StringVar(&o.manifests, "manifests", "conf/examples", "directory of the manifests that mooringd gets")
	flag.BoolVar(&o.hold, "hold", false, "leave the node open for looking around until Ctrl-C")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "demo: %q: only flags are taken\n", flag.Arg(0))
		os.Exit(2)
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "demo: network namespaces and BPF programs need root: sudo make demo")
		os.Exit(1)
	}
	// Whatever ends the demo early, a reader that goes away included, it tidies up.
	signal.Ignore(syscall.SIGPIPE)
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, endings...)
	code := 1
	go func() {
		for s := range signals {
			if ctx.Err() == nil {
				code = 128 + int(s.(syscall.Signal))
				fmt.Fprintf(os.Stderr, "\n%v: taking everything down\n", s)
			}
			cancel()
		}
	}()

	err := netns.Run("demo", func(t netns.T) { tell(newStage(ctx, cancel, t, o)) })
	if err == nil && ctx.Err() == nil {
		return
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
	}
	os.Exit(code)
}

// tell is the demo from beginning to end. Every step registers how it is undone
// and fails the story when it does not work.
func tell(s *stage) {
	s.chapter("A node", "a network namespace with an uplink, and mooringd in it")
	node := s.node()
	s.mooring("status")

	s.chapter("Pods", "by the CNI: cnitool calls mooring-cni as a container runtime does")
	client := s.pod("client")
	for _, name := range []string{"web-1", "web-2", "web-3"} {
		s.serve(s.pod(name), name)
	}
	s.wait("web has its three backends", func() bool { return s.backends("web") == 3 })
	s.mooring("endpoint", "list")
	s.mooring("service", "list")

	s.chapter("A service", "the client asks the ClusterIP in both families, and keeps the connections open")
	four, six := s.open(client, "10.96.0.10:80"), s.open(client, "[fd00:10:96::10]:80")
	s.mooring("ct", "list")
	s.say("SVC is the choice of a backend. EGRESS is the flow to it: a reply from the backend finds")
	s.say("it and gets the service's address as its source. INGRESS is the same flow, as the")
	s.say("backend has it; here it is a pod of this node too.")

	s.chapter("After it", "one connection is closed, one is reset")
	four.close()
	six.reset()
	s.ended(four, six)
	s.mooring("ct", "list")

	s.chapter("More", "each connection gets a backend of its own")
	for _, url := range []string{"http://10.96.0.10/", "http://[fd00:10:96::10]/"} {
		for range 3 {
			s.get(client, url)
		}
	}
	s.mooring("ct", "stats")

	if s.hold {
		s.chapter("Look around", "Ctrl-C takes it down")
		s.say("sudo %s --socket %s status", filepath.Join(s.bin, "mooring"), node.Socket)
		s.say("sudo ip netns exec %s ip addr", node.Name())
		s.say("sudo ip netns exec %s curl http://10.96.0.10/", client.Name())
		<-s.Done()
	}
	s.chapter("Down", "DEL of each pod, SIGTERM to mooringd, and `mooring cleanup`")
}

type options struct {
	bin, cnitool, manifests string
	hold                    bool
}

// ownCgroup moves this process, whose sockets are the pods', into a cgroup of
// its own: mooringd attaches its programs there, not at the machine's root. It
// returns "" where no cgroup2 is mounted.
func ownCgroup(t netns.T) string {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatalf("look for cgroup2: %v", err)
	}
	root := ""
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			root = f[1]
			break
		}
	}
	if root == "" {
		return ""
	}
	membership, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatalf("look for the own cgroup: %v", err)
	}
	before := root
	for line := range strings.Lines(string(membership)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			before = filepath.Join(root, path)
		}
	}
	own := filepath.Join(root, fmt.Sprintf("mooring-demo-%d", os.Getpid()))
	if err := os.Mkdir(own, 0o755); err != nil {
		t.Fatalf("make a cgroup: %v", err)
	}
	join := func(cgroup string) error {
		return os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte("0"), 0)
	}
	t.Cleanup(func() {
		if err := join(before); err != nil {
			t.Errorf("return to the cgroup %s: %v", before, err)
		}
		if err := unix.Rmdir(own); err != nil {
			t.Errorf("remove the cgroup %s: %v", own, err)
		}
	})
	if err := join(own); err != nil {
		t.Fatalf("enter the cgroup %s: %v", own, err)
	}
	return own
}
