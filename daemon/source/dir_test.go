// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mooring-cni/mooring/daemon/model"
)

// within is how long a test waits for a change to be in use. A machine that has
// nothing else to do needs less than the promised second; one that has shall not
// fail a test. It is less than what the slowest look without a sign would take.
const within = 8 * time.Second

// listener is a sink that remembers.
type listener struct {
	mu         sync.Mutex
	synced     bool
	services   map[string]string // name -> first port
	files      map[string]string // name -> of which file
	problems   []string
	deliveries []model.Changes
}

// listen runs a directory source until the test ends.
func listen(t *testing.T, dir string) *listener {
	t.Helper()
	return listenTo(t, NewDirectory(dir))
}

func listenTo(t *testing.T, d *Directory) *listener {
	t.Helper()
	l := &listener{services: make(map[string]string), files: make(map[string]string)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- d.Run(ctx, l.take) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != context.Canceled {
			t.Errorf("run ended with %v", err)
		}
	})
	l.await(t, "first delivery", func() bool { return len(l.deliveries) > 0 })
	return l
}

func (l *listener) take(c model.Changes) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.synced = c.Synced
	for name, s := range c.Services {
		if s == nil {
			delete(l.services, name.Name)
			delete(l.files, name.Name)
			continue
		}
		l.files[name.Name] = s.File
		l.services[name.Name] = ""
		for _, port := range s.Ports {
			l.services[name.Name] += fmt.Sprint(port.Port)
		}
	}
	l.problems = nil
	for _, p := range c.Problems {
		l.problems = append(l.problems, p.String())
	}
	l.deliveries = append(l.deliveries, c)
}

// await waits until a condition on the listener holds, as long as a change may
// take.
func (l *listener) await(t *testing.T, what string, holds func() bool) {
	t.Helper()
	start := time.Now()
	for {
		l.mu.Lock()
		ok := holds()
		l.mu.Unlock()
		if ok {
			return
		}
		if time.Since(start) > within {
			l.mu.Lock()
			defer l.mu.Unlock()
			t.Fatalf("%s: not within %s; services %v, problems %q", what, within, l.services, l.problems)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (l *listener) expect(t *testing.T, what string, services map[string]string, problems ...string) {
	t.Helper()
	l.await(t, what, func() bool {
		return maps.Equal(l.services, services) && len(l.problems) == len(problems) &&
			!slices.ContainsFunc(problems, func(p string) bool {
				return !slices.ContainsFunc(l.problems, func(got string) bool { return strings.Contains(got, p) })
			})
	})
}

// keeps makes sure that nothing is told for a while.
func (l *listener) keeps(t *testing.T, what string, pause time.Duration) {
	t.Helper()
	l.mu.Lock()
	before := len(l.deliveries)
	l.mu.Unlock()
	time.Sleep(pause)
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.deliveries) != before {
		t.Errorf("%s: told %+v", what, l.deliveries[before:])
	}
}

func serviceText(name string, port int) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: %s}\nspec:\n  clusterIP: 10.96.0.10\n  ports: [{port: %d}]\n", name, port)
}

type state = map[string]string

func TestEveryWayToChangeAFileIsNoticed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "web.yaml")
	l := listen(t, dir)
	l.expect(t, "empty directory", state{})
	if !l.synced {
		t.Error("an empty directory is not synced")
	}
	write(t, path, serviceText("web", 80))
	l.expect(t, "new file", state{"web": "80"})
	write(t, path, serviceText("web", 81))
	l.expect(t, "write in place", state{"web": "81"})
	write(t, path+".new", serviceText("web", 82))
	l.keeps(t, "file of another name", 100*time.Millisecond)
	must(t, os.Rename(path+".new", path))
	l.expect(t, "rename over it", state{"web": "82"})
	outside := filepath.Join(t.TempDir(), "x")
	write(t, outside, serviceText("web", 83))
	must(t, os.Rename(outside, path))
	l.expect(t, "rename from another directory", state{"web": "83"})
	must(t, os.Remove(path))
	write(t, path, serviceText("web", 84))
	l.expect(t, "delete and create, as some editors do", state{"web": "84"})
	must(t, os.Rename(path, filepath.Join(dir, "other.yml")))
	l.expect(t, "another name", state{"web": "84"})
	write(t, outside, serviceText("linked", 85))
	must(t, os.Link(outside, filepath.Join(dir, "hard.json")))
	l.expect(t, "hard link, YAML in a .json", state{"web": "84", "linked": "85"})
	must(t, os.Remove(filepath.Join(dir, "hard.json")))
	l.expect(t, "deletion", state{"web": "84"})
	must(t, os.Rename(filepath.Join(dir, "other.yml"), outside))
	l.expect(t, "moved away", state{})
	write(t, outside, serviceText("link", 86))
	must(t, os.Symlink(outside, path))
	l.expect(t, "symbolic link", state{"link": "86"})
	write(t, outside, serviceText("link", 87))
	l.expect(t, "write to what it points to", state{"link": "87"})
	must(t, os.Remove(outside))
	l.expect(t, "link that points nowhere", state{})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestEditorsAndOtherFilesAreNotManifests(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l := listen(t, dir)
	for _, name := range []string{".web.yaml", ".web.yaml.swp", "web.yaml~", "#web.yaml#", "web.yaml.bak", "README", "4913", "web.YAML.tmp"} {
		write(t, filepath.Join(dir, name), serviceText("web", 80))
	}
	l.keeps(t, "other files", 300*time.Millisecond)
	if len(l.services) > 0 {
		t.Errorf("services %v", l.services)
	}
}

func TestAHalfWrittenFileKeepsTheLastGoodState(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "web.yaml")
	content := serviceText("web", 80) + "---\n" + serviceText("more", 80)
	write(t, path, content)
	l := listen(t, dir)
	l.expect(t, "at first", state{"web": "80", "more": "80"})
	content = strings.ReplaceAll(content, "port: 80", "port: 81")
	file, err := os.Create(path)
	must(t, err)
	defer file.Close()
	_, err = file.WriteString(content[:len(content)-5])
	must(t, err)
	l.expect(t, "half of it", state{"web": "80", "more": "80"}, "web.yaml: cannot be decoded; its last good state stays in use", "web.yaml document 2: is not YAML: line ")
	_, err = file.WriteString(content[len(content)-5:])
	must(t, err)
	l.expect(t, "all of it", state{"web": "81", "more": "81"})
}

func TestAWriterThatStaysIsReadNevertheless(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, err := os.Create(filepath.Join(dir, "web.yaml"))
	must(t, err)
	defer file.Close()
	l := listen(t, dir)
	_, err = file.WriteString(serviceText("web", 80))
	must(t, err)
	l.expect(t, "written and open", state{"web": "80"})
	stop := time.Now().Add(1500 * time.Millisecond)
	noticed := false
	for i := 0; time.Now().Before(stop) && !noticed; i++ {
		_, err = fmt.Fprintf(file, "---\n"+serviceText("web-%d", 80), i)
		must(t, err)
		time.Sleep(20 * time.Millisecond)
		l.mu.Lock()
		noticed = len(l.services) > 1
		l.mu.Unlock()
	}
	if !noticed {
		t.Error("a file that is written all the time is not read")
	}
}

// "kubectl get ... -o yaml > file" empties the file long before it writes.
func TestAnEmptyFileWaitsForItsWriter(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "web.yaml")
	write(t, path, serviceText("web", 80))
	l := listen(t, dir)
	file, err := os.Create(path)
	must(t, err)
	defer file.Close()
	l.keeps(t, "empty and open", 1500*time.Millisecond)
	_, err = file.WriteString(serviceText("web", 81))
	must(t, err)
	must(t, file.Close())
	l.expect(t, "written", state{"web": "81"})
	write(t, path, "")
	l.expect(t, "empty and closed", state{})
}

func TestAMalformedFileCostsNothingElse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "web.yaml")
	write(t, path, serviceText("web", 80)+"---\n"+serviceText("two", 80))
	write(t, filepath.Join(dir, "other.yaml"), serviceText("other", 80))
	l := listen(t, dir)
	good := state{"web": "80", "two": "80", "other": "80"}
	for what, content := range map[string]string{
		"syntax":     serviceText("web", 81) + "---\n{",
		"no kind":    serviceText("web", 81) + "---\napiVersion: v1\n",
		"wrong type": serviceText("web", 81) + "---\n" + strings.Replace(serviceText("two", 81), "port: 81", "port: eighty", 1),
	} {
		write(t, path, content)
		l.await(t, what, func() bool { return len(l.problems) == 2 && maps.Equal(l.services, good) })
		if !strings.HasPrefix(l.problems[1], "web.yaml document 2: ") {
			t.Errorf("%s: problems %q do not name file and document", what, l.problems)
		}
		write(t, path, serviceText("web", 80)+"---\n"+serviceText("two", 80))
		l.expect(t, "mended", good)
	}
	write(t, path, serviceText("web", 81)+"---\napiVersion: v1\nkind: Secret\nmetadata: {name: s}\n")
	l.expect(t, "unknown kind", state{"web": "81", "other": "80"}, "web.yaml document 2: Secret default/s: kind: Secret (v1) is not read")
	write(t, filepath.Join(dir, "new.yaml"), serviceText("new", 80)+"---\n{\n---\n"+serviceText("newer", 80))
	l.expect(t, "malformed from the beginning", state{"web": "81", "other": "80", "new": "80", "newer": "80"}, "web.yaml document 2", "new.yaml document 2: is not YAML")
	must(t, os.Remove(path))
	must(t, os.Remove(filepath.Join(dir, "new.yaml")))
	l.expect(t, "deletion of malformed files", state{"other": "80"})
}

func TestARefusedPolicyKeepsItsDefinitionBefore(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "p.yaml")
	write(t, path, policyText("{podSelector: {}}")+"---\n"+serviceText("web", 80))
	l := listen(t, dir)
	l.expect(t, "at first", state{"web": "80"})
	before := l.deliveries[0].Policies[model.Name{Namespace: "default", Name: "p"}]
	write(t, path, policyText("{podSelector: {}, policyTypes: [Sideways]}")+"---\n"+serviceText("web", 81))
	l.expect(t, "refused", state{"web": "81"}, "Sideways", "the policy is refused")
	if before == nil || len(l.deliveries[len(l.deliveries)-1].Policies) != 0 {
		t.Errorf("policy before %v, changes since %v", before, l.deliveries[len(l.deliveries)-1].Policies)
	}
	write(t, path, serviceText("web", 81))
	l.expect(t, "gone", state{"web": "81"})
	if policy, told := l.deliveries[len(l.deliveries)-1].Policies[before.Name]; !told || policy != nil {
		t.Error("the policy's end is not told")
	}
}

func TestTheFirstFileByNameHasAnObjectThatTwoDefine(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "b.yaml"), serviceText("web", 82))
	l := listen(t, dir)
	l.expect(t, "one file", state{"web": "82"})
	write(t, filepath.Join(dir, "a.yaml"), serviceText("web", 81)+"---\n"+serviceText("web", 83))
	l.expect(t, "two files", state{"web": "81"}, "b.yaml: Service default/web: is also defined in a.yaml", "a.yaml: Service default/web: is defined twice in this file")
	must(t, os.Remove(filepath.Join(dir, "a.yaml")))
	l.expect(t, "the first one gone", state{"web": "82"})
}

func TestAChangeOfOneDocumentIsOneChangedObject(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var content strings.Builder
	for i := range 200 {
		content.WriteString("---\n" + manifestOf(i))
	}
	path := filepath.Join(dir, "all.yaml")
	write(t, path, content.String())
	l := listen(t, dir)
	write(t, path, serviceText("first", 80)+strings.Replace(content.String(), "10.244.0.7\"", "10.244.9.7\"", 1))
	l.await(t, "change", func() bool { return len(l.deliveries) == 2 })
	c := l.deliveries[1]
	if len(c.Services) != 1 || len(c.Slices) != 1 || c.Len() != 2 || c.Slices[model.Name{Namespace: "default", Name: "svc-0-abcde"}] == nil {
		t.Errorf("changes are %d services, %d slices", len(c.Services), len(c.Slices))
	}
	write(t, path, "# comment\n"+content.String()+"\n---\n"+serviceText("first", 80)+"# comment\n")
	l.await(t, "change back", func() bool { return len(l.deliveries) == 3 })
	if c := l.deliveries[2]; c.Len() != 1 || len(c.Slices) != 1 {
		t.Errorf("changes are %d services, %d slices", len(c.Services), len(c.Slices))
	}
	write(t, path, content.String()+"---\n"+serviceText("first", 80))
	l.keeps(t, "the same objects", 300*time.Millisecond)
}

func TestAConfigMapsVolumeIsSwappedAsAWhole(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	version := func(n int) {
		t.Helper()
		data := filepath.Join(dir, fmt.Sprintf("..2026_%d", n))
		must(t, os.Mkdir(data, 0o755))
		write(t, filepath.Join(data, "a.yaml"), serviceText("a", 80+n))
		write(t, filepath.Join(data, "b.yaml"), serviceText("b", 80+n))
		must(t, os.Symlink(filepath.Base(data), filepath.Join(dir, "..data_tmp")))
		must(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	}
	version(1)
	must(t, os.Symlink("..data/a.yaml", filepath.Join(dir, "a.yaml")))
	must(t, os.Symlink("..data/b.yaml", filepath.Join(dir, "b.yaml")))
	l := listen(t, dir)
	l.expect(t, "at first", state{"a": "81", "b": "81"})
	version(2)
	l.expect(t, "swapped", state{"a": "82", "b": "82"})
	if len(l.deliveries) != 2 {
		t.Errorf("%d deliveries, want one for the swap", len(l.deliveries)-1)
	}
	must(t, os.RemoveAll(filepath.Join(dir, "..2026_1")))
	l.keeps(t, "old version removed", 300*time.Millisecond)
}

func TestTheDirectoryItselfGoesAndComes(t *testing.T) {
	t.Parallel()
	parent := t.TempDir()
	dir := filepath.Join(parent, "manifests")
	l := listen(t, dir)
	l.expect(t, "no directory", state{}, "cannot be read: open")
	if l.synced {
		t.Error("a directory that is not there is synced")
	}
	must(t, os.Mkdir(dir, 0o755))
	l.await(t, "made", func() bool { return l.synced && len(l.problems) == 0 })
	write(t, filepath.Join(dir, "web.yaml"), serviceText("web", 80))
	l.expect(t, "file in it", state{"web": "80"})

	must(t, os.Rename(dir, dir+".old"))
	l.expect(t, "moved away", state{"web": "80"}, "cannot be read, its last state stays in use")
	write(t, filepath.Join(dir+".old", "web.yaml"), serviceText("web", 99))
	must(t, os.Mkdir(dir, 0o755))
	write(t, filepath.Join(dir, "web.yaml"), serviceText("web", 81))
	l.expect(t, "made again", state{"web": "81"})
	write(t, filepath.Join(dir, "web.yaml"), serviceText("web", 82))
	l.expect(t, "file in the new one", state{"web": "82"})

	must(t, os.RemoveAll(dir))
	must(t, os.Mkdir(dir, 0o755))
	write(t, filepath.Join(dir, "more.yaml"), serviceText("more", 83))
	l.expect(t, "removed and made at once", state{"more": "83"})
	write(t, filepath.Join(dir, "more.yaml"), serviceText("more", 84))
	l.expect(t, "file in the third one", state{"more": "84"})

	must(t, os.Rename(dir, filepath.Join(parent, "one")))
	must(t, os.Symlink("one", dir))
	l.expect(t, "a link to it", state{"more": "84"})
	must(t, os.Mkdir(filepath.Join(parent, "two"), 0o755))
	write(t, filepath.Join(parent, "two", "web.yaml"), serviceText("web", 85))
	must(t, os.Symlink("two", dir+".new"))
	must(t, os.Rename(dir+".new", dir))
	l.expect(t, "the link swapped", state{"web": "85"})
}

func TestWhatIsNoReadableFileIsReportedAndKept(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "web.yaml"), serviceText("web", 80))
	must(t, syscall.Mkfifo(filepath.Join(dir, "pipe.yaml"), 0o644))
	must(t, os.Mkdir(filepath.Join(dir, "folder.yaml"), 0o755))
	l := listen(t, dir)
	others := []string{"pipe.yaml: is not a regular file", "folder.yaml: is not a regular file"}
	l.expect(t, "at first", state{"web": "80"}, others...)
	must(t, os.Truncate(filepath.Join(dir, "web.yaml"), MaxFileSize+1))
	l.expect(t, "huge", state{"web": "80"}, append(others, "web.yaml: is larger than 64 MiB and is not read")...)
	write(t, filepath.Join(dir, "web.yaml"), serviceText("web", 81))
	l.expect(t, "of the right size", state{"web": "81"}, others...)
}

func TestWhatChangesBetweenPreparingAndRunningIsTold(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "web.yaml"), serviceText("web", 80))
	write(t, filepath.Join(dir, "old.yaml"), serviceText("old", 80))
	d := NewDirectory(dir)
	d.Prepare()
	<-d.prepared
	write(t, filepath.Join(dir, "web.yaml"), serviceText("web", 81))
	write(t, filepath.Join(dir, "api.yaml"), serviceText("api", 82))
	if err := os.Remove(filepath.Join(dir, "old.yaml")); err != nil {
		t.Fatal(err)
	}
	listenTo(t, d).expect(t, "changes since the first reading", state{"web": "81", "api": "82"})
}

func TestALinkToNothingIsNoManifest(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.Symlink(filepath.Join(dir, "later"), filepath.Join(dir, "web.yaml")); err != nil {
		t.Fatal(err)
	}
	l := listen(t, dir)
	l.expect(t, "a link to nothing", state{})
	l.keeps(t, "a link to nothing", time.Second)
	write(t, filepath.Join(dir, "later"), serviceText("web", 80))
	l.expect(t, "a link to a manifest", state{"web": "80"})
}

func TestLostEventsAreMadeUpFor(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	d := NewDirectory(dir)
	d.watcher = newWatcher()
	defer d.watcher.close()
	d.pending["web.yaml"] = &pending{first: time.Now(), due: time.Now(), open: true}
	if !d.note([]event{{lost: true}}, time.Now()) || len(d.pending) != 0 {
		t.Error("after lost events, not everything is looked at")
	}
}

func TestWithoutInotifyFilesArePolled(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	d := NewDirectory(dir)
	d.watcher = &watcher{err: syscall.EMFILE, done: make(chan struct{})}
	var told model.Changes
	sink := func(c model.Changes) { told = c }
	d.identify()
	d.scan(nil)
	d.deliver(sink)
	if !told.Synced || len(told.Problems) != 1 || !strings.Contains(told.Problems[0].String(), "cannot be watched, so changes are noticed up to 10s late: too many open files") {
		t.Errorf("told %+v", told)
	}
	write(t, filepath.Join(dir, "web.yaml"), serviceText("web", 80))
	d.scan(nil)
	d.deliver(sink)
	if len(told.Services) != 1 {
		t.Errorf("told %+v", told)
	}
}

// Whatever happens to the files, what was told adds up to what is there.
func TestRandomChangesAddUpToTheDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l := listen(t, dir)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range 300 {
		path := filepath.Join(dir, fmt.Sprintf("%d.yaml", random.IntN(6)))
		var content strings.Builder
		for range random.IntN(4) {
			content.WriteString("---\n" + serviceText(fmt.Sprint("s", random.IntN(10)), 1+random.IntN(1000)))
		}
		switch random.IntN(6) {
		case 0:
			_ = os.Remove(path)
		case 1:
			write(t, path+".tmp", content.String())
			must(t, os.Rename(path+".tmp", path))
		case 2:
			_ = os.Rename(path, filepath.Join(dir, fmt.Sprintf("%d.yaml", random.IntN(6))))
		default:
			write(t, path, content.String())
		}
		if random.IntN(10) == 0 {
			time.Sleep(time.Duration(random.IntN(60)) * time.Millisecond)
		}
	}
	want := &listener{services: make(map[string]string), files: make(map[string]string)}
	ctx, cancel := context.WithCancel(t.Context())
	_ = NewDirectory(dir).Run(ctx, func(c model.Changes) {
		want.take(c)
		cancel()
	})
	l.await(t, "all changes", func() bool {
		return maps.Equal(l.services, want.services) && maps.Equal(l.files, want.files) && slices.Equal(l.problems, want.problems)
	})
	l.keeps(t, "nothing more", time.Second)
	if diff := cmp.Diff(want.services, l.services); diff != "" {
		t.Errorf("services (-there +told):\n%s", diff)
	}
}
