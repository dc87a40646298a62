// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"bufio"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/mooring-cni/mooring/test/netns"
)

// MooringImage writes the image that the Dockerfile describes, under each of the
// names, and returns the archive: there is no builder of images here.
func (p *Programs) MooringImage(t netns.T, names ...string) string {
	t.Helper()
	root, err := ModuleRoot()
	if err != nil {
		t.Fatalf("%v", err)
	}
	i := Image{Names: names}
	if err := i.follow(filepath.Join(root, "Dockerfile"), p); err != nil {
		t.Fatalf("make the image as the Dockerfile does: %v", err)
	}
	archive := p.Path("mooring.tar")
	if err := i.Write(archive); err != nil {
		t.Fatalf("%v", err)
	}
	return archive
}

// follow does what the Dockerfile's last stage does. Its other stages are the
// programs that are built already, and iptables of this machine.
func (i *Image) follow(dockerfile string, p *Programs) error {
	f, err := os.Open(dockerfile)
	if err != nil {
		return err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		words := strings.Fields(lines.Text())
		if len(words) < 2 {
			continue
		}
		last := words[len(words)-1]
		switch {
		case words[0] == "FROM":
			i.Files, i.Entrypoint, i.Environment = map[string]string{}, nil, nil
		case words[0] == "ENTRYPOINT":
			i.Entrypoint = []string{strings.Trim(last, `[]"`)}
		case words[0] == "ENV":
			i.Environment = words[1:]
		case words[0] == "COPY" && words[1] == "--from=build":
			for _, source := range words[2 : len(words)-1] {
				name := filepath.Base(source)
				i.Files[filepath.Join(last, name)] = p.Path(name)
			}
		case words[0] == "COPY" && words[1] == "--from=iptables":
			if err := i.iptables(filepath.Join(filepath.Dir(dockerfile), "conf", "kubernetes", "iptables-root.sh"), p.Path("iptables-root")); err != nil {
				return err
			}
		}
	}
	return nil
}

func (i *Image) iptables(script, root string) error {
	if out, err := exec.Command(script, root).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", script, err, out)
	}
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			i.Files[strings.TrimPrefix(path, root)] = path
		}
		return err
	})
}
