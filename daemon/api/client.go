// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/mooring-cni/mooring/daemon/model"
)

// Client talks to the daemon on one machine's socket. It is safe for
// concurrent use. How long a call may take is the context's matter.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient makes a client; it connects when it is used.
func NewClient(socket string) *Client {
	c := &Client{socket: socket}
	c.http = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
			if err != nil && ctx.Err() == nil {
				err = &NotRunningError{Socket: socket, Err: err}
			}
			return conn, err
		},
		DisableCompression: true,
	}}
	return c
}

// Close gives up idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Node says what the plugin needs to know before it makes anything.
func (c *Client) Node(ctx context.Context) (n Node, err error) {
	return n, c.call(ctx, "GET", "/v1/node", nil, &n)
}

// Status is what `mooring status` shows.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.call(ctx, "GET", "/v1/status", nil, &s)
}

// ConntrackStats is what `mooring ct stats` shows.
func (c *Client) ConntrackStats(ctx context.Context) (s ConntrackStats, err error) {
	return s, c.call(ctx, "GET", "/v1/conntrack/stats", nil, &s)
}

// FlushConntrack forgets all connections and says how many entries there were.
func (c *Client) FlushConntrack(ctx context.Context) (deleted uint64, err error) {
	var f Flushed
	err = c.call(ctx, "DELETE", "/v1/conntrack", nil, &f)
	return f.Deleted, err
}

// Services lists the services with their frontends and backends.
func (c *Client) Services(ctx context.Context) (s []Service, err error) {
	return s, c.call(ctx, "GET", "/v1/services", nil, &s)
}

// Policies lists the policies in the order in which they are evaluated.
func (c *Client) Policies(ctx context.Context) (p []Policy, err error) {
	return p, c.call(ctx, "GET", "/v1/policies", nil, &p)
}

// ExplainPolicy tells whether a flow may begin, and why.
func (c *Client) ExplainPolicy(ctx context.Context, q PolicyQuestion) (x Explanation, err error) {
	query := url.Values{"from": {q.From}, "to": {q.To}, "protocol": {q.Protocol}, "port": {strconv.Itoa(int(q.Port))}}
	return x, c.call(ctx, "GET", "/v1/policies/explain?"+query.Encode(), nil, &x)
}

// Endpoints lists the pods' interfaces of this node.
func (c *Client) Endpoints(ctx context.Context) (e []Endpoint, err error) {
	return e, c.call(ctx, "GET", "/v1/endpoints", nil, &e)
}

// Attachments lists the endpoints with all that the plugin told of them.
func (c *Client) Attachments(ctx context.Context) (e []model.Endpoint, err error) {
	return e, c.call(ctx, "GET", "/v1/attachments", nil, &e)
}

// AddEndpoint makes an endpoint known. The same again answers the same.
func (c *Client) AddEndpoint(ctx context.Context, e model.Endpoint) (answer Endpoint, err error) {
	return answer, c.call(ctx, "PUT", endpointPath(e.ContainerID, e.PodIfname), e, &answer)
}

// DeleteEndpoint makes an endpoint and all its entries go. That it is not
// known is no error.
func (c *Client) DeleteEndpoint(ctx context.Context, containerID, ifname string) error {
	return c.call(ctx, "DELETE", endpointPath(containerID, ifname), nil, nil)
}

func endpointPath(containerID, ifname string) string {
	return "/v1/endpoints/" + url.PathEscape(containerID) + "/" + url.PathEscape(ifname)
}

// Connections goes through the connection table as it arrives. An error is
// the last that it yields; connections before it are true, but not all.
func (c *Client) Connections(ctx context.Context, f Filter) iter.Seq2[Connection, error] {
	return func(yield func(Connection, error) bool) {
		response, err := c.do(ctx, "GET", "/v1/conntrack"+f.query(), nil)
		if err != nil {
			yield(Connection{}, err)
			return
		}
		defer response.Body.Close()
		rows := json.NewDecoder(response.Body)
		if _, err = rows.Token(); err == nil {
			for rows.More() {
				var row Connection
				if err = rows.Decode(&row); err != nil {
					break
				}
				if !yield(row, nil) {
					return
				}
			}
			if err == nil {
				_, err = rows.Token()
			}
		}
		if err != nil {
			drain(response.Body)
			if message := response.Trailer.Get(trailerError); message != "" {
				err = errors.New(message)
			}
			yield(Connection{}, c.wrap(ctx, "read the connections", err))
		}
	}
}

// Events calls f with each event as it happens until f returns an error, ctx
// is done or the daemon ends the stream, and says which it was.
func (c *Client) Events(ctx context.Context, f func(Event) error) error {
	response, err := c.do(ctx, "GET", "/v1/events", nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	lines := json.NewDecoder(response.Body)
	for {
		var e Event
		if err := lines.Decode(&e); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = errors.New("mooringd ended the stream; it was stopped or restarted")
			}
			return c.wrap(ctx, "read events", err)
		}
		if err := f(e); err != nil {
			return err
		}
	}
}

// call sends one request and decodes the answer, if one is wanted.
func (c *Client) call(ctx context.Context, method, path string, body, answer any) error {
	response, err := c.do(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if answer == nil {
		drain(response.Body)
		return nil
	}
	if err := json.NewDecoder(response.Body).Decode(answer); err != nil {
		return c.wrap(ctx, "read the answer to "+method+" "+path, err)
	}
	return nil
}

// do sends one request; an answer that is not 2xx is an error.
func (c *Client) do(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var content io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("encode %s %s: %w", method, path, err)
		}
		content = bytes.NewReader(encoded)
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://mooringd"+path, content)
	if err != nil {
		return nil, err
	}
	response, err := c.http.Do(request)
	if err != nil {
		var notRunning *NotRunningError
		if errors.As(err, &notRunning) {
			return nil, notRunning
		}
		var wrapped *url.Error
		if errors.As(err, &wrapped) {
			err = wrapped.Err
		}
		return nil, c.wrap(ctx, method+" "+path, err)
	}
	if response.StatusCode/100 == 2 {
		return response, nil
	}
	defer response.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(response.Body, maxBody))
	var e Error
	if json.Unmarshal(text, &e) != nil || e.Message == "" {
		e.Message = fmt.Sprintf("%s: %s", response.Status, strings.TrimSpace(string(text)))
	}
	return nil, &StatusError{Code: response.StatusCode, Message: e.Message}
}

// wrap names the socket in an error on the way, and a deadline for what it
// means: a daemon that is there and does not answer.
func (c *Client) wrap(ctx context.Context, doing string, err error) error {
	if cause := ctx.Err(); cause != nil {
		if errors.Is(cause, context.DeadlineExceeded) {
			return fmt.Errorf("mooringd on %s did not answer in time: %s: %w", c.socket, doing, cause)
		}
		return cause
	}
	return fmt.Errorf("mooringd on %s: %s: %w", c.socket, doing, err)
}
