// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var dual = []string{"10.244.0.0/24", "fd00:10:244::/64"}

func open(t testing.TB, dir string, pools ...string) *Pool {
	t.Helper()
	var prefixes []netip.Prefix
	for _, pool := range pools {
		prefixes = append(prefixes, netip.MustParsePrefix(pool))
	}
	p, err := Open(dir, prefixes)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// allocate is for what must succeed.
func allocate(t testing.TB, p *Pool, i int, requested ...string) string {
	t.Helper()
	var addrs []netip.Addr
	for _, r := range requested {
		addrs = append(addrs, netip.MustParseAddr(r))
	}
	got, err := p.Allocate(t.Context(), key(i), addrs)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(text(got), " ")
}

func text(prefixes []netip.Prefix) []string {
	var out []string
	for _, p := range prefixes {
		out = append(out, p.String())
	}
	return out
}

func release(t testing.TB, p *Pool, i int) {
	t.Helper()
	if err := p.Release(t.Context(), key(i)); err != nil {
		t.Fatal(err)
	}
}

func list(t testing.TB, p *Pool) []Allocation {
	t.Helper()
	got, err := p.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestEachAttachmentGetsOneAddressOfEachFamily(t *testing.T) {
	p := open(t, t.TempDir(), dual...)
	for i, want := range []string{
		"10.244.0.2/24 fd00:10:244::2/64", "10.244.0.3/24 fd00:10:244::3/64", "10.244.0.4/24 fd00:10:244::4/64",
	} {
		if got := allocate(t, p, i); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	got, err := p.Check(t.Context(), key(1))
	if diff := cmp.Diff([]string{"10.244.0.3/24", "fd00:10:244::3/64"}, text(got)); diff != "" || err != nil {
		t.Error(err, diff)
	}
	if got := list(t, p); len(got) != 3 || got[2].Key != key(2) || got[2].Outside || len(got[2].Addrs) != 2 {
		t.Errorf("%v", got)
	}
}

func TestSameAttachmentGetsTheSameAddressesAgain(t *testing.T) {
	dir := t.TempDir()
	first := allocate(t, open(t, dir, dual...), 1)
	if again := allocate(t, open(t, dir, dual...), 1); again != first {
		t.Errorf("%s, then %s", first, again)
	}
	if again := allocate(t, open(t, dir, dual...), 1, "10.244.0.2"); again != first {
		t.Errorf("%s, then %s", first, again)
	}
	_, err := open(t, dir, dual...).Allocate(t.Context(), key(1), []netip.Addr{netip.MustParseAddr("10.244.0.9")})
	var request *RequestError
	if !errors.As(err, &request) || !strings.Contains(err.Error(), "has [10.244.0.2 fd00:10:244::2] already") {
		t.Error(err)
	}
}

func TestNetworkContainerAndInterfaceEachMakeAnotherAttachment(t *testing.T) {
	p := open(t, t.TempDir(), dual...)
	seen := map[netip.Prefix]Key{}
	for _, k := range []Key{{"n", "c", "eth0"}, {"n", "c", "eth1"}, {"n", "d", "eth0"}, {"m", "c", "eth0"}} {
		got, err := p.Allocate(t.Context(), k, nil)
		if err != nil {
			t.Fatal(err)
		}
		if other, twice := seen[got[0]]; twice {
			t.Errorf("%s has %s of %s", k, got[0], other)
		}
		seen[got[0]] = k
	}
}

func TestReleasedAddressIsReusedLast(t *testing.T) {
	p := open(t, t.TempDir(), "10.244.0.0/28") // 13 addresses: .2 to .14
	for i := range 10 {
		allocate(t, p, i)
	}
	for _, i := range []int{4, 0, 7} { // .6, .2, .9
		release(t, p, i)
	}
	var got []string
	for i := 10; i < 16; i++ {
		got = append(got, allocate(t, p, i))
	}
	want := []string{"10.244.0.12/28", "10.244.0.13/28", "10.244.0.14/28", "10.244.0.6/28", "10.244.0.2/28", "10.244.0.9/28"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// One pod that comes and goes must not get the same address soon, over many
// times that the file is written anew.
func TestAddressesGoRoundThePool(t *testing.T) {
	p := open(t, t.TempDir(), "10.244.0.0/27", "fd00:10:244::/122")
	p.minSize = 2 * sector
	last := map[string]int{}
	for i := range 500 {
		for _, addr := range strings.Fields(allocate(t, p, i)) {
			if before, reused := last[addr]; reused && i-before < 28 {
				t.Fatalf("%s after %d others", addr, i-before)
			}
			last[addr] = i
		}
		release(t, p, i)
	}
	if len(last) != 29+62 {
		t.Errorf("%d addresses were used, want %d", len(last), 29+62)
	}
}

func TestExhaustionSaysPoolCountAndRemedy(t *testing.T) {
	p := open(t, t.TempDir(), "10.244.0.0/29", "fd00:10:244::/64")
	for i := range 5 {
		allocate(t, p, i)
	}
	_, err := p.Allocate(t.Context(), key(5), nil)
	var exhausted *ExhaustedError
	if !errors.As(err, &exhausted) || exhausted.Pool.String() != "10.244.0.0/29" || exhausted.Used != 5 || exhausted.Total != 5 {
		t.Fatalf("%v", err)
	}
	for _, says := range []string{"container-5", "10.244.0.0/29", "5 of 5", "podCIDRs"} {
		if !strings.Contains(err.Error(), says) {
			t.Errorf("%q does not say %q", err, says)
		}
	}
	// The other family's address was not taken.
	release(t, p, 0)
	if got := allocate(t, p, 6); got != "10.244.0.2/29 fd00:10:244::7/64" {
		t.Error(got)
	}
	if got := list(t, p); len(got) != 5 {
		t.Errorf("%d, want 5", len(got))
	}
}

func TestRequestedAddresses(t *testing.T) {
	p := open(t, t.TempDir(), dual...)
	if got := allocate(t, p, 1, "10.244.0.77"); got != "10.244.0.77/24 fd00:10:244::2/64" {
		t.Error(got)
	}
	if got := allocate(t, p, 2, "fd00:10:244::abcd", "10.244.0.254"); got != "10.244.0.254/24 fd00:10:244::abcd/64" {
		t.Error(got)
	}
	for _, test := range []struct {
		requested, says string
		inUse           bool
	}{
		{"10.244.0.77", "in use by container container-1 (network mooring, interface eth0)", true},
		{"10.245.0.7", "10.245.0.7 is in none of this node's ranges", false},
		{"10.244.0.0", "reserved", false},
		{"10.244.0.1", "reserved in 10.244.0.0/24: pods get 10.244.0.2 to 10.244.0.254", false},
		{"10.244.0.255", "reserved", false},
		{"10.244.0.8 10.244.0.9", "one address of a family", false},
		{"::ffff:10.244.0.8", "none of this node's ranges", false},
	} {
		var addrs []netip.Addr
		for _, addr := range strings.Fields(test.requested) {
			addrs = append(addrs, netip.MustParseAddr(addr))
		}
		_, err := p.Allocate(t.Context(), key(9), addrs)
		if err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v, want %q", test.requested, err, test.says)
		}
		var used *InUseError
		var request *RequestError
		if errors.As(err, &used) != test.inUse || errors.As(err, &request) == test.inUse {
			t.Errorf("%s: %T", test.requested, err)
		}
	}
	if got := list(t, p); len(got) != 2 {
		t.Errorf("what was refused holds addresses: %v", got)
	}
}

func TestReleaseOfNothingIsFine(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	p := open(t, dir)
	release(t, p, 1)
	if _, err := p.GC(t.Context(), "mooring", nil); err != nil {
		t.Error(err)
	}
	if got := list(t, p); got != nil {
		t.Errorf("%v", got)
	}
	var none *NotFoundError
	if _, err := p.Check(t.Context(), key(1)); !errors.As(err, &none) {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("releasing made the directory: %v", err)
	}
	p = open(t, dir, dual...)
	allocate(t, p, 1)
	release(t, p, 2)
	release(t, p, 1)
	release(t, p, 1)
	if _, err := p.Check(t.Context(), key(1)); !errors.As(err, &none) || !strings.Contains(err.Error(), "container-1") {
		t.Error(err)
	}
}

func TestGCReleasesWhatIsNotValidInItsNetworkOnly(t *testing.T) {
	p := open(t, t.TempDir(), dual...)
	for i := range 4 {
		allocate(t, p, i)
	}
	other := Key{"other", "container-1", "eth0"}
	if _, err := p.Allocate(t.Context(), other, nil); err != nil {
		t.Fatal(err)
	}
	gone, err := p.GC(t.Context(), "mooring", map[Key]bool{key(1): true, key(3): true, key(77): true})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Key{key(0), key(2)}, gone); diff != "" {
		t.Error(diff)
	}
	var left []Key
	for _, a := range list(t, p) {
		left = append(left, a.Key)
	}
	if diff := cmp.Diff([]Key{key(1), key(3), other}, left); diff != "" {
		t.Error(diff)
	}
	if gone, err := p.GC(t.Context(), "mooring", map[Key]bool{key(1): true, key(3): true}); err != nil || len(gone) != 0 {
		t.Errorf("%v, %v", gone, err)
	}
	// What was collected rests like what was released.
	if got := allocate(t, p, 9); got != "10.244.0.7/24 fd00:10:244::7/64" {
		t.Error(got)
	}
}

func TestAllocationsOutsideOfChangedPoolsStay(t *testing.T) {
	dir := t.TempDir()
	allocate(t, open(t, dir, dual...), 1)
	p := open(t, dir, "10.250.0.0/24", "fd00:10:244::/64")
	if got := allocate(t, p, 1); got != "10.244.0.2/32 fd00:10:244::2/64" {
		t.Errorf("an attachment's addresses changed with the pools: %s", got)
	}
	if got := allocate(t, p, 2); got != "10.250.0.2/24 fd00:10:244::3/64" {
		t.Error(got)
	}
	got := list(t, p)
	if len(got) != 2 || !got[0].Outside || got[1].Outside {
		t.Errorf("%+v", got)
	}
	release(t, p, 1)
	if got := list(t, p); len(got) != 1 || got[0].Key != key(2) {
		t.Errorf("%+v", got)
	}
	// Without pools everything can still be released.
	release(t, open(t, dir), 2)
	if got := list(t, p); len(got) != 0 {
		t.Errorf("%+v", got)
	}
}

func TestBadPoolsAndKeysAreRefused(t *testing.T) {
	for _, pools := range [][]netip.Prefix{
		{netip.MustParsePrefix("10.244.0.1/24")}, {netip.MustParsePrefix("10.244.0.0/31")},
		{netip.MustParsePrefix("10.244.0.0/24"), netip.MustParsePrefix("10.244.0.0/25")}, {{}},
	} {
		if _, err := Open("/s", pools); err == nil {
			t.Errorf("%v accepted", pools)
		}
	}
	if _, err := Open("state", nil); err == nil {
		t.Error("a relative directory is accepted")
	}
	p := open(t, t.TempDir(), dual...)
	var request *RequestError
	for _, k := range []Key{
		{}, {"n", "c", ""}, {"n", "", "e"}, {"", "c", "e"}, {"n", "c d", "e"}, {"n", "c\n", "e"}, {"n\x00", "c", "e"},
		{"n", strings.Repeat("c", maxKey), "e"},
	} {
		if _, err := p.Allocate(t.Context(), k, nil); !errors.As(err, &request) {
			t.Errorf("%q: %v", k, err)
		}
	}
	if _, err := open(t, t.TempDir()).Allocate(t.Context(), key(1), nil); !errors.As(err, &request) || !strings.Contains(err.Error(), "podCIDRs") {
		t.Error(err)
	}
	// As long as libcni's file names allow.
	if _, err := p.Allocate(t.Context(), Key{strings.Repeat("n", 100), strings.Repeat("c", 140), "abcdefghijklmno"}, nil); err != nil {
		t.Error(err)
	}
}

func TestDamagedFileIsNamedWithTheRemedyAndGivesNothing(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir, dual...)
	allocate(t, p, 1)
	path := filepath.Join(dir, "ipam", "allocations")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[bytes.Index(data, []byte("container-1"))] ^= 1
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	_, allocated := p.Allocate(t.Context(), key(2), nil)
	_, checked := p.Check(t.Context(), key(1))
	_, listed := p.List(t.Context())
	_, collected := p.GC(t.Context(), "mooring", nil)
	for name, err := range map[string]error{"allocate": allocated, "check": checked, "list": listed, "gc": collected, "release": p.Release(t.Context(), key(1))} {
		var damaged *DamagedError
		if !errors.As(err, &damaged) || damaged.File != path {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, says := range []string{path, "at byte ", "checksum", "stop all pods of this node and then remove it"} {
			if !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %q does not say %q", name, err, says)
			}
		}
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, data) {
		t.Error("the damaged file was changed", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	allocate(t, p, 2)
}

func TestTornRecordIsWrittenOver(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir, dual...)
	for i := range 3 {
		allocate(t, p, i)
	}
	path := filepath.Join(dir, "ipam", "allocations")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	end := bytes.LastIndexByte(data, '\n')
	clear(data[end-10:])
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := allocate(t, p, 7); got != "10.244.0.4/24 fd00:10:244::4/64" {
		t.Error(got)
	}
	if got := list(t, p); len(got) != 3 || got[2].Key != key(7) {
		t.Errorf("%v", got)
	}
}

// A new file that could not be put in place leaves the old one as it was.
func TestFailureToWriteAnewLosesNothing(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir, dual...)
	p.minSize = sector
	blocker := filepath.Join(dir, "ipam", "allocations.new")
	done, failed := 0, 0
	for i := range 200 {
		if i == 20 {
			if err := os.Mkdir(blocker, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := p.Allocate(t.Context(), key(i), nil); err == nil {
			done++
		} else if failed++; !strings.Contains(err.Error(), blocker) {
			t.Fatal(err)
		}
	}
	if failed == 0 || len(list(t, p)) != done {
		t.Errorf("%d failed, %d done, %d listed", failed, done, len(list(t, p)))
	}
	if err := os.Remove(blocker); err != nil {
		t.Fatal(err)
	}
	allocate(t, p, 999)
	if got := len(list(t, p)); got != done+1 {
		t.Errorf("%d listed, want %d", got, done+1)
	}
}

func TestWaitForTheLockEndsWithTheContext(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir, dual...)
	allocate(t, p, 1)
	lock, err := os.OpenFile(filepath.Join(dir, "ipam", "lock"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := p.Allocate(ctx, key(2), nil); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), lock.Name()) {
		t.Error(err)
	}
	// Who gave up must not hold the lock when it comes free.
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	allocate(t, p, 3)
	if got := list(t, p); len(got) != 2 {
		t.Errorf("%v", got)
	}
}

func TestParallelCallersGetDifferentAddresses(t *testing.T) {
	dir := t.TempDir()
	type answer struct {
		addrs []netip.Prefix
		err   error
	}
	answers := make(chan answer)
	for i := range 50 {
		p := open(t, dir, dual...)
		go func() {
			addrs, err := p.Allocate(t.Context(), key(i), nil)
			answers <- answer{addrs, err}
		}()
	}
	var all []string
	for range 50 {
		a := <-answers
		if a.err != nil {
			t.Error(a.err)
		}
		all = append(all, text(a.addrs)...)
	}
	slices.Sort(all)
	if n := len(slices.Compact(all)); n != 100 {
		t.Errorf("%d different addresses, want 100", n)
	}
}

func TestManyAttachmentsSurviveWritingAnew(t *testing.T) {
	p := open(t, t.TempDir(), "10.244.0.0/16", "fd00:10:244::/64")
	fill(t, p, 20000)
	want := list(t, p)
	if len(want) != 20000 {
		t.Fatalf("%d", len(want))
	}
	allocate(t, p, 1)
	release(t, p, 1)
	if diff := cmp.Diff(want, list(t, p), sameAddr); diff != "" {
		t.Error(diff)
	}
	if got := allocate(t, p, 2); got != fmt.Sprintf("10.244.%d.%d/16 fd00:10:244::%x/64", 20003>>8, 20003&255, 20003) {
		t.Error(got)
	}
}
