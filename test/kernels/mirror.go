// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// A source is one repository of apt's configuration.
type source struct {
	uri        string
	suites     []string
	components []string
	// signedBy is a keyring's path, or an armoured key itself, or empty.
	signedBy string
}

// debianSuites are the names by which a source is recognised as Debian's own.
var debianSuites = []string{
	"bullseye", "bookworm", "trixie", "forky", "duke", "sid",
	"oldoldstable", "oldstable", "stable", "testing", "unstable",
}

const debianKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// readSources reads apt's configuration under etc (/etc/apt): sources.list, and
// in sources.list.d the one-line *.list and the deb822 *.sources.
func readSources(etc string) ([]source, error) {
	files := []string{filepath.Join(etc, "sources.list")}
	for _, pattern := range []string{"*.list", "*.sources"} {
		found, err := filepath.Glob(filepath.Join(etc, "sources.list.d", pattern))
		if err != nil {
			return nil, fmt.Errorf("list the sources of apt in %s: %w", etc, err)
		}
		files = append(files, found...)
	}
	var all []source
	for _, file := range files {
		text, err := os.ReadFile(file)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read apt's sources: %w", err)
		}
		if strings.HasSuffix(file, ".sources") {
			all = append(all, parseDeb822(string(text))...)
		} else {
			all = append(all, parseOneLine(string(text))...)
		}
	}
	return all, nil
}

// parseOneLine reads lines like `deb [signed-by=/k.gpg arch=amd64] URI suite main`.
func parseOneLine(text string) []source {
	var all []source
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimSpace(line)
		rest, ok := strings.CutPrefix(line, "deb ")
		if !ok {
			continue
		}
		rest = strings.TrimSpace(rest)
		var s source
		if strings.HasPrefix(rest, "[") {
			options, after, ok := strings.Cut(rest[1:], "]")
			if !ok {
				continue
			}
			rest = after
			for _, option := range strings.Fields(options) {
				if value, ok := strings.CutPrefix(option, "signed-by="); ok {
					s.signedBy = value
				}
			}
		}
		fields := strings.Fields(rest)
		if len(fields) < 3 {
			continue
		}
		s.uri, s.suites, s.components = fields[0], fields[1:2], fields[2:]
		all = append(all, s)
	}
	return all
}

// parseDeb822 reads stanzas of `Key: value` with indented continuation lines.
func parseDeb822(text string) []source {
	var all []source
	stanza := map[string]string{}
	last := ""
	flush := func() {
		if slices.Contains(strings.Fields(stanza["types"]), "deb") && stanza["enabled"] != "no" {
			for _, uri := range strings.Fields(stanza["uris"]) {
				all = append(all, source{
					uri:        uri,
					suites:     strings.Fields(stanza["suites"]),
					components: strings.Fields(stanza["components"]),
					signedBy:   stanza["signed-by"],
				})
			}
		}
		stanza, last = map[string]string{}, ""
	}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		switch {
		case strings.HasPrefix(line, "#"):
		case strings.TrimSpace(line) == "":
			flush()
		case line[0] == ' ' || line[0] == '\t':
			line = strings.TrimSpace(line)
			if line == "." { // deb822 writes an empty line so
				line = ""
			}
			stanza[last] = strings.TrimPrefix(stanza[last]+"\n"+line, "\n")
		default:
			key, value, _ := strings.Cut(line, ":")
			last = strings.ToLower(strings.TrimSpace(key))
			stanza[last] = strings.TrimSpace(value)
		}
	}
	flush()
	return all
}

// mirrorFor picks the machine's own mirror for a Debian suite, which that mirror
// has even when the machine's release is another one.
func mirrorFor(suite string, sources []source) (source, error) {
	security := strings.HasSuffix(suite, "-security")
	base, variable := "debian", "MOORING_DEBIAN_MIRROR"
	if security {
		base, variable = "debian-security", "MOORING_DEBIAN_SECURITY_MIRROR"
	}
	if uri := os.Getenv(variable); uri != "" {
		return source{uri: uri, signedBy: debianKeyring}, nil
	}
	var found *source
	for i, s := range sources {
		if !slices.Contains(s.components, "main") {
			continue
		}
		fits := slices.ContainsFunc(s.suites, func(have string) bool {
			release, pocket, _ := strings.Cut(have, "-")
			return slices.Contains(debianSuites, release) && (pocket == "security") == security
		})
		if !fits {
			continue
		}
		if found == nil || path.Base(s.uri) == base && path.Base(found.uri) != base {
			found = &sources[i]
		}
	}
	if found == nil {
		return source{}, fmt.Errorf("no Debian mirror for %s in apt's configuration (/etc/apt/sources.list, /etc/apt/sources.list.d): "+
			"set %s to the address of one and install debian-archive-keyring", suite, variable)
	}
	return *found, nil
}

// line is the source as a one-line entry for one suite. A key written into the
// configuration itself, and not as a path, goes to a file in dir.
func (s source) line(suite, dir string) (string, error) {
	key := s.signedBy
	if strings.Contains(key, "BEGIN PGP") {
		file := filepath.Join(dir, suite+".asc")
		if err := os.WriteFile(file, []byte(key+"\n"), 0o644); err != nil {
			return "", fmt.Errorf("write the key of %s: %w", suite, err)
		}
		key = file
	}
	options := "arch=amd64"
	if key == "" {
		if _, err := os.Stat(debianKeyring); err == nil {
			key = debianKeyring
		}
	}
	if key != "" {
		options += " signed-by=" + key
	}
	return fmt.Sprintf("deb [%s] %s %s main\n", options, s.uri, suite), nil
}
