// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"

	"golang.org/x/sys/unix"
)

// Server answers in a namespace until the test ends or Close is called.
type Server struct {
	Addr  net.Addr
	close func()
}

// Close ends the server and its connections.
func (s *Server) Close() { s.close() }

func serve(t T, addr net.Addr, closing func()) *Server {
	s := &Server{Addr: addr, close: sync.OnceFunc(closing)}
	t.Cleanup(s.Close)
	return s
}

// HTTPEcho answers every HTTP request with the server's name, the method and
// path, and the client's address as the server sees it, separated by spaces.
func HTTPEcho(t T, n *NS, address, name string) *Server {
	t.Helper()
	return HTTP(t, n, address, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, name, r.Method, r.URL.Path, r.RemoteAddr)
	}))
}

// HTTP serves a handler.
func HTTP(t T, n *NS, address string, handler http.Handler) *Server {
	t.Helper()
	l, err := n.Listen("tcp", address)
	if err != nil {
		t.Fatalf("HTTP server in %s: %v", n.name, err)
	}
	server := &http.Server{Handler: handler}
	go server.Serve(l)
	return serve(t, l.Addr(), func() { server.Close() })
}

// TCPEcho sends back what it receives, until the client has finished.
func TCPEcho(t T, n *NS, address string) *Server {
	t.Helper()
	return TCP(t, n, address, func(c net.Conn) { io.Copy(c, c) })
}

// TCP calls a handler for each connection, and closes it after.
func TCP(t T, n *NS, address string, handler func(net.Conn)) *Server {
	t.Helper()
	l, err := n.Listen("tcp", address)
	if err != nil {
		t.Fatalf("TCP server in %s: %v", n.name, err)
	}
	var mutex sync.Mutex
	open := map[net.Conn]bool{}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mutex.Lock()
			open[c] = true
			mutex.Unlock()
			go func() {
				handler(c)
				mutex.Lock()
				delete(open, c)
				mutex.Unlock()
				c.Close()
			}()
		}
	}()
	return serve(t, l.Addr(), func() {
		l.Close()
		mutex.Lock()
		defer mutex.Unlock()
		for c := range open {
			c.Close()
		}
	})
}

// UDPEcho sends each datagram back to its sender.
func UDPEcho(t T, n *NS, address string) *Server {
	t.Helper()
	return UDP(t, n, address, func(request []byte, _ net.Addr) []byte { return request })
}

// UDP answers each datagram with what the handler returns, if anything, from
// the address that it was sent to.
func UDP(t T, n *NS, address string, handler func(request []byte, from net.Addr) []byte) *Server {
	t.Helper()
	packets, err := n.ListenPacket("udp", address)
	if err != nil {
		t.Fatalf("UDP server in %s: %v", n.name, err)
	}
	c := packets.(*net.UDPConn)
	t.Cleanup(func() { c.Close() })
	if err := receiveDestination(c); err != nil {
		t.Fatalf("UDP server in %s: %v", n.name, err)
	}
	go func() {
		buffer, control := make([]byte, 1<<16), make([]byte, 128)
		for {
			size, controlSize, _, from, err := c.ReadMsgUDP(buffer, control)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // an ICMP error about an answer
				continue
			}
			if answer := handler(buffer[:size], from); answer != nil {
				c.WriteMsgUDP(answer, sameSource(control[:controlSize]), from)
			}
		}
	}()
	return serve(t, c.LocalAddr(), func() { c.Close() })
}

// receiveDestination makes the socket tell where each datagram was sent to. A
// dual-stack socket tells it in the IPv6 way for both families.
func receiveDestination(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		if failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1); failed != nil {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		}
	})
	return errors.Join(err, failed)
}

// sameSource turns the control message of a datagram into that of its answer.
func sameSource(received []byte) []byte {
	messages, err := unix.ParseSocketControlMessage(received)
	if err != nil || len(messages) == 0 {
		return nil
	}
	switch m := messages[0]; m.Header.Type {
	case unix.IP_PKTINFO: // struct in_pktinfo: interface, local address, destination
		return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: [4]byte(m.Data[4:8])})
	case unix.IPV6_PKTINFO: // struct in6_pktinfo: destination, interface
		info := &unix.Inet6Pktinfo{Addr: [16]byte(m.Data[:16])}
		if info.Addr[0] == 0xfe { // a link-local address is one only with its link
			info.Ifindex = binary.NativeEndian.Uint32(m.Data[16:20])
		}
		return unix.PktInfo6(info)
	}
	return nil
}
