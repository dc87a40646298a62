// SPDX-License-Identifier: Apache-2.0

//go:build root

package containerd

import (
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The build stage's commands are run as the Dockerfile has them, for each
// architecture that images are made for, on this machine's Go. What the last stage
// takes of them must be there: static, and of the architecture.
func TestDockerfileBuildsForEveryArchitecture(t *testing.T) {
	root, err := ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(filepath.Join(root, "Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	modules, err := exec.Command("go", "env", "GOMODCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	for arch, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
		t.Run(arch, func(t *testing.T) {
			image := t.TempDir() // its root directory
			inside := strings.NewReplacer("/out/", image+"/out/", "/go/", image+"/go/")
			environment := append(os.Environ(), "GOPATH="+image+"/go", "GOMODCACHE="+strings.TrimSpace(string(modules)))
			stage, ran := "", 0
			var taken []string
			for line := range strings.Lines(strings.ReplaceAll(string(content), "\\\n", "")) {
				words := strings.Fields(line)
				switch {
				case len(words) < 2:
				case words[0] == "FROM":
					stage = words[len(words)-1]
				case words[0] == "COPY" && words[1] == "--from=build":
					taken = append(taken, words[2:len(words)-1]...)
				case stage != "build":
				case words[0] == "ARG":
					name, value, _ := strings.Cut(words[1], "=")
					if name == "TARGETARCH" {
						value = arch
					}
					environment = append(environment, name+"="+value)
				case words[0] == "ENV":
					for _, word := range words[1:] {
						environment = append(environment, strings.ReplaceAll(word, "$TARGETARCH", arch))
					}
				case words[0] == "RUN":
					command := exec.Command("sh", "-c", inside.Replace(strings.TrimPrefix(line, "RUN ")))
					command.Dir, command.Env = root, environment
					if out, err := command.CombinedOutput(); err != nil {
						t.Fatalf("%s: %v\n%s", line, err, out)
					}
					ran++
				}
			}
			if ran == 0 || !slices.Contains(taken, "/out/mooringd") {
				t.Fatalf("%d commands were run, %q taken: this test no longer reads the Dockerfile", ran, taken)
			}
			for _, path := range taken {
				f, err := elf.Open(filepath.Join(image, path))
				if err != nil {
					t.Error(err)
					continue
				}
				defer f.Close()
				dynamic := slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
				if f.Machine != machine || dynamic {
					t.Errorf("%s is for %v, dynamic: %v", path, f.Machine, dynamic)
				}
			}
		})
	}
}
