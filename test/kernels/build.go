// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

func (j Job) name() string {
	if j.Name != "" {
		return j.Name
	}
	return strings.TrimPrefix(j.Package, "./")
}

// ModuleRoot is the directory of go.mod.
func ModuleRoot() (string, error) {
	out, err := command(context.Background(), nil, "", "go", "env", "GOMOD")
	if err != nil {
		return "", err
	}
	return filepath.Dir(strings.TrimSpace(string(out))), nil
}

// build makes the static binaries of all jobs below dir. Jobs of one package
// share one test binary.
func build(ctx context.Context, root, dir string, jobs []Job) ([]builtJob, error) {
	env := append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	commands := filepath.Join(dir, "bin")
	if err := os.MkdirAll(commands, 0o755); err != nil {
		return nil, fmt.Errorf("make a directory for the binaries: %w", err)
	}
	done := map[string]bool{}
	var all []builtJob
	for _, j := range jobs {
		b := builtJob{Job: j, commands: commands, source: root,
			binary: filepath.Join(dir, strings.ReplaceAll(strings.TrimPrefix(j.Package, "./"), "/", "-")+".test")}
		if !done[j.Package] {
			if _, err := command(ctx, env, root, "go", "test", "-c", "-tags", "root,kernels", "-ldflags", "-s -w", "-o", b.binary, j.Package); err != nil {
				return nil, fmt.Errorf("job %s: %w", j.name(), err)
			}
			if _, err := os.Stat(b.binary); err != nil {
				return nil, fmt.Errorf("job %s: %s has no tests", j.name(), j.Package)
			}
			done[j.Package] = true
		}
		for _, c := range j.Commands {
			if done[c] {
				continue
			}
			if _, err := command(ctx, env, root, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", commands+"/", c); err != nil {
				return nil, fmt.Errorf("job %s: %w", j.name(), err)
			}
			done[c] = true
		}
		all = append(all, b)
	}
	return all, nil
}
