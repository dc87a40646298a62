// SPDX-License-Identifier: Apache-2.0

// Command app is what containers run in the tests.
//
//	app serve [-grace 0s] [-port 8080] [-udp 8053]  HTTP and UDP echo that say who answers; after SIGTERM until nobody has asked for the grace
//	app get URL                                      one request, 20 s at most
//	app udp HOST:PORT                                one datagram and its answer, 20 s at most
//	app load [-until FILE] URL                       requests one after another, each on a connection of its own; counts failures
//	app hold [-until FILE] HOST:PORT                 one connection to /hold that must stay; a line a second
//	app touch FILE                                   makes the file that load and hold end at; without one they last 10 s, with one 30 minutes at most
//	app addresses                                    the pod's own, one a line
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long an answer may take on a busy machine.
const patience = 20 * time.Second

func main() {
	if len(os.Args) < 2 {
		fail("usage: app serve|get|udp|load|hold|touch|addresses")
	}
	flags := flag.NewFlagSet("app "+os.Args[1], flag.ExitOnError)
	grace := flags.Duration("grace", 0, "after SIGTERM serve until nobody has asked for so long")
	port := flags.Int("port", 8080, "of HTTP")
	udp := flags.Int("udp", 8053, "of the UDP echo")
	until := flags.String("until", "", "go on until this file is there")
	flags.Parse(os.Args[2:])

	var err error
	switch os.Args[1] {
	case "serve":
		err = serve(*grace, *port, *udp)
	case "get":
		err = get(flags.Arg(0))
	case "udp":
		err = askUDP(flags.Arg(0))
	case "load":
		err = load(flags.Arg(0), enough(*until))
	case "hold":
		err = hold(flags.Arg(0), enough(*until))
	case "touch":
		err = os.WriteFile(flags.Arg(0), nil, 0o644)
	case "addresses":
		err = addresses()
	default:
		err = fmt.Errorf("no such command: %q", os.Args[1])
	}
	if err != nil {
		fail(err.Error())
	}
}

func fail(message string) {
	fmt.Fprintln(os.Stderr, "app:", message)
	os.Exit(1)
}

func serve(grace time.Duration, port, udp int) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	var asked atomic.Int64 // when a client was heard last
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.UserAgent(), "kube-probe/") {
			asked.Store(time.Now().UnixNano())
		}
		fmt.Fprintf(w, "%s %s\n", host, r.RemoteAddr)
	})
	// A line a second on a connection that lasts.
	mux.HandleFunc("/hold", func(w http.ResponseWriter, r *http.Request) {
		for {
			if _, err := fmt.Fprintln(w, host); err != nil {
				return
			}
			w.(http.Flusher).Flush()
			select {
			case <-time.After(time.Second):
			case <-r.Context().Done():
				return
			}
		}
	})
	echo, err := net.ListenPacket("udp", ":"+strconv.Itoa(udp))
	if err != nil {
		return err
	}
	go func() {
		packet := make([]byte, 1500)
		for {
			n, from, err := echo.ReadFrom(packet)
			if err != nil {
				return
			}
			echo.WriteTo(fmt.Appendf(nil, "%s %s %s", host, from, packet[:n]), from)
		}
	}()

	server := &http.Server{Addr: ":" + strconv.Itoa(port), Handler: mux}
	stop, cancel := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer cancel()
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-stop.Done()
		told := time.Now()
		// As a careful server does: it goes on until all know that it is leaving. How
		// long the news takes on a busy machine nobody can say beforehand. A connection
		// that waits to be accepted when the listener closes would be reset.
		for quiet := time.Duration(0); quiet < grace; quiet = time.Since(later(told, time.Unix(0, asked.Load()))) {
			time.Sleep(grace - quiet)
		}
		finish, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		server.Shutdown(finish)
	}()
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	<-stopped
	return nil
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// client makes a connection for every request.
func client() *http.Client {
	return &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
}

func get(url string) error {
	r, err := client().Get(url)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		return fmt.Errorf("get %s: %s", url, r.Status)
	}
	_, err = io.Copy(os.Stdout, r.Body)
	return err
}

func askUDP(address string) error {
	c, err := net.Dial("udp", address)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("question")); err != nil {
		return err
	}
	packet := make([]byte, 1500)
	n, err := c.Read(packet)
	if err != nil {
		return fmt.Errorf("wait for an answer from %s: %w", address, err)
	}
	fmt.Println(string(packet[:n]))
	return nil
}

// enough says when it is time to end: after 10 s, or when the file is there.
func enough(file string) func() bool {
	limit := 10 * time.Second
	if file != "" {
		limit = 30 * time.Minute // whoever was to make the file has died
	}
	end := time.Now().Add(limit)
	return func() bool {
		if file != "" {
			if _, err := os.Stat(file); err == nil {
				return true
			}
		}
		return time.Now().After(end)
	}
}

func load(url string, enough func() bool) error {
	done, failed := 0, 0
	for ; !enough(); time.Sleep(5 * time.Millisecond) {
		done++
		r, err := client().Get(url)
		if err == nil {
			_, err = io.Copy(io.Discard, r.Body)
			r.Body.Close()
		}
		if err != nil {
			failed++
			fmt.Printf("%s request %d: %v\n", time.Now().Format(time.RFC3339Nano), done, err)
		}
		if done == 1 {
			fmt.Println("begun")
		}
	}
	fmt.Printf("requests %d failed %d\n", done, failed)
	if failed > 0 {
		return fmt.Errorf("%d of %d requests failed", failed, done)
	}
	return nil
}

func hold(address string, enough func() bool) error {
	c, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, "GET /hold HTTP/1.1\r\nHost: %s\r\n\r\n", address); err != nil {
		return err
	}
	lines := bufio.NewScanner(c)
	for n := 0; !enough(); n++ {
		c.SetReadDeadline(time.Now().Add(2 * patience))
		if !lines.Scan() {
			return fmt.Errorf("the connection to %s ended after %d lines: %v", address, n, lines.Err())
		}
		if n == 0 {
			fmt.Println("begun")
		}
	}
	fmt.Println("held")
	return nil
}

func addresses() error {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	for _, a := range all {
		if p, ok := a.(*net.IPNet); ok && p.IP.IsGlobalUnicast() {
			fmt.Println(p.IP)
		}
	}
	return nil
}
