// SPDX-License-Identifier: Apache-2.0

package conf

import (
	goflag "flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var updateDocs = goflag.Bool("update-docs", false, "write the table of docs/configuration.md anew")

// The table is what the daemon itself says of each key.
func TestDocumentListsEveryKey(t *testing.T) {
	const file, begin, end = "../docs/configuration.md", "<!-- table -->\n", "<!-- end -->\n"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, found := strings.Cut(string(text), begin)
	got, after, ended := strings.Cut(rest, end)
	if !found || !ended {
		t.Fatalf("%s has no table between %q and %q", file, begin, end)
	}
	var want strings.Builder
	want.WriteString("| key | flag | default | meaning | accepted |\n| --- | --- | --- | --- | --- |\n")
	defaults := Default()
	for _, o := range options {
		value := strings.Join(o.get(&defaults), ",")
		switch {
		case o.key == "nodeName":
			value = "the hostname" // of whoever runs this
		case value == "":
			value = "empty"
		default:
			value = "`" + value + "`"
		}
		fmt.Fprintf(&want, "| `%s` | `--%s` | %s | %s | %s |\n", o.key, flagName(o.key), value,
			strings.ReplaceAll(o.usage, "|", ", "), strings.ReplaceAll(o.accepted, "|", ", "))
	}
	if *updateDocs {
		if err := os.WriteFile(file, []byte(before+begin+want.String()+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want.String(), got); diff != "" {
		t.Errorf("%s is not what the options say (go test ./conf -run Document -update-docs):\n%s", file, diff)
	}
}
