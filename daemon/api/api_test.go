// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mooring-cni/mooring/daemon/model"
)

// fake answers what a test put in.
type fake struct {
	policies    []Policy
	node        Node
	status      Status
	rows        int
	rowsErr     error
	filter      Filter
	services    []Service
	attachments []model.Endpoint
	addErr      error
	added       model.Endpoint
	deleted     string
	events      func(context.Context) (<-chan Event, error)
}

func (f *fake) Node() Node              { return f.node }
func (f *fake) Status() (Status, error) { return f.status, nil }
func (f *fake) Connections(filter Filter, yield func(Connection) bool) error {
	f.filter = filter
	for i := range f.rows {
		if !yield(Connection{Type: "SVC", Protocol: "TCP", Source: fmt.Sprintf("10.244.0.5:%d", i), Destination: "10.96.0.10:80"}) {
			return nil
		}
	}
	return f.rowsErr
}
func (f *fake) ConntrackStats() (ConntrackStats, error) { return ConntrackStats{Entries: 3}, nil }
func (f *fake) FlushConntrack() (uint64, error)         { return 42, nil }
func (f *fake) Services() []Service                     { return f.services }
func (f *fake) Policies() []Policy                      { return f.policies }
func (f *fake) ExplainPolicy(q PolicyQuestion) (Explanation, error) {
	return Explanation{From: q.From, To: q.To, Port: q.Port, Protocol: q.Protocol}, nil
}
func (f *fake) Attachments() []model.Endpoint { return f.attachments }
func (f *fake) AddEndpoint(e model.Endpoint) (model.Endpoint, error) {
	f.added = e
	e.ID = 7
	return e, f.addErr
}
func (f *fake) DeleteEndpoint(containerID, ifname string) error {
	f.deleted = containerID + "/" + ifname
	return nil
}
func (f *fake) Events(ctx context.Context) (<-chan Event, error) { return f.events(ctx) }

// serve runs a daemon's API on a socket of its own; stop ends it.
func serve(t *testing.T, daemon Daemon) (client *Client, stop func()) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "run", "mooring.sock")
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, daemon, slog.New(slog.DiscardHandler)) }()
	var stopped bool
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}
	t.Cleanup(stop)
	client = NewClient(socket)
	t.Cleanup(client.Close)
	return client, stop
}

func TestEveryCallComesBackAsTheDaemonAnsweredIt(t *testing.T) {
	endpoint := model.Endpoint{
		ID: 7, ContainerID: "c1", PodIfname: "eth0", Network: "mooring", Pod: model.Name{Namespace: "default", Name: "web"},
		IPs: []netip.Addr{netip.MustParseAddr("10.244.0.5"), netip.MustParseAddr("fd00:10:244::5")}, Interface: "lxc0123456789ab", Ifindex: 12,
		MAC: "02:00:00:00:00:01", HostMAC: "02:00:00:00:00:02", Netns: "/run/netns/x",
	}
	row := Endpoint{
		ID: 7, ContainerID: "c1", Ifname: "eth0", Namespace: "default", Pod: "web", IPs: endpoint.IPs,
		Interface: endpoint.Interface, MAC: endpoint.MAC, Netns: endpoint.Netns,
	}
	daemon := &fake{
		node:        Node{Name: "a", MTU: 1500, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24")}, Ready: true},
		status:      Status{Node: "a", Healthy: true},
		services:    []Service{{Namespace: "default", Name: "web"}},
		attachments: []model.Endpoint{endpoint},
	}
	client, _ := serve(t, daemon)
	ctx := t.Context()
	check := func(call string, got, want any, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", call, err)
		} else if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
			t.Errorf("%s (-want +got):\n%s", call, diff)
		}
	}
	node, err := client.Node(ctx)
	check("Node", node, daemon.node, err)
	status, err := client.Status(ctx)
	check("Status, its lists never null", status, Status{Node: "a", Healthy: true, XDP: []XDPStatus{}, Problems: []string{}}, err)
	stats, err := client.ConntrackStats(ctx)
	check("ConntrackStats", stats, ConntrackStats{Entries: 3}, err)
	flushed, err := client.FlushConntrack(ctx)
	check("FlushConntrack", flushed, uint64(42), err)
	services, err := client.Services(ctx)
	check("Services", services, []Service{{Namespace: "default", Name: "web", Frontends: []Frontend{}}}, err)
	endpoints, err := client.Endpoints(ctx)
	check("Endpoints", endpoints, []Endpoint{row}, err)
	attachments, err := client.Attachments(ctx)
	check("Attachments", attachments, []model.Endpoint{endpoint}, err)
	added, err := client.AddEndpoint(ctx, endpoint)
	check("AddEndpoint", added, row, err)
	check("the endpoint that the daemon was given", daemon.added, endpoint, nil)
	err = client.DeleteEndpoint(ctx, "c1", "eth0")
	check("DeleteEndpoint", daemon.deleted, "c1/eth0", err)
}

func TestEmptyListsAreNotNull(t *testing.T) {
	client, _ := serve(t, &fake{})
	for _, path := range []string{"/v1/services", "/v1/endpoints", "/v1/attachments", "/v1/conntrack"} {
		response, err := client.do(t.Context(), "GET", path, nil)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(response.Body)
		response.Body.Close()
		if got := strings.TrimSpace(string(body)); got != "[]" {
			t.Errorf("GET %s answers %s, want []", path, got)
		}
	}
}

func TestFilterReachesTheDaemon(t *testing.T) {
	daemon := &fake{}
	client, _ := serve(t, daemon)
	want := Filter{Pod: model.Name{Namespace: "a", Name: "b"}, Service: model.Name{Namespace: "c", Name: "d"}, Protocol: "ICMPv6"}
	for range client.Connections(t.Context(), want) {
	}
	if diff := cmp.Diff(want, daemon.filter); diff != "" {
		t.Errorf("filter (-want +got):\n%s", diff)
	}
	for _, query := range []string{"?pod=x", "?service=a/b/c", "?protocol=SCTP", "?podd=a/b"} {
		_, err := client.do(t.Context(), "GET", "/v1/conntrack"+query, nil)
		var status *StatusError
		if !errors.As(err, &status) || status.Code != http.StatusBadRequest {
			t.Errorf("GET /v1/conntrack%s: %v, want a 400", query, err)
		}
	}
}

func TestHalfAMillionConnectionsAreStreamed(t *testing.T) {
	const rows = 500_000
	client, _ := serve(t, &fake{rows: rows})
	var before, now runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	count, peak := 0, uint64(0)
	for c, err := range client.Connections(t.Context(), Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("10.244.0.5:%d", count); c.Source != want {
			t.Fatalf("row %d is %q, want %q", count, c.Source, want)
		}
		if count++; count%100_000 == 0 {
			runtime.GC()
			runtime.ReadMemStats(&now)
			peak = max(peak, now.HeapAlloc)
		}
	}
	if count != rows {
		t.Errorf("%d rows arrived of %d", count, rows)
	}
	if peak > before.HeapAlloc+8<<20 {
		t.Errorf("live heap grew by %d KiB while %d rows passed: a list was built", (peak-before.HeapAlloc)>>10, rows)
	}
}

func TestErrorInTheMiddleOfAStreamArrives(t *testing.T) {
	for _, rows := range []int{0, 1, 5000} {
		client, _ := serve(t, &fake{rows: rows, rowsErr: errors.New("read map conntrack: no buffer space")})
		count, last := 0, error(nil)
		for _, err := range client.Connections(t.Context(), Filter{}) {
			if err == nil {
				count++
			}
			last = err
		}
		if count != rows || last == nil || !strings.Contains(last.Error(), "no buffer space") {
			t.Errorf("%d rows, then %v; want %d rows, then the daemon's error", count, last, rows)
		}
	}
}

func TestReaderMayStopInTheMiddle(t *testing.T) {
	client, _ := serve(t, &fake{rows: 500_000})
	for range client.Connections(t.Context(), Filter{}) {
		break
	}
	if _, err := client.Node(t.Context()); err != nil {
		t.Errorf("the client is of no use afterwards: %v", err)
	}
}

func TestDaemonsErrorKeepsItsStatusAndText(t *testing.T) {
	for _, test := range []struct {
		err                   error
		code                  int
		unavailable, conflict bool
	}{
		{errors.New("disk is full"), 500, false, false},
		{Errorf(http.StatusConflict, "address taken"), 409, false, true},
		{fmt.Errorf("add: %w", Errorf(http.StatusServiceUnavailable, "not synced")), 503, true, false},
	} {
		client, _ := serve(t, &fake{addErr: test.err})
		_, err := client.AddEndpoint(t.Context(), model.Endpoint{ContainerID: "c", PodIfname: "eth0"})
		var status *StatusError
		if !errors.As(err, &status) || status.Code != test.code || err.Error() != test.err.Error() {
			t.Errorf("got %v, want %d %v", err, test.code, test.err)
		}
		if IsUnavailable(err) != test.unavailable || IsConflict(err) != test.conflict || IsNotRunning(err) {
			t.Errorf("%v: unavailable %v, conflict %v, not running %v", err, IsUnavailable(err), IsConflict(err), IsNotRunning(err))
		}
	}
}

func TestBadRequestsAreRefused(t *testing.T) {
	client, _ := serve(t, &fake{})
	for _, test := range []struct {
		method, path string
		body         any
		code         int
		text         string
	}{
		{"PUT", "/v1/endpoints/c/eth0", map[string]any{"containerID": 1}, 400, "containerID"},
		{"PUT", "/v1/endpoints/c/eth0", model.Endpoint{ContainerID: "d", PodIfname: "eth0"}, 400, "path says c/eth0"},
		{"PUT", "/v1/endpoints/c/eth0", strings.Repeat("x", 2*maxBody), 400, "large"},
		{"GET", "/v2/node", nil, 404, "same version"},
		{"POST", "/v1/node", nil, 404, "POST"},
	} {
		_, err := client.do(t.Context(), test.method, test.path, test.body)
		var status *StatusError
		if !errors.As(err, &status) || status.Code != test.code || !strings.Contains(status.Message, test.text) {
			t.Errorf("%s %s: %v, want %d with %q", test.method, test.path, err, test.code, test.text)
		}
	}
}

func TestDeadDaemonIsToldApartFromRefusal(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "mooring.sock")
	client := NewClient(socket)
	_, err := client.Node(t.Context())
	if !IsNotRunning(err) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
	for _, word := range []string{socket, "systemctl start mooringd", "not running"} {
		if err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%v does not say %q", err, word)
		}
	}
	leaveSocket(t, socket)
	if _, err := client.Status(t.Context()); !IsNotRunning(err) {
		t.Errorf("stale socket: %v", err)
	}
	for _, err := range client.Connections(t.Context(), Filter{}) {
		if !IsNotRunning(err) {
			t.Errorf("stale socket, connections: %v", err)
		}
	}
}

func TestSilentDaemonIsNamedWhenTimeIsUp(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "mooring.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = NewClient(socket).Node(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "did not answer in time") || !strings.Contains(err.Error(), socket) {
		t.Errorf("got %v", err)
	}
}

func TestEventsArriveAtOnceAndEndWithTheDaemon(t *testing.T) {
	source := make(chan Event)
	var ended = make(chan struct{})
	client, stop := serve(t, &fake{events: func(ctx context.Context) (<-chan Event, error) {
		out := make(chan Event)
		go func() {
			defer close(ended)
			defer close(out)
			for {
				select {
				case e := <-source:
					select {
					case out <- e:
					case <-ctx.Done():
						return
					}
				case <-ctx.Done():
					return
				}
			}
		}()
		return out, nil
	}})
	got := make(chan Event)
	result := make(chan error, 1)
	go func() {
		result <- client.Events(context.Background(), func(e Event) error { got <- e; return nil })
	}()
	for i := range uint32(3) {
		source <- Event{Kind: "drop", Reason: "NO_BACKEND", Endpoint: i}
		select {
		case e := <-got:
			if e.Endpoint != i {
				t.Errorf("event %d arrived as %+v", i, e)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("event %d did not arrive", i)
		}
	}
	stop()
	if err := <-result; err == nil || !strings.Contains(err.Error(), "ended the stream") {
		t.Errorf("after the daemon's end: %v", err)
	}
	<-ended
}

func TestEventsEndWhenTheReaderHasEnough(t *testing.T) {
	enough := errors.New("enough")
	ended := make(chan struct{})
	client, _ := serve(t, &fake{events: func(ctx context.Context) (<-chan Event, error) {
		out := make(chan Event)
		go func() {
			defer close(ended)
			defer close(out)
			for ctx.Err() == nil {
				select {
				case out <- Event{Kind: "new"}:
				case <-ctx.Done():
				}
			}
		}()
		return out, nil
	}})
	if err := client.Events(t.Context(), func(Event) error { return enough }); err != enough {
		t.Errorf("got %v, want the reader's own error", err)
	}
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("the daemon still makes events for a reader that is gone")
	}
}

func TestSecondDaemonOnASocketIsRefused(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "mooring.sock")
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(socket); err == nil || !strings.Contains(err.Error(), "another daemon answers on "+socket) {
		t.Errorf("second Listen: %v", err)
	}
	// One that takes no lock, such as another program, is noticed as well.
	other := filepath.Join(t.TempDir(), "other.sock")
	foreign, err := net.Listen("unix", other)
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	if _, err := Listen(other); err == nil || !strings.Contains(err.Error(), "another daemon answers") {
		t.Errorf("Listen where somebody answers: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there after Close: %v", err)
	}
	if l, err = Listen(socket); err != nil {
		t.Errorf("Listen after the first is gone: %v", err)
	} else {
		l.Close()
	}
}

func TestStaleSocketIsReplacedAndOtherFilesAreNot(t *testing.T) {
	directory := t.TempDir()
	socket := filepath.Join(directory, "mooring.sock")
	leaveSocket(t, socket)
	l, err := Listen(socket)
	if err != nil {
		t.Fatalf("stale socket: %v", err)
	}
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("mode of the socket: %v %v, want 0660", info.Mode(), err)
	}
	l.Close()
	if err := RemoveSocket(socket); err != nil {
		t.Error(err)
	}
	if left, _ := os.ReadDir(directory); len(left) != 0 {
		t.Errorf("RemoveSocket left %v", left)
	}
	file := filepath.Join(directory, "precious")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("Listen on a file: %v", err)
	}
	if _, err := Listen("/run/" + strings.Repeat("x", 120)); err == nil || !strings.Contains(err.Error(), "107 bytes") {
		t.Errorf("Listen on a long path: %v", err)
	}
}

// leaveSocket leaves a socket behind as a killed daemon does.
func leaveSocket(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

func TestPolicyQuestionsArriveAsAsked(t *testing.T) {
	c, _ := serve(t, &fake{policies: []Policy{{Kind: "NetworkPolicy", Namespace: "default", Name: "web"}}})
	list, err := c.Policies(t.Context())
	if err != nil || len(list) != 1 || list[0].Name != "web" {
		t.Errorf("list %+v, error %v", list, err)
	}
	x, err := c.ExplainPolicy(t.Context(), PolicyQuestion{From: "default/a b", To: "fd00::1", Port: 80, Protocol: "TCP"})
	if err != nil || x.From != "default/a b" || x.To != "fd00::1" || x.Port != 80 || x.Protocol != "TCP" {
		t.Errorf("answer %+v, error %v", x, err)
	}
}
