// SPDX-License-Identifier: Apache-2.0

//go:build root

package scenario

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/test/netns"
)

// code is what a URL answers; 0: nothing.
func code(n *netns.NS, url string) int {
	client := n.HTTPClient()
	client.Timeout = 3 * time.Second
	r, err := client.Get(url)
	if err != nil {
		return 0
	}
	r.Body.Close()
	return r.StatusCode
}

func TestLoadBalancersAskTheNodeAndItsServices(t *testing.T) {
	n := NewNode(t)
	n.Write("web.yaml", podManifest("echo-1")+`
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  type: LoadBalancer
  clusterIPs: [10.96.0.20, "fd00:10:96::20"]
  ipFamilyPolicy: RequireDualStack
  externalTrafficPolicy: Local
  healthCheckNodePort: 30999
  selector: {app: echo}
  ports: [{port: 80, targetPort: 8080, nodePort: 30080}]
`)
	n.Up()
	n.AddPod("client")
	ask := func(what string, want int, places []string, port int, path string) {
		t.Helper()
		for _, place := range places {
			for _, address := range []string{n.IP.String(), n.IP6.String()} {
				url := "http://" + net.JoinHostPort(address, fmt.Sprint(port)) + path
				netns.Eventually(t, 5*time.Second, fmt.Sprintf("%s: %s from %s answers %d", what, url, place, want), func() bool {
					return code(n.Place(place), url) == want
				})
			}
		}
	}
	everywhere := []string{"outside", "node", "client"}
	ask("no endpoint", http.StatusServiceUnavailable, everywhere, 30999, "/")
	ask("no endpoint", http.StatusOK, everywhere, 10256, "/healthz")
	ask("no endpoint", http.StatusOK, everywhere, 10256, "/livez")
	n.AddPod("echo-1")
	ask("an endpoint", http.StatusOK, everywhere, 30999, "/")
	n.DeletePod("echo-1")
	ask("the endpoint is gone", http.StatusServiceUnavailable, everywhere, 30999, "/")

	n.Write("node.yaml", "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]}\n")
	ask("the node is to go", http.StatusServiceUnavailable, everywhere, 10256, "/healthz")
	ask("the node is to go", http.StatusOK, everywhere, 10256, "/livez")

	// The answers come from the address that was asked, and only from those chosen.
	if err := n.Down(); err != nil {
		t.Error(err)
	}
	n.Addr(t, netns.Uplink, "192.0.2.61/24")
	n.Flags = []string{"--node-port-addresses", "192.0.2.61/32"}
	n.Up()
	n.AddPod("echo-1")
	netns.HTTPEcho(t, n.Pod("echo-1").NS, "[::]:8080", "echo-1")
	for url, want := range map[string]int{
		"http://192.0.2.61:30999/": 200, "http://" + n.IP.String() + ":30999/": 0,
		"http://192.0.2.61:30080/": 200, "http://" + n.IP.String() + ":30080/": 0,
	} {
		netns.Eventually(t, 5*time.Second, fmt.Sprintf("%s answers %d", url, want), func() bool { return code(n.Pod("client").NS, url) == want })
	}

	// Somebody else has the port of another service.
	l, err := n.Listen("tcp", "192.0.2.61:30998")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	n.Write("other.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: other, namespace: default}\nspec: {type: LoadBalancer, clusterIP: 10.96.0.21, externalTrafficPolicy: Local, healthCheckNodePort: 30998, ports: [{port: 80}]}\n")
	netns.Eventually(t, 5*time.Second, "the port that is taken is in the status", func() bool {
		status, err := n.Mooring("status")
		return err == nil && strings.Contains(status, "Service default/other: spec.healthCheckNodePort: 30998 is not answered: another process of the node has it")
	})
}
