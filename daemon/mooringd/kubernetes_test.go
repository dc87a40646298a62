// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/node"
	"github.com/mooring-cni/mooring/daemon/service"
)

// cluster is an API server that lists what it is given and tells no change.
type cluster struct {
	podCIDRs atomic.Pointer[string]
	server   *httptest.Server
}

func newCluster(t *testing.T) *cluster {
	c := &cluster{}
	c.podCIDRs.Store(new(string))
	c.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		resource := filepath.Base(r.URL.Path)
		kind := map[string]string{"services": "Service", "endpointslices": "EndpointSlice", "pods": "Pod", "nodes": "Node"}[resource]
		version := "v1"
		if resource == "endpointslices" {
			version = "discovery.k8s.io/v1"
		}
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Query().Get("watch") != "" {
			if r.URL.Query().Get("sendInitialEvents") != "" {
				w.WriteHeader(http.StatusUnprocessableEntity)
				fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Invalid","code":422}`)
				return
			}
			// A watch that ends soon, at a version that is expired: listed anew.
			w.WriteHeader(http.StatusOK)
			time.Sleep(50 * time.Millisecond)
			fmt.Fprint(w, `{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Expired","code":410}}`)
			return
		}
		items := map[string]string{
			"services": `{"metadata":{"name":"web","namespace":"default"},"spec":{"clusterIP":"10.96.0.10","externalIPs":["127.0.0.1"],"ports":[{"port":80}]}}`,
			"nodes":    fmt.Sprintf(`{"metadata":{"name":"node-a"},"spec":{%s}}`, *c.podCIDRs.Load()),
		}[resource]
		fmt.Fprintf(w, `{"kind":"%sList","apiVersion":%q,"metadata":{"resourceVersion":"1"},"items":[%s]}`, kind, version, items)
	}))
	t.Cleanup(c.server.Close)
	return c
}

// assembleInCluster makes a daemon without its machine that asks the cluster.
func assembleInCluster(t *testing.T, k *fakeKernel, c *cluster) *daemon {
	t.Helper()
	d := assemble(t, k)
	d.config.Manifests, d.config.PodCIDRs = "", nil
	d.config.Policy = "never"
	d.config.Kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	kubeconfig := fmt.Sprintf("clusters: [{name: c, cluster: {server: %q}}]\ncontexts: [{name: c, context: {cluster: c}}]\ncurrent-context: c\n", c.server.URL)
	if err := os.WriteFile(d.config.Kubeconfig, []byte(kubeconfig), 0o600); err != nil {
		t.Fatal(err)
	}
	objects, kubernetes, err := openSource(d.config, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	d.cluster = kubernetes
	d.machine = &node.Manager{}
	d.services.table = service.NewTable(nodeContext(d.config, nil))
	d.services.cluster, d.services.setNodes = kubernetes, d.nodesChanged
	p := newParts(slog.New(slog.DiscardHandler))
	p.start("source", func(ctx context.Context) error { return objects.Run(ctx, d.services.apply) })
	t.Cleanup(p.stop)
	return d
}

func awaits(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 30 s", what)
		}
	}
}

func TestTheNodeIsReadyWhenTheClusterHasGivenItPodRanges(t *testing.T) {
	t.Parallel()
	k, c := newFakeKernel(), newCluster(t)
	d := assembleInCluster(t, k, c)
	if n := d.Node(); n.Ready || n.Reason == "" {
		t.Errorf("before anything is known: %+v", n)
	}
	awaits(t, "a Node without ranges", func() bool { return strings.Contains(d.Node().Reason, "Node node-a has no podCIDRs") })
	serious, _ := d.problems()
	if !strings.Contains(strings.Join(serious, "\n"), "--allocate-node-cidrs") {
		t.Errorf("problems %q do not say what helps", serious)
	}
	ranges := `"podCIDRs":["10.244.3.0/24","fd00:10:244:3::/64"]`
	c.podCIDRs.Store(&ranges)
	awaits(t, "ranges", func() bool { return d.Node().Ready })
	if err := d.writeNodeFile(); err != nil {
		t.Fatal(err)
	}
	file, err := conf.ReadNode(d.config.Socket)
	if err != nil || !file.Ready || fmt.Sprint(file.PodCIDRs) != "[10.244.3.0/24 fd00:10:244:3::/64]" {
		t.Errorf("the node file: %+v, %v", file, err)
	}
	equal(t, "datapath", k.names(), map[string]string{"default/web": "10.96.0.10:80/TCP ->"})
	s, err := d.Status()
	if err != nil || s.Mode != "kubernetes" || !s.Healthy {
		t.Errorf("status %+v, %v", s, err)
	}
}

func TestAnAPIServerThatIsGoneIsInTheStatus(t *testing.T) {
	t.Parallel()
	k, c := newFakeKernel(), newCluster(t)
	ranges := `"podCIDRs":["10.244.3.0/24"]`
	c.podCIDRs.Store(&ranges)
	d := assembleInCluster(t, k, c)
	awaits(t, "ready", func() bool { return d.Node().Ready })
	c.server.CloseClientConnections()
	c.server.Close()
	awaits(t, "a problem", func() bool {
		_, minor := d.problems()
		return strings.Contains(strings.Join(minor, "\n"), "Kubernetes API: services: no news since")
	})
	if n := d.Node(); !n.Ready {
		t.Errorf("pods are refused for an API server that is gone: %+v", n)
	}
	equal(t, "datapath", k.names(), map[string]string{"default/web": "10.96.0.10:80/TCP ->"})
}

func TestPodRangesOfAnEarlierRunAreUsedUntilTheAPIAnswers(t *testing.T) {
	t.Parallel()
	d := assemble(t, newFakeKernel())
	d.config.PodCIDRs = nil
	d.remembered = true
	d.machine = &node.Manager{}
	if d.Node().Ready {
		t.Error("ready without pod ranges")
	}
	d.machine.SetPodCIDRs(assemble(t, newFakeKernel()).config.PodCIDRs)
	if n := d.Node(); !n.Ready {
		t.Errorf("not ready: %s", n.Reason)
	}
}
