// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A guest is one kernel with the jobs that it runs.
type guest struct {
	tree Tree
	jobs []builtJob
	// logs is where the console and the jobs' output stay for people.
	logs string
	// wall overrides the limit on the wall clock.
	wall time.Duration
}

// A builtJob is a job whose binaries exist.
type builtJob struct {
	Job
	// binary is the test binary, commands the directory of the job's commands,
	// source the module's root.
	binary, commands, source string
}

// An outcome is what came back from one boot.
type outcome struct {
	// boot is from QEMU's start to the first job.
	boot, total time.Duration
	// cpu is the processor time that the emulation took.
	cpu  time.Duration
	jobs []jobOutcome
	// absent are the modules that this kernel does not have.
	absent []string
	// err says why the guest did not reach its end.
	err error
	// console is the path of the kernel's console.
	console string
}

type jobOutcome struct {
	started, ended bool
	code           int
	took           time.Duration
	output         []byte
}

// bootLimit is what the guest may take apart from its jobs: about 10 s on an
// idle machine, more where two guests and a build share two cores.
const bootLimit = 90 * time.Second

func (j Job) timeout() time.Duration {
	if j.Timeout == 0 {
		return 5 * time.Minute
	}
	return j.Timeout
}

// limit is the wall clock's: a guest whose jobs stop themselves in time never meets it.
func (g guest) limit() time.Duration {
	if g.wall != 0 {
		return g.wall
	}
	limit := bootLimit
	for _, j := range g.jobs {
		limit += j.timeout() + killAfter
	}
	return limit
}

// killAfter is how long a test binary has to report its own time-out.
const killAfter = 10 * time.Second

// The guest's two serial ports: the kernel's console goes to the first; the
// second carries only what the jobs print, between marks.
const (
	mark   = "@@mooring "
	srcDir = "/src"
)

// run packs, boots and waits.
func (g guest) run(ctx context.Context) (outcome, error) {
	var o outcome
	if err := os.MkdirAll(g.logs, 0o755); err != nil {
		return o, fmt.Errorf("make a directory for the console: %w", err)
	}
	o.console = filepath.Join(g.logs, "console.log")
	initramfs := filepath.Join(g.logs, "initramfs.cpio")
	defer os.Remove(initramfs)
	absent, err := g.pack(ctx, initramfs)
	if err != nil {
		return o, err
	}
	o.absent = absent
	vmlinuz, err := g.tree.Image()
	if err != nil {
		return o, err
	}
	qemu, err := findProgram("qemu-system-x86_64")
	if err != nil {
		return o, err
	}

	limited, cancel := context.WithTimeout(ctx, g.limit())
	defer cancel()
	cmd := exec.CommandContext(limited, qemu, qemuArgs(vmlinuz, initramfs, o.console)...)
	cmd.WaitDelay = 5 * time.Second
	// A guest does not outlive a run that is killed. The kernel ties it to the
	// thread that started it, so the thread has to stay.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	results, err := cmd.StdoutPipe()
	if err != nil {
		return o, fmt.Errorf("open the guest's results: %w", err)
	}
	log, err := os.Create(filepath.Join(g.logs, "output.log"))
	if err != nil {
		return o, fmt.Errorf("write the guest's results: %w", err)
	}
	defer log.Close()
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return o, fmt.Errorf("start %s: %w", qemu, err)
	}
	finished, readErr := o.read(io.TeeReader(results, log), len(g.jobs), start)
	waitErr := cmd.Wait()
	o.total = time.Since(start)
	o.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	switch {
	case finished:
	case limited.Err() != nil:
		o.err = fmt.Errorf("the guest hung: no end within %s: %w", g.limit(), limited.Err())
	case readErr != nil:
		o.err = fmt.Errorf("the guest's results were lost: %w", readErr)
	default:
		o.err = errors.New("the guest ended before its jobs did: a kernel panic, or the console was lost")
		if said := strings.TrimSpace(errs.String()); said != "" || waitErr != nil {
			o.err = errors.Join(o.err, waitErr, errors.New("qemu: "+said))
		}
	}
	return o, nil
}

func qemuArgs(vmlinuz, initramfs, console string) []string {
	return []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2G",
		"-kernel", vmlinuz, "-initrd", initramfs,
		"-serial", "file:" + console, "-serial", "stdio",
		// A panic or an oops ends QEMU at once. Mitigations and watchdogs cost an
		// emulated processor much and tell nothing; the wall clock finds a hang.
		"-append", "console=ttyS0 loglevel=6 rdinit=/init panic=-1 oops=panic mitigations=off nowatchdog " +
			"no_timer_check random.trust_cpu=on cgroup_no_v1=all rcupdate.rcu_cpu_stall_suppress=1",
	}
}

// read follows the results up to their end; finished says that all jobs ended
// and the guest said so.
func (o *outcome) read(r io.Reader, jobs int, start time.Time) (finished bool, err error) {
	o.jobs = make([]jobOutcome, jobs)
	current := -1
	var began time.Time
	in := bufio.NewReader(r)
	for {
		line, err := in.ReadBytes('\n')
		words, marked := bytes.CutPrefix(bytes.TrimRight(line, "\r\n"), []byte(mark))
		fields := strings.Fields(string(words))
		switch {
		case !marked:
			if current >= 0 {
				o.jobs[current].output = append(o.jobs[current].output, line...)
			}
		case len(fields) == 1 && fields[0] == "boot":
			o.boot = time.Since(start)
		case len(fields) == 2 && fields[0] == "begin":
			if n, bad := strconv.Atoi(fields[1]); bad == nil && n < jobs {
				current, began = n, time.Now()
				o.jobs[n].started = true
			}
		case len(fields) == 2 && fields[0] == "end" && current >= 0:
			j := &o.jobs[current]
			code, bad := strconv.Atoi(fields[1])
			j.ended, j.code, j.took = bad == nil, code, time.Since(began)
			current = -1
		case len(fields) == 1 && fields[0] == "done":
			finished = true
		}
		if errors.Is(err, io.EOF) {
			return finished, nil
		}
		if err != nil {
			return finished, err
		}
	}
}

// pack writes the guest's file system.
func (g guest) pack(ctx context.Context, to string) (absent []string, err error) {
	im := newImage()
	busybox, err := findProgram("busybox")
	if err != nil {
		return nil, err
	}
	if err := im.copy("/usr/busybox/busybox", busybox); err != nil {
		return nil, err
	}
	im.link("/usr/bin/sh", "/usr/busybox/busybox")
	for _, d := range []string{"/proc", "/sys", "/dev", "/run", "/tmp", "/root", "/var/lib", "/var/log", "/mnt"} {
		im.mkdir(d)
	}
	im.link("/var/run", "/run")
	im.write("/etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n"))
	im.write("/etc/group", 0o644, []byte("root:x:0:\n"))
	im.write("/etc/hosts", 0o644, []byte("127.0.0.1 localhost\n::1 localhost\n"))
	im.write("/etc/os-release", 0o644, []byte("ID=mooring-test\n"))
	for _, name := range []string{"/etc/protocols", "/etc/services", "/etc/ethertypes"} {
		if _, err := os.Stat(name); err == nil {
			if err := im.copy(name, name); err != nil {
				return nil, err
			}
		}
	}

	modules, absent, err := loadOrder(ctx, g.tree, Modules)
	if err != nil {
		return nil, err
	}
	var order strings.Builder
	for _, m := range modules {
		im.write("/modules/"+m.name, 0o644, m.image)
		order.WriteString(m.name + "\n")
	}
	im.write("/modules.order", 0o644, []byte(order.String()))

	for i, j := range g.jobs {
		if err := g.packJob(im, i, j); err != nil {
			return nil, fmt.Errorf("job %s: %w", j.name(), err)
		}
	}
	im.write("/init", 0o755, []byte(initScript(len(g.jobs))))
	return absent, im.save(to)
}

func (g guest) packJob(im *image, i int, j builtJob) error {
	dir := path.Join(srcDir, strings.TrimPrefix(j.Package, "./"))
	binary := path.Join(dir, path.Base(dir)+".test")
	if err := im.copy(binary, j.binary); err != nil {
		return err
	}
	testdata := filepath.Join(j.source, j.Package, "testdata")
	if _, err := os.Stat(testdata); err == nil {
		if err := im.copy(path.Join(dir, "testdata"), testdata); err != nil {
			return err
		}
	}
	for _, c := range j.Commands {
		name := path.Base(c)
		if err := im.copy(path.Join(srcDir, "bin", name), filepath.Join(j.commands, name)); err != nil {
			return err
		}
	}
	for _, f := range j.Files {
		if err := im.copy(path.Join(srcDir, f), filepath.Join(j.source, f)); err != nil {
			return err
		}
	}
	for _, p := range j.Programs {
		if err := im.addProgram(p); err != nil {
			return err
		}
	}
	im.write(fmt.Sprintf("/jobs/%d", i), 0o755, []byte(j.script(dir, binary, g.tree.Series())))
	return nil
}

// script runs the job; the second time-out is for a test binary that no longer
// reports its own.
func (j Job) script(dir, binary, kernel string) string {
	var s strings.Builder
	s.WriteString("#!/bin/sh\n")
	fmt.Fprintf(&s, "cd %s || exit 1\n", quote(dir))
	fmt.Fprintf(&s, "export MOORING_KERNEL=%s MOORING_BIN=%s\n", quote(kernel), quote(path.Join(srcDir, "bin")))
	for _, e := range j.Env {
		name, value, _ := strings.Cut(e, "=")
		fmt.Fprintf(&s, "export %s=%s\n", name, quote(value))
	}
	fmt.Fprintf(&s, "exec timeout -s KILL %d %s -test.v=test2json -test.timeout=%s",
		int((j.timeout() + killAfter).Seconds()), quote(binary), j.timeout())
	if j.Run != "" {
		fmt.Fprintf(&s, " -test.run=%s", quote(j.Run))
	}
	if j.Skip != "" {
		fmt.Fprintf(&s, " -test.skip=%s", quote(j.Skip))
	}
	s.WriteString("\n")
	return s.String()
}

func quote(s string) string {
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// initScript is the guest's first program. It is given the number of jobs.
func initScript(jobs int) string {
	return fmt.Sprintf(`#!/usr/busybox/busybox sh
/usr/busybox/busybox --install -s /usr/busybox
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/usr/busybox HOME=/root TERM=dumb LC_ALL=C
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
hostname mooring-test
ip link set lo up
ulimit -n 65536
stty -F /dev/ttyS1 raw -echo
exec </dev/null >/dev/ttyS1
while read -r module; do
	insmod "/modules/$module" || echo "init: module $module does not load" >/dev/console
done </modules.order
rm -r /modules
echo
echo "%[1]sboot"
job=0
while [ "$job" -lt %[2]d ]; do
	echo "%[1]sbegin $job"
	sh "/jobs/$job" 2>&1
	code=$?
	echo
	echo "%[1]send $code"
	job=$((job + 1))
done
echo "%[1]sdone"
sync
poweroff -f
`, mark, jobs)
}

// trouble matches what a kernel says when it finds itself broken, and what init
// says about a module.
var trouble = regexp.MustCompile(`(?m)^(\[[ \d.]+\](\[ *[TC]\d+\])? )?(WARNING:|BUG:|INFO: task .* blocked|Oops|kernel BUG at|general protection|UBSAN:|refcount_t:|Kernel panic|unregister_netdevice: waiting|init: module).*$`)

// troubles returns the lines of the console that no run may have.
func troubles(console string) []string {
	return trouble.FindAllString(strings.ReplaceAll(console, "\r", ""), -1)
}

// emulatorsFault tells a guest that ended by a trap of code that the kernel was
// changing: it writes int3 over an instruction, the new one, and takes the int3 away
// when every processor was told. QEMU's processors, threads of their own, still trap on
// it when nobody expects that any more. No program of a job can cause it.
func (o outcome) emulatorsFault() bool {
	if o.err == nil {
		return false
	}
	console, err := os.ReadFile(o.console)
	return err == nil && strings.Contains(string(console), "Oops: int3: 0000")
}

// tail is the console's end, for a person to read.
func tail(console string, lines int) string {
	all := strings.Split(strings.TrimRight(strings.ReplaceAll(console, "\r", ""), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
