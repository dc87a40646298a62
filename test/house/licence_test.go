// SPDX-License-Identifier: Apache-2.0

package house

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// files are the repository's, tracked and new, as git knows them.
func files(t *testing.T) (names []string) {
	t.Helper()
	command := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	command.Dir = filepath.Join("..", "..")
	out, err := command.Output()
	if err != nil {
		t.Fatalf("git ls-files: %v", err)
	}
	for name := range strings.SplitSeq(string(out), "\x00") {
		// A file that is deleted and not yet committed is still listed.
		if _, err := os.Stat(filepath.Join("..", "..", name)); name != "" && err == nil {
			names = append(names, name)
		}
	}
	return names
}

func TestEverySourceFileNamesItsLicence(t *testing.T) {
	const header = "SPDX-License-Identifier: "
	for _, name := range files(t) {
		want := "Apache-2.0"
		switch filepath.Ext(name) {
		case ".c", ".h":
			want = "GPL-2.0-only OR BSD-2-Clause"
		case ".go", ".sh":
		default:
			continue
		}
		content, err := os.ReadFile(filepath.Join("..", "..", name))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(content[:min(len(content), 200)], []byte("DO NOT EDIT.")) {
			continue
		}
		_, after, found := bytes.Cut(content[:min(len(content), 400)], []byte(header))
		licence, _, _ := bytes.Cut(after, []byte("\n"))
		got := strings.TrimSpace(strings.TrimSuffix(string(licence), "*/"))
		if !found || got != want {
			t.Errorf("%s: licence %q, want the line %s%s", name, got, header, want)
			continue
		}
		for _, part := range strings.Split(got, " OR ") {
			if _, err := os.Stat(filepath.Join("..", "..", "LICENSES", part+".txt")); err != nil {
				t.Errorf("%s: the text of its licence is missing: %v", name, err)
			}
		}
	}
}
