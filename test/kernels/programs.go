// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// needs are the machine's programs that the harness runs, by Debian package.
var needs = map[string]string{
	"qemu-system-x86_64": "qemu-system-x86",
	"busybox":            "busybox-static",
	"dpkg-deb":           "dpkg",
	"xz":                 "xz-utils",
	"zstd":               "zstd",
	"iptables":           "iptables",
	"ip6tables":          "iptables",
	"nft":                "nftables",
	"ip":                 "iproute2",
	"tc":                 "iproute2",
	"ss":                 "iproute2",
	"conntrack":          "conntrack",
}

// Install puts what the harness and the jobs' programs need onto the machine
// with apt-get. Without root, or where apt does not have it, the error says what to install.
func Install(ctx context.Context, jobs []Job) error {
	if runtime.GOARCH != "amd64" {
		return fmt.Errorf("the kernel matrix takes busybox and its guests' programs from the machine, which must be amd64, not %s", runtime.GOARCH)
	}
	want := []string{"qemu-system-x86_64", "busybox", "dpkg-deb", "xz", "zstd"}
	for _, j := range jobs {
		want = append(want, j.Programs...)
	}
	packages := missing(want)
	if len(packages) == 0 {
		return nil
	}
	line := "apt-get install -y --no-install-recommends " + strings.Join(packages, " ")
	if os.Geteuid() != 0 {
		return fmt.Errorf("the kernel matrix needs %s: run as root: %s", strings.Join(packages, ", "), line)
	}
	env := append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	for _, args := range [][]string{
		{"-q", "-oDPkg::Lock::Timeout=300", "update"},
		append([]string{"-q", "-oDPkg::Lock::Timeout=300", "install", "-y", "--no-install-recommends"}, packages...),
	} {
		if _, err := command(ctx, env, "", "apt-get", args...); err != nil {
			return err
		}
	}
	if still := missing(want); len(still) > 0 {
		return fmt.Errorf("still missing after %q: %s", line, strings.Join(still, ", "))
	}
	return nil
}

// missing lists the packages of the programs that are not there. A busybox with
// shared libraries could not be the guest's first program.
func missing(programs []string) []string {
	var packages []string
	for _, name := range programs {
		file, err := findProgram(name)
		if err == nil && (name != "busybox" || isStatic(file)) {
			continue
		}
		p := needs[name]
		if p == "" {
			p = name
		}
		if !slices.Contains(packages, p) {
			packages = append(packages, p)
		}
	}
	return packages
}

// findProgram also looks where a user's PATH does not.
func findProgram(name string) (string, error) {
	if file, err := exec.LookPath(name); err == nil {
		return file, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if file, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("no %s in PATH, /usr/sbin or /sbin", name)
}

func isStatic(file string) bool {
	f, err := elf.Open(file)
	if err != nil {
		return false
	}
	defer f.Close()
	return !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
}

// addProgram takes a program of the machine and its shared libraries into the
// guest, under the name by which it was found: iptables is a link to one binary
// of many names.
func (im *image) addProgram(name string) error {
	file, err := findProgram(name)
	if err != nil {
		return err
	}
	if err := im.addShared(file); err != nil {
		return err
	}
	if strings.Contains(name, "tables") {
		// iptables opens its matches and targets by name.
		extensions, err := filepath.Glob("/usr/lib/*/xtables/*.so")
		if err != nil {
			return fmt.Errorf("list iptables' extensions: %w", err)
		}
		for _, extension := range extensions {
			if err := im.addShared(extension); err != nil {
				return err
			}
		}
	}
	return nil
}

// addShared adds an ELF file at its own path, with its loader and libraries.
func (im *image) addShared(name string) error {
	to := inGuest(name)
	if _, ok := im.files[to]; ok {
		return nil
	}
	real, err := filepath.EvalSymlinks(name)
	if err != nil {
		return fmt.Errorf("take a program into the guest: %w", err)
	}
	if at := inGuest(real); at != to {
		im.link(to, at)
		return im.addShared(real)
	}
	if err := im.copy(to, real); err != nil {
		return err
	}
	f, err := elf.Open(real)
	var format *elf.FormatError
	if errors.As(err, &format) {
		return nil // A script: its interpreter is its job's own affair.
	}
	if err != nil {
		return fmt.Errorf("take a program into the guest: %w", err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		loader := make([]byte, p.Filesz)
		if _, err := p.ReadAt(loader, 0); err != nil {
			return fmt.Errorf("read the loader of %s: %w", real, err)
		}
		if err := im.addShared(strings.TrimRight(string(loader), "\x00")); err != nil {
			return err
		}
	}
	libraries, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("read the libraries of %s: %w", real, err)
	}
	own, err := f.DynString(elf.DT_RUNPATH)
	if err != nil {
		return fmt.Errorf("read the library path of %s: %w", real, err)
	}
	for _, library := range libraries {
		found, err := findLibrary(library, own)
		if err != nil {
			return fmt.Errorf("%s: %w", real, err)
		}
		if err := im.addShared(found); err != nil {
			return err
		}
	}
	return nil
}

func findLibrary(name string, own []string) (string, error) {
	for _, dir := range append(own, "/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib", "/lib", "/usr/local/lib") {
		file := path.Join(dir, name)
		if _, err := os.Stat(file); err == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("no library %s on this machine", name)
}
