// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"bytes"
	"fmt"
	"hash/crc32"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var sameAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

// content is all that a journal says, for comparisons.
type content struct {
	Held          map[Key][]netip.Addr
	Used, Resting []netip.Addr
	Last          [2]netip.Addr
}

func contentOf(data []byte) (content, error) {
	j, _, err := parseJournal(data, Key{})
	if err != nil {
		return content{}, err
	}
	held, err := j.attachments()
	if err != nil {
		return content{}, err
	}
	c := content{Held: held, Last: j.last}
	for f := range 2 {
		c.Used = append(c.Used, slices.Collect(j.used[f].each)...)
		c.Resting = append(c.Resting, slices.Collect(j.resting[f].oldestFirst())...)
	}
	slices.SortFunc(c.Used, netip.Addr.Compare)
	return c, nil
}

func key(i int) Key { return Key{"mooring", fmt.Sprintf("container-%d", i), "eth0"} }

// written is a journal to which records were appended one by one, as file.append
// does; ends are the offsets behind each.
func written(t testing.TB, records ...record) (data []byte, ends []int) {
	data = new(state).writeJournal(nil, 8*sector)
	j, _, err := parseJournal(data, Key{})
	if err != nil {
		t.Fatal(err)
	}
	end := j.end
	for i, r := range records {
		text := appendRecord(nil, i+1, r)
		at := place(end, len(text))
		copy(data[at:], text)
		end = at + len(text)
		ends = append(ends, end)
	}
	return data, ends
}

func someRecords() []record {
	var records []record
	addrs := func(i int) []netip.Addr {
		return []netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.244.0.%d", i+2)), netip.MustParseAddr(fmt.Sprintf("fd00:10:244::%x", i+2))}
	}
	for i := range 20 {
		records = append(records, record{op: opGive, key: key(i), addrs: addrs(i)})
		if i%3 == 2 {
			records = append(records, record{op: opTake, key: key(i - 1), addrs: addrs(i - 1)})
		}
	}
	return records
}

func TestJournalReadsBackAsWritten(t *testing.T) {
	data, _ := written(t, someRecords()...)
	want, err := contentOf(data)
	if err != nil {
		t.Fatal(err)
	}
	if len(want.Held) != 14 || len(want.Used) != 28 || len(want.Resting) != 12 || want.Last[0].String() != "10.244.0.21" || want.Last[1].String() != "fd00:10:244::15" {
		t.Errorf("%+v", want)
	}
	j, held, err := parseJournal(data, key(6))
	if err != nil || len(held) != 2 || held[0].String() != "10.244.0.8" {
		t.Errorf("%v, %v", held, err)
	}
	if _, held, _ := parseJournal(data, key(1)); held != nil {
		t.Errorf("released, but has %v", held)
	}
	again := j.writeJournal(want.Held, sector)
	got, err := contentOf(again)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, sameAddr); diff != "" {
		t.Error(diff)
	}
}

func TestNoRecordCrossesASector(t *testing.T) {
	held := map[Key][]netip.Addr{}
	var s state
	addr := netip.MustParseAddr("fd00:1010:2440:1111:2222:3333:4444:1000")
	for i := range 300 {
		k := Key{strings.Repeat("n", 100), fmt.Sprintf("%s%03d", strings.Repeat("c", 1+i*(maxKey-120)/300), i), "eth0"}
		held[k] = []netip.Addr{netip.AddrFrom4([4]byte{255, 255, 10, byte(i)}).Next(), addr}
		addr = addr.Next()
		s.resting[1].add(netip.MustParseAddr(fmt.Sprintf("fd00:1010:2440:5555:2222:3333:4444:%04x", 0x1000+i)))
	}
	data := s.writeJournal(held, sector)
	for at, p := range bytes.Split(bytes.TrimRight(data, "\x00"), []byte("\n")) {
		if line := bytes.TrimLeft(p, "\x00"); len(line) >= sector {
			t.Errorf("line %d has %d bytes", at, len(line))
		}
	}
	for at := sector; at < len(data); at += sector {
		if data[at] != 0 && data[at-1] != 0 && data[at-1] != '\n' {
			t.Errorf("a record crosses byte %d", at)
		}
	}
}

// What a crash can leave: the first n bytes of the last record, for every n.
func TestTornTailIsIgnoredAtEveryByte(t *testing.T) {
	records := someRecords()
	for cut := 1; cut <= 6; cut++ { // so that gaps before the end of a sector are met too
		data, ends := written(t, records[:len(records)-cut]...)
		before, _ := written(t, records[:len(records)-cut-1]...)
		want, err := contentOf(before)
		if err != nil {
			t.Fatal(err)
		}
		complete, err := contentOf(data)
		if err != nil {
			t.Fatal(err)
		}
		end := ends[len(ends)-1]
		start := bytes.LastIndexAny(data[:end-1], "\n\x00") + 1
		for n := start; n < end; n++ {
			torn := append(slices.Clone(data[:n]), make([]byte, len(data)-n)...)
			got, err := contentOf(torn)
			if err != nil {
				t.Fatalf("%d of %d bytes: %v", n-start, end-start, err)
			}
			wanted := want
			if n == end-1 { // all is there but the line's end
				wanted = complete
			}
			if diff := cmp.Diff(wanted, got, sameAddr); diff != "" {
				t.Fatalf("%d of %d bytes: %s", n-start, end-start, diff)
			}
			j, _, err := parseJournal(torn, Key{})
			if err != nil || j.torn != (n > start) {
				t.Fatalf("%d of %d bytes: torn %v, %v", n-start, end-start, j.torn, err)
			}
		}
	}
}

// A byte that changed must never make an address free that somebody has.
func TestDamageIsNeverTakenForFreeAddresses(t *testing.T) {
	data, ends := written(t, someRecords()...)
	want, err := contentOf(data)
	if err != nil {
		t.Fatal(err)
	}
	accepted := 0
	for at := range ends[len(ends)-1] + 10 {
		for _, change := range []byte{data[at] ^ 1, data[at] ^ 0x80, 0, '\n', ' ', '9'} {
			if change == data[at] {
				continue
			}
			damaged := slices.Clone(data)
			damaged[at] = change
			got, err := contentOf(damaged)
			if err != nil {
				if !strings.HasPrefix(err.Error(), "at byte ") {
					t.Errorf("%v does not say where", err)
				}
				continue
			}
			accepted++
			if diff := cmp.Diff(want, got, sameAddr); diff != "" {
				t.Fatalf("byte %d changed from %q to %q: %s", at, data[at], change, diff)
			}
		}
	}
	// The end of the last record, when it is gone altogether, and the first byte
	// of what would be the next one.
	if accepted > 10 {
		t.Errorf("%d changes were not noticed", accepted)
	}
}

func TestShortenedLengthenedAndForeignFilesAreDamage(t *testing.T) {
	data, ends := written(t, someRecords()...)
	for n := range data {
		if _, err := contentOf(data[:n]); err == nil {
			t.Fatalf("the first %d bytes of %d were taken for a journal", n, len(data))
		}
	}
	middle := slices.Clone(data)
	clear(middle[sector : 2*sector]) // a write that never reached the disk
	swapped := append(slices.Clone(data[:sector]), data[2*sector:3*sector]...)
	swapped = append(append(swapped, data[sector:2*sector]...), data[3*sector:]...)
	other := appendRecord(nil, 0, record{op: '?'})
	late := slices.Clone(data)
	copy(late[place(ends[len(ends)-1], 100):], appendRecord(nil, len(ends)+2, record{op: opTake, key: key(0), addrs: []netip.Addr{netip.MustParseAddr("10.244.0.2")}}))
	for name, damaged := range map[string][]byte{
		"longer": append(slices.Clone(data), 0), "empty": {}, "zeros": make([]byte, 4096), "text": []byte("hello\n"),
		"sector lost": middle, "sectors swapped": swapped, "unknown operation": other, "record lost": late,
		"twice": append(slices.Clone(data[:ends[0]]), data...),
	} {
		if _, err := contentOf(damaged); err == nil {
			t.Errorf("%s: taken for a journal", name)
		}
	}
}

func TestFormatOfTheFutureIsNamed(t *testing.T) {
	data, _ := written(t)
	body := strings.Replace(string(data[9:bytes.IndexByte(data, '\n')]), format, "mooring-ipam 2", 1)
	copy(data, fmt.Sprintf("%08x %s\n", crc32.Checksum([]byte(body), castagnoli), body))
	if _, err := contentOf(data); err == nil || !strings.Contains(err.Error(), `the format is "mooring-ipam 2`) {
		t.Error(err)
	}
}

func TestRecordsThatContradictAreDamage(t *testing.T) {
	a, b := netip.MustParseAddr("10.244.0.2"), netip.MustParseAddr("10.244.0.3")
	for name, records := range map[string][]record{
		"address given twice":          {{op: opGive, key: key(1), addrs: []netip.Addr{a}}, {op: opGive, key: key(2), addrs: []netip.Addr{a}}},
		"attachment given twice":       {{op: opGive, key: key(1), addrs: []netip.Addr{a}}, {op: opGive, key: key(1), addrs: []netip.Addr{b}}},
		"taken back and not given":     {{op: opTake, key: key(1), addrs: []netip.Addr{a}}},
		"taken back from somebody":     {{op: opGive, key: key(1), addrs: []netip.Addr{a}}, {op: opTake, key: key(2), addrs: []netip.Addr{a}}},
		"rests and is in use":          {{op: opGive, key: key(1), addrs: []netip.Addr{a}}, {op: opResting, addrs: []netip.Addr{a}}},
		"a second beginning":           {{op: opBegin, size: 4096}},
		"an operation of the future":   {{op: '!', addrs: []netip.Addr{a}}},
		"an address that is IPv4-in-6": {{op: opGive, key: key(1), addrs: []netip.Addr{netip.MustParseAddr("::ffff:10.244.0.2")}}},
	} {
		data, _ := written(t, records...)
		if _, err := contentOf(data); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzJournal(f *testing.F) {
	data, ends := written(f, someRecords()...)
	f.Add(data)
	f.Add(data[:ends[3]])
	f.Add(append(slices.Clone(data[:ends[3]+20]), make([]byte, len(data)-ends[3]-20)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		before := slices.Clone(data)
		got, err := contentOf(data)
		if !bytes.Equal(before, data) {
			t.Fatal("reading changed the data")
		}
		if err != nil {
			return
		}
		j, _, _ := parseJournal(data, Key{})
		n := 0
		for addrs := range maps.Values(got.Held) {
			n += len(addrs)
		}
		if n != len(got.Used) {
			t.Fatalf("%d addresses are held and %d in use", n, len(got.Used))
		}
		again, err := contentOf(j.writeJournal(got.Held, sector))
		if err != nil {
			t.Fatalf("written anew it does not read back: %v", err)
		}
		if diff := cmp.Diff(got, again, sameAddr); diff != "" {
			t.Fatal(diff)
		}
	})
}
