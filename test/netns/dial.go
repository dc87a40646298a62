// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// patience is how long clients wait: long enough for a busy machine and for a
// lost SYN, short enough for a test that expects nothing to arrive to set its own.
const patience = 5 * time.Second

// DialContext connects from inside the namespace to an address (not a name).
func (n *NS) DialContext(ctx context.Context, network, address string) (conn net.Conn, err error) {
	// A name would be resolved, and several addresses dialled, elsewhere.
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("dial from %s: %w", n.name, err)
	}
	err = n.Do(func() error {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Dial connects from inside the namespace within 5 seconds.
func (n *NS) Dial(network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return n.DialContext(ctx, network, address)
}

// Listen makes a stream listener inside the namespace.
func (n *NS) Listen(network, address string) (l net.Listener, err error) {
	err = n.Do(func() error {
		l, err = new(net.ListenConfig).Listen(context.Background(), network, address)
		return err
	})
	return l, err
}

// ListenPacket makes a packet socket inside the namespace.
func (n *NS) ListenPacket(network, address string) (c net.PacketConn, err error) {
	err = n.Do(func() error {
		c, err = new(net.ListenConfig).ListenPacket(context.Background(), network, address)
		return err
	})
	return c, err
}

// HTTPClient is a client inside the namespace; each request has a connection
// of its own.
func (n *NS) HTTPClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{DialContext: n.DialContext, DisableKeepAlives: true},
		Timeout:   patience,
	}
}

// Get sends an HTTP request from inside the namespace and returns the body.
func (n *NS) Get(url string) (string, error) {
	response, err := n.HTTPClient().Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("get %s: %s: %s", url, response.Status, body)
	}
	return string(body), err
}

// Echo sends a payload from inside the namespace by a new "tcp" or "udp"
// socket and expects the same back.
func (n *NS) Echo(network, address, payload string) error {
	conn, err := n.Dial(network, address)
	if err != nil {
		return err
	}
	defer conn.Close()
	return EchoOn(conn, payload)
}

// EchoOn sends a payload on an open connection and expects the same back.
func EchoOn(conn net.Conn, payload string) error {
	conn.SetDeadline(time.Now().Add(patience))
	defer conn.SetDeadline(time.Time{})
	// Sent beside the reading: an echo of more than the buffers hold would
	// otherwise wait for itself.
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write([]byte(payload))
		sent <- err
	}()
	got := make([]byte, len(payload))
	_, err := io.ReadFull(conn, got)
	if e := <-sent; e != nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("echo of %s: %w", conn.RemoteAddr(), err)
	}
	if !bytes.Equal(got, []byte(payload)) {
		return fmt.Errorf("echo of %s: sent %q, got %q", conn.RemoteAddr(), cut(payload), cut(string(got)))
	}
	return nil
}

func cut(s string) string {
	if len(s) > 64 {
		return s[:64] + "..."
	}
	return s
}
