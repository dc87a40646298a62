// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"fmt"
	"hash/crc32"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unsafe"
)

// The journal is a text file of records, a line each:
//
//	9d8ac2d0 0 = mooring-ipam 1 000000065536
//	2ab0c3f7 1 + mooring 4f0c1d eth0 10.244.0.2 fd00:10:244::2
//	c7a11b0e 2 - mooring 4f0c1d eth0 10.244.0.2 fd00:10:244::2
//
// which is a checksum (CRC-32C of what follows it), the record's number in the
// file, what it does, and to whom. What it does is one of
//
//	=  begin: name and version of the format, size of the file
//	+  give addresses to an attachment
//	-  take an attachment's addresses back
//	~  addresses that were taken back, the longest ago first
//	@  the address of each family that was given last
//
// The last two stand only where the journal was written anew. The rest of the
// file is zeros that are on the disk already: so that writing a record changes
// no metadata and one small write makes it durable, and so that a file that
// somebody cut short is noticed.
//
// A record never crosses a sector: a disk writes a sector wholly or not at all,
// so a power loss leaves the record or zeros. A crash of the file system's own
// making can still leave the front part of a record with zeros behind it; such a
// record was not acknowledged to anybody, and is ignored. Everything else that
// does not read back is damage, and nothing is given until somebody has seen to
// it: an address given twice is worse.
const (
	sector = 512
	format = "mooring-ipam 1" // name and version
	// maxKey leaves room in a sector for the rest of a record.
	maxKey = 384
)

const (
	opBegin   = '='
	opGive    = '+'
	opTake    = '-'
	opResting = '~'
	opLast    = '@'
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// record is one line to write.
type record struct {
	op    byte
	key   Key          // of + and -
	addrs []netip.Addr // of all but =
	size  int          // of =
}

// line is one that was read. It has an attachment as Key.text writes it, and
// leaves the addresses as text: most readers look at few of them.
type line struct {
	op    byte
	key   string
	addrs string
	size  int
}

// each calls fn for the addresses of the line.
func (l line) each(fn func(netip.Addr) error) error {
	for rest := l.addrs; rest != ""; {
		var field string
		field, rest, _ = strings.Cut(rest, " ")
		addr, err := netip.ParseAddr(field)
		if err != nil || addr.Zone() != "" || addr.Is4In6() {
			return fmt.Errorf("%q is no address", field)
		}
		if err := fn(addr); err != nil {
			return err
		}
	}
	return nil
}

// state is what a journal says about addresses.
type state struct {
	used    [2]set        // by family
	resting [2]queue      // by family
	last    [2]netip.Addr // by family
}

func family(addr netip.Addr) int {
	if addr.Is4() {
		return 0
	}
	return 1
}

// apply changes the state as one address of an operation says, or says why that
// cannot be.
func (s *state) apply(op byte, addr netip.Addr) error {
	f := family(addr)
	switch op {
	case opGive:
		if !s.used[f].add(addr) {
			return fmt.Errorf("%s is given twice", addr)
		}
		s.resting[f].remove(addr)
		s.last[f] = addr
	case opTake:
		if !s.used[f].remove(addr) {
			return fmt.Errorf("%s is taken back and was not given", addr)
		}
		s.resting[f].add(addr)
	case opResting:
		if s.used[f].has(addr) {
			return fmt.Errorf("%s rests and is in use", addr)
		}
		s.resting[f].add(addr)
	case opLast:
		s.last[f] = addr
	}
	return nil
}

// appendRecord writes r as the line with that number.
func appendRecord(b []byte, number int, r record) []byte {
	start := len(b)
	b = append(b, "00000000 "...)
	b = strconv.AppendInt(b, int64(number), 10)
	b = append(b, ' ', r.op)
	switch r.op {
	case opBegin:
		b = fmt.Appendf(b, " %s %012d", format, r.size)
	case opGive, opTake:
		b = append(b, ' ')
		b = append(b, r.key.text()...)
	}
	for _, addr := range r.addrs {
		b = append(b, ' ')
		b = addr.AppendTo(b)
	}
	copy(b[start:], fmt.Appendf(nil, "%08x", crc32.Checksum(b[start+9:], castagnoli)))
	return append(b, '\n')
}

// place is where a record of n bytes goes when the one before it ends at end.
func place(end, n int) int {
	if end%sector+n > sector {
		return roundUp(end, sector)
	}
	return end
}

func roundUp(n, to int) int { return (n + to - 1) / to * to }

// damage is where and why a journal does not read back.
type damage struct {
	offset int
	reason string
}

func (d *damage) Error() string { return fmt.Sprintf("at byte %d: %s", d.offset, d.reason) }

// shape is a journal without what it says.
type shape struct {
	size    int // of the file
	end     int // of the last record
	records int
	torn    bool // the last record is not complete, or something incomplete is behind it
}

// scan calls fn for each line of a journal but the first. data must not change
// as long as the lines are in use.
func scan(data []byte, fn func(line) error) (shape, error) {
	var s shape
	text := unsafe.String(unsafe.SliceData(data), len(data))
	for p := 0; p < len(text) && !s.torn; {
		if text[p] == 0 {
			// Zeros to the end, or to a record that did not fit into this sector.
			q := roundUp(p, sector)
			if q >= len(text) || text[q] == 0 {
				q = len(text)
			}
			if i := notZero(text[p:q]); i >= 0 {
				return s, &damage{p + i, "bytes where there can be none"}
			}
			p = q
			continue
		}
		limit := min(p/sector*sector+sector, len(text))
		n := strings.IndexByte(text[p:limit], '\n')
		complete := n >= 0
		if !complete {
			if n = strings.IndexByte(text[p:limit], 0); n < 0 {
				n = limit - p
			}
			s.torn = true
		}
		l, err := parseLine(data[p:p+n], text[p:p+n], s.records)
		if err == nil && (l.op == opBegin) != (s.records == 0) {
			err = fmt.Errorf("the beginning is not at the beginning")
		}
		if !complete {
			if i := notZero(text[p+n:]); i >= 0 {
				return s, &damage{p + n + i, "bytes after the last record"}
			}
			if err != nil && s.records > 0 {
				// When all but its last byte is a record, then that was complete,
				// and what is damaged is its end.
				if _, short := parseLine(data[p:p+n-1], text[p:p+n-1], s.records); short != nil {
					break
				}
			}
		}
		if err != nil {
			return s, &damage{p, err.Error()}
		}
		if l.op == opBegin {
			s.size = l.size
		} else if err := fn(l); err != nil {
			return s, &damage{p, err.Error()}
		}
		s.records++
		s.end = p + n + 1
		p = s.end
	}
	if s.records == 0 {
		return s, &damage{0, "no beginning"}
	}
	if len(text) != s.size {
		return s, &damage{len(text), fmt.Sprintf("the file ends here and should at byte %d", s.size)}
	}
	return s, nil
}

// notZero is where s has something else than zeros, or -1.
func notZero(s string) int {
	if strings.Count(s, "\x00") == len(s) {
		return -1
	}
	return strings.IndexFunc(s, func(r rune) bool { return r != 0 })
}

// parseLine reads the line that must have that number; data and text are the same.
func parseLine(data []byte, text string, number int) (line, error) {
	if len(text) < len("00000000 0 = ") || text[8] != ' ' {
		return line{}, fmt.Errorf("no record")
	}
	sum, err := strconv.ParseUint(text[:8], 16, 32)
	if err != nil || uint32(sum) != crc32.Checksum(data[9:], castagnoli) {
		return line{}, fmt.Errorf("the checksum differs")
	}
	// From here on the line is as it was written: what is wrong now was not
	// damaged but is of another version, or not in its place.
	count, rest, _ := strings.Cut(text[9:], " ")
	if n, err := strconv.Atoi(count); err != nil || n != number {
		return line{}, fmt.Errorf("record %s stands where record %d should", count, number)
	}
	op, rest, _ := strings.Cut(rest, " ")
	if len(op) != 1 {
		return line{}, fmt.Errorf("unknown operation %q", op)
	}
	l := line{op: op[0], addrs: rest}
	switch l.op {
	case opBegin:
		known, size := strings.CutPrefix(rest, format+" ")
		if !size {
			return line{}, fmt.Errorf("the format is %q, known is %q", rest, format)
		}
		if l.size, err = strconv.Atoi(known); err != nil {
			return line{}, fmt.Errorf("size %q", known)
		}
	case opGive, opTake:
		n := 0
		for range 3 {
			i := strings.IndexByte(rest[n:], ' ')
			if i < 0 {
				return line{}, fmt.Errorf("no addresses")
			}
			n += i + 1
		}
		if l.key, l.addrs = rest[:n-1], rest[n:]; l.addrs == "" {
			return line{}, fmt.Errorf("no addresses")
		}
	case opResting, opLast:
	default:
		return line{}, fmt.Errorf("unknown operation %q", op)
	}
	return l, nil
}

// journal is a journal that was read.
type journal struct {
	state
	shape
	data []byte
}

// parseJournal reads what a journal says about addresses, and those of key.
func parseJournal(data []byte, key Key) (*journal, []netip.Addr, error) {
	j := &journal{data: data}
	wanted, held := key.text(), ""
	var err error
	j.shape, err = scan(data, func(l line) error {
		if l.key == wanted {
			if held = ""; l.op == opGive {
				held = l.addrs
			}
		}
		return l.each(func(addr netip.Addr) error { return j.apply(l.op, addr) })
	})
	if err != nil {
		return nil, nil, err
	}
	var addrs []netip.Addr
	err = line{addrs: held}.each(func(addr netip.Addr) error {
		addrs = append(addrs, addr)
		return nil
	})
	return j, addrs, err
}

// attachments reads who has which addresses, from a journal that parsed.
func (j *journal) attachments() (map[Key][]netip.Addr, error) {
	held := map[string]string{}
	if len(j.data) > 0 {
		_, err := scan(j.data, func(l line) error {
			switch _, has := held[l.key]; {
			case l.op == opGive && has:
				return fmt.Errorf("%s is given addresses twice", l.key)
			case l.op == opTake && !has:
				return fmt.Errorf("%s has no addresses to take back", l.key)
			case l.op == opGive:
				held[l.key] = l.addrs
			case l.op == opTake:
				delete(held, l.key)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	out := make(map[Key][]netip.Addr, len(held))
	for text, addrs := range held {
		fields := strings.Split(text, " ")
		key := Key{fields[0], fields[1], fields[2]}
		err := line{addrs: addrs}.each(func(addr netip.Addr) error {
			out[key] = append(out[key], addr)
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// writeJournal writes the state and who holds what as a journal of its own, with
// room for as much as is in use now or at least for least bytes.
func (s *state) writeJournal(held map[Key][]netip.Addr, least int) []byte {
	records := make([]record, 0, len(held)+4)
	for key, addrs := range held {
		records = append(records, record{op: opGive, key: key, addrs: addrs})
	}
	slices.SortFunc(records, func(a, b record) int { return a.addrs[0].Compare(b.addrs[0]) })
	const perLine = 8 // IPv6 addresses, of which more would not fit into a sector
	for i := range s.resting {
		for addrs := range slices.Chunk(slices.Collect(s.resting[i].oldestFirst()), perLine) {
			records = append(records, record{op: opResting, addrs: addrs})
		}
	}
	var given []netip.Addr
	for _, addr := range s.last {
		if addr.IsValid() {
			given = append(given, addr)
		}
	}
	if len(given) > 0 {
		records = append(records, record{op: opLast, addrs: given})
	}

	// The beginning is written last, for it holds the size, and is of one length.
	b := appendRecord(nil, 0, record{op: opBegin})
	var text []byte
	for i, r := range records {
		text = appendRecord(text[:0], i+1, r)
		b = append(b, make([]byte, place(len(b), len(text))-len(b))...)
		b = append(b, text...)
	}
	size := roundUp(max(least, len(b)+len(b)/2), 8*sector)
	copy(b, appendRecord(nil, 0, record{op: opBegin, size: size}))
	return append(b, make([]byte, size-len(b))...)
}
