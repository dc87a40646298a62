// SPDX-License-Identifier: Apache-2.0

// Package cni measures what a container runtime waits for: the plugin's ADD and
// DEL from exec to exit, beside bridge with host-local in the same run.
package cni

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/mooring-cni/mooring/test/netns"
)

// Figures are of one plugin.
type Figures struct {
	ADD, DEL Times
}

// Times are of one verb.
type Times struct {
	Min, P50, P99 time.Duration
}

// Result is what Measure finds. Both give a pod one IPv4 and, if the node has
// ranges of both families, one IPv6 address; Reference has IPv4 alone, since
// bridge waits seconds for duplicate address detection of an IPv6 one.
type Result struct {
	Mooring, Reference Figures
	Rounds             int
}

// ADDRatio is mooring's median time over the reference's: below 1 is faster.
func (r Result) ADDRatio() float64 { return ratio(r.Mooring.ADD.P50, r.Reference.ADD.P50) }

// DELRatio is the same of DEL.
func (r Result) DELRatio() float64 { return ratio(r.Mooring.DEL.P50, r.Reference.DEL.P50) }

func ratio(a, b time.Duration) float64 { return float64(a) / float64(b) }

func (r Result) String() string {
	line := func(name string, a, b Times, ratio float64) string {
		ms := func(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d)/float64(time.Millisecond)) }
		return fmt.Sprintf("%s exec to exit, ms, min/p50/p99: mooring-cni %s/%s/%s, bridge+host-local %s/%s/%s, p50 ratio %.2f\n",
			name, ms(a.Min), ms(a.P50), ms(a.P99), ms(b.Min), ms(b.P50), ms(b.P99), ratio)
	}
	return line("ADD", r.Mooring.ADD, r.Reference.ADD, r.ADDRatio()) + line("DEL", r.Mooring.DEL, r.Reference.DEL, r.DELRatio())
}

// Measure calls both plugins by turns on a node whose daemon runs. programs and
// references are the directories of the binaries.
func Measure(t netns.T, node *netns.Node, programs, references string, rounds int) Result {
	t.Helper()
	pod := netns.Empty(t, "bench")
	bridge := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "reference", "type": "bridge", "bridge": "cni0", "isGateway": true,
		"ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.89.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}}`,
		filepath.Join(node.Dir, "host-local"))
	mooring := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "mooring", "type": "mooring-cni", "socket": %q}`, node.Socket)

	var ours, theirs samples
	one := func(s *samples, dir, plugin, stdin string, record bool) {
		t.Helper()
		add := call(t, node, dir, plugin, "ADD", pod.Path(), stdin)
		del := call(t, node, dir, plugin, "DEL", pod.Path(), stdin)
		if record {
			s.add, s.del = append(s.add, add), append(s.del, del)
		}
	}
	for i := range rounds + 1 {
		// The first round finds nothing in the page cache, and makes the bridge.
		first, second := func() { one(&ours, programs, "mooring-cni", mooring, i > 0) }, func() { one(&theirs, references, "bridge", bridge, i > 0) }
		if i%2 == 1 {
			first, second = second, first
		}
		first()
		second()
	}
	node.Sh(t, "ip link del cni0")
	return Result{Mooring: ours.figures(), Reference: theirs.figures(), Rounds: rounds}
}

type samples struct{ add, del []time.Duration }

func (s samples) figures() Figures { return Figures{ADD: times(s.add), DEL: times(s.del)} }

func times(d []time.Duration) Times {
	d = slices.Sorted(slices.Values(d))
	return Times{Min: d[0], P50: d[len(d)/2], P99: d[len(d)*99/100]}
}

// call runs a plugin, which must succeed, and answers how long it took.
func call(t netns.T, node *netns.Node, dir, plugin, verb, pod, stdin string) (took time.Duration) {
	t.Helper()
	cmd := node.Command(filepath.Join(dir, plugin))
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+verb, "CNI_CONTAINERID=bench", "CNI_NETNS="+pod, "CNI_IFNAME=eth0", "CNI_PATH="+dir)
	cmd.Stdin = strings.NewReader(stdin)
	var out bytes.Buffer
	cmd.Stdout = &out
	err := node.Do(func() error {
		begin := time.Now()
		err := cmd.Cmd.Run()
		took = time.Since(begin)
		return err
	})
	if err != nil {
		var told struct{ Msg string }
		json.Unmarshal(out.Bytes(), &told)
		t.Fatalf("%s %s: %v: %s", plugin, verb, err, told.Msg)
	}
	return took
}
