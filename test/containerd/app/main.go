// SPDX-License-Identifier: Apache-2.0

// Command app is what containers run in the tests.
//
//	app serve [-grace 0s] [-port 8080] [-udp 8053]  HTTP and UDP echo that say who answers, until SIGTERM and the grace are over
//	app get URL                                      one request, 5 s at most
//	app udp HOST:PORT                                one datagram and its answer, 5 s at most
//	app load -seconds 10 URL                         requests one after another, each on a connection of its own; counts failures
//	app hold -seconds 10 HOST:PORT                   one connection to /hold that must stay; a line a second
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
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long an answer may take on a busy machine.
const patience = 5 * time.Second

func main() {
	if len(os.Args) < 2 {
		fail("usage: app serve|get|udp|load|hold|addresses")
	}
	flags := flag.NewFlagSet("app "+os.Args[1], flag.ExitOnError)
	grace := flags.Duration("grace", 0, "how long to serve after SIGTERM")
	port := flags.Int("port", 8080, "of HTTP")
	udp := flags.Int("udp", 8053, "of the UDP echo")
	seconds := flags.Int("seconds", 10, "how long")
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
		err = load(flags.Arg(0), time.Duration(*seconds)*time.Second)
	case "hold":
		err = hold(flags.Arg(0), *seconds)
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
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
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
		// As a careful server does: it goes on until all know that it is leaving.
		time.Sleep(grace)
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

func load(url string, how time.Duration) error {
	done, failed := 0, 0
	for end := time.Now().Add(how); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
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
	}
	fmt.Printf("requests %d failed %d\n", done, failed)
	if failed > 0 {
		return fmt.Errorf("%d of %d requests failed", failed, done)
	}
	return nil
}

func hold(address string, seconds int) error {
	c, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, "GET /hold HTTP/1.1\r\nHost: %s\r\n\r\n", address); err != nil {
		return err
	}
	lines := bufio.NewScanner(c)
	for end, n := time.Now().Add(time.Duration(seconds)*time.Second), 0; time.Now().Before(end); n++ {
		c.SetReadDeadline(time.Now().Add(2 * patience))
		if !lines.Scan() {
			return fmt.Errorf("the connection to %s ended after %d lines: %v", address, n, lines.Err())
		}
		if n == 0 {
			fmt.Println("connected")
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
