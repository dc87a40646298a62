// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"encoding/binary"
	"math/bits"
	"slices"

	"github.com/mooring-cni/mooring/daemon/model"
)

// Span is a range of ports, both ends included.
type Span struct{ First, Last uint16 }

// spans are ports as sorted ranges with gaps between them.
type spans []Span

var everyPort = spans{{0, 65535}}

func (s spans) union(o spans) spans {
	if len(s) == 0 {
		return o
	}
	if len(o) == 0 {
		return s
	}
	all := append(slices.Clone(s), o...)
	slices.SortFunc(all, func(a, b Span) int { return int(a.First) - int(b.First) })
	merged := all[:1]
	for _, next := range all[1:] {
		last := &merged[len(merged)-1]
		if int(next.First) <= int(last.Last)+1 {
			last.Last = max(last.Last, next.Last)
			continue
		}
		merged = append(merged, next)
	}
	return merged
}

func (s spans) intersect(o spans) spans {
	var both spans
	for i, j := 0, 0; i < len(s) && j < len(o); {
		first, last := max(s[i].First, o[j].First), min(s[i].Last, o[j].Last)
		if first <= last {
			both = append(both, Span{first, last})
		}
		if s[i].Last < o[j].Last {
			i++
		} else {
			j++
		}
	}
	return both
}

func (s spans) without(o spans) spans {
	return s.intersect(o.complement())
}

func (s spans) complement() spans {
	var gaps spans
	next := 0
	for _, span := range s {
		if next < int(span.First) {
			gaps = append(gaps, Span{uint16(next), span.First - 1})
		}
		next = int(span.Last) + 1
	}
	if next <= 65535 {
		gaps = append(gaps, Span{uint16(next), 65535})
	}
	return gaps
}

func (s spans) contains(port uint16) bool {
	return slices.ContainsFunc(s, func(span Span) bool { return span.First <= port && port <= span.Last })
}

// The protocols whose ports a policy can name; all others are told apart by
// nothing, so one answer serves them.
var portProtocols = [...]model.Protocol{model.TCP, model.UDP, model.SCTP}

const otherProtocols = len(portProtocols)

func protocolIndex(p model.Protocol) int {
	if i := slices.Index(portProtocols[:], p); i >= 0 {
		return i
	}
	return otherProtocols
}

// ports are spans of every protocol; of the other protocols it is all or none.
type ports [len(portProtocols) + 1]spans

func everything() ports {
	var p ports
	for i := range p {
		p[i] = everyPort
	}
	return p
}

func (p *ports) each(f func(i int) spans) ports {
	var r ports
	for i := range p {
		r[i] = f(i)
	}
	return r
}

func (p ports) union(o ports) ports { return p.each(func(i int) spans { return p[i].union(o[i]) }) }
func (p ports) intersect(o ports) ports {
	return p.each(func(i int) spans { return p[i].intersect(o[i]) })
}
func (p ports) without(o ports) ports { return p.each(func(i int) spans { return p[i].without(o[i]) }) }

func (p ports) contains(protocol model.Protocol, port uint16) bool {
	return p[protocolIndex(protocol)].contains(port)
}

// resolve turns a rule's ports into numbers for one destination.
func resolve(list []model.PolicyPort, declared []model.ContainerPort) ports {
	var p ports
	add := func(protocol model.Protocol, span Span) {
		i := protocolIndex(protocol)
		p[i] = p[i].union(spans{span})
	}
	for _, port := range list {
		switch {
		case port.Name != "":
			for _, d := range declared {
				if d.Name == port.Name && (port.Protocol == 0 || d.Protocol == port.Protocol) {
					add(d.Protocol, Span{d.Port, d.Port})
				}
			}
		case port.Port == 0:
			add(port.Protocol, Span{0, 65535})
		default:
			add(port.Protocol, Span{port.Port, port.EndPort})
		}
	}
	return p
}

// Profile says which ports are allowed: what the datapath looks a packet's
// protocol and destination port up in.
type Profile struct {
	allowed ports
	// Entries are longest-prefix entries; what matches none is denied.
	Entries []Entry
}

// Entry allows the ports that begin with the first Bits bits of Port. Any
// stands for every protocol; with 0 bits it is the protocol's every port.
type Entry struct {
	Any      bool
	Protocol model.Protocol
	Port     uint16
	Bits     int
	Allow    bool
}

// Allows tells what the profile says of a destination port.
func (p *Profile) Allows(protocol model.Protocol, port uint16) bool {
	return p.allowed.contains(protocol, port)
}

func newProfile(allowed ports) *Profile {
	p := &Profile{allowed: allowed}
	others := len(allowed[otherProtocols]) > 0
	if others {
		p.Entries = append(p.Entries, Entry{Any: true, Allow: true})
	}
	for i, protocol := range portProtocols {
		s := allowed[i]
		if others && slices.Equal(s, everyPort) {
			continue
		}
		if others {
			p.Entries = append(p.Entries, Entry{Protocol: protocol})
		}
		for _, span := range s {
			p.Entries = append(p.Entries, prefixes(protocol, span)...)
		}
	}
	return p
}

// prefixes cuts a range of ports into the fewest aligned blocks: at most 30.
func prefixes(protocol model.Protocol, s Span) []Entry {
	var entries []Entry
	for first, last := int(s.First), int(s.Last); first <= last; {
		size := bits.TrailingZeros(uint(first) | 1<<16)
		for first+1<<size-1 > last {
			size--
		}
		entries = append(entries, Entry{Protocol: protocol, Port: uint16(first), Bits: 16 - size, Allow: true})
		first += 1 << size
	}
	return entries
}

// content is equal for equal profiles and for no others.
func (p ports) content() string {
	b := []byte("profile")
	for _, s := range p {
		b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
		for _, span := range s {
			b = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(b, span.First), span.Last)
		}
	}
	return string(b)
}
