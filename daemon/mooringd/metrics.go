// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// serveMetrics serves /metrics, /healthz, /readyz and /proxyMode. An address that cannot be
// had is a problem in the status, and tried again: traffic does not need it.
func (d *daemon) serveMetrics(ctx context.Context) error {
	if d.config.MetricsAddress == "" {
		<-ctx.Done()
		return nil
	}
	for {
		err := d.serveHTTP(ctx)
		if ctx.Err() != nil {
			return nil
		}
		why := fmt.Sprintf("metrics are not served: %v", err)
		if errors.Is(err, syscall.EADDRINUSE) {
			why += ": give this daemon its own metricsAddress"
		}
		d.setMetricsProblem(why)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(2 * time.Second):
		}
	}
}

func (d *daemon) setMetricsProblem(why string) {
	d.mutex.Lock()
	d.metrics = why
	d.mutex.Unlock()
}

func (d *daemon) serveHTTP(ctx context.Context) error {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", d.config.MetricsAddress)
	if err != nil {
		return err
	}
	d.setMetricsProblem("")
	server := &http.Server{Handler: d.handler(), ReadHeaderTimeout: 10 * time.Second}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	return server.Serve(listener)
}

func (d *daemon) handler() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(&collector{d}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}))
	// Healthy is who answers: what a restart cannot mend must not cause one.
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !d.services.known() {
			serious, _ := d.problems()
			http.Error(w, "not ready: "+strings.Join(append(serious, "services are not all in the datapath"), "\n"), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	// What asks kube-proxy how it works, at its metrics' address, is told of whom it asks.
	mux.HandleFunc("GET /proxyMode", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "mooring") })
	return mux
}

// collector asks the parts when Prometheus asks it: nothing is counted twice.
type collector struct{ daemon *daemon }

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("mooring_"+name, help, labels, nil)
}

var (
	buildInfo      = describe("build_info", "Version of this daemon; always 1.", "version", "goversion")
	hookMode       = describe("conntrack_hook_mode", "1 for the way in which ends of sockets are noticed.", "mode")
	healthy        = describe("healthy", "1 while nothing serious is wrong, see `mooring status`.")
	problems       = describe("problems", "Number of problems that `mooring status` names.", "severity")
	endpointCount  = describe("endpoints", "Pods' interfaces on this node.")
	serviceCount   = describe("services", "Services known.")
	backendCount   = describe("backends", "Distinct backends of all services.")
	entries        = describe("conntrack_entries", "Entries in the connection table.")
	maxEntries     = describe("conntrack_max_entries", "Size of the connection table.")
	tethered       = describe("conntrack_tethered_entries", "Entries that end with their socket.")
	created        = describe("conntrack_created_total", "Entries made.")
	deleted        = describe("conntrack_deleted_total", "Entries deleted, by what ended them.", "reason")
	evicted        = describe("conntrack_evicted_total", "Entries that made room for new ones.")
	insertFailed   = describe("conntrack_insert_failed_total", "Entries that could not be made.")
	deleteFailed   = describe("conntrack_delete_failed_total", "Deletions that failed and were left to the sweep.")
	sweepRuns      = describe("conntrack_sweep_runs_total", "Sweeps for expired entries.")
	sweepScanned   = describe("conntrack_sweep_scanned_total", "Entries looked at by sweeps.")
	sweepInterval  = describe("conntrack_sweep_interval_seconds", "Time between sweeps as it is now.")
	sweepCPU       = describe("conntrack_sweep_cpu_seconds_total", "CPU time used by sweeps.")
	dropped        = describe("dropped_packets_total", "Packets dropped.", "reason", "direction")
	droppedBytes   = describe("dropped_bytes_total", "Bytes of dropped packets.", "reason", "direction")
	policyDenied   = describe("policy_denied_packets_total", "Packets that network policy denied, by the policies that apply.", "direction", "policies")
	apiConnected   = describe("api_connected", "1 while the Kubernetes API answers about the resource.", "resource")
	apiSynced      = describe("api_synced", "1 when everything of the resource is known.", "resource")
	apiObjects     = describe("api_objects", "Objects of the Kubernetes API that are known.", "resource")
	apiEvents      = describe("api_events_total", "Objects that the Kubernetes API told of.", "resource")
	apiErrors      = describe("api_errors_total", "Questions that the Kubernetes API did not answer.", "resource")
	apiReceived    = describe("api_received_bytes_total", "Bytes that the Kubernetes API sent.")
	datapathErrors = describe("datapath_unreadable", "1 while the datapath's counters cannot be read.")
)

func (c *collector) Describe(out chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, out) }

func (c *collector) Collect(out chan<- prometheus.Metric) {
	d := c.daemon
	gauge := func(what *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(what, prometheus.GaugeValue, value, labels...)
	}
	counter := func(what *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(what, prometheus.CounterValue, value, labels...)
	}
	gauge(buildInfo, 1, version, runtime.Version())
	mode := d.kernel.Hook().Mode
	for _, m := range []string{"trampoline", "tracepoint", "off"} {
		gauge(hookMode, number(m == mode), m)
	}
	serious, minor := d.problems()
	gauge(healthy, number(len(serious) == 0))
	gauge(problems, float64(len(serious)), "serious")
	gauge(problems, float64(len(minor)), "minor")
	gauge(endpointCount, float64(d.endpoints.Len()))
	services, backends := d.services.counts()
	gauge(serviceCount, float64(services))
	gauge(backendCount, float64(backends))

	if d.cluster != nil {
		for _, w := range d.cluster.Watches() {
			gauge(apiConnected, number(w.Connected), w.Resource)
			gauge(apiSynced, number(w.Synced), w.Resource)
			gauge(apiObjects, float64(w.Objects), w.Resource)
			counter(apiEvents, float64(w.Events), w.Resource)
			counter(apiErrors, float64(w.Errors), w.Resource)
		}
		counter(apiReceived, float64(d.cluster.Received()))
	}

	stats, err := d.kernel.Stats()
	drops, dropsErr := d.kernel.Drops()
	gauge(datapathErrors, number(err != nil || dropsErr != nil))
	if err == nil {
		gauge(entries, float64(stats.Entries))
		gauge(maxEntries, float64(stats.MaxEntries))
		gauge(tethered, float64(stats.Tethered))
		counter(created, float64(stats.Created))
		for reason, n := range map[string]uint64{
			"socket": stats.Deleted.Socket, "timewait": stats.Deleted.Timewait, "expired": stats.Deleted.Expired,
			"endpoint": stats.Deleted.Endpoint, "backend": stats.Deleted.Backend, "flush": stats.Deleted.Flush,
		} {
			counter(deleted, float64(n), reason)
		}
		counter(evicted, float64(stats.Evicted))
		counter(insertFailed, float64(stats.InsertFailed))
		counter(deleteFailed, float64(stats.DeleteFailed))
		counter(sweepRuns, float64(stats.Sweep.Runs))
		counter(sweepScanned, float64(stats.Sweep.Scanned))
		gauge(sweepInterval, stats.Sweep.IntervalSeconds)
		counter(sweepCPU, stats.Sweep.CPUSeconds)
	}
	if err := d.policies.denials(func(direction, policies string, packets uint64) {
		counter(policyDenied, float64(packets), direction, policies)
	}); err != nil {
		out <- prometheus.NewInvalidMetric(policyDenied, err)
	}
	for drop, count := range drops {
		counter(dropped, float64(count.Packets), drop.Reason, drop.Direction)
		counter(droppedBytes, float64(count.Bytes), drop.Reason, drop.Direction)
	}
}

func number(is bool) float64 {
	if is {
		return 1
	}
	return 0
}
