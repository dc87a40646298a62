// SPDX-License-Identifier: Apache-2.0

//go:build root

package fate

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/scenario"
)

// TestRollingUpdateBreaksNoConnection replaces a service's pods on two nodes as a
// Deployment does, one after the other, while clients make connections: a new pod is
// ready, an old one is terminating until all that began before have ended, and goes.
// Its server never closes: whatever is refused or reset, the datapath did.
func TestRollingUpdateBreaksNoConnection(t *testing.T) {
	const replicas, threads = 4, 8
	nodes := scenario.NewNodes(t, 2)
	for _, n := range nodes {
		n.Write("service.yaml", strings.Replace(service, "  selector: {app: churn}\n", "", 1))
		n.Up()
	}
	client := nodes[0].AddPod("client")

	type pod struct {
		*scenario.Pod
		node  *scenario.Node
		state string // as the API calls it
	}
	var pods []*pod
	add := func(i int) {
		n := nodes[i%len(nodes)]
		p := &pod{n.AddPod(fmt.Sprintf("server%d", i)), n, "active"}
		Serve(t, p.NS)
		pods = append(pods, p)
	}
	// tell writes the slices, and waits until both nodes go by them.
	tell := func() {
		t.Helper()
		slices := map[string]string{}
		states := map[string]string{}
		for _, p := range pods {
			for family, address := range map[string]string{"IPv4": p.IP.String(), "IPv6": p.IP6.String()} {
				slices[family] += fmt.Sprintf("- {addresses: [%q], conditions: {ready: %v, serving: true, terminating: %v}}\n", address, p.state == "active", p.state != "active")
				states[address] = p.state
			}
		}
		manifest := ""
		for family, endpoints := range slices {
			manifest += fmt.Sprintf("---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: churn-%s, namespace: default, labels: {kubernetes.io/service-name: churn}}\naddressType: %s\nports: [{name: tcp, port: 8080}]\nendpoints:\n%s", strings.ToLower(family), family, endpoints)
		}
		for _, n := range nodes {
			n.Write("slices.yaml", manifest)
		}
		for _, n := range nodes {
			netns.Eventually(t, time.Minute, n.NodeName+" has the service's backends", func() bool {
				return sameBackends(t, n, states)
			})
		}
	}
	for i := range replicas {
		add(i)
	}
	tell()

	// Each client notes at which step its connection began.
	var step, made atomic.Int64
	var over atomic.Bool
	var began [threads]atomic.Int64
	var clients sync.WaitGroup
	for i := range threads {
		clients.Go(func() {
			err := client.Do(func() error {
				for !over.Load() {
					began[i].Store(step.Load())
					for _, vip := range vips {
						if err := One(Kind(i%2), vip); err != nil { // ServerCloses, ClientCloses
							return fmt.Errorf("connection to %s at step %d: %w", vip, step.Load(), err)
						}
						made.Add(1)
					}
				}
				return nil
			})
			began[i].Store(1 << 62)
			if err != nil {
				t.Error(err)
			}
		})
	}
	for i := range connections(1000) / 100 {
		add(replicas + i)
		old := pods[0]
		old.state = "terminating"
		tell()
		now := step.Add(1)
		for k := range began {
			netns.Eventually(t, time.Minute, "what began before has ended", func() bool { return began[k].Load() >= now })
		}
		pods = pods[1:]
		tell()
		old.node.DeletePod(fmt.Sprintf("server%d", i))
		if t.Failed() {
			break
		}
	}
	over.Store(true)
	clients.Wait()
	t.Logf("%d connections while %d pods were replaced", made.Load(), step.Load())
}

// sameBackends tells whether a node has the service's TCP port lead to these addresses.
func sameBackends(t *testing.T, n *scenario.Node, states map[string]string) bool {
	services, err := n.API().Services(t.Context())
	if err != nil {
		return false
	}
	found := 0
	for _, s := range services {
		for _, f := range s.Frontends {
			if f.Port != TCPPort {
				continue
			}
			for _, b := range f.Backends {
				if states[b.Address] != b.State {
					return false
				}
				found++
			}
		}
	}
	return found == len(states)
}
