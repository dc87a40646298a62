// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A Tree is an unpacked kernel.
type Tree struct {
	// Release is uname -r.
	Release string `json:"release"`
	// Version is the Debian package's.
	Version string `json:"version"`
	// Root holds the unpacked packages.
	Root string `json:"-"`
	// Dir is the directory under Root, inside the cache.
	Dir     string    `json:"dir"`
	Checked time.Time `json:"checked"`
	// Stale is why the mirror could not be asked for a newer one.
	Stale error `json:"-"`
}

// Series is the release's first two numbers: "6.1".
func (t Tree) Series() string {
	return series(t.Release)
}

func series(release string) string {
	return regexp.MustCompile(`^\d+\.\d+`).FindString(release)
}

// freshFor is how long a fetched kernel is used without asking for a newer one.
const freshFor = 7 * 24 * time.Hour

// Cache is where kernels and logs stay between runs.
func Cache(moduleRoot string) string {
	if dir := os.Getenv("XDG_CACHE_HOME"); dir != "" {
		return filepath.Join(dir, "mooring", "kernels")
	}
	return filepath.Join(moduleRoot, ".cache", "kernels")
}

// Fetch returns the kernel from the cache, or downloads and unpacks it there
// with apt's own programs and verification, but with sources, lists and cache of
// our own: the machine's apt stays as it is, and no root is needed. A mirror out
// of reach is no failure while the cache has some version.
func Fetch(ctx context.Context, cache string, k Kernel) (Tree, error) {
	dir := filepath.Join(cache, k.Name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Tree{}, fmt.Errorf("make the kernel cache: %w", err)
	}
	unlock, err := lock(filepath.Join(dir, "lock"))
	if err != nil {
		return Tree{}, err
	}
	defer unlock()

	have, haveErr := readTree(dir)
	if haveErr == nil && time.Since(have.Checked) < freshFor && os.Getenv("KERNELS_REFRESH") != "1" {
		return have, nil
	}
	got, err := download(ctx, dir, k)
	if err != nil && haveErr == nil {
		have.Stale = err
		return have, nil
	}
	if err != nil {
		return Tree{}, fmt.Errorf("fetch kernel %s: %w", k.Name, err)
	}
	return got, nil
}

func lock(file string) (func(), error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open the lock: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", file, err)
	}
	return func() { f.Close() }, nil
}

func readTree(dir string) (Tree, error) {
	text, err := os.ReadFile(filepath.Join(dir, "current.json"))
	if err != nil {
		return Tree{}, err
	}
	var t Tree
	if err := json.Unmarshal(text, &t); err != nil {
		return Tree{}, err
	}
	t.Root = filepath.Join(dir, t.Dir)
	if _, err := t.Image(); err != nil {
		return Tree{}, err
	}
	return t, nil
}

// download resolves, downloads and unpacks; dir is locked.
func download(ctx context.Context, dir string, k Kernel) (Tree, error) {
	a, err := newApt(ctx, dir, k)
	if err != nil {
		return Tree{}, err
	}
	defer a.close()
	packages, err := a.kernelPackages(ctx, k.Package)
	if err != nil {
		return Tree{}, err
	}
	t := Tree{Version: packages[0].version, Checked: time.Now().UTC()}
	t.Dir = regexp.MustCompile(`[^A-Za-z0-9.+~-]`).ReplaceAllString(t.Version, "_")
	t.Root = filepath.Join(dir, t.Dir)
	if t.Release, err = findRelease(t.Root); err != nil {
		if err := a.unpack(ctx, packages, t.Root); err != nil {
			return Tree{}, err
		}
		if t.Release, err = findRelease(t.Root); err != nil {
			return Tree{}, err
		}
	}
	text, err := json.MarshalIndent(t, "", "  ")
	if err != nil {
		return Tree{}, fmt.Errorf("encode the kernel's record: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "current.json"), append(text, '\n'), 0o644); err != nil {
		return Tree{}, fmt.Errorf("record the kernel: %w", err)
	}
	return t, dropOthers(dir, t.Dir)
}

// dropOthers removes versions that a newer one has replaced.
func dropOthers(dir, keep string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("list the kernel cache: %w", err)
	}
	for _, e := range entries {
		if e.IsDir() && e.Name() != keep && e.Name() != "logs" {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("remove an old kernel: %w", err)
			}
		}
	}
	return nil
}

// findRelease names the one kernel whose modules are under root. Until 7.0 they
// are in /lib, from then on in /usr/lib.
func findRelease(root string) (string, error) {
	var found []string
	for _, lib := range []string{"lib", "usr/lib"} {
		more, err := filepath.Glob(filepath.Join(root, lib, "modules/*/kernel"))
		if err != nil {
			return "", fmt.Errorf("look for modules: %w", err)
		}
		found = append(found, more...)
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%d kernels' modules under %s, expected one", len(found), root)
	}
	return filepath.Base(filepath.Dir(found[0])), nil
}

// Image is the path of the bootable kernel.
func (t Tree) Image() (string, error) {
	for _, file := range []string{
		filepath.Join(t.Root, "boot", "vmlinuz-"+t.Release),
		filepath.Join(t.Root, "usr/lib/modules", t.Release, "vmlinuz"),
	} {
		if _, err := os.Stat(file); err == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("no vmlinuz for %s under %s: remove the directory and run again", t.Release, t.Root)
}

// apt is a private apt: its own sources, lists, cache and dpkg status.
type apt struct {
	dir, config string
}

type pkg struct {
	name, version string
	depends       []string
}

func newApt(ctx context.Context, parent string, k Kernel) (*apt, error) {
	sources, err := readSources("/etc/apt")
	if err != nil {
		return nil, err
	}
	// Not under the cache: apt's sandbox user must reach it, and it is removed.
	dir, err := os.MkdirTemp("", "mooring-apt-")
	if err != nil {
		return nil, fmt.Errorf("make a directory for apt: %w", err)
	}
	a := &apt{dir: dir, config: filepath.Join(dir, "apt.conf")}
	ok := false
	defer func() {
		if !ok {
			a.close()
		}
	}()
	var list strings.Builder
	for _, suite := range k.Suites {
		mirror, err := mirrorFor(suite, sources)
		if err != nil {
			return nil, err
		}
		line, err := mirror.line(suite, dir)
		if err != nil {
			return nil, err
		}
		list.WriteString(line)
	}
	for _, sub := range []string{"parts", "lists/partial", "cache/archives/partial", "state"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, fmt.Errorf("make a directory for apt: %w", err)
		}
	}
	// APT_CONFIG is read before the directories it names: the machine's hooks,
	// pins and translations do not apply, only how it reaches the mirror.
	reach, err := command(ctx, nil, "", "apt-config", "dump")
	if err != nil {
		return nil, err
	}
	var conf strings.Builder
	for line := range strings.Lines(string(reach)) {
		if strings.HasPrefix(line, "Acquire::") && !strings.HasPrefix(line, "Acquire::IndexTargets") &&
			!strings.HasPrefix(line, "Acquire::Languages") {
			conf.WriteString(line)
		}
	}
	fmt.Fprintf(&conf, `
Acquire::Languages "none";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Sandbox::User "root";
Dir::Etc::main "/dev/null";
Dir::Etc::parts "%[1]s/parts";
Dir::Etc::sourcelist "%[1]s/sources.list";
Dir::Etc::sourceparts "%[1]s/parts";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "%[1]s/parts";
Dir::State "%[1]s/state";
Dir::State::lists "%[1]s/lists";
Dir::State::status "%[1]s/status";
Dir::Cache "%[1]s/cache";
`, dir)
	for name, text := range map[string]string{"apt.conf": conf.String(), "sources.list": list.String(), "status": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return nil, fmt.Errorf("write apt's %s: %w", name, err)
		}
	}
	if _, err := a.run(ctx, dir, "apt-get", "update", "-q", "--error-on=any"); err != nil {
		return nil, err
	}
	ok = true
	return a, nil
}

func (a *apt) close() {
	os.RemoveAll(a.dir)
}

func (a *apt) run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	return command(ctx, append(os.Environ(), "APT_CONFIG="+a.config, "LC_ALL=C"), dir, name, args...)
}

// kernelPart matches the packages that carry a kernel of one version.
var kernelPart = regexp.MustCompile(`^linux-(image|binary|modules|base)-[0-9]`)

// kernelPackages follows the meta package's dependencies to the packages that
// hold the kernel and its modules: one until 6.19, four since.
func (a *apt) kernelPackages(ctx context.Context, meta string) ([]pkg, error) {
	var found []pkg
	seen := map[string]bool{}
	queue := []string{meta}
	for len(queue) > 0 {
		name := queue[0]
		queue = queue[1:]
		if seen[name] {
			continue
		}
		seen[name] = true
		p, err := a.show(ctx, name)
		if err != nil {
			return nil, err
		}
		if name != meta {
			found = append(found, p)
		}
		for _, d := range p.depends {
			if kernelPart.MatchString(d) {
				queue = append(queue, d)
			}
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%s depends on no kernel", meta)
	}
	return found, nil
}

func (a *apt) show(ctx context.Context, name string) (pkg, error) {
	text, err := a.run(ctx, a.dir, "apt-cache", "show", "--no-all-versions", name)
	if err != nil {
		return pkg{}, err
	}
	return parsePackage(string(text)), nil
}

// parsePackage reads the first stanza of apt-cache show. Of alternatives
// (`dracut | initramfs-tools`) the first counts: none is a kernel.
func parsePackage(text string) pkg {
	var p pkg
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if line == "" {
			break
		}
		key, value, _ := strings.Cut(line, ": ")
		switch key {
		case "Package":
			p.name = value
		case "Version":
			p.version = value
		case "Depends":
			for d := range strings.SplitSeq(value, ",") {
				p.depends = append(p.depends, strings.Fields(d)[0])
			}
		}
	}
	return p
}

// unpack downloads the packages and lays them over one another at root, which
// appears whole or not at all.
func (a *apt) unpack(ctx context.Context, packages []pkg, root string) error {
	args := []string{"download", "-q"}
	for _, p := range packages {
		args = append(args, p.name+"="+p.version)
	}
	if _, err := a.run(ctx, a.dir, "apt-get", args...); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(a.dir, "*.deb"))
	if err != nil {
		return fmt.Errorf("list the downloads: %w", err)
	}
	partial := root + ".partial"
	for _, old := range []string{partial, root} {
		if err := os.RemoveAll(old); err != nil {
			return fmt.Errorf("remove an unfinished kernel: %w", err)
		}
	}
	slices.Sort(debs)
	for _, deb := range debs {
		if _, err := command(ctx, nil, a.dir, "dpkg-deb", "-x", deb, partial); err != nil {
			return err
		}
	}
	if err := os.Rename(partial, root); err != nil {
		return fmt.Errorf("put the kernel in place: %w", err)
	}
	return nil
}

// command runs a program; its error ends with what the program said.
func command(ctx context.Context, env []string, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env, cmd.Dir = env, dir
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		said := strings.TrimSpace(errs.String())
		if said == "" {
			said = strings.TrimSpace(out.String())
		}
		return nil, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, said)
	}
	return out.Bytes(), nil
}
