// SPDX-License-Identifier: Apache-2.0

//go:build root

package kubernetes

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/test/containerd"
	"github.com/mooring-cni/mooring/test/netns"
)

// nobodys is a slice without a service. It is there from the beginning: for a
// minute its service may yet come, and nothing is said.
const nobodys = `---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: nobodys, labels: {kubernetes.io/service-name: nobody}}
addressType: IPv4
ports: [{port: 80}]
endpoints: [{addresses: [10.244.0.250]}]
`

// The tests have a cluster each, and wait more than they compute: two at once
// take two processors.
func TestMain(m *testing.M) {
	netns.OnInterrupt()
	os.Exit(m.Run())
}

const portmap = `{"type": "portmap", "capabilities": {"portMappings": true}}`

// The rights of the daemons are those that users install.
func rights(t *testing.T) string {
	t.Helper()
	root, err := containerd.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := os.ReadFile(filepath.Join(root, "conf", "kubernetes", "mooring.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var kept []string
	for document := range strings.SplitSeq(string(manifest), "\n---\n") {
		if strings.Contains(document, "kind: ClusterRole") || strings.Contains(document, "kind: ServiceAccount") {
			kept = append(kept, document)
		}
	}
	return strings.Join(kept, "\n---\n")
}

// Ready says that the node's kubelet reports it so, and what it says else.
func (c *Cluster) ready(n *Node) (bool, string) {
	out, err := c.Try("get", "node", n.NodeName, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status} {.status.conditions[?(@.type=="Ready")].message}`)
	return err == nil && strings.HasPrefix(out, "True "), out
}

// exec runs the app's command in a pod.
func (c *Cluster) exec(pod string, args ...string) (string, error) {
	return c.Try(append([]string{"exec", pod, "--", "/app"}, args...)...)
}

// reaches waits until a pod gets answers from a URL.
func (c *Cluster) reaches(t *testing.T, pod, url string) {
	t.Helper()
	var err error
	for end := time.Now().Add(5 * time.Minute); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if _, err = c.exec(pod, "get", url); err == nil {
			return
		}
	}
	t.Errorf("%s does not reach %s: %v", pod, url, err)
}

// app is a pod's specification: the app with arguments.
func app(node string, args ...string) string {
	place := ""
	if node != "" {
		place = "nodeName: " + node + ", "
	}
	return fmt.Sprintf(`{%sterminationGracePeriodSeconds: 90, containers: [{name: app, image: %q, imagePullPolicy: Never, args: [%s], readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1, timeoutSeconds: 10}}]}`,
		place, containerd.AppImage, strings.Join(args, ", "))
}

func deployment(name string, replicas int, version string) string {
	spec := app("", "serve", "-grace", "10s")
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s}
spec:
  replicas: %[2]d
  selector: {matchLabels: {app: %[1]s}}
  strategy: {rollingUpdate: {maxUnavailable: 0, maxSurge: 1}}
  template:
    metadata: {labels: {app: %[1]s}, annotations: {version: %[3]q}}
    spec: %[4]s
`, name, replicas, version, strings.TrimSuffix(spec, "}")+`, topologySpreadConstraints: [{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, labelSelector: {matchLabels: {app: `+name+`}}}]}`)
}

func TestKubernetes(t *testing.T) {
	t.Parallel()
	c := Start(t, 2)
	a, b := c.Nodes[0], c.Nodes[1]
	c.Apply(t, rights(t))

	t.Run("nodes are ready when their pods can get addresses, not before", func(t *testing.T) {
		for _, n := range c.Nodes {
			if ready, why := c.ready(n); ready {
				t.Errorf("%s without a CNI configuration: %s", n.NodeName, why)
			}
		}
		for _, n := range c.Nodes {
			n.StartMooring("metricsAddress: 127.0.0.1:9964\n")
			n.Runtime.Install(t, containerd.Conflist(n.Node, "1.0.0", portmap))
		}
		for _, n := range c.Nodes {
			c.Eventually(5*time.Minute, n.NodeName+" is ready", func() bool {
				ready, _ := c.ready(n)
				return ready
			})
		}
	})

	for _, n := range c.Nodes {
		c.Apply(t, "apiVersion: v1\nkind: Pod\nmetadata: {name: client-"+n.NodeName+"}\nspec: "+app(n.NodeName, "serve"))
	}
	c.Apply(t, deployment("web", 4, "1"))
	c.Apply(t, `
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: NodePort, clusterIP: 10.96.0.100, clusterIPs: [10.96.0.100, "fd00:10:96::100"], ipFamilyPolicy: RequireDualStack, externalIPs: [198.51.100.7],
  selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080, nodePort: 30080}, {name: udp, protocol: UDP, port: 53, targetPort: 8053}]}
---
apiVersion: v1
kind: Service
metadata: {name: balanced}
spec: {type: LoadBalancer, clusterIP: 10.96.0.101, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless}
spec: {clusterIP: None, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: elsewhere}
spec: {type: ExternalName, externalName: example.org}
`+nobodys)
	c.Kubectl(t, "patch", "service", "balanced", "--subresource=status", "-p", `{"status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.8"}]}}}`)
	c.Kubectl(t, "rollout", "status", "deployment/web", "--timeout=600s")
	c.Kubectl(t, "wait", "--for=condition=Ready", "pod/client-node-a", "pod/client-node-b", "--timeout=600s")
	clients := []string{"client-node-a", "client-node-b"}

	t.Run("pods reach pods of both nodes in both families", func(t *testing.T) {
		nodes := c.Kubectl(t, "get", "pods", "-l", "app=web", "-o", "jsonpath={.items[*].spec.nodeName}")
		if !strings.Contains(nodes, a.NodeName) || !strings.Contains(nodes, b.NodeName) {
			t.Fatalf("the pods are on %s", nodes)
		}
		addresses := strings.Fields(c.Kubectl(t, "get", "pods", "-l", "app=web", "-o", "jsonpath={.items[*].status.podIPs[*].ip}"))
		if len(addresses) != 8 {
			t.Errorf("four pods have the addresses %v", addresses)
		}
		for _, client := range clients {
			for _, address := range addresses {
				c.reaches(t, client, "http://"+net.JoinHostPort(address, "8080")+"/")
			}
		}
	})

	t.Run("pods reach services of every type", func(t *testing.T) {
		urls := []string{
			"http://10.96.0.100/", "http://[fd00:10:96::100]/", // ClusterIP
			"http://198.51.100.7/", // external address
			"http://198.51.100.8/", // load balancer's
		}
		for i, client := range clients {
			for _, url := range append(urls, fmt.Sprintf("http://%s:30080/", c.Nodes[i].IP)) { // NodePort
				c.reaches(t, client, url)
			}
			for _, address := range []string{"10.96.0.100:53", "[fd00:10:96::100]:53"} {
				var out string
				netns.Eventually(t, 5*time.Minute, client+" is answered from "+address, func() bool {
					var err error
					out, err = c.exec(client, "udp", address)
					return err == nil
				})
				if !strings.HasPrefix(out, "web-") {
					t.Errorf("%s asks %s: %q", client, address, out)
				}
			}
		}
		services, err := a.Daemon.Services(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range services {
			if s.Name == "headless" || s.Name == "elsewhere" {
				t.Errorf("%s has frontends: %+v", s.Name, s.Frontends)
			}
		}
	})

	t.Run("pods reach the API server by its service", func(t *testing.T) {
		for _, client := range clients {
			// A certificate that the app does not know is an answer.
			if _, err := c.exec(client, "get", "https://"+APIServerIP+"/"); err == nil || !strings.Contains(err.Error(), "certificate") {
				t.Errorf("%s: %v", client, err)
			}
		}
	})

	t.Run("a rolling update fails no request", func(t *testing.T) {
		loads := c.load(t, clients, "http://10.96.0.100/")
		c.Apply(t, deployment("web", 4, "2"))
		if out, err := c.Try("rollout", "status", "deployment/web", "--timeout=600s"); err != nil {
			t.Errorf("the update: %v %s", err, out)
		}
		loads.check(t)
		c.tellEvents(t)
	})

	t.Run("the daemons' rolling restart fails no request", func(t *testing.T) {
		loads := c.load(t, clients, "http://10.96.0.100/")
		for _, n := range c.Nodes {
			if err := n.Daemon.Stop(); err != nil {
				t.Errorf("%s: mooringd: %v", n.NodeName, err)
			}
			time.Sleep(2 * time.Second)
			n.Daemon.Launch()
		}
		time.Sleep(2 * time.Second)
		loads.check(t)
	})

	t.Run("connections to another node outlive either daemon's crash", func(t *testing.T) {
		held := c.inBackground(t, slices.Concat(clients, clients), "hold", "10.96.0.100:80")
		held = append(held, c.inBackground(t, slices.Concat(clients, clients), "hold", "[fd00:10:96::100]:80")...)
		for _, n := range c.Nodes {
			n.Daemon.Kill()
			time.Sleep(time.Second)
			n.Daemon.Launch()
		}
		time.Sleep(5 * time.Second) // the reaper has been round
		held.check(t)
	})

	t.Run("load balancers are told of the nodes and of a service's pods there", func(t *testing.T) {
		code := func(n *Node, port int) int {
			request, err := c.Outside.HTTPClient().Get(fmt.Sprintf("http://%s:%d/healthz", n.IP, port))
			if err != nil {
				return 0
			}
			request.Body.Close()
			return request.StatusCode
		}
		c.Apply(t, "apiVersion: v1\nkind: Service\nmetadata: {name: local}\nspec: {type: LoadBalancer, externalTrafficPolicy: Local, healthCheckNodePort: 30777, selector: {app: only-b}, ports: [{port: 80, targetPort: 8080}]}")
		c.Apply(t, "apiVersion: v1\nkind: Pod\nmetadata: {name: only-b, labels: {app: only-b}}\nspec: "+app(b.NodeName, "serve"))
		for _, n := range c.Nodes {
			c.Eventually(5*time.Minute, n.NodeName+" is healthy", func() bool { return code(n, 10256) == 200 })
		}
		c.Eventually(5*time.Minute, "the node with the pod is chosen, the other is not", func() bool { return code(b, 30777) == 200 && code(a, 30777) == 503 })
		c.Kubectl(t, "taint", "node", b.NodeName, "ToBeDeletedByClusterAutoscaler=:PreferNoSchedule")
		c.Eventually(5*time.Minute, "a node that is to go is told of", func() bool { return code(b, 10256) == 503 && code(a, 10256) == 200 })
		c.Kubectl(t, "taint", "node", b.NodeName, "ToBeDeletedByClusterAutoscaler-")
		c.Kubectl(t, "delete", "service/local", "pod/only-b", "--wait=false")
	})

	t.Run("what makes no sense is an Event and in the status, and the rest goes on", func(t *testing.T) {
		c.Apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: node-address}
spec: {externalIPs: [%[1]s], selector: {app: web}, ports: [{port: 8888, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: same-external}
spec: {externalIPs: [198.51.100.7], selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`, a.IP))
		for object, text := range map[string]string{
			"node-address": "is the address of node node-a itself",
			// The name comes first in the alphabet, and so is the service that has the address.
			"web":     "198.51.100.7:80/TCP is served for Service default/same-external",
			"nobodys": "names Service default/nobody",
		} {
			c.Eventually(5*time.Minute, "an Event tells: "+text, func() bool {
				out, err := c.Try("get", "events", "--field-selector", "involvedObject.name="+object, "-o", "jsonpath={.items[*].message}")
				return err == nil && strings.Contains(out, text)
			})
			// Whichever node sees it first says so.
			netns.Eventually(t, 5*time.Minute, a.NodeName+" has the problem in its status, and is healthy: "+text, func() bool {
				status, err := a.Daemon.Status(t.Context())
				return err == nil && strings.Contains(strings.Join(status.Problems, "\n"), text) && status.Healthy
			})
		}
		c.reaches(t, "client-node-b", "http://10.96.0.100/")
		c.Kubectl(t, "delete", "service/node-address", "service/same-external", "endpointslice/nobodys")
	})

	t.Run("services go on while the API server is gone, and follow it when it is back", func(t *testing.T) {
		c.loadWhile(t, "client-node-a", "http://10.96.0.100/", func() {
			c.StopAPIServer()
			for _, n := range c.Nodes {
				netns.Eventually(t, 5*time.Minute, n.NodeName+" says that the API server is gone", func() bool {
					status, err := n.Daemon.Status(t.Context())
					return err == nil && len(status.Problems) > 0
				})
			}
			time.Sleep(10 * time.Second)
			c.StartAPIServer()
		})
		c.Kubectl(t, "scale", "deployment/web", "--replicas=6")
		c.Kubectl(t, "rollout", "status", "deployment/web", "--timeout=600s")
		for _, n := range c.Nodes {
			netns.Eventually(t, 5*time.Minute, n.NodeName+" knows all six backends", func() bool {
				return n.backends(t, "web", "10.96.0.100", 80) == 6
			})
		}
	})

	t.Run("a kubelet's restart ends no pod", func(t *testing.T) {
		before := c.Kubectl(t, "get", "pods", "-o", "jsonpath={.items[*].status.containerStatuses[*].restartCount}")
		loads := c.load(t, []string{"client-node-b"}, "http://10.96.0.100/")
		if err := a.StopKubelet(); err != nil {
			t.Logf("kubelet: %v", err)
		}
		a.StartKubelet()
		c.Eventually(5*time.Minute, "the node is ready again", func() bool {
			ready, _ := c.ready(a)
			return ready
		})
		loads.check(t)
		if after := c.Kubectl(t, "get", "pods", "-o", "jsonpath={.items[*].status.containerStatuses[*].restartCount}"); after != before {
			t.Errorf("restarts before %s, after %s", before, after)
		}
	})

	t.Run("a static pod gets addresses", func(t *testing.T) {
		manifest := "apiVersion: v1\nkind: Pod\nmetadata: {name: static, namespace: default}\nspec: " + app("", "serve")
		path := a.path("manifests", "static.yaml")
		if err := os.WriteFile(path, []byte(manifest), 0o644); err != nil {
			t.Fatal(err)
		}
		var address string
		c.Eventually(5*time.Minute, "the static pod is known", func() bool {
			out, err := c.Try("get", "pod", "static-node-a", "-o", "jsonpath={.status.podIP}")
			address = out
			return err == nil && out != ""
		})
		c.reaches(t, "client-node-b", "http://"+address+":8080/")
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("a drained node's pods move without a failed request", func(t *testing.T) {
		c.Apply(t, "apiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: web}\nspec: {minAvailable: 4, selector: {matchLabels: {app: web}}}")
		loads := c.load(t, []string{"client-node-a"}, "http://10.96.0.100/")
		c.Kubectl(t, "drain", b.NodeName, "--force", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=600s")
		c.Kubectl(t, "rollout", "status", "deployment/web", "--timeout=600s")
		loads.check(t)
		nodes := c.Kubectl(t, "get", "pods", "-l", "app=web", "-o", "jsonpath={.items[?(@.status.phase=='Running')].spec.nodeName}")
		if strings.Contains(nodes, b.NodeName) {
			t.Errorf("pods are left on the drained node: %s", nodes)
		}
	})

	t.Run("nothing is left of pods that are gone", func(t *testing.T) {
		c.Kubectl(t, "delete", "deployment/web", "pod/client-node-a", "--timeout=600s")
		for _, n := range c.Nodes {
			netns.Eventually(t, 5*time.Minute, n.NodeName+" has no endpoint, no interface and no connection of pods", func() bool {
				endpoints, err := n.Daemon.Endpoints(t.Context())
				if err != nil || len(endpoints) > 0 {
					return false
				}
				links, err := n.Netlink().LinkList()
				if err != nil {
					return false
				}
				for _, link := range links {
					if strings.HasPrefix(link.Attrs().Name, "lxc") {
						return false
					}
				}
				stats, err := n.Daemon.ConntrackStats(t.Context())
				return err == nil && stats.Entries == 0
			})
		}
	})

	t.Run("the same by tunnels", func(t *testing.T) {
		for _, n := range c.Nodes {
			if err := n.Daemon.Stop(); err != nil {
				t.Errorf("%s: mooringd: %v", n.NodeName, err)
			}
			n.StartMooring("metricsAddress: 127.0.0.1:9964\nrouting: {mode: vxlan}\n")
		}
		for i, n := range c.Nodes {
			c.Apply(t, fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: tunnel-%d, labels: {app: web}}\nspec: %s", i, app(n.NodeName, "serve")))
		}
		c.Kubectl(t, "wait", "--for=condition=Ready", "pod/tunnel-0", "pod/tunnel-1", "--timeout=600s")
		for i, n := range c.Nodes {
			for address := range strings.FieldsSeq(c.Kubectl(t, "get", "pod", fmt.Sprintf("tunnel-%d", 1-i), "-o", "jsonpath={.status.podIPs[*].ip}")) {
				c.reaches(t, fmt.Sprintf("tunnel-%d", i), "http://"+net.JoinHostPort(address, "8080")+"/")
				if routes := n.Sh(t, "ip route get "+address); !strings.Contains(routes, "dev mooring_vxlan") {
					t.Errorf("the route on %s: %s", n.NodeName, routes)
				}
			}
			c.reaches(t, fmt.Sprintf("tunnel-%d", i), "http://10.96.0.100/")
			c.reaches(t, fmt.Sprintf("tunnel-%d", i), "http://[fd00:10:96::100]/")
		}
	})
}

// backends counts those of a frontend as a node's daemon has them.
func (n *Node) backends(t *testing.T, service, address string, port uint16) (count int) {
	services, err := n.Daemon.Services(t.Context())
	if err != nil {
		return -1
	}
	for _, s := range services {
		for _, f := range s.Frontends {
			if s.Name == service && f.Address == address && f.Port == port {
				for _, b := range f.Backends {
					if b.State == "active" {
						count++
					}
				}
			}
		}
	}
	return count
}

// job is a command of the app that runs in a pod until it is told to end.
type job struct {
	end  func() error
	done chan error
}

type jobs []job

// inBackground starts a command in each of the pods, and waits until each has begun.
func (c *Cluster) inBackground(t *testing.T, pods []string, args ...string) (all jobs) {
	t.Helper()
	for _, pod := range pods {
		until := c.newFile()
		command := c.kubectlCommand("exec", pod, "--", "/app", args[0], "-until", until)
		command.Args = append(command.Args, args[1:]...)
		all = append(all, c.background(t, command, func() error {
			_, err := c.exec(pod, "touch", until)
			return err
		}))
	}
	return all
}

// newFile is the name of a file that is in no pod yet.
func (c *Cluster) newFile() string {
	c.files++
	return fmt.Sprintf("/tmp/%d", c.files)
}

// background starts a command that says when it has begun.
func (c *Cluster) background(t *testing.T, command *netns.Cmd, end func() error) job {
	t.Helper()
	j := job{end: end, done: make(chan error, 1)}
	var out bytes.Buffer
	begun := make(chan struct{})
	reader, writer := io.Pipe()
	command.Stdout, command.Stderr = writer, writer
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for lines := bufio.NewScanner(reader); lines.Scan(); {
			if lines.Text() == "begun" {
				close(begun)
				continue
			}
			fmt.Fprintln(&out, lines.Text())
		}
	}()
	go func() {
		err := command.Wait()
		writer.Close()
		<-read
		if err != nil {
			err = fmt.Errorf("%s: %w\n%s", strings.Join(command.Args, " "), err, &out)
		}
		j.done <- err
	}()
	select {
	case <-begun:
	case err := <-j.done:
		t.Fatalf("ended before it began: %v", err)
	case <-time.After(5 * time.Minute):
		t.Fatalf("%s has not begun", strings.Join(command.Args, " "))
	}
	return j
}

// load makes requests one after another from pods.
func (c *Cluster) load(t *testing.T, pods []string, url string) jobs {
	t.Helper()
	return c.inBackground(t, pods, "load", url)
}

// check ends the jobs and fails the test for each that failed.
func (j jobs) check(t *testing.T) {
	t.Helper()
	for _, job := range j {
		if err := job.end(); err != nil {
			t.Error(err)
		}
	}
	for _, job := range j {
		if err := <-job.done; err != nil {
			t.Error(err)
		}
	}
}

// tellEvents adds to a failed test when its pods came and went.
func (c *Cluster) tellEvents(t *testing.T) {
	t.Helper()
	if !t.Failed() {
		return
	}
	out, err := c.Try("get", "events", "-o", `jsonpath={range .items[*]}{.lastTimestamp} {.eventTime} {.involvedObject.name} {.reason}: {.message}{"\n"}{end}`)
	t.Logf("events (%v):\n%s", err, out)
}

// loadWhile makes requests from a pod of the first node while f runs. The
// command goes through the node's runtime: kubectl would end with the API server.
func (c *Cluster) loadWhile(t *testing.T, pod, url string, f func()) {
	t.Helper()
	n := c.Nodes[0]
	container := strings.TrimPrefix(c.Kubectl(t, "get", "pod", pod, "-o", "jsonpath={.status.containerStatuses[0].containerID}"), "containerd://")
	until := c.newFile()
	done := make(chan error, 1)
	go func() {
		out, err := n.Runtime.Exec(container, "/app", "load", "-until", until, url)
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, out)
		}
		done <- err
	}()
	f()
	if _, err := n.Runtime.Exec(container, "/app", "touch", until); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}
