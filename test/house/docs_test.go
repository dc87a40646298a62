// SPDX-License-Identifier: Apache-2.0

package house

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	linked   = regexp.MustCompile(`\]\(([^)#\s]+)(#[^)]*)?\)`)
	function = regexp.MustCompile("`((?:lib/)?[a-z]+\\.[ch]):([a-z_0-9]+)`")
)

func TestDocumentsNameWhatExists(t *testing.T) {
	documents := 0
	for _, name := range files(t) {
		if filepath.Ext(name) != ".md" {
			continue
		}
		documents++
		path := filepath.Join("..", "..", name)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range linked.FindAllStringSubmatch(string(text), -1) {
			if strings.Contains(match[1], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), match[1])); err != nil {
				t.Errorf("%s links to %s: %v", name, match[1], err)
			}
		}
		for _, match := range function.FindAllStringSubmatch(string(text), -1) {
			source, err := os.ReadFile(filepath.Join(filepath.Dir(path), match[1]))
			if err != nil {
				t.Errorf("%s names %s: %v", name, match[0], err)
			} else if !regexp.MustCompile(`\b` + match[2] + `\(|BPF_PROG\(` + match[2] + `\b`).Match(source) {
				t.Errorf("%s names %s, which is not there", name, match[0])
			}
		}
	}
	if documents < 5 {
		t.Errorf("only %d documents are found", documents)
	}
}
