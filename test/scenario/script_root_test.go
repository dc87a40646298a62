// SPDX-License-Identifier: Apache-2.0

//go:build root

package scenario

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/mooring-cni/mooring/test/netns"
)

// The scripts in testdata: each has a node of its own. Beside what testscript
// gives, they use these commands. A check is tried again until it holds, for as
// long as patience lasts.
//
//	up [FLAG...]           start mooringd and wait until it is ready
//	down, crash            end it by SIGTERM, by SIGKILL
//	manifest FILE...       put files into the directory of manifests; $NAME_ip and $NAME_ip6 in them are pods' addresses
//	unmanifest FILE...     take them out
//	hide, unhide           take the directory of manifests away, and put it back
//	generate FILE ports|endpoints|junk N   make a large manifest
//	pod NAME...            make pods by the CNI plugin: of the namespace default, or NAMESPACE/POD
//	nopod NAME...          delete them
//	serve POD PORT         answer with the pod's name: HTTP and UDP on PORT, lines of TCP on PORT+1
//	get FROM ADDR NAMES    an HTTP request is answered by one of NAMES (a|b)
//	ask FROM ADDR NAMES    a UDP request from a new socket likewise
//	spread FROM ADDR NAMES of many HTTP requests each of NAMES answers some, and nobody else any
//	sticks FROM ADDR NAME  every one of many HTTP requests is answered by one server; NAME is its variable
//	wanders FROM ADDR PAUSE  of HTTP requests with a pause between them, not all are answered by one server
//	source FROM ADDR WHO   an HTTP request arrives from the address WHO
//	spoof POD SOURCE ADDR  send UDP from an address that is not the pod's
//	rules N                each iptables chain of the node jumps to ours N times
//	refused FROM tcp|udp ADDR
//	silent FROM tcp|udp ADDR
//	open ID FROM tcp|udp ADDR      a connection that stays
//	talk ID NAMES          the connection works and one of NAMES answers
//	broken ID              it has ended
//	stuck ID               it has not, and nothing comes back
//	shows REGEXP ARG...    `mooring ARG...` prints it; with ! first: never
//	metrics REGEXP         likewise for /metrics
//	refuses REGEXP mooringd|mooring ARG...    the program fails and says so
//	monitor                start `mooring monitor`
//	monitored REGEXP       it has printed that
//
// FROM is a pod, node or outside.
func TestScenarios(t *testing.T) {
	commands := map[string]func(ts *testscript.TestScript, neg bool, args []string){}
	for name, c := range scriptCommands {
		commands[name] = func(ts *testscript.TestScript, neg bool, args []string) {
			if len(args) < c.least || neg && !c.negative {
				ts.Fatalf("usage: %s, see TestScenarios", name)
			}
			s := ts.Value("script").(*script)
			s.ts, s.not = ts, neg
			if err := c.run(s, args); err != nil {
				ts.Fatalf("%v", err)
			}
		}
	}
	testscript.Run(t, testscript.Params{
		Dir:  "testdata",
		Cmds: commands,
		Setup: func(env *testscript.Env) error {
			n := NewNode(env.T().(netns.T))
			env.Values["script"] = &script{Node: n, connections: map[string]net.Conn{}}
			env.Setenv("MOORING_SOCKET", n.Socket)
			env.Setenv("NODE_DIR", n.Dir)
			return nil
		},
	})
}

// patience is for machines that do other things besides.
const patience = 10 * time.Second

type script struct {
	*Node
	ts          *testscript.TestScript
	not         bool
	connections map[string]net.Conn // by ID
	monitors    *netns.Process
}

var scriptCommands = map[string]struct {
	least    int
	negative bool
	run      func(s *script, args []string) error
}{
	"up":         {0, false, (*script).up},
	"down":       {0, false, func(s *script, _ []string) error { return s.Down() }},
	"crash":      {0, false, func(s *script, _ []string) error { s.Crash(); return nil }},
	"manifest":   {1, false, (*script).manifest},
	"unmanifest": {1, false, (*script).unmanifest},
	"hide":       {0, false, func(s *script, _ []string) error { return os.Rename(s.Manifests, s.Manifests+".away") }},
	"unhide":     {0, false, func(s *script, _ []string) error { return os.Rename(s.Manifests+".away", s.Manifests) }},
	"generate":   {3, false, (*script).generate},
	"pod":        {1, false, (*script).pod},
	"nopod":      {1, false, (*script).nopod},
	"serve":      {2, false, (*script).serve},
	"get":        {3, false, (*script).get},
	"ask":        {3, false, (*script).ask},
	"spread":     {3, false, (*script).spread},
	"sticks":     {3, false, (*script).sticks},
	"wanders":    {3, false, (*script).wanders},
	"source":     {3, false, (*script).source},
	"spoof":      {3, false, (*script).spoof},
	"rules":      {1, false, (*script).rules},
	"refused":    {3, false, (*script).refused},
	"silent":     {3, false, (*script).silent},
	"open":       {4, false, (*script).open},
	"talk":       {2, false, (*script).talk},
	"stuck":      {1, false, (*script).stuck},
	"broken":     {1, false, (*script).broken},
	"shows":      {2, true, (*script).shows},
	"metrics":    {1, true, (*script).metrics},
	"refuses":    {2, false, (*script).refuses},
	"monitor":    {0, false, (*script).monitor},
	"monitored":  {1, false, (*script).monitored},
}

// try repeats a check until it holds.
func try(check func() error) error {
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := check()
		if err == nil || time.Now().After(end) {
			return err
		}
	}
}

func oneOf(names, got string) error {
	if slices.Contains(strings.Split(names, "|"), got) {
		return nil
	}
	return fmt.Errorf("%q answers, want %s", got, names)
}

func (s *script) up(args []string) error {
	s.Flags = args
	s.Up()
	return nil
}

func (s *script) manifest(args []string) error {
	for _, name := range args {
		content := os.Expand(s.ts.ReadFile(name), s.ts.Getenv)
		s.Write(filepath.Base(name), content)
	}
	return nil
}

func (s *script) unmanifest(args []string) error {
	for _, name := range args {
		if err := os.Remove(filepath.Join(s.Manifests, name)); err != nil {
			return err
		}
	}
	return nil
}

// generate makes a service of as many ports for the pods that are app=web, one
// of as many endpoints in one slice, or as many MiB of comments.
func (s *script) generate(args []string) error {
	n, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	var b strings.Builder
	switch args[1] {
	case "ports":
		b.WriteString("apiVersion: v1\nkind: Service\nmetadata: {name: ports, namespace: default}\nspec:\n  clusterIP: 10.96.0.30\n  selector: {app: web}\n  ports:\n")
		for i := range n {
			fmt.Fprintf(&b, "  - {name: port-%d, port: %d, targetPort: 8080}\n", i, 1000+i)
		}
	case "endpoints":
		b.WriteString("apiVersion: v1\nkind: Service\nmetadata: {name: crowd, namespace: default}\nspec: {clusterIP: 10.96.0.31, ports: [{port: 80}]}\n---\n" +
			"apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: crowd-1, namespace: default, labels: {kubernetes.io/service-name: crowd}}\n" +
			"addressType: IPv4\nports: [{port: 8080}]\nendpoints:\n")
		for i := range n {
			fmt.Fprintf(&b, "- {addresses: [10.245.%d.%d]}\n", i>>8, i&255)
		}
	case "junk":
		line := "# " + strings.Repeat("x", 1021) + "\n"
		b.WriteString(strings.Repeat(line, n<<10))
	}
	return os.WriteFile(s.ts.MkAbs(args[0]), []byte(b.String()), 0o644)
}

func (s *script) pod(args []string) error {
	for _, name := range args {
		p := s.AddPod(name)
		variable := strings.NewReplacer("-", "_", "/", "_").Replace(name)
		s.ts.Setenv(variable+"_ip", p.IP.String())
		s.ts.Setenv(variable+"_ip6", p.IP6.String())
	}
	return nil
}

func (s *script) nopod(args []string) error {
	for _, name := range args {
		s.DeletePod(name)
	}
	return nil
}

func (s *script) serve(args []string) error {
	port, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	name, where, t := args[0], s.Place(args[0]), s.t
	netns.HTTPEcho(t, where, fmt.Sprintf("[::]:%d", port), name)
	netns.UDP(t, where, fmt.Sprintf("[::]:%d", port), func(request []byte, _ net.Addr) []byte { return []byte(name + " " + string(request)) })
	netns.TCP(t, where, fmt.Sprintf("[::]:%d", port+1), func(c net.Conn) {
		lines := bufio.NewScanner(c)
		for lines.Scan() {
			fmt.Fprintln(c, name, lines.Text())
		}
	})
	return nil
}

// fetch returns who answered an HTTP request, and from where it came.
func (s *script) fetch(from, address string) (name, source string, err error) {
	body, err := s.Place(from).Get("http://" + address + "/")
	if err != nil {
		return "", "", err
	}
	words := strings.Fields(body)
	if len(words) != 4 {
		return "", "", fmt.Errorf("answer %q", body)
	}
	host, _, err := net.SplitHostPort(words[3])
	return words[0], strings.TrimPrefix(host, "::ffff:"), err
}

func (s *script) get(args []string) error {
	return try(func() error {
		name, _, err := s.fetch(args[0], args[1])
		if err != nil {
			return err
		}
		return oneOf(args[2], name)
	})
}

func (s *script) ask(args []string) error {
	return try(func() error {
		c, err := s.Place(args[0]).Dial("udp", args[1])
		if err != nil {
			return err
		}
		defer c.Close()
		name, err := exchange(c, time.Second)
		if err != nil {
			return err
		}
		return oneOf(args[2], name)
	})
}

func (s *script) spread(args []string) error {
	return try(func() error {
		seen := map[string]int{}
		for range 20 * (1 + strings.Count(args[2], "|")) {
			name, _, err := s.fetch(args[0], args[1])
			if err == nil {
				err = oneOf(args[2], name)
			}
			if err != nil {
				return err
			}
			seen[name]++
		}
		if len(seen) != 1+strings.Count(args[2], "|") {
			return fmt.Errorf("answers are from %v, want all of %s", seen, args[2])
		}
		return nil
	})
}

func (s *script) sticks(args []string) error {
	return try(func() error {
		var first string
		for range 20 {
			name, _, err := s.fetch(args[0], args[1])
			if err != nil {
				return err
			}
			if first != "" && name != first {
				return fmt.Errorf("%s answers after %s", name, first)
			}
			first = name
		}
		s.ts.Setenv(args[2], first)
		return nil
	})
}

func (s *script) wanders(args []string) error {
	pause, err := time.ParseDuration(args[2])
	if err != nil {
		return err
	}
	var first string
	// Of two servers, one is chosen 20 times in a row once in 500,000 tests.
	for range 20 {
		name, _, err := s.fetch(args[0], args[1])
		if err != nil {
			return err
		}
		if first != "" && name != first {
			return nil
		}
		first = name
		time.Sleep(pause)
	}
	return fmt.Errorf("%s answers every request", first)
}

func (s *script) source(args []string) error {
	return try(func() error {
		_, source, err := s.fetch(args[0], args[1])
		if err == nil && source != args[2] {
			err = fmt.Errorf("the request comes from %s, want %s", source, args[2])
		}
		return err
	})
}

func (s *script) spoof(args []string) error {
	where := s.Place(args[0])
	where.Addr(s.t, "eth0", args[1]+"/32")
	return where.Do(func() error {
		d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(args[1])}}
		c, err := d.Dial("udp", args[2]+":9")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("spoofed"))
		return err
	})
}

func (s *script) rules(args []string) error {
	want, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	return try(func() error {
		for _, program := range []string{"iptables-save", "ip6tables-save"} {
			out, err := s.Command(program).Output()
			if err != nil {
				return err
			}
			if got := strings.Count(string(out), "-j MOORING-MASQUERADE"); got != want {
				return fmt.Errorf("%s has %d jumps to the masquerade, want %d:\n%s", program, got, want, out)
			}
		}
		return nil
	})
}

// exchange sends a line and returns who answers it.
func exchange(c net.Conn, limit time.Duration) (string, error) {
	question := fmt.Sprint("question-", time.Now().UnixNano())
	c.SetDeadline(time.Now().Add(limit))
	if _, err := fmt.Fprintln(c, question); err != nil {
		return "", err
	}
	buffer := make([]byte, 512)
	for {
		n, err := c.Read(buffer)
		if err != nil {
			return "", err
		}
		if words := strings.Fields(string(buffer[:n])); len(words) == 2 && words[1] == question {
			return words[0], nil
		}
	}
}

// attempt is what becomes of a connection or a request.
func (s *script) attempt(from, network, address string, limit time.Duration) (time.Duration, error) {
	began := time.Now()
	c, err := s.Place(from).Dial(network, address)
	if err == nil {
		defer c.Close()
		if network == "udp" {
			_, err = exchange(c, limit)
		}
	}
	return time.Since(began), err
}

func (s *script) refused(args []string) error {
	return try(func() error {
		took, err := s.attempt(args[0], args[1], args[2], 2*time.Second)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("%s of %s: %v after %v, want a refusal", args[1], args[2], err, took)
		}
		return nil
	})
}

func (s *script) silent(args []string) error {
	return try(func() error {
		took, err := s.attempt(args[0], args[1], args[2], time.Second)
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			return fmt.Errorf("%s of %s: %v after %v, want silence", args[1], args[2], err, took)
		}
		return nil
	})
}

func (s *script) open(args []string) error {
	c, err := s.Place(args[1]).Dial(args[2], args[3])
	if err != nil {
		return err
	}
	s.connections[args[0]] = c
	s.ts.Defer(func() { c.Close() })
	return nil
}

func (s *script) talk(args []string) error {
	c := s.connections[args[0]]
	if c == nil {
		return fmt.Errorf("there is no connection %s", args[0])
	}
	check := func() error {
		name, err := exchange(c, 2*time.Second)
		if err != nil {
			return err
		}
		return oneOf(args[1], name)
	}
	if c.LocalAddr().Network() == "tcp" {
		return check() // a stream does not mend
	}
	return try(check)
}

func (s *script) stuck(args []string) error {
	c := s.connections[args[0]]
	if c == nil {
		return fmt.Errorf("there is no connection %s", args[0])
	}
	return try(func() error {
		name, err := exchange(c, time.Second)
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			return fmt.Errorf("connection %s: %q answers, error %v; want silence", args[0], name, err)
		}
		return nil
	})
}

func (s *script) broken(args []string) error {
	c := s.connections[args[0]]
	if c == nil {
		return fmt.Errorf("there is no connection %s", args[0])
	}
	return try(func() error {
		name, err := exchange(c, time.Second)
		if err == nil {
			return fmt.Errorf("connection %s works: %s answers", args[0], name)
		}
		if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, io.EOF) && !errors.Is(err, syscall.EPIPE) {
			return fmt.Errorf("connection %s: %v, want its end", args[0], err)
		}
		return nil
	})
}

// matches checks what something prints: with "!" once, else until it does.
func (s *script) matches(pattern string, print func() (string, error)) error {
	expression, err := regexp.Compile("(?m)" + pattern)
	if err != nil {
		return err
	}
	if s.not {
		out, err := print()
		if err == nil && expression.MatchString(out) {
			err = fmt.Errorf("unwanted match of %q in\n%s", pattern, out)
		}
		return err
	}
	return try(func() error {
		out, err := print()
		if err == nil && !expression.MatchString(out) {
			err = fmt.Errorf("no match of %q in\n%s", pattern, out)
		}
		return err
	})
}

func (s *script) shows(args []string) error {
	return s.matches(args[0], func() (string, error) { return s.Mooring(args[1:]...) })
}

func (s *script) metrics(args []string) error {
	return s.matches(args[0], func() (string, error) { return s.Get("http://127.0.0.1:9964/metrics") })
}

func (s *script) refuses(args []string) error {
	c := s.Command(filepath.Join(s.Programs, args[1]), args[2:]...)
	c.Dir = s.ts.Getenv("WORK")
	process := c.Background(quiet{s.t})
	select {
	case <-process.Done():
	case <-time.After(patience):
		process.Kill()
		return fmt.Errorf("%s goes on", args[1])
	}
	out := process.Output()
	if process.Wait() == nil {
		return fmt.Errorf("%s succeeds: %s", args[1], out)
	}
	if matched, err := regexp.MatchString("(?m)"+args[0], out); err != nil || !matched {
		return fmt.Errorf("%s says, without %q (%v):\n%s", args[1], args[0], err, out)
	}
	if lines := strings.Count(strings.TrimSpace(out), "\n"); lines > 1 {
		return fmt.Errorf("%s says more than a line:\n%s", args[1], out)
	}
	return nil
}

// quiet does not log the output of a program that is expected to fail.
type quiet struct{ netns.T }

func (quiet) Failed() bool { return false }

func (s *script) monitor([]string) error {
	s.monitors = s.Start(s.t, filepath.Join(s.Programs, "mooring"), "--socket", s.Socket, "monitor")
	// It says nothing until something happens.
	time.Sleep(300 * time.Millisecond)
	return nil
}

func (s *script) monitored(args []string) error {
	return s.matches(args[0], func() (string, error) { return s.monitors.Output(), nil })
}
