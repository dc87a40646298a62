// SPDX-License-Identifier: Apache-2.0

package fate

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/mooring-cni/mooring/test/netns"
)

// Idle are established TCP connections on which nothing is said until somebody
// asks whether they still live. Their servers are processes of their own: one
// process may not have so many files.
type Idle struct {
	clients []net.Conn
	servers []*idleServer
}

// idlePort is the port that idle connections are served on in their backends.
const idlePort = 8082

const idleVariable = "MOORING_FATE_IDLE"

type idleServer struct {
	process  *netns.Process
	commands io.WriteCloser
	answers  *bufio.Reader
}

// IdleMain is called first in TestMain: in a server's process it does not return.
func IdleMain() {
	if os.Getenv(idleVariable) == "" {
		return
	}
	if err := serveIdle(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// serveIdle echoes on every connection; at each line of commands it says a byte
// first on every other one, and tells how many there are.
func serveIdle(commands io.Reader, answers io.Writer) error {
	l, err := net.Listen("tcp", fmt.Sprintf("[::]:%d", idlePort))
	if err != nil {
		return err
	}
	var mutex sync.Mutex
	var speakers []net.Conn
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				var b [1]byte
				for first := true; ; first = false {
					if _, err := io.ReadFull(c, b[:]); err != nil {
						return
					}
					if first && b[0] == speaks {
						mutex.Lock()
						speakers = append(speakers, c)
						mutex.Unlock()
					}
					if _, err := c.Write(b[:]); err != nil {
						return
					}
				}
			}()
		}
	}()
	fmt.Fprintln(answers, "listening")
	lines := bufio.NewScanner(commands)
	for lines.Scan() {
		mutex.Lock()
		all := speakers
		mutex.Unlock()
		for _, c := range all {
			c.Write([]byte{unasked}) // one that is broken is found by its client
		}
		fmt.Fprintln(answers, len(all))
	}
	return lines.Err()
}

// What is said on an idle connection.
const (
	speaks  = 1 // by the client at first: the server is to speak unasked
	listens = 2 // or not
	unasked = 3
)

// Establish makes connections from a pod to a service whose backends are in the
// given namespaces, at idlePort.
func Establish(t netns.T, client *netns.NS, to netip.AddrPort, count int, backends ...*netns.NS) *Idle {
	t.Helper()
	i := &Idle{clients: make([]net.Conn, count)}
	for _, backend := range backends {
		i.servers = append(i.servers, startIdleServer(t, backend))
	}
	t.Cleanup(func() {
		for _, c := range i.clients {
			if c != nil {
				c.Close()
			}
		}
	})
	for n := range i.clients {
		c, err := client.Dial("tcp", to.String())
		if err != nil {
			t.Fatalf("connection %d of %d: %v", n, count, err)
		}
		i.clients[n] = c
		if err := ask(c, i.role(n)); err != nil {
			t.Fatalf("connection %d of %d: %v", n, count, err)
		}
	}
	return i
}

func startIdleServer(t netns.T, ns *netns.NS) *idleServer {
	t.Helper()
	c := ns.Command("/proc/self/exe")
	c.Env = append(os.Environ(), idleVariable+"=1")
	// Pipes of our own: exec.Cmd closes its own when the process ends.
	commands, ours, err := os.Pipe()
	if err != nil {
		t.Fatalf("server in %s: %v", ns.Name(), err)
	}
	theirs, answers, err := os.Pipe()
	if err != nil {
		t.Fatalf("server in %s: %v", ns.Name(), err)
	}
	c.Stdin, c.Stdout = commands, answers
	s := &idleServer{process: c.Background(t), commands: ours, answers: bufio.NewReader(theirs)}
	commands.Close()
	answers.Close()
	t.Cleanup(func() {
		ours.Close()
		theirs.Close()
	})
	if line, err := s.answers.ReadString('\n'); err != nil || strings.TrimSpace(line) != "listening" {
		t.Fatalf("server in %s: %q, %v", ns.Name(), line, err)
	}
	return s
}

func (i *Idle) role(n int) byte { return []byte{listens, speaks}[n%2] }

// Len is how many connections there are.
func (i *Idle) Len() int { return len(i.clients) }

// Broken says something on every connection, on every other one first from the
// server's side, and returns what did not arrive.
func (i *Idle) Broken() (broken []error) {
	for _, s := range i.servers {
		if _, err := fmt.Fprintln(s.commands, "speak"); err != nil {
			return []error{err}
		}
		if _, err := s.answers.ReadString('\n'); err != nil {
			return []error{err}
		}
	}
	var mutex sync.Mutex
	var wait sync.WaitGroup
	turn := make(chan struct{}, 64)
	for n, c := range i.clients {
		turn <- struct{}{}
		wait.Go(func() {
			defer func() { <-turn }()
			var err error
			if i.role(n) == speaks {
				err = hear(c, unasked)
			}
			if err == nil {
				err = ask(c, listens)
			}
			if err != nil {
				mutex.Lock()
				broken = append(broken, fmt.Errorf("connection %d: %w", n, err))
				mutex.Unlock()
			}
		})
	}
	wait.Wait()
	return broken
}

func ask(c net.Conn, word byte) error {
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Write([]byte{word}); err != nil {
		return err
	}
	return hear(c, word)
}

func hear(c net.Conn, word byte) error {
	c.SetDeadline(time.Now().Add(10 * time.Second))
	var b [1]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return errors.Join(fmt.Errorf("nothing is heard from %s", c.RemoteAddr()), err)
	}
	if b[0] != word {
		return fmt.Errorf("%d arrived instead of %d", b[0], word)
	}
	return nil
}
