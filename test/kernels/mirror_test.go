// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// writeApt lays out an /etc/apt.
func writeApt(t *testing.T, files map[string]string) string {
	t.Helper()
	etc := t.TempDir()
	for name, text := range files {
		name = filepath.Join(etc, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return etc
}

func TestMirrorComesFromTheMachinesOwnSources(t *testing.T) {
	for _, test := range []struct {
		name   string
		files  map[string]string
		suites map[string]string // suite -> the expected line
	}{
		{
			name: "deb822",
			files: map[string]string{"sources.list.d/debian.sources": `Types: deb
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /k/debian.gpg

Types: deb deb-src
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By: /k/debian.gpg
`},
			suites: map[string]string{
				"trixie-backports":  "deb [arch=amd64 signed-by=/k/debian.gpg] http://mirror.example/debian trixie-backports main\n",
				"bookworm-security": "deb [arch=amd64 signed-by=/k/debian.gpg] http://mirror.example/debian-security bookworm-security main\n",
			},
		},
		{
			name: "one-line lists with options",
			files: map[string]string{"sources.list": `# deb http://old.example/debian bookworm main
deb-src http://src.example/debian bookworm main
deb [ arch=amd64 signed-by=/k/d.gpg ] mirror+file:/etc/apt/mirrors/debian.list trixie main contrib # ours
deb [signed-by=/k/d.gpg] http://sec.example/debian-security trixie-security main
`},
			suites: map[string]string{
				"bookworm":          "deb [arch=amd64 signed-by=/k/d.gpg] mirror+file:/etc/apt/mirrors/debian.list bookworm main\n",
				"bookworm-security": "deb [arch=amd64 signed-by=/k/d.gpg] http://sec.example/debian-security bookworm-security main\n",
			},
		},
		{
			name: "others' repositories for the same release do not count",
			files: map[string]string{
				"sources.list.d/a-docker.list":    "deb [signed-by=/k/x] https://containers.example/linux/debian bookworm stable\n",
				"sources.list.d/b-cloud.list":     "deb [signed-by=/k/x] https://cloud.example/apt cloud-sdk-bookworm main\n",
				"sources.list.d/c-vendor.list":    "deb [signed-by=/k/x] https://vendor.example/tools bookworm main\n",
				"sources.list.d/d-off.sources":    "Types: deb\nEnabled: no\nURIs: http://off.example/debian\nSuites: bookworm\nComponents: main\n",
				"sources.list.d/e-debian.sources": "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\nComponents: main\nSigned-By: /k/debian.gpg\n",
			},
			suites: map[string]string{
				"bookworm": "deb [arch=amd64 signed-by=/k/debian.gpg] http://mirror.example/debian bookworm main\n",
			},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			sources, err := readSources(writeApt(t, test.files))
			if err != nil {
				t.Fatal(err)
			}
			for suite, want := range test.suites {
				mirror, err := mirrorFor(suite, sources)
				if err != nil {
					t.Fatal(err)
				}
				got, err := mirror.line(suite, t.TempDir())
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%s (-want +got):\n%s", suite, diff)
				}
			}
		})
	}
}

func TestKeyWrittenIntoTheSourceGoesToAFile(t *testing.T) {
	sources := parseDeb822("Types: deb\nURIs: http://m.example/debian\nSuites: trixie\nComponents: main\n" +
		"Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQ==\n -----END PGP PUBLIC KEY BLOCK-----\n")
	mirror, err := mirrorFor("trixie", sources)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	line, err := mirror.line("trixie", dir)
	if err != nil {
		t.Fatal(err)
	}
	if want := "signed-by=" + filepath.Join(dir, "trixie.asc"); !strings.Contains(line, want) {
		t.Errorf("got %q, expected %s in it", line, want)
	}
	got, err := os.ReadFile(filepath.Join(dir, "trixie.asc"))
	if err != nil {
		t.Fatal(err)
	}
	want := "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmQ==\n-----END PGP PUBLIC KEY BLOCK-----\n"
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("the key (-want +got):\n%s", diff)
	}
}

func TestMachineWithoutADebianMirrorIsToldWhatToSet(t *testing.T) {
	sources := parseOneLine("deb http://mirror.example/ubuntu noble main\n")
	for suite, variable := range map[string]string{
		"trixie":            "MOORING_DEBIAN_MIRROR",
		"bookworm-security": "MOORING_DEBIAN_SECURITY_MIRROR",
	} {
		_, err := mirrorFor(suite, sources)
		if err == nil || !strings.Contains(err.Error(), variable+" ") {
			t.Errorf("%s: got %v, expected an error that names %s", suite, err, variable)
		}
		t.Setenv(variable, "http://set.example/d")
		got, err := mirrorFor(suite, sources)
		if err != nil || got.uri != "http://set.example/d" {
			t.Errorf("%s: got %v, %v with %s set", suite, got, err, variable)
		}
	}
}
