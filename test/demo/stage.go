// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/mooring-cni/mooring/test/netns"
)

// network is the CNI network's name: what cnitool is called with.
const network = "mooring-demo"

// stage is where the story plays.
type stage struct {
	options
	context.Context
	netns.T
	cancel  context.CancelFunc
	color   bool
	started time.Time
	theNode *netns.Node
}

func newStage(ctx context.Context, cancel context.CancelFunc, t netns.T, o options) *stage {
	info, err := os.Stdout.Stat()
	terminal := err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("NO_COLOR") == ""
	s := &stage{options: o, Context: ctx, T: t, cancel: cancel, color: terminal, started: time.Now()}
	for _, path := range []*string{&s.bin, &s.cnitool, &s.manifests} {
		absolute, err := filepath.Abs(*path)
		if err != nil {
			t.Fatalf("find %s: %v", *path, err)
		}
		*path = absolute
	}
	for _, name := range []string{"mooringd", "mooring", "mooring-cni", "mooring-ipam"} {
		if _, err := exec.LookPath(filepath.Join(s.bin, name)); err != nil {
			t.Fatalf("find the programs (make build): %v", err)
		}
	}
	return s
}

// step begins something; after Ctrl-C nothing is begun any more.
func (s *stage) step() {
	if s.Err() != nil {
		runtime.Goexit() // nothing has failed; what was begun is undone
	}
}

func (s *stage) print(style, text string) {
	if s.color && style != "" {
		text = "\x1b[" + style + "m" + text + "\x1b[0m"
	}
	if _, err := fmt.Println(text); err != nil {
		s.cancel()
	}
}

func (s *stage) chapter(title, text string) {
	s.step()
	s.print("", "")
	s.print("1", fmt.Sprintf("== %s: %s", title, text))
}

func (s *stage) say(format string, args ...any) { s.print("", "   "+fmt.Sprintf(format, args...)) }

func (s *stage) command(line string) { s.print("36", "$ "+line) }

func (s *stage) output(text string) {
	for line := range strings.Lines(text) {
		s.say("%s", strings.TrimRight(line, "\n"))
	}
}

// wait waits for what must come soon.
func (s *stage) wait(what string, f func() bool) {
	for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(10 * time.Millisecond) {
		s.step()
		if time.Now().After(end) {
			s.Fatalf("not within 10 s: %s", what)
		}
	}
}

// ownGroup keeps Ctrl-C, which a terminal sends to all of its foreground, away
// from a program: what has begun ends, and is then undone in order.
var ownGroup = &syscall.SysProcAttr{Setpgid: true}

// run runs a program on the node to its end.
func (s *stage) run(env []string, name string, args ...string) ([]byte, error) {
	for {
		c := s.theNode.Command(name, args...)
		c.Env, c.SysProcAttr = env, ownGroup
		out, err := c.Output()
		if killed(err) && len(out) == 0 {
			continue // Ctrl-C has met the child before it had its group: it was not the program yet
		}
		if err != nil && len(out) > 0 {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
		}
		return out, err
	}
}

// killed says whether a program was ended by a signal like Ctrl-C's.
func killed(err error) bool {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return false
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && slices.Contains(endings, os.Signal(status.Signal()))
}

// node makes the node and starts the daemon.
func (s *stage) node() *netns.Node {
	s.step()
	cgroup := ownCgroup(s.T)
	n := netns.NewNode(s.T)
	s.theNode = n
	config := filepath.Join(n.Dir, "mooringd.yaml")
	cidrs := make([]string, len(n.PodCIDRs))
	for i, c := range n.PodCIDRs {
		cidrs[i] = c.String()
	}
	text := fmt.Sprintf("nodeName: %s\nmanifests: %s\npodCIDRs: [%q, %q]\nsocket: %s\nbpffs: %s\nstateDir: %s\ncgroup: %q\nmetricsAddress: \"\"\nmasquerade: false\n",
		n.NodeName, s.manifests, cidrs[0], cidrs[1], n.Socket, n.BPFFS, n.StateDir, cgroup)
	conflist := fmt.Sprintf(`{"cniVersion": "1.1.0", "name": %q, "plugins": [{"type": "mooring-cni", "socket": %q, "bpffs": %q}]}`+"\n", network, n.Socket, n.BPFFS)
	for path, content := range map[string]string{config: text, filepath.Join(n.Dir, "10-mooring.conflist"): conflist} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			s.Fatalf("configure the node: %v", err)
		}
	}
	s.say("%s, uplink %s and %s, pods %s", n.NodeName, n.IP, n.IP6, strings.Join(cidrs, " and "))

	s.step()
	s.command("mooringd --config mooringd.yaml &")
	s.output(text)
	command := n.Command(filepath.Join(s.bin, "mooringd"), "--config", config)
	command.SysProcAttr = ownGroup
	daemon := command.Background(s.T)
	s.Cleanup(func() {
		// It may be killed before it has seen to its signals.
		if err := daemon.Stop(); err != nil && !killed(err) {
			s.Errorf("stop mooringd: %v", err)
		}
		if _, err := s.client("cleanup", "--state", "--bpffs", n.BPFFS); err != nil {
			s.Errorf("mooring cleanup: %v", err)
		}
		s.say("the node is gone, %.1f s after the beginning", time.Since(s.started).Seconds())
	})
	s.wait("mooringd is ready", func() bool {
		select {
		case <-daemon.Done():
			s.Fatalf("mooringd has ended: %v", strings.TrimSpace(daemon.Output()))
		default:
		}
		var status struct{ Healthy bool }
		return s.query(&status, "status") == nil && status.Healthy
	})
	return n
}

// pod makes a namespace, as a container runtime does, and adds it to the network.
func (s *stage) pod(name string) *netns.NS {
	s.step()
	pod := netns.Empty(s.T, name)
	s.command(fmt.Sprintf("CNI_ARGS='K8S_POD_NAMESPACE=default;K8S_POD_NAME=%s' cnitool add %s %s", name, network, pod.Path()))
	// The result is kept below /var/lib/cni, wherever the plugins run.
	keepClean(s.T, "/var/lib/cni/results")
	s.Cleanup(func() {
		if _, err := s.cni("del", name, pod); err != nil {
			s.Errorf("cnitool del of %s: %v", name, err)
		}
	})
	out, err := s.cni("add", name, pod)
	if err != nil {
		s.Fatalf("cnitool add of %s: %v", name, err)
	}
	var result struct {
		Interfaces []struct{ Name, Sandbox string }
		IPs        []struct{ Address netip.Prefix }
	}
	if err := json.Unmarshal(out, &result); err != nil {
		s.Fatalf("read the result of cnitool add of %s: %v: %s", name, err, out)
	}
	line := "-> " + name
	for _, ip := range result.IPs {
		line += " " + ip.Address.Addr().String()
	}
	for _, i := range result.Interfaces {
		if i.Sandbox == "" {
			line += ", on the node " + i.Name
		}
	}
	s.say("%s", line)
	return pod
}

func (s *stage) cni(verb, name string, pod *netns.NS) ([]byte, error) {
	env := append(os.Environ(), "CNI_PATH="+s.bin, "NETCONFPATH="+s.theNode.Dir,
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME="+name)
	return s.run(env, s.cnitool, verb, network, pod.Path())
}

// keepClean removes a directory at the end, and those above it, if they are
// empty then and were not there before.
func keepClean(t netns.T, path string) {
	for ; path != "/"; path = filepath.Dir(path) {
		if _, err := os.Stat(path); err == nil {
			return
		}
		made := path
		defer t.Cleanup(func() { os.Remove(made) })
	}
}

// serve is the web server in a backend pod.
func (s *stage) serve(pod *netns.NS, name string) {
	s.step()
	netns.HTTP(s.T, pod, "[::]:8080", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, err := netip.ParseAddrPort(r.RemoteAddr)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprintf(w, "hello from %s to %s\n", name, from.Addr().Unmap())
	}))
}

func (s *stage) get(client *netns.NS, url string) {
	s.step()
	body, err := client.Get(url)
	if err != nil {
		s.Fatalf("the client's request: %v", err)
	}
	s.command("curl " + url)
	s.output(body)
}

// connection is an HTTP connection that stays open after its first answer.
type connection struct {
	*net.TCPConn
	s *stage
}

func (s *stage) open(client *netns.NS, address string) *connection {
	s.step()
	conn, err := client.Dial("tcp", address)
	if err != nil {
		s.Fatalf("connect the client: %v", err)
	}
	s.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	_, err = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: web\r\n\r\n")
	var body []byte
	if err == nil {
		var response *http.Response
		if response, err = http.ReadResponse(bufio.NewReader(conn), nil); err == nil {
			body, err = io.ReadAll(response.Body)
			response.Body.Close()
		}
	}
	if err != nil {
		s.Fatalf("the client's request on %s: %v", address, err)
	}
	s.command("curl http://" + strings.TrimSuffix(address, ":80") + "/")
	s.output(string(body))
	return &connection{TCPConn: conn.(*net.TCPConn), s: s}
}

// close is the orderly end: the client's socket goes through TIME_WAIT.
func (c *connection) close() {
	c.s.step()
	c.Close()
}

// reset ends the connection as an application does that is killed with data unread.
func (c *connection) reset() {
	c.s.step()
	if err := c.SetLinger(0); err != nil {
		c.s.Fatalf("reset the connection: %v", err)
	}
	c.Close()
}

// ended tells what became of the connections' entries, and waits for what the
// hook that this kernel allows promises.
func (s *stage) ended(closed, reset *connection) {
	var status struct{ Hook struct{ Mode, Reason string } }
	if err := s.query(&status, "status"); err != nil {
		s.Fatalf("mooring status: %v", err)
	}
	if status.Hook.Mode == "off" {
		s.say("No hook (%s): entries wait for their timeouts.", status.Hook.Reason)
		return
	}
	s.wait("the entries of the connection that was reset go with its socket", func() bool {
		var entries []struct{ Source string }
		if err := s.query(&entries, "ct", "list"); err != nil {
			s.Fatalf("mooring ct list: %v", err)
		}
		return !slices.ContainsFunc(entries, func(e struct{ Source string }) bool { return e.Source == reset.LocalAddr().String() })
	})
	s.say("The socket of %s is gone, and its entries with it.", reset.LocalAddr())
	s.say("The one of %s is in TIME_WAIT: its entries end when no packet can follow any", closed.LocalAddr())
	s.say("more, which is when the backend's socket has ended too, or with TIME_WAIT.")
}

// mooring shows what the client says.
func (s *stage) mooring(args ...string) {
	s.step()
	s.command("mooring " + strings.Join(args, " "))
	out, err := s.client(args...)
	if err != nil {
		s.Fatalf("mooring %s: %v", strings.Join(args, " "), err)
	}
	s.output(string(out))
}

func (s *stage) client(args ...string) ([]byte, error) {
	return s.run(nil, filepath.Join(s.bin, "mooring"), append([]string{"--socket", s.theNode.Socket}, args...)...)
}

func (s *stage) query(into any, args ...string) error {
	out, err := s.client(append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	return json.Unmarshal(out, into)
}

// backends counts those of a service's first frontend.
func (s *stage) backends(service string) int {
	var services []struct {
		Name      string
		Frontends []struct{ Backends []struct{ Address string } }
	}
	if err := s.query(&services, "service", "list"); err != nil {
		s.Fatalf("mooring service list: %v", err)
	}
	for _, one := range services {
		if one.Name == service && len(one.Frontends) > 0 {
			return len(one.Frontends[0].Backends)
		}
	}
	return 0
}
