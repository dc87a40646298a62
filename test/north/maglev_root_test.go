// SPDX-License-Identifier: Apache-2.0

//go:build root

package north

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
)

// ten are pods on both nodes.
func (l *Lab) ten() (names []string) {
	for i := range 5 {
		names = append(names, fmt.Sprintf("a-%d", i+1), fmt.Sprintf("b-%d", i+1))
	}
	l.Pods(names...)
	return names
}

// askFromPort asks by UDP from a port of the client's own.
func (l *Lab) askFromPort(f Frontend, port uint16, payload []byte) (a Answer, err error) {
	c, err := l.dialFrom(netip.AddrPortFrom(l.ClientFor(f), port), f)
	if err != nil {
		return a, err
	}
	defer c.Close()
	return AskOn(c, payload, Patience)
}

func TestEveryNodeChoosesTheSameBackendByMaglev(t *testing.T) {
	for _, mode := range []Mode{{"native", "snat"}, {"off", "snat"}} {
		t.Run(mode.String(), func(t *testing.T) {
			l := New(t, mode, "--load-balancing-algorithm", "maglev")
			l.Service(Spec{Pods: l.ten()})
			count := connections() / 2
			for at, f := range l.Frontends() {
				if f.Network != "udp" || f.Kind == "NodePort" { // whose address is another on each node
					continue
				}
				chosen := make([]map[string]int, 2)
				by := make([][]string, 2)
				for n, node := range l.Nodes() {
					l.RouteTo(node)
					by[n], chosen[n] = make([]string, count), map[string]int{}
					var mutex sync.Mutex
					report(t, f.String(), count, parallel(count, func(i int) error {
						a, err := l.askFromPort(f, uint16(15000+1000*at+i), Payload(i, 100))
						mutex.Lock()
						defer mutex.Unlock()
						by[n][i] = a.Pod
						chosen[n][a.Pod]++
						return err
					}))
				}
				l.RouteTo(l.A)
				differ := 0
				for i := range count {
					if by[0][i] != by[1][i] {
						differ++
					}
				}
				if differ > 0 {
					t.Errorf("%s: of %d flows, the nodes choose different pods for %d", f, count, differ)
				}
				if len(chosen[0]) != 10 {
					t.Errorf("%s: of ten pods, %d are chosen: %v", f, len(chosen[0]), chosen[0])
				}
			}
		})
	}
}

func TestEndOfOneBackendBreaksNoOther(t *testing.T) {
	for _, mode := range Modes {
		t.Run(mode.String(), func(t *testing.T) { endOfOneBackend(t, New(t, mode, "--load-balancing-algorithm", "maglev")) })
	}
}

func endOfOneBackend(t *testing.T, l *Lab) {
	pods := l.ten()
	l.Service(Spec{Pods: pods})
	f := Frontend{"LoadBalancer", "tcp", netip.AddrPortFrom(Balancer[0], TCPPort)}
	count := 2 * connections()
	open, by := make([]net.Conn, count), make([]string, count)
	report(t, "connections", count, parallel(count, func(i int) error {
		c, err := l.Dial(f)
		if err != nil {
			return err
		}
		open[i] = c
		a, err := AskOn(c, Payload(i, 100), Patience)
		by[i] = a.Pod
		return err
	}))
	defer func() {
		for _, c := range open {
			if c != nil {
				c.Close()
			}
		}
	}()
	if t.Failed() {
		return
	}
	gone := pods[3]
	l.Service(Spec{Pods: append(append([]string(nil), pods[:3]...), pods[4:]...)})
	// New ones avoid it at once.
	report(t, "new connections", connections(), parallel(connections(), func(i int) error {
		a, err := l.Ask(f, Payload(i, 100))
		if err == nil && a.Pod == gone {
			err = fmt.Errorf("%s is chosen, which is no backend any more", gone)
		}
		return err
	}))
	others := 0
	report(t, "open connections", count, parallel(count, func(i int) error {
		if by[i] == gone {
			return nil
		}
		return echoOn(open[i], Payload(i, 200))
	}))
	for i := range by {
		if by[i] != gone {
			others++
		}
	}
	t.Logf("%d open connections, %d of them to the nine other pods", count, others)
}
