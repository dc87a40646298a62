// SPDX-License-Identifier: Apache-2.0

//go:build root

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// bin holds what `make demo` builds.
var bin string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if bin, err = os.MkdirTemp("", "mooring-demo-"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(bin)
		command := exec.Command("go", "build", "-buildvcs=false", "-o", bin+"/", "./plugins/...", "./daemon/mooringd", "./daemon/mooring", "./test/demo",
			"github.com/containernetworking/cni/cnitool")
		command.Dir = filepath.Join("..", "..")
		command.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := command.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build the demo: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

func start(t *testing.T) (*exec.Cmd, *bufio.Scanner, *bytes.Buffer) {
	t.Helper()
	command := exec.Command(filepath.Join(bin, "demo"), "--bin", bin, "--cnitool", filepath.Join(bin, "cnitool"),
		"--manifests", filepath.Join("..", "..", "conf", "examples"))
	out, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	complaint := new(bytes.Buffer)
	command.Stderr = complaint
	// A group of its own, to be signalled as a terminal does it.
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	return command, bufio.NewScanner(out), complaint
}

// nothingIsLeft looks for what the demo of that process made.
func nothingIsLeft(t *testing.T, pid int) {
	t.Helper()
	for _, pattern := range []string{"/run/netns/mrtest-%d-*", os.TempDir() + "/mrtest-%d-*", "/sys/fs/cgroup/mooring-demo-%d", "/sys/fs/cgroup/unified/mooring-demo-%d"} {
		if left, _ := filepath.Glob(fmt.Sprintf(pattern, pid)); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	}
	mine := fmt.Sprintf("mrtest-%d-", pid)
	for _, path := range []string{"/proc/self/mounts", "/proc/self/mountinfo"} {
		if mounts, err := os.ReadFile(path); err != nil || bytes.Contains(mounts, []byte(mine)) {
			t.Errorf("a mount of the demo is left in %s (%v)", path, err)
		}
	}
	commands, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range commands {
		if line, _ := os.ReadFile(path); bytes.Contains(line, []byte(mine)) {
			t.Errorf("a process is left: %q", line)
		}
	}
	results, _ := filepath.Glob("/var/lib/cni/results/mooring-demo-*")
	for _, path := range results {
		if content, err := os.ReadFile(path); err == nil && bytes.Contains(content, []byte(mine)) {
			t.Errorf("a CNI result is left: %s", path)
		}
	}
}

func TestDemoTellsItsStoryAndLeavesNothing(t *testing.T) {
	began := time.Now()
	command, lines, complaint := start(t)
	var story strings.Builder
	for lines.Scan() {
		story.WriteString(lines.Text() + "\n")
	}
	if err := command.Wait(); err != nil {
		t.Fatalf("the demo: %v: %s\n%s", err, complaint, &story)
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("the demo took %v", took)
	}
	nothingIsLeft(t, command.Process.Pid)
	for what, pattern := range map[string]string{
		"pods by cnitool ADD":        `cnitool add mooring-demo \S+\n +-> web-3 10\.244\.0\.\d+ fd00:10:244::\S+`,
		"an answer by IPv4":          `curl http://10\.96\.0\.10/\n +hello from web-\d to 10\.244\.0\.\d+\n`,
		"an answer by IPv6":          `curl http://\[fd00:10:96::10\]/\n +hello from web-\d to fd00:10:244::\w+\n`,
		"IPv4's choice of a backend": `SVC +TCP +10\.244\.0\.\d+:\d+ +10\.96\.0\.10:80 +=> 10\.244\.0\.\d+:8080 +established`,
		"IPv4's flow to the backend": `EGRESS +TCP +10\.244\.0\.\d+:\d+ +10\.244\.0\.\d+:8080 +=> 10\.96\.0\.10:80 +established`,
		"IPv6's choice of a backend": `SVC +TCP +\[fd00:10:244::\w+\]:\d+ +\[fd00:10:96::10\]:80 +=> \[fd00:10:244::\w+\]:8080 +established`,
		"IPv6's flow to the backend": `EGRESS +TCP +\[fd00:10:244::\w+\]:\d+ +\[fd00:10:244::\w+\]:8080 +=> \[fd00:10:96::10\]:80 +established`,
		"the table after it":         `== After it: [\s\S]*\$ mooring ct list\n`,
		"the end":                    `the node is gone, [\d.]+ s after the beginning`,
		"a healthy node":             `Health +healthy`,
	} {
		if !regexp.MustCompile(pattern).MatchString(story.String()) {
			t.Errorf("%s is not told: no %s", what, pattern)
		}
	}
	_, after, _ := strings.Cut(story.String(), "== After it")
	after, _, _ = strings.Cut(after, "== More")
	if strings.Contains(after, "established") {
		t.Errorf("a connection that has ended is shown as open: %s", after)
	}
	if t.Failed() {
		t.Logf("the story:\n%s", &story)
	}
}

func TestCtrlCInTheMiddleOfTheDemoLeavesNothing(t *testing.T) {
	for _, test := range []struct {
		moment string
		signal syscall.Signal
	}{
		{"$ mooringd", syscall.SIGINT},
		{"-> client", syscall.SIGTERM},
		{"K8S_POD_NAME=web-2", syscall.SIGINT},
		{"hello from", syscall.SIGHUP},
		{"== Down", syscall.SIGINT},
	} {
		t.Run(fmt.Sprintf("%v at %s", test.signal, strings.Trim(test.moment, "=$-> ")), func(t *testing.T) {
			command, lines, complaint := start(t)
			for lines.Scan() && !strings.Contains(lines.Text(), test.moment) {
			}
			began := time.Now()
			if err := syscall.Kill(-command.Process.Pid, test.signal); err != nil {
				t.Fatal(err)
			}
			for lines.Scan() {
			}
			err := command.Wait()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 128+int(test.signal) {
				t.Errorf("the demo ends with %v: %s", err, complaint)
			}
			if took := time.Since(began); took > 30*time.Second {
				t.Errorf("taking down took %v", took)
			}
			if strings.Contains(complaint.String(), "demo: ") {
				t.Errorf("it complains: %s", complaint)
			}
			nothingIsLeft(t, command.Process.Pid)
		})
	}
}
