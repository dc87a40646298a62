// SPDX-License-Identifier: Apache-2.0

//go:build root

package kubernetes

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/daemon/api"
	"github.com/mooring-cni/mooring/test/netns"
)

// promised is the size at which the project promises how long a change takes.
const promised = 5000

var scaleServices = flag.Int("services", 200, "services in TestScaleAgainstTheAPIServer, of ten endpoints each")

// client makes requests to the API server as the cluster's administrator.
func (c *Cluster) client(t *testing.T) *http.Client {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(c.authority.path("admin.crt"), c.authority.path("admin.key"))
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(c.authority.path("ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DialContext: c.Outside.DialContext, MaxIdleConnsPerHost: 16,
		TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool},
	}}
}

func send(client *http.Client, method, path string, body any) error {
	content, err := json.Marshal(body)
	if err != nil {
		return err
	}
	request, err := http.NewRequest(method, server+path, bytes.NewReader(content))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	said, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, answer.Status, said)
	}
	return err
}

type object map[string]any

const perService = 10

func serviceAddress(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 96, byte(1 + i/250), byte(1 + i%250)})
}

func endpointAddress(service, endpoint int) netip.Addr {
	n := service*perService + endpoint
	return netip.AddrFrom4([4]byte{10, byte(128 + n/62500), byte(n / 250 % 250), byte(1 + n%250)})
}

func scaleService(i int) object {
	return object{"apiVersion": "v1", "kind": "Service", "metadata": object{"name": fmt.Sprintf("s%d", i)},
		"spec": object{"clusterIP": serviceAddress(i).String(), "ports": []object{{"name": "http", "port": 80}}}}
}

// scaleSlice has one endpoint that tells which change of it this is.
func scaleSlice(i int, changing netip.Addr) object {
	var endpoints []object
	for e := range perService {
		address := endpointAddress(i, e)
		if e == 0 && changing.IsValid() {
			address = changing
		}
		endpoints = append(endpoints, object{"addresses": []string{address.String()}, "nodeName": fmt.Sprintf("node-%d", e), "conditions": object{"ready": true, "serving": true, "terminating": false}})
	}
	return object{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
		"metadata":  object{"name": fmt.Sprintf("s%d-x", i), "labels": object{"kubernetes.io/service-name": fmt.Sprintf("s%d", i)}},
		"endpoints": endpoints, "ports": []object{{"name": "http", "port": 8080, "protocol": "TCP"}}}
}

// kernelMaps are what packets find.
type kernelMaps struct{ services, slots, backends *ebpf.Map }

func openMaps(t *testing.T, bpffs string) (m kernelMaps) {
	t.Helper()
	for name, to := range map[string]**ebpf.Map{"mooring_services": &m.services, "mooring_slots": &m.slots, "mooring_backends": &m.backends} {
		found, err := filepath.Glob(filepath.Join(bpffs, "v*", "maps", name))
		if err != nil || len(found) != 1 {
			t.Fatalf("%s: %v, %v", name, found, err)
		}
		if *to, err = ebpf.LoadPinnedMap(found[0], nil); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { (*to).Close() })
	}
	return m
}

// of gives the backends that a packet to a service's address may get.
func (m kernelMaps) of(service netip.Addr) (found []netip.Addr) {
	key := bpf.ServiceKey{Addr: bpf.ToAddr(service), Port: bpf.Port(80), Proto: 6}
	var value bpf.Service
	if m.services.Lookup(&key, &value) != nil {
		return nil
	}
	for i := range value.Internal.Count {
		at := value.Internal.First + i
		var index uint32
		var backend bpf.Backend
		if m.slots.Lookup(&at, &index) == nil && m.backends.Lookup(&index, &backend) == nil {
			found = append(found, backend.Addr.IP())
		}
	}
	return found
}

// usage is what a process has used: CPU time and resident memory.
func usage(t *testing.T, pid int) (cpu time.Duration, resident int) {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			resident, _ = strconv.Atoi(strings.Fields(rest)[0])
		}
	}
	return time.Duration(user+system) * 10 * time.Millisecond, resident / 1024
}

func TestScaleAgainstTheAPIServer(t *testing.T) {
	t.Parallel()
	count := *scaleServices
	c := Start(t, 0)
	c.Apply(t, rights(t))
	n := c.Outside.Node(t)
	c.Apply(t, fmt.Sprintf("apiVersion: v1\nkind: Node\nmetadata: {name: %s}\nspec: {podCIDR: %[2]q, podCIDRs: [%[2]q, %[3]q]}\n", n.NodeName, n.PodCIDRs[0], n.PodCIDRs[1]))
	cgroup := netns.NewCgroup(t, n.NodeName)
	start := func() *netns.Process {
		return n.Command(c.Programs.Path("mooringd"), "--node-name", n.NodeName, "--kubeconfig", c.Kubeconfig("mooring"), "--cgroup", cgroup.Path,
			"--socket", n.Socket, "--bpffs", n.BPFFS, "--state-dir", n.StateDir, "--metrics-address", "127.0.0.1:9964").In(cgroup).Background(t)
	}
	metric := func(name string) (sum float64) {
		text, err := n.Get("http://127.0.0.1:9964/metrics")
		if err != nil {
			return -1
		}
		for line := range strings.Lines(text) {
			if strings.HasPrefix(line, name+" ") {
				sum, _ = strconv.ParseFloat(strings.Fields(line)[1], 64)
			}
		}
		return sum
	}
	daemon := start()
	client := api.NewClient(n.Socket)
	knows := func(services int) bool {
		status, err := client.Status(t.Context())
		return err == nil && status.Services >= services && status.Backends >= (services-1)*perService
	}
	netns.Eventually(t, 5*time.Minute, "mooringd knows the cluster", func() bool { return knows(1) })
	maps := openMaps(t, n.BPFFS)
	idle, _ := usage(t, daemon.Process.Pid)

	// All is written while the daemon watches.
	admin := c.client(t)
	began := time.Now()
	work := make(chan int)
	var failed sync.Map
	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			for i := range work {
				if err := send(admin, "POST", "/api/v1/namespaces/default/services", scaleService(i)); err != nil {
					failed.Store(i, err)
				}
				if err := send(admin, "POST", "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", scaleSlice(i, netip.Addr{})); err != nil {
					failed.Store(i, err)
				}
			}
		})
	}
	for i := range count {
		work <- i
	}
	close(work)
	wait.Wait()
	failed.Range(func(i, err any) bool { t.Errorf("service %v: %v", i, err); return true })
	if t.Failed() {
		return
	}
	written := time.Now()
	netns.Eventually(t, 5*time.Minute, "the last service is in the map", func() bool {
		return len(maps.of(serviceAddress(count-1))) == perService && knows(count+1)
	})
	busy, resident := usage(t, daemon.Process.Pid)
	t.Logf("%d services with %d endpoints: written in %v, all in the map %v after the last; mooringd used %v of CPU, %d MiB resident, %.1f MB received",
		count, count*perService, written.Sub(began).Round(time.Millisecond), time.Since(written).Round(time.Millisecond), busy-idle, resident, metric("mooring_api_received_bytes_total")/1e6)

	// One endpoint after another becomes another.
	const changes = 300
	var took []time.Duration
	for k := range changes {
		i := k * 7 % count
		address := netip.AddrFrom4([4]byte{10, 250, byte(k / 250), byte(1 + k%250)})
		if err := send(admin, "PUT", fmt.Sprintf("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/s%d-x", i), scaleSlice(i, address)); err != nil {
			t.Fatal(err)
		}
		answered := time.Now()
		for !slices.Contains(maps.of(serviceAddress(i)), address) {
			if time.Since(answered) > 30*time.Second {
				t.Fatalf("change %d is not in the map after 30 s", k)
			}
			time.Sleep(time.Millisecond)
		}
		took = append(took, time.Since(answered))
	}
	slices.Sort(took)
	after, resident := usage(t, daemon.Process.Pid)
	t.Logf("an endpoint's change, from the API's answer to the map: median %v, p99 %v, most %v; %v of CPU each; %d MiB resident",
		took[changes/2].Round(10*time.Microsecond), took[changes*99/100].Round(10*time.Microsecond), took[changes-1].Round(10*time.Microsecond), ((after - busy) / changes).Round(10*time.Microsecond), resident)
	if p99 := took[changes*99/100]; count >= promised && p99 > time.Second {
		t.Errorf("p99 is %v, promised is 1 s", p99)
	}

	// A start that adopts what is there.
	daemon.Kill()
	began = time.Now()
	daemon = start()
	netns.Eventually(t, 5*time.Minute, "mooringd knows everything again", func() bool {
		_, err := n.Get("http://127.0.0.1:9964/readyz")
		return err == nil && knows(count+1)
	})
	cpu, resident := usage(t, daemon.Process.Pid)
	t.Logf("a start with all of them there: ready after %v, %v of CPU, %d MiB resident, %.1f MB received", time.Since(began).Round(time.Millisecond), cpu, resident, metric("mooring_api_received_bytes_total")/1e6)
}
