// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestPackageStanzaGivesVersionAndFirstAlternatives(t *testing.T) {
	got := parsePackage(`Package: linux-image-7.3.4-cloud-amd64
Version: 7.3.4-1
Depends: dracut | initramfs-tools (>= 0.120), linux-binary-7.3.4-cloud-amd64 (= 7.3.4-1), linux-modules-7.3.4-cloud-amd64
Description: Linux

Package: linux-image-7.3.4-cloud-amd64
Version: 7.3.3-1
`)
	want := pkg{"linux-image-7.3.4-cloud-amd64", "7.3.4-1",
		[]string{"dracut", "linux-binary-7.3.4-cloud-amd64", "linux-modules-7.3.4-cloud-amd64"}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(pkg{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestModinfoNamesDependenciesAsLsmodDoes(t *testing.T) {
	got := parseModinfo([]byte("license=GPL\x00depends=nf_tables,nf-conntrack\x00retpoline=Y\x00"))
	if diff := cmp.Diff([]string{"nf_tables", "nf_conntrack"}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := parseModinfo([]byte("depends=\x00")); len(got) != 0 {
		t.Errorf("no dependencies gave %q", got)
	}
	for file, want := range map[string]string{
		"a/nf-log.ko.xz": "nf_log", "veth.ko": "veth", "x.ko.zst": "x", "modules.order": "",
	} {
		if got := moduleName(file); got != want {
			t.Errorf("%s is module %q, expected %q", file, got, want)
		}
	}
}

// entry is what a reader of the archive sees.
type entry struct {
	Name string
	Mode uint64
	Body string
}

// readCpio is an independent reader of newc archives, after cpio(5).
func readCpio(t *testing.T, archive []byte) []entry {
	t.Helper()
	var all []entry
	align := func(n int) int { return (n + 3) &^ 3 }
	for at := 0; ; {
		header := archive[at : at+110]
		if string(header[:6]) != "070701" {
			t.Fatalf("no header at %d: %q", at, header[:6])
		}
		field := func(i int) uint64 {
			n, err := strconv.ParseUint(string(header[6+8*i:14+8*i]), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		name := string(archive[at+110 : at+110+int(field(11))-1])
		at = align(at + 110 + int(field(11)))
		if name == "TRAILER!!!" {
			return all
		}
		all = append(all, entry{name, field(1), string(archive[at : at+int(field(6))])})
		at = align(at + int(field(6)))
	}
}

func TestImageHoldsDirectoriesBeforeFilesInAMergedUsr(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "tool")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	im := newImage()
	im.write("/etc/hosts", 0o644, []byte("127.0.0.1 localhost\n"))
	im.link("/usr/bin/sh", "/usr/busybox/busybox")
	if err := im.copy("/sbin/tool", script); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "image")
	if err := im.save(file); err != nil {
		t.Fatal(err)
	}
	archive, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	want := []entry{
		{"bin", 0o120777, "usr/bin"},
		{"etc", 0o040755, ""},
		{"etc/hosts", 0o100644, "127.0.0.1 localhost\n"},
		{"lib", 0o120777, "usr/lib"},
		{"lib64", 0o120777, "usr/lib64"},
		{"sbin", 0o120777, "usr/sbin"},
		{"usr", 0o040755, ""},
		{"usr/bin", 0o040755, ""},
		{"usr/bin/sh", 0o120777, "/usr/busybox/busybox"},
		{"usr/lib", 0o040755, ""},
		{"usr/lib64", 0o040755, ""},
		{"usr/sbin", 0o040755, ""},
		{"usr/sbin/tool", 0o100755, "#!/bin/sh\n"},
	}
	if diff := cmp.Diff(want, readCpio(t, archive)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestResultsAreReadBetweenTheMarks(t *testing.T) {
	console := "noise\n@@mooring boot\n@@mooring begin 0\nfirst\n\n@@mooring end 0\nbetween\n@@mooring begin 1\nsecond\r\nhalf"
	var o outcome
	finished, err := o.read(strings.NewReader(console), 3, time.Now())
	if err != nil || finished {
		t.Errorf("a guest that stopped inside a job is finished: %v, %v", finished, err)
	}
	for i := range o.jobs {
		o.jobs[i].took = 0
	}
	want := []jobOutcome{
		{started: true, ended: true, output: []byte("first\n\n")},
		{started: true, output: []byte("second\r\nhalf")},
		{},
	}
	if diff := cmp.Diff(want, o.jobs, cmp.AllowUnexported(jobOutcome{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	finished, err = o.read(strings.NewReader("@@mooring begin 0\n\n@@mooring end 137\n@@mooring done\n"), 1, time.Now())
	if err != nil || !finished || o.jobs[0].code != 137 {
		t.Errorf("got %v, %v, %+v", finished, err, o.jobs[0])
	}
}

func TestScriptQuotesWhatTheShellWouldRead(t *testing.T) {
	j := Job{Package: "./bpf", Run: "Test(A|B)$", Skip: "C d", Env: []string{"HOOK=it's off"}, Timeout: time.Minute}
	want := `#!/bin/sh
cd '/src/bpf' || exit 1
export MOORING_KERNEL='6.1' MOORING_BIN='/src/bin'
export HOOK='it'\''s off'
exec timeout -s KILL 70 '/src/bpf/bpf.test' -test.v=test2json -test.timeout=1m0s -test.run='Test(A|B)$' -test.skip='C d'
`
	if diff := cmp.Diff(want, j.script("/src/bpf", "/src/bpf/bpf.test", "6.1")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// inner is what a test binary prints with -test.v=test2json: ^V before each of
// its own lines.
const inner = "\x16=== RUN   TestPass\n" +
	"    a_test.go:1: --- FAIL: TestPass is only a message\n" +
	"\x16--- PASS: TestPass (1.50s)\n" +
	"\x16=== RUN   TestTable\n" +
	"\x16=== RUN   TestTable/10.244.0.0/16\n" +
	"    a_test.go:2: wrong\n" +
	"\x16--- FAIL: TestTable (0.20s)\n" +
	"\x16    --- FAIL: TestTable/10.244.0.0/16 (0.10s)\n" +
	"\x16=== RUN   TestSkip\n" +
	"    a_test.go:3: no fentry here\n" +
	"\x16--- SKIP: TestSkip (0.00s)\n" +
	"\x16=== RUN   TestDies\n" +
	"last words\n"

func TestInnerResultsBecomeATree(t *testing.T) {
	root, err := parse([]byte(inner))
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	var walk func(r *result, depth int)
	walk = func(r *result, depth int) {
		if depth >= 0 {
			fmt.Fprintf(&got, "%s%s %s %.1f %q\n", strings.Repeat("  ", depth), r.name, r.action, r.elapsed, r.output.String())
		}
		for _, c := range r.children {
			walk(c, depth+1)
		}
	}
	walk(root, -1)
	want := `TestPass pass 1.5 "    a_test.go:1: --- FAIL: TestPass is only a message\n"
TestTable fail 0.2 ""
  10.244.0.0/16 fail 0.1 "    a_test.go:2: wrong\n"
TestSkip skip 0.0 "    a_test.go:3: no fentry here\n"
TestDies  0.0 "last words\n"
`
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	passed, failed, skipped := root.count()
	if got := [3]int{passed, failed, skipped}; got != [3]int{1, 2, 1} {
		t.Errorf("%v passed, failed, skipped", got)
	}
}

func TestVerdictOfSkipsDependsOnNoSkip(t *testing.T) {
	for _, test := range []struct {
		name   string
		result *result
		noSkip bool
		want   string
	}{
		{"a skip is a skip", &result{full: "TestSkip", action: "skip"}, false, "skip"},
		{"a skip fails with NO_SKIP", &result{full: "TestSkip", action: "skip"}, true, "fail"},
		{"a test that did not end fails", &result{full: "TestDies"}, false, "fail"},
		{"a failure is a failure", &result{action: "fail"}, true, "fail"},
		{"a pass is a pass", &result{action: "pass"}, true, "pass"},
	} {
		if got, say := test.result.verdict(test.noSkip); got != test.want {
			t.Errorf("%s: got %s (%s)", test.name, got, say)
		}
	}
}

func TestMatrixNamesWhatExists(t *testing.T) {
	kernels := map[string]bool{}
	for _, k := range Matrix {
		kernels[k.Name] = true
	}
	jobs := map[string]bool{}
	for _, j := range Jobs {
		if jobs[j.name()] {
			t.Errorf("two jobs are named %s", j.name())
		}
		jobs[j.name()] = true
		for _, k := range j.Kernels {
			if !kernels[k] {
				t.Errorf("job %s names kernel %s", j.name(), k)
			}
		}
		for _, path := range append(append([]string{j.Package}, j.Commands...), j.Files...) {
			if _, err := os.Stat(filepath.Join("../..", path)); err != nil {
				t.Errorf("job %s: %v", j.name(), err)
			}
		}
	}
}

func TestKernelsComplaintsAreFoundOnTheConsole(t *testing.T) {
	console := "[    0.1] Linux version 6.1\r\n" +
		"[    2.0] sch_tbf: burst 1099 is lower than device lxc1 mtu (1514) !\r\n" +
		"[    3.0][  T57] WARNING: CPU: 1 PID: 57 at net/core/dev.c:1 f+0x1/0x2\r\n" +
		"[    3.1] BUG: kernel NULL pointer dereference, address: 0\r\n" +
		"a test may print WARNING: freely\r\n"
	want := []string{
		"[    3.0][  T57] WARNING: CPU: 1 PID: 57 at net/core/dev.c:1 f+0x1/0x2",
		"[    3.1] BUG: kernel NULL pointer dereference, address: 0",
	}
	if diff := cmp.Diff(want, troubles(console)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got, want := tail("1\r\n2\r\n3\r\n", 2), "2\n3"; got != want {
		t.Errorf("tail is %q, expected %q", got, want)
	}
}

func TestPathsAreMappedToAMergedUsr(t *testing.T) {
	for from, want := range map[string]string{
		"/lib64/ld.so": "/usr/lib64/ld.so", "/sbin/x": "/usr/sbin/x", "/usr/lib/y": "/usr/lib/y", "/etc/z": "/etc/z",
	} {
		if got := inGuest(from); got != want {
			t.Errorf("%s becomes %s, expected %s", from, got, want)
		}
	}
}
