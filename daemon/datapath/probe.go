// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/daemon/model"
	"github.com/mooring-cni/mooring/daemon/policy"
)

func hasPorts(p model.Protocol) bool {
	return p == model.TCP || p == model.UDP || p == model.SCTP
}

// probe makes the first packet of a flow: a SYN, an empty datagram, an INIT's
// header, an echo request. It leaves the pod, or comes to it.
func probe(q policy.Query, port uint16, podMAC, hostMAC [6]byte, leaves bool) []byte {
	var frame []byte
	if leaves {
		frame = append(append(frame, hostMAC[:]...), podMAC[:]...)
	} else {
		frame = append(append(frame, podMAC[:]...), hostMAC[:]...)
	}
	body := probeBody(q, port)
	sum := pseudoSum(q.From, q.To, q.Protocol, len(body))
	switch q.Protocol {
	case model.TCP:
		binary.BigEndian.PutUint16(body[16:], checksum(sum, body))
	case model.UDP:
		binary.BigEndian.PutUint16(body[6:], checksum(sum, body))
	case model.ICMP:
		binary.BigEndian.PutUint16(body[2:], checksum(0, body))
	case model.ICMPv6:
		binary.BigEndian.PutUint16(body[2:], checksum(sum, body))
	}
	if q.From.Is4() {
		frame = binary.BigEndian.AppendUint16(frame, unix.ETH_P_IP)
		ip := make([]byte, 20)
		ip[0], ip[8], ip[9] = 0x45, 64, uint8(q.Protocol)
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(body)))
		copy(ip[12:], q.From.AsSlice())
		copy(ip[16:], q.To.AsSlice())
		binary.BigEndian.PutUint16(ip[10:], checksum(0, ip))
		return append(append(frame, ip...), body...)
	}
	frame = binary.BigEndian.AppendUint16(frame, unix.ETH_P_IPV6)
	ip := make([]byte, 40)
	ip[0], ip[6], ip[7] = 0x60, uint8(q.Protocol), 64
	binary.BigEndian.PutUint16(ip[4:], uint16(len(body)))
	copy(ip[8:], q.From.AsSlice())
	copy(ip[24:], q.To.AsSlice())
	return append(append(frame, ip...), body...)
}

func probeBody(q policy.Query, port uint16) []byte {
	ports := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, port), q.Port)
	switch q.Protocol {
	case model.TCP:
		body := append(ports, make([]byte, 16)...)
		body[12], body[13] = 5<<4, 0x02 // five words; SYN (RFC 9293, 3.1)
		binary.BigEndian.PutUint16(body[14:], 65535)
		return body
	case model.UDP:
		return append(ports, 0, 8, 0, 0)
	case model.SCTP:
		return append(ports, make([]byte, 8)...)
	}
	body := make([]byte, 8)
	body[0] = 8 // echo request (RFC 792)
	if q.Protocol == model.ICMPv6 {
		body[0] = 128 // RFC 4443, 4.1
	}
	binary.BigEndian.PutUint16(body[4:], port)
	return body
}

func pseudoSum(from, to netip.Addr, protocol model.Protocol, length int) uint32 {
	return sum16(sum16(uint32(protocol)+uint32(length), from.AsSlice()), to.AsSlice())
}

func sum16(sum uint32, b []byte) uint32 {
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	return sum
}

// checksum is RFC 1071's, over an even number of bytes.
func checksum(sum uint32, b []byte) uint16 {
	sum = sum16(sum, b)
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
