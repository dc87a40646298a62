// SPDX-License-Identifier: Apache-2.0

//go:build root

package main

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/mooring-cni/mooring/conf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/daemon/node"
)

// The daemon with all its parts but the datapath, in a network namespace of its
// own: the test starts its binary once more there.
func TestDaemonServesStopsAndAdopts(t *testing.T) {
	if os.Getenv("MOORING_TEST_NETNS") == "" {
		command := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
		command.Env = append(os.Environ(), "MOORING_TEST_NETNS=1")
		command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if out, err := command.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	sh := func(line string) {
		t.Helper()
		if out, err := exec.Command("sh", "-ec", line).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
	}
	sh("ip link set lo up; ip link add lxca type veth peer name peer0; ip link add lxcb type veth peer name peer1")
	link, err := netlink.LinkByName("lxca")
	if err != nil {
		t.Fatal(err)
	}
	directory := t.TempDir()
	config := conf.Default()
	config.NodeName, config.Manifests = "node-a", filepath.Join(directory, "manifests")
	config.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24"), netip.MustParsePrefix("fd00:10:244::/64")}
	config.Socket, config.StateDir = filepath.Join(directory, "mooring.sock"), filepath.Join(directory, "state")
	config.MetricsAddress = "127.0.0.1:0"
	if err := os.Mkdir(config.Manifests, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(config.Manifests, "web.yaml"), []byte(`
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {clusterIP: 10.96.0.10, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: default, labels: {app: web}}
`), 0o644); err != nil {
		t.Fatal(err)
	}
	start := func(k *fakeKernel) (stop func() error) {
		t.Helper()
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() {
			done <- run(ctx, config, slog.New(slog.DiscardHandler), func(conf.Config, []node.Uplink, *slog.Logger) (kernelSide, error) { return k, nil })
		}()
		client := api.NewClient(config.Socket)
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			if s, err := client.Status(context.Background()); err == nil && s.Services == 1 && s.Healthy {
				break
			} else if time.Now().After(end) {
				cancel()
				t.Fatalf("the daemon is not well: %+v, %v; run: %v", s, err, <-done)
			}
		}
		return func() error { cancel(); return <-done }
	}
	k := newFakeKernel()
	stop := start(k)
	client := api.NewClient(config.Socket)
	e := pod(7, "web-1")
	e.Interface, e.Ifindex = "lxca", link.Attrs().Index
	added, err := client.AddEndpoint(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "services", k.names(), map[string]string{"default/web": "10.96.0.10:80/TCP -> 10.244.0.7:8080/TCP"})
	if n, err := conf.ReadNode(config.Socket); err != nil || !n.Ready || n.Name != "node-a" {
		t.Errorf("node file: %+v, %v", n, err)
	}
	second := config
	second.StateDir, second.BPFFS = filepath.Join(directory, "other"), "/other"
	if err := run(t.Context(), second, slog.New(slog.DiscardHandler), nil); err == nil || !strings.Contains(err.Error(), "another daemon answers on") {
		t.Errorf("a second daemon on the socket: %v", err)
	}
	// The pod's interface vanishes without a DEL.
	other, err := netlink.LinkByName("lxcb")
	if err != nil {
		t.Fatal(err)
	}
	f := pod(8, "web-2")
	f.Interface, f.Ifindex = "lxcb", other.Attrs().Index
	if _, err := client.AddEndpoint(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	sh("ip link del lxcb")
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if list, _ := client.Endpoints(t.Context()); len(list) == 1 {
			break
		}
	}
	if list, err := client.Endpoints(t.Context()); err != nil || len(list) != 1 || list[0].ID != added.ID {
		t.Errorf("endpoints after lxcb's end: %+v, %v", list, err)
	}

	began := time.Now()
	if err := stop(); err != nil {
		t.Errorf("the daemon's end: %v", err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("stopping took %v", took)
	}
	if n, err := conf.ReadNode(config.Socket); err != nil || n.Ready || n.Reason == "" || n.StateDir != config.StateDir {
		t.Errorf("node file after the end: %+v, %v", n, err)
	}
	if !k.closed || len(k.endpoints) != 1 {
		t.Errorf("datapath closed %v, with endpoints %v: they must stay", k.closed, k.endpoints)
	}
	if _, err := os.Stat(config.Socket); err == nil {
		t.Error("the socket is still there")
	}
	if _, err := client.Node(t.Context()); !api.IsNotRunning(err) {
		t.Errorf("client after the end: %v", err)
	}

	k = newFakeKernel()
	stop = start(k)
	if got := k.endpoints[added.ID]; got.ContainerID != "c7" {
		t.Errorf("adopted endpoints: %+v", k.endpoints)
	}
	equal(t, "interfaces adopted", k.adopted, []string{"lxca"})
	if again, err := client.AddEndpoint(t.Context(), e); err != nil || again.ID != added.ID {
		t.Errorf("the same ADD after a restart: %+v, %v", again, err)
	}
	equal(t, "services", k.names(), map[string]string{"default/web": "10.96.0.10:80/TCP -> 10.244.0.7:8080/TCP"})
	if err := stop(); err != nil {
		t.Error(err)
	}
}
