// SPDX-License-Identifier: Apache-2.0

// Package packet tests the datapath a packet at a time: it builds frames, runs
// them through the loaded programs, and reads back what came of them.
//
//	n := packet.NewNode(t)             // the datapath, in a namespace of its own
//	client, web := n.Pod(t), n.Pod(t)  // veths, addresses, the programs attached
//	n.Service(t, packet.TCP, vip, web.At(v6, 8080))
//	out := n.From(t, client, packet.Segment(client.At(v6, 4000), vip, packet.SYN))
//
// frame.go builds and reads frames, node.go is the node with its pods and
// services, run.go runs programs. A chain of runs is a packet's life.
package packet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// Protocols, as IPv4 and IPv6 number them.
const (
	ICMP   = 1
	TCP    = 6
	UDP    = 17
	ICMPv6 = 58

	HopByHop    = 0
	Routing     = 43
	Fragment    = 44
	NoNext      = 59
	Destination = 60
)

// TCP flags.
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
)

// ICMP types and codes that the tests speak of.
const (
	EchoReply     = 0
	Unreachable   = 3
	Echo          = 8
	TimeExceeded  = 11
	PortCode      = 3
	FragNeeded    = 4
	EchoReply6    = 129
	Unreachable6  = 1
	PacketTooBig6 = 2
	TimeExceeded6 = 3
	Echo6         = 128
	PortCode6     = 4
)

// MAC is an Ethernet address.
type MAC [6]byte

// Extension is an IPv6 extension header: its options, without the two bytes
// that name the next header and its length. They are padded to 8 bytes.
type Extension struct {
	Header uint8
	Data   []byte
}

// Packet is a frame in its parts. The zero of each field is what one would
// expect of an ordinary packet; checksums and lengths are always right.
type Packet struct {
	From, To   MAC
	VLAN       uint16 // with an 802.1Q tag
	Src, Dst   netip.AddrPort
	Proto      uint8
	TTL        uint8  // 0: 64
	ID         uint32 // of a fragment
	Offset     int    // of a fragment, in bytes
	More       bool   // not the last fragment
	Extensions []Extension
	Options    []byte // of the IPv4 header, a multiple of 4

	Flags    uint8 // TCP
	Seq, Ack uint32
	NoSum    bool // UDP without a checksum

	Type, Code uint8  // ICMP
	Rest       uint32 // of the ICMP header; an echo's identifier is Src's port

	Payload []byte
}

// Is6 says whether it is an IPv6 packet.
func (p Packet) Is6() bool { return p.Dst.Addr().Is6() }

func (p Packet) fragment() bool { return p.Offset != 0 || p.More }

func sum(s uint32, b []byte) uint32 {
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(b[0])<<8 | uint32(b[1])
		s = s&0xffff + s>>16
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s&0xffff + s>>16
}

func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}

// pseudo is the sum of the pseudo header (RFC 793, 3.1; RFC 8200, 8.1).
func pseudo(src, dst netip.Addr, proto uint8, length int) uint32 {
	s := sum(0, src.AsSlice())
	s = sum(s, dst.AsSlice())
	return s + uint32(proto) + uint32(length)&0xffff + uint32(length)>>16
}

// layer4 is the transport header and its payload, with the checksum.
func (p Packet) layer4() []byte {
	be := binary.BigEndian
	var h []byte
	var check int
	switch p.Proto {
	case TCP:
		h, check = make([]byte, 20), 16
		be.PutUint16(h[0:], p.Src.Port())
		be.PutUint16(h[2:], p.Dst.Port())
		be.PutUint32(h[4:], p.Seq)
		be.PutUint32(h[8:], p.Ack)
		h[12], h[13] = 5<<4, p.Flags
		be.PutUint16(h[14:], 65535)
	case UDP:
		h, check = make([]byte, 8), 6
		be.PutUint16(h[0:], p.Src.Port())
		be.PutUint16(h[2:], p.Dst.Port())
		be.PutUint16(h[4:], uint16(8+len(p.Payload)))
	case ICMP, ICMPv6:
		h, check = make([]byte, 8), 2
		h[0], h[1] = p.Type, p.Code
		be.PutUint32(h[4:], p.Rest)
		if p.echo() {
			be.PutUint16(h[4:], p.Src.Port())
		}
	default:
		return p.Payload
	}
	all := append(h, p.Payload...)
	var s uint32
	if p.Proto != ICMP {
		s = pseudo(p.Src.Addr(), p.Dst.Addr(), p.Proto, len(all))
	}
	c := fold(sum(s, all))
	if p.Proto == UDP && c == 0 {
		c = 0xffff
	}
	if !p.NoSum {
		be.PutUint16(all[check:], c)
	}
	return all
}

func (p Packet) echo() bool {
	return p.Proto == ICMP && (p.Type == Echo || p.Type == EchoReply) ||
		p.Proto == ICMPv6 && (p.Type == Echo6 || p.Type == EchoReply6)
}

// Bytes is the frame.
func (p Packet) Bytes() []byte {
	if p.fragment() {
		return p.frame(p.Payload)
	}
	return p.frame(p.layer4())
}

// Layer3 is the packet without its Ethernet header.
func (p Packet) Layer3() []byte {
	f := p.Bytes()
	if p.VLAN != 0 {
		return f[18:]
	}
	return f[14:]
}

func (p Packet) frame(layer4 []byte) []byte {
	be := binary.BigEndian
	var f []byte
	f = append(f, p.To[:]...)
	f = append(f, p.From[:]...)
	if p.VLAN != 0 {
		f = append(f, 0x81, 0, byte(p.VLAN>>8), byte(p.VLAN))
	}
	ttl := p.TTL
	if ttl == 0 {
		ttl = 64
	}
	if !p.Is6() {
		f = append(f, 8, 0)
		h := append(make([]byte, 20), p.Options...)
		h[0] = 4<<4 | byte(len(h)/4)
		be.PutUint16(h[2:], uint16(len(h)+len(layer4)))
		be.PutUint16(h[4:], uint16(p.ID))
		if p.fragment() {
			frag := uint16(p.Offset / 8)
			if p.More {
				frag |= 0x2000
			}
			be.PutUint16(h[6:], frag)
		} else if p.ID == 0 {
			be.PutUint16(h[6:], 0x4000)
		}
		h[8], h[9] = ttl, p.Proto
		copy(h[12:], p.Src.Addr().AsSlice())
		copy(h[16:], p.Dst.Addr().AsSlice())
		be.PutUint16(h[10:], fold(sum(0, h)))
		return append(append(f, h...), layer4...)
	}
	f = append(f, 0x86, 0xdd)
	extensions := p.Extensions
	if p.fragment() {
		extensions = append(extensions[:len(extensions):len(extensions)], Extension{Header: Fragment})
	}
	next := p.Proto
	var chain []byte
	for i := len(extensions) - 1; i >= 0; i-- {
		e := extensions[i]
		h := append([]byte{next, 0}, e.Data...)
		for len(h)%8 != 0 {
			h = append(h, 0)
		}
		if e.Header == Fragment {
			be.PutUint16(h[2:], uint16(p.Offset))
			if p.More {
				h[3] |= 1
			}
			be.PutUint32(h[4:], p.ID)
		} else {
			h[1] = byte(len(h)/8 - 1)
		}
		chain = append(h, chain...)
		next = e.Header
	}
	h := make([]byte, 40)
	h[0] = 6 << 4
	be.PutUint16(h[4:], uint16(len(chain)+len(layer4)))
	h[6], h[7] = next, ttl
	copy(h[8:], p.Src.Addr().AsSlice())
	copy(h[24:], p.Dst.Addr().AsSlice())
	return append(append(append(f, h...), chain...), layer4...)
}

// Fragments cuts the packet into fragments of at most size bytes of layer 4 each.
func (p Packet) Fragments(id uint32, size int) (fragments []Packet) {
	whole := p.layer4()
	size &^= 7
	for at := 0; at < len(whole); at += size {
		f := p
		f.ID, f.Offset = id, at
		f.Payload = whole[at:min(at+size, len(whole))]
		f.More = at+size < len(whole)
		fragments = append(fragments, f)
	}
	return fragments
}

// Quote is the ICMP error about a packet: its header and n bytes of what follows.
func Quote(from netip.Addr, typ, code uint8, rest uint32, about Packet, n int) Packet {
	quoted := about.Layer3()
	header := 20 + len(about.Options)
	proto := uint8(ICMP)
	if about.Is6() {
		header, proto = 40, ICMPv6
		for _, e := range about.Extensions {
			header += (len(e.Data) + 9) / 8 * 8
		}
	}
	return Packet{
		Src: netip.AddrPortFrom(from, 0), Dst: netip.AddrPortFrom(about.Src.Addr(), 0),
		Proto: proto, Type: typ, Code: code, Rest: rest,
		Payload: quoted[:min(len(quoted), header+n)],
	}
}

// Read takes a frame apart; an error says which length or checksum is wrong.
func Read(f []byte) (Packet, error) {
	var p Packet
	if len(f) < 14 {
		return p, errors.New("shorter than an Ethernet header")
	}
	copy(p.To[:], f)
	copy(p.From[:], f[6:])
	ethertype := binary.BigEndian.Uint16(f[12:])
	f = f[14:]
	if ethertype == 0x8100 && len(f) >= 4 {
		p.VLAN = binary.BigEndian.Uint16(f)
		ethertype = binary.BigEndian.Uint16(f[2:])
		f = f[4:]
	}
	switch ethertype {
	case 0x0800, 0x86dd:
		return p, p.read(f, true)
	}
	return p, fmt.Errorf("ethertype %#04x is not read", ethertype)
}

// Quoted reads the packet that an ICMP error quotes. What was cut off is not
// missed; the IPv4 header's checksum is verified, that of layer 4 is not.
func (p Packet) Quoted() (Packet, error) {
	var q Packet
	return q, q.read(p.Payload, false)
}

func (p *Packet) read(b []byte, whole bool) error {
	be := binary.BigEndian
	if len(b) < 20 {
		return errors.New("shorter than an IP header")
	}
	var src, dst netip.Addr
	var length int
	switch b[0] >> 4 {
	case 4:
		header := int(b[0]&15) * 4
		length = int(be.Uint16(b[2:]))
		if header < 20 || header > len(b) || length < header {
			return fmt.Errorf("IPv4 header of %d bytes in %d", header, len(b))
		}
		if s := fold(sum(0, b[:header])); s != 0 {
			return fmt.Errorf("IPv4 header checksum %#04x is off by %#04x", be.Uint16(b[10:]), s)
		}
		if frag := be.Uint16(b[6:]); frag&0x3fff != 0 {
			p.Offset, p.More = int(frag&0x1fff)*8, frag&0x2000 != 0
		}
		p.ID = uint32(be.Uint16(b[4:]))
		p.TTL, p.Proto = b[8], b[9]
		src, dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		if header > 20 {
			p.Options = b[20:header]
		}
		if whole && length > len(b) {
			return fmt.Errorf("IPv4 length %d in %d bytes", length, len(b))
		}
		b = b[header:min(length, len(b))]
		length -= header
	case 6:
		if len(b) < 40 {
			return errors.New("shorter than an IPv6 header")
		}
		length = int(be.Uint16(b[4:]))
		if whole && length+40 > len(b) {
			return fmt.Errorf("IPv6 payload length %d in %d bytes", length, len(b)-40)
		}
		p.TTL = b[7]
		src, dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		next := b[6]
		b = b[40:min(len(b), 40+length)]
		for next == HopByHop || next == Routing || next == Destination || next == Fragment {
			if len(b) < 8 {
				return errors.New("IPv6 extension headers are cut off")
			}
			size := int(b[1]+1) * 8
			if next == Fragment {
				size = 8
				p.Offset, p.More, p.ID = int(be.Uint16(b[2:])&^7), b[3]&1 != 0, be.Uint32(b[4:])
			} else if size > len(b) {
				return errors.New("IPv6 extension headers are cut off")
			} else {
				p.Extensions = append(p.Extensions, Extension{next, b[2:size]})
			}
			next = b[0]
			b = b[size:]
			length -= size
		}
		p.Proto = next
	default:
		return fmt.Errorf("IP version %d", b[0]>>4)
	}
	p.Src, p.Dst = netip.AddrPortFrom(src, 0), netip.AddrPortFrom(dst, 0)
	p.Payload = b
	if p.fragment() {
		// Ports are the first fragment's; its checksum is that of the whole.
		if p.Offset == 0 && len(b) >= 4 && (p.Proto == TCP || p.Proto == UDP) {
			p.ports(b)
		}
		return nil
	}
	return p.read4(b, length, whole)
}

func (p *Packet) ports(b []byte) {
	p.Src = netip.AddrPortFrom(p.Src.Addr(), binary.BigEndian.Uint16(b))
	p.Dst = netip.AddrPortFrom(p.Dst.Addr(), binary.BigEndian.Uint16(b[2:]))
}

func (p *Packet) read4(b []byte, length int, whole bool) error {
	be := binary.BigEndian
	header := map[uint8]int{TCP: 20, UDP: 8, ICMP: 8, ICMPv6: 8}[p.Proto]
	if header == 0 {
		return nil
	}
	if len(b) < 8 || whole && len(b) < header {
		return fmt.Errorf("layer 4 of protocol %d is cut off after %d bytes", p.Proto, len(b))
	}
	var s uint32
	if p.Proto != ICMP {
		s = pseudo(p.Src.Addr(), p.Dst.Addr(), p.Proto, length)
	}
	switch p.Proto {
	case TCP:
		p.ports(b)
		p.Seq = be.Uint32(b[4:])
		if len(b) < 20 {
			return nil
		}
		p.Ack, p.Flags = be.Uint32(b[8:]), b[13]
		header = int(b[12]>>4) * 4
		if header < 20 || header > len(b) {
			return fmt.Errorf("TCP header of %d bytes in %d", header, len(b))
		}
	case UDP:
		p.ports(b)
		p.NoSum = be.Uint16(b[6:]) == 0
		if whole && int(be.Uint16(b[4:])) != len(b) {
			return fmt.Errorf("UDP length %d in %d bytes", be.Uint16(b[4:]), len(b))
		}
	case ICMP, ICMPv6:
		p.Type, p.Code, p.Rest = b[0], b[1], be.Uint32(b[4:])
		if p.echo() {
			p.Src = netip.AddrPortFrom(p.Src.Addr(), be.Uint16(b[4:]))
			p.Dst = netip.AddrPortFrom(p.Dst.Addr(), be.Uint16(b[4:]))
		}
	}
	p.Payload = b[header:]
	if p.Proto == UDP && p.NoSum || !whole {
		return nil
	}
	if off := fold(sum(s, b)); off != 0 {
		return fmt.Errorf("checksum of protocol %d is off by %#04x", p.Proto, off)
	}
	return nil
}

// Segment is a TCP segment.
func Segment(src, dst netip.AddrPort, flags uint8) Packet {
	return Packet{Src: src, Dst: dst, Proto: TCP, Flags: flags, Seq: 1000, Ack: 2000}
}

// Datagram is a UDP datagram.
func Datagram(src, dst netip.AddrPort, payload string) Packet {
	return Packet{Src: src, Dst: dst, Proto: UDP, Payload: []byte(payload)}
}

// Ping is an echo request with an identifier.
func Ping(src, dst netip.Addr, id uint16) Packet {
	p := Packet{
		Src: netip.AddrPortFrom(src, id), Dst: netip.AddrPortFrom(dst, id),
		Proto: ICMP, Type: Echo, Payload: []byte("ping"),
	}
	if dst.Is6() {
		p.Proto, p.Type = ICMPv6, Echo6
	}
	return p
}

// Pong is the answer to an echo request.
func Pong(request Packet) Packet {
	request.Src, request.Dst = request.Dst, request.Src
	request.Type = EchoReply
	if request.Is6() {
		request.Type = EchoReply6
	}
	return request
}
