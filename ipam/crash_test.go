// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// allocatorDir makes the test binary an allocator, for tests that need real
// processes to kill.
const allocatorDir = "MOORING_TEST_ALLOCATOR_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(allocatorDir); dir != "" {
		if err := allocator(dir, os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// allocator allocates and releases until it is killed, and tells on stdout what
// it is about to do ("try") and what is done ("done").
func allocator(dir, seed string) error {
	n, err := strconv.ParseUint(seed, 10, 64)
	if err != nil {
		return err
	}
	random := rand.New(rand.NewPCG(n, 0))
	p, err := Open(dir, crashPools)
	if err != nil {
		return err
	}
	p.minSize = 8 * sector // written anew every 30 operations, so that this is hit too
	for {
		k := key(random.IntN(40))
		if random.IntN(2) == 0 {
			fmt.Printf("try + %s\n", k.ContainerID)
			addrs, err := p.Allocate(context.Background(), k, nil)
			if err != nil {
				return err
			}
			fmt.Printf("done + %s %s\n", k.ContainerID, strings.Join(text(addrs), " "))
		} else {
			fmt.Printf("try - %s\n", k.ContainerID)
			if err := p.Release(context.Background(), k); err != nil {
				return err
			}
			fmt.Printf("done - %s\n", k.ContainerID)
		}
	}
}

var crashPools = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/26"), netip.MustParsePrefix("fd00:10:244::/120")}

// What was acknowledged must be so after the process was killed, and what was
// under way must be done or not done; and never does an address have two owners.
func TestKilledProcessesLoseAndDoubleNoAddress(t *testing.T) {
	dir := t.TempDir()
	p, err := Open(dir, crashPools)
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	held := map[string]string{} // what must be
	// How often a kill hits an operation is up to the machine: as many rounds as it takes.
	const hits, most = 200, 4000
	operations, inTheMiddle, round := 0, 0, 0
	for ; inTheMiddle < hits && round < most; round++ {
		cmd := exec.Command(os.Args[0], strconv.FormatUint(random.Uint64(), 10))
		cmd.Env = append(os.Environ(), allocatorDir+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		var timer *time.Timer
		open := "" // what was tried and is not done
		for lines.Scan() {
			if timer == nil { // it runs now
				timer = time.AfterFunc(time.Duration(random.IntN(8000))*time.Microsecond, func() { cmd.Process.Kill() })
			}
			what, rest, _ := strings.Cut(lines.Text(), " ")
			op, rest, _ := strings.Cut(rest, " ")
			container, addrs, _ := strings.Cut(rest, " ")
			switch {
			case what == "try":
				open = op + " " + container
				continue
			case op == "+":
				if before, had := held[container]; had && before != addrs {
					t.Fatalf("round %d: %s has %s, then %s", round, container, before, addrs)
				}
				held[container] = addrs
			default:
				delete(held, container)
			}
			open, operations = "", operations+1
		}
		if timer == nil {
			t.Fatalf("round %d: the allocator said nothing: %v", round, cmd.Wait())
		}
		_ = cmd.Wait() // it was killed

		allocations, err := p.List(t.Context())
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		got, owner := map[string]string{}, map[netip.Addr]Key{}
		for _, a := range allocations {
			if a.Outside || len(a.Addrs) != 2 {
				t.Fatalf("round %d: %+v", round, a)
			}
			for _, addr := range a.Addrs {
				if other, twice := owner[addr]; twice {
					t.Fatalf("round %d: %s belongs to %s and %s", round, addr, other, a.Key)
				}
				owner[addr] = a.Key
			}
			got[a.ContainerID] = strings.Join(text(p.prefixes(a.Addrs)), " ")
		}
		if op, container, unfinished := strings.Cut(open, " "); unfinished {
			inTheMiddle++
			switch now, has := got[container]; {
			case op == "+" && has && held[container] == "":
				held[container] = now
			case op == "-" && !has:
				delete(held, container)
			}
		}
		if diff := cmp.Diff(held, got); diff != "" {
			t.Fatalf("round %d (%s under way): %s", round, open, diff)
		}
	}
	t.Logf("%d operations, %d of %d kills in the middle of one", operations, inTheMiddle, round)
	if inTheMiddle < hits {
		t.Errorf("only %d of %d kills hit an operation", inTheMiddle, round)
	}

	// Nothing is lost: with all released, every address of the pool can be had.
	if _, err := p.GC(t.Context(), "mooring", nil); err != nil {
		t.Fatal(err)
	}
	var all []string
	for i := range 61 {
		all = append(all, strings.Fields(allocate(t, p, i))[0])
	}
	slices.Sort(all)
	if len(slices.Compact(all)) != 61 {
		t.Errorf("%d different addresses", len(all))
	}
}
