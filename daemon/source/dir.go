// SPDX-License-Identifier: Apache-2.0

package source

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mooring-cni/mooring/daemon/model"
)

// MaxFileSize is how large one manifest may be. It is far above what the API
// server would take for one object, and keeps a mistake from eating the node.
const MaxFileSize = 64 << 20

// What one file may say is wrong with it, lest the list be the next problem.
const maxFileProblems = 50

const (
	// A change is read when the writer has closed the file and this has passed,
	// so that an editor's delete and create are one change ...
	settle = 40 * time.Millisecond
	// ... or, while the writer keeps it open, when it has paused for this long ...
	openSettle = 250 * time.Millisecond
	// ... but never later than this after the first sign.
	maxSettle = 800 * time.Millisecond
	// How often the directory itself is looked at: it may be another one by now.
	identityPeriod = 250 * time.Millisecond
	// The files are looked at without any sign too, as events can be lost and
	// links can point elsewhere; the pause is this share of the time it takes.
	pollShare   = 200
	pollMinimum = 500 * time.Millisecond
	pollMaximum = 10 * time.Second
)

// Directory is a directory of manifests as a source of objects: every *.yaml,
// *.yml and *.json in it that does not start with a dot, with any number of
// documents and lists.
//
// What is wrong is reported and the rest is used. A file that cannot be decoded
// keeps its last good state, and so does the directory when it is gone; only
// the deletion of a file deletes its objects. Where two files define one
// object, the first by name has it.
type Directory struct {
	path string
	// The state belongs to Run's goroutine, and before that to Prepare's.
	files     map[string]*manifest
	troubled  map[string]bool // files with problems
	claims    map[key][]claim // sorted; the first one is in use
	delivered map[key]any
	contested map[key]bool
	changed   map[key]bool      // since the last delivery
	trouble   map[string]string // with the directory itself: what -> message
	synced    bool
	watcher   *watcher
	pending   map[string]*pending
	prepared  chan struct{} // closed when it has been read for the first time
	lasted    time.Duration // looking at it then

	// What the sink has heard.
	touched    bool // since then something was looked at anew
	told       bool
	toldSynced bool
	problems   []model.Problem
}

// manifest is a file as it was read last.
type manifest struct {
	stamp   stamp
	parsed  *parsed
	objects []object // in use
	good    bool     // objects are of a state that could be decoded entirely
	trouble string   // with the file as a whole
}

// stamp tells whether a file may have changed.
type stamp struct {
	device, inode uint64
	size          int64
	modified      time.Time
	changed       syscall.Timespec
}

// claim is a definition of an object by a file.
type claim struct {
	file  string
	place int
	value any
}

// pending is a file that has changed and is read when it has settled.
type pending struct {
	first, due time.Time
	open       bool // a writer has it open
}

// NewDirectory makes a source of a directory, which need not exist yet.
func NewDirectory(path string) *Directory {
	return &Directory{
		path:      path,
		files:     make(map[string]*manifest),
		troubled:  make(map[string]bool),
		claims:    make(map[key][]claim),
		delivered: make(map[key]any),
		contested: make(map[key]bool),
		trouble:   make(map[string]string),
		pending:   make(map[string]*pending),
	}
}

// Prepare begins to read the directory while others get ready: of what it takes
// to be there that is the larger part, and for another processor than what loads
// programs. Run waits for it.
func (d *Directory) Prepare() {
	d.prepared = make(chan struct{})
	go func() {
		defer close(d.prepared)
		d.watcher = newWatcher()
		d.identify()
		d.lasted = d.scan(nil)
	}()
}

// Run reads the directory, delivers all of it and then every change, until the
// context ends. As long as there is no directory it delivers only the problem,
// not synced: an absent directory says nothing about what should be.
func (d *Directory) Run(ctx context.Context, sink Sink) error {
	if d.prepared == nil {
		d.Prepare()
	}
	<-d.prepared
	defer d.watcher.close()
	d.deliver(sink)
	identity := time.NewTicker(identityPeriod)
	defer identity.Stop()
	poll := time.NewTimer(pollPause(d.lasted))
	defer poll.Stop()
	settled := time.NewTicker(settle / 2)
	settled.Stop()
	defer settled.Stop()
	ticking := false
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case events := <-d.watcher.events:
			if d.note(events, time.Now()) {
				d.scan(nil)
				d.deliver(sink)
			}
		case now := <-settled.C:
			if names := d.due(now); len(names) > 0 {
				d.scan(names)
				d.deliver(sink)
			}
		case <-identity.C:
			if d.identify() {
				d.scan(nil)
			}
			d.deliver(sink)
		case <-poll.C:
			poll.Reset(pollPause(d.scan(nil)))
			d.deliver(sink)
		}
		if waiting := len(d.pending) > 0; waiting != ticking {
			if ticking = waiting; waiting {
				settled.Reset(settle / 2)
			} else {
				settled.Stop()
			}
		}
	}
}

func pollPause(scan time.Duration) time.Duration {
	return min(max(scan*pollShare, pollMinimum), pollMaximum)
}

// note takes the watcher's events. It gives true when only looking at
// everything helps.
func (d *Directory) note(events []event, now time.Time) (everything bool) {
	for _, e := range events {
		switch {
		case e.lost:
			// Whether a writer still has a file open is not known any more.
			clear(d.pending)
			everything = true
		case e.descriptor != d.watcher.descriptor:
		case e.self:
			d.watcher.unwatch() // identify looks for the next
		case strings.HasPrefix(e.name, ".."):
			// The link that a ConfigMap's files go through.
			everything = true
		case isManifest(e.name):
			p := d.pending[e.name]
			if p == nil {
				p = &pending{first: now}
				d.pending[e.name] = p
			}
			p.open = e.open
			p.due = now.Add(settle)
			if p.open {
				p.due = now.Add(openSettle)
			}
			if last := p.first.Add(maxSettle); p.due.After(last) {
				p.due = last
			}
		}
	}
	return everything
}

// due takes the names that have settled out of those pending.
func (d *Directory) due(now time.Time) []string {
	var names []string
	for name, p := range d.pending {
		if now.Before(p.due) {
			continue
		}
		if p.open && d.awaits(name) {
			p.due = now.Add(openSettle)
			continue
		}
		names = append(names, name)
		delete(d.pending, name)
	}
	slices.Sort(names)
	return names
}

// awaits tells whether a file is empty only because its writer has not come to
// writing yet: "kubectl get ... > file" empties it a second before.
func (d *Directory) awaits(name string) bool {
	if f := d.files[name]; f == nil || len(f.objects) == 0 {
		return false
	}
	info, err := os.Stat(filepath.Join(d.path, name))
	return err == nil && info.Size() == 0
}

func isManifest(name string) bool {
	if strings.HasPrefix(name, ".") {
		return false
	}
	switch filepath.Ext(name) {
	case ".yaml", ".yml", ".json":
		return true
	}
	return false
}

// identify makes sure that the directory that is watched is the one that has
// the path now. It gives true when that is another one.
func (d *Directory) identify() bool {
	changed, err := d.watcher.watch(d.path)
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		d.ail("watch", "") // an absent directory is scan's to report
	default:
		d.ail("watch", fmt.Sprintf("cannot be watched, so changes are noticed up to %s late: %v", pollMaximum, err))
	}
	if changed {
		clear(d.pending)
	}
	return changed
}

// ail says what is wrong with the directory itself, or with "" that it is not.
func (d *Directory) ail(what, message string) {
	if d.trouble[what] == message {
		return
	}
	d.touched = true
	if d.trouble[what] = message; message == "" {
		delete(d.trouble, what)
	}
}

// scan brings the named files up to date, or with nil those of the whole
// directory that look different. It gives the time that looking took.
func (d *Directory) scan(names []string) (looking time.Duration) {
	start := time.Now()
	all := names == nil
	if all {
		entries, err := os.ReadDir(d.path)
		if err != nil {
			message := fmt.Sprintf("cannot be read: %v; make the directory, or mend the key manifests", err)
			if d.synced {
				message = fmt.Sprintf("cannot be read, its last state stays in use: %v", err)
			}
			d.ail("read", message)
			return time.Since(start)
		}
		d.ail("read", "")
		d.touched = d.touched || !d.synced
		d.synced = true
		present := make(map[string]bool, len(entries))
		for _, entry := range entries {
			if name := entry.Name(); isManifest(name) {
				present[name] = true
				names = append(names, name)
			}
		}
		for name := range d.files {
			if !present[name] {
				names = append(names, name)
			}
		}
	} else if _, err := os.Stat(d.path); err != nil {
		return 0 // the directory went, not only its files
	}
	if all {
		names = slices.DeleteFunc(names, func(name string) bool { return d.pending[name] != nil || !d.differs(name) })
	}
	looking = time.Since(start)
	if len(names) == 0 {
		return looking
	}
	d.touched = true
	files := make([]*manifest, len(names)) // nil: there is none
	parallel(len(names), func(i int) { files[i] = read(d.path, names[i], d.files[names[i]]) })
	objects := 0
	for _, f := range files {
		if f != nil {
			objects += len(f.objects)
		}
	}
	dirty := make(map[key]bool, objects)
	if len(d.files) == 0 {
		// Maps that grow are filled twice over.
		d.files, d.claims, d.delivered = make(map[string]*manifest, len(names)), make(map[key][]claim, objects), make(map[key]any, objects)
	}
	for i, name := range names {
		before, after := d.files[name], files[i]
		delete(d.troubled, name)
		if after != nil {
			d.files[name] = after
			if after.ails() {
				d.troubled[name] = true
			}
		} else {
			delete(d.files, name)
			after = &manifest{}
		}
		d.claim(name, before, after, dirty)
	}
	d.decide(dirty)
	return looking
}

// differs tells whether a file may have changed since it was read.
func (d *Directory) differs(name string) bool {
	before := d.files[name]
	if before == nil {
		return true // or gone again, as reading it will find
	}
	info, err := os.Stat(filepath.Join(d.path, name))
	return err != nil || before.stamp != stampOf(info)
}

func stampOf(info fs.FileInfo) stamp {
	s := stamp{size: info.Size(), modified: info.ModTime()}
	if system, ok := info.Sys().(*syscall.Stat_t); ok {
		s.device, s.inode, s.changed = system.Dev, system.Ino, system.Ctim
	}
	return s
}

// read reads a file, keeping of its state before what the file does not replace.
// It gives nil where there is no such file.
func read(directory, name string, before *manifest) *manifest {
	if before == nil {
		before = &manifest{}
	}
	data, at, err := content(filepath.Join(directory, name))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		kept := *before
		kept.stamp, kept.trouble = at, err.Error()
		if before.parsed == nil {
			kept.parsed = &parsed{}
		}
		return &kept
	}
	f := &manifest{stamp: at, good: true, parsed: parse(name, data, before.parsed)}
	for _, document := range f.parsed.documents {
		f.good = f.good && !document.malformed
	}
	if !f.good && before.good {
		f.good, f.objects = true, before.objects
		f.trouble = "cannot be decoded; its last good state stays in use"
		return f
	}
	var last map[key]any
	for _, document := range f.parsed.documents {
		for _, o := range document.objects {
			if o.refused {
				if last == nil {
					last = make(map[key]any, len(before.objects))
					for _, o := range before.objects {
						last[o.key] = o.value
					}
				}
				o.value = last[o.key]
			}
			if o.value != nil || !o.refused {
				f.objects = append(f.objects, o)
			}
		}
	}
	return f
}

// content gives what a regular file holds. Opening does not wait for the other
// end of a pipe, and a size is no promise for what is still being written. The
// system's calls are called themselves: os.File does twice as many, for a poller
// that regular files have no use for.
func content(path string) ([]byte, stamp, error) {
	fd, err := again(func() (int, error) {
		return unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		at := stamp{}
		if info, statErr := os.Stat(path); statErr == nil {
			at = stampOf(info)
		}
		return nil, at, fmt.Errorf("cannot be opened: %w", err)
	}
	defer unix.Close(fd)
	var info unix.Stat_t
	if err := unix.Fstat(fd, &info); err != nil {
		return nil, stamp{}, fmt.Errorf("cannot be read: %w", err)
	}
	at := stamp{
		device: info.Dev, inode: info.Ino, size: info.Size, modified: time.Unix(info.Mtim.Unix()),
		changed: syscall.Timespec{Sec: info.Ctim.Sec, Nsec: info.Ctim.Nsec},
	}
	if info.Mode&unix.S_IFMT != unix.S_IFREG {
		what, _ := os.Stat(path)
		if what == nil {
			return nil, at, errors.New("is not a regular file")
		}
		return nil, at, fmt.Errorf("is not a regular file (%s)", what.Mode().Type())
	}
	tooLarge := func() error {
		return fmt.Errorf("is larger than %d MiB and is not read; split it into several files", MaxFileSize>>20)
	}
	if info.Size > MaxFileSize {
		return nil, at, tooLarge()
	}
	data := make([]byte, 0, info.Size+1)
	for {
		n, err := again(func() (int, error) { return unix.Read(fd, data[len(data):cap(data)]) })
		if err != nil {
			return nil, at, fmt.Errorf("cannot be read: %w", err)
		}
		if n == 0 {
			return data, at, nil
		}
		data = data[:len(data)+n]
		if len(data) > MaxFileSize {
			return nil, at, tooLarge()
		}
		if len(data) == cap(data) {
			data = slices.Grow(data, max(512, len(data)/2))
		}
	}
}

// again makes a system call once more where a signal came in between.
func again(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); err != unix.EINTR {
			return n, err
		}
	}
}

// unwrapPath leaves the path out, which the problem names already.
func unwrapPath(err error) error {
	if pathErr := (*fs.PathError)(nil); errors.As(err, &pathErr) {
		return pathErr.Err
	}
	return err
}

// claim replaces what a file defines, and notes the objects that this concerns.
func (d *Directory) claim(name string, before, after *manifest, dirty map[key]bool) {
	// A rewritten file mostly says what it said: objects of documents that did
	// not change are the same values at the same place.
	if before != nil {
		for place, o := range before.objects {
			if place < len(after.objects) && after.objects[place].key == o.key && after.objects[place].value == o.value {
				continue
			}
			d.claims[o.key] = slices.DeleteFunc(d.claims[o.key], func(c claim) bool { return c.file == name && c.place == place })
			dirty[o.key] = true
		}
	}
	for place, o := range after.objects {
		if before != nil && place < len(before.objects) && before.objects[place].key == o.key && before.objects[place].value == o.value {
			continue
		}
		claims := append(d.claims[o.key], claim{name, place, o.value})
		slices.SortFunc(claims, func(a, b claim) int {
			return cmp.Or(strings.Compare(a.file, b.file), cmp.Compare(a.place, b.place))
		})
		d.claims[o.key] = claims
		dirty[o.key] = true
	}
}

// decide settles which definition of an object is in use.
func (d *Directory) decide(dirty map[key]bool) {
	for k := range dirty {
		switch claims := d.claims[k]; len(claims) {
		case 0:
			delete(d.claims, k)
			delete(d.contested, k)
		case 1:
			delete(d.contested, k)
		default:
			d.contested[k] = true
		}
	}
	if d.changed == nil {
		d.changed = dirty
		return
	}
	maps.Copy(d.changed, dirty)
}

// deliver tells the sink what became different since it was told last.
func (d *Directory) deliver(sink Sink) {
	if !d.touched {
		return
	}
	d.touched = false
	changes := model.Changes{Synced: d.synced}
	for k := range d.changed {
		var value any
		if claims := d.claims[k]; len(claims) > 0 {
			value = claims[0].value
		}
		before, had := d.delivered[k]
		if value == nil {
			delete(d.delivered, k)
			if had {
				put(&changes, k, nil)
			}
			continue
		}
		d.delivered[k] = value
		if !had || before != value && !reflect.DeepEqual(before, value) {
			put(&changes, k, value)
		}
	}
	d.changed = nil
	changes.Problems = d.list()
	if d.told && changes.Synced == d.toldSynced && changes.Len() == 0 && slices.Equal(changes.Problems, d.problems) {
		return
	}
	d.told, d.toldSynced, d.problems = true, changes.Synced, changes.Problems
	sink(changes)
}

func put(c *model.Changes, k key, value any) {
	switch k.kind {
	case kindService:
		set(&c.Services, k.name, value)
	case kindSlice:
		set(&c.Slices, k.name, value)
	case kindPod:
		set(&c.Pods, k.name, value)
	case kindNamespace:
		set(&c.Namespaces, k.name.Name, value)
	case kindNode:
		set(&c.Nodes, k.name.Name, value)
	case kindPolicy:
		set(&c.Policies, k.name, value)
	case kindClusterPolicy:
		set(&c.ClusterPolicies, k.name.Name, value)
	}
}

func set[K comparable, V any](m *map[K]*V, k K, value any) {
	if *m == nil {
		*m = make(map[K]*V)
	}
	v, _ := value.(*V)
	(*m)[k] = v
}

// list gives all problems as they stand.
func (d *Directory) list() []model.Problem {
	var problems []model.Problem
	for _, what := range slices.Sorted(maps.Keys(d.trouble)) {
		problems = append(problems, model.Problem{File: d.path, Message: d.trouble[what]})
	}
	for name := range d.troubled {
		problems = append(problems, d.files[name].list(name)...)
	}
	for k := range d.contested {
		claims := d.claims[k]
		for _, c := range claims[1:] {
			message := fmt.Sprintf("is also defined in %s, which is used, as the first file by name", claims[0].file)
			if c.file == claims[0].file {
				message = "is defined twice in this file; the first definition is used"
			}
			problems = append(problems, model.Problem{File: c.file, Object: k.String(), Message: message})
		}
	}
	slices.SortFunc(problems, model.CompareProblems)
	return problems
}

func (f *manifest) ails() bool {
	return f.trouble != "" || slices.ContainsFunc(f.parsed.documents, func(d *document) bool { return len(d.problems) > 0 })
}

func (f *manifest) list(name string) []model.Problem {
	var problems []model.Problem
	if f.trouble != "" {
		problems = append(problems, model.Problem{File: name, Message: f.trouble})
	}
	more := 0
	for i, document := range f.parsed.documents {
		for _, p := range document.problems {
			if len(problems) > maxFileProblems {
				more++
				continue
			}
			p.File, p.Document = name, i+1
			problems = append(problems, p)
		}
	}
	if more > 0 {
		problems = append(problems, model.Problem{File: name, Message: fmt.Sprintf("has %d more problems; mend those listed first", more)})
	}
	return problems
}
