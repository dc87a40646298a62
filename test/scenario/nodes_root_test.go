// SPDX-License-Identifier: Apache-2.0

//go:build root

package scenario

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/test/netns"
)

// tricklers are pods on two nodes: a client on the first, and on the second a
// server behind a service that says ten lines a second, its client's address, and
// listens to nothing.
func tricklers(t *testing.T) []*Node {
	t.Helper()
	return tricklersOn(t, NewNodes(t, 2))
}

func tricklersOn(t *testing.T, nodes []*Node, flags ...string) []*Node {
	t.Helper()
	for _, n := range nodes {
		n.Flags = flags
		n.Write("service.yaml", `
apiVersion: v1
kind: Service
metadata: {name: lines, namespace: default}
spec: {clusterIPs: [10.96.0.10, "fd00:10:96::10"], ipFamilyPolicy: RequireDualStack, ports: [{port: 80, targetPort: 8080}]}
`)
		n.Up()
	}
	nodes[0].AddPod("client")
	server := nodes[1].AddPod("server")
	netns.TCP(t, server.NS, "[::]:8080", func(c net.Conn) {
		for {
			if _, err := fmt.Fprintln(c, c.RemoteAddr().(*net.TCPAddr).IP); err != nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
	})
	slices := ""
	for family, ip := range map[string]string{"IPv4": server.IP.String(), "IPv6": server.IP6.String()} {
		slices += fmt.Sprintf("---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: lines-%s, namespace: default, labels: {kubernetes.io/service-name: lines}}\naddressType: %s\nports: [{port: 8080}]\nendpoints: [{addresses: [%q], nodeName: %s}]\n",
			family[2:], family, ip, nodes[1].NodeName)
	}
	for _, n := range nodes {
		n.Write("slices.yaml", slices)
	}
	return nodes
}

// addresses are the service's.
var addresses = []string{"10.96.0.10:80", "[fd00:10:96::10]:80"}

// listen opens connections to the service and has every line read that arrives.
// What it returns tells whether the lines go on.
func listen(t *testing.T, n *Node) (heard func() error) {
	t.Helper()
	var all []net.Conn
	// Many, as it may depend on who of both ends sends first.
	for i := range 16 {
		var c net.Conn
		address := addresses[i%2]
		netns.Eventually(t, 10*time.Second, address+" answers", func() bool {
			var err error
			c, err = n.Pod("client").Dial("tcp", address)
			return err == nil
		})
		t.Cleanup(func() { c.Close() })
		all = append(all, c)
	}
	return func() error {
		results := make(chan error)
		for _, c := range all {
			go func() {
				lines := bufio.NewReader(c)
				// What came in the meantime is read as well: some has to be sent from now on.
				for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
					c.SetReadDeadline(time.Now().Add(5 * time.Second))
					if _, err := lines.ReadString('\n'); err != nil {
						results <- fmt.Errorf("the connection to %s: %w", c.RemoteAddr(), err)
						return
					}
				}
				results <- nil
			}()
		}
		var errs []error
		for range all {
			errs = append(errs, <-results)
		}
		return errors.Join(errs...)
	}
}

// newConnections tells whether the service is reached, and by the client's own
// address.
func newConnections(n *Node) error {
	client := n.Pod("client")
	for _, address := range addresses {
		c, err := client.Dial("tcp", address)
		if err != nil {
			return err
		}
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		line, err := bufio.NewReader(c).ReadString('\n')
		c.Close()
		if err != nil {
			return fmt.Errorf("a new connection to %s: %w", address, err)
		}
		source, err := netip.ParseAddr(strings.TrimSpace(line))
		if err != nil || source.Unmap() != client.IP && source != client.IP6 {
			return fmt.Errorf("a new connection to %s comes from %q (%v)", address, line, err)
		}
	}
	return nil
}

func TestConnectionsBetweenNodesOutliveRestarts(t *testing.T) {
	nodes := tricklers(t)
	heard := listen(t, nodes[0])
	for _, n := range nodes {
		n.Crash()
		n.Up()
		if err := errors.Join(heard(), newConnections(nodes[0])); err != nil {
			t.Errorf("%s was restarted: %v", n.NodeName, err)
		}
	}
}

// A daemon that starts knows the other nodes late. Until then it must not take
// their pods for the world, from which its own are hidden.
func TestConnectionsBetweenNodesOutliveARestartWithoutTheAPI(t *testing.T) {
	nodes := tricklers(t)
	heard := listen(t, nodes[0])
	unreachable := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(unreachable, []byte(`apiVersion: v1
kind: Config
clusters: [{name: gone, cluster: {server: "http://127.0.0.1:1"}}]
contexts: [{name: gone, context: {cluster: gone, user: nobody}}]
users: [{name: nobody, user: {}}]
current-context: gone
`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		n.Crash()
		n.Flags, n.Manifests = []string{"--kubeconfig", unreachable}, ""
		n.Launch()
		netns.Eventually(t, startLimit(), n.NodeName+" serves", func() bool {
			status, err := n.API().Status(t.Context())
			return err == nil && status.Mode == "kubernetes"
		})
		if err := errors.Join(heard(), newConnections(nodes[0])); err != nil {
			t.Errorf("%s was restarted: %v", n.NodeName, err)
		}
	}
}
