// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"github.com/mooring-cni/mooring/daemon/model"
)

// Daemon is what the server asks to answer its clients. Its errors reach the
// client as they are, with the status that Errorf gave them.
type Daemon interface {
	Node() Node
	Status() (Status, error)
	Connections(f Filter, yield func(Connection) bool) error
	ConntrackStats() (ConntrackStats, error)
	FlushConntrack() (deleted uint64, err error)
	Services() []Service
	Policies() []Policy
	ExplainPolicy(PolicyQuestion) (Explanation, error)
	Attachments() []model.Endpoint
	AddEndpoint(model.Endpoint) (model.Endpoint, error)
	DeleteEndpoint(containerID, ifname string) error
	// Events delivers until ctx is done, then closes the channel.
	Events(ctx context.Context) (<-chan Event, error)
}

// Flushed answers DELETE /v1/conntrack.
type Flushed struct {
	Deleted uint64 `json:"deleted"`
}

// trailerError carries an error that occurs when a streamed list has begun.
const trailerError = "Mooring-Error"

// maxBody is far above what an endpoint needs: 10 KiB.
const maxBody = 1 << 16

// Serve answers clients on l until ctx is done. It then lets running requests
// end (streams are cut) and closes l.
func Serve(ctx context.Context, l net.Listener, daemon Daemon, log *slog.Logger) error {
	server := &http.Server{
		Handler:           handler(ctx, daemon),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve the API on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if err := server.Shutdown(grace); err != nil {
		server.Close()
	}
	<-done
	return nil
}

// handler routes requests; stop ends the streams that never end by themselves.
func handler(stop context.Context, d Daemon) http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, f func(*http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			answer, err := f(r)
			if err != nil {
				writeError(w, err)
				return
			}
			writeJSON(w, http.StatusOK, answer)
		})
	}
	handle("GET /v1/node", func(*http.Request) (any, error) {
		n := d.Node()
		n.PodCIDRs = list(n.PodCIDRs)
		return n, nil
	})
	handle("GET /v1/status", func(*http.Request) (any, error) {
		s, err := d.Status()
		s.XDP, s.Problems = list(s.XDP), list(s.Problems)
		return s, err
	})
	mux.HandleFunc("GET /v1/conntrack", func(w http.ResponseWriter, r *http.Request) {
		serveConnections(stop, w, r, d)
	})
	handle("GET /v1/conntrack/stats", func(*http.Request) (any, error) { return d.ConntrackStats() })
	handle("DELETE /v1/conntrack", func(*http.Request) (any, error) {
		n, err := d.FlushConntrack()
		return Flushed{Deleted: n}, err
	})
	handle("GET /v1/services", func(*http.Request) (any, error) {
		services := list(d.Services())
		for i := range services {
			services[i].Frontends = list(services[i].Frontends)
			for j := range services[i].Frontends {
				services[i].Frontends[j].Backends = list(services[i].Frontends[j].Backends)
			}
		}
		return services, nil
	})
	handle("GET /v1/policies", func(*http.Request) (any, error) { return list(d.Policies()), nil })
	handle("GET /v1/policies/explain", func(r *http.Request) (any, error) {
		q := r.URL.Query()
		question := PolicyQuestion{From: q.Get("from"), To: q.Get("to"), Protocol: q.Get("protocol")}
		if text := q.Get("port"); text != "" {
			port, err := strconv.ParseUint(text, 10, 16)
			if err != nil {
				return nil, Errorf(http.StatusBadRequest, "port: %q is not a port", text)
			}
			question.Port = uint16(port)
		}
		return d.ExplainPolicy(question)
	})
	handle("GET /v1/attachments", func(*http.Request) (any, error) { return list(d.Attachments()), nil })
	handle("GET /v1/endpoints", func(*http.Request) (any, error) {
		endpoints := []Endpoint{}
		for _, e := range d.Attachments() {
			endpoints = append(endpoints, EndpointOf(e))
		}
		return endpoints, nil
	})
	handle("PUT /v1/endpoints/{containerID}/{ifname}", func(r *http.Request) (any, error) {
		var e model.Endpoint
		// Unknown keys pass: in an upgrade the plugin may be newer than the daemon.
		if err := json.NewDecoder(http.MaxBytesReader(nil, r.Body, maxBody)).Decode(&e); err != nil {
			return nil, Errorf(http.StatusBadRequest, "decode the endpoint: %v", err)
		}
		if id, ifname := r.PathValue("containerID"), r.PathValue("ifname"); e.ContainerID != id || e.PodIfname != ifname {
			return nil, Errorf(http.StatusBadRequest, "the endpoint is %s/%s, but the path says %s/%s", e.ContainerID, e.PodIfname, id, ifname)
		}
		e, err := d.AddEndpoint(e)
		return EndpointOf(e), err
	})
	mux.HandleFunc("DELETE /v1/endpoints/{containerID}/{ifname}", func(w http.ResponseWriter, r *http.Request) {
		if err := d.DeleteEndpoint(r.PathValue("containerID"), r.PathValue("ifname")); err != nil {
			writeError(w, err)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("GET /v1/events", func(w http.ResponseWriter, r *http.Request) { serveEvents(stop, w, r, d) })
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, Errorf(http.StatusNotFound, "%s %s is not part of this mooringd's API: are client and daemon of the same version?", r.Method, r.URL.Path))
	})
	return mux
}

// EndpointOf is the row of `mooring endpoint list` for an endpoint.
func EndpointOf(e model.Endpoint) Endpoint {
	return Endpoint{
		ID: e.ID, ContainerID: e.ContainerID, Ifname: e.PodIfname,
		Namespace: e.Pod.Namespace, Pod: e.Pod.Name, IPs: list[netip.Addr](e.IPs),
		Interface: e.Interface, MAC: e.MAC, Netns: e.Netns,
	}
}

// list makes an empty list print as [] rather than null.
func list[E any](s []E) []E {
	if s == nil {
		return []E{}
	}
	return s
}

// serveConnections streams the table as one JSON array, a row a line: half a
// million rows take no more memory than one. An error after the first row
// leaves the array open and stands in the trailer.
func serveConnections(stop context.Context, w http.ResponseWriter, r *http.Request, d Daemon) {
	filter, err := parseFilter(r.URL.Query())
	if err != nil {
		writeError(w, err)
		return
	}
	out := bufio.NewWriterSize(w, 1<<16)
	encode := json.NewEncoder(out)
	begun := false
	begin := func() {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Trailer", trailerError)
		out.WriteByte('[')
		begun = true
	}
	err = d.Connections(filter, func(c Connection) bool {
		if !begun {
			begin()
		} else {
			out.WriteByte(',')
		}
		return encode.Encode(c) == nil && stop.Err() == nil && r.Context().Err() == nil
	})
	if err == nil && stop.Err() != nil {
		err = errors.New("mooringd is stopping")
	}
	if err != nil && !begun {
		writeError(w, err)
		return
	}
	if !begun {
		begin()
	}
	if err != nil {
		out.Flush()
		w.Header().Set(trailerError, err.Error())
		return
	}
	out.WriteString("]\n")
	out.Flush()
}

// serveEvents streams events, a JSON object a line. What comes in a burst goes
// out in one write.
func serveEvents(stop context.Context, w http.ResponseWriter, r *http.Request, d Daemon) {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(stop, cancel)()
	events, err := d.Events(ctx)
	if err != nil {
		writeError(w, err)
		return
	}
	// The source must never wait for a client that is gone.
	defer func() {
		cancel()
		for range events {
		}
	}()
	w.Header().Set("Content-Type", "application/x-ndjson")
	flush := http.NewResponseController(w)
	if err := flush.Flush(); err != nil {
		return
	}
	out := bufio.NewWriterSize(w, 1<<16)
	encode := json.NewEncoder(out)
	for e := range events {
		if encode.Encode(e) != nil {
			return
		}
		if len(events) > 0 {
			continue
		}
		if out.Flush() != nil || flush.Flush() != nil {
			return
		}
	}
}

func writeError(w http.ResponseWriter, err error) {
	code := http.StatusInternalServerError
	var status *StatusError
	if errors.As(err, &status) {
		code = status.Code
	}
	writeJSON(w, code, Error{Message: err.Error()})
}

func writeJSON(w http.ResponseWriter, code int, value any) {
	body, err := json.Marshal(value)
	if err != nil {
		code, body = http.StatusInternalServerError, []byte(`{"error":"encode the answer"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	w.Write(append(body, '\n'))
}

// drain reads a body to its end, so that its trailer is there.
func drain(r io.Reader) { io.Copy(io.Discard, io.LimitReader(r, maxBody)) }
