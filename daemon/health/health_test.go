// SPDX-License-Identifier: Apache-2.0

package health

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mooring-cni/mooring/daemon/model"
)

type proxy struct {
	sync.Mutex
	Proxy
}

func (p *proxy) get() Proxy {
	p.Lock()
	defer p.Unlock()
	return p.Proxy
}

func (p *proxy) set(f func(*Proxy)) {
	p.Lock()
	defer p.Unlock()
	f(&p.Proxy)
}

func running() *proxy {
	return &proxy{Proxy: Proxy{Started: true, Eligible: true, Updated: time.Now().Add(-time.Hour), Families: []string{"IPv4", "IPv6"}}}
}

func server(t *testing.T, p *proxy) *Server {
	return New(p.get, slog.New(slog.DiscardHandler))
}

func run(t *testing.T, s *Server, address string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, address) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func TestProxyHealth(t *testing.T) {
	for _, c := range []struct {
		name            string
		change          func(*Proxy)
		healthz, livez  int
		healthy, recent bool
	}{
		{"all well", func(*Proxy) {}, 200, 200, true, true},
		{"the node is about to go", func(p *Proxy) { p.Eligible = false }, 503, 200, true, false},
		{"a change is on its way", func(p *Proxy) { p.Pending = time.Now().Add(-Late / 2) }, 200, 200, true, true},
		{"a change is late", func(p *Proxy) { p.Pending = time.Now().Add(-Late) }, 503, 503, false, false},
		{"services are still to come", func(p *Proxy) { p.Started = false }, 503, 200, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := running()
			p.set(c.change)
			handler := server(t, p).Handler()
			for path, code := range map[string]int{"/healthz": c.healthz, "/livez": c.livez} {
				w := httptest.NewRecorder()
				handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
				if w.Code != code {
					t.Errorf("%s: %d, want %d: %s", path, w.Code, code, w.Body)
				}
				if got := w.Header().Get("Content-Type") + " " + w.Header().Get("X-Content-Type-Options"); got != "application/json nosniff" {
					t.Errorf("%s: headers %q", path, got)
				}
				var body struct {
					LastUpdated, CurrentTime time.Time
					NodeEligible             *bool
					Healthy                  bool
					Status                   map[string]struct {
						LastUpdated time.Time
						Healthy     bool
					}
				}
				if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
					t.Fatalf("%s: %v", path, err)
				}
				if time.Since(body.CurrentTime) > time.Minute || len(body.Status) != 2 || !body.Status["IPv6"].LastUpdated.Equal(p.Updated) {
					t.Errorf("%s: %s", path, w.Body)
				}
				if path == "/livez" {
					if body.NodeEligible != nil {
						t.Errorf("/livez tells of the node: %s", w.Body)
					}
					continue
				}
				if body.NodeEligible == nil || *body.NodeEligible != p.Eligible || body.Healthy != c.healthy || body.Status["IPv4"].Healthy != c.healthy {
					t.Errorf("/healthz: %s", w.Body)
				}
				if recent := time.Since(body.LastUpdated) < time.Minute; recent != c.recent {
					t.Errorf("lastUpdated is recent: %v, want %v", recent, c.recent)
				}
			}
		})
	}
}

func TestProxyHealthIsTriedAgainWhereThePortIsTaken(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := taken.Addr().String()
	s := server(t, running())
	run(t, s, address)
	eventually(t, "the trouble is told", func() bool { return strings.Contains(s.Trouble(), "healthzAddress") })
	taken.Close()
	eventually(t, "answers", func() bool { code, _, _ := get("http://" + address + "/healthz"); return code == 200 })
	if trouble := s.Trouble(); trouble != "" {
		t.Errorf("trouble stays: %s", trouble)
	}
}

// ports are free ones. Somebody may take one in between, which is a failure of
// this test that does not come back.
func ports(t *testing.T, count int) (free []uint16) {
	t.Helper()
	for range count {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		free = append(free, uint16(l.Addr().(*net.TCPAddr).Port))
	}
	return free
}

func get(url string) (int, http.Header, string) {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Get(url)
	if err != nil {
		return 0, nil, err.Error()
	}
	defer r.Body.Close()
	body, _ := io.ReadAll(r.Body)
	return r.StatusCode, r.Header, string(body)
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

var loopback = []netip.Addr{netip.MustParseAddr("127.0.0.1")}

func TestServiceIsHealthyWithAnEndpointOfItsOwnHere(t *testing.T) {
	p, port := running(), ports(t, 1)[0]
	s := server(t, p)
	stop := run(t, s, "")
	web := model.Name{Namespace: "default", Name: "web"}
	for _, c := range []struct {
		endpoints, code int
		change          func(*Proxy)
		healthy         bool
	}{
		{2, 200, func(*Proxy) {}, true},
		{0, 503, func(*Proxy) {}, true},
		{1, 200, func(p *Proxy) { p.Eligible = false }, true}, // its endpoints still serve: /healthz tells balancers of the node
		{1, 503, func(p *Proxy) { p.Pending = time.Now().Add(-Late) }, false},
	} {
		s.Set([]Check{{web, port, c.endpoints}}, loopback)
		p.set(c.change)
		code, header, body := get(fmt.Sprintf("http://127.0.0.1:%d/whatever", port))
		if code != c.code {
			t.Errorf("%+v: %d %s", c, code, body)
			continue
		}
		if got := header.Get("X-Load-Balancing-Endpoint-Weight"); got != fmt.Sprint(c.endpoints) {
			t.Errorf("%+v: weight %q", c, got)
		}
		want := fmt.Sprintf(`{"service":{"namespace":"default","name":"web"},"localEndpoints":%d,"serviceProxyHealthy":%v}`, c.endpoints, c.healthy)
		if diff := cmp.Diff(want, strings.TrimSpace(body)); diff != "" {
			t.Error(diff)
		}
	}
	if code, _, body := get(fmt.Sprintf("http://[::1]:%d/", port)); code != 0 {
		t.Errorf("an address that was not chosen answers: %d %s", code, body)
	}
	s.Set([]Check{{web, port, 1}}, nil)
	p.set(func(p *Proxy) { p.Pending = time.Time{} })
	eventually(t, "all addresses of both families answer", func() bool {
		code, _, _ := get(fmt.Sprintf("http://127.0.0.1:%d/", port))
		code6, _, why := get(fmt.Sprintf("http://[::1]:%d/", port))
		return code == 200 && (code6 == 200 || strings.Contains(why, "cannot assign"))
	})
	s.Set(nil, nil)
	if code, _, body := get(fmt.Sprintf("http://127.0.0.1:%d/", port)); code != 0 {
		t.Errorf("the port of a service that is gone answers %d %s", code, body)
	}
	s.Set([]Check{{web, port, 1}}, loopback)
	stop()
	if code, _, body := get(fmt.Sprintf("http://127.0.0.1:%d/", port)); code != 0 {
		t.Errorf("after the end: %d %s", code, body)
	}
}

func TestPortMovesToAnotherService(t *testing.T) {
	p, free := running(), ports(t, 2)
	s := server(t, p)
	run(t, s, "")
	a, b := model.Name{Namespace: "n", Name: "a"}, model.Name{Namespace: "n", Name: "b"}
	s.Set([]Check{{a, free[0], 1}, {b, free[1], 0}}, loopback)
	s.Set([]Check{{b, free[0], 3}, {a, free[1], 0}}, loopback)
	if code, header, body := get(fmt.Sprintf("http://127.0.0.1:%d/", free[0])); code != 200 || header.Get("X-Load-Balancing-Endpoint-Weight") != "3" || !strings.Contains(body, `"name":"b"`) {
		t.Errorf("%d %v %s", code, header, body)
	}
}

func TestPortOfAnotherProcessIsAProblemUntilItIsFree(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(taken.Addr().(*net.TCPAddr).Port)
	s := server(t, running())
	run(t, s, "")
	s.Set([]Check{{model.Name{Namespace: "default", Name: "web"}, port, 1}}, loopback)
	want := []model.Problem{{Object: "Service default/web", Field: "spec.healthCheckNodePort", Message: fmt.Sprintf("%d is not answered: another process of the node has it", port)}}
	if diff := cmp.Diff(want, s.Problems()); diff != "" {
		t.Error(diff)
	}
	taken.Close()
	eventually(t, "the port is answered", func() bool {
		code, _, _ := get(fmt.Sprintf("http://127.0.0.1:%d/", port))
		return code == 200
	})
	if got := s.Problems(); len(got) > 0 {
		t.Errorf("problems stay: %v", got)
	}
}
