// SPDX-License-Identifier: Apache-2.0

// Package scale measures the daemon with many services: how long the whole set
// takes to reach the kernel's maps, how long one changed endpoint takes, and
// what memory the daemon has.
package scale

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"

	"github.com/mooring-cni/mooring/bpf"
	"github.com/mooring-cni/mooring/test/netns"
	"github.com/mooring-cni/mooring/test/scenario"
)

// Options say how much.
type Options struct {
	Services, Backends int // backends of each service
	PerFile            int // services in one manifest
	Changes            int // endpoints changed, one at a time
}

// Result is what was measured.
type Result struct {
	Load    time.Duration   // from the daemon's start with nothing pinned until its maps hold all
	LoadCPU time.Duration   // CPU time that this took the daemon
	Restart time.Duration   // the same with everything pinned
	Changes []time.Duration // from the manifest's rename until the frontend leads to one backend more; sorted
	RSS     uint64          // bytes resident after the load and the changes
	PeakRSS uint64          // at most since the start
}

// Percentile is the change that so many percent are not slower than.
func (r Result) Percentile(percent int) time.Duration {
	if len(r.Changes) == 0 {
		return 0
	}
	return r.Changes[min(len(r.Changes)*percent/100, len(r.Changes)-1)]
}

func (r Result) String() string {
	return fmt.Sprintf("load %v (CPU %v), restart %v, one change p50 %v p99 %v max %v, RSS %d MiB (peak %d MiB)",
		r.Load.Round(time.Millisecond), r.LoadCPU.Round(time.Millisecond), r.Restart.Round(time.Millisecond),
		r.Percentile(50).Round(time.Millisecond), r.Percentile(99).Round(time.Millisecond), r.Percentile(100).Round(time.Millisecond),
		r.RSS>>20, r.PeakRSS>>20)
}

// Measure runs the real daemon on a node of its own.
func Measure(t netns.T, o Options) Result {
	t.Helper()
	n := scenario.NewNode(t)
	n.Flags = []string{"--log-level", "info"}
	for first := 0; first < o.Services; first += o.PerFile {
		n.Write(fileName(first), manifest(o, first, -1))
	}
	var r Result
	began := time.Now()
	n.Up()
	r.Load, r.LoadCPU = time.Since(began), cpuTime(t, n.Daemon().Process.Pid)

	services := openServices(t, n.BPFFS)
	if have := count(t, services); have != 2*o.Services {
		t.Fatalf("mooring_services holds %d elements, want a frontend and an address for each of %d services", have, o.Services)
	}
	for i := range o.Changes {
		service := i * (o.Services / o.Changes)
		first := service / o.PerFile * o.PerFile
		content := manifest(o, first, service)
		began := time.Now()
		n.Write(fileName(first), content)
		for backends(t, services, service) != o.Backends+1 {
			if time.Since(began) > 10*time.Second {
				t.Fatalf("service %d did not get another backend within 10 s", service)
			}
			time.Sleep(200 * time.Microsecond)
		}
		r.Changes = append(r.Changes, time.Since(began))
		n.Write(fileName(first), manifest(o, first, -1))
		for backends(t, services, service) != o.Backends {
			if time.Since(began) > 20*time.Second {
				t.Fatalf("service %d did not lose its other backend", service)
			}
			time.Sleep(time.Millisecond)
		}
	}
	slices.Sort(r.Changes)
	r.RSS, r.PeakRSS = memory(t, n.Daemon().Process.Pid)
	n.Crash()
	began = time.Now()
	n.Up()
	r.Restart = time.Since(began)
	return r
}

func fileName(first int) string { return fmt.Sprintf("services-%05d.yaml", first) }

// manifest holds the services from first on; the one named by changed has one
// endpoint more.
func manifest(o Options, first, changed int) string {
	var b strings.Builder
	for i := first; i < min(first+o.PerFile, o.Services); i++ {
		fmt.Fprintf(&b, `---
apiVersion: v1
kind: Service
metadata: {name: service-%[1]d, namespace: default}
spec:
  clusterIP: %[2]s
  ports: [{name: http, port: 80, protocol: TCP, targetPort: 8080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: service-%[1]d-x
  namespace: default
  labels: {kubernetes.io/service-name: service-%[1]d}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints:
`, i, clusterIP(i))
		more := 0
		if i == changed {
			more = 1
		}
		for j := range o.Backends + more {
			at := i*16 + j
			fmt.Fprintf(&b, "- addresses: [10.%d.%d.%d]\n  conditions: {ready: true, serving: true, terminating: false}\n  nodeName: node-%d\n", 128+at>>16, at>>8&255, at&255, j)
		}
	}
	return b.String()
}

func clusterIP(i int) string { return fmt.Sprintf("10.%d.%d.%d", 96+i>>16, i>>8&255, i&255) }

func openServices(t netns.T, bpffs string) *ebpf.Map {
	t.Helper()
	path := filepath.Join(bpffs, fmt.Sprintf("v%d", bpf.ABIVersion), "maps", "mooring_services")
	m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func count(t netns.T, m *ebpf.Map) (n int) {
	t.Helper()
	var key bpf.ServiceKey
	var value bpf.Service
	elements := m.Iterate()
	for elements.Next(&key, &value) {
		n++
	}
	if err := elements.Err(); err != nil {
		t.Fatalf("read mooring_services: %v", err)
	}
	return n
}

// backends is how many a service's frontend may choose from.
func backends(t netns.T, m *ebpf.Map, service int) int {
	t.Helper()
	key := bpf.ServiceKey{Addr: bpf.ToAddr(netip.MustParseAddr(clusterIP(service))), Port: bpf.Port(80), Proto: 6}
	var value bpf.Service
	if err := m.Lookup(&key, &value); err != nil {
		t.Fatalf("look service %d up: %v", service, err)
	}
	return int(value.Internal.Count)
}

// cpuTime is what a process has used so far.
func cpuTime(t netns.T, pid int) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatalf("read the daemon's CPU time: %v", err)
	}
	// The name in parentheses may hold spaces; utime and stime are the 14th
	// and 15th fields, in ticks of 10 ms (proc(5)).
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	var ticks uint64
	for _, field := range fields[11:13] {
		n, err := strconv.ParseUint(field, 10, 64)
		if err != nil {
			t.Fatalf("read the daemon's CPU time: %v", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

func memory(t netns.T, pid int) (rss, peak uint64) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatalf("read the daemon's memory: %v", err)
	}
	for line := range strings.Lines(string(status)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		kib, _ := strconv.ParseUint(fields[1], 10, 64)
		switch fields[0] {
		case "VmRSS:":
			rss = kib << 10
		case "VmHWM:":
			peak = kib << 10
		}
	}
	return rss, peak
}
