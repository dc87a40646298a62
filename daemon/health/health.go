// SPDX-License-Identifier: Apache-2.0

// Package health tells load balancers whether to send to this node, as
// kube-proxy does: /healthz and /livez of the node's service proxy, and the
// health check port of each service whose external traffic stays on its node.
package health

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/mooring-cni/mooring/daemon/model"
)

const (
	// Late is when a change that has not reached the datapath makes the proxy
	// unhealthy: twice the interval in which kube-proxy looks at everything anew.
	Late = time.Minute
	// retryInterval is how soon a port that somebody else has is tried again.
	retryInterval = 2 * time.Second
	headerTimeout = 10 * time.Second
)

// Proxy is how this node's service proxy does.
type Proxy struct {
	// Started: the services are in the datapath, perhaps as an earlier run left them.
	Started bool
	// Pending is since when what was told does not get into the datapath; zero: all did.
	Pending time.Time
	// Updated is when the datapath last held all that was told.
	Updated time.Time
	// Eligible: the node is there and stays.
	Eligible bool
	// Families that it serves, as the API writes them: IPv4, IPv6.
	Families []string
}

// late tells what a restart may mend.
func (p Proxy) late(now time.Time) bool { return !p.Pending.IsZero() && now.Sub(p.Pending) >= Late }

// Check is a health check port and what is said there.
type Check struct {
	Service        model.Name
	Port           uint16
	LocalEndpoints int // ready ones
}

// Server answers load balancers.
type Server struct {
	proxy func() Proxy
	log   *slog.Logger

	mutex     sync.Mutex
	checks    map[uint16]Check
	addresses []netip.Addr // to listen on; none: all
	open      map[uint16]opened
	failed    map[uint16]error
	trouble   string // of Serve
	closed    bool
}

// opened is a port that is answered.
type opened struct {
	listeners []net.Listener
	server    *http.Server
}

// close also closes what the server has not got to know yet.
func (o opened) close() {
	for _, l := range o.listeners {
		l.Close()
	}
	o.server.Close()
}

// New makes a server that asks proxy at each request.
func New(proxy func() Proxy, log *slog.Logger) *Server {
	return &Server{proxy: proxy, log: log, open: map[uint16]opened{}, failed: map[uint16]error{}}
}

// Set says which ports are to be answered, on which of the node's addresses;
// none: on all. What is the same stays open.
func (s *Server) Set(checks []Check, addresses []netip.Addr) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.checks = make(map[uint16]Check, len(checks))
	for _, c := range checks {
		s.checks[c.Port] = c
	}
	moved := !slices.Equal(s.addresses, addresses)
	s.addresses = slices.Clone(addresses)
	for port, opened := range s.open {
		if _, wanted := s.checks[port]; !wanted || moved {
			opened.close()
			delete(s.open, port)
		}
	}
	for port := range s.failed {
		if _, wanted := s.checks[port]; !wanted {
			delete(s.failed, port)
		}
	}
	s.listen()
}

// listen opens what is wanted and not open. The mutex is held.
func (s *Server) listen() {
	if s.closed {
		return
	}
	for port, check := range s.checks {
		if s.open[port].server != nil {
			continue
		}
		listeners, err := listenAll(s.addresses, port)
		if err != nil {
			if s.failed[port] == nil {
				s.log.Warn("health check port is not answered", "service", check.Service.String(), "port", port, "error", err)
			}
			s.failed[port] = err
			continue
		}
		delete(s.failed, port)
		opened := opened{listeners, &http.Server{ReadHeaderTimeout: headerTimeout, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			s.answerCheck(w, port)
		})}}
		s.open[port] = opened
		for _, l := range listeners {
			go opened.server.Serve(l)
		}
	}
}

// listenAll listens on all addresses or none.
func listenAll(addresses []netip.Addr, port uint16) (listeners []net.Listener, err error) {
	hosts := []string{""} // both families, or the one that the machine has
	if len(addresses) > 0 {
		hosts = nil
		for _, a := range addresses {
			hosts = append(hosts, a.String())
		}
	}
	for _, host := range hosts {
		l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			return nil, err
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

// Problems are ports that cannot be answered.
func (s *Server) Problems() (list []model.Problem) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	for port, err := range s.failed {
		why := err.Error()
		if errors.Is(err, syscall.EADDRINUSE) {
			why = "another process of the node has it"
		}
		list = append(list, model.Problem{
			Object: "Service " + s.checks[port].Service.String(), Field: "spec.healthCheckNodePort",
			Message: fmt.Sprintf("%d is not answered: %s", port, why),
		})
	}
	slices.SortFunc(list, model.CompareProblems)
	return list
}

// Trouble is why the proxy's own health is not answered, in words for people.
func (s *Server) Trouble() string {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.trouble
}

// Run answers the proxy's health at address (empty: nowhere), and keeps trying
// for ports that somebody else has, until ctx is done.
func (s *Server) Run(ctx context.Context, address string) error {
	defer s.close()
	retry := time.NewTicker(retryInterval)
	defer retry.Stop()
	var ended chan error
	for {
		if address != "" && ended == nil {
			ended = s.serve(ctx, address)
		}
		select {
		case <-ctx.Done():
			return nil
		case err := <-ended:
			s.setTrouble(address, err)
			ended = nil
		case <-retry.C:
		}
		s.mutex.Lock()
		s.listen()
		s.mutex.Unlock()
	}
}

// serve answers at address; nil: it cannot be had.
func (s *Server) serve(ctx context.Context, address string) chan error {
	l, err := net.Listen("tcp", address)
	if s.setTrouble(address, err); err != nil {
		return nil
	}
	ended := make(chan error, 1)
	server := &http.Server{Handler: s.Handler(), ReadHeaderTimeout: headerTimeout}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	go func() {
		defer stop()
		ended <- server.Serve(l)
	}()
	return ended
}

func (s *Server) setTrouble(address string, err error) {
	text := ""
	if err != nil {
		text = fmt.Sprintf("the health of the service proxy is not answered: %v", err)
		if errors.Is(err, syscall.EADDRINUSE) {
			text += ": end the service proxy that has the port, or set healthzAddress to another than " + address
		}
	}
	s.mutex.Lock()
	before := s.trouble
	s.trouble = text
	s.mutex.Unlock()
	if text != "" && text != before {
		s.log.Warn(text)
	}
}

func (s *Server) close() {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.closed = true
	for _, opened := range s.open {
		opened.close()
	}
	clear(s.open)
}

// report is the body of /healthz and /livez, as kube-proxy writes it.
type report struct {
	LastUpdated  time.Time               `json:"lastUpdated"`
	CurrentTime  time.Time               `json:"currentTime"`
	NodeEligible *bool                   `json:"nodeEligible,omitempty"`
	Healthy      bool                    `json:"healthy"`
	Status       map[string]familyReport `json:"status,omitempty"`
}

type familyReport struct {
	LastUpdated time.Time `json:"lastUpdated"`
	Healthy     bool      `json:"healthy"`
}

// Handler answers /healthz, for load balancers, and /livez, for who restarts
// what does not live: a node that is about to go, and one whose services are
// still to come, gets no new traffic and needs no restart (KEP-3836).
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		p := s.proxy()
		now := time.Now()
		answer(w, p, now, p.Started && !p.late(now), &p.Eligible)
	})
	mux.HandleFunc("/livez", func(w http.ResponseWriter, _ *http.Request) {
		p := s.proxy()
		now := time.Now()
		answer(w, p, now, !p.late(now), nil)
	})
	return mux
}

func answer(w http.ResponseWriter, p Proxy, now time.Time, healthy bool, eligible *bool) {
	r := report{LastUpdated: p.Updated, CurrentTime: now, NodeEligible: eligible, Healthy: healthy, Status: map[string]familyReport{}}
	for _, family := range p.Families {
		r.Status[family] = familyReport{LastUpdated: p.Updated, Healthy: healthy}
	}
	code := http.StatusServiceUnavailable
	if healthy && (eligible == nil || *eligible) {
		// That nothing had to be updated for long is no sign of age.
		r.LastUpdated, code = now, http.StatusOK
	}
	write(w, code, r)
}

// check is the body at a service's port, as kube-proxy writes it.
type check struct {
	Service struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	} `json:"service"`
	LocalEndpoints      int  `json:"localEndpoints"`
	ServiceProxyHealthy bool `json:"serviceProxyHealthy"`
}

func (s *Server) answerCheck(w http.ResponseWriter, port uint16) {
	s.mutex.Lock()
	at := s.checks[port]
	s.mutex.Unlock()
	var body check
	body.Service.Namespace, body.Service.Name = at.Service.Namespace, at.Service.Name
	body.LocalEndpoints = at.LocalEndpoints
	p := s.proxy()
	body.ServiceProxyHealthy = p.Started && !p.late(time.Now())
	w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(body.LocalEndpoints))
	code := http.StatusServiceUnavailable
	if body.LocalEndpoints > 0 && body.ServiceProxyHealthy {
		code = http.StatusOK
	}
	write(w, code, body)
}

func write(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(body)
}
