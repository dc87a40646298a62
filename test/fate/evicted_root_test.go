// SPDX-License-Identifier: Apache-2.0

//go:build root

package fate

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/packet"
)

// TestAConnectionGoesOnWithoutItsEntry takes the entries of connections that live, as a table
// that is too small does, while other changes void what is cached. Their sockets know where they
// go, and make them again.
func TestAConnectionGoesOnWithoutItsEntry(t *testing.T) {
	cgroup := netns.NewCgroup(t, "node")
	n := packet.NewNode(t, packet.Options{MaxEntries: 16384, Policy: true, Hook: bpf.HookAuto, Cgroup: cgroup.Path})
	cgroup.Enter(t)
	client := n.Pod(t)
	open := bpf.EndpointPolicy{Ruleset: [2]uint64{bpf.RulesetOpen, bpf.RulesetOpen}}
	// Servers only answer: no rule lets them begin anything.
	answers := open
	answers.Ruleset[bpf.PolicyEgress] = 99
	rulesets := map[uint16]bpf.EndpointPolicy{client.ID: open}
	var backends [2][]netip.AddrPort
	for range 4 {
		server := n.Pod(t)
		rulesets[server.ID] = answers
		netns.TCP(t, server.NS, "[::]:8080", func(c net.Conn) { io.Copy(c, c) })
		for i, v6 := range []bool{false, true} {
			backends[i] = append(backends[i], server.At(v6, 8080))
		}
	}
	for id, p := range rulesets {
		if err := n.Policies.Put(uint32(id), p); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Invalidate(); err != nil {
		t.Fatal(err)
	}
	for i, vip := range vips {
		n.Service(t, packet.TCP, netip.AddrPortFrom(vip, TCPPort), backends[i]...)
	}
	for name, to := range map[string]netip.AddrPort{
		"IPv4, by a service": netip.AddrPortFrom(vips[0], TCPPort), "IPv4, itself": backends[0][0],
		"IPv6, by a service": netip.AddrPortFrom(vips[1], TCPPort), "IPv6, itself": backends[1][0],
	} {
		t.Run(name, func(t *testing.T) {
			count := connections(200)
			var begun, all sync.WaitGroup
			begun.Add(count)
			for i := range count {
				all.Go(func() {
					if err := chat(client.NS, to, &begun); err != nil {
						t.Errorf("connection %d: %v", i, err)
					}
				})
			}
			begun.Wait()
			for range 5 {
				n.Flush(t)
				time.Sleep(100 * time.Millisecond)
				if err := n.Invalidate(); err != nil {
					t.Error(err)
				}
				n.Flush(t)
				time.Sleep(100 * time.Millisecond)
			}
			all.Wait()
			if dropped := n.Dropped(t); len(dropped) > 0 {
				t.Logf("dropped: %v", dropped)
			}
			var left []string
			for began := time.Now(); time.Since(began) < 10*time.Second; time.Sleep(50 * time.Millisecond) {
				if left = tethered(t, n); len(left) == 0 {
					return
				}
			}
			t.Errorf("%d entries have not ended with their sockets:\n%s", len(left), strings.Join(left[:min(len(left), 10)], ""))
		})
	}
}

// tethered are the entries that sockets own.
func tethered(t *testing.T, n *packet.Node) (all []string) {
	for k, e := range n.Entries(t) {
		if e.Cookie != [2]uint64{} {
			all = append(all, fmt.Sprintf("\t%+v %+v\n", k, e))
		}
	}
	return all
}

// chat is long enough for the socket to look for its entry, which it does every second with each 16th packet.
func chat(client *netns.NS, to netip.AddrPort, begun *sync.WaitGroup) error {
	c, err := client.Dial("tcp", to.String())
	if err != nil {
		begun.Done()
		return err
	}
	defer c.Close()
	// Nothing is to wait for TIME_WAIT.
	if err := c.(*net.TCPConn).SetLinger(0); err != nil {
		begun.Done()
		return err
	}
	for i := range 80 {
		c.SetDeadline(time.Now().Add(10 * time.Second))
		word := fmt.Sprintf("word %d", i)
		if _, err := c.Write([]byte(word)); err != nil {
			return fmt.Errorf("%s: %w", word, err)
		}
		heard := make([]byte, len(word))
		if _, err := io.ReadFull(c, heard); err != nil || string(heard) != word {
			return fmt.Errorf("%s: heard %q, %w", word, heard, err)
		}
		if i == 0 {
			begun.Done()
			begun.Wait()
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil
}

// TestMoreConnectionsLiveThanTheTableHasRoomFor has each live on when its turn comes, though the table has not held them all.
func TestMoreConnectionsLiveThanTheTableHasRoomFor(t *testing.T) {
	const capacity = 2048
	n := newNode(t, 2, "--conntrack-max-entries", fmt.Sprint(capacity))
	n.Write("idle.yaml", idleService)
	waitForService(t, n, idleAddress)
	idle := Establish(t, n.Pod("client").NS, idleAddress, 3*capacity, n.Pod("server0").NS, n.Pod("server1").NS)
	for range 3 {
		if broken := idle.Broken(); len(broken) > 0 {
			t.Fatalf("%d of %d live connections are broken, the first: %v", len(broken), idle.Len(), broken[0])
		}
		// What is cached is void after it.
		n.AddPod("passing")
		n.DeletePod("passing")
	}
	t.Logf("%+v; dropped:\n%s", stats(t, n), n.Drops())
}
